"""timm: a loss scaler for its training loop that knows SAM.

::

    loss_scaler = SAMScaler(model)  # in place of NativeScaler()
    ...
    loss = loss_scaler(loss_of, optimizer, inputs=(input, target), need_update=need_update)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor, nn

from .passes import MicroBatches, fused_sam_in, no_sync_of

__all__ = ["SAMScaler"]


class SAMScaler(NativeScaler):
    """``timm.utils.NativeScaler`` that is given how to compute the loss, not the loss.

    While gradients are accumulated (``need_update=False``), each micro-batch runs at w. With the
    last of a step the optimizer climbs, all of them run again with the same random numbers, and
    clipping and the step see the gradients of w + epsilon.

    Args:
        model: what training calls; the optimizer is attached to it. Its ``no_sync()``, if it has
            one, is entered in the second pass for all micro-batches but the last.
        device: as for NativeScaler.
        enabled: False: no loss scale, for training in float32 or bfloat16.
    """

    def __init__(self, model: nn.Module, device: str = "cuda", enabled: bool = True) -> None:
        self._scaler = torch.amp.GradScaler(device=device, enabled=enabled)
        self._model = model
        self._micro_batches = MicroBatches()

    def __call__(
        self,
        loss: Callable[..., Tensor],
        optimizer: Any,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
        *,
        inputs: Sequence[Any],
    ) -> Tensor:
        """Forward and backward of a micro-batch; with ``need_update`` also all that follows.

        Args:
            loss: computes the loss of ``*inputs``, in an autocast block of its own if need be,
                divided by the number of micro-batches if there are several; runs twice.
            optimizer: a FusedSAM.
            clip_grad: as for NativeScaler, like the next three.
            clip_mode: "norm", "value" or "agc".
            parameters: what is clipped.
            create_graph: must be False.
            need_update: whether this is the last micro-batch of a step.
            inputs: what ``loss`` takes.

        Returns:
            The loss at w, detached.

        Raises:
            TypeError: ``loss`` is not callable, or the optimizer is no FusedSAM.
            ValueError: ``create_graph``, or clipping without ``parameters``.
        """
        if not callable(loss):
            raise TypeError(
                f"SAMScaler runs the forward twice and needs the function that computes the loss, "
                f"got {type(loss).__name__}; call it with "
                f"loss_scaler(loss_of, optimizer, inputs=(input, target), ...)"
            )
        if create_graph:
            raise ValueError("create_graph=True is for second-order optimizers; leave it out")
        if clip_grad is not None and parameters is None:
            raise ValueError(f"clip_grad={clip_grad} needs parameters=model.parameters()")
        sam, scaler = fused_sam_in(optimizer, "SAMScaler"), self._scaler
        sam.attach(self._model)

        def forward_backward() -> Tensor:
            value = loss(*inputs)
            scaler.scale(value).backward()
            return value.detach()

        result = self._micro_batches.first(sam, forward_backward)
        if need_update:
            self._micro_batches.climb(sam, scaler)
            self._micro_batches.second(sam, no_sync_of(self._model))
            if clip_grad is not None:
                scaler.unscale_(sam)
                dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
            scaler.step(sam)
            scaler.update()
        return result
