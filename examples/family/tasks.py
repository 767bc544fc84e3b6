"""What is learnt: the data, the network, how long, and the settings that are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.models import small_image_resnet
from fused_sam.demo.data import Digits as Parts
from fused_sam.demo.training import make_model

from .data import cifar10, digits
from .methods import Method

BATCH_SIZE = 50
NOISE = (0.4, 0.0)

TUNING_SEED = 100
"""The seed of tuning. Its second round has the next one; runs that are reported have 0, 1, ..."""


@dataclass(frozen=True)
class Task:
    """One training set with its network.

    Attributes:
        name: as ``--tasks`` takes it.
        images: how many are drawn from the training part, by the run's seed.
        network: makes the untrained network.
        epochs: of a method that is given no more.
        lrs, decays: as many of each: learning rates and weight decays to try.
        finalists: settings that are tried a second time.
        seeds: runs of each method with what tuning has found.
        cifar, cuda: whether it needs the files of CIFAR-10, and whether it is made for a GPU.
    """

    name: str
    images: int
    network: Callable[[], nn.Module]
    epochs: int
    lrs: Sequence[float]
    decays: Sequence[float]
    finalists: int
    seeds: int
    cifar: bool = False
    cuda: bool = False

    def load(self, cifar: Path | None) -> Parts:
        """The data."""
        if not self.cifar:
            return digits()
        assert cifar is not None
        return cifar10(cifar)

    def make_network(self, seed: int) -> nn.Module:
        """The network with the first weights of ``seed``, the same ones for every device."""
        torch.manual_seed(seed)
        return self.network()

    def steps(self, method: Method) -> int:
        """How many steps a method takes."""
        return self.images // BATCH_SIZE * self.epochs * method.epochs

    def trials(self, method: Method) -> Iterator[dict[str, float]]:
        """The settings that a method is tuned over, as many for each method.

        Each pair of learning rate and weight decay is tried once. The values of a method's own
        settings lie on the square of these pairs as in a Latin square: each value meets each
        learning rate once, and each weight decay once; of two own settings each pair is tried once.
        """
        for i, lr in enumerate(self.lrs):
            for j, decay in enumerate(self.decays):
                own = zip(method.tuned.items(), _latin(i, j, len(self.lrs)), strict=False)
                values = {name: choices[at] for (name, choices), at in own}
                yield {"lr": lr, "weight_decay": decay, **values}


def _latin(i: int, j: int, order: int) -> tuple[int, int]:
    """The entries at (i, j) of two orthogonal Latin squares, whose order is odd."""
    return (i + j) % order, (i + 2 * j) % order


def _digits_network() -> nn.Module:
    return make_model(int(torch.initial_seed()))


_FINE_GRID = (0.0005, 0.002, 0.01, 0.05, 0.2), (5e-4, 5e-3, 5e-2, 2e-1, 5e-1)
_COARSE_GRID = (0.002, 0.02, 0.2), (1e-3, 1e-2, 1e-1)


def _resnet8() -> nn.Module:
    return small_image_resnet((16, 32, 64), 1, stride=2)


def _resnet18() -> nn.Module:
    return small_image_resnet((64, 128, 256, 512), 2)


_CIFAR_GRID = (0.03, 0.1, 0.3), (5e-4, 2e-3, 1e-2)

TASKS = (
    Task("digits-300", 300, _digits_network, 40, *_FINE_GRID, 5, 10),
    Task("digits-100", 100, _digits_network, 60, *_FINE_GRID, 5, 10),
    Task("cifar-1000", 1000, _resnet8, 50, *_CIFAR_GRID, 3, 3, cifar=True),
    Task("digits-1000", 1000, _digits_network, 20, *_COARSE_GRID, 3, 10),
    Task("cifar-40000", 40_000, _resnet18, 100, *_CIFAR_GRID, 3, 3, cifar=True, cuda=True),
)
"""In the order in which they run."""
