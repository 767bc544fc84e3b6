"""What the optimizer refuses, with the value and the remedy, before anything is touched."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import blends
from .ascents import ASCENTS, MSAM, chosen
from .choice import plain
from .memory.window import extent, gradient_dtype, has_memory, is_dense, is_shared, trains
from .options import MAX_GRAD_NORM, OPTIONS, check_values
from .rules import RULES, Rule
from .schedule import Always, Every, When

_COMPUTABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_ascent(group: Mapping[str, Any]) -> None:
    """Raise unless a group's ascent options can be used with its parameters."""
    check_values(group)
    if group["ascent"] is None:
        return
    ascent = chosen([group])
    complex_there = any(p.is_complex() and trains(p) for p in _tensors(group["params"]))
    if ascent.real(group) and complex_there:
        what = "adaptive=True" if group["adaptive"] else f"ascent={ascent.key!r}"
        raise TypeError(
            f"{what} is not defined for complex parameters; put them into a group of their own "
            f"with adaptive=False and ascent='sam' or None"
        )


def check_base(cls: Any) -> None:
    """Raise unless ``cls`` is an optimizer class that can step without a closure."""
    if isinstance(cls, Optimizer):
        raise TypeError(
            f"base_optimizer must be a class, got an instance of {type(cls).__name__}; "
            f"use FusedSAM.wrap(optimizer, rho=...)"
        )
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"base_optimizer must be a subclass of torch.optim.Optimizer, got {cls!r}")
    if hasattr(cls, "first_step"):
        raise TypeError(
            f"{cls.__name__} does SAM itself; pass the optimizer that makes the update, such as SGD"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{cls.__name__} evaluates a closure several times per step, which has no meaning "
            f"inside SAM; choose a first-order base optimizer such as SGD or AdamW"
        )


def check_caller() -> None:
    """Raise if ZeroRedundancyOptimizer is making this optimizer, for one rank's parameters."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = inspect.currentframe()
    while zero is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), zero.ZeroRedundancyOptimizer):
            raise TypeError(
                "inside ZeroRedundancyOptimizer FusedSAM would see one rank's parameters, and "
                "climb by their norm alone; put it around: FusedSAM(params, "
                "ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD, ...)"
            )
        frame = frame.f_back


def check_master_weights(value: Any, cls: type[Optimizer]) -> None:
    """Raise unless ``value`` is a flag, and where it is set ``cls`` is fused."""
    if not isinstance(value, bool):
        raise TypeError(f"master_weights must be True or False, got {value!r}")
    if value and cls not in RULES:
        known = ", ".join(rule.__name__ for rule in RULES)
        raise TypeError(
            f"master_weights=True needs a base optimizer that is fused ({known}): "
            f"{cls.__name__} steps by itself, and knows the parameters only; leave it out"
        )


def check_defaults(base: Optimizer) -> None:
    """Raise if an option of the base optimizer has the name of an ascent option."""
    for name in OPTIONS:
        if name in base.defaults and name != MAX_GRAD_NORM.name:
            raise ValueError(
                f"{type(base).__name__} has an option {name!r} of its own, which a parameter group "
                f"cannot hold besides SAM's; choose another base optimizer, or subclass this one "
                f"and rename the option"
            )


def check_clipping(base: Optimizer, max_grad_norm: float | None) -> None:
    """Raise if both FusedSAM and the base optimizer are to clip."""
    if max_grad_norm is not None and MAX_GRAD_NORM.name in base.defaults:
        raise ValueError(
            f"{type(base).__name__} has an option max_grad_norm of its own: make that optimizer "
            f"with it, and put it into FusedSAM.wrap(...) without"
        )


def unfolded(base: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A base optimizer that may be a ``functools.partial``, as its class and all its keywords."""
    merged = dict(options)
    while isinstance(base, functools.partial):
        if base.args:
            raise TypeError(
                f"base_optimizer is a partial with {len(base.args)} positional arguments; it may "
                f"have keywords only: the parameters are FusedSAM's first argument"
            )
        merged = {**base.keywords, **merged}
        base = base.func
    return base, merged


