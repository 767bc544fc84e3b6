"""Triton's interpreter for the tests: as GPUs round, and faster. Import before triton.

Importing this sets TRITON_INTERPRET=1, so that ``backend="triton"`` runs on the CPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_cast = interpreter.InterpreterBuilder.cast_impl
_call = interpreter.InterpretedFunction.__call__


def _cast_to_nearest(self, src, dst_type):
    """The interpreter cuts float32 off to bfloat16; GPUs round to the nearest, ties to even."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        data = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return interpreter.TensorHandle(data.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, src, dst_type)


def _call_device_function(self, *args, **kwargs):
    """The interpreter patches triton.language anew for each call, which takes half of its time.

    For a function of the kernels' own module their launch has done that already.
    """
    if self.fn.__module__.startswith("fused_sam."):
        return self.rewrite()(*args, **kwargs)
    return _call(self, *args, **kwargs)


np.seterr(all="ignore")  # lanes without an element may compute 0 / 0, as on a GPU
interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest
interpreter.InterpretedFunction.__call__ = _call_device_function
