"""What a backend does, and how torch does it: the reference, which defines what is right.

The seam between two passes over the parameters is always a few numbers. Two ways lead through a
pass. Where torch has a kernel that is right, one call serves a whole run of parameters. Elsewhere
the gradients of a run are gathered into a flat scratch buffer of the compute dtype, and the texts
of rules and ascents run on the flat buffers, rounding once on the way back.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from ..ascents import SQUARES, Ascent, Sums
from ..blends import Blend, Blending
from ..memory import Bucket, Gradients
from ..memory.bucket import Kept
from ..memory.members import AVERAGE
from ..rules import STEP, Group, Rule
from .ahead import Ahead, Groups, climbing, decay_ahead, momentum_of
from .mixing import is_zero, mix, signed_lr
from .rounding import HALVES, round_stochastically, seed_of
from .runs import CHUNK_ELEMENTS, Run, present, runs


class Backend:
    """Four operations on a bucket, none of which waits for the device.

    A slot whose gradient is missing is left out. ``groups`` are the optimizer's parameter groups;
    those of ``bucket.rows`` are looked at.
    """

    name = "reference"

    def stays(self, bucket: Bucket) -> bool:
        """Whether an update can leave the weights where they are, and a climb start from ``saved``.

        One of several operations could not: a half of them would lose w.
        """
        return False

    def bakes_in(self, bucket: Bucket, blend: Blend | None) -> str | None:
        """Why a CUDA graph of a step would keep numbers of the host's; None if it would not."""
        return "operations of torch's compute a step"

    def reduce(
        self,
        bucket: Bucket,
        sums: Sums,
        grads: Gradients,
        groups: Groups,
        earlier: Tensor | None = None,
        unscale: float = 1.0,
        kept: Kept | None = None,
    ) -> Tensor:
        """The sum, or the largest, of ``sums.terms`` over all elements that have a gradient.

        Args:
            bucket: only read.
            sums: which terms.
            grads: the gradients.
            groups: the options of each row.
            earlier: (k,) float64, on the bucket's device: what ``sums.after`` gave over all
                buckets; None where that is None.
            unscale: the inverse of the gradients' loss scale, for sums that depend on it.
            kept: what ``terms`` get in place of the weights, for ``sums.reads_kept``.

        Returns:
            (sums.count,) float64, on the bucket's device; infinite where the compute dtype cannot
            hold it.
        """
        dtype = torch.float64 if sums.wide else bucket.compute_dtype
        before = () if earlier is None else earlier.to(dtype).unbind()
        norms: list[Tensor] = []
        parts: list[Tensor] = []
        held = kept.held if kept is not None else None
        for run in runs(bucket, present(grads, held)):
            group = groups[run.row]
            if sums.squares(group) and bucket.grad_dtype.itemsize <= dtype.itemsize:
                pieces = [piece for grad in run.pick(grads.tensors) for piece in _pieces(grad)]
                norms += torch._foreach_norm(pieces, 2, dtype=dtype)
                continue
            grad, columns = run.gather(bucket, grads), sums.columns(group, unscale)
            for chunk in run.chunks():
                g = grad[chunk].to(dtype)
                if (average := sums.average) is not None:
                    m = run.of(bucket.member(AVERAGE).flat)[chunk]
                    g, _ = average.follow(g, m, *average.columns(group, unscale))
                other = run.weights if sums.reads_param(group) else None
                if kept is not None and run.kind[1]:
                    other = run.of(kept.flat)
                other = None if other is None else other[chunk].to(dtype)
                terms = sums.terms(other, g, *before, *columns)
                terms = torch.stack(terms) if sums.count > 1 else terms.unsqueeze(0)
                parts.append(_all_of(sums, terms))
        if norms:
            parts.append(torch.stack(norms).square_().sum(0, keepdim=True))
        if not parts:
            return torch.zeros(sums.count, dtype=torch.float64, device=bucket.device)
        return _all_of(sums, torch.stack(parts, 1)).double()

    def ascend_(
        self,
        bucket: Bucket,
        ascent: Ascent,
        grads: Gradients,
        groups: Groups,
        total: Tensor,
        number: int | Tensor,
        kept: Tensor | None = None,
        unscale: float = 1.0,
    ) -> None:
        """Save w, write the climb's number, then climb.

        Where a backend ``stays``, perturbed slots climb from the w that is in ``saved``.

        If ``total`` allows no climb nothing moves; w is saved all the same. A group with
        ``maximize`` moves against its gradient. Weights of half precision are rounded at random:
        see ``rounding``.

        The average of an ascent that has one takes the gradients in, unless the first number of
        ``total`` is not finite: then one of them is not.

        Args:
            bucket: ``saved`` and ``climb`` are written, and the weights and the average in place.
            ascent: the climb.
            grads: as for ``reduce``; only read. Of a climb along the momentum that, in its dtype.
            groups: rho and the other options of each row.
            total: (k,) float64, on the bucket's device: ``ascent.sums.chain`` over all buckets.
            number: the climb's; or where it is, (1,) int64 on the bucket's device.
            kept: (bucket.size,), gets the gradients as they are; None if nobody wants them.
            unscale: as for ``reduce``.
        """
        dtype, number = bucket.compute_dtype, int(number)
        plan = runs(bucket, present(grads))
        reduced = total.to(dtype).unbind()
        for run in plan:
            _save(bucket, run)
        bucket.climb.fill_(number)
        for run in plan:
            group = groups[run.row]
            if kept is not None:
                copies = run.split(bucket, "kept", kept)
                torch._foreach_copy_(copies, run.pick(grads.tensors))
            scalars = ascent.scalars(*reduced, *ascent.sums.columns(group, unscale))
            scale = scalars[0]
            kernel = ascent.kernel(group) if _has_fused(bucket) else None
            if kernel is not None:
                kernel(run.params, run.pick(grads.tensors), scale)
                continue
            grad = run.gather(bucket, grads)
            for chunk in run.chunks():
                g = grad[chunk]
                if (average := ascent.average) is not None:
                    m = run.of(bucket.member(AVERAGE).flat)[chunk]
                    g, new = average.follow(g, m, *average.columns(group, unscale))
                    m.copy_(torch.where(reduced[0].isfinite(), new, m))
                weights = run.of(bucket.saved)[chunk].to(dtype)
                moved = ascent.move(weights, g, *scalars)
                # 0 * inf is NaN, and a scale of 0 must move nothing.
                stays = run.weights[chunk].to(dtype)  # a master is not to be rounded anew
                moved = torch.where(scale == 0, stays, moved)
                if bucket.dtype in HALVES:
                    offset = run.start + chunk.start
                    moved = round_stochastically(moved, bucket.dtype, offset, seed_of(number))
                run.weights[chunk] = moved

    def update_(
        self,
        bucket: Bucket,
        rule: Rule,
        blending: Blending | None,
        grads: Gradients,
        groups: Groups,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        ahead: Ahead | None = None,
    ) -> Tensor | None:
        """Return the perturbed slots to w, and step those that have a gradient by the rule.

        A slot without a gradient is only restored. With lr 0 the weights are the saved bits.

        Args:
            bucket: weights and states, in place; ``climb`` is 0 afterwards.
            rule: the base optimizer's.
            blending: which gradient the groups that climb see; what is in it is the bucket's, on
                its device. ``blending.direction`` is written, unless the update is skipped. None:
                the one that is there, as those see that do not climb.
            grads: as for ``reduce``; may be overwritten.
            groups: the hyperparameters of each row.
            grad_scale: (), compute dtype, on the bucket's device: gradients are divided by it.
            found_inf: (), float32, on the bucket's device: if it is not 0, restore and no more.
            ahead: what a climb along the momentum needs that comes next; None: none does.

        Returns:
            With ``ahead`` the sum of the squares of the momentum, (1,) float64, on the bucket's
            device: of the slots that climb and have a gradient.
        """
        if ahead is not None:
            grads = decay_ahead(bucket, grads, groups, grad_scale)
        # torch's kernels take a float32 grad_scale, and skip only if found_inf is exactly 1.
        kernel = rule.kernel if _has_fused(bucket) else None
        # They unscale in place, which is once too often where two parameters have one gradient.
        known = [address for address in grads.addresses if address]
        if grad_scale is not None and (
            bucket.dtype != torch.float32 or len(set(known)) < len(known)
        ):
            kernel = None
        if found_inf is not None:
            found_inf = (found_inf != 0).float()
        if rule.counts:
            _count_steps(bucket, grads, found_inf)
        held = bucket.held if blending is None or blending.kept is None else blending.kept.held
        for run in runs(bucket, _kinds(bucket, rule, grads, groups, held)):
            has_grad, perturbed, held, fresh = run.kind
            group, saved = groups[run.row], run.of(bucket.saved)
            frozen = is_zero(group["lr"])
            if perturbed:
                run.weights.copy_(saved)
            if not has_grad:
                continue
            if not perturbed and (bucket.masters or frozen is not False):
                _save(bucket, run)
            home = saved if bucket.masters else run.weights
            before = saved.clone() if bucket.masters and frozen is not False else saved
            blends = blending is not None and group["ascent"] is not None
            if kernel is not None and not blends:
                buffers = {name: bucket.state(name).flat for name in rule.kept(group)}
                views = {name: run.split(bucket, name, flat) for name, flat in buffers.items()}
                kernel(
                    run.params, run.pick(grads.tensors), views, group, fresh, grad_scale, found_inf
                )
            else:
                grad = run.gather(bucket, grads)
                after = None
                if blends:
                    assert blending is not None
                    assert blending.kept is not None
                    kept = run.of(blending.kept.flat) if held else None
                    a, b, *more = blending.coefficients(group)
                    if blending.blend.after:
                        after = mix(more[0], more[1], grad, kept).mul_(signed_lr(group))
                    if blending.direction is None:
                        grad = mix(a, b, grad, kept)
                    else:
                        direction = run.of(blending.direction)
                        new = mix(a, b, grad, kept)
                        if found_inf is not None:
                            new = torch.where(found_inf != 0, direction, new)
                        direction.copy_(new)
                if grad_scale is not None:
                    grad.div_(grad_scale)
                if group["maximize"]:
                    grad.neg_()
                _update_run(bucket, run, rule, home, grad, after, group, fresh, found_inf)
            # 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only a copy gives the bits back.
            if frozen is True:
                home.copy_(before)
            elif frozen is not False:
                home.copy_(torch.where(frozen, before, home))
            if bucket.masters:
                run.weights.copy_(home)
        bucket.climb.zero_()
        if ahead is None:
            return None
        summed = momentum_of(bucket, ahead.momentum, climbing(bucket, grads.present, groups))
        return self.reduce(bucket, SQUARES, summed, groups)

    def restore_(self, bucket: Bucket) -> None:
        """Return the perturbed slots to w; ``climb`` is 0 afterwards."""
        for run in runs(bucket, tuple(flag or None for flag in bucket.perturbed)):
            run.weights.copy_(run.of(bucket.saved))
        bucket.climb.zero_()


