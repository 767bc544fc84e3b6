"""All buckets of an optimizer, and whether they still fit its parameter groups."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..rules import Rule
from .bucket import Bucket
from .gradients import same_kind
from .members import MemberState
from .state import State, StateView, check_states
from .window import gradient_dtype, must_stay, trains

_PARAMS = operator.itemgetter("params")
_REQUIRES_GRAD, _GRAD = map(operator.attrgetter, ("requires_grad", "grad"))


def members_of(
    groups: Sequence[Mapping[str, Any]], old: Layout | None = None
) -> list[tuple[Tensor, int]]:
    """The parameters that a layout takes in, each with the index of its group.

    Those that train. What an old layout took in and was frozen since stays, with its state, as long
    as it is still in the memory that this layout gave it.
    """
    known = {} if old is None else dict(zip(old.params, old.addresses, strict=True))
    return [
        (param, row)
        for row, group in enumerate(groups)
        for param in group["params"]
        if trains(param) or (param in known and param.data_ptr() == known[param])
    ]


class Layout:
    """All buckets of an optimizer, for its parameter groups as they are now.

    Only what trains is taken in: the others keep their memory, and nothing is kept for them.

    Args:
        groups: the parameter groups; those of their parameters that train move into flat buffers.
        rule: whose state the buckets hold, or None if the base optimizer keeps its own.
        state: the optimizer's state; what the rule knows of it moves into flat buffers too.
        old: the layout that this one replaces; saved weights of perturbed parameters pass over.
        masters: whether half-precision weights get float32 masters.

    Attributes:
        buckets: of the parameters that were taken in.
        params: those, group by group.
        frozen: the others.
        addresses: where the memory of those that were taken in begins.
        states: the rule's state, as the buckets hold it and as the optimizer shows it.
        members: what an ascent and a blend keep.
    """

    members: MemberState

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        rule: Rule | None = None,
        state: State | None = None,
        old: Layout | None = None,
        masters: bool = False,
    ) -> None:
        members = members_of(groups, old)
        carried, kept = old.release() if old is not None else ({}, {})
        check_states(rule, groups, {} if state is None else state)
        pinned = {p for p, _ in members if must_stay(p)}
        by_kind: dict[Any, list[tuple[Tensor, int]]] = {}
        for param, row in members:
            kind = param.device, param.dtype.to_real(), gradient_dtype(param).to_real()
            by_kind.setdefault(kind, []).append((param, row))
        self.rule = rule
        like_grad = [state.name for state in rule.states if state.like_grad] if rule else []
        self.buckets = [Bucket(bucket, pinned, like_grad, masters) for bucket in by_kind.values()]
        for bucket in self.buckets:
            bucket.move_in()
            bucket.carry(carried, kept)
        for param, saved in carried.items():
            param.data.copy_(saved)  # it left the groups while it was perturbed
        self._groups = [list(group["params"]) for group in groups]
        self.params = [param for param, _ in members]
        taken = set(self.params)
        self.frozen = [p for group in groups for p in group["params"] if p not in taken]
        self.addresses = list(map(Tensor.data_ptr, self.params))
        self._looks = list(map(_look, self.params))
        self._unchanged: Callable[..., bool] | None = None
        self.states = StateView(rule, self.buckets, {} if state is None else state, groups)
        known = {*self.params, *self.frozen}
        self.members = MemberState(self.buckets, known, None if old is None else old.members)

    @property
    def begins_with_state(self) -> bool:
        """Whether a new parameter has state before its first step."""
        return self.rule is not None and self.rule.from_construction

    def is_current(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every parameter is still the object and at the address that the layout knows.

        And whether those that were frozen still are.
        """
        return (
            len(groups) == len(self._groups)
            and all(map(_are_the_same, map(_PARAMS, groups), self._groups))
            and list(map(Tensor.data_ptr, self.params)) == self.addresses
            and not any(map(_REQUIRES_GRAD, self.frozen))
            and all(map(operator.is_, map(_GRAD, self.frozen), itertools.repeat(None)))
        )

    def has_its_looks(self) -> bool:
        """Whether what lies at the addresses of a current layout is still read in the same way."""
        if self._unchanged is not None and self._unchanged(*self.params):
            return True
        same = list(map(_look, self.params)) == self._looks
        self._unchanged = same_kind(self.params) if same else None
        return same

    def release(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Let go of the parameters' memory; return the saved weights of the perturbed ones.

        And what is kept of their gradients.

        Raises:
            ValueError: one of these cannot hold them any more.
        """
        carried, kept = {}, {}
        for bucket in self.buckets:
            bucket.settle()
            bucket.cache = {}  # a captured graph may keep what was in it
            flags = zip(bucket.slots, bucket.perturbed, bucket.held, strict=True)
            for slot, perturbed, held in flags:
                if perturbed:
                    if (why := slot.misfit()) is not None:
                        raise ValueError(
                            f"{why}, and has to return to its weights of before: restore() returns "
                            f"all others"
                        )
                    carried[slot.param] = slot.shaped(slot.of(bucket.saved))
                    if held and bucket.kept is not None:
                        kept[slot.param] = slot.shaped(slot.of(bucket.kept))
        return carried, kept


def _look(param: Tensor) -> tuple[Any, ...]:
    """All that can change about a parameter at its address."""
    return param.shape, param.stride(), param.dtype, param.is_conj(), param.is_neg()


def _are_the_same(params: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    return len(params) == len(known) and all(map(operator.is_, params, known))
