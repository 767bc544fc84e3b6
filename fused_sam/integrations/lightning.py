"""Lightning: a mixin for a LightningModule whose optimizer is a FusedSAM.

::

    class Net(SAMMixin, LightningModule):
        def configure_optimizers(self):
            return FusedSAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

Works with ``lightning`` and ``pytorch_lightning``, and imports neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..optimizer import FusedSAM
from .passes import MicroBatches, be_at_w, unwrapped

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Module
else:
    _Module = object

__all__ = ["SAMMixin"]


class SAMMixin(_Module):
    """Before the LightningModule among the bases: each optimizer step is one of SAM.

    Automatic optimization: the first pass is Lightning's own, micro-batch by micro-batch. When a
    step is due, the optimizer climbs, ``training_step`` and backward run again on the same
    micro-batches with the same random numbers, then come ``on_before_optimizer_step``, clipping and
    the update. What is logged, returned or counted by a torchmetrics metric is that of w.

    Manual optimization: ``opt.step(closure)`` is a whole step in every precision, and
    ``opt.first_step(); ...; opt.step()`` its two halves.

    Raises:
        RuntimeError: DeepSpeed takes the steps; manual optimization with one pass.
    """

    _EVALUATIONS = ("on_validation_model_eval", "on_test_model_eval", "on_predict_model_eval")
    _sam_pass = 0  # 1 in a training_step that is remembered, 2 in the second pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let ``training_step`` remember its batch, and evaluations begin at w.

        Wherever among the bases the methods are, and whether or not they call ``super()``.
        """
        super().__init_subclass__(**kwargs)
        training_step = getattr(cls, "training_step", None)
        if training_step is not None and not hasattr(training_step, "_sam_remembers"):
            cls.training_step = _remembering(training_step)
        for name in cls._EVALUATIONS:
            hook = getattr(cls, name, None)
            if hook is not None and not hasattr(hook, "_sam_goes_to_w"):
                setattr(cls, name, _at_w(hook))

    @property
    def _sam_micro_batches(self) -> MicroBatches:
        kept: MicroBatches = self.__dict__.setdefault("_sam_kept", MicroBatches())
        return kept

    # --------------------------------------------------------------------------- Lightning's hooks

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """As LightningModule's; with a FusedSAM, a whole step of SAM."""
        sam, micro_batches = unwrapped(optimizer), self._sam_micro_batches
        if not isinstance(sam, FusedSAM) or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        optimizer_closure()  # the last micro-batch at w
        if not micro_batches:  # every training_step returned None
            return
        micro_batches.climb(sam, self._sam_scaler())
        second = functools.partial(self._sam_second, sam, micro_batches)
        super().optimizer_step(epoch, batch_idx, optimizer, second)

    def clip_gradients(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As LightningModule's, in mixed precision, too, of unscaled gradients."""
        sam = unwrapped(optimizer)
        with ExitStack() as undo:
            if isinstance(sam, FusedSAM):
                scaler = self._sam_scaler()
                if scaler is not None and not self.automatic_optimization:
                    scaler.unscale_(sam)  # else _sam_second has done it
                # Lightning takes True for a sign that the gradients are still scaled.
                sam._step_supports_amp_scaling = False
                undo.callback(delattr, sam, "_step_supports_amp_scaling")
                optimizer = sam
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As LightningModule's, in the first pass only."""
        if self._sam_pass != 2:
            super().log(*args, **kwargs)

    # ----------------------------------------------------------------------------- the second pass

    def _sam_second(self, sam: FusedSAM, micro_batches: MicroBatches) -> bool:
        """The closure of the second half: leaves the gradients of w + epsilon, unscaled."""
        no_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        self._sam_pass = 2
        try:
            with torch.enable_grad(), _frozen_metrics(self):
                micro_batches.second(sam, no_sync)
        finally:
            self._sam_pass = 0
        if (scaler := self._sam_scaler()) is not None:
            scaler.unscale_(sam)
        return True  # None would say that there was no backward

    def _sam_repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What Lightning's automatic optimization does with a micro-batch."""
        strategy = self.trainer.strategy
        output = strategy.training_step(*args, **kwargs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        strategy.backward(loss / self.trainer.accumulate_grad_batches, self.trainer.optimizers[0])

    def _sam_manual_step(
        self, step: Callable[..., Any], sam: FusedSAM, closure: Any = None, **kwargs: Any
    ) -> Any:
        """``LightningOptimizer.step``, with a closure that Lightning may run only once."""
        if sam._facts.between:  # the second half
            return step(closure, **kwargs)
        if closure is None:
            raise RuntimeError(
                "opt.step() in manual optimization has seen one pass, and a SAM step needs two: "
                "opt.step(closure) with a closure that does zero_grad, forward and "
                "manual_backward; or opt.first_step(zero_grad=True), a second forward and "
                "manual_backward, opt.step()"
            )
        micro_batches = MicroBatches()
        sam.zero_grad()
        with torch.enable_grad():
            result = micro_batches.first(sam, closure)
        micro_batches.climb(sam, self._sam_scaler())
        step(functools.partial(self._sam_second, sam, micro_batches), **kwargs)
        return result

    def _sam_prepare(self) -> None:
        """Attach this module to the FusedSAM optimizers of a fit that begins."""
        strategy = self.trainer.strategy
        for proxy in strategy._lightning_optimizers:
            sam = unwrapped(proxy)
            if not isinstance(sam, FusedSAM) or "step" in vars(proxy):
                continue
            if strategy.handles_gradient_accumulation:
                raise RuntimeError(
                    f"{type(strategy).__name__} accumulates and steps by itself, without SAM's "
                    f"second pass; use strategy='ddp' or 'fsdp'"
                )
            sam.attach(self)
            proxy.step = (
                proxy.step
                if self.automatic_optimization
                else functools.partial(self._sam_manual_step, proxy.step, sam)
            )

    def _sam_scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)


def _only_forward(trainer: Any) -> bool:
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def _at_w(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of the module's, after Momentum-SAM has gone to w."""

    @functools.wraps(hook)
    def at_w(self: SAMMixin, *args: Any, **kwargs: Any) -> Any:
        for optimizer in self.trainer.optimizers:
            be_at_w(optimizer)
        return hook(self, *args, **kwargs)

    at_w._sam_goes_to_w = True  # type: ignore[attr-defined]
    return at_w


class _Skipped(Exception):
    """There is no loss; a first pass that raises does not count."""


def _remembering(training_step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(training_step)
    def remembering(self: SAMMixin, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        # In a pass already (super().training_step()), validating with it, or in no Trainer.
        # Or in an epoch that only gathers BatchNorm's statistics, as Lightning's SWA has it.
        if self._sam_pass or trainer is None or not trainer.training or _only_forward(trainer):
            return training_step(self, *args, **kwargs)
        self._sam_prepare()
        sam = unwrapped(trainer.optimizers[0]) if trainer.optimizers else None
        if not (isinstance(sam, FusedSAM) and self.automatic_optimization):
            return training_step(self, *args, **kwargs)
        micro_batches = self._sam_micro_batches
        if micro_batches and trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            micro_batches.forget(sam)  # a step that was begun and never taken
        self._sam_pass = 1
        try:
            with sam.first_pass():
                output = training_step(self, *args, **kwargs)
                if output is None:
                    raise _Skipped
        except _Skipped:
            return None
        finally:
            self._sam_pass = 0
        micro_batches.remember(functools.partial(self._sam_repeat, args, kwargs))
        return output

    remembering._sam_remembers = True  # type: ignore[attr-defined]
    return remembering


@contextmanager
def _frozen_metrics(module: torch.nn.Module) -> Iterator[None]:
    """Every torchmetrics metric under ``module`` counts nothing in the block."""
    from torchmetrics import Metric

    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    # Counters are replaced, sums may be added to in place.
    kept = [
        {
            **vars(metric),
            **{k: list(v) if isinstance(v, list) else v.clone() for k, v in state.items()},
        }
        for metric in metrics
        for state in [metric.metric_state]
    ]
    try:
        yield
    finally:
        for metric, before in zip(metrics, kept, strict=True):
            vars(metric).update(before)
