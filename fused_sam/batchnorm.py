"""BatchNorm's running statistics in SAM's second pass.

A SAM step runs the model twice on each batch: at the weights w, and at the perturbed weights
w + ε. BatchNorm would update its running statistics both times, and half of what they average
would belong to weights at which the model is never evaluated. The authors of SAM (Foret et al.,
ICLR 2021) keep the statistics of the first pass only; so does::

    loss_fn(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with frozen_running_stats(model):
        loss_fn(model(x), y).backward()
    optimizer.second_step(zero_grad=True)

Momentum-SAM has one pass, ahead of w, where it gathers them. ``recompute_batchnorm`` gathers those
of w, before an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.swa_utils import update_bn

from .owners import owners_of

__all__ = ["frozen_running_stats", "recompute_batchnorm"]


def recompute_batchnorm(
    model: nn.Module, loader: Iterable[Any], device: int | torch.device | None = None
) -> None:
    """Gather BatchNorm's running statistics anew, at w: the mean over the batches of a loader.

    For Momentum-SAM, whose passes gather them ahead of w. It is ``torch.optim.swa_utils.update_bn``
    at the right weights: see there for what a loader gives (the input, or a tuple that begins with
    it). An attached model goes to w by itself; else call ``optimizer.eval()`` before, and
    ``optimizer.train()`` afterwards. Layers that are no BatchNorm are left alone.

    Args:
        model: whose layers they are; it comes back in the mode in which it was.
        loader: batches of the training data; a part of them will do.
        device: where batches are sent; None: nowhere.

    Raises:
        RuntimeError: the weights are away from w; the statistics are as they were.
    """
    with ExitStack() as stack:
        for optimizer in owners_of(model.parameters()):
            optimizer._be_at_w("recompute_batchnorm()")
            stack.enter_context(optimizer._staying())
        update_bn(loader, model, device)


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Normalise with batch statistics in the block, and leave running statistics as they are.

    When the block ends, by an exception too, every ``running_mean``, ``running_var`` and
    ``num_batches_tracked`` is the tensor that it was, bit for bit, whatever the activations were
    (infinite and NaN ones included). Outputs and gradients are those of training mode. Blocks
    may lie within each other and overlap, and a model may be wrapped (DistributedDataParallel,
    FSDP, ``torch.compile``).

    It covers every BatchNorm, SyncBatchNorm and InstanceNorm under ``model`` that tracks running
    statistics, their lazy forms, their subclasses (timm's, for instance), and what TorchScript made
    of them. Layers in evaluation mode go on normalising with their running statistics.

    Notes:
        - Cost: a few microseconds of Python for each layer. Plain BatchNorm is told not to track,
          which launches nothing and saves the update of ``num_batches_tracked`` (and, with
          ``momentum=None``, a wait for the device). The other layers work on copies of their
          statistics, three small tensors each.
        - Activation checkpointing runs the forward again in ``backward``: call that in the block.
        - A CUDA graph replays what was captured: capture the second pass in the block, the first
          one outside. ``torch.compile`` compiles one more variant of the model, once.
        - DistributedDataParallel, unless told otherwise, broadcasts rank 0's buffers before each
          forward, this one too: rank 0's statistics stay as they are, the other ranks get them.
        - The layers themselves are switched, so no other thread may train ``model`` meanwhile; nor
          may ``model`` be moved or a checkpoint loaded into it in the block.

    Args:
        model: the module whose layers are frozen; it may itself be such a layer.

    Yields:
        Nothing.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, (_NormBase, torch.jit.ScriptModule)):
                _freeze(module, undo)
        yield


def _freeze(module: nn.Module, undo: ExitStack) -> None:
    if getattr(module, "running_mean", None) is None:
        return
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        # It makes its buffers in its first forward, in a hook that runs before this one.
        hook = module.register_forward_pre_hook(lambda module, _: _freeze(module, undo))
        undo.callback(hook.remove)
    else:
        block = _BLOCKS.get(module)
        if block is None:
            block = _BLOCKS[module] = _Block(_switch_off(module))
        block.depth += 1
        undo.callback(_leave, module)


@dataclass
class _Block:
    """The blocks that a layer is in, which may end in any order: the last one switches it on."""

    before: bool | dict[str, Tensor | None]
    depth: int = 0


_BLOCKS: MutableMapping[nn.Module, _Block] = WeakKeyDictionary()


def _switch_off(module: nn.Module) -> bool | dict[str, Tensor | None]:
    """Leave the running statistics alone from now on; returns what ``_leave`` needs."""
    if isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward:
        # Momentum 0 would not do: 0 * inf is NaN, and None stands for a cumulative average.
        tracks = bool(module.track_running_stats)
        module.track_running_stats = False
        return tracks
    # InstanceNorm passes its buffers on whether it tracks or not; SyncBatchNorm without them
    # fails on half-precision input; a subclass may do anything. They get buffers to throw away.
    buffers = dict(module._buffers.items())
    _set_buffers(module, {k: b if b is None else b.clone() for k, b in buffers.items()})
    return buffers


def _leave(module: nn.Module) -> None:
    block = _BLOCKS.get(module)
    if block is None:
        return  # the layer is garbage, and so is the block, which was never left
    block.depth -= 1
    if block.depth == 0:
        del _BLOCKS[module]
        if isinstance(block.before, bool):
            module.track_running_stats = block.before  # type: ignore[assignment]
        else:
            _set_buffers(module, block.before)


def _set_buffers(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    for name, buffer in buffers.items():
        module._buffers[name] = buffer
