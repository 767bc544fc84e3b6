"""The network, the three ways to train it, and the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fused_sam import FusedSAM
from fused_sam.batchnorm import frozen_running_stats

from .data import CLASSES, Labelled, shuffled_batches
from .textbook import TextbookSAM

BATCH_SIZE = 64
MOMENTUM = 0.9


@dataclass(frozen=True)
class Setting:
    """The hyperparameters that were tuned; ``rho`` is None for plain SGD."""

    lr: float
    weight_decay: float
    rho: float | None = None


@dataclass(frozen=True)
class Method:
    """One way to train: its name, its optimizer, and its hyperparameters."""

    name: str
    optimizer: type[Optimizer]
    setting: Setting


@dataclass(frozen=True)
class Run:
    """A trained network, what it was trained on, and its accuracy in 0..1 after each epoch."""

    model: nn.Module
    train_set: Labelled
    accuracy: list[float]


def make_model(seed: int) -> nn.Module:
    """A convolutional network of 26 thousand weights: 8x8 pixels, then 8x8, 4x4, 2x2, classes."""
    torch.manual_seed(seed)
    with torch.device("cpu"):  # the same first weights for every device
        return nn.Sequential(
            *_convolution(1, 16),
            *_convolution(16, 32, stride=2),
            *_convolution(32, 64, stride=2),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, CLASSES),
        )


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def make_optimizer(method: Method, model: nn.Module) -> Optimizer:
    """The method's optimizer on ``model``'s parameters."""
    setting = method.setting
    options: dict[str, Any] = {
        "lr": setting.lr,
        "momentum": MOMENTUM,
        "weight_decay": setting.weight_decay,
    }
    if issubclass(method.optimizer, (FusedSAM, TextbookSAM)):
        assert setting.rho is not None
        return method.optimizer(model.parameters(), torch.optim.SGD, rho=setting.rho, **options)
    return torch.optim.SGD(model.parameters(), **options)


def sgd_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step of plain SGD."""
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def sam_step(
    model: nn.Module, optimizer: FusedSAM | TextbookSAM, images: Tensor, labels: Tensor
) -> None:
    """One step of SAM: the same batch twice, at the weights and at the climbed-to weights."""
    F.cross_entropy(model(images), labels).backward()
    optimizer.first_step(zero_grad=True)
    with frozen_running_stats(model):  # BatchNorm's averages are to be those of the weights
        F.cross_entropy(model(images), labels).backward()
    optimizer.second_step(zero_grad=True)


def train(
    method: Method,
    train_set: Labelled,
    eval_set: Labelled,
    *,
    epochs: int,
    seed: int,
    after_epoch: Callable[[], object] = lambda: None,
) -> Run:
    """Train with a cosine schedule; ``seed`` fixes the first weights and the batches' order."""
    model = make_model(seed).to(train_set.images.device)
    optimizer = make_optimizer(method, model)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(epochs):
        model.train()
        for images, labels in shuffled_batches(train_set, BATCH_SIZE, generator):
            if isinstance(optimizer, (FusedSAM, TextbookSAM)):
                sam_step(model, optimizer, images, labels)
            else:
                sgd_step(model, optimizer, images, labels)
        scheduler.step()
        history.append(accuracy(model, eval_set))
        after_epoch()
    return Run(model, train_set, history)


@torch.no_grad()
def accuracy(model: nn.Module, data: Labelled) -> float:
    """Share of the images whose most likely class is their label; leaves the model in eval mode."""
    model.eval()
    return float((model(data.images).argmax(dim=1) == data.labels).float().mean())
