# mypy: ignore-errors
"""The words of ``fused_sam.text`` in Triton, and texts as Triton functions.

`/` and `sqrt` of float32 elements are good to 2 and 1 units in the last place (PTX div.full and
sqrt.approx, kept from flushing small numbers to zero by the launcher's options); rounding them to
the nearest takes subroutines and a quarter more registers. Of single numbers they are to the
nearest, for which texts say ``divide``.
"""

from __future__ import annotations

import functools
import types

import triton
import triton.language as tl

from ... import text as words
from ...text import Text


@triton.jit
def where(condition, x, y):
    """``x`` where the condition holds, else ``y``."""
    return tl.where(condition, x, y)


@triton.jit
def sqrt(x):
    """The square root."""
    if len(x.shape) == 0:
        root = tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)
    else:
        root = tl.sqrt(x)
    return root


@triton.jit
def divide(x, y):
    """The quotient of two numbers."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def expm1(x):
    """``exp(x) - 1`` of a number x <= 0; not every target and the interpreter have it.

    Down to -0.35 this is its Taylor series, whose remainder is below rounding: 0.35**8 / 9! <
    2**-30 for float32, 0.35**14 / 15! < 2**-61 for float64. Below, it is -0.29 at most and loses
    less than two bits.
    """
    terms: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    series = 1 + x * (1.0 / terms)
    for i in tl.static_range(terms - 1, 1, -1):
        series = 1 + series * x * (1.0 / i)
    return tl.where(x > -0.35, x * series, tl.exp(x) - 1)


@triton.jit
def abs(x):
    """The magnitude."""
    return tl.abs(x)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def maximum(x, y):
    """The larger one; NaN if either is NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lerp(start, end, weight):
    """``start`` for weight 0, ``end`` for weight 1.

    Weighted from both sides, which is torch's only to rounding: choosing the nearer side takes
    registers that updates in half precision do not have.
    """
    return (1 - weight) * start + weight * end


_WORDS = {word.__name__: word for word in (where, sqrt, divide, expm1, abs, sign, maximum, lerp)}


@functools.cache
def compiled(text: Text):
    """A text as a Triton function: the same code, with these words in place of torch's."""
    # The interpreter looks for triton.language in the scope of every function.
    scope = {"__name__": text.__module__, "tl": tl, **_WORDS}
    if text not in _TEXTS:
        scope |= {word.__name__: compiled(word) for word in _TEXTS}
    return triton.jit(types.FunctionType(text.__code__, scope, text.__name__))


_TEXTS = (words.is_finite,)
"""Words that are texts themselves, here too."""
