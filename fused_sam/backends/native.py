"""The native backend: C++ on a CPU, CUDA C++ on a GPU (csrc/), one operation for each pass.

The kernels reach gradients by address through a table, and everything else through the flat
buffers and small tables that this module fills. What they compute is stated in csrc/rules.h.
"""

from __future__ import annotations

import functools
import math
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layout import Bucket
from ..rules import STEP, Rule
from . import capture
from .interface import Gradients, Groups

HYPER = (
    "rho",
    "adaptive",
    "eta",
    "maximize",
    "lr",
    "weight_decay",
    "options",
    "eps",
    "momentum",
    "one_minus_dampening",
    "nesterov",
    "decoupled_weight_decay",
    "one_minus_beta1",
    "log_beta1",
    "beta2",
    "one_minus_beta2",
    "log_beta2",
)
"""The columns of the table of hyperparameters, as ``Hyper`` in csrc/rules.h has them."""

SPAN = 16384
"""Elements for each partial sum on a CPU: ``kSpan`` in csrc/cpu/kernels.h."""

CHUNK = 4096
"""Elements that a block of threads takes at a time: ``kChunk`` in csrc/cuda/launch.h."""

PARTIALS = 2048
"""Partial sums on a GPU: ``kPartials`` in csrc/cuda/launch.h."""

_PERTURBED, _FRESH = 1, 2
_MAX_SMALL = 16
_EMPTY = 64
"""The address of a gradient without elements, which is there all the same."""

# Without the last three options pip takes the package that is installed, or was, for the one asked.
_BUILD = (
    "`FUSED_SAM_BUILD={} pip install --no-build-isolation --force-reinstall --no-deps "
    "--no-cache-dir fused-sam`"
)


# ------------------------------------------------------------------------------------ the libraries


def _library(name: str) -> Path | None:
    found = sorted(Path(__file__).parent.parent.glob(f"{name}.*"))
    return next((path for path in found if path.suffix in (".so", ".pyd", ".dll")), None)


@functools.cache
def missing(device_type: str = "cpu") -> str | None:
    """Why the backend cannot run on this kind of device, with the remedy; None if it can.

    The first call for a kind of device loads its library.

    Raises:
        ValueError: the environment variable FUSED_SAM_CPU names other kernels than there are.
    """
    if device_type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, not on {device_type}; use backend='auto'"
    if torch.version.hip and device_type == "cuda":
        return "its GPU kernels are CUDA, and this torch is for ROCm; use backend='triton'"
    if device_type == "cuda":
        if (why := missing("cpu")) is not None:
            return why
        if not torch.version.cuda:
            return "this torch has no CUDA; install one that has"
    library = _library("_native" if device_type == "cpu" else "_native_cuda")
    if library is None:
        tool = "a C++ compiler" if device_type == "cpu" else "nvcc"
        return (
            f"its {device_type} library was not built, for which torch and {tool} must be there; "
            f"build it with {_BUILD.format(device_type)}"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"its {device_type} library {library} cannot be loaded ({error}); build it again with "
            f"this torch: {_BUILD.format(device_type)}"
        )
    if device_type == "cpu":
        _register_fakes()
        found, wanted = torch.ops.fused_sam.cpu_kernels(), os.environ.get("FUSED_SAM_CPU")
        if wanted and wanted != found:
            raise ValueError(f"FUSED_SAM_CPU={wanted!r} names no kernels that this CPU can run")
    return None


