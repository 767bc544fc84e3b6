"""Updates whose weights stay, or go next, ahead of w along the momentum (ascents/msam.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import Bucket, Gradients
from ..memory.window import as_real
from ..recording import followed, recording
from ..rules import Group

Groups = Sequence[Group]


@dataclass(frozen=True)
class Ahead:
    """What an update does besides, where a climb along the momentum comes next.

    The coupled weight decay of a perturbed slot is that of its weights, ahead of w. The sum of the
    new momentum's squares is what the climb needs.

    Attributes:
        momentum: the name of the rule's state.
        stays: for each slot, whether the new w goes to ``saved`` and the weights stay where they
            are, until the climb. Those slots are perturbed, climb, and have a gradient.
    """

    momentum: str
    stays: tuple[bool, ...]

    @classmethod
    def of(
        cls, bucket: Bucket, momentum: str, grads: Gradients, groups: Groups, stays: bool
    ) -> Ahead:
        """For an update with these gradients; ``stays``: whether weights stay that can."""
        climbs = climbing(bucket, grads.present, groups)
        pairs = zip(bucket.perturbed, climbs, strict=True)
        return cls(momentum, tuple([stays and away and there for away, there in pairs]))


def decays(group: Group) -> bool:
    """Whether a group's gradients get a weight decay.

    A graph may find another one whenever it runs: only where none is coupled it leaves it out.
    """
    if group.get("decoupled_weight_decay"):
        return False
    return recording() is not None or coupled(group) != 0


def coupled(group: Group) -> float:
    """The weight decay that goes into the gradient."""
    return 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])


def momentum_of(bucket: Bucket, name: str, slots: Sequence[bool]) -> Gradients:
    """The momentum of these slots as if it were their gradients, in its own dtype."""
    windows = bucket.state(name).windows
    key = windows, tuple(slots)
    known = bucket.cache.get(momentum_of)
    if known is None or known[0][0] is not windows or known[0][1] != key[1]:
        tensors = [as_real(w) if on else None for w, on in zip(windows, slots, strict=True)]
        known = bucket.cache[momentum_of] = (key, Gradients.of(tensors))
    found: Gradients = known[1]
    return found


def climbing(bucket: Bucket, present: Sequence[bool], groups: Groups) -> list[bool]:
    """For each slot, whether it has a gradient, as ``present`` says, and its group climbs."""
    return [
        there and groups[slot.row]["ascent"] is not None
        for slot, there in zip(bucket.slots, present, strict=True)
    ]


def decay_ahead(
    bucket: Bucket, grads: Gradients, groups: Groups, grad_scale: Tensor | None
) -> Gradients:
    """Gradients with which the rule's coupled weight decay is that of the weights ahead of w.

    As the authors' code has it. The rule decays w, in full precision, so what it gets is the decay
    of the way from w, and no more: a gradient of half precision would round a whole decay away, or
    overflow by it. Decoupled decay (AdamW) is the rule's.
    """
    if not any([decays(groups[row]) for row in bucket.rows]):
        return grads
    factors = followed(lambda: list(map(coupled, groups)), torch.float64)
    tensors = list(grads.tensors)
    for row in bucket.rows:
        mine = [
            i
            for i, slot in enumerate(bucket.slots)
            if slot.row == row and decays(groups[row]) and grads.present[i] and bucket.perturbed[i]
        ]
        if mine:
            decay = _decay(bucket, mine, factors[row], grad_scale)
            if groups[row].get("maximize"):
                torch._foreach_neg_(decay)
            raw = [grad for i in mine if (grad := tensors[i]) is not None]
            for i, new in zip(mine, torch._foreach_add(raw, decay), strict=True):
                tensors[i] = new.to(bucket.grad_dtype)
    return Gradients.of(tensors)


def _decay(
    bucket: Bucket,
    indices: Sequence[int],
    weight_decay: float | Tensor,
    grad_scale: Tensor | None,
) -> list[Tensor]:
    """weight_decay * (weight - w) for these slots, as large as the gradients' scale makes it.

    In the compute dtype: float16 does not hold every scale.
    """
    slots, dtype = [bucket.slots[i] for i in indices], bucket.compute_dtype
    weights = [as_real(slot.param.detach()).to(dtype) for slot in slots]
    decay = torch._foreach_sub(weights, [slot.real(slot.of(bucket.saved)) for slot in slots])
    if isinstance(weight_decay, Tensor):
        weight_decay = weight_decay.to(dtype)
    torch._foreach_mul_(decay, weight_decay)
    if grad_scale is not None:
        torch._foreach_mul_(decay, grad_scale.to(bucket.device, dtype))
    return list(decay)
