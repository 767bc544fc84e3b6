"""Ascents of one pass: the weights live ahead of w, along the momentum (ascents/msam.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .ascents import Ascent
from .backends import Groups
from .backends.ahead import momentum_of
from .caches import forget_copies
from .climb import Climb
from .facts import Coming
from .memory import Gradients
from .memory.window import trains
from .modes import working
from .recording import recording


class OnePass(Climb):
    """The part of ``FusedSAM`` that goes ahead after a step, and back for an evaluation."""

    def eval(self) -> None:
        """Go to w and stay, for an evaluation or a checkpoint.

        With ``ascent=MSAM()`` the weights are ahead of w in training. With any other ascent they
        are at w between two steps, and eval() and train() do nothing. With an attached model the
        two are not needed: see ``attach``.

        Raises:
            RuntimeError: a step is half done; or somebody has written to the weights ahead of w,
                which the way back would undo: ``restore()`` goes back all the same. Writes to
                ``p.data`` are not noticed.
        """
        if self._follows() is not None:
            self._refuse_away("eval()")
            self._go_back()
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
            self._go_back()

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
        """Keep which parameters had no gradient in this step."""
        engine = self._facts.engine
        self._facts.missed = engine.layout.frozen + [
            slot.param
            for bucket, there in zip(engine.buckets, grads, strict=True)
            if not there.complete
            for slot, present in zip(bucket.slots, there.present, strict=True)
            if not present
        ]

    def _step_ahead(
        self, ascent: Ascent, grads: Sequence[Gradients], update: Callable[..., Tensor | None]
    ) -> None:
        """Update, and go ahead along the new momentum, unless a forward of the model does.

        Args:
            ascent: which climb.
            grads: the gradients.
            update: the engine's, which is told whether weights stay.
        """
        facts = self._facts
        graph = recording()
        goes = facts.attached.model is None and graph is None
        try:
            total = update(stays=goes)
            assert total is not None
            facts.visited = False
            self._note_missed(grads)
            facts.coming = None if graph is not None else Coming.of(total, self._momentum())
            if goes:
                self._go_ahead(ascent)
            else:
                facts.perturbed = False
        except BaseException:
            self.restore()
            raise

    def _momentum(self) -> list[Gradients]:
        """The momentum of what climbs: of the parameters that had a gradient in the last step."""
        engine = self._facts.engine
        rule = engine.layout.rule
        assert rule is not None
        assert rule.momentum is not None
        missed = set(map(id, self._facts.missed))
        stays = [group["ascent"] is None for group in self.param_groups]
        return [
            momentum_of(
                bucket,
                rule.momentum,
                [
                    has
                    and not stays[slot.row]
                    and trains(slot.param)
                    and id(slot.param) not in missed
                    for slot, has in zip(
                        bucket.slots, bucket.state(rule.momentum).present, strict=True
                    )
                ],
            )
            for bucket in engine.buckets
        ]

    def _go_ahead(self, ascent: Ascent) -> None:
        """Climb along the momentum of the parameters that had a gradient in the last step."""
        facts = self._facts
        rule, momentum = facts.engine.layout.rule, self._momentum()
        assert rule is not None
        if not any(any(m.present) for m in momentum):
            # Where training begins that is w; after a step without gradients too.
            began = any([rule.momentum in entry for entry in self.state.values()])
            facts.perturbed = facts.visited = began
            facts.versions = facts.writes()
            return
        # Against the momentum: the weights will move so.
        groups: Groups = [_Against(group) for group in self.param_groups]
        facts.perturbed = facts.visited = True
        coming, facts.coming = facts.coming, None
        total = None if coming is None else coming.still(momentum)
        try:
            counter = self.param_groups[0]
            total = facts.engine.climb(ascent, momentum, groups, counter, total=total)
            facts.climbed(ascent, groups, total)
        except BaseException:
            self.restore()
            raise
        facts.versions = facts.writes()

    def _go_back(self) -> None:
        """Return to w, unless that would undo what somebody has written."""
        self._refuse_written()
        self.restore()

    def _refuse_written(self) -> None:
        """Raise if weights were written to ahead of w: who returns from there would undo it."""
        facts = self._facts
        if facts.perturbed and facts.versions != facts.writes():
            raise RuntimeError(
                "weights were written to while they were ahead of w, and the way back would undo "
                "it: call optimizer.eval() before model.load_state_dict() or whatever writes "
                "to them, and optimizer.train() afterwards; now optimizer.restore() goes back to "
                "w, without what was written"
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
                "optimizer.train() before the forward, after optimizer.eval(), after loading a "
                "checkpoint, and after wrapping an optimizer that has stepped. With an attached "
                "model it is needed only after optimizer.eval(), and where another module than "
                "that one runs, or runs in evaluation mode"
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
