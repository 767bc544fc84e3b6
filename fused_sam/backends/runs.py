"""Runs: neighbouring parameters that torch's operations can treat as one piece of memory."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..memory import Bucket, Gradients, Slot
from ..memory.window import as_real
from ..rules import STEP

CHUNK_ELEMENTS = 1 << 17
"""The size of the pieces in which arithmetic with temporaries goes over a run."""

_MAX_PLANS = 16
"""Patterns of missing gradients that a bucket remembers; a few recur, or else they never do."""


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring slots of one group that are treated alike, and views of their memory.

    Attributes:
        kind: what they have in common.
        row: their group.
        slots: their indices in the bucket.
        start, stop: their place in the flat buffers.
        weights: (stop - start,), the weights in memory order, padding included.
        params: the weights parameter by parameter, in their shapes; complex as (..., 2) reals.
        padding: indices of padding within the run, or None.
        views: flat buffers parameter by parameter, like ``params``, under the buffer's name.
    """

    kind: Any
    row: int
    slots: range
    start: int
    stop: int
    weights: Tensor
    params: list[Tensor]
    padding: Tensor | None
    views: dict[str, list[Tensor]] = field(default_factory=dict)

    def of(self, flat: Tensor) -> Tensor:
        """The run's part of a flat buffer."""
        return flat[self.start : self.stop]

    def chunks(self) -> Iterator[slice]:
        """The run in pieces whose temporaries stay in cache."""
        for start in range(0, self.stop - self.start, CHUNK_ELEMENTS):
            yield slice(start, start + CHUNK_ELEMENTS)

    def pick(self, items: Sequence[Any]) -> list[Any]:
        """The run's part of a list with an item for each slot."""
        return list(items[self.slots.start : self.slots.stop])

    def split(self, bucket: Bucket, name: str, flat: Tensor) -> list[Tensor]:
        """A flat buffer parameter by parameter; ``step`` has one element for each."""
        if name not in self.views:
            if name == STEP:
                self.views[name] = [flat[i] for i in self.slots]
            else:
                self.views[name] = [slot.real(slot.of(flat)) for slot in self.pick(bucket.slots)]
        return self.views[name]

    def gather(self, bucket: Bucket, grads: Gradients) -> Tensor:
        """The run's gradients in a flat buffer of the compute dtype, with zeros for padding."""
        if Run not in bucket.cache:
            bucket.cache[Run] = torch.zeros(
                bucket.size, dtype=bucket.compute_dtype, device=bucket.device
            )
        scratch: Tensor = bucket.cache[Run]
        torch._foreach_copy_(self.split(bucket, "scratch", scratch), self.pick(grads.tensors))
        self.clear_padding(self.of(scratch))
        return self.of(scratch)

    def clear_padding(self, memory: Tensor) -> None:
        """Zero again, where 0 / 0 (eps = 0) or a scale that is NaN may have been."""
        if self.padding is not None:
            memory.index_fill_(0, self.padding, 0)


def present(grads: Gradients, held: tuple[bool, ...] | None = None) -> tuple[Hashable, ...]:
    """The kinds that leave out the slots without a gradient; ``held`` tells others apart."""
    if held is not None:
        return tuple([kind if kind[0] else None for kind in zip(grads.present, held, strict=True)])
    return grads.present if grads.complete else tuple([there or None for there in grads.present])


def runs(bucket: Bucket, kinds: tuple[Hashable, ...]) -> list[Run]:
    """The slots cut into runs of equal kind; a slot of kind None is left out."""
    plans: dict[Any, list[Run]] = bucket.cache.setdefault(runs, {})
    if kinds not in plans:
        if len(plans) == _MAX_PLANS:
            plans.clear()
        plans[kinds] = [_make_run(bucket, kinds[s.start], s) for s in _spans(bucket.slots, kinds)]
    return plans[kinds]


def _spans(slots: Sequence[Slot], kinds: Sequence[Hashable]) -> Iterator[range]:
    start = 0
    for i, slot in enumerate(slots):
        first = slots[start]
        together = (
            kinds[i] == kinds[start]
            and slot.row == first.row
            and slot.part == first.part
            and not slot.pinned
        )
        if i and not together:
            if kinds[start] is not None:
                yield range(start, i)
            start = i
    if slots and kinds[start] is not None:
        yield range(start, len(slots))


def _make_run(bucket: Bucket, kind: Any, span: range) -> Run:
    slots = bucket.slots[span.start : span.stop]
    first, last = slots[0], slots[-1]
    gaps = [
        torch.arange(a.start + a.numel - first.start, b.start - first.start, device="cpu")
        for a, b in itertools.pairwise(slots)
    ]
    padding = torch.cat(gaps) if gaps else torch.empty(0, device="cpu")
    return Run(
        kind,
        first.row,
        span,
        first.start,
        last.start + last.numel,
        bucket.memory(first, last),
        # Through detach(), which shares the version counter: autograd notices what is written.
        [as_real(slot.param.detach()) for slot in slots],
        padding.to(bucket.device) if padding.numel() else None,
    )
