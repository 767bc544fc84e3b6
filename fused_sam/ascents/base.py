"""What an ascent is: the way from w to w + epsilon, as the backends fuse it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..choice import Choice as AnyChoice
from ..rules.base import Group
from ..text import Text


def _never(group: Group) -> bool:
    return False


def _no_kernel(group: Group) -> Kernel | None:
    return None


def _no_columns(group: Group, unscale: float) -> tuple[float, ...]:
    return ()


@dataclass(frozen=True)
class Choice(AnyChoice):
    """A climb as users name it."""

    kind: ClassVar[str] = "ascent"


Columns = Callable[[Group, float], tuple[float, ...]]
"""A group's numbers in float64. The second argument is the inverse of the gradients' loss scale at
w, as far as the optimizer was told; else 1."""


@dataclass(frozen=True)
class Average:
    """A running average of the gradients at w, and what a climb makes of it.

    It is kept in the compute dtype, and NaN where there is none yet. Where what is reduced of the
    directions is not finite, it stays as it was.

    Attributes:
        name: short name.
        follow: text, for each element: ``(grad, average, unscale, *columns) -> (direction,
            average)``: what takes the gradient's place in the climb, and what is kept for the next
            one. ``unscale`` is what the gradient is to be multiplied by.
        columns: a group's numbers, ``unscale`` the first of them.
    """

    name: str
    follow: Text
    columns: Columns

    @functools.cached_property
    def column_names(self) -> tuple[str, ...]:
        """What ``columns`` returns, by name."""
        return tuple(inspect.signature(self.follow).parameters)[2:]


@dataclass(frozen=True)
class Sums:
    """Numbers that are summed over all elements of all parameters that have a gradient.

    Attributes:
        name: short name: the C++ struct is called so.
        terms: text, for each element: ``(param, grad, *earlier, *columns) -> number``. ``param`` is
            None where no group reads it. A tuple where there are several numbers.
        columns: a group's numbers, in the order of the text's arguments.
        reads_param: whether ``terms`` needs the weights under a group's options.
        squares: whether ``terms`` are the squared gradients under a group's options: torch has a
            kernel for those.
        how: "sum", or "max": then the largest number, all being >= 0, and NaN if one is.
        after: what is reduced before; its numbers are ``earlier``.
        count: how many numbers.
        reads_kept: whether ``terms`` get what is kept of the gradient at w in place of the
            weights; None where nothing is.
        wide: whether all of it is in float64. There are no columns then.
        average: what makes a direction of each gradient, which ``terms`` get in its place; None
            where they get the gradient.
    """

    name: str
    terms: Text
    columns: Columns = _no_columns
    reads_param: Callable[[Group], bool] = _never
    squares: Callable[[Group], bool] = _never
    how: Literal["sum", "max"] = "sum"
    after: Sums | None = None
    count: int = 1
    reads_kept: bool = False
    wide: bool = False
    average: Average | None = None

    @property
    def chain(self) -> tuple[Sums, ...]:
        """All that has to be reduced, one after the other; this comes last."""
        return (self,) if self.after is None else (*self.after.chain, self)

    @property
    def earlier(self) -> int:
        """How many numbers are reduced before."""
        return len(self.chain) - 1

    @functools.cached_property
    def column_names(self) -> tuple[str, ...]:
        """What ``columns`` returns, by name."""
        return tuple(inspect.signature(self.terms).parameters)[2 + self.earlier :]

    def numbers(self, group: Group, unscale: float = 1.0) -> tuple[float, ...]:
        """A group's row of the table of hyperparameters: the average's numbers come last."""
        row = self.columns(group, unscale)
        if self.average is not None:
            row += self.average.columns(group, unscale)
        return tuple(map(float, row))


@dataclass(frozen=True)
class Ascent:
    """A climb that the backends fuse.

    Attributes:
        key: what a group's ``ascent`` says.
        name: short name: the C++ struct is called so.
        sums: what is reduced before it can climb; its columns are the ascent's.
        scalars: text, once for each parameter: ``(*numbers, *columns) -> (scale, ...)``, with
            all the numbers of ``sums.chain``. Where ``scale`` is 0 nothing moves, to the bit.
        move: text, for each element: ``(param, grad, *scalars) -> param``; ``grad`` is the
            direction where the sums have an average.
        kernel: a torch kernel that moves a group with these options, for the reference backend,
            or None where there is none: ``(params, grads, scale)``.
        norm: the norm that it climbs by, (), of a climbing group's options and all the numbers.
        real: whether a group's options leave complex parameters undefined.
        shared: options on which all groups that climb must agree.
        scale_matters: whether a loss scale changes the climb, which must then know the scale.
        along_momentum: whether the climb follows a step, against the momentum, and stays until the
            next one; ``grad`` is then the momentum.
    """

    key: str
    name: str
    sums: Sums
    scalars: Text
    move: Text
    norm: Callable[[Group, Tensor], Tensor]
    kernel: Callable[[Group], Kernel | None] = _no_kernel
    real: Callable[[Group], bool] = _never
    shared: tuple[str, ...] = ()
    scale_matters: bool = False
    along_momentum: bool = False

    @property
    def average(self) -> Average | None:
        """What is averaged over the steps; None where nothing is."""
        return self.sums.average

    def along(self, key: str, average: Average) -> Ascent:
        """The same climb along what an average makes of the gradients."""

        def averaged(sums: Sums) -> Sums:
            after = None if sums.after is None else averaged(sums.after)
            return dataclasses.replace(
                sums,
                name=average.name + sums.name,
                after=after,
                squares=_never,
                average=average,
            )

        return dataclasses.replace(
            self,
            key=key,
            name=average.name + self.name,
            sums=averaged(self.sums),
            kernel=_no_kernel,
            scale_matters=True,
        )


Kernel = Callable[[list[Tensor], list[Tensor], Tensor], None]
