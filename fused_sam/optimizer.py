"""FusedSAM: the two steps of Sharpness-Aware Minimization around any ``torch.optim`` optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import blends
from .ascents import Choice
from .caches import forget_copies
from .checks import (
    as_groups,
    check_base,
    check_caller,
    check_clipping,
    check_defaults,
    check_groups,
    check_keywords,
    check_master_weights,
    keep_each_once,
    unfolded,
)
from .choice import with_defaults
from .compiling import WRITES, opaque, prepare
from .descent import Descent
from .gradients import are_fresh, are_there, mark_used
from .modes import working
from .options import ADAPTIVE, ASCENT, BLEND, ETA, MAX_GRAD_NORM, RHO, agreed_max_grad_norm, numbers
from .schedule import Always, When, check_when
from .ways import WAYS, refuse_framework

Closure = Callable[[], Any]


class FusedSAM(Descent):
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
        ascent: which climb, a member of ``fused_sam.ascents``. None, for some of the groups: they
            take no part in the climb or its norm, and step all the same (SAM-ON, Mueller et al.
            2023: only the layers that normalise climb).
        blend: which gradient the base optimizer sees, a member of ``fused_sam.blends``. None: the
            one at w + epsilon. A blend keeps the gradient at w: one more copy of the parameters.
        max_grad_norm: clip the gradient that the base optimizer sees to this L2 norm, as
            ``torch.nn.utils.clip_grad_norm_`` does. None: no clipping.
        backend: ``"auto"`` or the name of one; ``optimizer.backend`` tells which runs.
        model: the module that training calls; see ``attach``.
        when: which steps climb, a member of ``fused_sam.schedule``. The others are the base
            optimizer's own, with one pass if the loop asks what ``first_step`` returned.
        master_weights: keep a float32 copy of bfloat16 and float16 weights, and float32 state, so
            that small updates are not rounded away. The base optimizer must be one that is fused.
        **base_kwargs: options of the base optimizer (lr, momentum, weight_decay, ...).

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it and the remedy. The
            weights are untouched.

    Attributes:
        base_optimizer: the optimizer inside. Its ``param_groups`` and ``state`` are the very
            objects of this one, and its schedulers and hooks work.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = RHO.default,
        adaptive: bool = ADAPTIVE.default,
        *,
        eta: float = ETA.default,
        ascent: Choice | str | None = ASCENT.default,
        blend: blends.Choice | str | None = BLEND.default,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        model: nn.Module | None = None,
        when: When = Always(),  # noqa: B008
        master_weights: bool = False,
        **base_kwargs: Any,
    ) -> None:
        options = with_defaults(
            rho=rho,
            adaptive=adaptive,
            eta=eta,
            ascent=ascent,
            blend=blend,
            max_grad_norm=max_grad_norm,
        )
        check_caller()
        base_optimizer, base_kwargs = unfolded(base_optimizer, numbers(base_kwargs))
        check_base(base_optimizer)
        keywords = list(inspect.signature(FusedSAM).parameters)[:-1]  # the last is base_kwargs
        check_keywords(base_optimizer, base_kwargs, keywords)
        groups = [numbers(group) for group in as_groups(params)]
        check_groups([{**options, **base_kwargs, **group} for group in groups])
        agreed_max_grad_norm([{**options, **group} for group in groups])
        for group in groups:
            keep_each_once([group])  # in two groups it is an error of torch's
        base = base_optimizer(groups, **base_kwargs)
        self._init(base, options, backend, model, when, master_weights)

    @classmethod
    def wrap(
        cls,
        optimizer: Optimizer,
        rho: float = RHO.default,
        adaptive: bool = ADAPTIVE.default,
        *,
        eta: float = ETA.default,
        ascent: Choice | str | None = ASCENT.default,
        blend: blends.Choice | str | None = BLEND.default,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        model: nn.Module | None = None,
        when: When = Always(),  # noqa: B008
        master_weights: bool = False,
    ) -> FusedSAM:
        """Put SAM around an optimizer that exists already (from timm, Hugging Face, ...).

        Its state is kept, its groups become this optimizer's groups. Arguments as for the class.
        """
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, FusedSAM):
            raise TypeError(
                f"FusedSAM.wrap takes a torch.optim.Optimizer that is not a FusedSAM, "
                f"got {type(optimizer).__name__}"
            )
        options = with_defaults(
            rho=rho,
            adaptive=adaptive,
            eta=eta,
            ascent=ascent,
            blend=blend,
            max_grad_norm=max_grad_norm,
        )
        check_base(type(optimizer))
        groups = [{**options, **numbers(group)} for group in optimizer.param_groups]
        check_groups(groups)
        if MAX_GRAD_NORM.name not in optimizer.defaults:
            agreed_max_grad_norm(groups)
        self = cls.__new__(cls)
        self._init(optimizer, options, backend, model, when, master_weights)
        return self

    def _init(
        self,
        base: Optimizer,
        options: dict[str, Any],
        backend: str,
        model: nn.Module | None,
        when: When,
        master_weights: bool,
    ) -> None:
        check_master_weights(master_weights, type(base))
        check_when(when)
        check_defaults(base)
        check_clipping(base, options[MAX_GRAD_NORM.name])
        # Groups and state live in the base optimizer. Of Optimizer.__init__ only the hooks are
        # left to set up, which is what unpickling one does.
        self.__setstate__(
            {
                "base_optimizer": base,
                "defaults": {**options, **base.defaults},
                "_when": when,
                "_backend_name": backend,
                "_master_weights": master_weights,
            }
        )
        self._build()
        prepare()
        if model is not None:
            self.attach(model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any optimizer; it may set rho, adaptive, eta and ascent for itself.

        Raises:
            TypeError, ValueError: the group cannot be used; the optimizer is as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict with 'params', got {param_group!r}")
        (param_group,) = map(numbers, as_groups([param_group]))
        groups = [{**self.defaults, **group} for group in (*self.param_groups, param_group)]
        check_groups(groups)
        if MAX_GRAD_NORM.name not in self.base_optimizer.defaults:
            agreed_max_grad_norm(groups)
        keep_each_once([param_group])
        self.base_optimizer.add_param_group(param_group)
        self._fill_groups()
        if self._facts.engine.layout.begins_with_state:
            self._refresh()  # which makes it

    # ------------------------------------------------------------------------------ the two steps

    @property
    def is_perturbed(self) -> bool:
        """Whether the parameters are away from w: between the two steps; with MSAM in training."""
        return self._facts.perturbed

    @property
    def grad_norm(self) -> Tensor:
        """The norm by which the last climb went, (), on the first parameter's device.

        It is ``||g||`` over the groups that climb; with ``adaptive`` ``||T g||``, with ``PNorm(p)``
        the q-norm (1/p + 1/q = 1), with ``MSAM()`` the momentum's. Under a GradScaler gradients
        are the scaled ones. Zero or not finite: nothing was perturbed.
        """
        facts = self._facts
        if facts.total is None:
            raise RuntimeError("grad_norm is known once first_step() or step(closure) has climbed")
        return facts.engine.number(facts.norm(facts.total))

    @property
    def backend(self) -> str:
        """The name of the backend that runs; several devices may have several, joined by "+"."""
        if not self._facts.engine.backends:
            self._refresh()
        names = [backend.name for backend in self._facts.engine.backends]
        return "+".join(dict.fromkeys(names))

    @opaque(WRITES)
    def first_step(self, zero_grad: bool = False, *, scaler: Any = None) -> bool:
        """Save the weights w and climb to ``w + epsilon`` with the gradients that are there.

        If ``when`` says that this step does not climb, the weights stay at w. second_step() uses
        the gradients if no others have come: a loop may leave out its second pass, or do it at w.

        Args:
            zero_grad: set the gradients to None afterwards. With ``when``, and something that reads
                them (``clip_grad_norm_``), leave it False, and call zero_grad() if it climbs.
            scaler: the GradScaler whose scale the gradients have. ``when=AESAM(...)`` and
                ``ascent=USAM()`` need it; all others ignore it.

        Returns:
            Whether the step climbs: whether a second pass is due.

        Raises:
            RuntimeError: the step is half done already; a gradient is sparse.
            TypeError, ValueError: a group's rho, adaptive or eta cannot be used.
        """
        # Asking a scaler for its scale waits for the device.
        told = scaler is not None and self._scale_matters()
        return self._begin(zero_grad, scaler.get_scale() if told else None)

    @opaque(WRITES)
    @Optimizer.profile_hook_step
    def step(self, closure: Closure | None = None) -> Any:
        """A whole SAM step with ``closure``; between the two steps, the second half of a step.

        Args:
            closure: computes the loss, calls backward and returns the loss. If there are gradients
                that no step has used, it runs once, at ``w + epsilon``; so it does after
                first_step(). Else it runs twice, first at w; once if the step does not climb. It
                runs with gradients enabled. If it raises, the weights return to w.

        Returns:
            The closure's first value if it ran at w, else None.

        Raises:
            RuntimeError: no closure and no first_step() before; the closure leaves no gradient;
                ``GradScaler.unscale_`` was called before it.
        """
        facts = self._facts
        one_pass = self._follows() is not None
        finishing = facts.between or facts.finishing
        if closure is None:
            if not finishing and self._wants_only_state():
                self._initialize_state()
            elif finishing or one_pass:
                self._descend()
            else:
                raise RuntimeError(f"step() without first_step() before, nor a closure. {WAYS}")
            return None
        facts.scaler.check_closure()
        if one_pass and not finishing:
            return self._step_once(closure)
        scaled = hasattr(self, "found_inf")
        loss, found_inf, theirs = None, getattr(self, "found_inf", None), True
        attached = facts.attached.model is not None
        try:
            if finishing:
                self._run(closure)
            else:
                twice = not are_fresh(self.param_groups)
                refuse_framework(fresh=not twice)
                if twice:
                    theirs = False
                    self.zero_grad()
                    loss = self._run(closure, self.first_pass() if attached else None)
                    found_inf = None  # the scaler looked at gradients that are gone now
                climbs = self._begin(zero_grad=False, scale=self._closure_scale())
                theirs = False
                if climbs:
                    self.zero_grad()
                    self._run(closure, self.second_pass() if twice and attached else None)
            self._descend(found_inf, check_finite=scaled)
        except BaseException:
            try:
                self.restore()
            finally:
                if not theirs:
                    self.zero_grad()  # or half a gradient would be taken for that of w
                # What a GradScaler has set it takes back only after a step that returns.
                facts.scaler.handed.clear()
            raise
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # torch does not wrap it once more

    def _step_once(self, closure: Closure) -> Any:
        """A step of one pass."""
        if not are_fresh(self.param_groups):
            self.zero_grad()  # or those that a step has used would count again
        if self._facts.training:
            self.train()
        try:
            value = self._run(closure)
            self._descend(check_finite=hasattr(self, "found_inf"))
        except BaseException:
            self._facts.scaler.handed.clear()
            if self._facts.attached.model is not None:
                self.restore()
            raise
        return value

    def _run(self, closure: Closure, block: AbstractContextManager[Any] | None = None) -> Any:
        with torch.enable_grad(), block or nullcontext():
            value = closure()
        if not (are_there(self.param_groups) or self._facts.aside):
            raise RuntimeError(f"step(closure) with a closure that leaves no gradient. {WAYS}")
        return self._facts.losses.note(value, self._facts.perturbed)

    @opaque(WRITES)
    def restore(self) -> None:
        """Return the parameters to w without an update; does nothing if they are there.

        Nothing is checked before. Whatever has become of one parameter, of the groups or of the
        state, all others return. A parameter that was moved gets its w where it is now.

        Raises:
            RuntimeError: parameters of another shape cannot hold their w any more. It names them,
                once. They stay as they are, and the optimizer goes on.
        """
        facts = self._facts
        if not facts.perturbed:
            facts.arrive()
            return
        with working():
            lost = facts.engine.restore()
        facts.arrive()
        forget_copies()
        if lost:
            raise RuntimeError(
                f"all parameters are back at w, except for some that changed between the two steps "
                f"and cannot hold it: {'; '.join(lost)}. These stay as they are"
            )
        facts.captures.complain()

    @opaque("it marks gradients")
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to None, or to zero."""
        if set_to_none:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            super().zero_grad(set_to_none)
            mark_used(self.param_groups)  # zeros are no fresh gradients
