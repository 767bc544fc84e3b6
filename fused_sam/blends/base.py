"""What a blend is: which gradient the rule sees, out of those at w and at w + epsilon."""

from __future__ import annotations

from dataclasses import dataclass

from ..text import Text


@dataclass(frozen=True)
class Blend:
    """The gradient that the base optimizer steps with.

    Attributes:
        name: short name: the C++ struct is called so.
        gradient: text, for each element: ``(grad) -> gradient``, of the gradient at w + epsilon.
    """

    name: str
    gradient: Text
