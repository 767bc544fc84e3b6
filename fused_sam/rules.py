"""Base-optimizer rules: which state a torch.optim class keeps, and its mathematics in torch.

A rule's ``update`` is the definition that every backend follows, with the same names in the same
order. It sees flat tensors in the compute dtype (float64 for float64 parameters, else float32)
and knows nothing of loads, stores, restoring or loss scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Group = Mapping[str, Any]
"""A parameter group: the hyperparameters of ``torch.optim``, read anew at every step."""

STEP = "step"
"""The one state that is a number per parameter, float32 (), and not a parameter-sized buffer."""


@dataclass(frozen=True)
class Rule:
    """A base optimizer that the backends fuse.

    Attributes:
        name: short name, used by the backends to find their kernel.
        optimizer: the exact ``torch.optim`` class whose behaviour and state names it has.
        all_state: every name that can stand in ``optimizer.state[p]``.
        state: those of them that a group's options require.
        update: ``(param, grad, state, group, fresh) -> new param``. ``param``, ``grad`` and the
            buffers in ``state`` are (n,) in the compute dtype; ``state["step"]`` is () or (n,) and
            counts the running step already; ``fresh`` says that the state is still zero. ``param``
            is only read; ``grad`` is scratch; the buffers are updated in place.
        reads_step: whether ``update`` reads ``state["step"]``; RMSprop only counts.
    """

    name: str
    optimizer: type[torch.optim.Optimizer]
    all_state: frozenset[str]
    state: Callable[[Group], tuple[str, ...]]
    update: Callable[[Tensor, Tensor, Mapping[str, Tensor], Group, bool], Tensor]
    reads_step: bool = False


def _descent(grad: Tensor, group: Group) -> Tensor:
    return grad.neg_() if group["maximize"] else grad


def _sgd_state(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] else ()


def _sgd(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], group: Group, fresh: bool
) -> Tensor:
    grad = _descent(grad, group)
    grad = grad.add_(param, alpha=group["weight_decay"]) if group["weight_decay"] else grad
    if group["momentum"]:
        momentum_buffer = state["momentum_buffer"]
        # The first gradient enters undampened, as torch.optim.SGD has it.
        dampening = 0.0 if fresh else group["dampening"]
        momentum_buffer.mul_(group["momentum"]).add_(grad, alpha=1 - dampening)
        if group["nesterov"]:
            grad = grad.add_(momentum_buffer, alpha=group["momentum"])
        else:
            grad = momentum_buffer
    return param.sub(group["lr"] * grad)


def _adam_state(group: Group) -> tuple[str, ...]:
    buffers = (STEP, "exp_avg", "exp_avg_sq")
    return (*buffers, "max_exp_avg_sq") if group["amsgrad"] else buffers


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta**step`` (Kingma & Ba 2015, algorithm 1), in float32 without cancellation."""
    return -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)


def _adam(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], group: Group, fresh: bool
) -> Tensor:
    grad = _descent(grad, group)
    lr, weight_decay = group["lr"], group["weight_decay"]
    beta1, beta2 = map(float, group["betas"])
    if weight_decay and group["decoupled_weight_decay"]:
        param = param * (1 - lr * weight_decay)
    elif weight_decay:
        grad = grad.add_(param, alpha=weight_decay)
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if group["amsgrad"]:
        exp_avg_sq = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq, out=state["max_exp_avg_sq"])
    step_size = lr / _bias_correction(beta1, state[STEP])
    denom = (exp_avg_sq / _bias_correction(beta2, state[STEP])).sqrt_().add_(group["eps"])
    return param.sub(step_size * (exp_avg / denom))


def _rmsprop_state(group: Group) -> tuple[str, ...]:
    names = [STEP, "square_avg"]
    if group["momentum"] > 0:
        names.append("momentum_buffer")
    if group["centered"]:
        names.append("grad_avg")
    return tuple(names)


def _rmsprop(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], group: Group, fresh: bool
) -> Tensor:
    grad = _descent(grad, group)
    grad = grad.add_(param, alpha=group["weight_decay"]) if group["weight_decay"] else grad
    alpha, square_avg = group["alpha"], state["square_avg"]
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    if group["centered"]:
        grad_avg = state["grad_avg"].lerp_(grad, 1 - alpha)
        # Rounding can take this variance below zero, where torch.optim.RMSprop gives NaN.
        avg = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1).clamp_min_(0).sqrt_()
    else:
        avg = square_avg.sqrt()
    update = grad.div_(avg.add_(group["eps"]))
    if group["momentum"] > 0:
        update = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
    return param.sub(group["lr"] * update)


_ADAM_STATE = frozenset({STEP, "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
_RMSPROP_STATE = frozenset({STEP, "square_avg", "momentum_buffer", "grad_avg"})

RULES: Mapping[type[torch.optim.Optimizer], Rule] = {
    rule.optimizer: rule
    for rule in (
        Rule("sgd", torch.optim.SGD, frozenset({"momentum_buffer"}), _sgd_state, _sgd),
        Rule("adam", torch.optim.Adam, _ADAM_STATE, _adam_state, _adam, True),
        # AdamW is Adam whose groups say decoupled_weight_decay=True.
        Rule("adam", torch.optim.AdamW, _ADAM_STATE, _adam_state, _adam, True),
        Rule("rmsprop", torch.optim.RMSprop, _RMSPROP_STATE, _rmsprop_state, _rmsprop),
    )
}
"""The fused rules by the exact class of the base optimizer; a subclass may do anything."""
