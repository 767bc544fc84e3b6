"""What a blend is: the gradient that a rule sees, made of those at w and at w + epsilon."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..choice import Choice as AnyChoice
from ..recording import followed
from ..rules.base import Group
from ..text import Text


@dataclass(frozen=True)
class Choice(AnyChoice):
    """A blend as users name it. Groups hold its options as ``blend_...``."""

    kind: ClassVar[str] = "blend"
    prefix: ClassVar[str] = "blend_"


@dataclass(frozen=True)
class Blend:
    """The gradient that the base optimizer steps with: ``a * g' + b * g``.

    Attributes:
        key: what a group's ``blend`` says.
        name: short name: the C++ struct is called so.
        coefficients: text, once for each parameter, in float64: ``(mixed, second, first, *columns)
            -> (a, b)`` of the numbers <g, g'>, <g', g'>, <g, g>, which may be infinite or NaN.
            Where b is 0, g is not looked at.
        columns: a group's numbers in float64, in the order of the text's arguments.
        shared: options on which all groups that climb must agree, because clipping has one norm.
    """

    key: str
    name: str
    coefficients: Text
    columns: Callable[[Group], tuple[float, ...]]
    shared: tuple[str, ...]

    @functools.cached_property
    def column_names(self) -> tuple[str, ...]:
        """What ``columns`` returns, by name."""
        return tuple(inspect.signature(self.coefficients).parameters)[3:]

    def numbers(self, group: Group) -> tuple[float, ...]:
        """A group's row of the table of hyperparameters."""
        return tuple(map(float, self.columns(group)))


@dataclass(frozen=True)
class Blending:
    """A blend in one step.

    Attributes:
        blend: which one.
        numbers: (3,) float64, what its coefficients are made of.
    """

    blend: Blend
    numbers: Tensor

    def coefficients(self, group: Group) -> tuple[Tensor, Tensor]:
        """The factors a and b of a group, each () float64."""
        columns = followed(lambda: self.blend.numbers(group), torch.float64)
        a, b = self.blend.coefficients(*self.numbers.unbind(), *columns)
        return a, b

    def sq_norm(self, unblended: Tensor, groups: Iterable[Group]) -> Tensor:
        """The squared norm of all that the base optimizer sees, ().

        Args:
            unblended: (), that of the gradients at w + epsilon, of groups that do not climb too.
            groups: the parameter groups, of which some climb, all by the same coefficients.
        """
        a, b = self.coefficients(next(group for group in groups if group["ascent"] is not None))
        mixed, second, first = self.numbers.unbind()
        # 0 * inf is NaN: what is not looked at does not count.
        other = torch.where(b == 0, 0.0, b * (2 * a * mixed + b * first))
        blended = unblended + ((a * a - 1) * second + other).to(unblended)
        return torch.where((a == 1) & (b == 0), unblended, blended.clamp_min(0))
