"""Optimizer state: the flat buffers hold it, ``optimizer.state[p]`` shows windows of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..rules import MASTER, STEP, Rule
from .gradients import Gradients
from .window import as_real, has_memory, has_windows, make_window

if TYPE_CHECKING:
    from .bucket import Bucket

State = MutableMapping[Tensor, dict[str, Any]]
Groups = Sequence[Mapping[str, Any]]


class StateBuffer:
    """One optimizer state of a bucket.

    Args:
        name: the state's.
        bucket: whose it is.
        initial: what its elements begin with.

    Attributes:
        flat: (bucket.size,) in the state's dtype; ``step``: (len(slots),) float32.
        windows: what ``optimizer.state[p][name]`` shows, one for each slot, with its own storage.
        present: whether the parameter has this state already, one for each slot.
    """

    def __init__(self, name: str, bucket: Bucket, initial: float = 0.0) -> None:
        slots, device = bucket.slots, bucket.device
        self._begins_as_weights = name == MASTER
        self._initial = initial
        if name == STEP:
            self.flat = torch.zeros(len(slots), dtype=torch.float32, device=device)
            pieces = list(self.flat.unbind())
        else:
            zeros = functools.partial(torch.zeros, bucket.size, device=device)
            self.flat = bucket.saved if name == MASTER else zeros(dtype=bucket.state_dtype(name))
            pieces = [slot.of(self.flat) for slot in slots]
        self._slots, self._pieces, self._counts = slots, pieces, name == STEP
        self.present = [False] * len(slots)
        self._make_windows()
        if initial != 0:
            self.clear()

    def _make_windows(self) -> None:
        pieces = self._pieces
        if has_windows(self.flat.device):
            pieces = [make_window(piece) if piece.numel() else piece for piece in pieces]
        self.windows = [
            piece.view(()) if self._counts else slot.shaped(piece)
            for slot, piece in zip(self._slots, pieces, strict=True)
        ]
        self._addresses = addresses(self.windows)

    def adopt(self, values: Sequence[Any]) -> None:
        """Copy in a value for each slot; None clears it, or leaves a master as it is."""
        if addresses(self.windows) != self._addresses:
            # Some window was given other memory (``.data =``, ``set_``): that is what counts now.
            self._make_windows()
        self.present = [value is not None for value in values]
        for window, piece, value in zip(self.windows, self._pieces, values, strict=True):
            if value is None:
                if not self._begins_as_weights:
                    piece.fill_(self._initial)
            elif value is not window:
                window.copy_(_tensor(value))

    def show(self, slots: Sequence[bool]) -> None:
        """From now on these slots have it."""
        self.present = list(map(operator.or_, self.present, slots))

    def put_back(self, flat: Tensor | None) -> None:
        """Let all be what it was; None: as it began. What is shown stays so."""
        if flat is not None:
            self.flat.copy_(flat)
            return
        there = self.present
        self.clear()
        self.show(there)

    def clear(self) -> None:
        """Let all begin anew."""
        self.adopt([None] * len(self.windows))


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where tensors begin in memory."""
    return list(map(Tensor.data_ptr, tensors))


def _tensor(value: Any) -> Tensor:
    """A state as a tensor: checkpoints of old keep ``step`` as a number."""
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def check_states(rule: Rule | None, groups: Sequence[Mapping[str, Any]], state: State) -> None:
    """Raise unless all that the rule knows of ``state`` fits its parameters.

    Raises:
        ValueError: one has another shape, which would be broadcast, or no memory.
    """
    for row, group in enumerate(groups if rule else ()):
        for i, param in enumerate(group["params"]):
            for name, value in state.get(param, {}).items():
                assert rule is not None
                if name in (*rule.state_names, MASTER) and value is not None:
                    _check_state(name, value, param, f"parameter {i} of group {row}")


def _check_state(name: str, value: Any, param: Tensor, whose: str) -> None:
    whose = f"the state {name!r} of {whose}, which has shape {tuple(param.shape)},"
    if not isinstance(value, (Tensor, int, float)):
        raise ValueError(f"{whose} is a {type(value).__name__}, not a tensor")
    value = _tensor(value)
    if not (value.numel() == 1 if name == STEP else value.shape == param.shape):
        raise ValueError(f"{whose} has shape {tuple(value.shape)}; replace it, or remove it")
    if value.is_complex() and not param.is_complex():
        raise ValueError(f"{whose} is complex, and the parameter is real; replace it, or remove it")
    plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or value.layout is not torch.strided or value.is_meta or not has_memory(value):
        raise ValueError(f"{whose} has no memory that can be read; replace it, or remove it")


