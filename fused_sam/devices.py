"""Devices: which one is current, for what takes that for granted."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_HAVE_SEVERAL = ("cuda", "xpu")  # ROCm calls itself cuda


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device as the current one; nothing is done where it is that already."""
    if device.type not in _HAVE_SEVERAL:
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = module.device(device)
    return guard


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype on this device, without waiting where it goes to a GPU.

    On its way to a CPU it is waited for: torch would return memory that is not filled yet.
    """
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
