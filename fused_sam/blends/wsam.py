"""WSAM (Yue et al., KDD 2023, arXiv 2305.15817): the sharpness is a term of its own, and weighted.

    coupled:  v = weight * g' + (1 - weight) * g,  weight = gamma / (1 - gamma)

so that gamma = 0 is the base optimizer, and 1/2 is SAM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..rules.base import Group
from ..text import is_finite, where
from .base import Blend, Choice


@dataclass(frozen=True)
class CoupledWSAM(Choice):
    """The base optimizer sees gamma / (1 - gamma) * (g' - g) + g, g' at w + epsilon and g at w.

    Where g is not finite, the step is SAM's.

    Attributes:
        gamma: in [0, 1); the authors take 0.5 to 0.95. 0 is the base optimizer's step, 0.5 is SAM.

    Raises:
        TypeError, ValueError: gamma cannot be used.
    """

    key: ClassVar[str] = "coupled-wsam"
    gamma: float = 0.9


def _columns(group: Group) -> tuple[float, ...]:
    gamma = group["blend_gamma"]
    return (gamma / (1 - gamma),)


def _coefficients(mixed, second, first, weight):
    known = is_finite(first)
    return where(known, weight, 1.0), where(known, 1 - weight, 0.0)


COUPLED = Blend(CoupledWSAM.key, "CoupledWsam", _coefficients, _columns, shared=("blend_gamma",))
