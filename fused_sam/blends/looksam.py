"""LookSAM (Liu et al., CVPR 2022, arXiv 2203.02714): what a SAM step found serves the next steps.

    every k-th step:  the base optimizer steps with g', and keeps d = g' - <g, g'> / ||g||**2 * g
    between:          one pass, and it steps with g + alpha * ||g|| / ||d|| * d

d is the part of g' across g, which changes slowly. Norms and products are over all parameters that
climb, as in algorithm 1 of the paper. No code of the authors is known. Of others' PyTorch code
github.com/Leminhbinh0209/LookSAM does so, too; github.com/rollovd/LookSAM has those of each tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..rules.base import Group
from ..text import divide, is_finite, sqrt, where
from .base import Blend, Choice


@dataclass(frozen=True)
class LookSAM(Choice):
    """SAM in every k-th step; between, one pass, and the part of SAM's gradient that is across g.

    Two more copies of the parameters are kept: the gradient at w, and the direction d, in float32
    for half-precision weights. d is as the last SAM step left it that was not skipped; before the
    first one, and where g and g' are parallel or one of them is not finite, there is none, and the
    steps between are the base optimizer's own. Where g is zero, d is g'. A parameter that had no
    gradient at w + epsilon has no direction.

    Args:
        k: every k-th step is SAM's, the first one too: an integer >= 1. None: ``when`` decides.
        alpha: finite and >= 0. 0 is ``when=Every(k)`` without a blend.

    Raises:
        TypeError, ValueError: an option cannot be used.
    """

    key: ClassVar[str] = "looksam"
    k: int | None = 10
    alpha: float = 0.7


def _columns(group: Group) -> tuple[float, ...]:
    return (group["blend_alpha"],)


def _coefficients(mixed, second, first, scale, alpha):
    share = where(first > 0, divide(mixed, first), 0.0)
    known = is_finite(share) & is_finite(first) & is_finite(second)
    return where(known, 1.0, 0.0), where(known, -share, 0.0)


def _length(mixed, second, first):
    share = where(first > 0, divide(mixed, first), 0.0)
    square = second - share * mixed
    # What float64 leaves of two gradients that are parallel is rounding.
    known = is_finite(first) & is_finite(second) & (square > 1e-13 * second)
    return where(known, sqrt(square), 0.0)


def _reused(square, length, alpha):
    factor = alpha * divide(sqrt(square), length)
    return 1.0, where((length > 0) & is_finite(factor), factor, 0.0)


_SHARED = ("blend_k", "blend_alpha")
_REUSE = Blend(LookSAM.key, "LookSamReuse", _reused, _columns, _SHARED, reuses=True)
BLEND = Blend(
    LookSAM.key, "LookSam", _coefficients, _columns, _SHARED, reuse=_REUSE, length=_length
)
