"""What errors say to those who call ``step()`` as if the optimizer made one pass."""

from __future__ import annotations

WAYS = (
    "A SAM step needs two passes. In a loop of your own: optimizer.first_step(zero_grad=True), a "
    "second forward and backward, optimizer.second_step(); or optimizer.step(closure) with a "
    "closure that computes the loss and calls backward; or optimizer.accumulate(...). Lightning, "
    "the Hugging Face Trainer, Accelerate, timm, fastai, Ignite and skorch have an adapter each in "
    "fused_sam.integrations: .lightning, .transformers, .accelerate, .timm, .fastai, .ignite, "
    ".skorch"
)
