"""How many threads the demo computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in the block.

    A pass of the demo's network takes less than a millisecond; handing its small operations to a
    second thread costs more than it saves (measured: a fifth to a half more time).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
