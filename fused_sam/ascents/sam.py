"""SAM (Foret et al., ICLR 2021) and, for groups that are adaptive, ASAM (Kwon et al., ICML 2021).

SAM:   epsilon = rho * g / ||g||
ASAM:  epsilon = rho * T**2 * g / ||T * g||,  T = |w| + eta
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..rules.base import Group
from ..text import abs, divide, is_finite, sqrt, where
from .base import Ascent, Choice, Kernel, Sums


def _columns(group: Group, unscale: float) -> tuple[float, ...]:
    rho = -group["rho"] if group.get("maximize") else group["rho"]
    return rho, group["adaptive"], group["eta"]


def _terms(param, grad, rho, adaptive, eta):
    if param is not None:
        grad = where(adaptive != 0, abs(param) + eta, 1.0) * grad
    return grad * grad


def _scalars(sq_norm, rho, adaptive, eta):
    norm = sqrt(sq_norm)
    climbs = is_finite(norm) & (norm > 0)
    return where(climbs, divide(rho, norm), 0.0), adaptive, eta


def _move(param, grad, scale, adaptive, eta):
    t = where(adaptive != 0, abs(param) + eta, 1.0)
    return param + scale * (t * t * grad)


def _kernel(params: list[Tensor], grads: list[Tensor], scale: Tensor) -> None:
    """Stochastic gradient ascent with a learning rate on the device, in one pass."""
    torch._fused_sgd_(
        params,
        grads,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=-scale,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=(scale == 0).to(torch.float32),
    )


def _kernel_for(group: Group) -> Kernel | None:
    return None if group["adaptive"] else _kernel


@dataclass(frozen=True)
class SAM(Choice):
    """SAM; groups with ``adaptive=True``: ASAM."""

    key: ClassVar[str] = "sam"


ASCENT = Ascent(
    key=SAM.key,
    name="Sam",
    sums=Sums(
        "SamNorm",
        _terms,
        _columns,
        reads_param=lambda group: bool(group["adaptive"]),
        squares=lambda group: not group["adaptive"],
    ),
    scalars=_scalars,
    move=_move,
    norm=lambda group, numbers: numbers[0].sqrt(),
    kernel=_kernel_for,
    real=lambda group: bool(group["adaptive"]),
)
