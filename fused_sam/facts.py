"""What changes about an optimizer from step to step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ascents import Ascent
from .attached import Attached
from .backends import Groups
from .backends.capture import Captures
from .blends import Blend
from .engine import Engine
from .laststep import LastStep, Losses
from .memory import Gradients, Layout
from .owners import ALL
from .record import Record
from .scaler import ScalerFacts
from .schedule import Decision
from .settings import Reader


class Coming(NamedTuple):
    """The sum of the squares of a momentum.

    Attributes:
        total: (1,) float64.
        momentum: of each bucket, of whose parameters.
        versions: torch's count of writes to each of its tensors.
    """

    total: Tensor
    momentum: tuple[Gradients, ...]
    versions: list[int]

    @classmethod
    def of(cls, total: Tensor, momentum: Sequence[Gradients]) -> Coming:
        """As the momentum is now."""
        return cls(total, tuple(momentum), cls._versions(momentum))

    def still(self, momentum: Sequence[Gradients]) -> Tensor | None:
        """The sum, if it is this momentum's, and nobody has written to it."""
        same = [*map(id, momentum)] == [*map(id, self.momentum)]
        return self.total if same and self.versions == self._versions(momentum) else None

    @staticmethod
    def _versions(momentum: Sequence[Gradients]) -> list[int]:
        return [t._version for m in momentum for t in m.tensors if t is not None]


class Facts:
    """The changing facts of one optimizer, in an object that is made once and never replaced.

    Frameworks wrap an optimizer in a proxy that has a dict of its own. Reading an attribute passes
    through to the optimizer, but assigning one would stay with the proxy. So methods assign here.

    Attributes:
        engine: the buckets and their backends.
        captures: what CUDA graphs have seen of them.
        reader: of the groups' options.
        between: whether a step is half done: after first_step, before second_step.
        perturbed: whether some weights may be away from w. A step may be half done at w.
        decision: what the schedule said of the last step that began.
        aside: the gradients of a half-done step that did not climb; it uses them, unless a second
            backward leaves others.
        blend: what the step under way blends, if it is half done; None for nothing.
        scale: the loss scale of the gradients at w, as far as first_step was told; else None.
        scale_matters: whether the step under way depends on it.
        total: (k,) float64, what the last climb reduced; None before the first.
        norm: which norm that is: of ``total``, ().
        first: the squared norm of the gradients at w of the groups that climb, scaled, (1,), if the
            step under way has reduced it.
        losses: what its closures have returned.
        keeps: whether the last climb has kept gradients.
        each: whether each of its micro-batches climbs by itself.
        measures: whether steps find out all that ``last_step`` tells.
        last: about the last step that was finished.
        training: whether the weights of a one-pass member belong ahead of w.
        visited: whether they have been there since the last step.
        missed: the parameters that had no gradient in a one-pass member's last step: they stay at w
            until the next.
        coming: the sum that the next climb along the momentum needs, if it is known.
        versions: of all parameters, torch's count of writes to each, as they were left there.
        attached: the model, if it is known.
        record: the random states of the first pass.
        owner: the optimizer, and no proxy of it.
        finishing: whether ``step`` must be the second half, whatever ``between`` says.
        scaler: what a GradScaler did.
    """

    def __init__(self, owner: Any, attached: Attached | None = None) -> None:
        self.owner: weakref.ref[Any] = weakref.ref(owner)
        self.finishing = False
        self.scaler = ScalerFacts()
        self.attached = attached or Attached()
        self.attached.follow(self)
        self.record = Record()
        self.engine = Engine(Layout(), [])
        self.captures = Captures()
        self.reader = Reader()
        self.between = False
        self.perturbed = False
        self.decision = Decision(True, {})
        self.aside: list[tuple[Tensor, Tensor]] = []
        self.blend: Blend | None = None
        self.scale: float | None = None
        self.scale_matters = False
        self.total: Tensor | None = None
        self.norm: Callable[[Tensor], Tensor] = torch.sum  # before the first climb nobody asks
        self.first: Tensor | None = None
        self.losses = Losses()
        self.keeps = self.each = self.measures = False
        self.last = LastStep()
        self.training = True
        self.visited = False
        self.missed: list[Tensor] = []
        self.coming: Coming | None = None
        self.versions: list[int] = []
        ALL.add(self)

    def devices(self) -> list[torch.device]:
        """Where random numbers may be drawn: the parameters' devices, and all GPUs in use."""
        devices = [bucket.device for bucket in self.engine.buckets]
        if torch.cuda.is_initialized():
            devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        return devices

    def writes(self) -> list[int]:
        """Torch's count of writes to each parameter."""
        return [param._version for bucket in self.engine.buckets for param in bucket.params]

    def climbed(self, ascent: Ascent, groups: Groups, total: Tensor) -> None:
        """A climb was made, by what ``total`` says."""
        climbing = [group for group in groups if group["ascent"] is not None]
        self.total = total
        self.norm = functools.partial(ascent.norm, climbing[0] if climbing else {})
        plain = all([ascent.sums.squares(group) for group in climbing])
        if plain and not (self.each or ascent.along_momentum):
            self.first = total

    def leave(self) -> None:
        """The weights are at w + epsilon: the second pass begins."""
        self.perturbed = True
        self.begin_second()

    def begin_second(self) -> None:
        """The second pass begins."""
        self.between = True
        self.attached.freeze()

    def forget_climb(self) -> None:
        """What was launched in a capture that failed has not run: the weights are at w."""
        for bucket in self.engine.buckets:
            bucket.forget_climb()
        self.arrive()

    def arrive(self, ahead: bool = False) -> None:
        """The step is over, or given up: the weights are at w, or ahead of it."""
        self.between, self.perturbed = False, ahead
        self.aside = []
        self.first, self.losses = None, Losses()
        self.attached.thaw()
        self.record.clear()
        self.scaler.forget()
