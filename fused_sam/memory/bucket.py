"""A bucket: the parameters of one device and dtypes, and the flat buffers that hold them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..rules import MASTER
from .gradients import Collector, Gradients
from .members import DIRECTION, MEMBER_STATES
from .slot import Slot
from .state import StateBuffer
from .window import as_real, contiguous_stride, gradient_dtype, is_dense, make_window

ALIGNMENT = 64
"""Elements; a parameter's offset is a multiple, so every window is 128-byte aligned or better."""

PART_ELEMENTS = 1 << 20
"""The weights are cut into allocations of no more, or of one larger parameter: each stays as long
as one of its parameters is in use. What runs over neighbours (backends/runs.py) ends there too, so
that what one operation writes is still in cache when the next one reads it."""

_CARRIED = -1
"""Stands for the number of a climb that another bucket made."""


class Kept(NamedTuple):
    """What sums and updates read of the parameters besides weights and gradients.

    Attributes:
        flat: (bucket.size,).
        held: for each slot, whether anything is there.
    """

    flat: Tensor
    held: tuple[bool, ...]


class Bucket:
    """The parameters of one device, dtype and dtype of gradients, with their flat buffers.

    Every climb has a number. The operation that saves w writes it into ``climb``, on the device,
    and the one that returns to w writes 0. The host assumes that both succeed, and only after an
    exception does it read which was the last: see ``settle``.

    Attributes:
        device: of all buffers.
        dtype: of the weights; it is real (complex64 parameters: float32), as all are.
        grad_dtype: of the gradients.
        masters: whether ``saved`` holds float32 masters, the weights in full precision. They are
            right whenever nothing is perturbed, but for weights that were changed from outside: a
            weight that is not its master, rounded, is its own master.
        slots: one for each parameter; those that moved first, pinned ones last.
        rows: the indices of the groups that have parameters here, rising.
        size: elements of a flat buffer, padding included. Padding is zero and stays zero.
        weights: the allocations whose windows the parameters are, one for each part.
        saved: (size,), the weights w while the parameters hold w + epsilon; or the masters.
        kept: (size,) in their dtype, gradients at w, where a blend wants them; None before.
        held: for each slot, whether the last climb has put its gradient into ``kept``.
        climb: (1,) int64, the number of the climb that wrote ``saved``; 0 at w.
        perturbed: for each slot, whether it has been saved and perturbed and awaits its return.
        states: the rule's states, by name.
        members: what an ascent or a blend keeps over the steps, by name; see ``members.py``.
        cache: what the backend derives from this bucket; it dies with the bucket.
    """

    def __init__(
        self,
        members: Sequence[tuple[Tensor, int]],
        pinned: set[Tensor],
        like_grad: Collection[str] = (),
        masters: bool = False,
    ) -> None:
        first = members[0][0]
        self.device = first.device
        self.dtype = first.dtype.to_real()
        self.grad_dtype = gradient_dtype(first).to_real()
        self.masters = masters and self.dtype in (torch.bfloat16, torch.float16)
        self._like_grad = like_grad
        self.slots: list[Slot] = []
        self._parts: list[tuple[int, int]] = []  # of each, where it begins and ends
        start = 0
        for param, row in sorted(members, key=lambda member: member[0] in pinned):
            numel = param.numel() * (2 if param.is_complex() else 1)
            stride = param.stride() if is_dense(param) else contiguous_stride(param.shape)
            kind = param.dtype, param.shape, stride, gradient_dtype(param)
            stop = start + -(-numel // ALIGNMENT) * ALIGNMENT
            part = None if param in pinned else self._part_for(start, stop)
            self.slots.append(Slot(param, row, start, numel, part, *kind))
            start = stop
        self.size = start
        self.rows = sorted({slot.row for slot in self.slots})
        self.weights: list[Tensor] = []
        kept_in = torch.float32 if self.masters else self.dtype
        self.saved = torch.zeros(self.size, dtype=kept_in, device=self.device)
        self.kept: Tensor | None = None
        self.climb = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.states: dict[str, StateBuffer] = {}
        self.members: dict[str, StateBuffer] = {}
        self.cache: dict[Any, Any] = {}
        self.params = [slot.param for slot in self.slots]
        self._collector = Collector(self.slots)
        self._at_w = (False,) * len(self.slots)
        self.perturbed = self.held = self._at_w
        self._number = 0
        self._coming: tuple[int, tuple[bool, ...]] | None = None
        self._homes: list[int] = []

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of all arithmetic: float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_uniform(self) -> bool:
        """Whether all that belongs to the weights has their dtype."""
        return self.grad_dtype == self.dtype and not self.masters

    def state_dtype(self, name: str) -> torch.dtype:
        """The dtype of a state: float32 besides masters, else as torch.optim makes it."""
        if name in MEMBER_STATES:
            return self.compute_dtype
        if self.masters:
            return torch.float32
        return self.grad_dtype if name in self._like_grad else self.dtype

    def _part_for(self, start: int, stop: int) -> int:
        """The part that takes these elements in, the next of those that move."""
        if self._parts and stop - self._parts[-1][0] <= PART_ELEMENTS:
            self._parts[-1] = self._parts[-1][0], stop
        else:
            self._parts.append((start, stop))
        return len(self._parts) - 1

    def move_in(self) -> None:
        """Copy the weights into allocations of ours and make the parameters windows of them.

        One after the other: the memory where the weights were goes meanwhile.
        """
        for slot in self.slots:
            if slot.part is not None:
                if slot.part == len(self.weights):
                    begin, end = self._parts[slot.part]
                    self.weights.append(
                        torch.zeros(end - begin, dtype=self.dtype, device=self.device)
                    )
                window = slot.shaped(make_window(self.memory(slot)))
                window.copy_(slot.param.detach())
                slot.param.data = window
            if self.masters:
                slot.of(self.saved).copy_(self.memory(slot))
        self._homes = list(map(Tensor.data_ptr, self.params))

    def memory(self, slot: Slot, last: Slot | None = None) -> Tensor:
        """The weights of a slot in memory order, (numel,), real, wherever they are.

        Args:
            slot: the slot.
            last: a later one of the same part: then all weights up to its end, padding included.
        """
        if slot.part is None:
            return as_real(slot.param.detach()).as_strided((slot.numel,), (1,))
        last = last or slot
        begin = self._parts[slot.part][0]
        return self.weights[slot.part][slot.start - begin : last.start + last.numel - begin]

    def make_kept(self) -> Kept:
        """What is kept of the gradients at w; ``kept`` is allocated, unless it is there."""
        if self.kept is None:
            self.kept = self.saved.new_zeros(self.size, dtype=self.grad_dtype)
        return Kept(self.kept, self.held)

    def state(self, name: str) -> StateBuffer:
        """The buffer of one optimizer state, allocated when first asked for."""
        if name not in self.states:
            self.states[name] = StateBuffer(name, self)
        return self.states[name]

    def member(self, name: str) -> StateBuffer:
        """The buffer of what a member keeps, allocated when first asked for."""
        if name not in self.members:
            self.members[name] = StateBuffer(name, self, MEMBER_STATES[name])
        return self.members[name]

    def direction(self) -> Kept:
        """The direction that steps without a climb use again."""
        buffer = self.member(DIRECTION)
        return Kept(buffer.flat, tuple(buffer.present))

    def gradients(self) -> Gradients:
        """The gradients as the kernels need them; see ``Collector.collect``."""
        return self._collector.collect()

    # ------------------------------------------------------------------ which weights are away
    #
    # begin_... comes before an operation and end_... after it. If an exception comes between,
    # settle() finds out from the device how far the operation came.

    def begin_climb(self, number: int, grads: Gradients, keep: bool) -> Tensor | None:
        """A climb of the slots that have a gradient is about to be made under this number.

        Returns:
            Where it keeps the gradients, if it is to.
        """
        if keep:
            self.make_kept()
        away = grads.present  # the same object in each step, if that can be
        if self.perturbed is not self._at_w:
            away = tuple(map(operator.or_, self.perturbed, away))
        self._coming = number, away
        self.held = grads.present if keep else self._at_w
        return self.kept if keep else None

    def begin_return(self, but: tuple[bool, ...] | None = None) -> None:
        """The perturbed slots are about to return to w, but for some whose new w ``saved`` gets."""
        self._coming = 0, self._at_w if but is None else but

    def end(self) -> None:
        """The climb, the return or the update is made."""
        assert self._coming is not None
        (self._number, self.perturbed), self._coming = self._coming, None

    def forget_climb(self) -> None:
        """All slots are at w: what was begun has not happened."""
        self.perturbed, self._coming, self._number = self._at_w, None, 0

    def settle(self) -> bool:
        """After an exception: which slots does ``saved`` hold? Waits for the device, then only.

        Returns:
            Whether the last operation was made, as far as is known.
        """
        if self._coming is not None:
            number, _ = self._coming
            # After an update that left its w in `saved`, the number is 0 until the next climb, and
            # does not tell of a return: that is then made again, from the same w.
            if number != self._number and self.climb.item() == number:
                self.end()
            else:
                self._coming = None
                return False
        return True

    def is_in_place(self) -> bool:
        """Whether every perturbed parameter still is what it was, and where."""
        return all(
            [
                slot.is_like(slot.param) and slot.param.data_ptr() == home
                for slot, home, away in zip(self.slots, self._homes, self.perturbed, strict=True)
                if away
            ]
        )

    def restore_each(self) -> list[str]:
        """Copy w to where each perturbed parameter is now; returns what to say of the others."""
        lost = []
        for slot, away in zip(self.slots, self.perturbed, strict=True):
            if away and (why := slot.misfit()) is not None:
                lost.append(why)
            elif away:
                slot.param.detach().copy_(slot.shaped(slot.of(self.saved)))
        return lost

    def carry(self, saved: dict[Tensor, Tensor], kept: Mapping[Tensor, Tensor]) -> None:
        """Take over the saved weights of perturbed parameters, out of those of another bucket.

        And what is kept of gradients.
        """
        self.held = tuple([slot.param in kept for slot in self.slots])
        if any(self.held):
            self.make_kept()
            assert self.kept is not None
            for slot in itertools.compress(self.slots, self.held):
                slot.shaped(slot.of(self.kept)).copy_(kept[slot.param])
        perturbed = tuple([slot.param in saved for slot in self.slots])
        if any(perturbed):
            for slot in self.slots:
                if slot.param in saved:
                    slot.shaped(slot.of(self.saved)).copy_(saved.pop(slot.param))
            self.climb.fill_(_CARRIED)
            self._number, self.perturbed = _CARRIED, perturbed

    # ------------------------------------------------------------------------------------------

    def fresh(self, names: Iterable[str]) -> tuple[bool, ...]:
        """For each slot, whether one of these states is still as it began."""
        present = [self.state(name).present for name in names]
        if any([False in there for there in present]):
            return tuple([not all(there) for there in zip(*present, strict=True)])
        return self._at_w

    def clear_unshown(self) -> None:
        """What nobody has been shown of the states is as it began: zero, whatever is there."""
        for name, buffer in self.states.items():
            if name == MASTER:
                continue  # it began as the weight
            for window, there in zip(buffer.windows, buffer.present, strict=True):
                if not there:
                    window.zero_()

    def bump_versions(self, grads: Gradients | None = None) -> None:
        """Tell autograd which parameters were written through other tensors.

        Those are the perturbed ones and those that have a gradient.
        """
        if grads is not None and grads.complete:
            increment_version(self.params)
            return
        written = self.perturbed
        if grads is not None:
            written = tuple(map(operator.or_, written, grads.present))
        increment_version(list(itertools.compress(self.params, written)))
