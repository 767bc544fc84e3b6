"""What a blend makes of both gradients, and how a base optimizer without a rule gets it.

Such an optimizer steps by itself. So it is given the blended gradient before its step, and what a
blend subtracts from w afterwards waits in ``bucket.kept``. All backends do this in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blends import Blending
from ..memory import Bucket
from ..memory.window import as_real
from ..rules import Group


def mix(x: Tensor, y: Tensor, grad: Tensor, kept: Tensor | None) -> Tensor:
    """X * grad + y * kept, in the gradient's dtype; nothing for a gradient that is not kept."""
    x, y = x.to(grad.dtype), y.to(grad.dtype)
    # 0 * inf is NaN: what has the factor 0 may be anything.
    mixed = torch.where(x == 0, 0.0, x * grad)
    return mixed if kept is None else torch.where(y == 0, mixed, mixed + y * kept.to(grad.dtype))


def signed_lr(group: Group) -> float | Tensor:
    """The learning rate of a group, negative where it goes uphill."""
    lr: float | Tensor = group["lr"]
    lr = lr.squeeze() if isinstance(lr, Tensor) else lr
    return -lr if group.get("maximize") else lr


def is_zero(lr: float | Tensor) -> bool | Tensor:
    """Whether lr is 0: a bool where it can be read without waiting, else a tensor ()."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr == 0
    return float(lr) == 0


def blend_(
    bucket: Bucket,
    blending: Blending | None,
    grads: Sequence[Tensor | None],
    groups: Sequence[Group],
    grad_scale: Tensor | None,
) -> None:
    """Give a base optimizer that has no rule the gradient that it is to see, in place.

    What a blend subtracts from w afterwards goes to ``bucket.kept``: see ``after_``; its direction
    to ``blending.direction``.

    Args:
        bucket: whose they are.
        blending: as for ``update_``.
        grads: the parameters' own; overwritten.
        groups: the options of each row.
        grad_scale: (), compute dtype, on the bucket's device: gradients are divided by it.
    """
    owners: dict[int, list[int]] = {}  # two parameters may have one gradient
    for i, grad in enumerate(grads):
        if grad is not None:
            owners.setdefault(Tensor.data_ptr(grad), []).append(i)
    for indices in owners.values():
        grad = grads[indices[0]]
        assert grad is not None
        # In the compute dtype: float16 does not hold every scale.
        value = seen = grad.to(torch.promote_types(grad.dtype, bucket.compute_dtype))
        for i in reversed(indices):
            slot, group = bucket.slots[i], groups[bucket.slots[i].row]
            if blending is None or group["ascent"] is None:
                continue
            assert blending.kept is not None
            there = slot.shaped(slot.of(blending.kept.flat))
            kept = there if blending.kept.held[i] else None
            a, b, *more = blending.coefficients(group)
            mixed = mix(a, b, value, kept)
            if blending.direction is None:
                seen = mixed
            else:
                seen = value
                slot.shaped(slot.of(blending.direction)).copy_(mixed)
            if blending.blend.after:
                there.copy_(mix(more[0], more[1], value, kept))
        grad.copy_(seen if grad_scale is None else seen / grad_scale)


def after_(bucket: Bucket, stepped: Sequence[bool], groups: Sequence[Group]) -> None:
    """What comes after the step of a base optimizer that has no rule: ``w -= lr * kept``.

    Args:
        bucket: ``blend_`` has left there what is subtracted.
        stepped: which slots had a gradient.
        groups: the options of each row, as they were in that step.
    """
    assert bucket.kept is not None
    for slot, had in zip(bucket.slots, stepped, strict=True):
        group = groups[slot.row]
        if not had or group["ascent"] is None or (frozen := is_zero(group["lr"])) is True:
            continue
        weights = as_real(slot.param.detach())
        wide = weights.to(bucket.compute_dtype)
        after = slot.real(slot.of(bucket.kept)).to(wide.dtype) * signed_lr(group)
        moved = wide - after
        weights.copy_(moved if frozen is False else torch.where(frozen, wide, moved))
