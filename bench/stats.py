"""Medians and their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median with the 20th and the 80th percentile."""

    median: float
    p20: float
    p80: float

    def times(self, factor: float) -> Spread:
        """The same in other units."""
        return Spread(self.median * factor, self.p20 * factor, self.p80 * factor)


def spread(values: Sequence[float]) -> Spread:
    """Median, p20, p80."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), cuts[0], cuts[3])


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the ratios, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def surely_less(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether ``one`` is the smaller in so many rounds that chance does it in 1 of 100 at most.

    A sign test: it asks nothing of the distributions. Fewer than 7 rounds are never enough.
    """
    different = [a < b for a, b in zip(one, other, strict=True) if a != b]
    n, smaller = len(different), sum(different)
    return sum(math.comb(n, k) for k in range(smaller, n + 1)) <= 0.01 * 2**n
