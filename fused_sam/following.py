"""An optimizer that follows its parameters: groups and state, and the engine built for them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.optim import Optimizer

from . import backends, blends
from .ascents import ASCENTS, Ascent
from .backends import capture
from .checks import check_groups, check_members, keep_each_once
from .engine import Engine
from .facts import Facts
from .gradients import are_there, put_back
from .memory import Gradients, Layout, Stale
from .memory.layout import members_of
from .modes import working
from .options import OPTIONS, to_numbers_
from .rules import RULES
from .schedule import Always, Every, When


class Following(Optimizer):
    """The part of ``FusedSAM`` that notices what changes under it.

    Groups and state are the base optimizer's own objects: there is one set of them for the two.
    """

    base_optimizer: Optimizer
    _when: When = Always()
    _backend_name: str
    _master_weights: bool
    _facts: Facts

    @property
    def when(self) -> When:
        """Which steps climb."""
        # Not the groups of this class, which ask who reads them.
        k = blends.period(self.base_optimizer.param_groups)
        return self._when if k is None else Every(k)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups; each has ``rho``, ``adaptive`` and ``eta`` too."""
        groups = self.base_optimizer.param_groups
        if not torch.compiler.is_compiling():
            facts = self._facts
            looks = facts.scaler.note(sys._getframe(1), facts.between)
            if looks and facts.aside and not are_there(groups):
                put_back(facts.aside)  # or a GradScaler would see no gradient, and check none
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state, with torch's names: ``state[p]["momentum_buffer"]``, ..."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    def _follows(self) -> Ascent | None:
        """The ascent, if it is one of one pass, which follows the momentum."""
        # Not those of this class, which ask who reads them: a forward reads these.
        for group in self.base_optimizer.param_groups:
            if group["ascent"] is not None:
                ascent = ASCENTS.get(group["ascent"])
                return ascent if ascent is not None and ascent.along_momentum else None
        return None

    def _fill_groups(self) -> None:
        for group in self.param_groups:
            for name in OPTIONS:
                group.setdefault(name, self.defaults[name])
            for name, value in self.when.memory.items():
                group.setdefault(name, self.param_groups[0].get(name, value))

    def _gradients(self) -> list[Gradients]:
        """The gradients of every bucket; raises, before any change, if one cannot be used.

        Or if a CUDA graph that is being captured, or was, would not do what a step does.
        """
        self._refresh()
        facts = self._facts
        try:
            grads = facts.engine.gradients()
        except Stale:
            self._build()
            grads = facts.engine.gradients()
        if any([capture.is_capturing(bucket.device) for bucket in facts.engine.buckets]):
            facts.captures.see(facts.engine.layout, grads, self.param_groups, self.state)
        else:
            facts.captures.complain()
        return grads

    def _refresh(self) -> None:
        """Notice what has changed under the optimizer: parameters, groups."""
        layout, groups = self._facts.engine.layout, self.base_optimizer.param_groups
        if not (layout.is_current(groups) and layout.has_its_looks()):
            self._build()

    def _build(self) -> None:
        with working():
            self._lay_out()

    def _lay_out(self) -> None:
        groups = self.param_groups
        for group in groups:
            to_numbers_(group)
        check_groups([{**self.defaults, **group} for group in groups])
        keep_each_once(groups)
        old = self._facts.engine.layout
        devices = {param.device for param, _ in members_of(groups, old)}
        for device in devices:
            capture.refuse_to_prepare(device, "the parameters have yet to move into flat buffers")
        by_device = {device: backends.resolve(self._backend_name, device) for device in devices}
        self._fill_groups()
        rule = RULES.get(type(self.base_optimizer))
        check_members(rule, groups, self.base_optimizer, self._when)
        if self._facts.captures.have_seen(old):
            self._facts.captures.outdate(
                "parameters were added, removed, thawed, moved or restrided: a replay reads and "
                "writes the old memory, which is kept, and does not train them"
            )
        facts = self._facts
        written = facts.versions != facts.writes()
        layout = Layout(groups, rule, self.state, old, self._master_weights)
        facts.engine = Engine(layout, [by_device[b.device] for b in layout.buckets])
        if not written:
            facts.versions = facts.writes()  # of other parameters, or in another order
