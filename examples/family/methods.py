"""The methods: a line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM
from fused_sam.blends import GSAM, LookSAM
from fused_sam.schedule import From

MOMENTUM = 0.9
LATE = 0.75
"""The share of the steps after which late-phase SAM begins to climb."""

LOOK = 5
"""LookSAM climbs in every how many steps."""

Setting = Mapping[str, float]
"""``lr``, ``weight_decay``, and what else the method has tuned, by name."""

Options = Callable[[Setting, int], dict[str, Any]]
"""From the setting and the number of steps to what FusedSAM takes besides ``rho``."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: as the tables have it.
        options: FusedSAM's; None is plain SGD.
        tuned: values to try of the method's own settings, the likeliest first: a task takes as many
            as it has learning rates.
        epochs: how many times the task's epochs.
    """

    name: str
    options: Options | None = None
    tuned: Mapping[str, Sequence[float]] = field(default_factory=dict)
    epochs: int = 1


def _plain(setting: Setting, steps: int) -> dict[str, Any]:
    return {}


def _late(setting: Setting, steps: int) -> dict[str, Any]:
    return {"when": From(int(LATE * steps))}


RHO = {"rho": (0.2, 0.1, 0.5, 0.05, 1.0)}

METHODS = (
    Method("SGD"),
    Method("SAM", _plain, RHO),
    Method("SGD with twice the epochs", epochs=2),
    Method("MSAM", lambda s, n: {"ascent": MSAM()}, {"rho": (1.0, 0.3, 3.0, 0.1, 10.0)}),
    Method("late-phase SAM", _late, RHO),
    Method("ASAM", lambda s, n: {"adaptive": True}, {"rho": (1.0, 0.5, 2.0, 0.2, 5.0)}),
    Method(
        "GSAM",
        lambda s, n: {"blend": GSAM(s["alpha"])},
        {**RHO, "alpha": (0.1, 0.2, 0.4, 0.05, 0.6)},
    ),
    Method("LookSAM", lambda s, n: {"blend": LookSAM(LOOK)}, RHO),
)
"""In the order in which they run; the first is what all others are compared with."""


def make_optimizer(method: Method, setting: Setting, model: nn.Module, steps: int) -> Optimizer:
    """The method's optimizer on ``model``, for a training of ``steps`` steps."""
    base = {
        "lr": setting["lr"],
        "momentum": MOMENTUM,
        "weight_decay": setting["weight_decay"],
    }
    if method.options is None:
        return torch.optim.SGD(model.parameters(), **base)
    options = {"rho": setting["rho"], "model": model, **method.options(setting, steps)}
    return FusedSAM(model.parameters(), torch.optim.SGD, **options, **base)
