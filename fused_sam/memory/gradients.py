"""Gradients as the kernels need them: in the parameter's shape and strides, or refused."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .slot import Slot
from .window import as_real, gradient_dtype, has_memory

_TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None

_GRAD = operator.attrgetter("grad")

_REMEMBERED = 8
"""Addresses of gradients for each parameter: most training has the same few."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """A bucket's gradients.

    Attributes:
        tensors: one for each slot, in its parameter's shape and strides and the slot's dtype of
            gradients, complex as (..., 2) reals; None where it is missing.
        present: whether it is there, one for each slot.
        complete: whether all are there.
        addresses: where each begins; 0 where it is missing.
    """

    tensors: Sequence[Tensor | None]
    present: tuple[bool, ...]
    complete: bool
    addresses: tuple[int, ...]

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """Of those that are there."""
        return next((tensor.dtype for tensor in self.tensors if tensor is not None), None)

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Gradients:
        """Tensors that fit their slots already, None where one is missing."""
        present = tuple([tensor is not None for tensor in tensors])
        places = tuple([0 if tensor is None else Tensor.data_ptr(tensor) for tensor in tensors])
        return cls(tensors, present, all(present), places)


class Stale(Exception):
    """A parameter changed its shape, strides or dtypes in place: the layout must be built anew."""


class Collector:
    """Collects the gradients of a bucket's slots."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._params = [slot.param for slot in slots]
        self._all = (True,) * len(slots)
        self._fit: Callable[..., bool] | None = None
        # Where gradients were seen that have all of their memory: asking each at each step would
        # cost more than all other checks, and one whose storage was resized lies elsewhere.
        self._sound: set[int] = set()

    def collect(self) -> Gradients:
        """The gradients: the very tensors of autograd, or copies where those do not fit.

        Raises:
            Stale: a parameter's shape, strides or dtypes changed.
            RuntimeError: a gradient has another shape than its parameter, or is elsewhere; it is
                sparse, or of a type whose memory cannot be reached; or it has lost its memory.
        """
        raw = list(map(_GRAD, self._params))
        if self._fit is not None and self._fit(*raw):
            return Gradients(raw, self._all, True, self._addresses(raw, True))
        grads = [
            None if grad is None else _usable(grad, slot)
            for grad, slot in zip(raw, self._slots, strict=True)
        ]
        self._fit = same_kind(raw) if all(map(operator.is_, raw, grads)) else None
        present = tuple([grad is not None for grad in raw])
        complete = all(present)
        return Gradients(grads, present, complete, self._addresses(grads, complete))

    def _addresses(self, grads: Sequence[Tensor | None], complete: bool) -> tuple[int, ...]:
        """Where gradients begin; raises if there is no memory for all of one."""
        if complete:
            addresses = tuple(map(Tensor.data_ptr, grads))  # type: ignore[arg-type]
        else:
            addresses = tuple([0 if grad is None else Tensor.data_ptr(grad) for grad in grads])
        if not self._sound.issuperset(addresses):
            for grad, address in zip(grads, addresses, strict=True):
                if grad is None or address in self._sound or has_memory(grad):
                    continue
                raise RuntimeError(
                    f"a gradient of shape {tuple(grad.shape)} has a storage of "
                    f"{grad.untyped_storage().nbytes()} bytes, which is too small for it; "
                    f"set it to None before its storage is freed"
                )
            if len(self._sound) > _REMEMBERED * len(grads):
                self._sound.clear()
            self._sound.update(addresses)
        return addresses


def same_kind(tensors: Sequence[Tensor | None]) -> Callable[..., bool] | None:
    """A test, in C++, whether tensors are like these in all but their values and addresses.

    That is: type, dtype, device, layout, negation, shape, strides. What torch.compile guards its
    compiled functions with does it in a sixth of the time of Python. None, so that every tensor is
    looked at in Python, where one is missing or this torch has no such test.
    """
    if _TensorGuards is None or any([tensor is None for tensor in tensors]):
        return None
    check: Callable[..., bool] = _TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors if tensor is not None],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors if tensor is not None],
    ).check
    return check


def _usable(grad: Tensor, slot: Slot) -> Tensor:
    if type(grad).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise RuntimeError(
            f"a parameter of shape {tuple(slot.shape)} has a gradient of type "
            f"{type(grad).__name__}, whose memory FusedSAM cannot reach; use plain tensors"
        )
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"a parameter of shape {tuple(slot.shape)} has a gradient of layout "
            f"{grad.layout}; FusedSAM needs dense gradients: build the layer with "
            f"sparse=False, or keep its parameters in another optimizer"
        )
    if type(grad) is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            grad = grad.as_subclass(Tensor)  # whose methods tell the truth
    if grad.shape != slot.shape or grad.device != slot.param.device:
        _refuse(grad, slot)
    if grad.dtype.is_complex and not slot.dtype.is_complex:
        _refuse(grad, slot)
    if (
        grad.stride() != slot.stride
        or grad.dtype is not slot.grad_dtype
        or grad.is_neg()
        or grad._is_zerotensor()
    ):
        grad = _match(grad, slot)
    return as_real(grad)


def _refuse(grad: Tensor, slot: Slot) -> NoReturn:
    param = slot.param
    if param.shape != slot.shape or param.dtype != slot.dtype:
        raise Stale
    raise RuntimeError(
        f"a parameter of shape {tuple(param.shape)} and dtype {param.dtype} on {param.device} has "
        f"a gradient of shape {tuple(grad.shape)} and dtype {grad.dtype} on {grad.device}; after "
        f"changing a parameter, set its gradient to None and call backward again"
    )


def _match(grad: Tensor, slot: Slot) -> Tensor:
    """A gradient in its slot's dtype and strides: a view of it if that serves, else a copy."""
    param = slot.param
    if param.shape != slot.shape or param.stride() != slot.stride or param.dtype != slot.dtype:
        raise Stale
    if gradient_dtype(param) != slot.grad_dtype:
        raise Stale
    same_order = all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(slot.shape, slot.stride, grad.stride(), strict=True)
    )
    lazy = grad.is_neg() or grad._is_zerotensor()
    dtype = slot.grad_dtype
    if same_order and grad.dtype is dtype and not lazy:
        return grad.detach().as_strided(slot.shape, slot.stride)
    matched = torch.empty_strided(slot.shape, slot.stride, dtype=dtype, device=param.device)
    return matched.copy_(grad.detach())
