"""FusedSAM: the two steps of Sharpness-Aware Minimization around any ``torch.optim`` optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .ascents import SQUARES, Choice, chosen
from .blends import PLAIN
from .checks import (
    as_groups,
    check_base,
    check_caller,
    check_defaults,
    check_groups,
    check_keywords,
    keep_each_once,
)
from .choice import with_defaults
from .compiling import prepare
from .gradients import are_fresh, are_there, mark_used, pairs_of, put_aside, put_back
from .memory import Gradients
from .modes import working
from .options import ADAPTIVE, ASCENT, CLIMBS, ETA, RHO, check_max_grad_norm, check_values
from .passes import Passes
from .scaling import clip_scale, found_nonfinite
from .schedule import Always, When, check_when

Closure = Callable[[], Any]


class FusedSAM(Passes):
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021) with everything around it fused.

    One step: with the gradient g at the weights w, climb to ``w + rho * g / ||g||`` (one norm over
    all parameters), take the gradient g' there, return to w bit for bit, and let the base optimizer
    step with g'. With ``adaptive=True`` (ASAM, Kwon et al., ICML 2021) the climb is
    ``rho * T**2 * g / ||T * g||`` with ``T = |w| + eta``.

    Two styles::

        loss_fn(model(x), y).backward()         loss = optimizer.step(closure)
        optimizer.first_step(zero_grad=True)
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    Construction moves the parameters into flat buffers; each stays a tensor with shape, strides and
    a storage of its own. Memory beyond the base optimizer's: one copy of the parameters.

    A CUDA graph can hold a step, with torch 2.11 or later, if one ran before the capture. It keeps
    the groups' numbers as they were then, and follows a learning rate that is a tensor on the GPU.
    What it has seen stays allocated as long as the optimizer; if parameters are added or moved, the
    next step raises once, and the graph must be captured again.

    Args:
        params: parameters or parameter groups, as for any ``torch.optim`` optimizer. A group may
            set ``rho``, ``adaptive``, ``eta`` and ``ascent`` for itself.
        base_optimizer: the class that steps. Those of ``fused_sam.rules.RULES`` are fused; any
            other class steps by itself, between a fused climb and a fused return.
        rho: radius of the neighbourhood, finite and >= 0, in the units of the weights' L2 norm.
        adaptive: ASAM instead of SAM.
        eta: ASAM's offset, finite and >= 0.
        ascent: which climb, a member of ``fused_sam.ascents``. None: these parameters take no part
            in the climb, neither in the norm, and step all the same. That is for some of the
            groups: SAM-ON (Mueller et al. 2023) leaves it to the layers that normalise.
        max_grad_norm: clip the second gradient to this L2 norm, as
            ``torch.nn.utils.clip_grad_norm_`` does.
        backend: ``"auto"`` or the name of one; ``optimizer.backend`` tells which runs.
        model: the module that training calls; see ``attach``.
        when: which steps climb, of ``fused_sam.schedule``; the others are the base optimizer's own,
            with one pass if the loop asks what ``first_step`` returned.
        **base_kwargs: options of the base optimizer (lr, momentum, weight_decay, ...).

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it and the remedy. The
            weights are untouched.

    Attributes:
        base_optimizer: the optimizer inside. Its ``param_groups`` and ``state`` are the very
            objects of this one, and its schedulers and hooks work.
    """

    # GradScaler then calls step() in every case and hands over grad_scale and found_inf: so that
    # the weights return to w even when the update is skipped, and nobody waits for the device.
    _step_supports_amp_scaling = True

    max_grad_norm: float | None

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = RHO.default,
        adaptive: bool = ADAPTIVE.default,
        *,
        eta: float = ETA.default,
        ascent: Choice | str | None = ASCENT.default,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        model: nn.Module | None = None,
        when: When = Always(),  # noqa: B008
        **base_kwargs: Any,
    ) -> None:
        options = with_defaults(rho=rho, adaptive=adaptive, eta=eta, ascent=ascent)
        check_caller()
        check_base(base_optimizer)
        keywords = list(inspect.signature(FusedSAM).parameters)[:-1]  # the last is base_kwargs
        check_keywords(base_optimizer, base_kwargs, keywords)
        groups = as_groups(params)
        check_groups([{**options, **base_kwargs, **group} for group in groups])
        for group in groups:
            keep_each_once([group])  # in two groups it is an error of torch's
        base = base_optimizer(groups, **base_kwargs)
        self._init(base, options, max_grad_norm, backend, model, when)

    @classmethod
    def wrap(
        cls,
        optimizer: Optimizer,
        rho: float = RHO.default,
        adaptive: bool = ADAPTIVE.default,
        *,
        eta: float = ETA.default,
        ascent: Choice | str | None = ASCENT.default,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        model: nn.Module | None = None,
        when: When = Always(),  # noqa: B008
    ) -> FusedSAM:
        """Put SAM around an optimizer that exists already (from timm, Hugging Face, ...).

        Its state is kept, its groups become this optimizer's groups. Arguments as for the class.
        """
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, FusedSAM):
            raise TypeError(
                f"FusedSAM.wrap takes a torch.optim.Optimizer that is not a FusedSAM, "
                f"got {type(optimizer).__name__}"
            )
        options = with_defaults(rho=rho, adaptive=adaptive, eta=eta, ascent=ascent)
        check_base(type(optimizer))
        check_groups([{**options, **group} for group in optimizer.param_groups])
        self = cls.__new__(cls)
        self._init(optimizer, options, max_grad_norm, backend, model, when)
        return self

    def _init(
        self,
        base: Optimizer,
        options: dict[str, Any],
        max_grad_norm: float | None,
        backend: str,
        model: nn.Module | None,
        when: When,
    ) -> None:
        check_max_grad_norm(max_grad_norm)
        check_when(when)
        check_defaults(base)
        # Groups and state live in the base optimizer. Of Optimizer.__init__ only the hooks are
        # left to set up, which is what unpickling one does.
        self.__setstate__(
            {
                "base_optimizer": base,
                "defaults": {**base.defaults, **options},
                "max_grad_norm": max_grad_norm,
                "_when": when,
                "_backend_name": backend,
            }
        )
        self._build()
        prepare()
        if model is not None:
            self.attach(model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any optimizer; it may set rho, adaptive and eta for itself.

        Raises:
            TypeError, ValueError: the group cannot be used; the optimizer is as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict with 'params', got {param_group!r}")
        (param_group,) = as_groups([param_group])
        check_groups([{**self.defaults, **group} for group in (*self.param_groups, param_group)])
        keep_each_once([param_group])
        self.base_optimizer.add_param_group(param_group)
        self._fill_groups()
        if self._facts.engine.layout.begins_with_state:
            self._refresh()  # which makes it

    # ------------------------------------------------------------------------------ the two steps

    @property
    def is_perturbed(self) -> bool:
        """Whether the parameters hold ``w + epsilon``: between first_step and second_step."""
        return self._facts.perturbed

    @property
    def grad_norm(self) -> Tensor:
        """The last first_step's global gradient norm, () on the first parameter's device.

        With ``adaptive`` it is ``||T g||``. Under a GradScaler it is that of the scaled gradients.
        Not finite, or zero: nothing was perturbed.
        """
        facts = self._facts
        if facts.total is None:
            raise RuntimeError("grad_norm is known after the first first_step() or step(closure)")
        return facts.engine.number(facts.total).sqrt()

    @property
    def backend(self) -> str:
        """The name of the backend that runs; several devices may have several, joined by "+"."""
        if not self._facts.engine.backends:
            self._refresh()
        names = [backend.name for backend in self._facts.engine.backends]
        return "+".join(dict.fromkeys(names))

    def first_step(self, zero_grad: bool = False, *, scaler: Any = None) -> bool:
        """Save the weights w and climb to ``w + epsilon`` with the gradients that are there.

        Unless ``when`` says that this step does not climb. Then the weights stay at w, and the
        gradients are kept for second_step(), which takes them if no others have come: a loop may
        leave out its second pass, or do it at w.

        Args:
            zero_grad: set the gradients to None afterwards.
            scaler: the GradScaler whose scale the gradients have; needed where their size matters,
                with ``when=AESAM(...)``.

        Returns:
            Whether the weights were perturbed.

        Raises:
            RuntimeError: the step is half done already; a gradient is sparse.
            TypeError, ValueError: a group's rho, adaptive or eta cannot be used.
        """
        return self._begin(zero_grad, None if scaler is None else scaler.get_scale())

    def _begin(self, zero_grad: bool, scale: float | None) -> bool:
        """The first half of a step; ``scale`` is the gradients' loss scale, None if it is 1."""
        if self._facts.between:
            raise RuntimeError(
                "first_step() was called twice; call second_step() after the second backward, "
                "or restore() to go back to w without an update"
            )
        facts = self._facts
        with working():
            grads = self._gradients()
            groups = self.param_groups
            for group in groups:
                check_values(group)
            ascent = chosen(groups)
            facts.scale = scale
            facts.decision = self._when.decide(groups[0], lambda: self._sq_norm(grads))
            if not facts.decision.climbs:
                facts.begin_second()
                facts.aside = put_aside(groups) if zero_grad else pairs_of(groups)
                return False
            try:
                # From here on restore() is needed. Which weights are away the buckets know.
                facts.leave()
                number = self._count_climb()
                facts.total = facts.engine.climb(ascent, grads, groups, number)
            except BaseException:
                self.restore()
                raise
        if zero_grad:
            self.zero_grad()
        return True

    def _closure_scale(self) -> float | None:
        """The loss scale that ``scaler.step(optimizer, closure)`` tells, where it is asked for."""
        if not (self._when.needs_norm and self._is_scaled()):
            return None
        return float(self.__dict__["grad_scale"])

    def _is_scaled(self) -> bool:
        """Whether a GradScaler has said that the gradients are scaled."""
        return getattr(self, "grad_scale", None) is not None

    def _sq_norm(self, grads: Sequence[Gradients]) -> float:
        """The squared norm of the gradients at w, unscaled as far as is known."""
        total = self._facts.engine.reduce(SQUARES, grads, self.param_groups)
        return total.item() / (self._facts.scale or 1.0) ** 2

    @Optimizer.profile_hook_step
    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and step with the gradients that are there; without first_step, a plain step.

        A parameter that has no gradient now is returned to w and not stepped.

        Args:
            zero_grad: set the gradients to None afterwards.

        Raises:
            RuntimeError: a gradient is sparse; nothing was changed, and restore() goes back to w.
        """
        self._descend(zero_grad=zero_grad)

    def step(self, closure: Closure | None = None) -> Any:
        """A whole SAM step with ``closure``; without one, the second half of a step.

        Args:
            closure: computes the loss, calls backward and returns the loss. If gradients of w are
                there already it runs once, at ``w + epsilon``. If there are none, or only those
                that the last step has used, it runs twice, first at w. It runs with gradients
                enabled. If it raises, the weights return to w.

        Returns:
            The closure's first value if it ran at w, else None.

        Raises:
            RuntimeError: there is neither a closure nor a first_step() before; or a closure comes
                between the two steps, or after ``GradScaler.unscale_``.
        """
        if closure is None:
            if not self._facts.between:
                raise RuntimeError(
                    "step() without a closure is the second half of a SAM step and no first_step() "
                    "came before it: call first_step() and do a second backward, or pass a closure"
                )
            self._descend()
            return None
        if self._facts.between:
            raise RuntimeError(
                "step(closure) was called between first_step() and second_step(): finish with "
                "second_step(), or go back with restore()"
            )
        scaled = hasattr(self, "found_inf")
        if scaled and getattr(self, "grad_scale", None) is None:
            raise RuntimeError(
                "scaler.step(optimizer, closure) after scaler.unscale_(optimizer): the closure's "
                "gradients would still be scaled, by a factor unknown to the optimizer; leave it "
                "out (to clip, pass max_grad_norm=... to FusedSAM)"
            )
        loss, found_inf, theirs = None, getattr(self, "found_inf", None), True
        try:
            attached = self._facts.attached.model is not None
            twice = not are_fresh(self.param_groups)
            if twice:
                theirs = False
                self.zero_grad()
                with torch.enable_grad(), self.first_pass() if attached else nullcontext():
                    loss = closure()
                found_inf = None  # the scaler looked at gradients that are gone now
            climbs = self._begin(zero_grad=False, scale=self._closure_scale())
            theirs = False
            if climbs:
                self.zero_grad()
                both = twice and attached
                with torch.enable_grad(), self.second_pass() if both else nullcontext():
                    closure()
            self._descend(found_inf, check_finite=scaled)
        except BaseException:
            self.restore()
            if not theirs:
                self.zero_grad()  # or half a gradient would be taken for that of w
            # What a GradScaler has set it takes back only after a step that returns.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return loss

    def restore(self) -> None:
        """Return the parameters to w without an update; does nothing if they are there.

        Nothing is checked before: whatever has become of a parameter since, or of the groups and
        the state, all others return. One that was moved or converted gets its w where it is now.

        Raises:
            RuntimeError: parameters cannot hold their w any more, for their shape has changed, say.
                It names them, once: they stay as they are, and the optimizer goes on.
        """
        facts = self._facts
        if not facts.perturbed:
            facts.arrive()
            return
        with working():
            lost = facts.engine.restore()
        facts.arrive()
        if lost:
            raise RuntimeError(
                f"all parameters are back at w, except for those that changed between the two "
                f"steps so that they cannot hold it: {'; '.join(lost)}. These stay as they are"
            )
        facts.captures.complain()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to None, or to zero."""
        if set_to_none:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            super().zero_grad(set_to_none)
            mark_used(self.param_groups)  # zeros are no fresh gradients

    # ----------------------------------------------------------------------------------- internals

    def _count_climb(self) -> int:
        """The number of the climb that begins; the first group keeps it, as a checkpoint must."""
        first = self.param_groups[0]
        first[CLIMBS] = first.get(CLIMBS, 0) + 1
        number: int = first[CLIMBS]
        return number

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
        if facts.between:
            self._refuse_unknown_scale()
        there = are_there(self.param_groups)
        if facts.perturbed and there:
            facts.record.check_complete()
        if facts.aside and not there:
            put_back(facts.aside)
        between, memory = facts.between, facts.decision.memory
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None) if not check_finite else found_inf
        if not isinstance(found_inf, Tensor):
            found_inf = None  # a GradScaler that saw no gradient at all sets the number 0
        if base._optimizer_step_pre_hooks:
            self.restore()  # they expect to see w
            for pre_hook in list(base._optimizer_step_pre_hooks.values()):
                pre_hook(base, (), {})
        if self.max_grad_norm is not None:
            check_max_grad_norm(self.max_grad_norm)
        with working():
            grads = self._gradients()
            engine, groups = self._facts.engine, self.param_groups
            if check_finite or self.max_grad_norm is not None:
                sq_norm = engine.number(engine.reduce(SQUARES, grads, groups))
                if check_finite:
                    climbed, total = self._facts.perturbed, self._facts.total
                    first = engine.number(total) if climbed and total is not None else sq_norm
                    found_inf = found_nonfinite(first, sq_norm, found_inf)
                if self.max_grad_norm is not None:
                    grad_scale = clip_scale(sq_norm.sqrt(), self.max_grad_norm, grad_scale)
            if engine.layout.rule is not None:
                engine.update(PLAIN, grads, groups, self.state, grad_scale, found_inf)
                facts.perturbed = False
            else:
                self._step_base(grad_scale, found_inf)
        facts.arrive()
        for group in self.param_groups if between else ():
            group.update(memory)
        for post_hook in list(base._optimizer_step_post_hooks.values()):
            post_hook(base, (), {})
        if zero_grad:
            self.zero_grad()
        else:
            mark_used(self.param_groups)
        # Learning-rate schedulers, of either optimizer, look for this.
        self._opt_called = base._opt_called = True  # type: ignore[attr-defined]

    def _refuse_unknown_scale(self) -> None:
        if self._when.needs_norm and self._is_scaled() and self._facts.scale is None:
            self.restore()
            raise RuntimeError(
                f"{self._when} judges the size of the gradients at w, and their loss scale was not "
                f"told: call first_step(scaler=scaler)"
            )

    def _step_base(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Return to w and let a base optimizer that has no rule step by itself."""
        self.restore()
        # Only here the host has to wait: the base optimizer cannot be told to skip on the device.
        if found_inf is not None and found_inf.item() != 0:
            return
        if grad_scale is not None:
            self._facts.engine.blend(PLAIN, grad_scale)
        # Without torch's wrapper, which would run the global step hooks a second time.
        step = type(self.base_optimizer).step
        step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
        step(self.base_optimizer)
