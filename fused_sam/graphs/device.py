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

    The generator has a second state, which the second pass draws from. Before a replay it is set to
    where the first begins, so both passes draw the same; the generator goes on by one pass.

    Args:
        device: with its index.
        pool: of another graph, whose replays never run at the same time; None for a new one.
    """

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self._device, self._pool = device, pool
        self._stream = torch.cuda.Stream(device)
        self._graph: Any = torch.cuda.CUDAGraph()
        self._generator = torch.cuda.default_generators[torch.cuda.current_device()]
        self._first = self._generator.graphsafe_get_state()
        self._second = self._generator.clone_state()
        for state in (self._first, self._second):
            self._graph.register_generator_state(state)

    @property
    def pool(self) -> Any:
        """The memory that the graph works in."""
        return self._graph.pool()

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a few times, on the stream of the capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> None:
        """Capture; nothing runs."""
        with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream):
            run()

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """A part of what is captured that draws the numbers that came before it in the graph."""
        self._generator.graphsafe_set_state(self._second)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(self._first)

    def replay(self) -> None:
        """Run on the current stream."""
        self._second.set_state(self._first.get_state())
        self._graph.replay()
