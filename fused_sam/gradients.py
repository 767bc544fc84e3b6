"""The gradients of the parameters: which of them a step has used, and putting them aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Groups = Sequence[Mapping[str, Any]]

_USED = "_fused_sam_used"


def mark_used(groups: Groups) -> None:
    """A step has used these gradients.

    The tensor is marked for good, whatever is written into it later: zeros, what clipping leaves,
    another backward on top. The mark is an attribute of the tensor: a weak reference to it would
    keep torch from swapping it.
    """
    for group in groups:
        for p in group["params"]:
            grad = p.grad
            if grad is not None:
                setattr(grad, _USED, True)


def are_fresh(groups: Groups) -> bool:
    """Whether some gradient is there that no step has used."""
    for group in groups:
        for p in group["params"]:
            grad = p.grad
            if grad is not None and not hasattr(grad, _USED):
                return True
    return False


def are_there(groups: Groups) -> bool:
    """Whether some parameter has a gradient."""
    for group in groups:
        for p in group["params"]:
            if p.grad is not None:
                return True
    return False


def pairs_of(groups: Groups) -> list[tuple[Tensor, Tensor]]:
    """The gradients that are there: (parameter, gradient) for each."""
    return [(p, p.grad) for group in groups for p in group["params"] if p.grad is not None]


def put_aside(groups: Groups) -> list[tuple[Tensor, Tensor]]:
    """Take the gradients away from the parameters: (parameter, gradient) for each."""
    pairs = pairs_of(groups)
    for param, _ in pairs:
        param.grad = None
    return pairs


def are_others(groups: Groups, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether some parameter has a gradient now that is not the one of these pairs."""
    if not pairs:
        return False
    known = dict(pairs)
    return any([grad is not known.get(param) for param, grad in pairs_of(groups)])


def put_back(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Give the gradients to the parameters again."""
    for param, grad in pairs:
        param.grad = grad
