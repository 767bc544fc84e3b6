"""Ascents of one pass: the weights live ahead of w, along the momentum (ascents/msam.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .ascents import Ascent
from .backends import Groups
from .caches import forget_copies
from .climb import Climb
from .memory import Bucket, Gradients
from .memory.window import as_real
from .modes import working
from .options import MISSED
from .recording import followed


class OnePass(Climb):
    """The part of ``FusedSAM`` that goes ahead after a step, and back for an evaluation."""

    def eval(self) -> None:
        """Go to w and stay, for an evaluation or a checkpoint.

        With ``ascent=MSAM()`` the weights are ahead of w in training. With any other ascent they
        are at w between two steps, and eval() and train() do nothing. With an attached model the
        two are not needed: see ``attach``.

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
            self._leave(ascent)

    def _see_forward(self, training: bool) -> None:
        """The attached model is about to run."""
        facts, ascent = self._facts, self._follows()
        if ascent is None or facts.between:
            return
        if training and facts.training and not facts.perturbed:
            self._leave(ascent)
        elif not training and not torch.is_grad_enabled():
            # Else it may be trained in evaluation mode: then who trains it says so.
            self.restore()

    @contextmanager
    def _staying(self) -> Iterator[None]:
        """A block in which forwards of the attached model do not go ahead."""
        facts = self._facts
        before, facts.training = facts.training, False
        try:
            yield
        finally:
            facts.training = before

    def _leave(self, ascent: Ascent) -> None:
        """Go ahead between two steps."""
        with working():
            self._refresh()
            self._facts.engine.take_in(self.state, self.param_groups)
            self._go_ahead(ascent)
        forget_copies()

    def _note_missed(self, grads: Sequence[Gradients]) -> None:
        """Keep which parameters had no gradient in this step: they stay at w until the next."""
        missed = [
            slot.param
            for bucket, there in zip(self._facts.engine.buckets, grads, strict=True)
            if not there.complete
            for slot, present in zip(bucket.slots, there.present, strict=True)
            if not present
        ]
        ids = set(map(id, missed))
        for group in self.param_groups:
            if ids or MISSED in group:
                group[MISSED] = [i for i, p in enumerate(group["params"]) if id(p) in ids]

    def _go_ahead(self, ascent: Ascent) -> None:
        """Climb along the momentum of the parameters that had a gradient in the last step."""
        facts = self._facts
        rule = facts.engine.layout.rule
        assert rule is not None
        assert rule.momentum is not None
        missed = {id(g["params"][i]) for g in self.param_groups for i in g.get(MISSED, ())}
        momentum = [_momentum(bucket, rule.momentum, missed) for bucket in facts.engine.buckets]
        if not any(any(m.present) for m in momentum):
            # Where training begins that is w; after a step without gradients too.
            began = any([rule.momentum in entry for entry in self.state.values()])
            facts.perturbed = facts.visited = began
            facts.versions = facts.writes()
            return
        # Against the momentum: the weights will move so.
        groups: Groups = [_Against(group) for group in self.param_groups]
        facts.perturbed = facts.visited = True
        try:
            counter = self.param_groups[0]
            facts.climbed(ascent, groups, facts.engine.climb(ascent, momentum, groups, counter))
        except BaseException:
            self.restore()
            raise
        facts.versions = facts.writes()

    def _refuse_written(self) -> None:
        """Raise if weights were written to ahead of w: who returns from there would undo it."""
        facts = self._facts
        if facts.perturbed and facts.versions != facts.writes():
            raise RuntimeError(
                "weights were written to while they were ahead of w, and the step would undo "
                "it: call optimizer.eval() before model.load_state_dict() or whatever writes "
                "to them, and optimizer.train() afterwards"
            )

    def _check_ahead(self) -> None:
        """Raise unless the gradients are those of where the weights should be."""
        facts = self._facts
        layout = facts.engine.layout
        self._refuse_written()
        if facts.perturbed:
            return
        comes_and_goes = facts.attached.model is not None and facts.training
        if comes_and_goes and facts.visited and (ascent := self._follows()) is not None:
            self._leave(ascent)  # somebody has asked for w after the pass
            return
        name = layout.rule.momentum if layout.rule is not None else None
        if not facts.training or any([name in entry for entry in self.state.values()]):
            raise RuntimeError(
                "the weights are at w, and MSAM takes its gradients ahead of it: call "
                "optimizer.train() before the forward, after optimizer.eval() and after loading a "
                "checkpoint. With an attached model it is needed only after optimizer.eval(), and "
                "where another module than that one runs, or runs in evaluation mode"
            )


class _Against(Mapping[str, Any]):
    """A group as a climb against its momentum sees it, now and whenever a graph asks for it."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._group = group

    def __getitem__(self, name: str) -> Any:
        if name == "maximize":
            return False
        return -self._group[name] if name == "rho" else self._group[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


def _momentum(bucket: Bucket, name: str, missed: set[int]) -> Gradients:
    """A bucket's momentum as if it were its gradients: in their dtype.

    Not that of the parameters whose ids are in ``missed``.
    """
    buffer = bucket.state(name)
    return Gradients.of(
        [
            as_real(window).to(bucket.grad_dtype) if has and id(slot.param) not in missed else None
            for slot, window, has in zip(bucket.slots, buffer.windows, buffer.present, strict=True)
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
    factors = followed(lambda: list(map(_coupled, groups)), torch.float64)
    # A graph may find another one whenever it runs: only where none is coupled it leaves it out.
    decays = [
        not group.get("decoupled_weight_decay") and (isinstance(factor, Tensor) or factor != 0)
        for factor, group in zip(factors, groups, strict=True)
    ]
    if not any(decays):
        return [*grads]
    decayed = []
    for bucket, there in zip(buckets, grads, strict=True):
        tensors = list(there.tensors)
        for row in bucket.rows:
            mine = [
                i
                for i, slot in enumerate(bucket.slots)
                if slot.row == row and decays[row] and there.present[i] and bucket.perturbed[i]
            ]
            if mine:
                decay = _decay(bucket, mine, factors[row], grad_scale)
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
    bucket: Bucket,
    indices: Sequence[int],
    weight_decay: float | Tensor,
    grad_scale: Tensor | None,
) -> list[Tensor]:
    """weight_decay * (weight - w) for these slots, as large as the gradients' scale makes it.

    In the compute dtype: float16 does not hold every scale.
    """
    slots, dtype = [bucket.slots[i] for i in indices], bucket.compute_dtype
    weights = [as_real(slot.param.detach()).to(dtype) for slot in slots]
    decay = torch._foreach_sub(weights, [slot.real(slot.of(bucket.saved)) for slot in slots])
    if isinstance(weight_decay, Tensor):
        weight_decay = weight_decay.to(dtype)
    torch._foreach_mul_(decay, weight_decay)
    if grad_scale is not None:
        torch._foreach_mul_(decay, grad_scale.to(bucket.device, dtype))
    return list(decay)
