"""A CUDA graph of one step: warm-up, capture, and the random numbers of its two passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_WARM_UPS = 3
"""Steps before the capture, as ``torch.cuda.make_graphed_callables`` has them."""


class DeviceGraph:
    """One graph on one device.

    Its passes draw from two states of the generator, which are its own. A replay sets both to where
    the generator is, so both passes draw the same; the generator goes on by the first pass. While a
    graph is captured, the generator's own state is put aside: torch 2.11 does not let a state out
    of a capture that has failed.

    Args:
        device: with its index.
        other: a graph whose replays never run at the same time, or None. The two share their
            memory, for which torch wants one stream.
    """

    def __init__(self, device: torch.device, other: DeviceGraph | None = None) -> None:
        self._pool = None if other is None else other._graph.pool()
        stream = torch.cuda.Stream(device) if other is None else other._stream
        self._stream: torch.cuda.Stream = stream
        self._graph: Any = torch.cuda.CUDAGraph()
        self._generator = torch.cuda.default_generators[torch.cuda.current_device()]
        self._first, self._second = [self._generator.clone_state() for _ in range(2)]
        if torch.__version__ < "2.14":  # which does it by itself, and warns of who does
            for state in (self._first, self._second):
                self._graph.register_generator_state(state)

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a few times, on the stream of the capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
        finally:  # who puts things back after an exception must not come before what has run
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> None:
        """Capture; nothing runs."""
        # Threads of others, such as one that pins batches, may allocate meanwhile.
        capture = torch.cuda.graph(
            self._graph, self._pool, self._stream, capture_error_mode="thread_local"
        )
        # Where a capture fails, torch stays on its stream.
        back = torch.cuda.stream(torch.cuda.current_stream())
        with self._drawing_from(self._first), back, capture:
            run()

    def second_pass(self) -> contextlib.AbstractContextManager[None]:
        """A part of what is captured that draws the numbers that came before it in the graph."""
        return self._drawing_from(self._second)

    @contextlib.contextmanager
    def _drawing_from(self, state: torch.Generator) -> Iterator[None]:
        before = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(state)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(before)

    def replay(self) -> None:
        """Run on the current stream."""
        now = self._generator.get_state()
        for state in (self._first, self._second):
            state.set_state(now)
        self._graph.replay()
        self._generator.set_state(self._first.get_state())
