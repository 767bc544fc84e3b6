"""SAM as it was published: the base optimizer steps with the gradient at w + epsilon."""

from __future__ import annotations

from .base import Blend


def _gradient(grad):
    return grad


PLAIN = Blend("Plain", _gradient)
