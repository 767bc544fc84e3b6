"""What kernels read besides the flat buffers: small tables, uploaded only when they change.

Addresses of gradients and flags of slots repeat from step to step, hyperparameters follow
schedulers. On a GPU a table comes from pinned memory, and nobody waits for it. What a CUDA graph
has captured is uploaded at each of its replays: those tables are its own, and stay alive.
"""

from __future__ import annotations

import functools
import operator
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..ascents import Sums
from ..blends import Blend
from ..memory import Bucket, Gradients
from ..recording import CODES, recording
from ..rules import Group, Rule
from . import capture
from .ahead import Ahead, Groups, coupled, decays

# The bits of a slot, as csrc/tables.h has them.
PERTURBED = 1
"""Its weights w are in ``saved``."""
FRESH = 2
"""Its state is as it began."""
MISSING = 4
"""It has no gradient."""
ALIGNED = 8
"""Its weights and its gradient allow accesses of 16 bytes."""
MAXIMIZE = 16
"""Its group goes uphill."""
READS_PARAM = 32
"""The terms of a sum need its weights."""
HELD = 64
"""Its gradient at w is in ``kept``."""
BLENDS = 128
"""The rule sees a blend of its gradients."""
KEPT_SHIFT = 8
"""From this bit on: which of the rule's states its group keeps."""
SUMMED = 1 << 16
"""The sum of its new momentum's squares is wanted."""
STAYS = 1 << 17
"""If its weights are in ``saved``, the new ones go there, and only there."""

_ACCESS = 16
_REMEMBERED = {"addresses": 64, "flags": 16}
"""Tables of each kind that a bucket remembers."""
_STEP_FLAGS = 4
"""Of flags, how many a step asks for; and with a way back."""


@dataclass(frozen=True)
class Addresses:
    """Where the gradients of a step are.

    Attributes:
        table: (slots,) int64.
        aligned: for each slot, whether weights and gradient allow accesses of 16 bytes.
    """

    table: Tensor
    aligned: tuple[bool, ...]


Numbers = Callable[[], dict[int, tuple[float, ...]]]
"""Tells the hyperparameters of groups as they are now, by row."""


