"""``torch.optim.Adam`` and ``AdamW``, which is Adam whose groups say decoupled_weight_decay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..text import divide, expm1, lerp, maximum, sqrt, where
from .base import STEP, Group, Rule, State


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _columns(group: Group) -> tuple[float, ...]:
    beta1, beta2 = map(float, group["betas"])
    return (
        group["weight_decay"],
        group["decoupled_weight_decay"],
        *(1 - beta1, _log(beta1)),
        *(beta2, 1 - beta2, _log(beta2)),
        group["eps"],
        group["amsgrad"],
    )


def _scalars(
    lr, weight_decay, decoupled, rest1, log1, beta2, rest2, log2, eps, amsgrad, step, fresh
):
    # 1 - beta**step (Kingma & Ba 2015, algorithm 1); for beta = 0 the logarithm is -inf.
    step_size = divide(lr, -expm1(step * log1))
    correction2 = -expm1(step * log2)
    coupled = where(decoupled != 0, 0.0, weight_decay)
    decay = where(decoupled != 0, 1 - lr * weight_decay, 1.0)  # Loshchilov & Hutter 2019
    return coupled, decay, rest1, beta2, rest2, step_size, correction2, eps, amsgrad


def _update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    coupled,
    decay,
    rest1,
    beta2,
    rest2,
    step_size,
    correction2,
    eps,
    amsgrad,
):
    # Without decay the weight must not enter: 0 * inf is NaN.
    grad = where(coupled != 0, grad + coupled * param, grad)
    exp_avg = lerp(exp_avg, grad, rest1)
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        second = where(amsgrad != 0, max_exp_avg_sq, exp_avg_sq)
    denom = sqrt(second / correction2) + eps
    return decay * param - step_size * (exp_avg / denom), exp_avg, exp_avg_sq, max_exp_avg_sq


def _kernel(
    params: list[Tensor],
    grads: list[Tensor],
    state: Mapping[str, list[Tensor]],
    group: Group,
    fresh: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = map(float, group["betas"])
    kernel(
        params,
        grads,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["max_exp_avg_sq"] if group["amsgrad"] else [],
        state[STEP],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


ADAM = Rule(
    name="Adam",
    optimizer=torch.optim.Adam,
    states=(
        State("exp_avg"),
        State("exp_avg_sq"),
        State("max_exp_avg_sq", lambda group: bool(group["amsgrad"])),
    ),
    counts=True,
    columns=_columns,
    scalars=_scalars,
    update=_update,
    kernel=_kernel,
    momentum="exp_avg",
)

ADAMW = dataclasses.replace(ADAM, optimizer=torch.optim.AdamW)
