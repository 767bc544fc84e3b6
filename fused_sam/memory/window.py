"""One tensor's memory: is it dense, who else holds it, and windows with a storage of their own."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..devices import on


def trains(param: Tensor) -> bool:
    """Whether a base optimizer would step it, or may have to in the next step."""
    return param.requires_grad or param.grad is not None


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which its gradients are read.

    That is what it declares (``Tensor.grad_dtype``). Where it takes any, it is the dtype of all
    arithmetic, into which they are converted.
    """
    # Torch refuses what is no leaf, with its own words, once it gets it.
    dtype = param.grad_dtype if param.is_leaf else param.dtype
    if dtype is None:
        dtype = torch.float64 if param.dtype.to_real() == torch.float64 else torch.float32
    return dtype.to_complex() if param.is_complex() else dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of dimensions, once each."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last; 0 where there is none."""
    if not tensor.numel():
        return 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage holds all of the elements: one can be resized under its tensors."""
    offset = tensor.storage_offset() * tensor.element_size()
    return not tensor.numel() or offset + extent(tensor) <= tensor.untyped_storage().nbytes()


def is_shared(tensor: Tensor) -> bool:
    """Whether anything but this parameter holds its memory, which must then stay where it is."""
    storage = tensor.untyped_storage()
    if storage.device.type == "cpu" and storage.is_shared():
        return True
    # Memory of unknown origin cannot be resized; neither can a window of an earlier layout, which
    # is ours to move.
    external = not storage.resizable() and not hasattr(storage, "_fused_sam_window")
    # Two holders are the parameter and the Python object `storage`; more are aliases of it.
    if external or torch._C._storage_Use_Count(storage._cdata) > 2:
        return True
    return sys.getrefcount(storage) > _references()


@functools.cache
def _references() -> int:
    """What Python counts of a storage that only its tensor and the counting function have."""
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


def must_stay(param: Tensor) -> bool:
    """Whether a parameter cannot become a window: its memory is another's, or it has none."""
    if param.numel() == 0 or not has_windows(param.device):
        return True
    return not (param.is_conj() or param.is_neg()) and is_shared(param)


@functools.cache
def has_windows(device: torch.device) -> bool:
    """Whether tensors of this device can be exchanged through DLPack."""
    try:
        make_window(torch.empty(1, device=device))
    except (RuntimeError, BufferError, TypeError, ValueError):
        return False
    return True


def make_window(memory: Tensor) -> Tensor:
    """``memory`` (n,) as a tensor whose storage is exactly its n elements.

    A plain view would share the whole buffer's storage: then ``torch.save`` of one layer writes
    the whole model, and ``safetensors`` refuses it.
    """
    with on(memory.device):  # torch exchanges no memory of a GPU that is not the current one
        window = from_dlpack(memory)
    window.untyped_storage()._fused_sam_window = True  # type: ignore[attr-defined]
    return window


def as_real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as (..., 2) reals; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
