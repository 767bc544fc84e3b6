"""Copies of the weights that torch keeps, and that are old once the weights have changed."""

from __future__ import annotations

import sys

import torch


def forget_copies() -> None:
    """Drop autocast's casts and what ``torch.nn.utils.parametrize.cached`` holds.

    Else a second pass in the same block would see the weights of the first: rho had no effect.
    """
    torch.clear_autocast_cache()
    parametrize = sys.modules.get("torch.nn.utils.parametrize")
    if parametrize is not None:
        parametrize._cache.clear()