def _all_of(sums: Sums, terms: Tensor) -> Tensor:
    """Of terms (k, n) the sums, or the largest, (k,); of a run without elements there are none."""
    return terms.amax(1) if sums.how == "max" and terms.numel() else terms.sum(1)


def _save(bucket: Bucket, run: Run) -> None:
    """Copy w to ``saved``: all of it, or where it is not the master, rounded, bit for bit."""
    saved = run.of(bucket.saved)
    if not bucket.masters:
        saved.copy_(run.weights)
        return
    for chunk in run.chunks():
        weights, master = run.weights[chunk], saved[chunk]
        same = master.to(bucket.dtype).view(torch.int16) == weights.view(torch.int16)
        master.copy_(torch.where(same, master, weights.float()))


def _pieces(grad: Tensor) -> Sequence[Tensor]:
    """A gradient in pieces: torch sums many squares naively, 25 million come out 0.15 % short."""
    if grad.numel() <= CHUNK_ELEMENTS:
        return (grad,)
    pieces: Sequence[Tensor] = grad.as_strided((grad.numel(),), (1,)).split(CHUNK_ELEMENTS)
    return pieces


def _has_fused(bucket: Bucket) -> bool:
    """Whether torch's fused optimizer kernels serve this bucket.

    Not for reduced precision: on a CPU ``_fused_sgd_`` gives wrong numbers there (torch 2.13), and
    elsewhere it rounds as it likes. Not for float64 on accelerators, where a tensor lr must be
    float32.
    """
    if bucket.device.type not in _get_fused_kernels_supported_devices():
        return False
    if not bucket.is_uniform:
        return False
    return bucket.dtype == torch.float32 or (
        bucket.dtype == torch.float64 and bucket.device.type == "cpu"
    )


