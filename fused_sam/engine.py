"""What a step does over all buckets: gradients, reduce, combine, climb, update, return."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import blends
from .ascents import GRAM, SQUARES, Ascent, Sums, chosen
from .backends import Backend, Groups, capture, combine
from .backends.ahead import Ahead, climbing
from .backends.mixing import after_, blend_
from .blends import Blend, Blending
from .devices import moved
from .memory import Bucket, Gradients, Layout
from .memory.bucket import Kept
from .memory.members import AVERAGE, DIRECTION, LENGTH
from .memory.state import State, check_states
from .options import CLIMBS
from .recording import recording


class Engine:
    """The buckets of an optimizer and the backend of each: made together, replaced together.

    Args:
        layout: the buckets.
        backends: one for each bucket.
    """

    def __init__(self, layout: Layout, backends: Sequence[Backend]) -> None:
        self.layout = layout
        self.buckets = layout.buckets
        self.backends = list(backends)

    def number(self, total: Tensor) -> Tensor:
        """A number about all parameters as (): float64 if some parameter is, else float32."""
        return total.to(self.wide).squeeze()

    @functools.cached_property
    def wide(self) -> torch.dtype:
        """The dtype of numbers about all parameters."""
        doubles = any(bucket.compute_dtype == torch.float64 for bucket in self.buckets)
        return torch.float64 if doubles else torch.float32

    def gradients(self) -> list[Gradients]:
        """The gradients of every bucket; raises, before any change, if one cannot be used."""
        return [bucket.gradients() for bucket in self.buckets]

    def reduce(
        self,
        sums: Sums,
        grads: Sequence[Gradients],
        groups: Groups,
        unscale: float = 1.0,
        kept: Sequence[Kept | None] | None = None,
    ) -> Tensor:
        """What ``sums.chain`` gives over all parameters that have a gradient: (k,) float64.

        ``unscale``: the inverse of the gradients' loss scale. ``kept``: what ``sums`` reads of each
        bucket, if it reads what is kept.
        """
        kept = kept or [None] * len(self.buckets)
        earlier = None if sums.after is None else self.reduce(sums.after, grads, groups, unscale)
        parts = [
            backend.reduce(
                *(bucket, sums, of_bucket, groups, _on(bucket, earlier, torch.float64), unscale),
                of_kept,
            )
            for (backend, bucket, of_bucket), of_kept in zip(self._each(grads), kept, strict=True)
        ]
        total = combine(parts, self.buckets, sums.how, sums.count)
        return total if earlier is None else torch.cat([earlier, total])

    def climb(
        self,
        ascent: Ascent,
        grads: Sequence[Gradients],
        groups: Groups,
        counter: dict[str, Any],
        keep: bool = False,
        unscale: float = 1.0,
        total: Tensor | None = None,
    ) -> Tensor:
        """Save w and climb, under the next number; returns what was reduced, (k,) float64.

        Groups whose ``ascent`` is None take no part. ``counter``: the group that counts the climbs.
        ``keep``: the gradients are kept for a blend. ``unscale``: the inverse of their loss scale.
        ``total``: what was reduced, if it is known.
        """
        number: int = counter.get(CLIMBS, 0) + 1
        counter[CLIMBS] = number
        graph = recording()
        there = number if graph is None else graph.table(lambda: (counter[CLIMBS],), torch.int64)
        grads = self.climbing(grads, groups)
        if ascent.average is not None:
            for bucket, bucket_grads in zip(self.buckets, grads, strict=True):
                bucket.member(AVERAGE).show(bucket_grads.present)
        if total is None:
            total = self.reduce(ascent.sums, grads, groups, unscale)
        for backend, bucket, bucket_grads in self._each(grads):
            here = moved(total, bucket.device, total.dtype)
            bucket.settle()
            kept = bucket.begin_climb(number, bucket_grads, keep)
            backend.ascend_(bucket, ascent, bucket_grads, groups, here, there, kept, unscale)
            bucket.end()
            bucket.bump_versions(bucket_grads)
        return total

    def take_in(self, state: State, groups: Groups) -> None:
        """Notice optimizer state that was replaced since the last step."""
        states = self.layout.states
        if not states.is_current(state):
            check_states(self.layout.rule, groups, state)
            states.adopt(state, groups)

    def begin_members(self, groups: Groups) -> None:
        """Show in checkpoints what the members will keep, for libraries that ask beforehand."""
        blend, members = blends.chosen(groups), self.layout.members
        if reused := blend is not None and blend.reuse is not None:
            members.number(LENGTH)
        for bucket in self.buckets:
            climbing = [groups[slot.row]["ascent"] is not None for slot in bucket.slots]
            if any(climbing) and chosen(groups).average is not None:
                bucket.member(AVERAGE).show(climbing)
            if any(climbing) and reused:
                bucket.member(DIRECTION).show(climbing)

    def climbing(self, grads: Sequence[Gradients], groups: Groups) -> list[Gradients]:
        """The gradients of the groups that climb; the others count as missing."""
        return [_of(b, g, groups, True) for b, g in zip(self.buckets, grads, strict=True)]

    def square_of_others(self, grads: Sequence[Gradients], groups: Groups) -> Tensor | None:
        """The squared norm, (), of the gradients of groups that do not climb; None without any.

        The difference of two norms would be as coarse as the larger one.
        """
        if all([group["ascent"] is not None for group in groups]):
            return None
        others = [_of(b, g, groups, False) for b, g in zip(self.buckets, grads, strict=True)]
        return self.reduce(SQUARES, others, groups).squeeze()

    def gram(self, grads: Sequence[Gradients], groups: Groups) -> Tensor:
        """``GRAM`` of these gradients at w + epsilon and those that are kept: (3,) float64."""
        kept = [bucket.make_kept() for bucket in self.buckets]
        return self.reduce(GRAM, self.climbing(grads, groups), groups, kept=kept)

    def reusing(
        self, blend: Blend, grads: Sequence[Gradients], groups: Groups, clips: bool
    ) -> Blending | None:
        """What a blend needs to know that uses a direction again; None where there was none yet.

        Args:
            blend: which one.
            grads: those of now, at w.
            groups: the options of each row.
            clips: whether the norm of the blend will be asked for.
        """
        climbing = self.climbing(grads, groups)
        if (length := self.layout.members.numbers.get(LENGTH)) is None:
            return None
        if not clips:
            return Blending(blend, self.reduce(SQUARES, climbing, groups), length)
        kept = [bucket.direction() for bucket in self.buckets]
        products = self.reduce(GRAM, climbing, groups, kept=kept)
        return Blending(blend, products[1:2], length, products)

    def update(
        self,
        blending: Blending | None,
        grads: Sequence[Gradients],
        groups: Groups,
        state: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        stays: bool | None = None,
    ) -> Tensor | None:
        """Return to w and step by the rule, which there must be.

        Args:
            blending: which gradient the rule sees.
            grads: the gradients.
            groups: the hyperparameters of each row.
            state: the optimizer's.
            grad_scale: gradients are divided by it.
            found_inf: if it is not 0, the update is skipped.
            stays: whether weights that are ahead of w along the momentum stay there until the next
                climb, their new w being in ``saved``. None: no such climb comes next.

        Returns:
            The sum of the squares of the new momentum, (1,) float64, of what climbs and has a
            gradient; None where no such climb comes next.
        """
        rule, states = self.layout.rule, self.layout.states
        parts: list[Tensor] = []
        assert rule is not None
        self.take_in(state, groups)
        for backend, bucket, bucket_grads in self._each(grads):
            bucket.settle()
            away, ahead = bucket.perturbed, None
            if stays is not None:
                assert rule.momentum is not None
                stay = stays and backend.stays(bucket)
                ahead = Ahead.of(bucket, rule.momentum, bucket_grads, groups, stay)
            bucket.begin_return(None if ahead is None else ahead.stays)
            try:
                part = backend.update_(
                    bucket,
                    rule,
                    _there(bucket, blending),
                    bucket_grads,
                    groups,
                    grad_scale=_on(bucket, grad_scale, bucket.compute_dtype),
                    found_inf=_on(bucket, found_inf, torch.float32),
                    ahead=ahead,
                )
                parts += [] if part is None else [part]
                bucket.bump_versions(bucket_grads)
                bucket.end()
                states.expose(bucket, bucket_grads, groups, state, found_inf)
            except BaseException:
                if not bucket.settle() and any(away):
                    bucket.clear_unshown()
                else:
                    states.expose(bucket, bucket_grads, groups, state, found_inf)
                if blending is not None and blending.blend.reuse is not None:
                    self.layout.members.number(LENGTH).zero_()  # or it may be another direction's
                raise
        self._carry(blending, [of_bucket.present for of_bucket in grads], groups, found_inf)
        return combine(parts, self.buckets) if parts else None

    def _carry(
        self,
        blending: Blending | None,
        stepped: Sequence[Sequence[bool]],
        groups: Groups,
        found_inf: Tensor | None,
    ) -> None:
        """Keep the norm of the direction that a blend has left, unless the update was skipped.

        ``stepped``: for each bucket, which slots had a gradient; the others have no direction then.
        """
        if blending is None or (length := blending.length) is None:
            return
        if LENGTH not in self.layout.members.numbers:
            capture.refuse_to_prepare(length.device, "no step has climbed yet")
        carried = self.layout.members.number(LENGTH)
        carried.copy_(_unless(found_inf, length, carried))
        without = self.layout.members.waiting(DIRECTION)
        for bucket, had in zip(self.buckets, stepped, strict=True):
            buffer = bucket.member(DIRECTION)
            left = climbing(bucket, had, groups)
            without += [
                slot.of(buffer.flat)
                for slot, new, there in zip(bucket.slots, left, buffer.present, strict=True)
                if there and not new
            ]
            buffer.show(left)
        for old in without:
            old.copy_(_unless(found_inf, torch.zeros_like(old), old))

    def blend(self, blending: Blending | None, groups: Groups, grad_scale: Tensor | None) -> None:
        """Give a base optimizer without a rule the gradients that it is to see."""
        stepped = []
        for bucket in self.buckets:
            grads = [slot.param.grad for slot in bucket.slots]
            stepped.append([grad is not None for grad in grads])
            scale = _on(bucket, grad_scale, bucket.compute_dtype)
            blend_(bucket, _there(bucket, blending), grads, groups, scale)
        self._carry(blending, stepped, groups, None)

    def after(self, stepped: Sequence[Sequence[bool]], groups: Groups) -> None:
        """Subtract what a blend has left for after the step of a base optimizer without a rule.

        Args:
            stepped: for each bucket, which slots had a gradient then.
            groups: as they were then.
        """
        for bucket, had in zip(self.buckets, stepped, strict=True):
            after_(bucket, had, groups)

    def restore(self) -> list[str]:
        """Return to w, without any check; each bucket whatever becomes of the others.

        Returns:
            What to say of each parameter that cannot hold its w any more.
        """
        error: Exception | None = None
        lost: list[str] = []
        for backend, bucket in zip(self.backends, self.buckets, strict=True):
            try:
                bucket.settle()
                if any(bucket.perturbed):
                    bucket.begin_return()
                    if bucket.is_in_place():
                        backend.restore_(bucket)
                        bucket.bump_versions()
                    else:
                        lost += bucket.restore_each()
                    bucket.end()
            except Exception as failed:
                error = failed
        if error is not None:
            raise error
        return lost

    def _each(self, grads: Sequence[Gradients]) -> list[tuple[Backend, Bucket, Gradients]]:
        return list(zip(self.backends, self.buckets, grads, strict=True))


def _of(bucket: Bucket, grads: Gradients, groups: Groups, climbing: bool) -> Gradients:
    """The gradients of the groups that climb, or of the others; all else counts as missing."""
    wanted = {row: (groups[row]["ascent"] is not None) == climbing for row in bucket.rows}
    if all(wanted.values()):
        return grads
    return Gradients.of(
        [
            grad if wanted[slot.row] else None
            for slot, grad in zip(bucket.slots, grads.tensors, strict=True)
        ]
    )


def _there(bucket: Bucket, blending: Blending | None) -> Blending | None:
    if blending is None:
        return None
    blend = blending.blend
    return Blending(
        blend,
        moved(blending.numbers, bucket.device, torch.float64),
        _on(bucket, blending.scale, torch.float64),
        kept=bucket.direction() if blend.reuses else bucket.make_kept(),
        direction=None if blend.reuse is None else bucket.member(DIRECTION).flat,
    )


def _unless(found_inf: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new``, or ``old`` where an update was skipped."""
    if found_inf is None:
        return new
    return torch.where(moved(found_inf, old.device, torch.float32) != 0, old, new)


def _on(bucket: Bucket, value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else moved(value, bucket.device, dtype)
