"""USAM, SAM without its norm (Andriushchenko & Flammarion, ICML 2022): epsilon = rho * g.

The authors' training script puts epsilon back into the ball of radius rho; the paper does not.
For groups that are adaptive epsilon = rho * T**2 * g, with ASAM's T. The climb grows with the
gradient, and with a loss scale: ``first_step(scaler=scaler)`` tells it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..rules.base import Group
from ..text import is_finite, where
from .base import Choice
from .sam import ASCENT as SAM_ASCENT


@dataclass(frozen=True)
class USAM(Choice):
    """The climb is rho times the gradient; groups with ``adaptive=True``: rho * T**2 * gradient.

    Under a GradScaler ``first_step(scaler=scaler)`` has to know the loss scale.
    """

    key: ClassVar[str] = "usam"


def _columns(group: Group, unscale: float) -> tuple[float, ...]:
    rho, *others = SAM_ASCENT.sums.columns(group, unscale)
    return rho * unscale, *others


def _scalars(sq_norm, rho, adaptive, eta):
    return where(is_finite(sq_norm), rho, 0.0), adaptive, eta


ASCENT = dataclasses.replace(
    SAM_ASCENT,
    key=USAM.key,
    name="Usam",
    sums=dataclasses.replace(SAM_ASCENT.sums, columns=_columns),
    scalars=_scalars,
    scale_matters=True,
)
