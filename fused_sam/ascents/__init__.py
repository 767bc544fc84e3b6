"""The climbs: one file each, listed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..agreement import agreed
from ..rules.base import Group
from .base import Ascent, Average, Choice, Sums
from .friendly import ASCENT as _FRIENDLY
from .friendly import FriendlySAM
from .gram import GRAM
from .msam import ASCENT as _MSAM
from .msam import MSAM
from .pnorm import ASCENT as _PNORM
from .pnorm import PNorm
from .sam import ASCENT as _SAM
from .sam import SAM
from .squares import SQUARES
from .usam import ASCENT as _USAM
from .usam import USAM
from .vasso import ASCENT as _VASSO
from .vasso import VaSSO

__all__ = [
    "ASCENTS",
    "GRAM",
    "KERNELS",
    "MSAM",
    "SAM",
    "SQUARES",
    "SUMS",
    "USAM",
    "Ascent",
    "Average",
    "Choice",
    "FriendlySAM",
    "PNorm",
    "Sums",
    "VaSSO",
    "chosen",
]

ASCENTS: Mapping[str, Ascent] = {
    ascent.key: ascent for ascent in (_SAM, _PNORM, _USAM, _MSAM, _FRIENDLY, _VASSO)
}
"""By the value of a group's ``ascent``."""

KERNELS: tuple[Ascent, ...] = tuple({ascent.name: ascent for ascent in ASCENTS.values()}.values())
"""Those that have mathematics of their own."""

SUMS: tuple[Sums, ...] = (
    *{sums.name: sums for ascent in KERNELS for sums in ascent.sums.chain}.values(),
    SQUARES,
    GRAM,
)
"""All that is ever reduced."""


def chosen(groups: Iterable[Group]) -> Ascent:
    """The ascent of the groups that climb, SAM if none does; raises ValueError if they disagree."""
    return agreed("ascent", ASCENTS, groups) or _SAM
