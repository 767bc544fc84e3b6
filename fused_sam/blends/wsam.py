"""WSAM (Yue et al., KDD 2023, arXiv 2305.15817): the sharpness is a term of its own, and weighted.

With weight = gamma / (1 - gamma), so that gamma = 0 is the base optimizer:

    decoupled:  the base optimizer steps with g; then w -= lr * weight * (g' - g)
    coupled:    the base optimizer steps with v = weight * g' + (1 - weight) * g

The coupled form is SAM for gamma = 1/2. The authors' code can clip the norms of both gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..rules.base import Group
from ..text import clip, divide, is_finite, sqrt, where
from .base import Blend, Choice


@dataclass(frozen=True)
class WSAM(Choice):
    """The base optimizer steps with g, and lr * gamma / (1 - gamma) * (g' - g) is subtracted then.

    g is the gradient at w, g' the one at w + epsilon; lr is the group's in this step. Of the
    sharpness g' - g the base optimizer sees nothing: neither does ``max_grad_norm``, which clips g.
    Where g is not finite, the step is SAM's.

    Attributes:
        gamma: in [0, 1); the authors take 0.5 to 0.95. 0 is the base optimizer's step.
        max_norm: g and g' are clipped to this L2 norm, each by itself, before anything else. None:
            they are not, as by default in the authors' code today; an older one took 1.

    Raises:
        TypeError, ValueError: an option cannot be used.
    """

    key: ClassVar[str] = "wsam"
    gamma: float = 0.9
    max_norm: float | None = None


@dataclass(frozen=True)
class CoupledWSAM(Choice):
    """The base optimizer steps with g + gamma / (1 - gamma) * (g' - g).

    Attributes and errors as of ``WSAM``. gamma = 0.5 is SAM. ``max_grad_norm`` clips the whole.
    """

    key: ClassVar[str] = "coupled-wsam"
    gamma: float = 0.9
    max_norm: float | None = None


def _columns(group: Group) -> tuple[float, ...]:
    gamma, max_norm = group["blend_gamma"], group["blend_max_norm"]
    return gamma / (1 - gamma), math.inf if max_norm is None else max_norm


def _coupled(mixed, second, first, scale, weight, max_norm):
    known = is_finite(first)
    clip1 = clip(divide(sqrt(first), scale), max_norm)
    clip2 = clip(divide(sqrt(second), scale), max_norm)
    return where(known, weight, 1.0) * clip2, where(known, (1 - weight) * clip1, 0.0)


def _decoupled(mixed, second, first, scale, weight, max_norm):
    known = is_finite(first)
    clip1 = clip(divide(sqrt(first), scale), max_norm)
    clip2 = clip(divide(sqrt(second), scale), max_norm)
    weight = where(known, divide(weight, scale), 0.0)
    return where(known, 0.0, clip2), where(known, clip1, 0.0), weight * clip2, -weight * clip1


_SHARED = ("blend_gamma", "blend_max_norm")
BLEND = Blend(WSAM.key, "Wsam", _decoupled, _columns, _SHARED, after=True)
COUPLED = Blend(CoupledWSAM.key, "CoupledWsam", _coupled, _columns, _SHARED)
