"""What changes about an optimizer from step to step."""

from __future__ import annotations

from torch import Tensor

from .backends.capture import Captures
from .engine import Engine
from .memory import Layout


class Facts:
    """The changing facts of one optimizer, in an object that is made once and never replaced.

    Frameworks wrap an optimizer in a proxy that has a dict of its own: what is read passes through
    to the optimizer, what is assigned would stay with the proxy. So methods assign here.

    Attributes:
        engine: the buckets and their backends.
        captures: what CUDA graphs have seen of them.
        perturbed: whether some weights may be away from w.
        total: (1,) float64, what the last climb reduced: the squared norm; None before the first.
    """

    def __init__(self) -> None:
        self.engine = Engine(Layout(), [])
        self.captures = Captures()
        self.perturbed = False
        self.total: Tensor | None = None
