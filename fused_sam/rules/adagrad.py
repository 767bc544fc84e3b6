"""``torch.optim.Adagrad``."""

from __future__ import annotations

import torch

from ..text import divide, sqrt, where
from .base import Group, Rule, State


def _columns(group: Group) -> tuple[float, ...]:
    return group["lr_decay"], group["weight_decay"], group["eps"]


def _scalars(lr, lr_decay, weight_decay, eps, step, fresh):
    return divide(lr, 1 + (step - 1) * lr_decay), weight_decay, eps


def _update(param, grad, sum, step_size, weight_decay, eps):
    # Without decay the weight must not enter: 0 * inf is NaN.
    grad = where(weight_decay != 0, grad + weight_decay * param, grad)
    sum = sum + grad * grad
    return param - step_size * (grad / (sqrt(sum) + eps)), sum


ADAGRAD = Rule(
    name="Adagrad",
    optimizer=torch.optim.Adagrad,
    states=(State("sum", initial=lambda group: group["initial_accumulator_value"]),),
    counts=True,
    columns=_columns,
    scalars=_scalars,
    update=_update,
)
