"""What a finished step knows about itself, for those who ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .devices import moved


class Losses:
    """What the closures of a step have returned, in order.

    Attributes:
        at_w: in the passes at w.
        away: in those away from it.
    """

    def __init__(self) -> None:
        self.at_w: list[Any] = []
        self.away: list[Any] = []

    def note(self, value: Any, away: bool) -> Any:
        """Keep ``value`` if it is one number, without its graph; returns it."""
        values = self.away if away else self.at_w
        if isinstance(value, Tensor):
            if value.numel() == 1:
                values.append(value.detach())
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            values.append(value)
        return value


@dataclass(frozen=True)
class Square:
    """A squared norm as it was reduced.

    Attributes:
        numbers: (k,) float64, of which it is one.
        index: which one.
        scale: the loss scale of the gradients: a number, or one element; None where it is 1 or not
            known.
        inverse: one element, what undoes the scale, where that is not known.
    """

    numbers: Tensor
    index: int = 0
    scale: Tensor | float | None = None
    inverse: Tensor | None = None

    def norm(self) -> Tensor:
        """The norm of the unscaled gradients, () float64."""
        norm = self.numbers[self.index].sqrt()
        scale, inverse = self.scale, self.inverse
        if isinstance(scale, Tensor):
            norm = norm / moved(scale, norm.device, norm.dtype).squeeze()
        elif scale is not None:
            norm = norm / scale
        elif inverse is not None:
            norm = norm * moved(inverse, norm.device, norm.dtype).squeeze()
        return norm


@dataclass(frozen=True, eq=False)
class LastStep:
    """What the last step that was finished knows about itself: ``optimizer.last_step``.

    Nothing is computed before somebody reads it, and no step makes a pass over the parameters for
    it. So there is what the step itself needed; all else is None. ``optimizer.measures = True``
    lets the steps that follow know all of it, for a price.

    ====================  ===========================================================
    property              known without ``measures``
    ====================  ===========================================================
    ``climbed``           always
    ``grad_norm``         with SAM and USAM, not adaptive; with a blend; with AESAM;
                          with ``max_grad_norm`` in steps that do not climb
    ``second_grad_norm``  with a blend; with ``max_grad_norm``, if all groups climb
    ``cosine``            with a blend
    ``loss``,             in ``step(closure)`` and ``accumulate``, if a number is
    ``loss_perturbed``    returned
    ====================  ===========================================================

    Gradients are those of the groups that climb, not clipped, without a GradScaler's loss scale; of
    a skipped step they are not finite. Norms and cosine are tensors (), on the device of the
    first parameter, float64 if some parameter is, else float32. Reading one starts a few kernels
    there and does not wait; ``.item()`` does. An object keeps its values when other steps come.

    Attributes:
        climbed: whether the gradient that the base optimizer has used was taken away from w (or is
            a blend with that one). None before the first step.
    """

    climbed: bool | None = None
    _first: Square | None = field(default=None, repr=False)
    _second: Square | None = field(default=None, repr=False)
    _gram: Tensor | None = field(default=None, repr=False)
    _losses: Losses = field(default_factory=Losses, repr=False)
    _dtype: torch.dtype = field(default=torch.float32, repr=False)

    @classmethod
    def of(
        cls,
        *,
        climbed: bool,
        first: Tensor | None,
        first_scale: Tensor | float | None,
        inverse: Tensor | None,
        gram: Tensor | None,
        used: Tensor | None,
        scale: Tensor | None,
        losses: Losses,
        dtype: torch.dtype,
    ) -> LastStep:
        """What is known of a step.

        Args:
            climbed: as the attribute.
            first: (1,) float64, the squared norm of the gradients at w, or None.
            first_scale: the loss scale of these.
            inverse: its inverse, where it is not known itself.
            gram: ``GRAM`` of the gradients of both passes, or None.
            used: (1,) float64, the squared norm of the gradients that the step has used, or None.
            scale: the loss scale of these.
            losses: of its closures.
            dtype: of what is told.
        """
        at_w = second = None
        if first is not None:
            at_w = Square(first, 0, first_scale, inverse)
        elif gram is not None:
            at_w = Square(gram, 2, first_scale, inverse)
        if gram is not None:
            second = Square(gram, 1, scale)
        elif used is not None:
            second = Square(used, 0, scale)
        if not climbed:
            at_w, second = second or at_w, None
        return cls(climbed, at_w, second, gram, losses, dtype)

    def copied(self) -> LastStep:
        """The same in memory of its own: a CUDA graph writes over what it has found out."""
        known: dict[int, Tensor] = {}

        def own(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in known:
                known[id(value)] = value.clone()
            return known[id(value)]

        def square(of: Square | None) -> Square | None:
            return of and Square(own(of.numbers), of.index, own(of.scale), own(of.inverse))

        losses = Losses()
        losses.at_w = list(map(own, self._losses.at_w))
        losses.away = list(map(own, self._losses.away))
        first, second, gram = square(self._first), square(self._second), own(self._gram)
        return LastStep(self.climbed, first, second, gram, losses, self._dtype)

    @property
    def grad_norm(self) -> Tensor | None:
        """``||g||``, the L2 norm of the gradient at w, whatever norm the climb goes by.

        None with MSAM, which takes none at w, and if each micro-batch climbed by itself.
        """
        return None if self._first is None else self._first.norm().to(self._dtype)

    @property
    def second_grad_norm(self) -> Tensor | None:
        """``||g'||``, the L2 norm of the gradient at w + epsilon; None without a climb."""
        return None if self._second is None else self._second.norm().to(self._dtype)

    @property
    def cosine(self) -> Tensor | None:
        """``<g, g'> / (||g|| ||g'||)``, from -1 to 1; NaN where a gradient is zero or not finite.

        A gradient that is missing at w counts as zero there; one that is missing at w + epsilon
        does not count in g.
        """
        if self._gram is None:
            return None
        mixed, second, first = self._gram.unbind()
        return (mixed / (first.sqrt() * second.sqrt())).clamp(-1, 1).to(self._dtype)

    @property
    def loss(self) -> Any:
        """What the closure returned at w, a number or a tensor without its graph; None: nothing.

        With ``accumulate`` it is the sum over the micro-batches.
        """
        return _sum(self._losses.at_w)

    @property
    def loss_perturbed(self) -> Any:
        """What it returned at w + epsilon: minus ``loss``, that is the sharpness that SAM sees.

        With MSAM there is this one only.
        """
        return _sum(self._losses.away)


def _sum(values: list[Any]) -> Any:
    return sum(values[1:], values[0]) if values else None