def check_keywords(cls: type[Optimizer], options: Mapping[str, Any], ours: Iterable[str]) -> None:
    """Raise for a keyword that neither ``cls`` takes nor FusedSAM, whose keywords are ``ours``."""
    accepted = inspect.signature(cls.__init__).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return
    for name in options:
        if name == "rng" and name not in accepted:
            raise TypeError(
                "rng is no option: the optimizer cannot see by itself where a forward begins. For "
                "the same random numbers in both passes, pass model=model, or use first_pass() and "
                "second_pass()"
            )
        if name not in accepted:
            known = [*ours, *list(accepted)[2:]]
            raise TypeError(
                f"unknown keyword {name!r}: neither FusedSAM nor {cls.__name__} takes it; "
                f"known are {', '.join(known)}"
            )


def check_members(
    rule: Rule | None, groups: Sequence[Mapping[str, Any]], base: Optimizer, when: When
) -> None:
    """Raise if an ascent or a blend of the groups has no meaning with the rest.

    ``when``: what the constructor was given.
    """
    for group in groups:
        if group["ascent"] is None:
            continue
        ascent, blend = ASCENTS.get(group["ascent"]), blends.BLENDS.get(group["blend"] or "")
        if ascent is not None and ascent.along_momentum:
            _check_ahead(rule, group, base, when)
        if blend is not None and blend.reuse is not None:
            _check_period(group, when)
        if blend is not None and blend.after and _is_no_rate(group.get("lr")):
            raise ValueError(
                f"blend={blend.key!r} steps by the group's learning rate, and that of "
                f"{type(base).__name__} is lr={group.get('lr')!r}; give it one, or choose "
                f"another blend"
            )


def _check_period(group: Mapping[str, Any], when: When) -> None:
    """Raise unless a blend that says itself when to climb agrees with ``when``."""
    k, blend = group["blend_k"], group["blend"]
    if k is None and when == Always():
        raise ValueError(
            f"blend={blend!r} with k=None leaves it to when which steps climb, and when={when} "
            f"lets all of them: give it a k, or pass when=..."
        )
    if k is not None and when not in (Always(), Every(k)):
        raise ValueError(
            f"blend={blend!r} with k={k} climbs in every k-th step, and when={when} says "
            f"otherwise: leave when out, or give the blend k=None"
        )


def _is_no_rate(lr: Any) -> bool:
    return isinstance(lr, bool) or not isinstance(lr, (int, float, Tensor))


