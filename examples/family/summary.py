"""From rows to what the page and the picture show: means, and paired differences to SGD."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from .methods import METHODS
from .plan import Cell
from .rows import Row, Rows
from .tasks import NOISE, TASKS, Task

Get = Callable[[Row], float | None]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval; the bounds are None where there is one value."""

    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """Student's interval for the mean."""
    mean, n = statistics.mean(values), len(values)
    if n < 2:
        return Interval(mean, None, None)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Result:
    """A method's reported runs on a block, next to SGD's with the same seeds.

    Attributes:
        cell: which method, where.
        setting: what tuning has found.
        rows, sgd: the runs, in the order of their seeds; they correspond.
    """

    cell: Cell
    setting: dict[str, float]
    rows: list[Row]
    sgd: list[Row]

    def mean(self, get: Get) -> float | None:
        """The mean over the seeds; None if one of the values is."""
        values = [get(row) for row in self.rows]
        return None if None in values else statistics.mean(v for v in values if v is not None)

    def difference(self, get: Get) -> Interval:
        """This method's value less SGD's, over the seeds."""
        pairs = [(get(a), get(b)) for a, b in zip(self.rows, self.sgd, strict=True)]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        return interval(known) if len(known) == len(pairs) else Interval(math.nan, None, None)

    def ratio(self, get: Get) -> float:
        """The median of this method's value over SGD's."""
        pairs = zip(self.rows, self.sgd, strict=True)
        return statistics.median((get(a) or 0.0) / (get(b) or math.nan) for a, b in pairs)


@dataclass(frozen=True)
class Block:
    """A task with a share of flipped labels.

    Attributes:
        results: of the methods that have runs with seeds that SGD has too, SGD first.
        counts: for each method's name, runs that are there and runs that there will be: of tuning,
            and to report.
    """

    task: Task
    noise: float
    results: list[Result]
    counts: dict[str, tuple[tuple[int, int], tuple[int, int]]]

    @property
    def complete(self) -> list[str]:
        """The methods all of whose runs are there."""
        return [n for n, counts in self.counts.items() if all(a == b for a, b in counts)]

    def done(self) -> tuple[int, int]:
        """Runs that are there, and all."""
        pairs = [pair for counts in self.counts.values() for pair in counts]
        return sum(a for a, _ in pairs), sum(b for _, b in pairs)


def blocks(rows: Rows) -> list[Block]:
    """All blocks, in the order in which they run."""
    return [_block(task, noise, rows) for task in TASKS for noise in NOISE]


def _block(task: Task, noise: float, rows: Rows) -> Block:
    counts, results = {}, []
    sgd: dict[int, Row] = {}
    for method in METHODS:
        cell = Cell(task, noise, method)
        trials = cell.trials()
        tuned = sum(run.facts() in rows for run in trials)
        if tuned == len(trials):
            tuned += sum(run.facts() in rows for run in cell.finals(rows))
        found: dict[int, Row] = {}
        setting = cell.best(rows)
        if setting is not None:
            found = {
                run.seed: rows[run.facts()] for run in cell.runs(setting) if run.facts() in rows
            }
        counts[method.name] = (tuned, len(trials) + task.finalists), (len(found), task.seeds)
        sgd = sgd or found
        seeds = sorted(found.keys() & sgd.keys())
        if setting is not None and seeds:
            mine, theirs = [found[s] for s in seeds], [sgd[s] for s in seeds]
            results.append(Result(cell, setting, mine, theirs))
        if method is METHODS[0] and not found:
            sgd = {}
    return Block(task, noise, results if sgd else [], counts)
