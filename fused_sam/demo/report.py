"""What the demo prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .config import Config
from .data import TEST_SIZE, VALIDATION_SIZE
from .landscape import ASCENT_STEPS, STARTS
from .training import Method

GAP = "  "
ROUNDING = 1e-9
"""Largest difference of two float64 trajectories that rounding, amplified, explains."""


@dataclass(frozen=True)
class Row:
    """One method's line of the table.

    Attributes:
        name: the method's name.
        accuracy: for each share of flipped labels, the test accuracy of each seed, in 0..1.
        sharpness: for each share of flipped labels, that of each seed.
        seconds: the optimizer's time per step.
    """

    name: str
    accuracy: list[list[float]]
    sharpness: list[list[float]]
    seconds: float


def announcement(config: Config, methods: Sequence[Method]) -> str:
    """What is about to be done, with which settings."""
    networks = len(methods) * len(config.noise) * config.seeds
    lines = [
        f"Training {networks} small convolutional networks to read handwritten digits (methods: "
        f"{len(methods)},",
        f"shares of flipped labels: {len(config.noise)}, seeds: {config.seeds}, "
        f"epochs: {config.epochs}) on {config.device}.",
        f"Settings, chosen on {VALIDATION_SIZE} validation images:",
    ]
    for method in methods:
        setting = method.setting
        rho = "" if setting.rho is None else f", rho {setting.rho}"
        lines.append(
            f"  {method.name:13} lr {setting.lr}, weight decay {setting.weight_decay}{rho}"
        )
    return "\n".join(lines)


def table(noise: Sequence[float], rows: Sequence[Row]) -> str:
    """The table as text: a column for each quantity and share of flipped labels."""
    shares = [f"{share:.0%} flipped" for share in noise]
    lines = [
        ["", *["accuracy [%]" for _ in noise], *["sharpness" for _ in noise], "optimizer"],
        ["", *shares, *shares, "[µs/step]"],
        *(_cells(row) for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_aligned(cells, widths) for cells in lines]
    text.insert(2, "-" * len(text[0]))
    return "\n".join(text)


def legend(config: Config, timed_steps: int) -> str:
    """What the table's columns are."""
    return f"""\
accuracy   share of {TEST_SIZE} test images read rightly after the last epoch,
           mean ± standard deviation over the seeds
sharpness  largest rise of the training loss [nats] found within an L2 distance of {config.rho}
           of the weights, by projected gradient ascent ({STARTS} starts, {ASCENT_STEPS} steps each)
optimizer  time of the optimizer's calls per step, without forward and backward; median of
           {timed_steps} steps that the methods took in turn. So small a network costs what Python
           costs: this tells nothing about large ones"""


def trajectory(differences: Mapping[torch.dtype, Sequence[float]], noise: float) -> str:
    """How far FusedSAM's weights were from the textbook's on the way."""
    double, single = differences[torch.float64], differences[torch.float32]
    verdict = "equals" if max(double) < ROUNDING else "DIFFERS FROM"
    return f"""\
FusedSAM's trajectory {verdict} the textbook's. Trained side by side with seed 0 and {noise:.0%}
of the labels flipped, their weights differ by at most
  {max(double):.0e} in float64, over all {len(double)} steps;
  {single[0]:.0e} in float32 after the first step, and {max(single):.0e} over all steps, as training
        amplifies the differences of rounding."""


def mean_std(values: Sequence[float], digits: int) -> str:
    """The mean ± the standard deviation, or the mean alone where there is one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        *(mean_std([100 * share for share in seeds], 1) for seeds in row.accuracy),
        *(mean_std(seeds, 2) for seeds in row.sharpness),
        f"{1e6 * row.seconds:.0f}",
    ]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = widths
    first, *rest = cells
    return GAP.join(
        [first.ljust(name), *(cell.rjust(width) for cell, width in zip(rest, numbers, strict=True))]
    )
