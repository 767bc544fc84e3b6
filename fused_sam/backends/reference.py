"""The reference backend: plain PyTorch on whole buffers, anywhere; it defines what is right.

Two ways lead through it. Where torch has a fused kernel that is right, one call serves a whole run
of parameters. Elsewhere the gradients of a run are gathered into a flat scratch buffer of the
compute dtype, and the rule's mathematics run on the flat buffers, rounding once on the way back.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from ..layout import Bucket, Slot, as_real
from ..rules import STEP, Group, Rule
from .interface import Gradients, Groups

_RUN_ELEMENTS = 1 << 20
"""Runs end here, so that what one operation writes is still in cache when the next one reads it."""

_CHUNK_ELEMENTS = 1 << 17
"""The size of the pieces in which arithmetic with temporaries goes over a run."""

_MAX_PLANS = 16
"""Patterns of missing gradients that a bucket remembers; a few recur, or else they never do."""


@dataclass(frozen=True, eq=False)
class _Run:
    """Neighbouring slots of one group that are treated alike, and views of their memory."""

    kind: Any
    row: int
    slots: range
    start: int
    stop: int
    weights: Tensor
    """(stop - start,): the weights in memory order, padding included."""
    params: list[Tensor]
    """The weights parameter by parameter, in their shapes; complex as (..., 2) reals."""
    padding: Tensor | None
    """Indices of padding within the run."""
    views: dict[str, list[Tensor]] = field(default_factory=dict)
    """Flat buffers parameter by parameter, like ``params``, under the buffer's name."""

    def of(self, flat: Tensor) -> Tensor:
        """The run's part of a flat buffer."""
        return flat[self.start : self.stop]

    def chunks(self) -> Iterator[slice]:
        """The run in pieces whose temporaries stay in cache."""
        for start in range(0, self.stop - self.start, _CHUNK_ELEMENTS):
            yield slice(start, start + _CHUNK_ELEMENTS)

    def pick(self, items: Sequence[Any]) -> list[Any]:
        """The run's part of a list with an item for each slot."""
        return list(items[self.slots.start : self.slots.stop])

    def split(self, bucket: Bucket, name: str, flat: Tensor) -> list[Tensor]:
        """A flat buffer parameter by parameter; ``step`` has one element for each."""
        if name not in self.views:
            if name == STEP:
                self.views[name] = [flat[i] for i in self.slots]
            else:
                self.views[name] = [slot.real(slot.of(flat)) for slot in self.pick(bucket.slots)]
        return self.views[name]


def _runs(bucket: Bucket, kinds: tuple[Hashable, ...]) -> list[_Run]:
    """The slots cut into runs of equal kind; a slot of kind None is left out."""
    plans: dict[Any, list[_Run]] = bucket.cache.setdefault(_runs, {})
    if kinds not in plans:
        if len(plans) == _MAX_PLANS:
            plans.clear()
        plans[kinds] = [_make_run(bucket, kinds[s.start], s) for s in _spans(bucket.slots, kinds)]
    return plans[kinds]


def _spans(slots: Sequence[Slot], kinds: Sequence[Hashable]) -> Iterator[range]:
    start = elements = 0
    for i, slot in enumerate(slots):
        first = slots[start]
        together = (
            kinds[i] == kinds[start]
            and slot.row == first.row
            and not slot.pinned
            and not first.pinned
            and elements + slot.numel <= _RUN_ELEMENTS
        )
        if i and not together:
            if kinds[start] is not None:
                yield range(start, i)
            start, elements = i, 0
        elements += slot.numel
    if slots and kinds[start] is not None:
        yield range(start, len(slots))


def _make_run(bucket: Bucket, kind: Any, span: range) -> _Run:
    slots = bucket.slots[span.start : span.stop]
    first, last = slots[0], slots[-1]
    stop = last.start + last.numel
    weights = bucket.memory(first) if first.pinned else bucket.weights[first.start : stop]
    gaps = [
        torch.arange(a.start + a.numel - first.start, b.start - first.start, device="cpu")
        for a, b in itertools.pairwise(slots)
    ]
    padding = torch.cat(gaps) if gaps else torch.empty(0, device="cpu")
    return _Run(
        kind,
        first.row,
        span,
        first.start,
        stop,
        weights,
        # Through detach(), which shares the version counter: autograd notices what is written.
        [as_real(slot.param.detach()) for slot in slots],
        padding.to(bucket.device) if padding.numel() else None,
    )


def _gather(bucket: Bucket, run: _Run, grads: Gradients) -> Tensor:
    """The run's gradients in a flat buffer of the compute dtype, with zeros for padding."""
    if _gather not in bucket.cache:
        bucket.cache[_gather] = torch.zeros(
            bucket.size, dtype=bucket.compute_dtype, device=bucket.device
        )
    scratch: Tensor = bucket.cache[_gather]
    torch._foreach_copy_(run.split(bucket, "scratch", scratch), run.pick(grads))
    _clear_padding(run, run.of(scratch))
    return run.of(scratch)


