"""How the demo's hyperparameters were chosen: ``python -m fused_sam.demo.tune`` (10 min).

Each method gets the same number of trials: SGD the whole grid of ``LRS`` x ``WEIGHT_DECAYS``, SAM
as many points drawn at random from ``LRS`` x ``WEIGHT_DECAYS`` x ``RHOS``. A trial trains with
every seed and every share of flipped labels on the training images, and is judged by its accuracy
on the validation images after the last epoch, averaged over all of them: one setting per method,
as for somebody who does not know how many labels are wrong. Seeds and images are not those
that the demo reports. SAM is the textbook's here: FusedSAM does the same and gets the same setting.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Sequence

import torch

from .data import Digits, flip_labels, load_digits
from .progress import progress
from .textbook import TextbookSAM
from .threads import one_thread
from .training import Method, Setting, train

LRS = (0.001, 0.003, 0.01, 0.03, 0.1)
WEIGHT_DECAYS = (5e-4, 5e-3, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)
RHOS = (0.05, 0.1, 0.2, 0.5)
EPOCHS = 30
SEEDS = (100, 101, 102)
NOISE = (0.0, 0.4)


def sgd_trials() -> list[Method]:
    """The whole grid."""
    return [
        Method("SGD", torch.optim.SGD, Setting(lr, decay))
        for lr, decay in itertools.product(LRS, WEIGHT_DECAYS)
    ]


def sam_trials() -> list[Method]:
    """As many points of a larger grid, drawn once and for all."""
    grid = list(itertools.product(LRS, WEIGHT_DECAYS, RHOS))
    points = random.Random(0).sample(grid, len(LRS) * len(WEIGHT_DECAYS))
    return [Method("SAM", TextbookSAM, Setting(*point)) for point in sorted(points)]


def validation_accuracy(
    method: Method,
    digits: Digits,
    *,
    epochs: int,
    seeds: Sequence[int],
    after_epoch: Callable[[], object],
) -> list[float]:
    """Accuracy after the last epoch for each share of ``NOISE``, mean over the seeds."""
    return [
        statistics.mean(
            train(
                method,
                flip_labels(digits.train, noise, seed),
                digits.validation,
                epochs=epochs,
                seed=seed,
                after_epoch=after_epoch,
            ).accuracy[-1]
            for seed in seeds
        )
        for noise in NOISE
    ]


def tune(trials: Sequence[Method], *, epochs: int, seeds: Sequence[int]) -> Method:
    """Print what each trial reaches and return the best one."""
    digits = load_digits()
    results = []
    with progress(len(trials) * len(NOISE) * len(seeds) * epochs, "tuning", "epoch") as bar:
        for method in trials:
            found = validation_accuracy(
                method, digits, epochs=epochs, seeds=seeds, after_epoch=bar.update
            )
            results.append((statistics.mean(found), method, found))
    for mean, method, found in sorted(results, key=lambda result: result[0]):
        shares = "  ".join(f"{noise:.0%}: {a:.2%}" for noise, a in zip(NOISE, found, strict=True))
        print(f"{mean:.2%}  ({shares})  {method.name} {method.setting}")
    return max(results, key=lambda result: result[0])[1]


def main() -> None:
    """Tune both methods; each one's best trial is printed last."""
    with one_thread():
        for trials in (sgd_trials(), sam_trials()):
            tune(trials, epochs=EPOCHS, seeds=SEEDS)


if __name__ == "__main__":
    main()
