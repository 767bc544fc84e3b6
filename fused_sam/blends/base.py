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
from ..memory.bucket import Kept
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
        coefficients: text, once for each parameter, in float64: ``(mixed, second, first, scale,
            *columns) -> (a, b)`` of the numbers <g, g'>, <g', g'>, <g, g>, which may be infinite or
            NaN, and of the loss scale that both gradients have. What has a coefficient of 0 is not
            looked at. A gradient that is missing at w counts as zero.
        columns: a group's numbers in float64, in the order of the text's arguments.
        shared: options on which all groups that climb must agree, because clipping has one norm.
        after: whether the text returns ``(a, b, c, d)``. Then ``w -= lr * (c * g' + d * g)`` after
            the base optimizer's step, g and g' as they are: the text unscales them.
        reuse: what the base optimizer sees in the steps that do not climb; None, their gradient.
            With one, it sees g' in those that do, and ``coefficients`` returns ``(e, f)``:
            ``e * g' + f * g`` is the direction that the others use again.
        length: text, in float64, for a blend with ``reuse``: ``(mixed, second, first) -> number``,
            the norm of the direction; 0 where there is none.
        reuses: whether this is the ``reuse`` of another blend. Then the numbers are <g, g> of the
            gradient alone, the direction takes the place of the other gradient, and its norm that
            of the loss scale: ``(square, length, *columns) -> (a, b)``.
    """

    key: str
    name: str
    coefficients: Text
    columns: Callable[[Group], tuple[float, ...]]
    shared: tuple[str, ...]
    after: bool = False
    reuse: Blend | None = None
    length: Text | None = None
    reuses: bool = False

    @property
    def count(self) -> int:
        """How many numbers the text gets."""
        return 1 if self.reuses else 3

    @functools.cached_property
    def column_names(self) -> tuple[str, ...]:
        """What ``columns`` returns, by name."""
        return tuple(inspect.signature(self.coefficients).parameters)[self.count + 1 :]

    def numbers(self, group: Group) -> tuple[float, ...]:
        """A group's row of the table of hyperparameters."""
        return tuple(map(float, self.columns(group)))


@dataclass(frozen=True)
class Blending:
    """A blend in one step.

    Attributes:
        blend: which one.
        numbers: (blend.count,) float64, what its coefficients are made of.
        scale: () float64, the loss scale of the gradients, None for 1; or the direction's norm.
        products: (3,) float64, what GRAM gives of both gradients, or of the gradient and the
            direction; None where nobody clips by it.
        kept: in one bucket, the other gradient, or the direction; None where it is not said.
        direction: in one bucket, (size,), where the direction goes; None where there is none.
    """

    blend: Blend
    numbers: Tensor
    scale: Tensor | None = None
    products: Tensor | None = None
    kept: Kept | None = None
    direction: Tensor | None = None

    def coefficients(self, group: Group) -> tuple[Tensor, ...]:
        """The factors of a group, each () float64."""
        scale = 1.0 if self.scale is None else self.scale
        columns = followed(lambda: self.blend.numbers(group), torch.float64)
        found = self.blend.coefficients(*self.numbers.unbind(), scale, *columns)
        return tuple([x if isinstance(x, Tensor) else self.numbers.new_full((), x) for x in found])

    @property
    def length(self) -> Tensor | None:
        """The norm of the direction, () float64; None for a blend that has none."""
        text = self.blend.length
        return None if text is None else text(*self.numbers.unbind())

    def sq_norm(self, unblended: Tensor, groups: Iterable[Group], others: Tensor | None) -> Tensor:
        """The squared norm of all that the base optimizer sees, ().

        Args:
            unblended: (), that of the gradients at w + epsilon, of groups that do not climb too.
            groups: the parameter groups, of which some climb, all by the same coefficients.
            others: (), that of the gradients of groups that do not climb; None if there are none.
        """
        if self.blend.reuse is not None:
            return unblended
        groups = list(groups)
        a, b, *_ = self.coefficients(next(g for g in groups if g["ascent"] is not None))
        assert self.products is not None
        mixed, second, first = self.products.unbind()
        # 0 * inf is NaN: what is not looked at does not count.
        blended = torch.where(a == 0, 0.0, a * a * second) + torch.where(b == 0, 0.0, b * b * first)
        blended = blended + torch.where((a == 0) | (b == 0), 0.0, 2 * a * b * mixed)
        if others is not None:
            blended = blended + others
        return torch.where((a == 1) & (b == 0), unblended, blended.clamp_min(0).to(unblended))
