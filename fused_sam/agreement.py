"""Which ascent or blend the groups name: one for all groups that climb, with the same options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from .rules.base import Group


class Member(Protocol):
    """What an Ascent and a Blend have in common."""

    @property
    def shared(self) -> tuple[str, ...]:
        """Options on which all groups that climb must agree."""


M = TypeVar("M", bound=Member)


def agreed(kind: str, members: Mapping[str, M], groups: Iterable[Group]) -> M | None:
    """The member that the climbing groups name as their ``kind``; None if they name none.

    Raises:
        ValueError: there is no member of that name; the groups do not agree.
    """
    climbing = [group for group in groups if group["ascent"] is not None]
    names = list(dict.fromkeys(group[kind] for group in climbing))
    for name in names:
        if name is not None and name not in members:
            raise ValueError(f"{kind}={name!r} is not known; choose from {list(members)}, or None")
    member = members[names[0]] if names and names[0] is not None else None
    for option in (kind, *(member.shared if member is not None else ())):
        if len(values := dict.fromkeys(group[option] for group in climbing)) > 1:
            raise ValueError(
                f"groups climb with {option}={' and '.join(map(repr, values))}, which have no norm "
                f"in common; give all the same, or ascent=None to those that must not climb"
            )
    return member
