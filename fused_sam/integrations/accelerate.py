"""Hugging Face Accelerate: ``sam.backward(loss_of, batch)`` in place of ``accelerator.backward``.

::

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sam = SAM(accelerator, model, optimizer)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = sam.backward(loss_of, batch)
            optimizer.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .passes import MicroBatches, fused_sam_in

__all__ = ["SAM"]


class SAM:
    """The backward of an Accelerate loop, with SAM's second pass in it.

    While micro-batches are accumulated, each runs at w. With the last of a step the optimizer
    climbs, and all of them run again with the same random numbers. Then the gradients are those of
    w + epsilon, for ``accelerator.clip_grad_norm_`` and ``optimizer.step()``.

    Args:
        accelerator: whose ``accumulate`` block the loop uses, if it accumulates.
        model: what ``accelerator.prepare`` returned; the optimizer is attached to it.
        optimizer: what ``accelerator.prepare`` returned for a FusedSAM.

    Raises:
        TypeError: the optimizer is no FusedSAM.
        RuntimeError: DeepSpeed or Megatron-LM takes the steps.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise RuntimeError(
                f"{accelerator.distributed_type.value} takes steps by itself, without SAM's second "
                f"pass; use DDP or FSDP"
            )
        self._accelerator = accelerator
        self._model = model
        self._optimizer = fused_sam_in(optimizer, "SAM(accelerator, model, optimizer)")
        self._optimizer.attach(model)
        self._micro_batches = MicroBatches()

    def backward(self, loss_of: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Loss and backward of a micro-batch; with the last of a step, the second pass as well.

        Args:
            loss_of: computes the loss; it runs twice.
            *args: what it computes the loss of: the batch. Not from a variable of the loop, which
                holds another batch by the time of the second pass.
            **kwargs: the same.

        Returns:
            The loss at w, detached.

        Raises:
            TypeError: there is nothing to compute the loss of, and gradients are accumulated.
        """
        accelerator = self._accelerator
        if not (args or kwargs) and accelerator.gradient_accumulation_steps > 1:
            raise TypeError(
                "backward(loss_of) with accumulation runs loss_of() again when the loop's "
                "variables hold another batch; pass the batch: backward(loss_of, batch)"
            )

        def forward_backward() -> Tensor:
            loss = loss_of(*args, **kwargs)
            accelerator.backward(loss)
            return loss.detach()

        loss = self._micro_batches.first(self._optimizer, forward_backward)
        if accelerator.sync_gradients:
            self._micro_batches.climb(self._optimizer, accelerator.scaler)
            no_sync = functools.partial(accelerator.no_sync, self._model)
            self._micro_batches.second(self._optimizer, no_sync)
        return loss
