"""What changes about an optimizer from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from .attached import Attached
from .backends.capture import Captures
from .engine import Engine
from .memory import Layout
from .record import Record


class Facts:
    """The changing facts of one optimizer, in an object that is made once and never replaced.

    Frameworks wrap an optimizer in a proxy that has a dict of its own: what is read passes through
    to the optimizer, what is assigned would stay with the proxy. So methods assign here.

    Attributes:
        engine: the buckets and their backends.
        captures: what CUDA graphs have seen of them.
        perturbed: whether some weights may be away from w.
        number: of the last climb.
        total: (1,) float64, what the last climb reduced: the squared norm; None before the first.
        attached: the model, if it is known.
        record: the random states of the first pass.
    """

    def __init__(self, attached: Attached | None = None) -> None:
        self.attached = attached or Attached()
        self.attached.follow(self)
        self.record = Record()
        self.engine = Engine(Layout(), [])
        self.captures = Captures()
        self.perturbed = False
        self.number = 0
        self.total: Tensor | None = None

    def devices(self) -> list[torch.device]:
        """Where random numbers may be drawn: the parameters' devices, and all GPUs in use."""
        devices = [bucket.device for bucket in self.engine.buckets]
        if torch.cuda.is_initialized():
            devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        return devices

    def leave(self) -> None:
        """The weights are at w + epsilon: the second pass begins."""
        self.perturbed = True
        self.attached.freeze()

    def arrive(self) -> None:
        """The weights are at w: the step is over, or given up."""
        self.perturbed = False
        self.attached.thaw()
        self.record.clear()
