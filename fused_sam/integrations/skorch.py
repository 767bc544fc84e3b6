"""skorch: a mixin for a net whose optimizer is a FusedSAM.

::

    class Net(SAMNetMixin, NeuralNetClassifier):
        pass

    net = Net(module, optimizer=FusedSAM, optimizer__rho=0.05, lr=0.1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skorch.utils import TeeGenerator

from ..optimizer import FusedSAM
from .passes import MicroBatches, unwrapped

if TYPE_CHECKING:
    from skorch import NeuralNet as _Net
else:
    _Net = object

__all__ = ["SAMNetMixin"]


class SAMNetMixin(_Net):
    """Before the net among the bases: each training step is one of SAM.

    What ``train_step_single`` does runs at w and again at w + epsilon, on the same batch with the
    same random numbers. History and callbacks get loss and prediction of w; ``on_grad_computed``
    comes once, with the second gradients, so that clipping leaves the climb alone.

    Raises:
        RuntimeError: there are several optimizers, or skorch's AccelerateMixin holds this one.
    """

    def on_train_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        """As the net's; attaches the module, which may be new or unpickled."""
        super().on_train_begin(net, *args, **kwargs)
        if isinstance(self.optimizer_, FusedSAM):
            self.optimizer_.attach(self.module_)

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        """As the net's, with two passes."""
        sam = unwrapped(self.optimizer_)
        if not isinstance(sam, FusedSAM):
            return super().train_step(batch, **fit_params)
        if sam is not self.optimizer_:
            raise RuntimeError(
                f"SAMNetMixin cannot train a FusedSAM inside of a "
                f"{type(self.optimizer_).__name__}, as skorch's AccelerateMixin makes; leave that "
                f"out, or train with Accelerate (fused_sam.integrations.accelerate)"
            )
        if len(self._optimizers) > 1:
            raise RuntimeError(
                f"SAM climbs with all parameters at once, and this net has several optimizers: "
                f"{self._optimizers}; give all parameters to one"
            )
        micro_batches, kept = MicroBatches(), self.get_train_step_accumulator()
        self._zero_grad_optimizer()
        kept.store_step(
            micro_batches.first(sam, lambda: self.train_step_single(batch, **fit_params))
        )
        micro_batches.climb(sam)
        micro_batches.second(sam)
        self.notify(
            "on_grad_computed",
            named_parameters=TeeGenerator(self.get_all_learnable_params()),
            batch=batch,
            training=True,
        )
        self._step_optimizer(None)
        return kept.get_step()
