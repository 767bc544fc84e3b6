"""The picture that the demo writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Colours of Okabe and Ito, told apart by colour-blind readers too. What is hidden below another
# curve is drawn wider, so that both are seen where they coincide.
STYLES: dict[str, dict[str, Any]] = {
    "SGD": {"color": "#D55E00", "linewidth": 1.8},
    "textbook SAM": {"color": "#56B4E9", "linewidth": 5.0, "alpha": 0.6},
    "FusedSAM": {"color": "#0072B2", "linewidth": 1.8, "linestyle": "--"},
}

Curves = Mapping[str, Sequence[Sequence[float]]]
"""For each method's name, curves over the same abscissae."""


def save_figure(
    path: Path, accuracy: Curves, loss: Curves, distances: Sequence[float], noise: float
) -> None:
    """Write a PNG of two panels.

    Args:
        path: where to.
        accuracy: test accuracy after each epoch, in 0..1, a curve for each seed.
        loss: training loss along random directions, a curve for each seed and direction.
        distances: the abscissae of ``loss``.
        noise: the share of flipped labels in what is shown.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, accuracy)
    _draw_loss(right, loss, distances)
    figure.suptitle(
        f"Handwritten digits, {noise:.0%} of the training labels flipped "
        "(line: mean, band: ± standard deviation)"
    )
    figure.savefig(path, dpi=150, format="png")


def _draw_accuracy(axes: Axes, curves: Curves) -> None:
    for name, runs in curves.items():
        percent = 100 * np.array(runs)
        _band(axes, range(1, percent.shape[1] + 1), percent, name)
    axes.set(
        title="Test accuracy",
        xlabel="epoch",
        ylabel="test accuracy [%]",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def _draw_loss(axes: Axes, curves: Curves, distances: Sequence[float]) -> None:
    for name, profiles in curves.items():
        _band(axes, distances, np.array(profiles), name)
    axes.set(
        title="Training loss around the minima",
        xlabel="distance along a random filter-normalised direction [filter norms]",
        ylabel="training loss [nats]",
    )
    _finish(axes)


def _band(axes: Axes, x: Sequence[float], curves: np.ndarray, name: str) -> None:
    style = STYLES[name]
    mean, deviation = curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(curves) - 1))
    axes.plot(x, mean, label=name, **style)
    axes.fill_between(
        x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0
    )


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
