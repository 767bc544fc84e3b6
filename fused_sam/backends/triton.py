"""The Triton backend: three kernels over a bucket. Here are tables and launches.

Nothing here waits for the device. Whatever a kernel reads beside the flat buffers stands in small
tables on the device, which are made once and uploaded again, from pinned memory, only when they
change: addresses of gradients repeat from step to step, hyperparameters follow schedulers.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..layout import Bucket
from ..rules import STEP, Group, Rule
from . import capture
from . import triton_kernels as kernels
from .interface import Gradients, Groups

INTERPRETED = isinstance(kernels.update_kernel, InterpretedFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when they were imported."""

CHUNK = 4096
"""Elements that a program takes at a time."""
PROGRAMS = 8
"""Programs for each multiprocessor: half of the threads that one can hold."""
THREADS = 128
"""Threads of a program: 4 warps of NVIDIA's 32, 2 of AMD's 64."""
TILE_BYTES = {
    "sq_norm_kernel": 4096,
    "perturb_kernel": 2048,
    "update_kernel": 2048,
    "restore_kernel": 2048,
}
"""Bytes of an operand in a tile: for each of 128 threads an access of 16, 2 for a lone operand."""
CUDA_OPTIONS = {"maxnreg": 64, "enable_reflect_ftz": False}
"""At most 64 registers, or fewer than half of a multiprocessor's threads would fit; and square
roots of denormal numbers are not zero."""
MANY_REGISTERS = {"maxnreg": 128}
"""For the updates that would spill some of 64: float64, and what is rare in half precision."""
EMPTY = 16
"""Address of an empty gradient, which has none, but is there: Adam counts its step."""
_KEPT_TABLES = 64
"""Tables of gradient addresses that a bucket remembers."""


# --------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class TritonRule:
    """A rule in Triton.

    Attributes:
        function: its mathematics, a ``triton.jit`` function of ``triton_kernels``.
        state: the names of its state buffers in the function's order, without ``step``.
        hyper: a group's hyperparameters in the function's order, without lr, which comes first.
    """

    function: Any
    state: tuple[str, ...]
    hyper: Callable[[Group], tuple[float, ...]]


def _sgd(group: Group) -> tuple[float, ...]:
    return (
        group["maximize"],
        group["weight_decay"],
        group["momentum"],
        1 - group["dampening"],
        group["nesterov"],
    )


