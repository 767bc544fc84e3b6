"""The place of one parameter in its bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .window import has_memory


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one parameter in its bucket; ``start`` and ``numel`` count real elements.

    Attributes:
        param: the parameter.
        row: the index of its group.
        start: where it begins in the flat buffers.
        numel: its real elements; a complex number has two.
        part: which of the bucket's allocations its weights are in; None if they stay in place.
        dtype: the parameter's, which may be complex.
        shape, stride: the parameter's.
        grad_dtype: its gradient's, which may be wider or narrower.
    """

    param: Tensor
    row: int
    start: int
    numel: int
    part: int | None
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    grad_dtype: torch.dtype

    @property
    def pinned(self) -> bool:
        """Whether its weights stay where they are, in nobody's allocation but the user's."""
        return self.part is None

    def is_like(self, param: Tensor) -> bool:
        """Whether the parameter still has the shape, strides and dtype of its slot."""
        return (
            param.shape == self.shape
            and param.stride() == self.stride
            and param.dtype is self.dtype
            and not (param.is_conj() or param.is_neg())
        )

    def misfit(self) -> str | None:
        """Why the parameter cannot hold the weights of its slot any more; None if it can."""
        param, what = self.param, f"a parameter of shape {tuple(self.shape)}"
        if param.shape != self.shape:
            return f"{what} has shape {tuple(param.shape)} now"
        if param.is_complex() != self.dtype.is_complex or not (
            param.is_floating_point() or param.is_complex()
        ):
            return f"{what} and dtype {self.dtype} has dtype {param.dtype} now"
        plain = type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
        if not plain or param.layout is not torch.strided or param.is_meta or param.is_inference():
            return f"{what} has no memory now that can be written to"
        return None if has_memory(param) else f"{what} has a storage now that is too small for it"

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
