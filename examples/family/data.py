"""Digits and CIFAR-10, each in images to learn from, to choose settings by, and to report once."""

from __future__ import annotations

from pathlib import Path

import torch

from fused_sam.demo.data import Digits as Parts
from fused_sam.demo.data import Labelled, load_digits

VALIDATION = 2000
"""Images of CIFAR-10's fifth batch to choose settings by. The other 8,000 are the test images."""

_PIXELS = 3 * 32 * 32
_RECORDS = 10_000


def digits(most: int = 1000) -> Parts:
    """The demo's split, but that its training part is filled up to ``most`` from its test part."""
    found = load_digits()
    spare = most - len(found.train.labels)
    return Parts(
        _joined(found.train, _cut(found.test, stop=spare)),
        found.validation,
        _cut(found.test, start=spare),
    )


def cifar10(folder: Path) -> Parts:
    """CIFAR-10 from ``data_batch_1.bin`` to ``data_batch_5.bin`` ("binary version").

    The first four batches are the training part. The fifth is split into validation and test
    images; the original test set is not used. Channels have mean 0 and standard deviation 1 over
    the training part.

    Raises:
        ValueError: a file is not there, or is something else; the message names it.
    """
    batches = [_batch(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    train = batches[0]
    for batch in batches[1:4]:
        train = _joined(train, batch)
    mean = train.images.mean((0, 2, 3), keepdim=True)
    deviation = train.images.std((0, 2, 3), keepdim=True)
    parts = train, _cut(batches[4], stop=VALIDATION), _cut(batches[4], start=VALIDATION)
    return Parts(*(Labelled((p.images - mean) / deviation, p.labels) for p in parts))


def subset(data: Labelled, size: int, seed: int) -> Labelled:
    """``size`` images, drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels), generator=generator)[:size]
    return Labelled(data.images[order], data.labels[order])


def _batch(path: Path) -> Labelled:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): --cifar takes the folder that "
            "cifar-10-binary.tar.gz unpacks to, with data_batch_1.bin to data_batch_5.bin"
        ) from error
    if len(raw) != _RECORDS * (1 + _PIXELS):
        raise ValueError(f"{path} has {len(raw)} bytes; a batch of CIFAR-10 has 30730000")
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(_RECORDS, 1 + _PIXELS)
    images = records[:, 1:].reshape(-1, 3, 32, 32).to(torch.float32) / 255
    return Labelled(images, records[:, 0].to(torch.int64))


def _joined(one: Labelled, other: Labelled) -> Labelled:
    return Labelled(torch.cat([one.images, other.images]), torch.cat([one.labels, other.labels]))


def _cut(data: Labelled, start: int = 0, stop: int | None = None) -> Labelled:
    return Labelled(data.images[start:stop], data.labels[start:stop])
