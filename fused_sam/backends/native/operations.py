"""The operations of the native backend: which tables they need, and the calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascents import KERNELS, SUMS, Ascent, Sums
from ...blends import KERNELS as BLENDS
from ...blends import Blend, Blending
from ...memory import Bucket, Gradients
from ...memory.bucket import Kept
from ...memory.members import AVERAGE
from ...rules import STEP, Rule
from ..ahead import Ahead, Groups
from ..base import Backend
from ..tables import READS_PARAM, Tables, ahead_table, blend_table, rule_bits, rule_rows, sums_table
from .translate import MAX_STATES, rules

CHUNK = 4096
"""Elements that a block of threads takes at a time: ``kChunk`` in csrc/cuda/launch.h."""

_SUMS = {sums.name: i for i, sums in enumerate(SUMS)}
_ASCENTS = {ascent.name: i for i, ascent in enumerate(KERNELS)}
_RULES = {rule.name: i for i, rule in enumerate(rules())}
_BLENDS = {blend.name: i for i, blend in enumerate(BLENDS)}
"""The numbers of the values in csrc/mathematics.h."""

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The numbers of dtypes: ``Dtype`` in csrc/tables.h."""


class _Native(Tables):
    """A bucket's tables, and what blocks of threads count with."""

    def __init__(self, bucket: Bucket) -> None:
        on_cpu = bucket.device.type == "cpu"
        super().__init__(bucket, 0 if on_cpu else CHUNK)
        self.ticket = None if on_cpu else torch.zeros(1, dtype=torch.int32, device=self.device)


def _tables(bucket: Bucket) -> _Native:
    tables: _Native | None = bucket.cache.get(_Native)
    if tables is None:
        tables = bucket.cache[_Native] = _Native(bucket)
    return tables


def _serves(bucket: Bucket, kept: Kept | None = None, *, directs: bool = False) -> bool:
    """Whether there are kernels for these dtypes; torch does the others: right, and slower.

    ``directs``: whether an update is to leave a direction.
    """
    if bucket.device.type == "cpu":
        return True
    if directs and bucket.dtype != torch.float32:
        return False
    return bucket.is_uniform and (kept is None or kept.flat.dtype == bucket.dtype)


class NativeBackend(Backend):
    """See ``Backend`` for what the operations do."""

    name = "native"

    def stays(self, bucket: Bucket) -> bool:
        """As ``Backend.stays``."""
        return _serves(bucket)

    def bakes_in(self, bucket: Bucket, blend: Blend | None) -> str | None:
        """As ``Backend.bakes_in``."""
        directs = blend is not None and blend.reuse is not None
        if _serves(bucket, directs=directs):
            return None
        return super().bakes_in(bucket, blend)

    def reduce(
        self,
        bucket: Bucket,
        sums: Sums,
        grads: Gradients,
        groups: Groups,
        earlier: Tensor | None = None,
        unscale: float = 1.0,
        kept: Kept | None = None,
    ) -> Tensor:
        """As ``Backend.reduce``, in one launch."""
        if not _serves(bucket, kept):
            return super().reduce(bucket, sums, grads, groups, earlier, unscale, kept)
        tables = _tables(bucket)
        bits = {row: READS_PARAM * sums.reads_param(groups[row]) for row in bucket.rows}
        total: Tensor = torch.ops.fused_sam.reduce.default(
            bucket.saved,
            None if kept is None else kept.flat,
            None if sums.average is None else bucket.member(AVERAGE).flat,
            earlier,
            tables.ticket,
            tables.slots,
            tables.addresses(grads).table,
            tables.flags(bits, bucket.perturbed, grads, held=() if kept is None else kept.held),
            sums_table(tables, bucket, sums, groups, unscale),
            _DTYPES[bucket.dtype],
            _DTYPES[grads.dtype or bucket.grad_dtype],
            _SUMS[sums.name],
        )
        return total

    def ascend_(
        self,
        bucket: Bucket,
        ascent: Ascent,
        grads: Gradients,
        groups: Groups,
        total: Tensor,
        number: int | Tensor,
        kept: Tensor | None = None,
        unscale: float = 1.0,
    ) -> None:
        """As ``Backend.ascend_``, in one launch."""
        if not _serves(bucket):
            return super().ascend_(bucket, ascent, grads, groups, total, number, kept, unscale)
        tables = _tables(bucket)
        torch.ops.fused_sam.ascend_.default(
            bucket.saved,
            kept,
            None if ascent.average is None else bucket.member(AVERAGE).flat,
            bucket.climb,
            tables.slots,
            tables.addresses(grads).table,
            tables.flags(dict.fromkeys(bucket.rows, 0), bucket.perturbed, grads),
            sums_table(tables, bucket, ascent.sums, groups, unscale),
            total,
            *((number, 0) if isinstance(number, Tensor) else (None, number)),
            _DTYPES[bucket.dtype],
            _DTYPES[grads.dtype or bucket.grad_dtype],
            _ASCENTS[ascent.name],
        )

    def update_(
        self,
        bucket: Bucket,
        rule: Rule,
        blending: Blending | None,
        grads: Gradients,
        groups: Groups,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        ahead: Ahead | None = None,
    ) -> Tensor | None:
        """As ``Backend.update_``, in one launch."""
        blend, kept = (None, None) if blending is None else (blending.blend, blending.kept)
        direction = None if blending is None else blending.direction
        if not _serves(bucket, kept, directs=direction is not None):
            return super().update_(
                *(bucket, rule, blending, grads, groups),
                grad_scale=grad_scale,
                found_inf=found_inf,
                ahead=ahead,
            )
        tables = _tables(bucket)
        total = decay = None
        names = {name for row in bucket.rows for name in rule.kept(groups[row])}
        fresh = bucket.fresh(names)
        bits = {row: rule_bits(rule, groups[row], blend is not None) for row in bucket.rows}
        if ahead is not None:
            total = torch.empty(1, dtype=torch.float64, device=bucket.device)
            names.add(ahead.momentum)
            decay = ahead_table(tables, bucket, ahead, groups, bits)
        states = [bucket.state(s.name).flat if s.name in names else None for s in rule.states]
        numbers, rates = rule_rows(rule, groups, bucket.rows)
        torch.ops.fused_sam.update_.default(
            *states,
            *[None] * (MAX_STATES - len(states)),
            bucket.state(STEP).flat if rule.counts else None,
            tables.ticket,
            bucket.climb,
            bucket.saved,
            None if kept is None else kept.flat,
            direction,
            total,
            tables.slots,
            tables.addresses(grads).table,
            tables.flags(bits, bucket.perturbed, grads, fresh, () if kept is None else kept.held),
            tables.hyper(rule.name, len(groups), numbers, rates),
            decay,
            None if blending is None else blending.numbers,
            None if blend is None else blend_table(tables, bucket, blend, groups),
            None if blending is None else blending.scale,
            grad_scale,
            found_inf,
            _DTYPES[bucket.dtype],
            _DTYPES[bucket.grad_dtype],
            _RULES[rule.name],
            -1 if blend is None else _BLENDS[blend.name],
        )
        return total

    def restore_(self, bucket: Bucket) -> None:
        """As ``Backend.restore_``, in one launch."""
        if not _serves(bucket):
            return super().restore_(bucket)
        tables = _tables(bucket)
        torch.ops.fused_sam.restore_.default(
            bucket.climb,
            bucket.saved,
            tables.slots,
            tables.flags(dict.fromkeys(bucket.rows, 0), bucket.perturbed),
            _DTYPES[bucket.dtype],
        )
