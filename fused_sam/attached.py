"""A model that an optimizer is attached to: what its forwards, its copies and its saving tell."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .batchnorm import frozen_running_stats
from .compiling import opaque

if TYPE_CHECKING:
    from .facts import Facts
    from .onepass import OnePass


class Attached:
    """The model of an optimizer, by weak reference; at first there is none.

    The model's hooks hold this object, and it holds neither the model nor the optimizer's facts.
    Copies of model and optimizer that are made together are attached to each other; a copy of one
    alone is attached to nothing.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._facts: weakref.ref[Facts] | None = None
        self._frozen = ExitStack()
        self._remove: Callable[[], object] = bool

    @property
    def model(self) -> nn.Module | None:
        """The model, while it lives."""
        return None if self._model is None else self._model()

    def follow(self, facts: Facts) -> None:
        """Belong to these facts."""
        self._facts = weakref.ref(facts)

    def attach(self, model: nn.Module) -> None:
        """Watch this model from now on, and no other."""
        if self.model is model:
            return
        self._remove()
        # In front of all hooks: those of others may draw random numbers too.
        handles = [model.register_forward_pre_hook(_Forward(self), prepend=True)]
        handles += [m.register_state_dict_pre_hook(_Saving(self)) for m in model.modules()]
        self._model = weakref.ref(model)
        facts = None if self._facts is None else self._facts()
        assert facts is not None
        self._remove = weakref.finalize(facts, _remove, handles)

    def freeze(self) -> None:
        """The second pass begins: running statistics stay as they are until ``thaw``."""
        if self.model is not None:
            self._frozen.enter_context(frozen_running_stats(self.model))

    def thaw(self) -> None:
        """The second pass is over."""
        self._frozen.close()

    def on_forward(self, module: nn.Module) -> None:
        """The model is about to run."""
        facts = None if self._facts is None else self._facts()
        if facts is None:
            return
        if self._model is None:  # a copy: model and optimizer meet here
            self._model = weakref.ref(module)
        if self.model is module:
            if (optimizer := facts.owner()) is not None:
                optimizer._see_forward(module.training)
            facts.record.forward(module.training, facts.between, facts.devices())

    def on_saving(self) -> None:
        """The model is about to be saved: ``state_dict()`` has yet to read its weights.

        Raises:
            RuntimeError: its weights are perturbed.
        """
        if (optimizer := self._optimizer()) is not None:
            optimizer._be_at_w("saving the model")

    def on_copying(self) -> None:
        """The model is being copied or pickled, and some of its weights are already.

        Raises:
            RuntimeError: its weights are perturbed.
        """
        if (optimizer := self._optimizer()) is not None:
            optimizer._refuse_perturbed("copying or pickling the model")

    def _optimizer(self) -> OnePass | None:
        facts = None if self._facts is None else self._facts()
        return None if facts is None else facts.owner()

    def __reduce__(self) -> Any:
        return Attached, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        memo[id(self)] = alone = Attached()
        return alone


class _Hook:
    """A hook of the model: what it does is told to ``Attached``.

    A pickled model must load where this package is not installed, so there a hook becomes
    ``inert``: a builtin that does nothing when it is called like this hook.
    """

    inert: Any

    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        self._attached.on_copying()
        return type(self)(copy.deepcopy(self._attached, memo))

    def __reduce__(self) -> Any:
        self._attached.on_copying()
        return self.inert


class _Forward(_Hook):
    inert: Any = (getattr, ({}, "get"))  # called with (module, args) it returns args

    def __call__(self, module: nn.Module, args: Any) -> None:
        _observe(self._attached, module)


class _Saving(_Hook):
    inert: Any = (functools.partial, (getattr,))  # a module has no attribute of a prefix's name

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._attached.on_saving()


@opaque("it records and replays random states")
def _observe(attached: Attached, module: nn.Module) -> None:
    attached.on_forward(module)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def check_model(model: Any, params: Iterable[torch.Tensor]) -> None:
    """Raise unless an optimizer of these parameters can be attached to ``model``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach() takes a torch.nn.Module, got {type(model).__name__}")
    if {id(p) for p in model.parameters()}.isdisjoint([id(p) for p in params]):
        raise ValueError(
            f"attach({type(model).__name__}): none of the optimizer's parameters is one of this "
            f"model's; attach the module that is called in training"
        )
