"""PyTorch-Ignite: ``create_sam_trainer`` in place of ``create_supervised_trainer``.

::

    trainer = create_sam_trainer(model, optimizer, loss_fn, device=device)
    trainer.run(loader, max_epochs=10)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from ignite.engine import DeterministicEngine, Engine, Events, _prepare_batch
from torch import Tensor, nn

from ..optimizer import FusedSAM
from .passes import MicroBatches, be_at_w, fused_sam_in, no_sync_of

__all__ = ["create_sam_trainer", "sam_training_step"]


def _loss_only(x: Any, y: Any, y_pred: Any, loss: Tensor) -> float:
    return loss.item()


def _same(output: Any) -> Any:
    return output


def _call(model: nn.Module, x: Any) -> Any:
    return model(x)


def sam_training_step(
    model: nn.Module,
    optimizer: FusedSAM,
    loss_fn: Callable[[Any, Any], Tensor],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    model_transform: Callable[[Any], Any] = _same,
    output_transform: Callable[[Any, Any, Any, Tensor], Any] = _loss_only,
    amp_mode: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[nn.Module, Any], Any] = _call,
) -> Callable[[Engine, Any], Any]:
    """The update function of ``create_sam_trainer``, for an Engine of one's own.

    Arguments as there; ``scaler`` is a GradScaler or None.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}"
        )
    if amp_mode not in (None, "amp"):
        raise ValueError(f"amp_mode={amp_mode!r} is not supported with SAM; use 'amp' or None")
    sam = fused_sam_in(optimizer, "create_sam_trainer")
    sam.attach(model)
    micro_batches = MicroBatches()
    device_type = next(model.parameters()).device.type
    steps = gradient_accumulation_steps

    def update(engine: Engine, batch: Any) -> Any:
        if (engine.state.iteration - 1) % steps == 0:
            micro_batches.forget(sam)
            sam.zero_grad()
        model.train()
        x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)

        def forward_backward() -> tuple[Any, Tensor]:
            with torch.autocast(device_type) if amp_mode else nullcontext():
                y_pred = model_transform(model_fn(model, x))
                loss = loss_fn(y_pred, y)
            share = loss / steps
            (share if scaler is None else scaler.scale(share)).backward()
            return y_pred, loss

        y_pred, loss = micro_batches.first(sam, forward_backward)
        if engine.state.iteration % steps == 0:
            micro_batches.climb(sam, scaler)
            micro_batches.second(sam, no_sync_of(model))
            if scaler is None:
                sam.step()
            else:
                scaler.step(sam)
                scaler.update()
        return output_transform(x, y, y_pred, loss)

    return update


def create_sam_trainer(
    model: nn.Module,
    optimizer: FusedSAM,
    loss_fn: Callable[[Any, Any], Tensor],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    model_transform: Callable[[Any], Any] = _same,
    output_transform: Callable[[Any, Any, Any, Tensor], Any] = _loss_only,
    deterministic: bool = False,
    amp_mode: str | None = None,
    scaler: bool | torch.amp.GradScaler = False,
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[nn.Module, Any], Any] = _call,
) -> Engine:
    """A trainer like that of ``ignite.engine.create_supervised_trainer``, whose steps are SAM's.

    The first pass runs micro-batch by micro-batch, one for each iteration. With the last of a step
    the optimizer climbs, all of them run again with the same random numbers, and the update
    follows. ``output_transform`` sees prediction and loss at w.

    Args:
        model: the model, on its device; the optimizer is attached to it.
        optimizer: a FusedSAM; to clip, give it ``max_grad_norm``.
        loss_fn: of ``y_pred`` and ``y``; runs twice, like ``model_fn`` and ``model_transform``.
        device: where ``prepare_batch`` takes the batch; may be left out.
        non_blocking: handed to ``prepare_batch``.
        prepare_batch: ``(batch, device=, non_blocking=)`` -> ``(x, y)``; runs once.
        model_transform: from the model's output to ``y_pred``.
        output_transform: ``(x, y, y_pred, loss)`` -> ``engine.state.output``.
        deterministic: makes a ``DeterministicEngine``.
        amp_mode: ``"amp"`` runs model and loss under autocast of the model's device.
        scaler: a GradScaler; True makes one, ``trainer.state.scaler``; False for none.
        gradient_accumulation_steps: micro-batches in a step.
        model_fn: ``(model, x)`` -> output.

    Raises:
        TypeError, ValueError: an argument cannot be used.
    """
    if scaler is True:
        scaler = torch.amp.GradScaler(next(model.parameters()).device.type)
        made = True
    else:
        made = False
    update = sam_training_step(
        model,
        optimizer,
        loss_fn,
        device,
        non_blocking,
        prepare_batch,
        model_transform,
        output_transform,
        amp_mode,
        scaler or None,
        gradient_accumulation_steps,
        model_fn,
    )
    trainer = DeterministicEngine(update) if deterministic else Engine(update)
    # Before what the user attaches: an evaluation, for instance.
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: be_at_w(optimizer))
    if made:
        trainer.state.scaler = scaler
    return trainer
