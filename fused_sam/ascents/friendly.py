"""Friendly-SAM (Li et al., CVPR 2024, arXiv 2403.12350): SAM along what is new in the gradient.

    d = g - sigma * m,  epsilon = rho * d / ||d||,  then m <- lam * m + (1 - lam) * g

m is a running average of the gradients at w; with the first of them d = m = g. So it is in the
authors' code: the paper has the new m in d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..options import LAM, SIGMA
from ..rules.base import Group
from ..text import where
from .base import Average, Choice
from .sam import ASCENT as SAM_ASCENT


@dataclass(frozen=True)
class FriendlySAM(Choice):
    """The climb leaves out what all batches have in common; groups with ``adaptive=True``: ASAM's.

    Under a GradScaler ``first_step(scaler=scaler)`` has to know the loss scale.

    Attributes:
        sigma: how much of the average is left out, finite and >= 0. 0 is SAM.
        lam: how much of the average a step keeps, from 0 to 1.

    Raises:
        TypeError, ValueError: sigma or lam cannot be used.
    """

    key: ClassVar[str] = "friendly"
    sigma: float = SIGMA.default
    lam: float = LAM.default


def _columns(group: Group, unscale: float) -> tuple[float, ...]:
    return unscale, group["sigma"], group["lam"], 1 - group["lam"]


def _follow(grad, average, unscale, sigma, lam, rest):
    grad = unscale * grad
    there = average == average  # NaN: there is none yet
    direction = where(there, grad - sigma * average, grad)
    direction = where(sigma > 0, direction, grad)  # 0 * average may take a zero's sign
    return direction, where(there, lam * average + rest * grad, grad)


ASCENT = SAM_ASCENT.along(FriendlySAM.key, Average("Friendly", _follow, _columns))
