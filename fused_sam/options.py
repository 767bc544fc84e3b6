"""The options that FusedSAM adds to a parameter group, each declared once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: its key in a group, and the keyword of the constructor.
        default: for groups that do not set it.
        check: raises TypeError or ValueError for a value that cannot be used.
    """

    name: str
    default: Any
    check: Callable[[str, Any], None]


def check_size(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def check_max_grad_norm(value: Any) -> None:
    """Raise unless ``value`` is None or a finite number > 0."""
    if value is not None:
        check_size("max_grad_norm", value)
        if value == 0:
            raise ValueError("max_grad_norm=0 would stop all learning; use None for no clipping")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_member(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be the name of one, or None, got {value!r}")


RHO = Option("rho", 0.05, check_size)
ADAPTIVE = Option("adaptive", False, _check_flag)
ETA = Option("eta", 0.0, check_size)
ASCENT = Option("ascent", "sam", _check_member)

OPTIONS: Mapping[str, Option] = {option.name: option for option in (RHO, ADAPTIVE, ETA, ASCENT)}
"""What a group holds besides the base optimizer's options, by name."""

CLIMBS = "sam_climbs"
"""Key in the first group: how many climbs there were. No option: the optimizer counts."""


def check_values(group: Mapping[str, Any]) -> None:
    """Raise unless every one of these options can be used as it stands in a group."""
    for option in OPTIONS.values():
        option.check(option.name, group[option.name])