def _begin_masters(bucket: Bucket, values: Sequence[Any]) -> None:
    """Where no master is given it is the weight; those of perturbed slots are right."""
    for slot, value, away in zip(bucket.slots, values, bucket.perturbed, strict=True):
        if value is None and not away:
            slot.of(bucket.saved).copy_(bucket.memory(slot))


class StateView:
    """Keeps ``optimizer.state`` and the flat buffers of a rule's state the same.

    Args:
        rule: whose state it is; None if the base optimizer keeps its own.
        buckets: whose buffers hold it.
        state: the optimizer's; what the rule knows of it moves into the buffers.
        groups: the parameter groups.
    """

    def __init__(
        self, rule: Rule | None, buckets: Sequence[Bucket], state: State, groups: Groups
    ) -> None:
        self._rule = rule
        self._buckets = buckets
        self.adopt(state, groups)

    def adopt(self, state: State, groups: Groups) -> None:
        """Bring the rule's state into the flat buffers; ``state[p]`` then shows windows of them.

        Where the rule has its state from construction on, what is missing begins.
        """
        for bucket in self._buckets if self._rule else ():
            assert self._rule is not None
            names = {
                name
                for slot in bucket.slots
                for name in state.get(slot.param, ())
                if name in self._rule.state_names
            }
            if bucket.masters:
                names.add(MASTER)
            for name in names | bucket.states.keys():
                buffer = bucket.state(name)
                ours = {id(window): i for i, window in enumerate(buffer.windows)}
                for i, slot in enumerate(bucket.slots):
                    # Another slot's window is about to be written to.
                    value = state.get(slot.param, {}).get(name)
                    if value is not None and ours.get(id(value), i) != i:
                        state[slot.param][name] = value.clone()
                values = [state.get(slot.param, {}).get(name) for slot in bucket.slots]
                if name == MASTER:
                    _begin_masters(bucket, values)
                buffer.adopt(values)
                for slot, value, window in zip(bucket.slots, values, buffer.windows, strict=True):
                    if value is not None:
                        state[slot.param][name] = window
            if self._rule.from_construction:
                self._begin(bucket, state, groups)
        self._record(state)

    def _begin(self, bucket: Bucket, state: State, groups: Groups) -> None:
        """Make the state that a parameter should have from construction on, and has not."""
        assert self._rule is not None
        for i, slot in enumerate(bucket.slots):
            group = groups[slot.row]
            for name in self._rule.kept(group):
                buffer = bucket.state(name)
                if not buffer.present[i]:
                    buffer.present[i] = True
                    window = state.setdefault(slot.param, {})[name] = buffer.windows[i]
                    as_real(window).fill_(self._rule.initial(name, group))

    def is_current(self, state: State) -> bool:
        """Whether ``state`` still shows the windows, and these our memory.

        load_state_dict and users replace the tensors, or their memory.
        """
        return (
            state is self._state
            and len(state) == len(self._entries)
            and all(map(operator.is_, state.values(), self._entries))
            and all(map(operator.is_, map(dict.get, *self._shown), self._windows))
            and addresses(self._windows) == self._addresses
        )

    def expose(
        self,
        bucket: Bucket,
        grads: Gradients,
        groups: Groups,
        state: State,
        found_inf: Tensor | None,
    ) -> None:
        """Show in ``state`` what an update with these gradients has written for the first time."""
        assert self._rule is not None
        if bucket.states and all(all(buffer.present) for buffer in bucket.states.values()):
            return
        more = (MASTER,) if bucket.masters else ()
        # An update that failed may not have made all of it.
        names = {
            row: [name for name in (*self._rule.kept(groups[row]), *more) if name in bucket.states]
            for row in bucket.rows
        }
        if all(False not in bucket.states[name].present for row in names.values() for name in row):
            return
        new = [
            (slot, i, name)
            for i, (slot, there) in enumerate(zip(bucket.slots, grads.present, strict=True))
            if there
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
            state[slot.param][name] = bucket.states[name].windows[i]
            bucket.states[name].present[i] = True
        self._record(state)

    def _record(self, state: State) -> None:
        self._state = state
        self._entries = list(state.values())
        shown = [
            (state[slot.param], name, window)
            for bucket in self._buckets
            for name, buffer in bucket.states.items()
            for slot, window, present in zip(
                bucket.slots, buffer.windows, buffer.present, strict=True
            )
            if present
        ]
        self._shown = [entry for entry, _, _ in shown], [name for _, name, _ in shown]
        self._windows = [window for _, _, window in shown]
        self._addresses = addresses(self._windows)
