"""Memory: buckets of flat buffers, and the windows through which the model sees its parameters.

Parameters of one device and dtype form a bucket. The bucket owns one flat buffer of weights, one
of saved weights and one for each optimizer state, all with the same element offsets; complex
numbers are pairs of reals. A parameter becomes a window of the flat weights with a storage of its
own, so that saving one layer writes one layer. Parameters that must not move are pinned: they stay
where they are, and only their saved weights and state live in the bucket.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .rules import STEP, Rule

_TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None

_GRAD = operator.attrgetter("grad")
_PARAMS = operator.itemgetter("params")

ALIGNMENT = 64
"""Elements; a parameter's offset is a multiple, so every window is 128-byte aligned or better."""

State = MutableMapping[Tensor, dict[str, Any]]


class Stale(Exception):
    """A parameter changed its shape or strides in place: the layout must be built anew."""


# ---------------------------------------------------------------------------- memory of one tensor


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


def is_shared(tensor: Tensor) -> bool:
    """Whether anything but this parameter holds its memory, which must then stay where it is."""
    storage = tensor.untyped_storage()
    if storage.device.type == "cpu" and storage.is_shared():
        return True
    # Memory of unknown origin cannot be resized; neither can a window of an earlier layout, which
    # is ours to move.
    external = not storage.resizable() and not hasattr(storage, "_fused_sam_window")
    # Two holders are the parameter and the Python object `storage`; more are aliases of it.
    return external or torch._C._storage_Use_Count(storage._cdata) > 2


@functools.cache
def _has_windows(device: torch.device) -> bool:
    """Whether tensors of this device can be exchanged through DLPack."""
    try:
        from_dlpack(torch.empty(1, device=device))
    except (RuntimeError, BufferError, TypeError, ValueError):
        return False
    return True


def _window(memory: Tensor) -> Tensor:
    """``memory`` (n,) as a tensor whose storage is exactly its n elements.

    A plain view would share the whole buffer's storage: then ``torch.save`` of one layer writes
    the whole model, and ``safetensors`` refuses it.
    """
    window = from_dlpack(memory)
    window.untyped_storage()._fused_sam_window = True  # type: ignore[attr-defined]
    return window


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one parameter in its bucket; ``start`` and ``numel`` count real elements."""

    param: Tensor
    row: int
    """Index of the parameter's group."""
    start: int
    numel: int
    pinned: bool
    dtype: torch.dtype
    """The parameter's, which may be complex."""
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The slot's part of a flat buffer: (numel,), real."""
        return flat[self.start : self.start + self.numel]

    def real(self, memory: Tensor) -> Tensor:
        """``memory`` (numel,) in the parameter's shape; complex as (..., 2) reals."""
        if self.dtype.is_complex:
            stride = (*(2 * s for s in self.stride), 1)
            return memory.as_strided((*self.shape, 2), stride)
        return memory.as_strided(self.shape, self.stride)

    def shaped(self, memory: Tensor) -> Tensor:
        """``memory`` (numel,) in the parameter's shape, strides and dtype."""
        real = self.real(memory)
        return torch.view_as_complex(real) if self.dtype.is_complex else real


def as_real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as (..., 2) reals; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


# ------------------------------------------------------------------------------------------ bucket


class StateBuffer:
    """One optimizer state of a bucket.

    Attributes:
        flat: (bucket.size,) in the bucket's dtype; ``step``: (len(slots),) float32. Zero at first.
        windows: what ``optimizer.state[p][name]`` shows, one for each slot, with its own storage.
        present: whether the parameter has this state already, one for each slot.
    """

    def __init__(self, name: str, bucket: Bucket) -> None:
        slots, device = bucket.slots, bucket.device
        if name == STEP:
            self.flat = torch.zeros(len(slots), dtype=torch.float32, device=device)
            pieces = list(self.flat.unbind())
        else:
            self.flat = torch.zeros(bucket.size, dtype=bucket.dtype, device=device)
            pieces = [slot.of(self.flat) for slot in slots]
        if _has_windows(device):
            pieces = [_window(piece) if piece.numel() else piece for piece in pieces]
        self.windows = [
            piece.view(()) if name == STEP else slot.shaped(piece)
            for slot, piece in zip(slots, pieces, strict=True)
        ]
        self.present = [False] * len(slots)

    def adopt(self, values: Sequence[Any]) -> None:
        """Copy in a value for each slot; None clears it. A value may be another slot's window."""
        ours = {id(window): i for i, window in enumerate(self.windows)}
        values = [
            value.clone() if ours.get(id(value), i) != i else value
            for i, value in enumerate(values)
        ]
        self.present = [value is not None for value in values]
        for window, value in zip(self.windows, values, strict=True):
            if value is None:
                window.zero_()
            elif value is not window:
                window.copy_(torch.as_tensor(value, device=window.device))


