"""The gradients that a base optimizer may be given: one file each, listed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..agreement import agreed
from ..rules.base import Group
from .base import Blend, Blending, Choice
from .gsam import BLEND as _GSAM
from .gsam import GSAM
from .wsam import BLEND as _WSAM
from .wsam import COUPLED as _COUPLED_WSAM
from .wsam import WSAM, CoupledWSAM

__all__ = ["BLENDS", "GSAM", "WSAM", "Blend", "Blending", "Choice", "CoupledWSAM", "chosen"]

BLENDS: Mapping[str, Blend] = {blend.key: blend for blend in (_GSAM, _WSAM, _COUPLED_WSAM)}
"""By the value of a group's ``blend``. None is SAM: the gradient at w + epsilon."""


def chosen(groups: Iterable[Group]) -> Blend | None:
    """The blend of the groups that climb; raises ValueError if they do not agree."""
    return agreed("blend", BLENDS, groups)
