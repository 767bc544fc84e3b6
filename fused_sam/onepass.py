"""Ascents of one pass: the weights live ahead of w, along the momentum (ascents/msam.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ascents import ASCENTS, Ascent
from .backends import Groups
from .climb import Climb
from .memory import Bucket, Gradients
from .memory.window import as_real
from .modes import working


class OnePass(Climb):
    """The part of ``FusedSAM`` that goes ahead after a step, and back for an evaluation."""

    def _follows(self) -> Ascent | None:
        """The ascent, if it follows the momentum."""
        for group in self.param_groups:
            if group["ascent"] is not None:
                ascent = ASCENTS.get(group["ascent"])
                return ascent if ascent is not None and ascent.along_momentum else None
        return None

    def eval(self) -> None:
        """Go to w, for an evaluation or a checkpoint; does nothing if the weights are there.

        With ``ascent=MSAM()`` the weights are ahead of w in training. With any other ascent they
        are at w between two steps, and eval() and train() do nothing.

        Raises:
            RuntimeError: a step is half done.
        """
        if self._follows() is not None:
            self._refuse_away("eval()")
            self.restore()
            self._facts.training = False

    def train(self) -> None:
        """Go ahead of w again, along the momentum; does nothing if the weights are there.

        Call it before the next forward, after eval() and after loading a checkpoint.

        Raises:
            RuntimeError: a step is half done.
        """
        facts, ascent = self._facts, self._follows()
        if ascent is None:
            return
        self._refuse_away("train()")
        facts.training = True
        if not facts.perturbed:
            with working():
                self._refresh()
                engine = facts.engine
                engine.take_in(self.state, self.param_groups)
                fits = [len(there) for there in facts.ahead] == [
                    len(bucket.slots) for bucket in engine.buckets
                ]
                self._go_ahead(ascent, facts.ahead if fits else None)

    def _go_ahead(self, ascent: Ascent, present: Sequence[tuple[bool, ...]] | None) -> None:
        """Climb along the momentum of the parameters that are present, of all if that is None."""
        facts = self._facts
        rule = facts.engine.layout.rule
        assert rule is not None
        assert rule.momentum is not None
        buckets = facts.engine.buckets
        facts.ahead = [(True,) * len(b.slots) for b in buckets] if present is None else [*present]
        momentum = [
            _momentum(bucket, rule.momentum, there)
            for bucket, there in zip(buckets, facts.ahead, strict=True)
        ]
        if not any(any(m.present) for m in momentum):
            # Where training begins that is w; after a step without gradients too.
            facts.perturbed = any([rule.momentum in entry for entry in self.state.values()])
            facts.versions = facts.writes()
            return
        # Against the momentum: the weights will move so.
        groups: Groups = [{**g, "rho": -g["rho"], "maximize": False} for g in self.param_groups]
        facts.perturbed = True
        try:
            counter = self.param_groups[0]
            facts.climbed(ascent, groups, facts.engine.climb(ascent, momentum, groups, counter))
        except BaseException:
            self.restore()
            raise
        facts.versions = facts.writes()

    def _check_ahead(self) -> None:
        """Raise unless the gradients are those of where the weights should be."""
        facts = self._facts
        layout = facts.engine.layout
        if facts.perturbed:
            if facts.versions != facts.writes():
                raise RuntimeError(
                    "weights were written to while they were ahead of w, and the step would undo "
                    "it: call optimizer.eval() before model.load_state_dict() or whatever writes "
                    "to them, and optimizer.train() afterwards"
                )
            return
        name = layout.rule.momentum if layout.rule is not None else None
        if not facts.training or any([name in entry for entry in self.state.values()]):
            raise RuntimeError(
                "the weights are at w, and MSAM takes its gradients ahead of it: call "
                "optimizer.train() before the forward, after optimizer.eval() and after loading a "
                "checkpoint"
            )


def _momentum(bucket: Bucket, name: str, present: Sequence[bool]) -> Gradients:
    """A bucket's momentum as if it were its gradients: in their dtype."""
    there = bucket.states[name].present if name in bucket.states else [False] * len(present)
    windows = bucket.state(name).windows
    return Gradients.of(
        [
            as_real(window).to(bucket.grad_dtype) if taken and has else None
            for window, taken, has in zip(windows, present, there, strict=True)
        ]
    )


def decay_ahead(
    buckets: Sequence[Bucket],
    grads: Sequence[Gradients],
    groups: Groups,
    grad_scale: Tensor | None,
) -> list[Gradients]:
    """Gradients with which the rule's coupled weight decay is that of the weights ahead of w.

    As the authors' code has it. The rule decays w, in full precision, so what it gets is the decay
    of the way from w, and no more: a gradient of half precision would round a whole decay away, or
    overflow by it. Decoupled decay (AdamW) is the rule's.

    Returns:
        The gradients; new tensors where something was added.
    """
    coupled = [_coupled(group) for group in groups]
    if not any(coupled):
        return [*grads]
    decayed = []
    for bucket, there in zip(buckets, grads, strict=True):
        tensors = list(there.tensors)
        for row in bucket.rows:
            mine = [
                i
                for i, slot in enumerate(bucket.slots)
                if slot.row == row and coupled[row] and there.present[i] and bucket.perturbed[i]
            ]
            if mine:
                decay = _decay(bucket, mine, coupled[row], grad_scale)
                if groups[row].get("maximize"):
                    torch._foreach_neg_(decay)
                raw = [grad for i in mine if (grad := tensors[i]) is not None]
                for i, new in zip(mine, torch._foreach_add(raw, decay), strict=True):
                    tensors[i] = new.to(bucket.grad_dtype)
        decayed.append(Gradients.of(tensors))
    return decayed


def _coupled(group: Any) -> float:
    """The weight decay that goes into the gradient."""
    return 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])


def _decay(
    bucket: Bucket, indices: Sequence[int], weight_decay: float, grad_scale: Tensor | None
) -> list[Tensor]:
    """weight_decay * (weight - w) for these slots, as large as the gradients' scale makes it.

    In the compute dtype: float16 does not hold every scale.
    """
    slots, dtype = [bucket.slots[i] for i in indices], bucket.compute_dtype
    weights = [as_real(slot.param.detach()).to(dtype) for slot in slots]
    decay = torch._foreach_sub(weights, [slot.real(slot.of(bucket.saved)) for slot in slots])
    torch._foreach_mul_(decay, weight_decay)
    if grad_scale is not None:
        torch._foreach_mul_(decay, grad_scale.to(bucket.device, dtype))
    return list(decay)
