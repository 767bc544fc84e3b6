"""The place of one parameter in its bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one parameter in its bucket; ``start`` and ``numel`` count real elements.

    Attributes:
        param: the parameter.
        row: the index of its group.
        start: where it begins in the flat buffers.
        numel: its real elements; a complex number has two.
        pinned: whether its weights stay where they are, outside the flat buffer.
        dtype: the parameter's, which may be complex.
        shape, stride: the parameter's.
    """

    param: Tensor
    row: int
    start: int
    numel: int
    pinned: bool
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The slot's part of a flat buffer: (numel,), real."""
        return flat[self.start : self.start + self.numel]

    def real(self, memory: Tensor) -> Tensor:
        """``memory`` (numel,) in the parameter's shape; complex as (..., 2) reals."""
        if self.dtype.is_complex:
            stride = (*(2 * s for s in self.stride), 1)
            return memory.as_strided((*self.shape, 2), stride)
        return memory.as_strided(self.shape, self.stride)

    def shaped(self, memory: Tensor) -> Tensor:
        """``memory`` (numel,) in the parameter's shape, strides and dtype."""
        real = self.real(memory)
        return torch.view_as_complex(real) if self.dtype.is_complex else real