class Tables:
    """The tables of one bucket.

    Args:
        bucket: whose parameters they are about.
        chunk: elements that a program takes at a time; 0 for kernels that need no chunks.

    Attributes:
        slots: int64: (slots, 4), of each slot where it starts in the flat buffers, elements, group,
            address of the weights; then (num_chunks, 2), of each chunk its slot and where it begins
            there.
        num_chunks: how many chunks there are.
    """

    def __init__(self, bucket: Bucket, chunk: int = 0) -> None:
        capture.refuse_to_prepare(bucket.device, "the tables of a bucket have yet to be made")
        self.device = bucket.device
        self.dtype = bucket.compute_dtype
        self.rows = [slot.row for slot in bucket.slots]
        weights = [bucket.memory(slot).data_ptr() if slot.numel else 0 for slot in bucket.slots]
        self._chunked = chunk > 0
        self._weights_aligned = tuple([address % _ACCESS == 0 for address in weights])
        table = [
            number
            for slot, address in zip(bucket.slots, weights, strict=True)
            for number in (slot.start, slot.numel, slot.row, address)
        ]
        chunks = [
            number
            for i, slot in enumerate(bucket.slots)
            for offset in (range(0, slot.numel, chunk) if chunk else ())
            for number in (i, offset)
        ]
        self.num_chunks = len(chunks) // 2
        table += chunks
        self.slots = torch.tensor(table, dtype=torch.int64, device=self.device)
        self._known: dict[str, OrderedDict[Hashable, Any]] = {
            kind: OrderedDict() for kind in _REMEMBERED
        }
        self._hyper: dict[Hashable, tuple[Any, Tensor]] = {}
        self._captured: list[Tensor] = []
        self._recent: tuple[weakref.ref[Gradients], Addresses] | None = None
        self._flags: deque[tuple[Any, ...]] = deque(maxlen=_STEP_FLAGS)

    def addresses(self, grads: Gradients) -> Addresses:
        """Where these gradients are; a missing one is at 0."""
        if self._recent is not None and self._recent[0]() is grads:
            return self._recent[1]
        key = grads.addresses
        found: Addresses = self._remember("addresses", key, lambda: self._addresses(key))
        # Weakly: else they would stay until the next ones, beside which they are a whole copy.
        self._recent = (weakref.ref(grads), found)
        return found

    def _addresses(self, addresses: tuple[int, ...]) -> Addresses:
        # Kernels that need no chunks leave wide accesses to their compiler: nobody asks.
        if not self._chunked or not functools.reduce(operator.or_, addresses, 0) % _ACCESS:
            aligned = self._weights_aligned
        else:
            pairs = zip(self._weights_aligned, addresses, strict=True)
            aligned = tuple([weights and address % _ACCESS == 0 for weights, address in pairs])
        return Addresses(self._made(lambda: addresses, torch.int64), aligned)

    def flags(
        self,
        bits: Mapping[int, int],
        perturbed: tuple[bool, ...],
        grads: Gradients | None = None,
        fresh: tuple[bool, ...] = (),
        held: tuple[bool, ...] = (),
    ) -> Tensor:
        """The bits of each slot, (slots,) int32.

        Args:
            bits: those that all slots of a group have, by row.
            perturbed: for each slot, whether its weights are in ``saved``.
            grads: which are missing, and how the others lie; None if none is read.
            fresh: for each slot, whether its state is as it began; empty if none is.
            held: for each slot, whether its gradient at w is kept; empty if none is.
        """
        present = grads.present if grads is not None else (False,) * len(perturbed)
        aligned = self._weights_aligned if grads is None else self.addresses(grads).aligned
        recorded = self._is_recorded()
        marks = perturbed, present, fresh, held, aligned
        # Most steps ask with the very objects of the last one: that is told without a look at them.
        for found, known_bits, *known in () if recorded else self._flags:
            if known_bits == bits and all(map(operator.is_, known, marks)):
                return cast(Tensor, found)

        def make() -> Tensor:
            values = [
                bits[row]
                | PERTURBED * perturbed[i]
                | MISSING * (not present[i])
                | ALIGNED * aligned[i]
                | FRESH * (bool(fresh) and fresh[i])
                | HELD * (bool(held) and held[i])
                for i, row in enumerate(self.rows)
            ]
            return self._made(lambda: values, torch.int32)

        flags: Tensor = self._remember("flags", (tuple(bits.items()), *marks), make)
        if not recorded:
            self._flags.append((flags, dict(bits), *marks))
        return flags

    def hyper(
        self,
        kind: Hashable,
        num_groups: int,
        numbers: Numbers,
        rates: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Hyperparameters of all groups, (groups, columns) in the compute dtype.

        Args:
            kind: what they are for; the last table of each kind is remembered.
            num_groups: rows of the table; zeros for groups that have no parameters here.
            numbers: tells the numbers of those that have.
            rates: learning rates that are on the device, by row: the first column.
        """
        rates = rates or {}
        if (graph := recording()) is not None:
            table = graph.table(lambda: _flat(num_groups, numbers()), self.dtype)
            _copy_rates(table, num_groups, rates)
            return table
        rows = numbers()
        wanted = num_groups, rows, tuple(rates)
        known = self._hyper.get(kind)
        capturing = capture.is_capturing(self.device)
        if known is not None and known[0] == wanted and not capturing:
            table = known[1]
        else:
            into = known[1] if known is not None and not capturing else None
            table = self._upload(_flat(num_groups, rows), self.dtype, into)
            if not capturing:
                self._hyper[kind] = (wanted, table)
        _copy_rates(table, num_groups, rates)
        return table

    def _is_recorded(self) -> bool:
        """Whether a CUDA graph will run what is done now: its tables are its own."""
        return capture.is_capturing(self.device) or recording() is not None

    def _remember(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` makes, or made before of the same."""
        if self._is_recorded():
            return make()
        known = self._known[kind]
        if key not in known:
            if len(known) >= _REMEMBERED[kind]:
                known.popitem(last=False)
            known[key] = make()
        return known[key]

    def _made(self, values: Callable[[], Sequence[float]], dtype: torch.dtype) -> Tensor:
        graph = recording()
        return self._upload(values(), dtype) if graph is None else graph.table(values, dtype)

    def _upload(
        self, values: Sequence[float], dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        """A table where the kernels read it; ``into`` is overwritten if it is of that size."""
        if self.device.type == "cpu":
            if not values:
                return torch.empty(0, dtype=dtype, device="cpu")
            return torch.frombuffer(array(CODES[dtype], values), dtype=dtype)
        # The caching host allocator gives pinned memory out again only after the copies from it.
        staging = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
        if into is None or into.numel() != staging.numel():
            into = torch.empty_like(staging, device=self.device, pin_memory=False)
        into.copy_(staging, non_blocking=True)
        if capture.is_capturing(self.device):
            # A graph uploads it whenever it runs, and reads it then: for ever, and for it alone.
            self._captured += (staging, into)
        return into


def _flat(num_groups: int, rows: Mapping[int, tuple[float, ...]]) -> tuple[float, ...]:
    """The rows of all groups, one after the other; zeros for those that have none."""
    every = [(0.0,) * len(next(iter(rows.values()), ()))] * num_groups
    for row, own in rows.items():
        every[row] = own
    return tuple([number for row in every for number in row])


def _copy_rates(table: Tensor, num_groups: int, rates: Mapping[int, Tensor]) -> None:
    for row, rate in rates.items():
        table.view(num_groups, -1)[row, :1].copy_(rate.reshape(1), non_blocking=True)


def rule_bits(rule: Rule, group: Group, blends: bool) -> int:
    """The bits that a rule, a blend and a group's options give to its slots."""
    kept = sum(1 << i for i, state in enumerate(rule.states) if state.is_kept(group))
    blends = blends and group["ascent"] is not None
    return kept << KEPT_SHIFT | MAXIMIZE * bool(group["maximize"]) | BLENDS * blends


def rule_rows(rule: Rule, groups: Groups, rows: Iterable[int]) -> tuple[Numbers, dict[int, Tensor]]:
    """Each group's hyperparameters, and the learning rates that are on a device."""
    rates = {row: groups[row]["lr"].detach() for row in rows if _on_a_device(groups[row]["lr"])}

    def numbers() -> dict[int, tuple[float, ...]]:
        # A rate on a device is not read here: that would wait for it.
        return {
            row: (0.0 if row in rates else float(groups[row]["lr"]), *rule.numbers(groups[row]))
            for row in rows
        }

    return numbers, rates


def _on_a_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def sums_table(
    tables: Tables, bucket: Bucket, sums: Sums, groups: Groups, unscale: float = 1.0
) -> Tensor:
    """The numbers that a sum, or the ascent that it is for, needs of each group."""
    rows = bucket.rows
    return tables.hyper(
        sums.name, len(groups), lambda: {row: sums.numbers(groups[row], unscale) for row in rows}
    )


def ahead_table(
    tables: Tables, bucket: Bucket, ahead: Ahead, groups: Groups, bits: dict[int, int]
) -> Tensor | None:
    """The weight decay that each group's weights have ahead of w; None where none has any.

    ``bits``, those of each group's slots, get what a climb along the momentum asks of an update.
    """
    climbs, rows = SUMMED | STAYS * any(ahead.stays), bucket.rows
    for row in rows:
        bits[row] |= climbs * (groups[row]["ascent"] is not None)
    if not any([decays(groups[row]) for row in rows]):
        return None
    return tables.hyper(
        "decay", len(groups), lambda: {row: (coupled(groups[row]),) for row in rows}
    )


def blend_table(tables: Tables, bucket: Bucket, blend: Blend, groups: Groups) -> Tensor:
    """The numbers that a blend needs of each group."""
    rows = bucket.rows
    return tables.hyper(
        blend.name, len(groups), lambda: {row: blend.numbers(groups[row]) for row in rows}
    )
