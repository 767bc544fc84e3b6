"""What the optimizer refuses, with the value and the remedy, before anything is touched."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .layout import is_dense, is_shared

ASCENT_OPTIONS = ("rho", "adaptive", "eta")
"""What a parameter group holds beside the base optimizer's options."""


def check_ascent(rho: Any, adaptive: Any, eta: Any) -> dict[str, Any]:
    """The ascent options as a group holds them.

    Raises:
        TypeError, ValueError: rho or eta is not a finite number >= 0, adaptive not a bool.
    """
    for name, value in (("rho", rho), ("eta", eta)):
        _check_size(name, value)
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive must be True or False, got {adaptive!r}")
    return {"rho": rho, "adaptive": adaptive, "eta": eta}


def check_max_grad_norm(value: Any) -> None:
    """Raise unless ``value`` is None or a finite number > 0."""
    if value is not None:
        _check_size("max_grad_norm", value)
        if value == 0:
            raise ValueError("max_grad_norm=0 would stop all learning; use None for no clipping")


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def check_base(cls: Any, options: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
    """Raise unless ``cls`` is an optimizer class that can step without a closure.

    Args:
        cls: the base optimizer's class.
        options: the keyword arguments that it is to get.
        taken: keywords of FusedSAM itself, named in the message for a misspelt one.
    """
    if isinstance(cls, Optimizer):
        raise TypeError(
            f"base_optimizer must be a class, got an instance of {type(cls).__name__}; "
            f"use FusedSAM.wrap(optimizer, rho=...)"
        )
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"base_optimizer must be a subclass of torch.optim.Optimizer, got {cls!r}")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{cls.__name__} evaluates a closure several times per step, which has no meaning "
            f"inside SAM; choose a first-order base optimizer such as SGD or AdamW"
        )
    if options.get("differentiable"):
        raise ValueError(
            "differentiable=True is not supported: FusedSAM updates in place; leave it out"
        )
    accepted = inspect.signature(cls.__init__).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return
    for name in options:
        if name not in accepted:
            known = [*taken, *list(accepted)[2:]]
            raise TypeError(
                f"unknown keyword {name!r}: neither FusedSAM nor {cls.__name__} takes it; "
                f"known are {', '.join(known)}"
            )


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless every parameter of every group can be optimized, and none overlap."""
    params = {id(p): p for group in groups for p in _tensors(group["params"])}
    for param in params.values():
        _check_param(param)
    _check_overlap([p for p in params.values() if p.numel()])


def as_groups(params: Any) -> list[dict[str, Any]]:
    """``params``, in any form that torch.optim takes, as a list of groups; generators run once."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or groups, got one Tensor: [it]")
    items = list(params)
    if not items:
        raise ValueError(
            "params is empty; pass the parameters of a model that has some (a generator such as "
            "model.parameters() serves only once)"
        )
    if not isinstance(items[0], dict):
        return [{"params": items}]
    for group in items:
        if not isinstance(group.get("params"), Tensor):
            group["params"] = list(group["params"])
    return items


def _tensors(params: Any) -> list[Tensor]:
    """The parameters of a group: of one tensor, a list, or a list of (name, tensor)."""
    items = [params] if isinstance(params, Tensor) else list(params)
    return [item[1] if isinstance(item, tuple) else item for item in items]


def _check_param(param: Any) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"a parameter must be a torch.Tensor, got {type(param).__name__}")
    if is_lazy(param):
        raise ValueError(
            "a parameter is not initialized yet; run the lazy module once before making the optimizer"
        )
    what = f"a parameter of shape {tuple(param.shape)}"
    if not (param.is_floating_point() or param.is_complex()):
        raise TypeError(
            f"{what} has dtype {param.dtype}; only floating-point and complex parameters have "
            f"gradients: leave it out of params"
        )
    if param.layout is not torch.strided:
        raise TypeError(f"{what} has layout {param.layout}; make it dense with .to_dense()")
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{what} is a {type(param).__name__}, whose memory FusedSAM cannot reach; "
            f"pass plain tensors"
        )
    if param.is_meta:
        raise ValueError(
            f"{what} is on the meta device; materialise it first (model.to_empty(...))"
        )
    if not is_dense(param) and is_shared(param):
        raise ValueError(
            f"{what} with strides {param.stride()} does not fill its memory, which it shares with "
            f"other tensors; make it a tensor of its own with .contiguous()"
        )


def _check_overlap(params: list[Tensor]) -> None:
    spans = sorted(
        ((str(p.device), p.data_ptr(), p.data_ptr() + _extent(p), p) for p in params),
        key=lambda span: span[:3],
    )
    for before, after in zip(spans, spans[1:], strict=False):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(
                f"two parameters, of shapes {tuple(before[3].shape)} and {tuple(after[3].shape)}, "
                f"overlap in memory and would overwrite each other's updates; use one Parameter "
                f"object in both places (tied weights), or clone one"
            )


def _extent(param: Tensor) -> int:
    """Bytes from the parameter's first element to the end of its last."""
    reach = sum((n - 1) * abs(s) for n, s in zip(param.shape, param.stride(), strict=True))
    return (reach + 1) * param.element_size()
