"""What a step must be like, so that a CUDA graph can hold it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from ..attached import check_model
from ..backends.capture import check_version
from ..gradients import are_fresh
from ..optimizer import FusedSAM


def check_can_be_captured(model: nn.Module, optimizer: FusedSAM, scaler: Any) -> torch.device:
    """Raise unless a step can be captured; returns the device on which it runs.

    The optimizer's layout is made current, and the weights are at w.
    """
    groups = optimizer.param_groups
    check_model(model, [param for group in groups for param in group["params"]])
    for module in model.modules():  # torch.compile may be around it
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise RuntimeError(
                f"capture() takes a model of one process and one device, got "
                f"{type(module).__name__}: step without a graph"
            )
    optimizer._refuse_away("capture()")
    optimizer._refuse_written()
    optimizer.restore()  # from where Momentum-SAM lives
    optimizer._refresh()
    optimizer._facts.captures.renew()
    device = _device_of(optimizer)
    _check_members(optimizer, scaler)
    refuse_hooks(optimizer)
    refuse_fresh_gradients(optimizer, "capture()")
    return device


def _device_of(optimizer: FusedSAM) -> torch.device:
    engine = optimizer._facts.engine
    devices = {bucket.device for bucket in engine.buckets}
    if len(devices) != 1:
        raise RuntimeError(
            f"capture() needs all parameters on one device, they are on {sorted(map(str, devices))}"
        )
    (device,) = devices
    check_device(device)
    if engine.layout.rule is None:
        raise RuntimeError(
            f"{type(optimizer.base_optimizer).__name__} steps by itself, on the host: capture() "
            f"needs a base optimizer that is fused, one of fused_sam.rules.RULES"
        )
    return device


def check_device(device: torch.device) -> None:
    """Raise unless it has CUDA graphs that can hold a step."""
    if device.type != "cuda":
        raise RuntimeError(
            f"capture() makes a CUDA graph, and the parameters are on {device}: move the model to "
            f"a GPU before, or call the optimizer's two steps"
        )
    check_version()


def _check_members(optimizer: FusedSAM, scaler: Any) -> None:
    engine, when = optimizer._facts.engine, optimizer.when
    settings = optimizer._facts.reader.read(optimizer.param_groups)
    ascent = settings.ascent
    for backend, bucket in zip(engine.backends, engine.buckets, strict=True):
        if (why := backend.bakes_in(bucket, settings.blend)) is not None:
            raise RuntimeError(
                f"with backend={backend.name!r} {why}, and hyperparameters would stay in a graph "
                f"as they are now: choose another backend, or step without a graph"
            )
    if when.needs_norm:
        raise RuntimeError(
            f"{when} reads the gradient's norm on the host in the middle of a step, which a "
            f"graph cannot: choose a schedule that goes by the number of the step"
        )
    if scaler is not None and ascent.scale_matters:
        raise RuntimeError(
            f"ascent={ascent.key!r} needs the loss scale on the host, which a graph keeps on "
            f"the device: use bfloat16 without a scaler, or step without a graph"
        )


def refuse_hooks(optimizer: FusedSAM) -> None:
    """Raise if somebody wants to be called in each step."""
    guard = 1  # of FusedSAM, which hooks the base optimizer
    count = len(torch_optimizer._global_optimizer_pre_hooks)
    count += len(torch_optimizer._global_optimizer_post_hooks)
    for each in (optimizer, optimizer.base_optimizer):
        count += len(getattr(each, "_optimizer_step_pre_hooks", ()))
        count += len(getattr(each, "_optimizer_step_post_hooks", ()))
    if count > guard:
        raise RuntimeError(
            "step hooks are registered on the optimizer, and a graph cannot call them: remove "
            "them, or step without a graph"
        )


def refuse_fresh_gradients(optimizer: FusedSAM, who: str) -> None:
    """Raise if there are gradients that somebody expects a step to use."""
    if are_fresh(optimizer.param_groups):
        raise RuntimeError(
            f"there are gradients that no step has used, and {who} does both passes "
            f"itself: call optimizer.zero_grad() before"
        )


def of_others(model: nn.Module, optimizer: FusedSAM) -> dict[str, Tensor]:
    """The parameters of the model that the optimizer does not have, by name."""
    ours = {param for group in optimizer.param_groups for param in group["params"]}
    return {name: param for name, param in model.named_parameters() if param not in ours}


def refuse_other_gradients(model: nn.Module, optimizer: FusedSAM) -> None:
    """Raise if a backward has given gradients to parameters that the optimizer does not have."""
    for name, param in of_others(model, optimizer).items():
        if param.grad is not None:
            raise RuntimeError(
                f"{name} gets a gradient and is not the optimizer's: a graph would not add to "
                f"it as backward() does. Call requires_grad_(False), or add it to a group"
            )


def check_leaf(leaf: Any, device: torch.device) -> None:
    """Raise unless it can be a part of a batch."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
        raise TypeError(
            f"a batch is a dense tensor, or tuples, lists and dicts of them; got "
            f"{leaf.layout if isinstance(leaf, Tensor) else type(leaf).__name__} in it"
        )
    if leaf.device != device:
        raise ValueError(
            f"the batch has a tensor on {leaf.device}, and the graph reads {device}: call "
            f"tensor.to({str(device)!r}, non_blocking=True) before"
        )
