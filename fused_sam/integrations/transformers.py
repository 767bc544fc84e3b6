"""Hugging Face transformers: a Trainer whose steps are SAM's.

::

    trainer = SAMTrainer(model=model, args=args, train_dataset=data, sam_rho=0.05)

Each option of FusedSAM is there with ``sam_`` before it: ``sam_ascent=MSAM()``. For a Trainer of
one's own or of another library: ``class Mine(SAMTrainerMixin, SFTTrainer)``.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from ..optimizer import FusedSAM
from .passes import MicroBatches, check_options, fused_sam_in, unwrapped

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["SAMTrainer", "SAMTrainerMixin"]

_PREFIX = "sam_"


class SAMTrainerMixin(_Trainer):
    """Before a Trainer among the bases: whatever optimizer ``args`` name, SAM goes around it.

    The first pass is the Trainer's own, micro-batch by micro-batch. With the last of a step the
    optimizer climbs, and ``training_step`` runs again on the same micro-batches with the same
    random numbers. The loss that is logged is that at w; ``max_grad_norm`` clips, and ``grad_norm``
    tells, the second gradient.

    Args:
        *args: as for the Trainer.
        **kwargs: as for the Trainer; and the options of ``FusedSAM.wrap`` but ``model``, with
            ``sam_`` before each: ``sam_rho``, ``sam_adaptive``, ``sam_ascent``, ``sam_blend``,
            ``sam_when``, ``sam_master_weights`` and so on. If the Trainer is given a FusedSAM they
            are left alone.

    Raises:
        TypeError: there is no such option.
        RuntimeError: DeepSpeed takes the steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours = [name for name in kwargs if name.startswith(_PREFIX)]
        options = {name.removeprefix(_PREFIX): kwargs.pop(name) for name in ours}
        check_options(options, type(self).__name__, _PREFIX)
        self._sam_options = options
        self._sam_micro_batches = MicroBatches()
        self._sam_model: torch.nn.Module | None = None
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                "DeepSpeed takes steps by itself, without SAM's second pass; leave deepspeed=... "
                "out of the TrainingArguments"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer with SAM around it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        sam = unwrapped(optimizer)
        if isinstance(sam, FusedSAM):  # the user's, or train() is called again
            self._sam_micro_batches.forget(sam)
        else:
            self.optimizer = FusedSAM.wrap(optimizer, **self._sam_options)
        return self.optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A micro-batch at w; with the last of a step, all of them at w + epsilon."""
        sam, micro_batches = fused_sam_in(self.optimizer, "SAMTrainer"), self._sam_micro_batches
        if model is not self._sam_model:
            sam.attach(model)
            self._sam_model = model
        step = super().training_step
        # A copy: compute_loss may take labels out of the inputs.
        loss: torch.Tensor = micro_batches.first(
            sam, lambda: step(model, copy.copy(inputs), *args, **kwargs)
        )
        if self.accelerator.sync_gradients:
            micro_batches.climb(sam, self.accelerator.scaler)
            micro_batches.second(sam, functools.partial(self.accelerator.no_sync, model))
        return loss


class SAMTrainer(SAMTrainerMixin, Trainer):
    """``transformers.Trainer`` with SAM; see SAMTrainerMixin."""
