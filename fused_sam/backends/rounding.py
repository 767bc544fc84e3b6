"""Rounding to half precision at random, with the same bits on every backend.

A climb is small against its weights, and bfloat16 and float16 keep so few digits that rounding to
nearest would swallow most of it. So the climb of such weights is rounded to one of the two
neighbours, by chances that make the mean exact. Chance is a hash of the element's offset in the
flat buffers (modulo 2**32) and of the climb's number: nothing is stored, and a rerun has the same
bits. C++ has this function in ``csrc/storage.h``, Triton in ``triton/kernels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes that are rounded so."""

_FACTORS = 0x7FEB352D, 0x846CA68B
"""Of the hash "lowbias32" (Wellons 2018): shifts by 16, 15, 16 and these two factors between."""

_SMALLEST_NORMAL, _LARGEST = 0x38800000, 0x477FE000
"""Of float16, as bits of float32: 2**-14 and 65504."""


def seed_of(number: int) -> int:
    """The hash of a climb's number: a Python integer in [0, 2**32)."""
    x = number & 0xFFFFFFFF
    x ^= x >> 16
    x = x * _FACTORS[0] & 0xFFFFFFFF
    x ^= x >> 15
    x = x * _FACTORS[1] & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastically(values: Tensor, dtype: torch.dtype, offset: int, seed: int) -> Tensor:
    """Values rounded to one of their two neighbours, the chances being how near these are.

    What ``dtype`` can hold stays as it is. What lies beyond its largest number, or is infinite or
    NaN, is rounded to nearest.

    Args:
        values: (n,) float32, neighbours in a flat buffer.
        dtype: one of HALVES.
        offset: of the first of them in the flat buffer.
        seed: of the climb: ``seed_of``.

    Returns:
        (n,) in ``dtype``.
    """
    noise = _noise(values, offset, seed)
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        half, limit = bits + (noise >> 16 & 0xFFFF) >> 16, 0x7F7F0000
    else:
        normal = magnitude - (_SMALLEST_NORMAL - (1 << 23)) + (noise >> 19 & 0x1FFF) >> 13
        # Below it the neighbours are integers times 2**-24: in units of 2**-45.
        units = (values.abs() * 2.0**45).to(torch.int32)
        small = (units + (noise >> 11 & 0x1FFFFF)) >> 21 & 0x7FF
        half = torch.where(magnitude < _SMALLEST_NORMAL, small, normal)
        half, limit = half | (bits >> 16 & -0x8000), _LARGEST
    rounded = half.to(torch.int16).view(dtype)
    return torch.where(magnitude < limit, rounded, values.to(dtype))


def _noise(values: Tensor, offset: int, seed: int) -> Tensor:
    """A hash of each element's offset and the seed, (n,) int32: 32 random bits."""
    offset &= 0xFFFFFFFF
    x = torch.arange(offset, offset + values.numel(), device=values.device).to(torch.int32)
    x ^= _signed(seed)
    # Shifts to the right copy the sign, which the masks take away again.
    x ^= x >> 16 & 0xFFFF
    x *= _signed(_FACTORS[0])
    x ^= x >> 15 & 0x1FFFF
    x *= _signed(_FACTORS[1])
    x ^= x >> 16 & 0xFFFF
    return x


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x
