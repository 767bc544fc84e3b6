"""Lion, "evolved sign momentum" (Chen et al., NeurIPS 2023, arXiv 2302.06675), algorithm 2.

w <- w - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * w)
m <- beta2 * m + (1 - beta2) * g
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..text import lerp, sign
from .base import Group, Rule, State


class Lion(Optimizer):
    """Lion: steps of one size in every coordinate, with one state and decoupled weight decay.

    Args:
        params: parameters or parameter groups.
        lr: the step's size, >= 0, a number or a tensor of one; a third to a tenth of AdamW's.
        betas: of the direction and of the average ``exp_avg``, each in [0, 1).
        weight_decay: decoupled, >= 0; three to ten times AdamW's.
        maximize: go uphill.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value!r}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that are there.

        Args:
            closure: computes the loss anew, with gradients enabled, and returns it.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                scalars = LION.scalars(group["lr"], *LION.numbers(group), 1, False)
                for p in group["params"]:
                    if p.grad is not None:
                        self._step_one(p, p.grad, group, scalars)
        return loss

    def _step_one(self, p: Tensor, grad: Tensor, group: Group, scalars: tuple[Any, ...]) -> None:
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} has a gradient of layout {grad.layout}; "
                f"Lion needs dense gradients"
            )
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        targets = [_real(p), _real(state["exp_avg"])]
        compute = torch.promote_types(targets[0].dtype, torch.float32)
        param, exp_avg = [target.to(compute) for target in targets]
        grad = _real(grad).to(compute)
        values = LION.update(param, -grad if group["maximize"] else grad, exp_avg, *scalars)
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _columns(group: Group) -> tuple[float, ...]:
    beta1, beta2 = map(float, group["betas"])
    return group["weight_decay"], 1 - beta1, 1 - beta2


def _scalars(lr, weight_decay, rest1, rest2, step, fresh):
    return lr, 1 - lr * weight_decay, rest1, rest2


def _update(param, grad, exp_avg, lr, decay, rest1, rest2):
    direction = sign(lerp(exp_avg, grad, rest1))
    return decay * param - lr * direction, lerp(exp_avg, grad, rest2)


LION = Rule(
    name="Lion",
    optimizer=Lion,
    states=(State("exp_avg"),),
    counts=False,
    columns=_columns,
    scalars=_scalars,
    update=_update,
)