@functools.cache  # torch before 2.13 refuses a second time
def _register_fakes() -> None:
    """What torch.compile and torch.export need to know: shapes and dtypes of the results."""

    def norm(weights: Tensor, pinned: Any, saved: Tensor, *_: Any) -> Tensor:
        dtype = torch.float64 if saved.dtype == torch.float64 else torch.float32
        spans = max(1, -(-saved.numel() // SPAN))
        return saved.new_empty(PARTIALS if saved.is_cuda else spans, dtype=dtype)

    def nothing(*_: Any) -> None:
        return None

    torch.library.register_fake("fused_sam::sq_norm")(norm)
    torch.library.register_fake("fused_sam::climb_")(norm)
    torch.library.register_fake("fused_sam::perturb_")(nothing)
    torch.library.register_fake("fused_sam::update_")(nothing)


# ---------------------------------------------------------------------------------- hyperparameters


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


# What is derived from a group's options. An option that is a column itself is not named here.


def _ascent(rho: float, maximize: bool, **_: Any) -> dict[str, float]:
    return {"rho": -rho if maximize else rho}


def _sgd(momentum: float, dampening: float, **_: Any) -> dict[str, float]:
    return {"options": bool(momentum), "one_minus_dampening": 1 - dampening}


def _adam(betas: tuple[float, float], amsgrad: bool, **_: Any) -> dict[str, float]:
    beta1, beta2 = betas
    return {
        "options": amsgrad,
        "one_minus_beta1": 1 - beta1,
        "log_beta1": _log(beta1),
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "log_beta2": _log(beta2),
    }


def _rmsprop(alpha: float, momentum: float, centered: bool, **_: Any) -> dict[str, float]:
    options = (momentum > 0) + 2 * bool(centered)
    return {"options": options, "beta2": alpha, "one_minus_beta2": 1 - alpha}


_Row = tuple[Callable[..., dict[str, float]], tuple[str, ...]]
"""How a row of the table is made: what is derived, and the options that it is made from."""
_COMMON = ("lr", "weight_decay", "maximize")
_NOTHING: _Row = (dict, ())
_ASCENT: _Row = (_ascent, ("rho", "adaptive", "eta", "maximize"))
_UPDATE: dict[str, tuple[int, tuple[str, ...], _Row]] = {
    "sgd": (
        0,
        ("momentum_buffer",),
        (_sgd, (*_COMMON, "momentum", "dampening", "nesterov")),
    ),
    "adam": (
        1,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        (_adam, (*_COMMON, "betas", "eps", "amsgrad", "decoupled_weight_decay")),
    ),
    "rmsprop": (
        2,
        ("square_avg", "momentum_buffer", "grad_avg"),
        (_rmsprop, (*_COMMON, "alpha", "eps", "momentum", "centered")),
    ),
}
"""Of each rule: its number and the order of its states in csrc/, and its row."""


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    if isinstance(value, (tuple, list)):
        return tuple([float(item) for item in value])
    return value


# ------------------------------------------------------------------------------------------- tables


class _Tables:
    """What the kernels need to know of a bucket beside its flat buffers."""

    def __init__(self, bucket: Bucket) -> None:
        self.device = bucket.device
        self.on_cpu = bucket.device.type == "cpu"
        self.pinned = [bucket.memory(slot) for slot in bucket.slots if slot.pinned]
        # The pinned slots are a bucket's last ones.
        addresses = [0] * (len(bucket.slots) - len(self.pinned))
        addresses += [memory.data_ptr() for memory in self.pinned]
        table = [
            number
            for slot, address in zip(bucket.slots, addresses, strict=True)
            for number in (slot.start, slot.numel, slot.row, address)
        ]
        if not self.on_cpu:
            table += [
                number
                for i, slot in enumerate(bucket.slots)
                for offset in range(0, slot.numel, CHUNK)
                for number in (i, offset)
            ]
        self.slots = torch.tensor(table, dtype=torch.int64, device=self.device)
        self.ticket = None if self.on_cpu else torch.zeros(1, dtype=torch.int32, device=self.device)
        self._hyper: dict[Any, tuple[Any, Tensor]] = {}
        self._small: dict[Any, Tensor] = {}
        self._captured: list[Any] = []

    def grads(self, grads: Gradients) -> Tensor:
        """(slots,), int64: where the gradients are; 0 for none."""
        return self._of_slots(
            "q", torch.int64, [0 if g is None else g.data_ptr() or _EMPTY for g in grads]
        )

    def flags(self, bucket: Bucket, states: Sequence[str]) -> Tensor:
        """(slots,), uint8: which slots are perturbed, and whose state is still zero."""
        present = [bucket.states[name].present for name in states]
        flags: list[Any] = bucket.perturbed
        if any(False in has for has in present):
            fresh = [not all(has) for has in zip(*present, strict=True)]
            flags = [
                _PERTURBED * perturbed + _FRESH * new
                for perturbed, new in zip(bucket.perturbed, fresh, strict=True)
            ]
        return self._of_slots("B", torch.uint8, flags)

    def hyper(self, bucket: Bucket, groups: Groups, row: _Row) -> Tensor:
        """(groups, len(HYPER)) in the compute dtype; made anew where a number has changed.

        Rows of groups that have no parameter here are zero.
        """
        derive, names = row
        on_device = {}
        values = {}
        for i in bucket.rows:
            group = groups[i]
            lr = group.get("lr")
            if "lr" in names and isinstance(lr, Tensor) and lr.device.type != "cpu":
                on_device[i] = lr
                group = {**group, "lr": 0.0}  # not read here: that would wait for the device
            values[i] = {name: _number(group.get(name, False)) for name in names}
        # Which rates are on the device belongs to the comparison: a plain 0.0 looks like one.
        wanted = len(groups), values, on_device.keys()
        known, table = self._hyper.get(derive, (None, None))
        capturing = capture.is_capturing(self.device)
        if table is None or known != wanted or capturing:
            rows = [[0.0] * len(HYPER)] * len(groups)
            for i, options in values.items():
                columns = {**options, **derive(**options)}
                rows[i] = [float(columns.get(name, 0)) for name in HYPER]
            table = self._upload(torch.tensor(rows, dtype=bucket.compute_dtype, device="cpu"))
            if not capturing:
                self._hyper[derive] = (wanted, table)
        for i, lr in on_device.items():
            table[i, HYPER.index("lr")].copy_(lr.squeeze(), non_blocking=True)
        return table

    def _of_slots(self, code: str, dtype: torch.dtype, values: Sequence[int]) -> Tensor:
        """A table of a number for each slot, where the kernels read it."""
        table = torch.frombuffer(array(code, values), dtype=dtype)
        if self.on_cpu or capture.is_capturing(self.device):
            return self._upload(table)
        # Addresses repeat from step to step, so most tables are on the device already.
        key = (code, *values)
        if key not in self._small:
            if len(self._small) >= _MAX_SMALL:
                del self._small[next(iter(self._small))]
            self._small[key] = self._upload(table)
        return self._small[key]

    def _upload(self, table: Tensor) -> Tensor:
        """A table of the host where the kernels read it."""
        if self.on_cpu:
            return table
        pinned = table.pin_memory()
        uploaded = pinned.to(self.device, non_blocking=True)
        if capture.is_capturing(self.device):
            # A CUDA graph uploads it whenever it runs, and reads it then: so it is kept for ever,
            # and nobody else gets it.
            self._captured.append((pinned, uploaded))
        return uploaded


def _tables(bucket: Bucket) -> _Tables:
    tables: _Tables | None = bucket.cache.get(_Tables)
    if tables is None:
        capture.refuse_to_prepare(bucket.device, "the tables of a bucket have yet to be made")
        tables = bucket.cache[_Tables] = _Tables(bucket)
    return tables


def _no_groups(bucket: Bucket) -> Groups:
    return [{}] * (1 + bucket.rows[-1])


# ------------------------------------------------------------------------------------------ backend


class NativeBackend:
    """See the module's docstring; the methods are those of ``Backend``."""

    name = "native"

    def sq_norm(self, bucket: Bucket, grads: Gradients, groups: Groups | None) -> Tensor:
        """Partial sums of the squared norm, one for each ``SPAN`` elements of the flat buffers."""
        tables = _tables(bucket)
        hyper = tables.hyper(bucket, groups or _no_groups(bucket), _ASCENT if groups else _NOTHING)
        partials: Tensor = torch.ops.fused_sam.sq_norm.default(
            bucket.weights,
            tables.pinned,
            bucket.saved,
            tables.slots,
            tables.grads(grads),
            hyper,
            groups is not None,
        )
        return partials

    def perturb_(self, bucket: Bucket, grads: Gradients, groups: Groups, sq_norm: Tensor) -> None:
        """Save w, then climb."""
        tables = _tables(bucket)
        torch.ops.fused_sam.perturb_.default(
            bucket.weights,
            tables.pinned,
            bucket.saved,
            tables.slots,
            tables.grads(grads),
            tables.hyper(bucket, groups, _ASCENT),
            sq_norm,
        )

    def climb_(self, bucket: Bucket, grads: Gradients, groups: Groups) -> Tensor:
        """``sq_norm`` and ``perturb_`` in one, for a bucket that is alone."""
        tables = _tables(bucket)
        partials: Tensor = torch.ops.fused_sam.climb_.default(
            bucket.weights,
            tables.pinned,
            bucket.saved,
            tables.slots,
            tables.grads(grads),
            tables.hyper(bucket, groups, _ASCENT),
        )
        return partials

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
        tables = _tables(bucket)
        number, order, row = _UPDATE[rule.name]
        names = {name for i in bucket.rows for name in rule.state(groups[i])}
        states = {name: bucket.state(name).flat for name in names}
        torch.ops.fused_sam.update_.default(
            bucket.weights,
            tables.pinned,
            *[states.get(name) for name in order],
            *[None] * (3 - len(order)),
            states.get(STEP),
            tables.ticket,
            bucket.saved,
            tables.slots,
            tables.grads(grads),
            tables.hyper(bucket, groups, row),
            tables.flags(bucket, list(names)),
            grad_scale,
            found_inf,
            number,
        )

    def restore_(self, bucket: Bucket) -> None:
        """Return the perturbed slots to w."""
        tables = _tables(bucket)
        torch.ops.fused_sam.update_.default(
            bucket.weights,
            tables.pinned,
            None,
            None,
            None,
            None,
            tables.ticket,
            bucket.saved,
            tables.slots,
            tables.grads([None] * len(bucket.slots)),
            tables.hyper(bucket, _no_groups(bucket), _NOTHING),
            tables.flags(bucket, []),
            None,
            None,
            0,
        )
