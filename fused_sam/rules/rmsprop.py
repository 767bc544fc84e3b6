"""``torch.optim.RMSprop``."""

from __future__ import annotations

import torch

from ..text import lerp, sqrt, where
from .base import Group, Rule, State


def _columns(group: Group) -> tuple[float, ...]:
    alpha = group["alpha"]
    options = (group["eps"], group["momentum"], group["centered"])
    return (group["weight_decay"], alpha, 1 - alpha, *options)


def _scalars(lr, weight_decay, alpha, rest, eps, momentum, centered, step, fresh):
    return lr, weight_decay, alpha, rest, eps, momentum, centered


def _update(
    param,
    grad,
    square_avg,
    momentum_buffer,
    grad_avg,
    lr,
    weight_decay,
    alpha,
    rest,
    eps,
    momentum,
    centered,
):
    # Without decay the weight must not enter: 0 * inf is NaN.
    grad = where(weight_decay != 0, grad + weight_decay * param, grad)
    square_avg = alpha * square_avg + rest * grad * grad
    second = square_avg
    if grad_avg is not None:
        grad_avg = lerp(grad_avg, grad, rest)
        # Rounding can take this variance below zero, where torch.optim.RMSprop gives NaN.
        variance = square_avg - grad_avg * grad_avg
        variance = where(variance < 0, 0.0, variance)
        second = where(centered != 0, variance, square_avg)
    update = grad / (sqrt(second) + eps)
    if momentum_buffer is not None:
        momentum_buffer = momentum * momentum_buffer + update
        update = where(momentum > 0, momentum_buffer, update)
    return param - lr * update, square_avg, momentum_buffer, grad_avg


RMSPROP = Rule(
    name="RmsProp",
    optimizer=torch.optim.RMSprop,
    states=(
        State("square_avg"),
        State("momentum_buffer", lambda group: group["momentum"] > 0),
        State("grad_avg", lambda group: bool(group["centered"])),
    ),
    counts=True,
    columns=_columns,
    scalars=_scalars,
    update=_update,
)