def _check_ahead(rule: Rule | None, group: Mapping[str, Any], base: Optimizer, when: When) -> None:
    """Raise if a group climbs along the momentum, and that has no meaning with the rest."""
    momentum = rule.momentum if rule is not None else None
    if rule is None or momentum not in rule.kept(group):
        raise ValueError(
            f"ascent={MSAM()} climbs along the momentum, and {type(base).__name__} has none "
            f"here; use SGD with momentum > 0, Adam or AdamW of torch.optim"
        )
    if group["adaptive"]:
        raise ValueError(f"ascent={MSAM()} is not defined with adaptive=True; leave it out")
    if not isinstance(when, Always):
        raise ValueError(
            f"ascent={MSAM()} has one pass in every step, so when={when} has no meaning; "
            f"leave it out"
        )


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless every parameter that trains can be optimized, and none of them overlap.

    A parameter that does not train may be anything: frozen integers, or the quantized weights under
    an adapter.

    Args:
        groups: parameter groups with all of their options.
    """
    if any(group.get("differentiable") for group in groups):
        raise ValueError(
            "differentiable=True is not supported: FusedSAM updates in place; leave it out"
        )
    params = {id(p): p for group in groups for p in _tensors(group["params"])}
    for param in params.values():
        _check_tensor(param)
    training = [param for param in params.values() if trains(param)]
    for param in training:
        _check_param(param)
    _check_overlap([param for param in training if param.numel()])
    for group in groups:
        check_ascent(group)
    ascent, blend = chosen(groups), blends.chosen(groups)
    if blend is not None and ascent.along_momentum:
        raise ValueError(
            f"blend={blend.key!r} needs a gradient at w, which ascent={ascent.key!r} does not "
            f"take; choose another ascent, or blend=None"
        )


def as_groups(params: Any) -> list[dict[str, Any]]:
    """``params``, in any form that torch.optim takes, as a list of groups; generators run once."""
    if isinstance(params, Optimizer):
        raise TypeError(
            f"params must be parameters or groups, got an optimizer ({type(params).__name__}); to "
            f"put SAM around it, use FusedSAM.wrap(optimizer, rho=...)"
        )
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"params must be parameters or groups, got a {type(params).__name__}; pass its "
            f".parameters()"
        )
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an iterable of parameters or groups, got a Tensor; pass [it]"
        )
    _refuse_set(params)
    items = list(params)
    if not items:
        raise ValueError(
            "params is empty; pass the parameters of a model that has some (a generator such as "
            "model.parameters() serves only once)"
        )
    if not isinstance(items[0], dict):
        return [{"params": items}]
    for group in items:
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"a parameter group must be a dict with 'params', got {group!r}")
        _refuse_set(group["params"])
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        group.update(plain(group))
    return items


def keep_each_once(groups: Iterable[dict[str, Any]]) -> None:
    """Leave each parameter in the groups once, at its first place.

    Tied weights come twice from ``[*encoder.parameters(), *decoder.parameters()]``. With them
    torch.optim warns, and steps twice.
    """
    seen: set[int] = set()
    for group in groups:
        if isinstance(group["params"], Tensor):
            continue
        ids = list(map(id, _tensors(group["params"])))
        if len(set(ids)) < len(ids) or not seen.isdisjoint(ids):
            first = {who: i for i, who in reversed(list(enumerate(ids))) if who not in seen}
            lists = [key for key in ("params", "param_names") if key in group]
            group.update({key: [group[key][i] for i in sorted(first.values())] for key in lists})
        seen.update(ids)


def _refuse_set(params: Any) -> None:
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must have a fixed order, got a set; pass a list")


def _tensors(params: Any) -> list[Tensor]:
    """The parameters of a group: of one tensor, a list, or a list of (name, tensor)."""
    items = [params] if isinstance(params, Tensor) else list(params)
    return [item[1] if isinstance(item, tuple) else item for item in items]


def _check_tensor(param: Any) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"a parameter must be a torch.Tensor, got {type(param).__name__}")
    if is_lazy(param):
        raise ValueError(
            "a parameter is not initialized yet; run the lazy module once, then make the optimizer"
        )


def _check_param(param: Tensor) -> None:
    what = f"a parameter of shape {tuple(param.shape)}"
    if not (param.is_floating_point() or param.is_complex()):
        raise TypeError(
            f"{what} has dtype {param.dtype}; only floating-point and complex parameters have "
            f"gradients: leave it out of params, or freeze it (requires_grad=False, grad=None)"
        )
    if param.is_floating_point() and param.dtype.itemsize < 2:
        raise TypeError(
            f"{what} has dtype {param.dtype}, in which nothing can be computed; keep a copy in "
            f"bfloat16 or float32 and optimize that"
        )
    # One that is no leaf has no grad_dtype; torch.optim refuses it.
    if param.is_leaf and gradient_dtype(param).to_real() not in _COMPUTABLE:
        raise TypeError(
            f"{what} has gradients of dtype {param.grad_dtype}, in which nothing can be computed; "
            f"set its grad_dtype to bfloat16, float16, float32 or float64"
        )
    if param.layout is not torch.strided:
        raise TypeError(f"{what} has layout {param.layout}; make it dense with .to_dense()")
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{what} is a {type(param).__name__}, whose memory FusedSAM cannot reach; use plain "
            f"tensors (replicated by DistributedDataParallel rather than sharded)"
        )
    if getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"{what} is a shard of FullyShardedDataParallel: each rank would climb by the norm of "
            f"its own shards; train replicas instead (DistributedDataParallel)"
        )
    if param.is_inference():
        raise ValueError(f"{what} was made in inference mode; .clone() it outside of that")
    if param.is_meta:
        raise ValueError(
            f"{what} is on the meta device; give it memory first (model.to_empty(...))"
        )
    if not has_memory(param):
        raise ValueError(
            f"{what} has a storage of {param.untyped_storage().nbytes()} bytes, which is too small "
            f"for it (FSDP frees storages); allocate it before, untyped_storage().resize_(...)"
        )
    if not is_dense(param) and is_shared(param):
        raise ValueError(
            f"{what} with strides {param.stride()} does not fill its memory, which it shares with "
            f"other tensors; make it a tensor of its own with .contiguous()"
        )


def _check_overlap(params: list[Tensor]) -> None:
    spans = sorted(
        ((str(p.device), Tensor.data_ptr(p), Tensor.data_ptr(p) + extent(p), p) for p in params),
        key=lambda span: span[:3],
    )
    for before, after in itertools.pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(
                f"two parameters, of shapes {tuple(before[3].shape)} and {tuple(after[3].shape)}, "
                f"overlap in memory and would overwrite each other's updates; use one Parameter "
                f"object in both places (tied weights), or clone one"
            )
