"""The whole demo: train, measure, print, draw."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from . import report
from .comparison import optimizer_times, trajectory_differences
from .config import Config
from .data import Digits, flip_labels, load_digits
from .figure import save_figure
from .landscape import LossSurface, filter_normalised_direction, loss_along, sharpness
from .methods import make_methods
from .progress import progress
from .threads import one_thread
from .training import Method, Run, train

TIMED_STEPS = 300
DIRECTIONS = 5
DISTANCES = [i / 10 for i in range(-10, 11)]

Runs = Mapping[tuple[float, str], Sequence[Run]]
"""For each share of flipped labels and each method's name, a run for each seed."""


def run(config: Config) -> None:
    """Train every network, print the table, write the picture."""
    # Without the flag cuDNN's gradients differ from run to run, and so would the trajectories.
    with one_thread(), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        digits = load_digits().to(config.device)
        sgd, textbook, fused = methods = make_methods(config.rho)
        noisiest = max(config.noise)
        print(report.announcement(config, methods), flush=True)

        runs = train_all(config, digits, methods)
        rows = measure(config, digits, methods, runs)
        print(f"\n{report.table(config.noise, rows)}\n\n{report.legend(config, TIMED_STEPS)}\n")

        differences = compare(config, digits, (textbook, fused), noisiest)
        print(report.trajectory(differences, noisiest), flush=True)

        save_figure(
            config.output,
            {m.name: [run.accuracy for run in runs[noisiest, m.name]] for m in methods},
            {m.name: profiles(runs[noisiest, m.name]) for m in (sgd, fused)},
            DISTANCES,
            noisiest,
        )
        print(f"\nPicture: {config.output}")


def train_all(config: Config, digits: Digits, methods: Sequence[Method]) -> Runs:
    """Train with every method on every share of flipped labels, once for each seed.

    For one seed all methods start from the same weights, and see the same images in the same
    order with the same labels flipped.
    """
    runs: dict[tuple[float, str], list[Run]] = {}
    total = len(config.noise) * len(methods) * config.seeds * config.epochs
    with progress(total, "training", "epoch") as bar:
        for noise, method in itertools.product(config.noise, methods):
            runs[noise, method.name] = [
                train(
                    method,
                    flip_labels(digits.train, noise, seed),
                    digits.test,
                    epochs=config.epochs,
                    seed=seed,
                    after_epoch=bar.update,
                )
                for seed in range(config.seeds)
            ]
    return runs


def measure(
    config: Config, digits: Digits, methods: Sequence[Method], runs: Runs
) -> list[report.Row]:
    """A row of the table for each method."""
    times = optimizer_times(methods, digits.train, steps=TIMED_STEPS)
    sharpnesses: dict[tuple[float, str], list[float]] = {key: [] for key in runs}
    with progress(len(runs) * config.seeds, "sharpness", "network") as bar:
        for key, seeds in runs.items():
            for seed, run in enumerate(seeds):
                surface = LossSurface(run.model, run.train_set)
                sharpnesses[key].append(sharpness(surface, config.rho, seed))
                bar.update()
    return [
        report.Row(
            name=method.name,
            accuracy=[
                [run.accuracy[-1] for run in runs[noise, method.name]] for noise in config.noise
            ],
            sharpness=[sharpnesses[noise, method.name] for noise in config.noise],
            seconds=seconds,
        )
        for method, seconds in zip(methods, times, strict=True)
    ]


def compare(
    config: Config, digits: Digits, methods: tuple[Method, Method], noise: float
) -> dict[torch.dtype, list[float]]:
    """How far apart two methods' weights are after each step, in float64 and in float32."""
    data = flip_labels(digits.train, noise, seed=0)
    found: dict[torch.dtype, list[float]] = {}
    with progress(2 * config.epochs, "comparing trajectories", "epoch") as bar:
        for dtype in (torch.float64, torch.float32):
            found[dtype] = trajectory_differences(
                methods,
                data.to(config.device, dtype),
                epochs=config.epochs,
                seed=0,
                after_epoch=bar.update,
            )
    return found


def profiles(runs: Sequence[Run]) -> list[list[float]]:
    """The training loss along random directions through each run's minimum."""
    found = []
    with progress(len(runs) * DIRECTIONS, "looking around", "direction") as bar:
        for seed, run in enumerate(runs):
            surface = LossSurface(run.model, run.train_set)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(DIRECTIONS):
                direction = filter_normalised_direction(surface.weights, generator)
                found.append(loss_along(surface, direction, DISTANCES))
                bar.update()
    return found
