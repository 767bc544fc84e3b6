"""Members of the family as users name them: frozen values that check themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .options import OPTIONS, numbers


@dataclasses.dataclass(frozen=True)
class Choice:
    """A member with its options, each of which a parameter group holds under the same name.

    Groups and checkpoints have plain data only: ``options()``.

    Attributes:
        kind: the group's option that names the member: "ascent" or "blend".
        key: its value there.
        prefix: of the group's options that the fields are.

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
    """All of a group's options, where these are given."""
    return {option.name: option.default for option in OPTIONS.values()} | numbers(plain(options))


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group with choices replaced by what they hold.

    Raises:
        TypeError: a choice is of another kind.
    """
    spread = dict(options)
    for name, value in options.items():
        if isinstance(value, Choice):
            if value.kind != name:
                raise TypeError(f"{name}={value!r}: that is for {value.kind}=")
            spread |= value.options()
    return spread
