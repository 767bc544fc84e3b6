"""Triton's interpreter for the tests: as GPUs round, and faster. Import before triton.

Importing this sets TRITON_INTERPRET=1, so that ``backend="triton"`` runs on the CPU.
"""

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_cast = interpreter.InterpreterBuilder.cast_impl
_patch_lang = interpreter._patch_lang


def _cast_to_nearest(self, src, dst_type):
    """The interpreter cuts float32 off to bfloat16; GPUs round to the nearest, ties to even."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        data = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return interpreter.TensorHandle(data.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, src, dst_type)


def _binary(self, operation, lhs, rhs):
    return self.binary_op(lhs, rhs, operation)


class _Kept:
    """What was patched stays patched: in this process nothing compiles."""

    def restore(self):
        """Nothing to do."""


@functools.cache
def _patch_once(fn):
    """Patching triton.language anew for each launch and each call takes half of the time."""
    _patch_lang(fn)
    tl.tensor.__index__ = _index
    return _Kept()


def _index(tensor):
    """Triton 3.6's own makes a number of an array of one, which NumPy 2.4 refuses."""
    return tensor.handle.data.item()


_get_np_dtype = interpreter._get_np_dtype
_np_dtype_of = functools.cache(_get_np_dtype)


def _np_dtype(dtype):
    """The interpreter makes a dictionary of all dtypes for each look-up."""
    return _np_dtype_of(dtype) if type(dtype) is tl.dtype else _get_np_dtype(dtype)


np.seterr(all="ignore")  # lanes without an element may compute 0 / 0, as on a GPU
interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest
# A GPU's maximum and minimum drop NaN unless they are told to keep it; the interpreter's keep it.
interpreter.InterpreterBuilder.create_maxnumf = functools.partialmethod(_binary, np.fmax)
interpreter.InterpreterBuilder.create_minnumf = functools.partialmethod(_binary, np.fmin)
interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _np_dtype
