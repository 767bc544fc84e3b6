"""GSAM (Zhuang et al., ICLR 2022, arXiv 2203.08065).

    v = g' - alpha * (g - <g, g'> / ||g'||**2 * g') = (1 + alpha * c) * g' - alpha * g

with c = <g, g'> / ||g'||**2. So alpha times the part of g that is orthogonal to g' is subtracted.
Norms and products are over all parameters that climb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..rules.base import Group
from ..text import divide, is_finite, where
from .base import Blend, Choice


@dataclass(frozen=True)
class GSAM(Choice):
    """GSAM: SAM's gradient g', minus alpha times the part of g that is orthogonal to it.

    g is the gradient at w. Where one of them is zero or not finite, the step is SAM's.

    Attributes:
        alpha: finite and >= 0; the authors take 0.1 to 0.4. 0 is SAM.

    Raises:
        TypeError, ValueError: alpha cannot be used.
    """

    key: ClassVar[str] = "gsam"
    alpha: float


def _columns(group: Group) -> tuple[float, ...]:
    return (group["blend_alpha"],)


def _coefficients(mixed, second, first, scale, alpha):
    share = divide(mixed, second)
    # Where a gradient is zero or not finite there is nothing to decompose: SAM.
    known = is_finite(share)
    return where(known, 1 + alpha * share, 1.0), where(known, -alpha, 0.0)


BLEND = Blend(GSAM.key, "Gsam", _coefficients, _columns, shared=("blend_alpha",))
