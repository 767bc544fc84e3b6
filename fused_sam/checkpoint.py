"""What is kept of an optimizer: ``state_dict``, pickling and copying."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_members
from .facts import Facts
from .following import Following
from .memory.members import put_in, take_out
from .memory.state import check_states
from .modes import working
from .options import MISSED, OPTIONS
from .rules import RULES, check_options


class Checkpointing(Following):
    """The part of ``FusedSAM`` that saves and loads."""

    @abstractmethod
    def restore(self) -> None:
        """Return."""

    @abstractmethod
    def _go_back(self) -> None:
        """Return to w, unless that would undo what somebody has written."""

    def state_dict(self) -> dict[str, Any]:
        """As the base optimizer's, with the ascent options in the groups; each loads the other's.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._be_at_w("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state: dict[str, Any] = self.base_optimizer.state_dict()  # which may be of its own kind
        put_in(state, self._all_params(), self._facts.engine.layout.members)
        self._put_missed_in(state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of FusedSAM, of the base optimizer's class, or of davda54/sam.

        Ascent options that it lacks stay as they are; those that it has replace the constructor's,
        as its learning rate does. With a warning if that makes it another ascent or blend.

        Raises:
            RuntimeError: the weights are perturbed.
            ValueError: the groups or the state do not fit, or are those of another class; the
                optimizer is as it was.
        """
        self._be_at_w("load_state_dict()")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state = state_dict.get("state")
        if isinstance(state, dict):
            state_dict["state"] = _without_old_weights(state)
        missed = self._take_missed_out(state_dict)
        members = take_out(state_dict, self._all_params())
        names = (*OPTIONS, *self.when.memory)
        kept = [{name: group[name] for name in names} for group in self.param_groups]
        base, rule = self.base_optimizer, RULES.get(type(self.base_optimizer))
        known = base.param_groups
        before = {"state": base.state, "param_groups": known}
        try:
            base.load_state_dict(state_dict)
            if rule is not None:  # else the base optimizer knows what it loads
                self._keep_wide(state_dict)
            for group, options in zip(base.param_groups, kept, strict=False):
                for name, value in options.items():
                    group.setdefault(name, value)
            if rule is not None:
                for group in base.param_groups:
                    check_options(rule, group)
            check_members(rule, base.param_groups, base, self._when)
            check_states(rule, base.param_groups, base.state)
        except BaseException as error:
            if rule is not None:
                base.__dict__.update(before)
            if isinstance(error, KeyError):
                raise ValueError(
                    f"the checkpoint is not one of {type(base).__name__}, it lacks {error}"
                ) from error
            raise
        self._facts.missed = missed
        self._facts.engine.layout.members.adopt(*members)
        _warn_of_others(kept, base.param_groups)
        if self._facts.captures.have_seen(self._facts.engine.layout):
            with working():
                self._load_into_graphs(known)
        for load_hook in self._optimizer_load_state_dict_post_hooks.values():
            load_hook(self)

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _put_missed_in(self, state_dict: dict[str, Any]) -> None:
        """Put into a checkpoint of torch's form which parameters stay at w in a one-pass member."""
        missed = set(map(id, self._facts.missed))
        if missed and isinstance(state_dict.get("param_groups"), list):
            state_dict["param_groups"] = [
                {**saved, MISSED: [i for i, p in enumerate(group["params"]) if id(p) in missed]}
                for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True)
            ]

    def _take_missed_out(self, state_dict: dict[str, Any]) -> list[Tensor]:
        """Take out of a checkpoint what ``_put_missed_in`` has put in."""
        groups = state_dict.get("param_groups")
        if not isinstance(groups, list) or not all([isinstance(g, dict) for g in groups]):
            return []
        missed = [
            group["params"][i]
            for saved, group in zip(groups, self.param_groups, strict=False)
            for i in saved.get(MISSED, ())
            if i < len(group["params"])
        ]
        state_dict["param_groups"] = [
            {name: value for name, value in saved.items() if name != MISSED} for saved in groups
        ]
        return missed

    def _keep_wide(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what torch's own loading has rounded: it casts state to its parameter's dtype.

        Args:
            state_dict: the checkpoint, which has been loaded.
        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, param in zip(keys, self._all_params(), strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if (
                    isinstance(value, Tensor)
                    and value.dtype.itemsize > param.dtype.itemsize
                    and self.state[param][name].dtype == param.dtype
                ):
                    self.state[param][name] = value.to(param.device, copy=True)

    def _load_into_graphs(self, known: list[dict[str, Any]]) -> None:
        """Put what was loaded where captured graphs read it: a replay asks nobody.

        Args:
            known: the groups before the loading. A graph asks them for their numbers, and reads
                learning rates that are tensors.
        """
        for group, old in zip(self.param_groups, known, strict=True):
            lr = old.get("lr")
            if isinstance(lr, Tensor):
                loaded = torch.as_tensor(group["lr"], device=lr.device)
                group["lr"] = lr.copy_(loaded.reshape(lr.shape))
            old.clear()
            old.update(group)
        self.param_groups = known
        self._refresh()
        engine = self._facts.engine
        buffers = [buffer for b in engine.buckets for buffer in b.states.values()]
        had = [(buffer, i) for buffer in buffers for i, has in enumerate(buffer.present) if has]
        engine.layout.states.adopt(self.state, self.param_groups)
        if not all([buffer.present[i] for buffer, i in had]):
            self._facts.captures.outdate(
                "load_state_dict() took away state that a replay goes on with"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and deepcopy keep; the layout is built anew from it."""
        self._refuse_perturbed("pickling or copying")
        keys = ("base_optimizer", "defaults", "_when", "_backend_name", "_master_weights")
        members = self._facts.engine.layout.members
        return {
            **{key: getattr(self, key) for key in keys},
            # A deepcopy of the model in the same call finds its way to the copy of this one.
            "_attached": self._facts.attached,
            "_members": (members.values(), members.numbers),
            "_missed": self._facts.missed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Used by construction and unpickling."""
        attached, members = state.pop("_attached", None), state.pop("_members", ({}, {}))
        missed = state.pop("_missed", [])
        self._facts = Facts(self, attached)
        self._facts.missed = missed
        super().__setstate__(state)
        self._facts.engine.layout.members.adopt(*members)  # which the first layout takes over

    def _be_at_w(self, what: str) -> None:
        """Be at w for who reads or writes the weights, or what belongs to them.

        With an attached model Momentum-SAM goes there by itself, as its next forward goes ahead.
        """
        facts = self._facts
        comes_and_goes = facts.attached.model is not None and self._follows() is not None
        if comes_and_goes and facts.perturbed and not facts.between:
            self._go_back()
        self._refuse_perturbed(what)

    def _refuse_perturbed(self, what: str) -> None:
        if self._facts.perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed would take w + epsilon for w; "
                f"call second_step() or restore() first; with ascent=MSAM() optimizer.eval()"
            )


def _warn_of_others(
    before: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Warn if a checkpoint has made another method of the optimizer than it was."""
    for name in ("ascent", "blend"):
        pairs = [(old[name], new[name]) for old, new in zip(before, groups, strict=True)]
        old, new = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
        if old != new:
            warnings.warn(
                f"the checkpoint has {name}={new!r}, which replaces this optimizer's {name}="
                f"{old!r}; to keep all options of now, learning rates among them, load its state "
                f"alone: optimizer.load_state_dict({{'state': checkpoint['state'], "
                f"'param_groups': optimizer.state_dict()['param_groups']}})",
                stacklevel=3,
            )


def _without_old_weights(state: dict[Any, Any]) -> dict[Any, Any]:
    """davda54/sam keeps the saved weights in its state, as ``old_p``, and nothing else."""
    return {
        key: {k: v for k, v in entry.items() if k != "old_p"}
        if isinstance(entry, dict) and "old_p" in entry
        else entry
        for key, entry in state.items()
        if not (isinstance(entry, dict) and entry.keys() == {"old_p"})
    }
