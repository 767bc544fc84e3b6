"""What a CUDA graph reads and the host writes: hyperparameters, the climb's number, addresses.

While a ``Recording`` is active, whatever a step would upload is asked for by a function and lies in
one block of device memory, outside the graph's pool: what a graph allocates it writes over at each
replay. Before a replay the host asks the functions again, and one copy brings what has changed.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Values = Callable[[], Sequence[float]]
"""Tells what a table holds now."""

CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f", torch.float64: "d"}
"""What Python's arrays call the dtypes of tables."""

_ALIGNMENT = 16


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


def recording() -> Recording | None:
    """The recording that this thread's step belongs to; None outside of one."""
    return _local.recording


def followed(values: Values, dtype: torch.dtype) -> Sequence[float | Tensor]:
    """Numbers of the host's; in a recording, where a graph finds them: () each, on the device."""
    found = recording()
    return values() if found is None else found.table(values, dtype).unbind()


class Recording:
    """The tables of one graph.

    A step asks for them in the same order each time. It runs once and more before it is captured,
    and each of those runs tells how much memory it needs.

    Args:
        device: of all tables.
        climbs: whether the step climbs.

    Attributes:
        climbs: as above.
        skip: () float32. While it is not 0, an update only returns to w.
    """

    def __init__(self, device: torch.device, climbs: bool) -> None:
        self._device, self.climbs = device, climbs
        self._sizes: list[tuple[torch.dtype, int]] = []
        self._tables: list[Values] = []
        self._known: list[tuple[float, ...]] = []
        self._pieces: list[bytes] = []
        self._views: list[Tensor] = []
        self._block: Tensor | None = None
        self.skip = torch.ones((), dtype=torch.float32, device=device)

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """A step that runs, and whose tables are its own: it tells how many there are."""
        self._sizes = []
        with self._active():
            yield

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """The step that is captured.

        Raises:
            RuntimeError: it asks for other tables than the one that ran before.
        """
        with self._active():
            yield
        if len(self._tables) != len(self._sizes):
            _refuse()

    def table(self, values: Values, dtype: torch.dtype) -> Tensor:
        """A table, (n,), that holds what ``values`` tells whenever the graph runs."""
        now = tuple(values())
        if self._block is None:
            self._sizes.append((dtype, len(now)))
            return torch.tensor(now, dtype=dtype, device="cpu").to(self._device)
        i = len(self._tables)
        if i >= len(self._sizes) or self._sizes[i] != (dtype, len(now)):
            _refuse()
        self._tables.append(values)
        return self._views[i]

    def write(self) -> None:
        """Bring what the tables tell now to the device, if it has changed."""
        assert self._block is not None
        now = [tuple(values()) for values in self._tables]
        if now == self._known:
            return
        pieces = list(self._pieces)
        for i, (numbers, (dtype, _)) in enumerate(zip(now, self._sizes, strict=True)):
            if not self._known or numbers != self._known[i]:
                piece = array(CODES[dtype], numbers).tobytes()
                pieces[i] = piece + bytes(-len(piece) % _ALIGNMENT)
        self._known = []  # until it is sent: Ctrl-C may come between
        self._send(b"".join(pieces))
        self._pieces, self._known = pieces, now

    def _send(self, data: bytes) -> None:
        assert self._block is not None
        if not data:
            return
        # torch gives pinned memory out again only after the copies from it.
        staging = torch.frombuffer(bytearray(data), dtype=torch.uint8).pin_memory()
        self._block.copy_(staging, non_blocking=True)

    def lay_out(self) -> None:
        """Make the block, before the capture: in it a graph would fill it with zeros."""
        starts = [0]
        for dtype, count in self._sizes:
            size = count * dtype.itemsize
            starts.append(starts[-1] + size + -size % _ALIGNMENT)
        self._block = torch.zeros(starts[-1], dtype=torch.uint8, device=self._device)
        self._views = [
            self._block[start : start + count * dtype.itemsize].view(dtype)
            for start, (dtype, count) in zip(starts, self._sizes, strict=False)
        ]
        self._tables, self._known = [], []
        self._pieces = [b""] * len(self._sizes)

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        assert recording() is None
        _local.recording = self
        try:
            yield
        finally:
            _local.recording = None


def _refuse() -> None:
    raise RuntimeError(
        "the step that is captured is not like the one before it: a gradient is missing in one of "
        "them, or the model changes from step to step"
    )