class Bucket:
    """The parameters of one device and dtype, with their flat buffers.

    Attributes:
        device, dtype: of all buffers; the dtype is real (complex64 parameters: float32).
        slots: one for each parameter; those that moved first, pinned ones last.
        rows: the indices of the groups that have parameters here, rising.
        size: elements of a flat buffer, padding included. Padding is zero and stays zero.
        weights: (size of the moved slots,), the flat buffer whose windows the parameters are.
        saved: (size,), the weights w while the parameters hold w + epsilon.
        perturbed: for each slot, whether it has been saved and perturbed and awaits its return.
        cache: what the backend derives from this bucket; it dies with the bucket.
    """

    def __init__(self, members: Sequence[tuple[Tensor, int]], pinned: set[Tensor]) -> None:
        first = members[0][0]
        self.device = first.device
        self.dtype = first.dtype.to_real()
        self.slots: list[Slot] = []
        start = moved = 0
        for param, row in sorted(members, key=lambda member: member[0] in pinned):
            numel = param.numel() * (2 if param.is_complex() else 1)
            stride = param.stride() if is_dense(param) else _contiguous_stride(param.shape)
            self.slots.append(
                Slot(param, row, start, numel, param in pinned, param.dtype, param.shape, stride)
            )
            start += -(-numel // ALIGNMENT) * ALIGNMENT
            moved = moved if param in pinned else start
        self.size = start
        self.rows = sorted({slot.row for slot in self.slots})
        self.weights = torch.zeros(moved, dtype=self.dtype, device=self.device)
        self.saved = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.states: dict[str, StateBuffer] = {}
        self.perturbed = [False] * len(self.slots)
        self.cache: dict[Any, Any] = {}
        self.params = [slot.param for slot in self.slots]
        self._fit: Callable[..., bool] | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of all arithmetic and of norms: float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def move_in(self) -> None:
        """Copy the weights into the flat buffer and make the parameters windows of it."""
        for slot in self.slots:
            if not slot.pinned:
                window = slot.shaped(_window(slot.of(self.weights)))
                window.copy_(slot.param.detach())
                slot.param.data = window

    def memory(self, slot: Slot) -> Tensor:
        """The weights of a slot in memory order, (numel,), real, wherever they are."""
        if slot.pinned:
            return as_real(slot.param.detach()).as_strided((slot.numel,), (1,))
        return slot.of(self.weights)

    def state(self, name: str) -> StateBuffer:
        """The buffer of one optimizer state, allocated when first asked for."""
        if name not in self.states:
            self.states[name] = StateBuffer(name, self)
        return self.states[name]

    def gradients(self) -> list[Tensor | None]:
        """Each slot's gradient as the kernels need it, or None.

        A gradient is in the parameter's shape, dtype and strides, complex as (..., 2) reals: the
        very tensor that autograd put there, or a copy where that does not fit.

        Raises:
            Stale: a parameter's shape or strides changed.
            RuntimeError: a gradient is sparse.
        """
        raw = list(map(_GRAD, self.params))
        if self._fit is not None and self._fit(*raw):
            return raw
        grads = [
            None if grad is None else _usable(grad, slot)
            for grad, slot in zip(raw, self.slots, strict=True)
        ]
        self._fit = _same_kind(raw) if all(map(operator.is_, raw, grads)) else None
        return grads


def _same_kind(tensors: Sequence[Tensor | None]) -> Callable[..., bool] | None:
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
    if (
        grad.shape != slot.shape
        or grad.stride() != slot.stride
        or grad.dtype is not slot.dtype
        or grad.is_neg()
        or grad._is_zerotensor()
    ):
        grad = _match(grad, slot)
    return as_real(grad)


def _match(grad: Tensor, slot: Slot) -> Tensor:
    """A gradient in its parameter's dtype and strides: a view of it if that serves, else a copy."""
    param = slot.param
    if param.shape != slot.shape or param.stride() != slot.stride or param.dtype != slot.dtype:
        raise Stale
    same_order = all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(slot.shape, slot.stride, grad.stride(), strict=True)
    )
    lazy = grad.is_neg() or grad._is_zerotensor()
    if same_order and grad.dtype is slot.dtype and not lazy:
        return grad.detach().as_strided(slot.shape, slot.stride)
    matched = torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype, device=param.device)
    return matched.copy_(grad.detach())


# ------------------------------------------------------------------------------------------ layout


