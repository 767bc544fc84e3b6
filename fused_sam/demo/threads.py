"""How many threads the demo computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in the block.

    The demo's batches are too small to share out: forward and backward of 64 images take a network
    of this size 3.0 ms on one thread and 2.8 ms on two. When the machine has other work to do, two
    threads wait for each other in each of the many small operations, and take far longer than one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
