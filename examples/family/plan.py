"""Which runs there are, in which order, and which setting a method's trials have found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import METHODS, Method
from .rows import Rows
from .tasks import NOISE, TASKS, TUNING_SEED, Task


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        test: whether it is to be reported. A run that tunes never sees the test images.
    """

    task: Task
    noise: float
    method: Method
    setting: dict[str, float]
    seed: int
    test: bool

    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "task": self.task.name,
            "noise": self.noise,
            "method": self.method.name,
            "setting": self.setting,
            "seed": self.seed,
            "epochs": self.task.epochs * self.method.epochs,
        }


@dataclass(frozen=True)
class Cell:
    """A method on a task with a share of flipped labels: its trials, then its runs."""

    task: Task
    noise: float
    method: Method

    def trials(self) -> list[Run]:
        """The first round: each setting once."""
        return [self._tuning(setting, TUNING_SEED) for setting in self.task.trials(self.method)]

    def finals(self, rows: Rows) -> list[Run]:
        """The second round: the best settings of the first once more, with another seed."""
        ranked = sorted(self.trials(), key=lambda run: _quality(run, rows), reverse=True)
        return [self._tuning(run.setting, TUNING_SEED + 1) for run in ranked[: self.task.finalists]]

    def best(self, rows: Rows) -> dict[str, float] | None:
        """The setting that did best in both rounds. None while a run of them is missing."""
        if any(run.facts() not in rows for run in self.trials()):
            return None
        finals = self.finals(rows)
        if any(run.facts() not in rows for run in finals):
            return None

        def both(run: Run) -> tuple[float, ...]:
            first = _quality(self._tuning(run.setting, TUNING_SEED), rows)
            return tuple(map(sum, zip(first, _quality(run, rows), strict=True)))

        return max(finals, key=both).setting

    def _tuning(self, setting: dict[str, float], seed: int) -> Run:
        return Run(self.task, self.noise, self.method, setting, seed, False)

    def runs(self, setting: dict[str, float]) -> list[Run]:
        """The runs that are reported."""
        return [
            Run(self.task, self.noise, self.method, setting, seed, True)
            for seed in range(self.task.seeds)
        ]


def _quality(run: Run, rows: Rows) -> tuple[float, float]:
    """Accuracy on the validation images after the last epoch; among equals the loss decides."""
    last = rows[run.facts()]["validation"]["last"]
    # None is a loss that is not finite.
    return last["accuracy"], -(float("inf") if last["loss"] is None else last["loss"])


def cells(tasks: Sequence[Task] = TASKS, noise: Sequence[float] = NOISE) -> list[Cell]:
    """All there is to do, in its order: what is complete is a method, then a task."""
    return [Cell(task, share, method) for task in tasks for share in noise for method in METHODS]


def missing(cell: Cell, rows: Rows) -> Iterator[Run]:
    """The runs of a cell that have no row yet; they must get one each before the next is asked."""
    yield from (run for run in cell.trials() if run.facts() not in rows)
    yield from (run for run in cell.finals(rows) if run.facts() not in rows)
    setting = cell.best(rows)
    assert setting is not None
    yield from (run for run in cell.runs(setting) if run.facts() not in rows)
