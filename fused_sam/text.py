"""The words in which the mathematics of rules and ascents is written, here for torch.

A *text* is a plain function over these words and the operators + - * / and comparisons. It stands
once and runs everywhere: as it is, on tensors, in the reference backend; compiled by Triton, which
has its own meaning for each word (``backends/triton/words.py``); and as C++, into which
``backends/native/translate.py`` translates it.

What a text may hold: assignments to names, ``if x is not None`` for a value that may be absent,
and one ``return`` at the end. Options of a group are values, not branches: ``where`` chooses.
Numbers are in the compute dtype, float64 for float64 weights and float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Value = Any
"""A number or a tensor of numbers in the compute dtype, or a condition over them."""

Text = Callable[..., Any]
"""A function written in these words."""


def where(condition: Value, x: Value, y: Value) -> Value:
    """``x`` where the condition holds, else ``y``; what is not chosen may be NaN or infinite."""
    if not isinstance(condition, Tensor):
        return x if condition else y
    if not (isinstance(x, Tensor) or isinstance(y, Tensor)):
        x = condition.new_full((), x, dtype=torch.float64)  # or torch takes them for float32
    return torch.where(condition, x, y)


def sqrt(x: Value) -> Value:
    """The square root; of numbers it is rounded to the nearest on every backend."""
    return x.sqrt() if isinstance(x, Tensor) else x**0.5


def divide(x: Value, y: Value) -> Value:
    """The quotient of two numbers, rounded to the nearest on every backend."""
    return x / y


def expm1(x: Value) -> Value:
    """``exp(x) - 1`` of a number x <= 0, without cancellation."""
    return torch.expm1(x)


def power(x: Value, y: Value) -> Value:
    """``x**y`` of elements or a number x >= 0 and a number 0 <= y <= 20.

    0 or 1 where both are 0; good to a few units in the last place.
    """
    return x**y


def abs(x: Value) -> Value:
    """The magnitude."""
    return x.abs()


def sign(x: Value) -> Value:
    """-1, 0 or 1; 0 for NaN."""
    return x.sign()


def maximum(x: Value, y: Value) -> Value:
    """The larger one; NaN if either is NaN."""
    return torch.maximum(x, y)


def is_finite(x):
    """Whether a number is neither infinite nor NaN."""
    return x - x == 0


def clip(norm, limit):
    """What a gradient of this norm is multiplied by, as torch clips it; 1 if it is not finite."""
    norm = norm + 1e-6
    return where((limit < norm) & (norm - norm == 0), divide(limit, norm), 1.0)


def lerp(start, end, weight):
    """``start`` for weight 0, ``end`` for weight 1, and between them, to rounding."""
    return where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))
