"""What errors say to those who call ``step()`` as if the optimizer made one pass."""

from __future__ import annotations

import sys

WAYS = (
    "A SAM step needs two passes. In a loop of your own: optimizer.first_step(zero_grad=True), a "
    "second forward and backward, optimizer.second_step(); or optimizer.step(closure) with a "
    "closure that computes the loss and calls backward; or optimizer.accumulate(...). Lightning, "
    "the Hugging Face Trainer, Accelerate, timm, fastai, Ignite and skorch have an adapter each in "
    "fused_sam.integrations: .lightning, .transformers, .accelerate, .timm, .fastai, .ignite, "
    ".skorch"
)

_THROUGH = ("fused_sam", "torch", "functools", "contextlib")


def refuse_framework(fresh: bool) -> None:
    """Raise if a framework calls ``step(closure)`` with a closure that is not the whole step.

    Nothing in the gradients tells: those that Lightning and Accelerate have added up over several
    batches look like those of the batch that the closure runs on.

    Args:
        fresh: whether gradients are there that no step has used.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame.f_globals).split(".")[0] in _THROUGH:
        frame = frame.f_back
    caller = _module(frame.f_globals)
    if caller.startswith(("lightning.pytorch", "pytorch_lightning")):
        raise RuntimeError(
            "Lightning calls step(closure), whose two runs would log twice, and count BatchNorm's "
            "statistics twice, and accumulate nothing: class Net(SAMMixin, LightningModule), with "
            "SAMMixin of fused_sam.integrations.lightning. An optimizer_step() of your own must "
            "lead to it: super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)"
        )
    if fresh and caller.startswith("accelerate"):
        raise RuntimeError(
            "step(closure) through Accelerate with gradients there already, which may be those of "
            "several batches, and the closure runs on one: use fused_sam.integrations.accelerate, "
            "or leave all backwards to the closure"
        )


def _module(variables: dict[str, object]) -> str:
    return str(variables.get("__name__", ""))
