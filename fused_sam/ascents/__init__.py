"""The climbs: one file each, listed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..rules.base import Group
from .base import Ascent, Choice, Sums
from .pnorm import ASCENT as _PNORM
from .pnorm import PNorm
from .sam import ASCENT as _SAM
from .sam import SAM
from .squares import SQUARES

__all__ = ["ASCENTS", "SAM", "SQUARES", "SUMS", "Ascent", "Choice", "PNorm", "Sums", "chosen"]

ASCENTS: Mapping[str, Ascent] = {ascent.key: ascent for ascent in (_SAM, _PNORM)}
"""By what a group's ``ascent`` says."""

SUMS: tuple[Sums, ...] = (
    *[sums for ascent in ASCENTS.values() for sums in ascent.sums.chain],
    SQUARES,
)
"""All that is ever reduced."""


def chosen(groups: Iterable[Group]) -> Ascent:
    """The ascent of the groups that climb; SAM if none does.

    Raises:
        ValueError: there is none of that name; or groups do not agree, and would have no norm in
            common.
    """
    climbing = [group for group in groups if group["ascent"] is not None]
    names = list(dict.fromkeys(group["ascent"] for group in climbing))
    for name in names:
        if name not in ASCENTS:
            raise ValueError(f"ascent={name!r} is not known; choose from {list(ASCENTS)}, or None")
    if len(names) > 1:
        raise ValueError(
            f"groups climb by {' and '.join(map(repr, names))}, which have no norm in common; "
            f"choose one of them, and ascent=None for groups that are not to climb"
        )
    ascent = ASCENTS[names[0]] if names else _SAM
    for option in ascent.shared:
        if len(values := dict.fromkeys(group[option] for group in climbing)) > 1:
            raise ValueError(
                f"groups climb with {option}={' and '.join(map(str, values))}, which have no norm "
                f"in common; set one {option}, and ascent=None for groups that are not to climb"
            )
    return ascent
