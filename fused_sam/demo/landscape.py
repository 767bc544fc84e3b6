"""How sharp a minimum is: the training loss around a trained network's weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fused_sam.batchnorm import frozen_running_stats

from .data import Labelled

STARTS = 2
ASCENT_STEPS = 10
STEP_LENGTH = 0.3
"""In units of the ball's radius."""

Offset = dict[str, Tensor]
"""What is added to the weights: a tensor for each parameter, by the parameter's name."""


class LossSurface:
    """The training loss as a function of the weights, around those of a trained network.

    It is the mean cross-entropy over ``data``, all at once. BatchNorm normalises with the
    statistics of ``data`` at the weights at hand: its running averages belong to the network's own
    weights, and would be wrong for every other point of the surface.

    Attributes:
        weights: the trained ones, by the parameters' names.
    """

    def __init__(self, model: nn.Module, data: Labelled) -> None:
        self.weights: Offset = {name: p.detach() for name, p in model.named_parameters()}
        self._model = copy.deepcopy(model).train()
        self._data = data

    def __call__(self, offset: Offset) -> Tensor:
        """The loss with ``offset`` added to the weights, ()."""
        weights = {name: w + offset[name] for name, w in self.weights.items()}
        with frozen_running_stats(self._model):
            outputs = functional_call(self._model, weights, (self._data.images,))
        return F.cross_entropy(outputs, self._data.labels)


def sharpness(surface: LossSurface, radius: float, seed: int) -> float:
    """The largest rise of the loss found in the ball ||offset||_2 <= radius around the weights.

    Projected gradient ascent from ``STARTS`` points of the sphere, the first one up the gradient
    and the others random: ``ASCENT_STEPS`` steps of ``STEP_LENGTH`` radii along the normalised
    gradient, each followed by the projection onto the ball. The result is the largest loss met
    less the loss at the weights: a lower bound of the true maximum.

    A radius means more to smaller weights, and more weight decay makes them smaller; for a measure
    that does without the weights' size see :func:`filter_normalised_direction`.
    """
    generator = torch.Generator().manual_seed(seed)
    slope = grad_and_value(surface)
    gradient, loss = slope({name: torch.zeros_like(w) for name, w in surface.weights.items()})
    highest = loss
    for start in range(STARTS):
        direction = gradient if start == 0 else _random_like(surface.weights, generator)
        offset = _scaled(direction, radius)
        for _ in range(ASCENT_STEPS):
            uphill, height = slope(offset)
            highest = torch.maximum(highest, height)
            step = _scaled(uphill, STEP_LENGTH * radius)
            offset = _projected({name: t + step[name] for name, t in offset.items()}, radius)
        highest = torch.maximum(highest, surface(offset))
    return float(highest - loss)


def filter_normalised_direction(weights: Offset, generator: torch.Generator) -> Offset:
    """A random direction in which every filter is as long as the network's (arXiv 1712.09913).

    A filter is all that leads to one output: ``weight[i]``. Without this a network with small
    weights would look sharper than the same function with larger ones. Biases and BatchNorm's
    parameters stay as they are, as in the paper.
    """
    direction = _random_like(weights, generator)
    for name, weight in weights.items():
        if weight.dim() < 2:
            direction[name].zero_()
        else:
            direction[name] *= _filter_norms(weight) / _filter_norms(direction[name])
    return direction


@torch.no_grad()
def loss_along(surface: LossSurface, direction: Offset, distances: Sequence[float]) -> list[float]:
    """The loss at each distance along ``direction``, in units of its length."""
    return [
        float(surface({name: distance * d for name, d in direction.items()}))
        for distance in distances
    ]


def _filter_norms(weight: Tensor) -> Tensor:
    dims = tuple(range(1, weight.dim()))
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    return norms


def _random_like(tensors: Offset, generator: torch.Generator) -> Offset:
    # Drawn on the CPU: the same numbers for every device.
    return {
        name: torch.randn(t.shape, generator=generator, device="cpu").to(t.device, t.dtype)
        for name, t in tensors.items()
    }


def _norm(offset: Offset) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in offset.values()))


def _scaled(offset: Offset, length: float) -> Offset:
    factor = length / max(_norm(offset), torch.finfo(torch.float32).tiny)
    return {name: factor * t for name, t in offset.items()}


def _projected(offset: Offset, radius: float) -> Offset:
    return offset if _norm(offset) <= radius else _scaled(offset, radius)
