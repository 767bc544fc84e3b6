"""What ascents and blends keep over the steps, of each parameter and once for the optimizer.

It is no state of the base optimizer, which would stumble over it (many ask whether a parameter's
state is empty), and so it is not in ``optimizer.state``. Flat buffers of the buckets hold it, in
float32 (float64 for float64 weights): an average of bfloat16 would stop moving, because what a step
adds to it is less than its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .window import has_memory

if TYPE_CHECKING:
    from .bucket import Bucket

AVERAGE = "sam_average"
"""A running average of the gradients at w."""

DIRECTION = "sam_direction"
"""What LookSAM's steps without a climb use again of the last one with one."""

LENGTH = "sam_direction_norm"
"""The norm of all directions together; 0 where there is none."""

MEMBER_STATES: Mapping[str, float] = {AVERAGE: math.nan, DIRECTION: 0.0}
"""What is kept of each parameter, by its name in a checkpoint: what its elements begin with. NaN:
there is nothing yet. So the device knows it, whatever steps were skipped."""

MEMBER_NUMBERS = (LENGTH,)
"""The names of what there is once for the optimizer."""

Values = dict[Tensor, dict[str, Tensor]]
"""By parameter and name."""


class MemberState:
    """What the members keep in the buckets of a layout.

    Args:
        buckets: whose buffers hold it.
        params: all parameters of the groups; of others nothing is taken over.
        old: the layout's before, of which all is taken over that still fits its parameter.

    Attributes:
        numbers: () float64 each, on the device of the first bucket: what there is once for the
            optimizer, by its name in a checkpoint.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket] = (),
        params: Collection[Tensor] = (),
        old: MemberState | None = None,
    ) -> None:
        self._buckets = buckets
        self._outside: Values = {}
        self.numbers: dict[str, Tensor] = {}
        if old is not None:
            there = set(params)
            self.adopt({p: entry for p, entry in old.values().items() if p in there}, old.numbers)

    def adopt(
        self, values: Mapping[Tensor, Mapping[str, Tensor]], numbers: Mapping[str, Tensor]
    ) -> None:
        """Take over all of this, and forget what there was.

        What has another shape than its parameter is forgotten too. Values of parameters that are in
        no bucket, because they do not train, wait until they do.
        """
        inside = {slot.param for bucket in self._buckets for slot in bucket.slots}
        self._outside = {p: dict(entry) for p, entry in values.items() if p not in inside}
        for bucket in self._buckets:
            fitting = [
                {n: v for n, v in values.get(slot.param, {}).items() if v.shape == slot.shape}
                for slot in bucket.slots
            ]
            for name in {name for entry in fitting for name in entry} | bucket.members.keys():
                bucket.member(name).adopt([entry.get(name) for entry in fitting])
        for name in self.numbers.keys() - numbers.keys():
            self.numbers[name].zero_()
        for name, value in numbers.items():  # which may be ours
            self.number(name).copy_(value)

    def number(self, name: str) -> Tensor:
        """Where a number is, which begins with 0 when first asked for: a graph reads it there."""
        if name not in self.numbers:
            device = self._buckets[0].device if self._buckets else torch.device("cpu")
            self.numbers[name] = torch.zeros((), dtype=torch.float64, device=device)
        return self.numbers[name]

    def forget(self, name: str) -> bool:
        """Let what has this name begin anew; returns whether it was there."""
        buffers = [bucket.members[name] for bucket in self._buckets if name in bucket.members]
        for buffer in buffers:
            buffer.clear()
        return bool(buffers)

    def waiting(self, name: str) -> list[Tensor]:
        """What has this name of parameters that are in no bucket."""
        return [entry[name] for entry in self._outside.values() if name in entry]

    def values(self) -> Values:
        """All that is kept of parameters: windows of the buffers, and what waits."""
        there = {param: dict(entry) for param, entry in self._outside.items()}
        for bucket in self._buckets:
            for name, buffer in bucket.members.items():
                for slot, window, present in zip(
                    bucket.slots, buffer.windows, buffer.present, strict=True
                ):
                    if present:
                        there.setdefault(slot.param, {})[name] = window
        return there


def put_in(state_dict: dict[str, Any], params: Sequence[Tensor], members: MemberState) -> None:
    """Put what the members keep into a checkpoint, besides the base optimizer's state.

    Numbers are with the first parameter. A base optimizer whose checkpoints are not of torch's form
    gets nothing: after loading one, all begins anew.
    """
    keys = _keys_of(state_dict)
    if not keys or len(keys) != len(params):
        return
    values = members.values()
    entries = [values.get(param, {}) for param in params]
    entries[0] = {**entries[0], **members.numbers}
    state = state_dict["state"]
    ours: dict[Any, dict[str, Any]] = {}
    for key, entry in zip(keys, entries, strict=True):
        if entry and key not in ours:  # it may be listed twice, until the next step
            ours[key] = {**state.get(key, {}), **entry}
    state_dict["state"] = {**state, **ours}


def take_out(
    state_dict: dict[str, Any], params: Sequence[Tensor]
) -> tuple[Values, dict[str, Tensor]]:
    """Take out of a checkpoint what ``put_in`` has put in: that of parameters, and the numbers.

    Raises:
        ValueError: something does not fit its parameter.
    """
    values: Values = {}
    numbers: dict[str, Tensor] = {}
    names = {*MEMBER_STATES, *MEMBER_NUMBERS}
    state = state_dict.get("state", {})
    left = {}
    for i, (key, param) in enumerate(zip(_keys_of(state_dict), params, strict=False)):
        entry = state.get(key)
        if not isinstance(entry, dict) or names.isdisjoint(entry):
            continue
        left[key] = {name: value for name, value in entry.items() if name not in names}
        for name in names & entry.keys():
            shape = param.shape if name in MEMBER_STATES else torch.Size()
            _check(name, entry[name], shape, param, i)
            (values.setdefault(param, {}) if name in MEMBER_STATES else numbers)[name] = entry[name]
    if left:
        # An entry that holds nothing else was not the base optimizer's.
        rest = {**state, **left}
        state_dict["state"] = {k: v for k, v in rest.items() if k not in left or v}
    return values, numbers


def _keys_of(state_dict: Mapping[str, Any]) -> list[Any]:
    """What stands for the parameters in a checkpoint, if it is of torch's form."""
    groups = state_dict.get("param_groups")
    if not isinstance(state_dict.get("state"), dict) or not isinstance(groups, list):
        return []
    if not all(isinstance(group, dict) and "params" in group for group in groups):
        return []
    return [key for group in groups for key in group["params"]]


def _check(name: str, value: Any, shape: torch.Size, param: Tensor, index: int) -> None:
    what = f"{name!r} of parameter {index}, which has shape {tuple(param.shape)},"
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is a {type(value).__name__}, not a tensor")
    remedy = "remove it from the checkpoint, and it begins anew"
    if value.shape != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}; {remedy}")
    if value.is_complex() and not param.is_complex():
        raise ValueError(f"{what} is complex, and the parameter is real; {remedy}")
    if value.layout is not torch.strided or value.is_meta or not has_memory(value):
        raise ValueError(f"{what} has no memory that can be read; {remedy}")
