"""The operations of the Triton backend: which tables they need, and the launches."""

from __future__ import annotations

import operator
from types import FunctionType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ...ascents import SQUARES, Ascent, Sums
from ...blends import Blend, Blending
from ...devices import on
from ...memory import Bucket, Gradients
from ...memory.bucket import Kept
from ...memory.members import AVERAGE
from ...rules import STEP, Rule
from ..ahead import Ahead, Groups
from ..base import Backend
from ..tables import Tables, ahead_table, blend_table, rule_bits, rule_rows, sums_table
from . import kernels
from .words import compiled

INTERPRETED = isinstance(kernels.update_kernel, InterpretedFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when they were imported."""

CHUNK = 4096
"""Elements that a program takes at a time."""
PROGRAMS = 8
"""Programs for each multiprocessor: half of the threads that one can hold."""
THREADS = 128
"""Threads of a program: 4 warps of NVIDIA's 32, 2 of AMD's 64."""
TILE_BYTES = {
    "reduce_kernel": 4096,
    "ascend_kernel": 2048,
    "update_kernel": 2048,
    "restore_kernel": 2048,
}
"""Bytes of an operand in a tile: for each of 128 threads an access of 16, 2 for a lone operand."""
WIDE_TILE_BYTES = 2048
"""Where sums are in float64 and several, an access of each operand: they take the registers."""
CUDA_OPTIONS = {"maxnreg": 64, "enable_reflect_ftz": False}
"""At most 64 registers, or fewer than half of a multiprocessor's threads would fit; and square
roots of denormal numbers are not zero."""
MANY_REGISTERS = {"maxnreg": 128}
"""For kernels that would spill some of 64: float64, three sums in it, what is rare in half
precision, and an update that leaves a direction, once in several steps."""
TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""What Triton calls the dtypes."""


class _Launcher(Tables):
    """A bucket's tables, what programs count and add up in, and the kernels that are compiled."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket, CHUNK)
        self.n_slots = len(bucket.slots)
        # Of the widest that a tile holds: of the others an access is narrower.
        held = (bucket.dtype, bucket.grad_dtype, bucket.saved.dtype)
        self.itemsize = max([dtype.itemsize for dtype in held])
        self.half = bucket.dtype.itemsize == 2
        self.dtypes = bucket.dtype, bucket.grad_dtype
        self.programs = max(1, min(self.num_chunks, _max_programs(self.device)))
        self.partials: dict[Any, Tensor] = {}
        self.ticket = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.compiled: dict[Any, Any] = {}

    def scratch(self, sums: Sums) -> Tensor:
        """Where the programs put what they have of these sums, (count, programs)."""
        dtype = torch.float64 if sums.wide else self.dtype
        key = sums.count, dtype
        if key not in self.partials:
            shape = sums.count, self.programs
            self.partials[key] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self.partials[key]

    def launch(
        self,
        kernel: Any,
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        roomy: bool = False,
        wide: bool = False,
        *others: Tensor | None,
    ) -> None:
        """Run a kernel over the bucket's chunks.

        Args:
            kernel: one of ``kernels``.
            args: its run-time arguments but the last two, how many chunks and slots there are; a
                pointer that it does without is None.
            constants: its compile-time arguments but the last two, BLOCK and TILES, with texts and
                torch's dtypes, which are cheap to look up, in place of Triton's.
            roomy: whether it gets MANY_REGISTERS; follows from dtype and constants.
            wide: whether its sums are in float64; follows from the constants.
            others: of its arguments those that may be wider than all that the bucket has.
        """
        grid = (self.programs, 1, 1)
        args = (*args, self.num_chunks, self.n_slots)
        key = (kernel.fn, constants, *[getattr(arg, "dtype", arg is None) for arg in args])
        known = self.compiled.get(key)
        if known is not None:
            function, full = known
            function[grid](*args, *full)
            return
        tile = WIDE_TILE_BYTES if wide else TILE_BYTES[kernel.fn.__name__]
        itemsize = max([self.itemsize, *[o.dtype.itemsize for o in others if o is not None]])
        block = min(tile // itemsize, CHUNK)
        full = (*map(_as_triton, constants), block, CHUNK // block)
        function = kernel[grid](*args, *full, **_options(self.device, roomy))
        # Everything that Triton specializes on is in the key: the rest is the same for a bucket, or
        # declared do_not_specialize. So its own look-up, several times the cost, can be left out.
        if function is not None:
            self.compiled[key] = (function, full)


def _launcher(bucket: Bucket) -> _Launcher:
    launcher: _Launcher | None = bucket.cache.get(_Launcher)
    if launcher is None:
        launcher = bucket.cache[_Launcher] = _Launcher(bucket)
    return launcher


def _max_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # the interpreter runs them one by one
    properties = torch.get_device_module(device).get_device_properties(device)
    count = getattr(properties, "multi_processor_count", 0) or properties.max_compute_units
    return PROGRAMS * int(count)


def _options(device: torch.device, roomy: bool) -> dict[str, Any]:
    if device.type != "cuda":
        return {"num_warps": THREADS // 32}
    if torch.version.hip is not None:
        return {"num_warps": THREADS // torch.cuda.get_device_properties(device).warp_size}
    return {"num_warps": THREADS // 32, **CUDA_OPTIONS, **(MANY_REGISTERS if roomy else {})}


def _as_triton(constant: Any) -> Any:
    """A compile-time argument as kernels take it."""
    if isinstance(constant, FunctionType):
        return compiled(constant)
    return TYPES.get(constant, constant)


class TritonBackend(Backend):
    """See ``Backend`` for what the operations do."""

    name = "triton"

    def stays(self, bucket: Bucket) -> bool:
        """As ``Backend.stays``."""
        return True

    def bakes_in(self, bucket: Bucket, blend: Blend | None) -> str | None:
        """As ``Backend.bakes_in``."""
        return None

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
        launcher = _launcher(bucket)
        with on(bucket.device):
            held = () if kept is None else kept.held
            reads = kept is not None or any([sums.reads_param(groups[row]) for row in bucket.rows])
            # Not the same memory in each step: somebody may look at the last one's.
            total = torch.empty(sums.count, dtype=torch.float64, device=bucket.device)
            args = (
                *(total, launcher.scratch(sums), launcher.ticket),
                *(None if kept is None else kept.flat, _average(bucket, sums)),
                *(earlier, launcher.slots),
                launcher.addresses(grads).table,
                launcher.flags(dict.fromkeys(bucket.rows, 0), bucket.perturbed, grads, held=held),
                sums_table(launcher, bucket, sums, groups, unscale),
            )
            constants = (
                *(sums.terms, _follow(sums), sums.count, sums.how == "max"),
                *(sums.earlier, *_widths(sums), reads, launcher.dtypes[0]),
                grads.dtype or bucket.grad_dtype,
            )
            wide = sums.wide
            launcher.launch(kernels.reduce_kernel, args, constants, wide, wide, *args[3:5])
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
        """As ``Backend.ascend_``, in one launch; in two where only some are perturbed."""
        perturbed = bucket.perturbed
        away = any(perturbed) and any(map(operator.and_, perturbed, grads.present))
        if away and any(map(operator.gt, grads.present, perturbed)):
            # What has to be saved comes first: it is in `saved` when the number is written.
            for wanted in (False, True):
                part = [
                    grad if is_away is wanted else None
                    for is_away, grad in zip(perturbed, grads.tensors, strict=True)
                ]
                args = Gradients.of(part), groups, total, number, kept, unscale
                self.ascend_(bucket, ascent, *args)
            return
        launcher = _launcher(bucket)
        with on(bucket.device):
            args = (
                *(bucket.saved, kept, _average(bucket, ascent.sums)),
                *(bucket.climb, total, launcher.slots),
                launcher.addresses(grads).table,
                launcher.flags(dict.fromkeys(bucket.rows, 0), bucket.perturbed, grads),
                sums_table(launcher, bucket, ascent.sums, groups, unscale),
                *((number, 0) if isinstance(number, Tensor) else (None, number)),
            )
            constants = (
                *(ascent.scalars, ascent.move, _follow(ascent.sums)),
                *(len(ascent.sums.chain), *_widths(ascent.sums)),
                *(bucket.masters, away, launcher.dtypes[0], grads.dtype or bucket.grad_dtype),
            )
            launcher.launch(kernels.ascend_kernel, args, constants, False, False, args[2])

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
        launcher = _launcher(bucket)
        total: Tensor | None = None
        with on(bucket.device):
            states = [rule.kept(groups[row]) for row in bucket.rows]
            names = {name for row in states for name in row}
            mixed = any([row != states[0] for row in states])
            buffers = [bucket.state(s.name).flat if s.name in names else None for s in rule.states]
            blend, kept = (None, None) if blending is None else (blending.blend, blending.kept)
            held = () if kept is None else kept.held
            bits = {row: rule_bits(rule, groups[row], blend is not None) for row in bucket.rows}
            numbers, rates = rule_rows(rule, groups, bucket.rows)
            decay = None
            if ahead is not None:
                total = torch.empty(1, dtype=torch.float64, device=bucket.device)
                decay = ahead_table(launcher, bucket, ahead, groups, bits)
            args = (
                *(total, None if total is None else launcher.scratch(SQUARES), decay),
                bucket.saved,
                None if kept is None else kept.flat,
                None if blending is None else blending.direction,
                tuple([bucket.saved if buffer is None else buffer for buffer in buffers]),
                bucket.state(STEP).flat if rule.counts else None,
                *(launcher.ticket, bucket.climb, launcher.slots),
                launcher.addresses(grads).table,
                launcher.flags(bits, bucket.perturbed, grads, bucket.fresh(names), held),
                launcher.hyper(rule.name, len(groups), numbers, rates),
                None if blending is None else blending.numbers,
                None if blend is None else blend_table(launcher, bucket, blend, groups),
                *(None if blending is None else blending.scale, grad_scale, found_inf),
            )
            constants = (
                *(rule.scalars, rule.update),
                None if blend is None else blend.coefficients,
                1 + len(rule.column_names),
                *((0, 0) if blend is None else (blend.count, len(blend.column_names))),
                *(tuple([buffer is not None for buffer in buffers]), mixed, bucket.masters),
                blend is not None and blend.after,
                None if ahead is None else SQUARES.terms,
                0 if ahead is None else [s.name for s in rule.states].index(ahead.momentum),
                *launcher.dtypes,
            )
            keeps = blend is not None and blend.reuse is not None
            crowded = ahead is not None and len(names) > 1
            roomy = launcher.itemsize == 8 or (launcher.half and (mixed or crowded)) or keeps
            others = args[4:6]
            launcher.launch(kernels.update_kernel, args, constants, roomy, False, *others)
        return total

    def restore_(self, bucket: Bucket) -> None:
        """As ``Backend.restore_``, in one launch."""
        launcher = _launcher(bucket)
        with on(bucket.device):
            flags = launcher.flags(dict.fromkeys(bucket.rows, 0), bucket.perturbed)
            args = (bucket.saved, bucket.climb, launcher.slots, flags)
            launcher.launch(kernels.restore_kernel, args, launcher.dtypes[:1])


def _average(bucket: Bucket, sums: Sums) -> Tensor | None:
    return None if sums.average is None else bucket.member(AVERAGE).flat


def _follow(sums: Sums) -> Any:
    return None if sums.average is None else sums.average.follow


def _widths(sums: Sums) -> tuple[int, int]:
    """How many columns the table of a sum has, and how many of them are its average's."""
    average = () if sums.average is None else sums.average.column_names
    return len(sums.column_names) + len(average), len(average)