def _adam(group: Group) -> tuple[float, ...]:
    beta1, beta2 = map(float, group["betas"])
    return (
        group["maximize"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        *(beta1, 1 - beta1, math.log(beta1) if beta1 else -math.inf),
        *(beta2, 1 - beta2, math.log(beta2) if beta2 else -math.inf),
        group["eps"],
        group["amsgrad"],
    )


def _rmsprop(group: Group) -> tuple[float, ...]:
    return (
        group["maximize"],
        group["weight_decay"],
        group["alpha"],
        1 - group["alpha"],
        group["eps"],
        group["centered"],
        group["momentum"],
    )


RULES = {
    "sgd": TritonRule(kernels.sgd, ("momentum_buffer",), _sgd),
    "adam": TritonRule(kernels.adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _adam),
    "rmsprop": TritonRule(kernels.rmsprop, ("square_avg", "grad_avg", "momentum_buffer"), _rmsprop),
}


def _ascent(group: Group) -> tuple[float, ...]:
    rho = -group["rho"] if group.get("maximize") else group["rho"]
    return (rho, group["adaptive"], group["eta"])


# --------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Live:
    """The table of what changes with the gradients, on the device.

    ``staging`` is where it was uploaded from. A captured CUDA graph uploads it at every replay.
    """

    table: Tensor
    staging: Tensor


@dataclass
class _Hyper:
    values: tuple[float, ...]
    table: Tensor
    staging: Tensor


class _Tables:
    """What the kernels read beside a bucket's flat buffers."""

    def __init__(self, bucket: Bucket) -> None:
        device, slots = bucket.device, bucket.slots
        self.device = device
        self.dtype = bucket.compute_dtype
        self.rows = bucket.rows
        self.n_slots = len(slots)
        weights = [bucket.memory(slot).data_ptr() if slot.numel else 0 for slot in slots]
        self.aligned = [address % 16 == 0 for address in weights]
        self.slots = torch.tensor(
            [(at, s.numel, s.start, s.row) for at, s in zip(weights, slots, strict=True)],
            dtype=torch.int64,
            device="cpu",
        ).to(device)
        chunks = [-(-slot.numel // CHUNK) for slot in slots]
        counts = torch.tensor(chunks, dtype=torch.int64, device="cpu")
        owner = torch.repeat_interleave(counts)
        number = torch.arange(len(owner), device="cpu") - (counts.cumsum(0) - counts)[owner]
        self.chunks = torch.stack([owner, number], 1).to(torch.int32).to(device)
        self.n_chunks = len(owner)
        self.programs = max(1, min(self.n_chunks, _max_programs(device)))
        self.partials = torch.zeros(self.programs, dtype=self.dtype, device=device)
        self.other_partials = torch.zeros_like(self.partials)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.lives: OrderedDict[Any, _Live] = OrderedDict()
        self.hypers: dict[str, _Hyper] = {}
        self.captured: list[Any] = []
        self.recent: tuple[Gradients, tuple[int, ...], _Live] | None = None
        self.compiled: dict[Any, Any] = {}

    # ---- gradients

    def live(self, grads: Gradients) -> _Live:
        """The table of these gradients, for ``sq_norm``."""
        addresses = _addresses(grads)
        live = self._live((addresses, None), addresses)
        self.recent = (grads, addresses, live)
        return live

    def live_again(self, grads: Gradients) -> _Live:
        """The same for ``perturb_``, which comes after."""
        recent, self.recent = self.recent, None
        if recent is not None and recent[0] is grads:
            return recent[2]
        return self._live((_addresses(grads), None), _addresses(grads))

    def live_with(
        self,
        grads: Gradients,
        perturbed: Sequence[bool],
        present: tuple[tuple[bool, ...], ...],
        lrs: tuple[int, ...],
    ) -> _Live:
        """The table for ``update_``: gradients, flags and addresses of learning rates."""
        recent, self.recent = self.recent, None
        known = recent is not None and recent[0] is grads
        addresses = recent[1] if recent is not None and known else _addresses(grads)
        return self._live((addresses, tuple(perturbed), present, lrs), addresses)

    def _live(self, key: Any, addresses: tuple[int, ...]) -> _Live:
        capturing = capture.is_capturing(self.device)
        live = None if capturing else self.lives.get(key)
        if live is not None:
            return live
        values = [*addresses, *self._flags(addresses, *key[1:])]
        old = None
        if not capturing and len(self.lives) >= _KEPT_TABLES:
            # Kernels that read the oldest table come before this upload: they wrote the weights
            # that the next kernel writes.
            _, old = self.lives.popitem(last=False)
            if old.table.numel() != len(values):
                old = None
        staging = _staging(values, torch.int64, self.device)
        table = _upload(staging, self.device, None if old is None else old.table)
        live = _Live(table, staging)
        if capturing:
            # Filled when the graph runs, and read whenever it does: not for others, and for ever.
            self.captured.append(live)
        else:
            self.lives[key] = live
        return live

    def _flags(
        self,
        addresses: Sequence[int],
        perturbed: Sequence[bool] | None,
        present: Sequence[Sequence[bool]] = (),
        lrs: Sequence[int] = (),
    ) -> list[int]:
        """The rest of a live table: flags of each slot, address of each group's lr."""
        saved, fresh = kernels.PERTURBED.value, kernels.FRESH.value
        aligned = kernels.ALIGNED.value
        flags = [
            aligned * (weights and address % 16 == 0)
            for weights, address in zip(self.aligned, addresses, strict=True)
        ]
        if perturbed:
            flags = [bits | saved * flag for bits, flag in zip(flags, perturbed, strict=True)]
        for names in present:
            flags = [bits if has else bits | fresh for bits, has in zip(flags, names, strict=True)]
        return [*flags, *lrs]

    # ---- hyperparameters

    def hyper(self, kind: str, values: tuple[float, ...]) -> Tensor:
        """The table ``kind`` with these values in it."""
        known = self.hypers.get(kind)
        if capture.is_capturing(self.device):
            # A graph keeps the values that it was captured with.
            staging = _staging(values, self.dtype, self.device)
            fixed = _Hyper(values, _upload(staging, self.device), staging)
            self.captured.append(fixed)
            return fixed.table
        if known is not None and known.values == values:
            return known.table
        staging = _staging(values, self.dtype, self.device)
        old = known.table if known is not None and known.table.numel() == len(values) else None
        self.hypers[kind] = _Hyper(values, _upload(staging, self.device, old), staging)
        return self.hypers[kind].table

    def ascent(self, groups: Groups) -> Tensor:
        """What ``sq_norm`` and ``perturb_`` need to know of the groups."""
        return self.hyper("ascent", self.by_row(len(groups), lambda row: _ascent(groups[row])))

    def by_row(
        self, n_groups: int, columns: Callable[[int], tuple[float, ...]]
    ) -> tuple[float, ...]:
        """Hyperparameters of all groups; zeros for those that are in other buckets only."""
        rows = [columns(row) for row in self.rows]
        if len(rows) < n_groups:
            every = [(0.0,) * len(rows[0])] * n_groups
            for row, values in zip(self.rows, rows, strict=True):
                every[row] = values
            rows = every
        return tuple([float(value) for row in rows for value in row])


def _tables(bucket: Bucket) -> _Tables:
    tables: _Tables | None = bucket.cache.get("triton")
    if tables is None:
        capture.refuse_to_prepare(bucket.device, "the tables of a bucket have yet to be made")
        tables = bucket.cache["triton"] = _Tables(bucket)
    return tables


def _addresses(grads: Gradients) -> tuple[int, ...]:
    if any([grad is None for grad in grads]):
        return tuple([0 if grad is None else grad.data_ptr() or EMPTY for grad in grads])
    addresses = tuple(map(Tensor.data_ptr, grads))  # type: ignore[arg-type]
    return tuple([address or EMPTY for address in addresses]) if 0 in addresses else addresses


def _staging(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    # The caching host allocator gives pinned memory out again only after the copies from it.
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type != "cpu")


def _upload(staging: Tensor, device: torch.device, into: Tensor | None = None) -> Tensor:
    if into is None:
        into = torch.empty_like(staging, device=device, pin_memory=False)
    return into.copy_(staging, non_blocking=True)


# -------------------------------------------------------------------------------------- devices


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _max_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # the interpreter runs them one by one
    properties = _module(device).get_device_properties(device)
    count = getattr(properties, "multi_processor_count", 0) or properties.max_compute_units
    return PROGRAMS * int(count)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu" or _module(device).current_device() == device.index:
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = _module(device).device(device)
    return guard


# ------------------------------------------------------------------------------------- launching


def _launch(
    tables: _Tables,
    bucket: Bucket,
    kernel: Any,
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    roomy: bool = False,
) -> None:
    """Run a kernel over the bucket's chunks.

    Args:
        tables: the bucket's.
        bucket: whose dtype decides the size of a tile.
        kernel: a kernel of ``triton_kernels``.
        args: its run-time arguments, in order; a pointer that it does without is None.
        constants: its compile-time arguments but the last two, BLOCK and TILES.
        roomy: whether it gets MANY_REGISTERS; follows from dtype and constants.
    """
    grid = (tables.programs, 1, 1)
    key = (kernel.fn, constants, *[getattr(arg, "dtype", arg is None) for arg in args])
    known = tables.compiled.get(key)
    if known is not None:
        compiled, constants = known
        compiled[grid](*args, *constants)
        return
    block = min(TILE_BYTES[kernel.fn.__name__] // bucket.dtype.itemsize, CHUNK)
    full = (*constants, block, CHUNK // block)
    compiled = kernel[grid](*args, *full, **_options(bucket.device, roomy))
    # Everything that Triton specializes on is in the key: the rest is the same for a bucket, or
    # declared do_not_specialize. So its own look-up, several times the cost, can be left out.
    if compiled is not None:
        tables.compiled[key] = (compiled, full)


def _options(device: torch.device, roomy: bool) -> dict[str, Any]:
    if device.type != "cuda":
        return {"num_warps": THREADS // 32}
    if torch.version.hip is not None:
        return {"num_warps": THREADS // torch.cuda.get_device_properties(device).warp_size}
    return {"num_warps": THREADS // 32, **CUDA_OPTIONS, **(MANY_REGISTERS if roomy else {})}


def _learning_rate(lr: float | Tensor, bucket: Bucket) -> float | Tensor:
    """The rate as a number, or as a tensor () where reading it would wait for the device."""
    if isinstance(lr, Tensor) and (INTERPRETED or lr.device.type != "cpu"):
        return lr.detach().to(bucket.device, bucket.compute_dtype, non_blocking=True)
    return float(lr)


# --------------------------------------------------------------------------------------- backend


class TritonBackend:
    """See the module's docstring; the methods are those of ``Backend``."""

    name = "triton"

    def sq_norm(self, bucket: Bucket, grads: Gradients, groups: Groups | None) -> Tensor:
        """Partial sums of the squared norm, one for each program."""
        tables = _tables(bucket)
        with _on(bucket.device):
            live = tables.live(grads)
            adaptive, hyper = False, None
            if groups is not None and any([groups[row]["adaptive"] for row in bucket.rows]):
                adaptive, hyper = True, tables.ascent(groups)
            # The norm of the second gradients must not overwrite the first's.
            partials = tables.partials if groups is not None else tables.other_partials
            args = (
                *(partials, bucket.saved, tables.chunks, tables.slots, live.table, hyper),
                *(tables.n_chunks, tables.n_slots),
            )
            _launch(tables, bucket, kernels.sq_norm_kernel, args, (adaptive,))
        return partials

    def perturb_(self, bucket: Bucket, grads: Gradients, groups: Groups, sq_norm: Tensor) -> None:
        """Save w, then climb."""
        tables = _tables(bucket)
        with _on(bucket.device):
            live = tables.live_again(grads)
            hyper = tables.ascent(groups)
            args = (
                *(bucket.saved, sq_norm, tables.chunks, tables.slots, live.table, hyper),
                *(tables.n_chunks, tables.n_slots, len(sq_norm)),
            )
            _launch(tables, bucket, kernels.perturb_kernel, args, ())

    def update_(
        self,
        bucket: Bucket,
        grads: Gradients,
        groups: Groups,
        rule: Rule,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Return the perturbed slots to w, and step those that have a gradient by the rule."""
        tables, spec = _tables(bucket), RULES[rule.name]
        with _on(bucket.device):
            kept = {row: frozenset(rule.state(groups[row])) for row in bucket.rows}
            names = frozenset().union(*kept.values())
            mixed = any([row != names for row in kept.values()])
            rates = {row: _learning_rate(groups[row]["lr"], bucket) for row in bucket.rows}
            tensor_lr = any([isinstance(lr, Tensor) for lr in rates.values()])

            def columns(row: int) -> tuple[float, ...]:
                lr = rates[row]
                uses = [name in kept[row] for name in spec.state] if mixed else ()
                return (0.0 if isinstance(lr, Tensor) else lr, *spec.hyper(groups[row]), *uses)

            hyper = tables.hyper("update", tables.by_row(len(groups), columns))
            addresses = [0] * (len(groups) if tensor_lr else 0)
            for row, lr in rates.items():
                if isinstance(lr, Tensor):
                    addresses[row] = lr.data_ptr()
            buffers = [bucket.state(name) if name in names else None for name in spec.state]
            present = tuple([tuple(b.present) for b in buffers if b is not None])
            live = tables.live_with(grads, bucket.perturbed, present, tuple(addresses))
            args = (
                bucket.saved,
                tuple([bucket.saved if b is None else b.flat for b in buffers]),
                bucket.state(STEP).flat if STEP in names else None,
                *(tables.ticket, tables.chunks, tables.slots, live.table, hyper),
                *(grad_scale, found_inf, tables.n_chunks, tables.n_slots),
            )
            width = 1 + len(spec.hyper(groups[bucket.rows[0]]))
            kept_states = tuple([b is not None for b in buffers])
            constants = (spec.function, kept_states, width, mixed, tensor_lr)
            roomy = bucket.dtype.itemsize == 8 or (bucket.dtype.itemsize == 2 and mixed)
            _launch(tables, bucket, kernels.update_kernel, args, constants, roomy)

    def restore_(self, bucket: Bucket) -> None:
        """Return the perturbed slots to w."""
        tables = _tables(bucket)
        with _on(bucket.device):
            live = tables.live_with([None] * len(bucket.slots), bucket.perturbed, (), ())
            args = (
                *(bucket.saved, tables.chunks, tables.slots, live.table),
                *(tables.n_chunks, tables.n_slots),
            )
            _launch(tables, bucket, kernels.restore_kernel, args, ())
