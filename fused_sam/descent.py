"""The second half of a step: back to w, and the step of the base optimizer."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .ascents import SQUARES
from .blends import Blend, Blending
from .caches import forget_copies
from .compiling import WRITES, opaque
from .facts import Facts
from .gradients import are_others, are_there, mark_used, put_back
from .laststep import LastStep
from .memory import Gradients
from .memory.members import AVERAGE
from .modes import working
from .onepass import OnePass
from .recording import followed, recording
from .rules import check_options
from .scaling import clip_scale, found_nonfinite


class Descent(OnePass):
    """The part of ``FusedSAM`` that returns and updates."""

    # GradScaler then calls step() in every case and hands over grad_scale and found_inf: so that
    # the weights return to w even when the update is skipped, and nobody waits for the device.
    _step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Used by construction and unpickling."""
        super().__setstate__(state)
        hooks = _hooks(self.base_optimizer, "pre")
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Guard)]:
            del hooks[key]
        if hasattr(self.base_optimizer, "_optimizer_step_pre_hooks"):
            self.base_optimizer.register_step_pre_hook(_Guard(self._facts))

    @property
    def last_step(self) -> LastStep:
        """What the last step that was finished knows about itself; see ``LastStep``.

        A step that was given up with restore() does not count. Nothing of it is in checkpoints.
        """
        return self._facts.last

    @property
    def measures(self) -> bool:
        """Whether steps find out all that ``last_step`` tells, from the next climb on.

        A climb then keeps the gradients at w, as it does for a blend, and one more reduction
        compares them with the second ones: 3 more accesses of each parameter in a step of two
        passes (1 in others), and one more copy of the parameters, which stays allocated. With a
        blend there is nothing to add. To look at every 100th step only, set it before each step:
        ``optimizer.measures = i % 100 == 0``. The step itself has the same bits.
        """
        return self._facts.measures

    @measures.setter
    def measures(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"measures must be True or False, got {value!r}")
        self._facts.measures = value

    @opaque(WRITES)
    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and step with the gradients that are there.

        A parameter that has no gradient now returns to w and is not stepped. If first_step() did
        not climb, and no gradients are there, those that it kept are used. Without a first_step()
        before, it is a step of the base optimizer. A framework's proxy of the optimizer goes
        through its own ``step()``, so that the framework knows.

        Args:
            zero_grad: set the gradients to None afterwards.

        Raises:
            RuntimeError: a gradient is sparse; nothing was changed, and restore() goes back to w.
        """
        facts = self._facts
        if facts.owner() is self:
            self._finish(zero_grad)
            return
        facts.finishing = True
        try:
            self.step()
        finally:
            facts.finishing = False
        if zero_grad:
            self.zero_grad()

    @Optimizer.profile_hook_step
    def _finish(self, zero_grad: bool) -> None:
        self._descend(zero_grad=zero_grad)

    def _descend(
        self,
        found_inf: Tensor | None = None,
        check_finite: bool = False,
        zero_grad: bool = False,
    ) -> None:
        """Return to w and update.

        Args:
            found_inf: overrides what a GradScaler has set.
            check_finite: skip the update also if a gradient of either pass is not finite.
            zero_grad: set the gradients to None afterwards.
        """
        base, facts = self.base_optimizer, self._facts
        climbed, between, memory = facts.perturbed, facts.between, facts.decision.memory
        groups = self.param_groups
        there = are_there(groups)
        if between:
            self._refuse_unknown_scale()
        ahead = self._follows()
        blend = facts.blend if between and ahead is None else None
        keeps = facts.keeps and climbed and ahead is None
        if ahead is not None:
            self._check_ahead()
        else:
            self._check_second(blend, there)
        away = facts.perturbed
        if facts.aside and not there:
            put_back(facts.aside)
        max_grad_norm = self.max_grad_norm
        handed = facts.scaler.handed
        grad_scale = loss_scale = handed.get("grad_scale")
        # Before anything arrives at w, which forgets them.
        first, inverse, losses = facts.first, facts.scaler.inverse, facts.losses
        first_scale = facts.scale if between and loss_scale is None else loss_scale
        found_inf = found_inf if check_finite else handed.get("found_inf")
        if not isinstance(found_inf, Tensor):
            found_inf = None  # a GradScaler that saw no gradient at all sets the number 0
        if (graph := recording()) is not None:
            found_inf = graph.skip if found_inf is None else found_inf + graph.skip
        pre_hooks = [h for h in _hooks(base, "pre").values() if not isinstance(h, _Guard)]
        if pre_hooks:
            self.restore()  # they expect to see w
            for pre_hook in pre_hooks:
                pre_hook(base, (), {})
        with working():
            grads = self._gradients()
            engine, groups = facts.engine, base.param_groups  # which a hook may replace
            if (rule := engine.layout.rule) is not None:
                for group in groups:
                    check_options(rule, group)
            gram = engine.gram(grads, groups) if keeps else None
            blending = None
            if blend is not None and blend.reuses:
                clips = max_grad_norm is not None
                blending = engine.reusing(blend, grads, groups, clips)
            elif blend is not None and gram is not None:
                blending = Blending(blend, gram, grad_scale, gram)
            square = None
            if check_finite or max_grad_norm is not None:
                square = engine.reduce(SQUARES, grads, groups)
                sq_norm = engine.number(square)
                if check_finite:
                    total = facts.total if climbed else None
                    before = sq_norm if total is None else engine.number(total.sum())
                    found_inf = found_nonfinite(before, sq_norm, found_inf)
                if max_grad_norm is not None:
                    (limit,) = followed(lambda: (self.max_grad_norm or 0.0,), sq_norm.dtype)
                    if blending is not None:
                        others = engine.square_of_others(grads, groups)
                        sq_norm = blending.sq_norm(sq_norm, groups, others)
                    grad_scale = clip_scale(sq_norm.sqrt(), limit, grad_scale)
            if blending is not None and blending.blend.reuses:
                square = blending.numbers
            elif gram is None:
                square = self._square_of_climbing(square, grads)
            if rule is not None:
                args = blending, grads, groups, self.state, grad_scale, found_inf
                update = functools.partial(engine.update, *args)
                if ahead is not None:
                    self._step_ahead(ahead, grads, update)
                else:
                    update()
                    facts.perturbed = False
            else:
                self._step_base(blending, grad_scale, found_inf)
        facts.arrive(ahead=facts.perturbed)
        facts.last = LastStep.of(
            climbed=away,
            first=first,
            first_scale=first_scale,
            inverse=inverse,
            gram=gram,
            used=square,
            scale=loss_scale,
            losses=losses,
            dtype=engine.wide,
        )
        forget_copies()
        for group in groups if between else ():
            group.update(memory)
        for post_hook in list(_hooks(base, "post").values()):
            post_hook(base, (), {})
        if zero_grad:
            self.zero_grad()
        else:
            mark_used(groups)
        # Learning-rate schedulers, of either optimizer, look for this.
        for optimizer in (self, facts.owner(), base):
            optimizer._opt_called = True  # type: ignore[union-attr]

    def _check_second(self, blend: Blend | None, there: bool) -> None:
        """Raise unless the gradients are such as the second half of a step may use.

        Args:
            blend: what the step blends.
            there: whether there are any.
        """
        facts = self._facts
        if facts.perturbed:
            facts.scaler.check_descent()
            if blend is not None:
                facts.scaler.check_blend(blend.key)
            if there:
                facts.record.check_complete()
        elif are_others(self.param_groups, facts.aside):
            facts.scaler.check_descent()

    def _square_of_climbing(
        self, square: Tensor | None, grads: Sequence[Gradients]
    ) -> Tensor | None:
        """The squared norm of the gradients of the groups that climb, if it is known or wanted.

        Args:
            square: that of all groups, if it is known.
            grads: of all groups.
        """
        facts, groups = self._facts, self.param_groups
        if square is not None and all([group["ascent"] is not None for group in groups]):
            return square
        if not facts.measures:
            return None
        return facts.engine.reduce(SQUARES, facts.engine.climbing(grads, groups), groups)

    def _refuse_unknown_scale(self) -> None:
        facts = self._facts
        if facts.scale_matters and self._is_scaled() and facts.scale is None:
            self.restore()
            forgot = facts.engine.layout.members.forget(AVERAGE)  # it took scaled gradients in
            raise RuntimeError(
                f"the step depends on the size of the gradients at w (ascent="
                f"{self.param_groups[0]['ascent']!r}, when={self.when}), and first_step() was not "
                f"told their loss scale: call first_step(scaler=scaler)"
                f"{'. The averages that it has spoilt begin anew' if forgot else ''}"
            )

    def _step_base(
        self, blending: Blending | None, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Return to w and let a base optimizer that has no rule step by itself."""
        self.restore()
        # Only here the host has to wait: the base optimizer cannot be told to skip on the device.
        if found_inf is not None and found_inf.item() != 0:
            return
        engine = self._facts.engine
        if grad_scale is not None or blending is not None:
            engine.blend(blending, self.param_groups, grad_scale)
        subtracts = blending is not None and blending.blend.after
        if subtracts:
            # The step may change its learning rate, or take its gradients away.
            groups = [{**group} for group in self.param_groups]
            stepped = [[p.grad is not None for p in bucket.params] for bucket in engine.buckets]
        # Without torch's wrapper, which would run the global step hooks a second time.
        step = type(self.base_optimizer).step
        step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
        step(self.base_optimizer)
        if subtracts:
            engine.after(stepped, groups)

    @torch.no_grad()
    def _initialize_state(self) -> None:
        """A base step that makes state and keeps the weights' bits.

        Checkpoint libraries ask for it, with zero gradients and every learning rate 0.
        """
        if self._follows() is not None:
            # Its base optimizers keep the bits. Real gradients, at the start of a warmup, have
            # made momentum to go ahead by.
            self._descend()
            total = self._facts.total
            if total is None or total.item() == 0:
                self.restore()
            return
        weights = [(p, p.detach().clone()) for g in self.param_groups for p in g["params"]]
        self._descend()
        self._facts.engine.begin_members(self.param_groups)
        for param, weight in weights:
            param.copy_(weight)

    def _wants_only_state(self) -> bool:
        """Whether nothing but state can come of a step: there is none, and every lr is 0."""
        rates = [group.get("lr") for group in self.param_groups]
        numbers = [r for r in rates if not (isinstance(r, Tensor) and r.device.type != "cpu")]
        return not self.state and len(numbers) == len(rates) and all(r == 0 for r in numbers)


def _hooks(base: Optimizer, when: str) -> dict[int, Any]:
    """The step hooks of a base optimizer, which may not have called Optimizer.__init__."""
    hooks: dict[int, Any] = getattr(base, f"_optimizer_step_{when}_hooks", {})
    return hooks


class _Guard:
    """A hook of the base optimizer, which must not step from w + epsilon by itself."""

    def __init__(self, facts: Facts) -> None:
        self._facts = weakref.ref(facts)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        facts = self._facts()
        if facts is not None and facts.perturbed:
            raise RuntimeError(
                "base_optimizer.step() was called between first_step() and second_step(), and "
                "would start from w + epsilon: call second_step() of the FusedSAM, or restore()"
            )
