"""The scalar products of the gradients of both passes, by which they are blended."""

from __future__ import annotations

from .base import Sums


def _terms(kept, grad):
    # Of a parameter that had no gradient in the first pass nothing is kept.
    mixed = 0.0 * grad
    first = 0.0 * grad
    if kept is not None:
        mixed = kept * grad
        first = kept * kept
    return mixed, grad * grad, first


GRAM = Sums("Gram", _terms, count=3, reads_kept=True, wide=True)
"""<g, g'>, <g', g'>, <g, g> of the gradients g at w and g' at w + epsilon."""
