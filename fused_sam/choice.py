"""Ascents and blends as users name them: frozen values that check their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .options import OPTIONS, numbers


@dataclasses.dataclass(frozen=True)
class Choice:
    """An ascent or a blend with its options, which are the fields.

    Groups and checkpoints hold plain data only: ``options()``.

    Attributes:
        kind: the group's option that names the member: "ascent" or "blend".
        key: the name, which is that option's value.
        prefix: what comes before a field's name in a group.

    Raises:
        TypeError, ValueError: an option cannot be used.
    """

    kind: ClassVar[str]
    key: ClassVar[str]
    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            OPTIONS[self.prefix + name].check(name, value)

    def options(self) -> dict[str, Any]:
        """What a parameter group holds of it."""
        fields = dataclasses.asdict(self).items()
        return {self.kind: self.key, **{self.prefix + name: value for name, value in fields}}


def with_defaults(**options: Any) -> dict[str, Any]:
    """All of a group's options: these, and the defaults of all others."""
    return {option.name: option.default for option in OPTIONS.values()} | numbers(plain(options))


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group, in which each choice is replaced by its options.

    Raises:
        TypeError: an ascent was passed as a blend, or a blend as an ascent.
    """
    spread = dict(options)
    for name, value in options.items():
        if isinstance(value, Choice):
            if value.kind != name:
                raise TypeError(
                    f"{name}={value!r} is of another kind; pass it as {value.kind}={value!r}"
                )
            spread |= value.options()
    return spread
