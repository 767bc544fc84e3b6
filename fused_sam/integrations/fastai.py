"""fastai: a callback that makes each training step one of SAM.

::

    opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(dls, model, loss_func, opt_func=opt_func, cbs=SAMCallback(rho=0.05))
"""

from __future__ import annotations

import functools
from contextlib import ExitStack, suppress
from typing import Any

from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.optimizer import OptimWrapper

from ..optimizer import FusedSAM
from ..options import OPTIONS
from .passes import MicroBatches, be_at_w, check_options, no_sync_of

__all__ = ["SAMCallback"]


class SAMCallback(Callback):
    """SAM around the Learner's optimizer.

    The first pass is the Learner's own. When a step is due (``GradientAccumulation`` decides), the
    optimizer climbs, and model and loss run again on the same batches with the same random numbers,
    with the events from ``after_pred`` to ``after_backward``. Then clipping, the loss scaler and
    the step see the gradients of w + epsilon. Recorded are prediction and loss of w.

    Args:
        rho: radius of the neighbourhood; see FusedSAM. Left alone, like the others, if the
            Learner's optimizer is a FusedSAM already.
        **options: the others of ``FusedSAM.wrap`` but ``model``: ``adaptive``, ``ascent``,
            ``blend``, ``when``, ``master_weights`` and so on.

    Raises:
        TypeError: there is no such option; or, in a fit, the optimizer is one of fastai's own.
    """

    # After GradientAccumulation has let a step through, before the scaler and clipping.
    order, run_valid = MixedPrecision.order - 2, False

    def __init__(self, rho: float = 0.05, **options: Any) -> None:
        super().__init__()
        check_options(options, "SAMCallback")
        self._options = {"rho": rho, **options}
        self._micro_batches = MicroBatches()
        self._first_pass = ExitStack()
        self._repeating = False

    @property
    def _sam(self) -> FusedSAM:
        sam: FusedSAM = self.learn.opt.opt
        return sam

    def before_fit(self) -> None:
        """Put SAM around the optimizer, unless it is there."""
        wrapper = self.learn.opt
        if not isinstance(wrapper, OptimWrapper):
            raise TypeError(
                f"SAMCallback needs an optimizer of torch, got fastai's {type(wrapper).__name__}; "
                f"pass opt_func=partial(OptimWrapper, opt=torch.optim.AdamW) to the Learner"
            )
        if not isinstance(wrapper.opt, FusedSAM):
            wrapper.opt = FusedSAM.wrap(wrapper.opt, **self._options)
            for name in OPTIONS:  # so that fastai's schedulers and set_hyper know them
                wrapper.fwd_map[name] = wrapper.bwd_map[name] = name
        self._micro_batches.forget(self._sam)
        self._sam.zero_grad()  # of a group that the last fit has left unfinished

    def before_train(self) -> None:
        """Attach the model, as other callbacks have wrapped it."""
        self._sam.attach(self.learn.model)

    def after_train(self) -> None:
        """Validation, and whatever comes after a fit, is at w, within a step as well."""
        be_at_w(self._sam)

    def before_batch(self) -> None:
        """From here on random numbers belong to the first pass."""
        self._first_pass.enter_context(self._sam.first_pass())

    def after_backward(self) -> None:
        """The first pass over this batch is over."""
        if self._repeating:
            return
        self._first_pass.close()
        learn = self.learn
        # What MixUp and CutMix have drawn for the loss of this batch.
        drawn = [(cb, dict(vars(cb))) for cb in learn.cbs if isinstance(cb, MixHandler)]
        again = functools.partial(self._repeat, learn.xb, learn.yb, drawn)
        self._micro_batches.remember(again)

    def before_step(self) -> None:
        """Climb, and the second pass."""
        learn, sam = self.learn, self._sam
        kept = learn.xb, learn.yb, learn.pred, learn.loss, learn.loss_grad
        self._micro_batches.climb(sam, getattr(learn, "scaler", None))
        self._repeating = True
        try:
            self._micro_batches.second(sam, no_sync_of(learn.model))
        finally:
            self._repeating = False
            learn.xb, learn.yb, learn.pred, learn.loss, learn.loss_grad = kept

    def after_step(self) -> None:
        """A step that a callback has cancelled leaves the weights at w."""
        self._sam.restore()

    def after_batch(self) -> None:
        """A batch that a callback has cancelled before its backward has no part."""
        with suppress(CancelBatchException), self._first_pass.pop_all():
            raise CancelBatchException

    def _repeat(self, xb: Any, yb: Any, drawn: list[tuple[Callback, dict[str, Any]]]) -> None:
        """What ``Learner._do_one_batch`` does with a batch, up to the step."""
        learn = self.learn
        learn.xb, learn.yb = xb, yb
        for callback, attributes in drawn:
            vars(callback).update(attributes)
        for callback in learn.cbs:
            if isinstance(callback, MixedPrecision):
                callback.before_batch()  # autocast, until after_loss
        learn.pred = learn.model(*xb)
        learn("after_pred")
        learn.loss_grad = learn.loss_func(learn.pred, *yb)
        learn.loss = learn.loss_grad.clone()
        learn("after_loss")
        learn("before_backward")
        learn.loss_grad.backward()
        learn("after_backward")
