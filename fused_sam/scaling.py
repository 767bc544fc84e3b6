"""The loss scale, clipping and skipping: numbers between the second reduction and the update."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_scale(norm: Tensor, max_norm: float | Tensor, grad_scale: Tensor | None) -> Tensor:
    """What gradients must be divided by to undo the loss scale and clip, as torch clips.

    Args:
        norm: (), of the gradients as they are, scaled.
        max_norm: of the unscaled ones; a number, or ().
        grad_scale: (), the loss scale; None for 1.
    """
    scale = torch.ones_like(norm) if grad_scale is None else grad_scale.to(norm.device, norm.dtype)
    # What torch makes of a number by a tensor. By a tensor it would divide, to other bits.
    coefficient = ((norm / scale + 1e-6).reciprocal() * max_norm).clamp_max_(1.0)
    return scale / coefficient


def found_nonfinite(first: Tensor, second: Tensor, found_inf: Tensor | None) -> Tensor:
    """A flag, () float32 and not 0 where a step must be skipped.

    Args:
        first: (), the squared norm of the gradients at w.
        second: (), that of the gradients at w + epsilon.
        found_inf: (), what a GradScaler has found already, or None.
    """
    bad = ~(first.to(second.device) + second).isfinite()
    return bad.float() + (0 if found_inf is None else found_inf)
