"""Launches of single kernels: all that the benchmarks on a GPU know of the backends' insides."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from fused_sam import FusedSAM, backends
from fused_sam.ascents import ASCENTS
from fused_sam.backends import capture
from fused_sam.backends.triton import operations as triton

from .device import DEVICE
from .peers import BASES, RHO, parameters

Work = Callable[[], Any]

ACCESSES = {
    "reduce": 1,
    "ascend_": 4,
    "reduce, ascend_": 5,
    "update_ SGD": 5,
    "update_ AdamW": 7,
    "restore_": 2,
}
"""Accesses to memory for each element: the traffic budget of docs/predicted.md."""

VARIANTS: list[dict[str, int]] = [
    {},
    *({"CHUNK": chunk} for chunk in (2048, 8192, 16384)),
    *({"PROGRAMS": programs} for programs in (4, 6, 12, 16)),
    {"THREADS": 256, "tile": 2, "PROGRAMS": 4},
    {"THREADS": 512, "tile": 4, "PROGRAMS": 2},
    {"tile": 2},
]
"""Other sizes for the Triton backend; ``tile`` is a factor for its tiles."""


def available() -> list[str]:
    """The backends with kernels that run here."""
    return [name for name in ("triton", "native") if backends.missing(name, DEVICE) is None]


def launches(numel: int, base: str, backend: str, copies: int = 1) -> dict[str, list[Work]]:
    """Launches of each kernel over ``copies`` optimizers of ``numel`` elements.

    The keys are those of ``ACCESSES``. What does not depend on the base optimizer is there for SGD
    only. The pair is what ``first_step`` launches, one after the other.
    """
    works: dict[str, list[Work]] = {}
    for seed in range(copies):
        for kernel, work in _launches_of(_flat_optimizer(numel, base, backend, seed), base).items():
            works.setdefault(kernel, []).append(work)
    return works


def _flat_optimizer(numel: int, base: str, backend: str, seed: int) -> Any:
    cls, options = BASES[base]
    (p,) = parameters([(numel,)], DEVICE, seed)
    p.grad = torch.randn_like(p)
    optimizer = FusedSAM([p], cls, rho=RHO, backend=backend, **options)
    optimizer.first_step()
    optimizer.second_step()
    return optimizer


def _launches_of(optimizer: Any, base: str) -> dict[str, Work]:
    engine, groups = optimizer._facts.engine, optimizer.param_groups
    layout, (bucket,), (backend,) = engine.layout, engine.buckets, engine.backends
    grads = bucket.gradients()
    # So that update_ and restore_ read `saved`, as they do after ascend_.
    bucket.begin_climb(1, grads, keep=False)
    bucket.end()
    update = functools.partial(backend.update_, bucket, layout.rule, None, grads, groups)
    if base != "SGD":
        return {f"update_ {base}": update}

    def reduce() -> torch.Tensor:
        return backend.reduce(bucket, ASCENTS["sam"].sums, grads, groups)

    def ascend_(total: torch.Tensor) -> None:
        away, bucket.perturbed = bucket.perturbed, (False,)  # else it would not save w
        backend.ascend_(bucket, ASCENTS["sam"], grads, groups, total, 1)
        bucket.perturbed = away

    return {
        "reduce": reduce,
        "ascend_": functools.partial(ascend_, reduce().clone()),
        "reduce, ascend_": lambda: ascend_(reduce()),
        f"update_ {base}": update,
        "restore_": functools.partial(backend.restore_, bucket),
    }


@contextlib.contextmanager
def kernels_only() -> Iterator[None]:
    """What is captured are kernels: they read the tables that are there, and upload none."""
    with mock.patch.object(capture, "is_capturing", lambda device: False):
        yield


@contextlib.contextmanager
def variant(sizes: Mapping[str, int]) -> Iterator[None]:
    """The Triton backend with one of ``VARIANTS``; for optimizers that are made inside."""
    tiles = {k: v * sizes.get("tile", 1) for k, v in triton.TILE_BYTES.items()}
    constants = {name: size for name, size in sizes.items() if name != "tile"}
    with mock.patch.multiple(triton, TILE_BYTES=tiles, **constants):
        yield
