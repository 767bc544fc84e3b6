"""The one seam between two passes: numbers of several buckets become those of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import moved
from ..memory import Bucket


def combine(
    parts: Sequence[Tensor], buckets: Sequence[Bucket], how: str = "sum", count: int = 1
) -> Tensor:
    """The sum over all buckets, or the largest number.

    Args:
        parts: what ``Backend.reduce`` returned for each bucket.
        buckets: the buckets.
        how: "sum" or "max", as ``Sums.how``.
        count: how many numbers each part has; zeros where there is no bucket, as nothing trains.

    Returns:
        As one of the parts, on the first bucket's device. What is infinite for the compute dtype of
        one bucket is infinite for all: all climb, or none.
    """
    if not parts:
        return torch.zeros(count, dtype=torch.float64, device="cpu")
    if len(parts) == 1:
        return parts[0]
    device = parts[0].device
    every = torch.stack([moved(part, device, part.dtype) for part in parts])
    total = every.amax(0) if how == "max" else every.sum(0)
    largest = min(torch.finfo(bucket.compute_dtype).max for bucket in buckets)
    return torch.where(total > largest, torch.inf, total)
