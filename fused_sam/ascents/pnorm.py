"""Sharpness within a ball of another norm (Foret et al., ICLR 2021, equation 2).

    epsilon = rho * sign(g) * |g|**(q - 1) / (sum |g|**q)**(1/p),  1/p + 1/q = 1

whose p-norm is rho; p = 2 is SAM, and p = infinity is rho * sign(g). For groups that are adaptive
epsilon = rho * T * sign(T g) * |T g|**(q - 1) / (...)**(1/p), as ASAM (Kwon et al. 2021).
With u = |T g| / max |T g| that is rho * T * sign(T g) * u**(q - 1) / (sum u**q)**(1/p): of numbers
between 0 and 1 no power overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import P
from ..rules.base import Group
from ..text import abs, divide, is_finite, power, sign, where
from .base import Ascent, Choice, Sums


@dataclass(frozen=True)
class PNorm(Choice):
    """SAM within a ball of the p-norm; groups with ``adaptive=True``: ASAM within one.

    Attributes:
        p: 1.1 or more; ``math.inf``: epsilon is rho * sign(g).

    Raises:
        TypeError, ValueError: p cannot be used.
    """

    key: ClassVar[str] = "p-norm"
    p: float = P.default


def _conjugate(p: float) -> float:
    return 1.0 if p == math.inf else p / (p - 1)


def _columns(group: Group, unscale: float) -> tuple[float, ...]:
    rho = -group["rho"] if group.get("maximize") else group["rho"]
    exponent = 0.0 if group["p"] == math.inf else 1 / (group["p"] - 1)  # q - 1
    return rho, group["adaptive"], group["eta"], exponent, 1 / group["p"]


def _largest(param, grad, rho, adaptive, eta, exponent, root):
    if param is not None:
        grad = where(adaptive != 0, abs(param) + eta, 1.0) * grad
    return abs(grad)


def _terms(param, grad, largest, rho, adaptive, eta, exponent, root):
    if param is not None:
        grad = where(adaptive != 0, abs(param) + eta, 1.0) * grad
    share = abs(grad) / largest
    return share * power(share, exponent)


def _scalars(largest, total, rho, adaptive, eta, exponent, root):
    climbs = is_finite(largest) & (largest > 0) & is_finite(total)
    scale = where(climbs, divide(rho, power(total, root)), 0.0)
    return scale, largest, adaptive, eta, exponent


def _move(param, grad, scale, largest, adaptive, eta, exponent):
    t = where(adaptive != 0, abs(param) + eta, 1.0)
    grad = t * grad
    share = abs(grad) / largest
    return param + scale * (t * (sign(grad) * power(share, exponent)))


def _norm(group: Group, numbers: Tensor) -> Tensor:
    largest, total = numbers.unbind()
    return largest * total ** (1 / _conjugate(group["p"]))


def _reads_param(group: Group) -> bool:
    return bool(group["adaptive"])


ASCENT = Ascent(
    key=PNorm.key,
    name="PNorm",
    sums=Sums(
        "PNormSum",
        _terms,
        _columns,
        reads_param=_reads_param,
        after=Sums("PNormMax", _largest, _columns, reads_param=_reads_param, how="max"),
    ),
    scalars=_scalars,
    move=_move,
    norm=_norm,
    real=lambda group: bool(group["adaptive"]) or group["p"] != 2,
    shared=("p",),
)
