"""``torch.optim.SGD``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..text import where
from .base import Group, Rule, State


def _columns(group: Group) -> tuple[float, ...]:
    return group["weight_decay"], group["momentum"], 1 - group["dampening"], group["nesterov"]


def _scalars(lr, weight_decay, momentum, undampened, nesterov, step, fresh):
    # The first gradient enters undampened, as torch.optim.SGD has it.
    undampened = where(fresh, 1.0, undampened)
    return lr, weight_decay, momentum, undampened, nesterov


def _update(param, grad, momentum_buffer, lr, weight_decay, momentum, undampened, nesterov):
    # Without decay the weight must not enter: 0 * inf is NaN.
    grad = where(weight_decay != 0, grad + weight_decay * param, grad)
    if momentum_buffer is not None:
        momentum_buffer = momentum * momentum_buffer + undampened * grad
        heavy = where(nesterov != 0, grad + momentum * momentum_buffer, momentum_buffer)
        grad = where(momentum != 0, heavy, grad)
    return param - lr * grad, momentum_buffer


def _kernel(
    params: list[Tensor],
    grads: list[Tensor],
    state: Mapping[str, list[Tensor]],
    group: Group,
    fresh: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    torch._fused_sgd_(
        params,
        grads,
        state["momentum_buffer"] if group["momentum"] else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=fresh,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


SGD = Rule(
    name="Sgd",
    optimizer=torch.optim.SGD,
    states=(State("momentum_buffer", lambda group: bool(group["momentum"]), like_grad=True),),
    counts=False,
    columns=_columns,
    scalars=_scalars,
    update=_update,
    kernel=_kernel,
    momentum="momentum_buffer",
)
