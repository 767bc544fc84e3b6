"""What the optimizers cost, and whether two of them do the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fused_sam import FusedSAM

from .data import Labelled, shuffled_batches
from .textbook import TextbookSAM
from .training import BATCH_SIZE, Method, make_model, make_optimizer, sam_step


class Stopwatch:
    """Adds up the time of the calls made through it.

    Attributes:
        seconds: the sum.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def time(self, call: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Call, and wait for a device that works on its own."""
        self._synchronize()
        start = time.perf_counter()
        call(*args, **kwargs)
        self._synchronize()
        self.seconds += time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def optimizer_times(
    methods: Sequence[Method], data: Labelled, *, steps: int, warm_up: int = 10
) -> list[float]:
    """Median seconds per step that each method's optimizer takes, forward and backward left out.

    It is the time of the calls that a training loop makes to the optimizer, with the gradients
    set to None. The methods take their steps in turn, so that whatever else the machine does
    meets all of them alike.
    """
    models = [make_model(0).to(data.images.device) for _ in methods]
    optimizers = [make_optimizer(*pair) for pair in zip(methods, models, strict=True)]
    times: list[list[float]] = [[] for _ in methods]
    for images, labels in islice(_endless_batches(data, seed=0), warm_up + steps):
        for model, optimizer, found in zip(models, optimizers, times, strict=True):
            found.append(_timed_step(model, optimizer, images, labels))
    return [statistics.median(found[warm_up:]) for found in times]


def _timed_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> float:
    watch = Stopwatch(images.device)
    F.cross_entropy(model(images), labels).backward()
    if isinstance(optimizer, (FusedSAM, TextbookSAM)):
        watch.time(optimizer.first_step, zero_grad=True)
        F.cross_entropy(model(images), labels).backward()
        watch.time(optimizer.second_step, zero_grad=True)
    else:
        watch.time(optimizer.step)
        watch.time(optimizer.zero_grad)
    return watch.seconds


def trajectory_differences(
    methods: tuple[Method, Method],
    data: Labelled,
    *,
    epochs: int,
    seed: int,
    after_epoch: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train with two methods of SAM side by side; after each step, how far apart they are.

    Returns:
        For each step the largest difference between corresponding weights of the two networks.
    """
    models = [make_model(seed).to(data.images) for _ in methods]
    optimizers = [make_optimizer(*pair) for pair in zip(methods, models, strict=True)]
    schedulers = [CosineAnnealingLR(optimizer, T_max=epochs) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    differences = []
    for _ in range(epochs):
        for images, labels in shuffled_batches(data, BATCH_SIZE, generator):
            for model, optimizer in zip(models, optimizers, strict=True):
                assert isinstance(optimizer, (FusedSAM, TextbookSAM))
                sam_step(model, optimizer, images, labels)
            differences.append(_largest_difference(*models))
        for scheduler in schedulers:
            scheduler.step()
        after_epoch()
    return differences


@torch.no_grad()
def _largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def _endless_batches(data: Labelled, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    epochs = (shuffled_batches(data, BATCH_SIZE, generator) for _ in repeat(None))
    return chain.from_iterable(epochs)
