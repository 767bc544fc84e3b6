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
def power(x, y):
    """``x**y`` of x >= 0 and a number 0 <= y <= 20, from log2 and exp2, which are approximate.

    With x = m * 2**k, m near 1, log2(m) is good to 2**-22 in absolute terms. Of y * k, which can be
    large, ``high * k`` is exact: that part of y has 15 bits, k has 8. So the relative error stays
    below (y + 5) * 2**-22.
    """
    k = tl.floor(tl.log2(x) + 0.5)
    log = tl.log2(x * tl.exp2(-k * 0.5) * tl.exp2(-k * 0.5))  # 2**150 would be infinite
    high = tl.floor(y * 1024.0) * (1.0 / 1024.0)
    whole = tl.floor(high * k)
    rest = (high * k - whole) + ((y - high) * k + y * log)
    value = tl.exp2(rest) * tl.exp2(whole * 0.5) * tl.exp2(whole * 0.5)
    return tl.where(x > 0, value, x)


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


_WORDS = {
    word.__name__: word for word in (where, sqrt, divide, expm1, power, abs, sign, maximum, lerp)
}


@functools.cache
def compiled(text: Text):
    """A text as a Triton function: the same code, with these words in place of torch's."""
    # The interpreter looks for triton.language in the scope of every function.
    scope = {"__name__": text.__module__, "tl": tl, **_WORDS}
    if text not in _TEXTS:
        scope |= {word.__name__: compiled(word) for word in _TEXTS}
    return triton.jit(types.FunctionType(text.__code__, scope, text.__name__))


_TEXTS = (words.is_finite, words.clip)
"""Words that are texts themselves, here too."""
