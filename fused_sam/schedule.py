"""When a step climbs at all: every step, now and then, late in training, or where it is steep.

A step that does not climb is the base optimizer's own, and costs as much. The number of the step
decides (with AE-SAM, the gradients too). So a resumed run goes on as the first one would have, and
all ranks of a distributed run agree.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .options import check_count, check_number

__all__ = ["AESAM", "Always", "Every", "From", "Probability", "Span", "When"]


STEP = "sam_step"
"""How many steps a group has taken, climbing or not: counted only where a schedule asks."""


MEAN, VARIANCE = "sam_mean", "sam_variance"
"""AE-SAM's running averages."""


def check_when(value: Any) -> None:
    """Raise unless ``value`` is a schedule."""
    if not isinstance(value, When):
        raise TypeError(
            f"when must be a schedule of fused_sam.schedule, such as Every(5) or From(1000), "
            f"got {value!r}"
        )


@dataclass(frozen=True)
class Decision:
    """What a schedule says of one step.

    Attributes:
        climbs: whether it climbs.
        memory: what the groups hold once the step is done, for the next one and for checkpoints.
    """

    climbs: bool
    memory: Mapping[str, float]


@dataclass(frozen=True)
class When:
    """Which steps climb. A subclass says it in ``climbs``; see the classes below.

    Steps count from 0. A step that does not climb has one pass if the loop leaves the second out::

        if optimizer.first_step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
    """

    needs_norm: ClassVar[bool] = False
    """Whether the gradient's norm decides: the host waits for it, and needs the loss scale."""

    memory: ClassVar[Mapping[str, float]] = {STEP: 0}
    """What the groups hold at first."""

    def climbs(self, step: int) -> bool:
        """Whether a step climbs.

        Args:
            step: how many steps came before, climbing or not.
        """
        raise NotImplementedError

    def decide(self, group: Mapping[str, Any], sq_norm: Callable[[], float]) -> Decision:
        """Decide about the step that begins.

        Args:
            group: one that holds ``memory``.
            sq_norm: the squared norm of the gradients at w; calling it waits for the device.
        """
        step = group[STEP]
        return Decision(self.climbs(step), {STEP: step + 1})


@dataclass(frozen=True)
class Always(When):
    """Every step climbs: SAM as it was published. Nothing is counted."""

    memory = {}  # noqa: RUF012

    def decide(self, group: Mapping[str, Any], sq_norm: Callable[[], float]) -> Decision:
        """It climbs."""
        return _ALWAYS


_ALWAYS = Decision(True, {})
NO_CLIMB = Decision(False, {})
"""For members that have one pass."""


@dataclass(frozen=True)
class Every(When):
    """Every k-th step climbs, the first one too: SAM-k (Liu et al. 2022).

    Between the climbs the base optimizer sees the gradient as it is; ``blend=LookSAM(k)``, which
    has this schedule of itself, changes it.

    Args:
        k: an integer >= 1.
    """

    k: int

    def __post_init__(self) -> None:
        check_count("k", self.k, 1)

    def climbs(self, step: int) -> bool:
        """Whether k divides the number of the step."""
        return step % self.k == 0


@dataclass(frozen=True)
class From(When):
    """Steps from this one on climb: late-phase SAM (Zhou et al. 2024, arXiv 2410.10373).

    The authors find that a few epochs of SAM at the end do nearly as much as SAM throughout. They
    begin those with a new optimizer; here the base optimizer's momentum goes on.

    Args:
        start: the first step that climbs, an integer >= 0.
    """

    start: int

    def __post_init__(self) -> None:
        check_count("start", self.start, 0)

    def climbs(self, step: int) -> bool:
        """Whether the step is not before ``start``."""
        return step >= self.start


@dataclass(frozen=True)
class Span(When):
    """Steps within a span climb.

    Args:
        start: the first step that climbs, an integer >= 0.
        stop: the first one after it that does not, an integer >= ``start``.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        check_count("start", self.start, 0)
        check_count("stop", self.stop, self.start)

    def climbs(self, step: int) -> bool:
        """Whether the step is in the span."""
        return self.start <= step < self.stop


@dataclass(frozen=True)
class Probability(When):
    """Each step climbs with a probability (SS-SAM, Zhao et al. 2022).

    The draw of a step depends on the seed and on its number alone.

    Args:
        p: the probability, in [0, 1].
        seed: an integer.
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("p", self.p)
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be in [0, 1], got {self.p!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")

    def climbs(self, step: int) -> bool:
        """Whether the step's draw says so."""
        return random.Random(f"{self.seed} {step}").random() < self.p


@dataclass(frozen=True)
class AESAM(When):
    """AE-SAM (Jiang et al., ICLR 2023): a step climbs where its gradient is large.

    With a running mean and deviation of the squared norm, a step climbs if

        ||g||**2 >= mean + c * deviation,

    where c goes from ``lambda1`` at the first step to ``lambda2`` after ``total_steps``:

        mean      <- decay * mean + (1 - decay) * ||g||**2
        deviation <- sqrt(decay * deviation**2 + (1 - decay) * (||g||**2 - mean)**2)

    As c falls, more steps climb. The paper numbers its two ends the other way round: there lambda_2
    is where c begins. The host waits for one number in each step. A norm that is not finite changes
    neither average, and its step does not climb.

    Args:
        total_steps: the length of the training, an integer >= 1; c stays at ``lambda2`` after it.
        lambda1, lambda2: the first and the last c, finite, lambda1 >= lambda2.
        decay: of the averages, in [0, 1).

    Raises:
        TypeError, ValueError: an argument cannot be used.
    """

    total_steps: int
    lambda1: float = 1.0
    lambda2: float = -1.0
    decay: float = 0.9

    needs_norm = True
    memory = {STEP: 0, MEAN: 0.0, VARIANCE: math.exp(-10)}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_count("total_steps", self.total_steps, 1)
        for name in ("lambda1", "lambda2", "decay"):
            _check_number(name, getattr(self, name))
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")
        if self.lambda1 < self.lambda2:
            raise ValueError(
                f"lambda1 must be >= lambda2, got {self.lambda1!r} and {self.lambda2!r}: c falls "
                f"from lambda1 to lambda2, which the paper numbers the other way round; exchange "
                f"them"
            )

    def decide(self, group: Mapping[str, Any], sq_norm: Callable[[], float]) -> Decision:
        """Whether the squared norm is large among those of the steps before."""
        step, square = group[STEP], sq_norm()
        if not math.isfinite(square):
            return Decision(False, {STEP: step + 1})
        rest = 1 - self.decay
        mean = self.decay * group[MEAN] + rest * square
        variance = self.decay * group[VARIANCE] + rest * (square - mean) ** 2
        part = min(step / self.total_steps, 1.0)
        c = self.lambda1 + part * (self.lambda2 - self.lambda1)
        climbs = square >= mean + c * math.sqrt(variance)
        return Decision(climbs, {STEP: step + 1, MEAN: mean, VARIANCE: variance})


def _check_number(name: str, value: Any) -> None:
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