def _clear_padding(run: _Run, memory: Tensor) -> None:
    """Set padding to zero again, where 0 / 0 (eps = 0) or a scale that is NaN may have been."""
    if run.padding is not None:
        memory.index_fill_(0, run.padding, 0)


# ------------------------------------------------------------------------------ torch's own kernels


def _has_fused(bucket: Bucket) -> bool:
    """Whether torch's fused optimizer kernels serve this bucket.

    Not for reduced precision: on a CPU ``_fused_sgd_`` gives wrong numbers there (torch 2.13), and
    elsewhere it rounds as it likes. Not for float64 on accelerators, where a tensor lr must be
    float32.
    """
    if bucket.device.type not in _get_fused_kernels_supported_devices():
        return False
    return bucket.dtype == torch.float32 or (
        bucket.dtype == torch.float64 and bucket.device.type == "cpu"
    )


def _fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    state: Mapping[str, list[Tensor]],
    group: Group,
    fresh: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    torch._fused_sgd_(
        params,
        grads,
        state["momentum_buffer"] if group["momentum"] else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=fresh,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def _fused_adam(
    params: list[Tensor],
    grads: list[Tensor],
    state: Mapping[str, list[Tensor]],
    group: Group,
    fresh: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = map(float, group["betas"])
    kernel(
        params,
        grads,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["max_exp_avg_sq"] if group["amsgrad"] else [],
        state[STEP],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


_FUSED = {"sgd": _fused_sgd, "adam": _fused_adam}


# ------------------------------------------------------------------------------------------ backend


def _ascent_weight(weights: Tensor, group: Group) -> Tensor:
    """ASAM's ``T = |w| + eta`` (Kwon et al. 2021, eq. 4), in the dtype of ``weights``."""
    return weights.abs().add_(group["eta"])


def _pieces(grad: Tensor) -> Sequence[Tensor]:
    """A gradient in pieces: torch sums many squares naively, 25 million come out 0.15 % short."""
    if grad.numel() <= _CHUNK_ELEMENTS:
        return (grad,)
    pieces: Sequence[Tensor] = grad.as_strided((grad.numel(),), (1,)).split(_CHUNK_ELEMENTS)
    return pieces


def _present(grads: Gradients) -> tuple[Hashable, ...]:
    return tuple([None if grad is None else True for grad in grads])


class ReferenceBackend:
    """See the module's docstring; the methods are those of ``Backend``."""

    name = "reference"

    def sq_norm(self, bucket: Bucket, grads: Gradients, groups: Groups | None) -> Tensor:
        """Partial sums of the squared norm, one for each parameter or run."""
        dtype = bucket.compute_dtype
        norms: list[Tensor] = []
        for run in _runs(bucket, _present(grads)):
            group = groups[run.row] if groups else None
            if group and group["adaptive"]:
                scaled = _gather(bucket, run, grads)
                for chunk in run.chunks():
                    scaled[chunk].mul_(_ascent_weight(run.weights[chunk].to(dtype), group))
                norms += torch._foreach_norm(list(scaled.split(_CHUNK_ELEMENTS)), 2)
            else:
                pieces = [piece for grad in run.pick(grads) for piece in _pieces(grad)]
                norms += torch._foreach_norm(pieces, 2, dtype=dtype)
        if not norms:
            return torch.zeros(1, dtype=dtype, device=bucket.device)
        return torch.stack(norms).square_()

    def perturb_(self, bucket: Bucket, grads: Gradients, groups: Groups, sq_norm: Tensor) -> None:
        """Save w, then climb."""
        norm = sq_norm.sum().sqrt_()
        finite = norm.isfinite()
        skip = (~finite).float()
        for run in _runs(bucket, _present(grads)):
            group = groups[run.row]
            rho = -group["rho"] if group.get("maximize") else group["rho"]
            scale = torch.where(finite & (norm > 0), rho / norm, 0)
            run.of(bucket.saved).copy_(run.weights)
            if _has_fused(bucket) and not group["adaptive"]:
                # Stochastic gradient ascent with a learning rate on the device, in one pass.
                torch._fused_sgd_(
                    run.params,
                    run.pick(grads),
                    [],
                    weight_decay=0.0,
                    momentum=0.0,
                    lr=-scale,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,
                    found_inf=skip,
                )
                continue
            climb = _gather(bucket, run, grads)
            for chunk in run.chunks():
                weights, epsilon = run.weights[chunk].to(climb.dtype), climb[chunk].mul_(scale)
                if group["adaptive"]:
                    epsilon.mul_(_ascent_weight(weights, group).square_())
                # 0 * inf is NaN, and a scale of 0 must move nothing.
                run.weights[chunk] = torch.where(scale == 0, weights, weights + epsilon)

    def update_(
        self,
        bucket: Bucket,
        grads: Gradients,
        groups: Groups,
        rule: Rule,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Return the perturbed slots to w, and step those that have a gradient by the rule."""
        names = {row: rule.state(groups[row]) for row in bucket.rows}
        # torch's kernels take a float32 grad_scale, and skip only if found_inf is exactly 1.
        fused = _has_fused(bucket) and rule.name in _FUSED
        fused = fused and (grad_scale is None or bucket.dtype == torch.float32)
        if found_inf is not None:
            found_inf = (found_inf != 0).float()
        self._count_steps(bucket, grads, names, found_inf)
        for run in _runs(bucket, self._kinds(bucket, grads, names)):
            has_grad, perturbed, fresh = run.kind
            group, saved = groups[run.row], run.of(bucket.saved)
            states = names[run.row]
            frozen = _is_zero(group["lr"])
            if perturbed:
                run.weights.copy_(saved)
            if not has_grad:
                continue
            if frozen is not False and not perturbed:
                saved.copy_(run.weights)
            if fused:
                _FUSED[rule.name](
                    run.params,
                    run.pick(grads),
                    {name: run.split(bucket, name, bucket.state(name).flat) for name in states},
                    group,
                    fresh,
                    grad_scale,
                    found_inf,
                )
            else:
                self._update_flat(
                    bucket, run, grads, group, rule, states, fresh, grad_scale, found_inf
                )
            # 0 * inf is NaN and -0.0 - -0.0 is 0.0: with lr 0 only a copy gives the bits back.
            if frozen is True:
                run.weights.copy_(saved)
            elif frozen is not False:
                run.weights.copy_(torch.where(frozen, saved, run.weights))

    def restore_(self, bucket: Bucket) -> None:
        """Return the perturbed slots to w."""
        for run in _runs(bucket, tuple(flag or None for flag in bucket.perturbed)):
            run.weights.copy_(run.of(bucket.saved))

    @staticmethod
    def _kinds(
        bucket: Bucket, grads: Gradients, names: Mapping[int, tuple[str, ...]]
    ) -> tuple[Hashable, ...]:
        """For each slot (has a gradient, is perturbed, has no state yet), or None if untouched."""
        fresh = [False] * len(bucket.slots)
        for name in {name for row in names.values() for name in row}:
            for i, present in enumerate(bucket.state(name).present):
                fresh[i] = fresh[i] or not present
        return tuple(
            [
                (grad is not None, perturbed, new) if grad is not None or perturbed else None
                for grad, perturbed, new in zip(grads, bucket.perturbed, fresh, strict=True)
            ]
        )

    @staticmethod
    def _count_steps(
        bucket: Bucket,
        grads: Gradients,
        names: Mapping[int, tuple[str, ...]],
        found_inf: Tensor | None,
    ) -> None:
        """Add 1 to the step counts of the slots that step now."""
        if not any(STEP in row for row in names.values()):
            return
        stepping = torch.tensor([float(grad is not None) for grad in grads], device="cpu")
        if bucket.device.type == "cuda":
            stepping = stepping.pin_memory()  # else the copy would wait for the device
        stepping = stepping.to(bucket.device, non_blocking=True)
        bucket.state(STEP).flat.add_(stepping if found_inf is None else stepping * (1 - found_inf))

    @staticmethod
    def _update_flat(
        bucket: Bucket,
        run: _Run,
        grads: Gradients,
        group: Group,
        rule: Rule,
        names: tuple[str, ...],
        fresh: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The rule's own mathematics on the flat buffers of a run."""
        grad = _gather(bucket, run, grads)
        if grad_scale is not None:
            grad.div_(grad_scale)
        flat = {name: run.of(bucket.state(name).flat) for name in names if name != STEP}
        steps = _steps_by_element(bucket, run) if rule.reads_step else None
        for chunk in run.chunks():
            targets = {"param": run.weights[chunk], **{k: v[chunk] for k, v in flat.items()}}
            # A rule writes to its state: to a copy, where that is rounded or may be taken back.
            exact = bucket.dtype == grad.dtype and found_inf is None
            values = {k: v.to(grad.dtype, copy=not exact) for k, v in targets.items()}
            if steps is not None:
                values[STEP] = steps[chunk]
            values["param"] = rule.update(values["param"], grad[chunk], values, group, fresh)
            for name, target in targets.items():
                value = values[name]
                if found_inf is not None:
                    value = torch.where(found_inf != 0, target.to(value.dtype), value)
                if value is not target:
                    target.copy_(value)
        for buffer in (run.weights, *flat.values()):
            _clear_padding(run, buffer)


def _steps_by_element(bucket: Bucket, run: _Run) -> Tensor:
    """The step counts of a run as one number for each element of its flat buffers."""
    steps = bucket.state(STEP).flat.to(bucket.compute_dtype)
    starts = [slot.start for slot in run.pick(bucket.slots)]
    pieces = zip(run.slots, starts, [*starts[1:], run.stop], strict=True)
    return torch.cat([steps[i].expand(stop - start) for i, start, stop in pieces])


def _is_zero(lr: float | Tensor) -> bool | Tensor:
    """Whether lr is 0: a bool where it can be read without waiting, else a tensor ()."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr == 0
    return float(lr) == 0