def _kinds(
    bucket: Bucket, rule: Rule, grads: Gradients, groups: Groups, held: tuple[bool, ...]
) -> tuple[Hashable, ...]:
    """For each slot (has a gradient, is perturbed, is kept, has no state yet); None: untouched."""
    fresh = bucket.fresh({name for row in bucket.rows for name in rule.kept(groups[row])})
    return tuple(
        [
            kind if kind[0] or kind[1] else None
            for kind in zip(grads.present, bucket.perturbed, held, fresh, strict=True)
        ]
    )


def _count_steps(bucket: Bucket, grads: Gradients, found_inf: Tensor | None) -> None:
    """Add 1 to the step counts of the slots that step now."""
    stepping = torch.tensor(grads.present, dtype=torch.float32, device="cpu")
    if bucket.device.type == "cuda":
        stepping = stepping.pin_memory()  # else the copy would wait for the device
    stepping = stepping.to(bucket.device, non_blocking=True)
    bucket.state(STEP).flat.add_(stepping if found_inf is None else stepping * (1 - found_inf))


def _update_run(
    bucket: Bucket,
    run: Run,
    rule: Rule,
    home: Tensor,
    grad: Tensor,
    after: Tensor | None,
    group: Group,
    fresh: bool,
    found_inf: Tensor | None,
) -> None:
    """The rule's texts on the flat buffers of a run; ``home`` holds w: its weights or masters.

    ``after`` is subtracted from what the rule makes of w.
    """
    kept = rule.kept(group)
    names = [state.name for state in rule.states]
    flat = {name: run.of(bucket.state(name).flat) for name in names if name in kept}
    scalars = _scalars(bucket, run, rule, group, fresh)
    for chunk in run.chunks():
        targets = [home[chunk], *[flat[n][chunk] if n in flat else None for n in names]]
        param, *states = [None if t is None else t.to(grad.dtype) for t in targets]
        numbers = [s[chunk] if isinstance(s, Tensor) and s.dim() else s for s in scalars]
        value, *others = rule.update(param, grad[chunk], *states, *numbers)
        values = (value if after is None else value - after[chunk], *others)
        for target, value in zip(targets, values, strict=True):
            if target is not None:
                if found_inf is not None:
                    value = torch.where(found_inf != 0, target.to(value.dtype), value)
                target.copy_(value)
    for buffer in (home, *flat.values()):
        run.clear_padding(buffer)


def _scalars(
    bucket: Bucket, run: Run, rule: Rule, group: Group, fresh: bool
) -> tuple[float | Tensor, ...]:
    """The rule's scalars: numbers, (), or where they follow the step (elements of the run,)."""
    step: float | Tensor = 1.0
    if rule.counts:
        steps = bucket.state(STEP).flat[run.slots.start : run.slots.stop]
        step = steps.to(bucket.compute_dtype)
    lr = group["lr"]
    lr = lr.squeeze() if isinstance(lr, Tensor) else lr
    scalars = rule.scalars(lr, *rule.numbers(group), step, fresh)
    starts = [slot.start for slot in run.pick(bucket.slots)]
    lengths = [b - a for a, b in zip(starts, [*starts[1:], run.stop], strict=True)]
    return tuple(
        torch.cat([x.expand(n) for x, n in zip(s.unbind(), lengths, strict=True)])
        if isinstance(s, Tensor) and s.dim()
        else s
        for s in scalars
    )
