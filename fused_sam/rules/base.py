"""What a rule is: a base optimizer's step from the gradient, as the backends fuse it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..text import Text

Group = Mapping[str, Any]
"""A parameter group: the hyperparameters of ``torch.optim``, read anew at every step."""

MASTER = "master_weight"
"""The float32 weight that a half-precision parameter may have, in ``optimizer.state[p]``."""

STEP = "step"
"""The one state that is a number per parameter, float32 (), and not a parameter-sized buffer."""


@dataclass(frozen=True)
class State:
    """One parameter-sized state of a rule.

    Attributes:
        name: torch's own, in ``optimizer.state[p]``.
        kept: whether a group's options require it; None if all do.
        initial: what all of its elements begin with, by a group's options, where the class makes
            it at construction; None where it begins at zero with the first step.
        like_grad: whether the class makes it out of the gradient, in whose dtype it then is, and
            not out of the parameter.
    """

    name: str
    kept: Callable[[Group], bool] | None = None
    initial: Callable[[Group], float] | None = None
    like_grad: bool = False

    def is_kept(self, group: Group) -> bool:
        """Whether a group has it."""
        return self.kept is None or self.kept(group)


@dataclass(frozen=True)
class Rule:
    """A base optimizer that the backends fuse.

    Attributes:
        name: short name: the C++ struct is called so.
        optimizer: the exact class whose behaviour and state names it has.
        states: what it keeps for each parameter, in the order of ``update``'s arguments.
        counts: whether ``state["step"]`` counts the steps of each parameter.
        columns: a group's numbers, in float64, in the order of ``scalars``' arguments between
            ``lr`` and ``step``. Differences such as 1 - beta are taken here and rounded once.
        scalars: text, once for each parameter: ``(lr, *columns, step, fresh) -> tuple``. ``step``
            counts the running step, 1 for a rule that does not count; ``fresh`` says that the
            step is the first one that makes state.
        update: text, for each element: ``(param, grad, *states, *scalars) -> (param, *states)``.
            ``grad`` is unscaled and points uphill for what is minimised; a state that no group
            keeps is None. Where groups differ, a state may be there that this one does not keep:
            then the options must decide, and what becomes of that state is not stored.
        momentum: the state along which the weights move, for climbs that follow it; None if there
            is none.
        kernel: a torch kernel that computes the same, for the reference backend, or None:
            ``(params, grads, {name: tensors}, group, fresh, grad_scale, found_inf)``.
    """

    name: str
    optimizer: type[Optimizer]
    states: tuple[State, ...]
    counts: bool
    columns: Callable[[Group], tuple[float, ...]]
    scalars: Text
    update: Text
    kernel: Kernel | None = None
    momentum: str | None = None

    @functools.cached_property
    def state_names(self) -> tuple[str, ...]:
        """Every name that can stand in ``optimizer.state[p]``."""
        return (*((STEP,) if self.counts else ()), *[state.name for state in self.states])

    @functools.cached_property
    def from_construction(self) -> bool:
        """Whether the optimizer has its state, ``step`` included, before the first step."""
        return any(state.initial is not None for state in self.states)

    def initial(self, name: str, group: Group) -> float:
        """What a state begins with in a group."""
        begin = next((state.initial for state in self.states if state.name == name), None)
        return 0.0 if begin is None else float(begin(group))

    def kept(self, group: Group) -> tuple[str, ...]:
        """The names that a group's options require."""
        names = [state.name for state in self.states if state.is_kept(group)]
        return (STEP, *names) if self.counts else tuple(names)

    def numbers(self, group: Group) -> tuple[float, ...]:
        """A group's row of the table of hyperparameters, but for ``lr``."""
        return tuple(map(float, self.columns(group)))

    @functools.cached_property
    def column_names(self) -> tuple[str, ...]:
        """What ``columns`` returns, by name; ``lr`` is not among them."""
        return tuple(inspect.signature(self.scalars).parameters)[1:-2]


Kernel = Callable[
    [list[Tensor], list[Tensor], Mapping[str, list[Tensor]], Group, bool, Any, Any], None
]
