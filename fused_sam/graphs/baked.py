"""What a captured step has baked in, and whether it still holds."""

from __future__ import annotations

import itertools
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from ..optimizer import FusedSAM
from ..rules import check_options
from .conditions import refuse_fresh_gradients, refuse_hooks


class Baked:
    """All that a graph does not read anew when it runs.

    Args:
        model: the model, as it is after the capture.
        optimizer: its optimizer.
        scaler: a GradScaler, or None.
    """

    def __init__(self, model: nn.Module, optimizer: FusedSAM, scaler: Any) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._groups = list(optimizer.param_groups)
        self._layout = optimizer._facts.engine.layout
        self._modules = list(model.modules())
        self._facts = self._now()
        self._parts = parts_of(self._modules)
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def check(self) -> None:
        """Raise, before anything is done, unless a replay would be the step that is wanted.

        Raises:
            RuntimeError: something has changed, or a step is half done.
            TypeError, ValueError: an option of a group cannot be used.
        """
        opt, engine = self._optimizer, self._optimizer._facts.engine
        opt._refuse_away("a captured step")
        opt._refuse_written()
        groups, layout = opt.param_groups, self._layout
        same = engine.layout is layout and len(groups) == len(self._groups)
        if not (same and layout.is_current(groups) and layout.has_its_looks()):
            _outdated("parameters were added, removed, thawed, moved or restrided")
        if not all(map(operator.is_, groups, self._groups)):
            _outdated("the parameter groups were replaced")
        same = are_same(parts_of(self._modules), self._parts)
        if not same or list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            _outdated("a layer, a parameter or a buffer of the model was moved or replaced")
        refuse_hooks(opt)
        opt._facts.reader.read(groups)
        assert layout.rule is not None
        for group in groups:
            check_options(layout.rule, group)
        _ = opt.max_grad_norm
        engine.take_in(opt.state, groups)
        self._compare(self._now())
        refuse_fresh_gradients(opt, "a captured step")

    def _compare(self, now: dict[str, Any]) -> None:
        for what, value in self._facts.items():
            if (new := now.get(what)) != value:
                brief = not isinstance(value, list)  # of one thing, and not of each parameter
                _outdated(f"{what} was {value} and is {new}" if brief else f"{what} changed")

    def _now(self) -> dict[str, Any]:
        """By name, all that may change where it is."""
        opt, layout = self._optimizer, self._layout
        facts: dict[str, Any] = {
            "training mode of the model's layers": [m.training for m in self._modules],
            "requires_grad of the parameters": [p.requires_grad for p in layout.params],
            "which parameters have state": [
                (name, tuple(buffer.present))
                for bucket in layout.buckets
                for name, buffer in bucket.states.items()
            ],
            "which parameters the last step had no gradient for": [*map(id, opt._facts.missed)],
            "optimizer.measures": opt._facts.measures,
        }
        ascent = opt._facts.reader.read(opt.param_groups).ascent
        for row, group in enumerate(opt.param_groups):
            facts[f"what group {row} keeps and reads"] = (
                layout.rule.kept(group) if layout.rule else (),
                [bool(sums.reads_param(group)) for sums in ascent.sums.chain],
                bool(group.get("maximize")),
            )
            # What schedulers and others keep in a group is no option.
            for name in opt.defaults.keys() & group.keys():
                facts[f"{name!r} of group {row}"] = _kind(group[name])
        if self._scaler is not None:
            facts["the scaler"] = _settings_of(self._scaler)
        return facts


def _settings_of(scaler: Any) -> tuple[Any, ...]:
    return (
        *(scaler.is_enabled(), scaler.get_growth_factor(), scaler.get_backoff_factor()),
        *(scaler.get_growth_interval(), id(scaler._scale), id(scaler._growth_tracker)),
    )


def _kind(value: Any) -> Any:
    """What of an option must stay: of numbers, that they are numbers."""
    if isinstance(value, Tensor):
        return "a number" if value.device.type == "cpu" else f"the tensor at {value.data_ptr()}"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return "a number"
    return tuple(map(_kind, value)) if isinstance(value, (tuple, list)) else value


def parts_of(modules: Sequence[nn.Module]) -> list[Any]:
    """Every layer, parameter and buffer of these, or what stands in its place now."""
    dicts = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
    return list(itertools.chain.from_iterable([d.values() for d in dicts]))


def are_same(parts: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    return len(parts) == len(others) and all(map(operator.is_, parts, others))


def _outdated(why: str) -> NoReturn:
    raise RuntimeError(
        f"since the step was captured {why}. Nothing was done; capture it again: "
        f"step = fused_sam.graphs.capture(...)"
    )
