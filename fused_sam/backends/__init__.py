"""Backends: who does the arithmetic, and which one does it where."""

from __future__ import annotations

import functools
import warnings

import torch

from . import capture, native
from .ahead import Groups
from .base import Backend
from .combine import combine

__all__ = ["NAMES", "Backend", "Groups", "capture", "combine", "missing", "resolve"]

NAMES = ("triton", "native", "reference")
"""Those that can be asked for by name."""

_TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def resolve(name: str, device: torch.device) -> Backend:
    """The backend called ``name``, or with ``"auto"`` the fastest one for this device.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it cannot run on this device; the message says why, and the remedy.
    """
    if name == "auto":
        return _make(_fastest(device))
    if name not in NAMES:
        raise ValueError(f"backend={name!r} is not known; choose from 'auto', {str(NAMES)[1:-1]}")
    if (why := missing(name, device)) is not None:
        raise RuntimeError(f"backend={name!r} cannot run on {device}: {why}")
    return _make(name)


def missing(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, with the remedy; None if it can."""
    if name == "native":
        return native.missing(device.type)
    return _no_triton(device) if name == "triton" else None


def _fastest(device: torch.device) -> str:
    # Triton's interpreter, the only way it has on a CPU, is for tests; and the native backend's
    # CUDA kernels wait for their measurement on a GPU, until then they have to be asked for.
    fastest = {"cpu": "native", **dict.fromkeys(_TRITON_DEVICES, "triton")}.get(device.type)
    if fastest and missing(fastest, device) is None:
        return fastest
    if fastest == "native" and native.is_spoilt(device.type):
        _say_once(
            f"{missing(fastest, device)}. Until then backend='auto' is the slower 'reference'"
        )
    return "reference"


@functools.cache
def _say_once(what: str) -> None:
    warnings.warn(f"FusedSAM: the native backend cannot be used: {what}", stacklevel=2)


def _make(name: str) -> Backend:
    if name == "triton":
        from .triton import TritonBackend

        return TritonBackend()
    return native.NativeBackend() if name == "native" else Backend()


def _no_triton(device: torch.device) -> str | None:
    """Why Triton cannot serve this device, with the remedy; None if it can."""
    try:
        from .triton import INTERPRETED
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it: pip install 'triton>=3.6'"
    if device.type == "cpu" and not INTERPRETED:
        return (
            "Triton has no CPU target; move the model to a GPU, or choose backend='auto' "
            "(for tests, set TRITON_INTERPRET=1 before the first import of triton)"
        )
    if device.type in _TRITON_DEVICES and INTERPRETED:
        return "TRITON_INTERPRET=1 is set, and the interpreter reaches CPU memory only; unset it"
    if device.type not in ("cpu", *_TRITON_DEVICES):
        return "Triton has no such target; choose backend='auto'"
    return None
