"""The native libraries: found in the package's folder, loaded once, or a reason why not."""

from __future__ import annotations

import filecmp
import functools
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import translate

# Without the last three options pip takes the package that is installed, or was, for the one asked.
_BUILD = (
    "in a checkout, `FUSED_SAM_BUILD={} pip install --no-build-isolation --force-reinstall "
    "--no-deps --no-cache-dir .`"
)


_ELF = struct.Struct("<40xQ10xHH2x")
"""Of the header of a 64-bit ELF file: where its table of sections is, an entry's size, how many."""


def is_spoilt(device_type: str) -> bool:
    """Whether a library is there that cannot be used."""
    name = "_native" if device_type == "cpu" else "_native_cuda"
    return _library(name) is not None and missing(device_type) is not None


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
            f"build it: {_BUILD.format(device_type)}"
        )
    return _load(library, device_type) or _misfit(library, device_type)


def _library(name: str) -> Path | None:
    found = sorted(Path(__file__).parents[2].glob(f"{name}.*"))
    return next((path for path in found if path.suffix in (".so", ".pyd", ".dll")), None)


def _load(library: Path, device_type: str) -> str | None:
    if _is_registered(device_type):
        if any(map(functools.partial(_is_same, library), torch.ops.loaded_libraries)):
            return None
        return (
            f"another copy of fused_sam has loaded its own {device_type} library into this "
            f"process, and it is not the same as {library}; import one copy, or make both the "
            f"same version"
        )
    if not _is_whole(library):
        return (
            f"its {device_type} library {library} is cut short, or empty; build it again: "
            f"{_BUILD.format(device_type)}"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        words = error.__cause__ or error  # newer versions of torch wrap what the loader says
        return (
            f"its {device_type} library {library} cannot be loaded ({words}); build it again with "
            f"this torch: {_BUILD.format(device_type)}"
        )
    if device_type == "cpu":
        _register_fakes()
    return None


def _misfit(library: Path, device_type: str) -> str | None:
    """Why a library that is loaded must not be used."""
    operations = torch.ops.fused_sam
    told = "mathematics" if device_type == "cpu" else "cuda_mathematics"
    if not hasattr(operations, told) or getattr(operations, told)() != translate.digest():
        return (
            f"its library {library} was built from other sources than this package; build it "
            f"again: {_BUILD.format(device_type)}"
        )
    found, wanted = operations.cpu_kernels(), os.environ.get("FUSED_SAM_CPU")
    if found == "none":
        return "this CPU is older than x86-64-v2, for which it is built; use backend='reference'"
    if device_type == "cpu" and wanted and wanted != found:
        raise ValueError(f"FUSED_SAM_CPU={wanted!r} names no kernels that this CPU can run")
    return None


def _is_registered(device_type: str) -> bool:
    """Whether the operations are there: loading a second library of them would end the process."""
    name = "fused_sam::update_"
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, device_type.upper()
    )


def _is_whole(library: Path) -> bool:
    """Whether a library goes on to its end: the loader of Linux ends the process if it does not.

    The table of sections comes last in an ELF file, and the header tells where.
    """
    with library.open("rb") as file:
        header = file.read(_ELF.size)
    if not header.startswith(b"\x7fELF\x02\x01"):
        return bool(header)  # of another system: its loader finds out
    if len(header) < _ELF.size:
        return False
    start, size, count = _ELF.unpack(header)
    return bool(start + size * count <= library.stat().st_size)


def _is_same(library: Path, other: str) -> bool:
    return os.path.exists(other) and filecmp.cmp(library, other, shallow=False)


def _register_fakes() -> None:
    """What torch.compile and torch.export need to know: shapes and dtypes of the results."""

    def number(saved: Tensor, *_: Any) -> Tensor:
        return saved.new_empty(1, dtype=torch.float64)

    def nothing(*_: Any) -> None:
        return None

    torch.library.register_fake("fused_sam::reduce")(number)
    for name in ("ascend_", "update_", "restore_"):
        torch.library.register_fake(f"fused_sam::{name}")(nothing)
