"""What the options of all groups say together: which ascent, which blend."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import ascents, blends
from .ascents import Ascent
from .blends import Blend
from .options import OPTIONS, check_values, to_numbers_


@dataclass(frozen=True)
class Settings:
    """The members that the groups which climb agree on.

    Attributes:
        ascent: SAM if no group climbs.
        blend: None for the gradient at w + epsilon.
    """

    ascent: Ascent
    blend: Blend | None


class Reader:
    """Reads and checks the options of all groups, and only once while they are the same objects.

    Numbers and strings do not change: a new value is a new object. So it is seen in a tenth of the
    time of a check.
    """

    def __init__(self) -> None:
        self._known: list[Any] = []
        self._settings: Settings | None = None

    def read(self, groups: Sequence[dict[str, Any]]) -> Settings:
        """The settings of these groups; what is a NumPy scalar in them becomes a number.

        Raises:
            TypeError, ValueError: an option cannot be used; the groups do not agree.
        """
        values = [group[name] for group in groups for name in OPTIONS]
        settings = self._settings
        if (
            settings is None
            or len(values) != len(self._known)
            or not all(map(operator.is_, values, self._known))
        ):
            self._settings = None
            for group in groups:
                to_numbers_(group)
                check_values(group)
            settings = Settings(ascents.chosen(groups), blends.chosen(groups))
            self._known = [group[name] for group in groups for name in OPTIONS]
            self._settings = settings
        return settings
