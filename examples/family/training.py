"""One run: train, look at the validation images on the way, and at the test images at the end."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fused_sam import FusedSAM
from fused_sam.demo.data import Digits as Parts
from fused_sam.demo.data import Labelled, flip_labels, shuffled_batches
from fused_sam.demo.landscape import (
    LossSurface,
    filter_normalised_direction,
    loss_along,
    sharpness,
)

from .data import subset
from .methods import make_optimizer
from .plan import Run
from .tasks import BATCH_SIZE

LOOKS = 25
"""How often a run that is reported looks at the validation images; one that tunes looks once."""
RADIUS = 0.2
"""Of the ball in which the loss is climbed."""
DIRECTIONS, DISTANCE = 5, 0.5
"""Random filter-normalised directions, and how far to go along them."""
SHARPNESS_IMAGES = 250
_CHUNK = 1000


def train(run: Run, parts: Parts, device: torch.device) -> dict[str, Any]:
    """Train, and return what a row says of the result.

    Accuracies are in 0..1, losses mean cross-entropies in nats, None if not finite. The best epoch
    is that with the highest validation accuracy of the epochs looked at.
    """
    task, seed = run.task, run.seed
    train_set = flip_labels(subset(parts.train, task.images, seed), run.noise, seed)
    train_set, validation = _there(train_set, device), _there(parts.validation, device)
    network = task.make_network(seed).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(run.method, run.setting, network, task.steps(run.method))
    epochs = task.epochs * run.method.epochs
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    generator = torch.Generator().manual_seed(seed)
    every = max(1, epochs // LOOKS) if run.test else epochs  # tuning goes by the last epoch
    watch, passes = _Stopwatch(device), 0
    curve: list[tuple[int, dict[str, float | None]]] = []
    best, best_weights = -1.0, None

    for epoch in range(1, epochs + 1):
        network.train()
        with watch:
            for images, labels in shuffled_batches(train_set, BATCH_SIZE, generator):
                passes += _step(network, optimizer, images, labels)
        scheduler.step()
        if epoch % every == 0 or epoch == epochs:
            _to_w(optimizer)
            curve.append((epoch, measure(network, validation)))
            found = curve[-1][1]["accuracy"]
            if run.test and found is not None and found > best:
                best, best_weights = found, copy.deepcopy(network.state_dict())
            if epoch < epochs and isinstance(optimizer, FusedSAM):
                optimizer.train()

    best_epoch, at_best = max(curve, key=lambda point: (point[1]["accuracy"], -point[0]))
    row: dict[str, Any] = {
        "validation": {"best": at_best, "last": curve[-1][1]},
        "best_epoch": best_epoch,
        "curve": [(e, found["accuracy"]) for e, found in curve],
        "passes": passes,
        "cpu_seconds": round(watch.cpu, 3),
        "wall_seconds": round(watch.wall, 3),
    }
    if run.test:
        test = _there(parts.test, device)
        row["train"] = measure(network, train_set)
        row.update(flatness(network, train_set, seed))
        last = measure(network, test)
        assert best_weights is not None
        network.load_state_dict(best_weights)
        row["test"] = {"best": measure(network, test), "last": last}
    return row


def _step(network: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> int:
    """One step; returns how many passes it took."""
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return passes


def _to_w(optimizer: Optimizer) -> None:
    if isinstance(optimizer, FusedSAM):
        optimizer.eval()


@torch.no_grad()
def measure(network: nn.Module, data: Labelled) -> dict[str, float | None]:
    """Accuracy and loss, in evaluation mode."""
    network.eval()
    chunks = [network(images) for images in data.images.split(_CHUNK)]
    outputs = torch.cat(chunks).double()
    right = (outputs.argmax(dim=1) == data.labels).double().mean()
    return {"accuracy": _number(right), "loss": _number(F.cross_entropy(outputs, data.labels))}


def flatness(network: nn.Module, data: Labelled, seed: int) -> dict[str, float | None]:
    """How the loss of the training images, with the labels trained on, rises around the weights.

    Returns:
        ``sharpness``: the largest rise found by climbing in a ball of ``RADIUS``. ``rise``: the
        mean rise at ``DISTANCE`` along random directions that are as long as the filters.
    """
    # BatchNorm normalises by these images: with all of them the graph of a pass would be large.
    some = Labelled(data.images[:SHARPNESS_IMAGES], data.labels[:SHARPNESS_IMAGES])
    surface = LossSurface(network, some)
    generator = torch.Generator().manual_seed(seed)
    rises = []
    for _ in range(DIRECTIONS):
        direction = filter_normalised_direction(surface.weights, generator)
        here, there = loss_along(surface, direction, [0.0, DISTANCE])
        rises.append(there - here)
    return {
        "sharpness": _number(sharpness(surface, RADIUS, seed)),
        "rise": _number(sum(rises) / DIRECTIONS),
    }


def _number(value: float | Tensor) -> float | None:
    value = float(value)
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _there(data: Labelled, device: torch.device) -> Labelled:
    moved = data.to(device)
    return Labelled(moved.images.contiguous(memory_format=torch.channels_last), moved.labels)


class _Stopwatch:
    """Adds up the time of its blocks: by the clock, and of this process on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.wall = self.cpu = 0.0
        self._device = device

    def _now(self) -> tuple[float, float]:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._now()
        self.wall += wall - self._start[0]
        self.cpu += cpu - self._start[1]
