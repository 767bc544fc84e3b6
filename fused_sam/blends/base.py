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
        coefficients: text, once for each parameter, in float64: ``(mixed, second, first, scale,
            *columns) -> (a, b)`` of the numbers <g, g'>, <g', g'>, <g, g>, which may be infinite or
            NaN, and of the loss scale that both gradients have. What has a coefficient of 0 is not
            looked at. A gradient that is missing at w counts as zero.
        columns: a group's numbers in float64, in the order of the text's arguments.
        shared: options on which all groups that climb must agree, because clipping has one norm.
        after: whether the text returns ``(a, b, c, d)``. Then ``w -= lr * (c * g' + d * g)`` after
            the base optimizer's step, g and g' as they are: the text unscales them.
    """

    key: str
    name: str
    coefficients: Text
    columns: Callable[[Group], tuple[float, ...]]
    shared: tuple[str, ...]
    after: bool = False

    @functools.cached_property
    def column_names(self) -> tuple[str, ...]:
        """What ``columns`` returns, by name."""
        return tuple(inspect.signature(self.coefficients).parameters)[4:]

    def numbers(self, group: Group) -> tuple[float, ...]:
        """A group's row of the table of hyperparameters."""
        return tuple(map(float, self.columns(group)))


@dataclass(frozen=True)
class Blending:
    """A blend in one step.

    Attributes:
        blend: which one.
        numbers: (3,) float64, what its coefficients are made of.
        scale: () float64, the loss scale of the gradients; None for 1.
    """

    blend: Blend
    numbers: Tensor
    scale: Tensor | None = None

    def coefficients(self, group: Group) -> tuple[Tensor, ...]:
        """The factors of a group, each () float64."""
        scale = 1.0 if self.scale is None else self.scale
        found: tuple[Tensor, ...] = self.blend.coefficients(
            *self.numbers.unbind(), scale, *self.blend.numbers(group)
        )
        return found

    def sq_norm(self, unblended: Tensor, groups: Iterable[Group], others: Tensor | None) -> Tensor:
        """The squared norm of all that the base optimizer sees, ().

        Args:
            unblended: (), that of the gradients at w + epsilon, of groups that do not climb too.
            groups: the parameter groups, of which some climb, all by the same coefficients.
            others: (), that of the gradients of groups that do not climb; None if there are none.
        """
        groups = list(groups)
        a, b, *_ = self.coefficients(next(g for g in groups if g["ascent"] is not None))
        mixed, second, first = self.numbers.unbind()
        # 0 * inf is NaN: what is not looked at does not count.
        blended = torch.where(a == 0, 0.0, a * a * second) + torch.where(b == 0, 0.0, b * b * first)
        blended = blended + torch.where((a == 0) | (b == 0), 0.0, 2 * a * b * mixed)
        if others is not None:
            blended = blended + others
        return torch.where((a == 1) & (b == 0), unblended, blended.clamp_min(0).to(unblended))
