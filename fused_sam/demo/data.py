"""The demo's data: 1797 handwritten digits of 8x8 pixels, which scikit-learn brings along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
VALIDATION_SIZE = 300
TEST_SIZE = 600


@dataclass(frozen=True)
class Labelled:
    """Images with their labels.

    Attributes:
        images: (n, 1, 8, 8), floating point.
        labels: (n,), int64, in 0..9.
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Labelled:
        """The same on ``device``, images in ``dtype``."""
        return Labelled(self.images.to(device, dtype), self.labels.to(device))


@dataclass(frozen=True)
class Digits:
    """The three parts: to learn from, to choose settings by, and to report once."""

    train: Labelled
    validation: Labelled
    test: Labelled

    def to(self, device: torch.device) -> Digits:
        """The same on ``device``."""
        return Digits(*(part.to(device) for part in (self.train, self.validation, self.test)))


def load_digits() -> Digits:
    """Split into 897 training, 300 validation and 600 test images, always the same ones.

    Pixels are shifted and scaled to mean 0 and standard deviation 1 over the training part.
    """
    bunch = sklearn_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32, device="cpu").unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64, device="cpu")
    rest, test = train_test_split(
        range(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=0
    )
    train, validation = train_test_split(
        rest, test_size=VALIDATION_SIZE, stratify=labels[rest], random_state=0
    )
    images = (images - images[train].mean()) / images[train].std()
    return Digits(*(Labelled(images[part], labels[part]) for part in (train, validation, test)))


def flip_labels(data: Labelled, fraction: float, seed: int) -> Labelled:
    """Give ``fraction`` of the images a wrong label, each of the nine wrong ones equally likely."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same labels for all devices
    flipped = round(fraction * len(data.labels))
    where = torch.randperm(len(data.labels), generator=generator, device="cpu")[:flipped]
    shift = torch.randint(1, CLASSES, (flipped,), generator=generator, device="cpu")
    labels = data.labels.clone()
    labels[where] = (labels[where] + shift.to(labels.device)) % CLASSES
    return Labelled(data.images, labels)


def shuffled_batches(
    data: Labelled, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images, labels), the images in an order drawn from ``generator`` (on the CPU).

    The rest that fills no batch is left out: here it is one image, too few for BatchNorm.
    """
    order = torch.randperm(len(data.labels), generator=generator, device="cpu")
    order = order.to(data.labels.device)
    for start in range(0, len(order) - size + 1, size):
        index = order[start : start + size]
        yield data.images[index], data.labels[index]