class Layout:
    """All buckets of an optimizer, for its parameter groups as they are now.

    Args:
        groups: the parameter groups; their parameters move into flat buffers.
        rule: whose state the buckets hold, or None if the base optimizer keeps its own.
        state: the optimizer's state; what the rule knows of it moves into flat buffers too.
        old: the layout that this one replaces; saved weights of perturbed parameters pass over.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        rule: Rule | None = None,
        state: State | None = None,
        old: Layout | None = None,
    ) -> None:
        members = [(p, row) for row, group in enumerate(groups) for p in group["params"]]
        carried = old.release() if old is not None else {}
        pinned = {p for p, _ in members if _must_stay(p)}
        by_kind: dict[Any, list[tuple[Tensor, int]]] = {}
        for param, row in members:
            by_kind.setdefault((param.device, param.dtype.to_real()), []).append((param, row))
        self.rule = rule
        self.buckets = [Bucket(bucket, pinned) for bucket in by_kind.values()]
        for bucket in self.buckets:
            bucket.move_in()
            for i, slot in enumerate(bucket.slots):
                saved = carried.pop(slot.param, None)
                if saved is not None:
                    slot.shaped(slot.of(bucket.saved)).copy_(saved)
                    bucket.perturbed[i] = True
        for param, saved in carried.items():
            param.data.copy_(saved)  # it left the groups while it was perturbed
        self._groups = [list(group["params"]) for group in groups]
        self._params = [param for param, _ in members]
        self._addresses = list(map(Tensor.data_ptr, self._params))
        self._strides = list(map(Tensor.stride, self._params))
        self.adopt({} if state is None else state)

    def is_current(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every parameter is still the object and at the address that the layout knows."""
        return (
            len(groups) == len(self._groups)
            and all(map(_are_the_same, map(_PARAMS, groups), self._groups))
            and list(map(Tensor.data_ptr, self._params)) == self._addresses
        )

    def has_strides(self) -> bool:
        """Whether every parameter of a current layout has the strides that the layout knows."""
        return list(map(Tensor.stride, self._params)) == self._strides

    def release(self) -> dict[Tensor, Tensor]:
        """Let go of the parameters' memory; return the saved weights of the perturbed ones."""
        carried = {}
        for bucket in self.buckets:
            bucket.cache = {}  # a captured graph may keep what was in it
            for slot, perturbed in zip(bucket.slots, bucket.perturbed, strict=True):
                if perturbed:
                    carried[slot.param] = slot.shaped(slot.of(bucket.saved))
        return carried

    # ---- optimizer state: the flat buffers hold it, optimizer.state[p] shows it

    def adopt(self, state: State) -> None:
        """Bring the rule's state into the flat buffers; ``state[p]`` then shows windows of them."""
        rule = self.rule
        for bucket in self.buckets if rule else ():
            assert rule is not None
            names = {
                name
                for slot in bucket.slots
                for name in state.get(slot.param, ())
                if name in rule.all_state
            }
            for name in names | bucket.states.keys():
                buffer = bucket.state(name)
                values = [state.get(slot.param, {}).get(name) for slot in bucket.slots]
                buffer.adopt(values)
                for slot, value, window in zip(bucket.slots, values, buffer.windows, strict=True):
                    if value is not None:
                        state[slot.param][name] = window
        self._record_state(state)

    def expose(
        self,
        bucket: Bucket,
        grads: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
        state: State,
        found_inf: Tensor | None,
    ) -> None:
        """Show in ``state`` what an update with these gradients has written for the first time."""
        assert self.rule is not None
        if all(all(buffer.present) for buffer in bucket.states.values()) and bucket.states:
            return
        names = {row: self.rule.state(groups[row]) for row in bucket.rows}
        if all(False not in bucket.states[name].present for row in names.values() for name in row):
            return
        new = [
            (slot, i, name)
            for i, (slot, grad) in enumerate(zip(bucket.slots, grads, strict=True))
            if grad is not None
            for name in names[slot.row]
            if not bucket.states[name].present[i]
        ]
        if not new:
            return
        # A skipped first step must stay a first step where the rule treats that one differently.
        # This waits for the device: once, and only for SGD with dampening under a GradScaler.
        dampened = any(groups[slot.row].get("dampening") for slot, _, _ in new)
        if found_inf is not None and dampened and found_inf.item():
            return
        for slot, i, name in new:
            bucket.states[name].present[i] = True
            state[slot.param][name] = bucket.states[name].windows[i]
        self._record_state(state)

    def state_is_current(self, state: State) -> bool:
        """Whether ``state`` still shows the windows (load_state_dict and users replace tensors)."""
        return (
            state is self._state
            and len(state) == len(self._entries)
            and all(map(operator.is_, state.values(), self._entries))
            and all(map(operator.is_, map(dict.get, *self._shown), self._windows))
        )

    def _record_state(self, state: State) -> None:
        self._state = state
        self._entries = list(state.values())
        shown = [
            (state[slot.param], name, window)
            for bucket in self.buckets
            for name, buffer in bucket.states.items()
            for slot, window, present in zip(
                bucket.slots, buffer.windows, buffer.present, strict=True
            )
            if present
        ]
        self._shown = [entry for entry, _, _ in shown], [name for _, name, _ in shown]
        self._windows = [window for _, _, window in shown]


def _must_stay(param: Tensor) -> bool:
    if param.numel() == 0 or not _has_windows(param.device):
        return True
    return not (param.is_conj() or param.is_neg()) and is_shared(param)


def _are_the_same(params: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    return len(params) == len(known) and all(map(operator.is_, params, known))
