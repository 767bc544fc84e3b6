"""VaSSO (Li & Giannakis, NeurIPS 2023, arXiv 2309.15639): SAM along a less noisy gradient.

    m <- (1 - theta) * m + theta * g,  epsilon = rho * m / ||m||

m is a running average of the gradients at w; with the first of them m = g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..options import THETA
from ..rules.base import Group
from ..text import where
from .base import Average, Choice
from .sam import ASCENT as SAM_ASCENT


@dataclass(frozen=True)
class VaSSO(Choice):
    """The climb follows an average of the gradients; groups with ``adaptive=True``: ASAM's.

    Under a GradScaler ``first_step(scaler=scaler)`` has to know the loss scale.

    Attributes:
        theta: how much of the average is new in each step, from 0 to 1. 1 is SAM.

    Raises:
        TypeError, ValueError: theta cannot be used.
    """

    key: ClassVar[str] = "vasso"
    theta: float = THETA.default


def _columns(group: Group, unscale: float) -> tuple[float, ...]:
    return unscale, group["theta"], 1 - group["theta"]


def _follow(grad, average, unscale, theta, rest):
    grad = unscale * grad
    there = average == average  # NaN: there is none yet
    average = where(there, rest * average + theta * grad, grad)
    average = where(rest > 0, average, grad)  # 0 * average may take a zero's sign
    return average, average


ASCENT = SAM_ASCENT.along(VaSSO.key, Average("Vasso", _follow, _columns))
