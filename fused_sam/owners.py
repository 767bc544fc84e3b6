"""Which optimizers move the weights of a model: for a function that is given the model alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .facts import Facts
    from .onepass import OnePass

ALL: weakref.WeakSet[Facts] = weakref.WeakSet()
"""The facts of every optimizer that lives."""


def owners_of(params: Iterable[Tensor]) -> list[OnePass]:
    """The optimizers that one of these parameters belongs to."""
    ids = set(map(id, params))
    return [
        optimizer
        for facts in list(ALL)
        if (optimizer := facts.owner()) is not None
        and not ids.isdisjoint(id(p) for b in facts.engine.buckets for p in b.params)
    ]
