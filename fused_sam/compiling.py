"""torch.compile: what it must not look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

WRITES = "it writes the parameters through other tensors, with kernels of its own"

_Function = TypeVar("_Function", bound=Callable[..., Any])
_prepare: list[Callable[[], None]] = []


def opaque(why: str) -> Callable[[_Function], _Function]:
    """A function that torch.compile calls and does not trace: a graph break.

    With ``fullgraph=True`` that is torch's error, which says ``why``.
    """

    def decorate(function: _Function) -> _Function:
        disabled: list[Callable[..., Any]] = []
        reason = f"{function.__qualname__} of fused_sam cannot be part of a graph: {why}"
        _prepare.append(lambda: disabled.append(torch.compiler.disable(function, reason=reason)))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return disabled[0](*args, **kwargs)
            return function(*args, **kwargs)

        return cast("_Function", call)

    return decorate


def prepare() -> None:
    """Make what ``opaque`` needs when a compiler comes by: that imports it, which takes seconds."""
    while _prepare:
        _prepare.pop()()
