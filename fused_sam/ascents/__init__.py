"""The climbs: one file each, listed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..agreement import agreed
from ..rules.base import Group
from .base import Ascent, Choice, Sums
from .gram import GRAM
from .pnorm import ASCENT as _PNORM
from .pnorm import PNorm
from .sam import ASCENT as _SAM
from .sam import SAM
from .squares import SQUARES

__all__ = [
    "ASCENTS",
    "GRAM",
    "SAM",
    "SQUARES",
    "SUMS",
    "Ascent",
    "Choice",
    "PNorm",
    "Sums",
    "chosen",
]

ASCENTS: Mapping[str, Ascent] = {ascent.key: ascent for ascent in (_SAM, _PNORM)}
"""By what a group's ``ascent`` says."""

SUMS: tuple[Sums, ...] = (
    *[sums for ascent in ASCENTS.values() for sums in ascent.sums.chain],
    SQUARES,
    GRAM,
)
"""All that is ever reduced."""


def chosen(groups: Iterable[Group]) -> Ascent:
    """The ascent of the groups that climb, SAM if none does; raises ValueError if they disagree."""
    return agreed("ascent", ASCENTS, groups) or _SAM
