"""The squared norm of the gradients as they are, by which they are clipped."""

from __future__ import annotations

from .base import Sums


def _terms(param, grad):
    return grad * grad


SQUARES = Sums("Squares", _terms, squares=lambda group: True)
