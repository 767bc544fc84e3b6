"""The gradients that a base optimizer may be given: one file each, listed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..agreement import agreed
from ..rules.base import Group
from .base import Blend, Blending, Choice
from .gsam import BLEND as _GSAM
from .gsam import GSAM
from .looksam import BLEND as _LOOKSAM
from .looksam import LookSAM
from .wsam import BLEND as _WSAM
from .wsam import COUPLED as _COUPLED_WSAM
from .wsam import WSAM, CoupledWSAM

__all__ = [
    "BLENDS",
    "GSAM",
    "KERNELS",
    "WSAM",
    "Blend",
    "Blending",
    "Choice",
    "CoupledWSAM",
    "LookSAM",
    "chosen",
    "period",
]

BLENDS: Mapping[str, Blend] = {
    blend.key: blend for blend in (_GSAM, _WSAM, _COUPLED_WSAM, _LOOKSAM)
}
"""By the value of a group's ``blend``. None is SAM: the gradient at w + epsilon."""

KERNELS: tuple[Blend, ...] = (
    *BLENDS.values(),
    *[blend.reuse for blend in BLENDS.values() if blend.reuse is not None],
)
"""All that an update may be given."""


def chosen(groups: Iterable[Group]) -> Blend | None:
    """The blend of the groups that climb; raises ValueError if they do not agree."""
    return agreed("blend", BLENDS, groups)


def period(groups: Iterable[Group]) -> int | None:
    """Every how many steps the groups' blend climbs; None where it leaves that to ``when``."""
    for group in groups:
        if group.get("ascent") is not None:
            blend = BLENDS.get(group.get("blend") or "")
            k: int | None = group.get("blend_k")
            return k if blend is not None and blend.reuse is not None else None
    return None
