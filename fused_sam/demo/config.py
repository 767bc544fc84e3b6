"""What can be chosen on the command line, and what is taken otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

EPOCHS = 30
SEEDS = 5
NOISE = (0.0, 0.4)
RHO = 0.2


@dataclass(frozen=True)
class Config:
    """The command line's options.

    Attributes:
        epochs: for each network.
        seeds: 0, 1, ... below this number are used.
        noise: shares of flipped training labels, in 0..1.
        rho: SAM's radius, and the radius within which sharpness is measured.
        output: the picture to write.
        device: where to train.
    """

    epochs: int
    seeds: int
    noise: Sequence[float]
    rho: float
    output: Path
    device: torch.device
