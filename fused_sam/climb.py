"""The first half of a step: whether it climbs, and the climb."""

from __future__ import annotations

from collections.abc import Sequence

from . import ascents
from .ascents import SQUARES
from .caches import forget_copies
from .checks import check_clipping
from .gradients import pairs_of, put_aside
from .memory import Gradients
from .modes import working
from .options import MAX_GRAD_NORM, agreed_max_grad_norm, numbers
from .passes import Passes
from .recording import recording
from .scaler import Handed
from .schedule import NO_CLIMB, Decision


class Climb(Passes):
    """The part of ``FusedSAM`` that leaves w."""

    grad_scale = Handed()
    found_inf = Handed()

    @property
    def max_grad_norm(self) -> float | None:
        """The L2 norm to which the base optimizer's gradient is clipped; None: no clipping.

        It is an option of the groups, with one value for all. It is None, too, if the base
        optimizer has an option of that name, and clips by itself.
        """
        if MAX_GRAD_NORM.name in self.base_optimizer.defaults:
            return None
        # Not this class's own groups, which ask who reads them: a step reads this twice.
        return agreed_max_grad_norm(self.base_optimizer.param_groups)

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        options = numbers({MAX_GRAD_NORM.name: value})
        agreed_max_grad_norm([options])
        check_clipping(self.base_optimizer, value)
        for group in (self.defaults, *self.param_groups):
            group.update(options)

    def _begin(self, zero_grad: bool, scale: float | None) -> bool:
        """The first half of a step; ``scale`` is the gradients' loss scale, None if it is 1."""
        if self._facts.between:
            raise RuntimeError(
                "first_step() was called twice; call second_step() after the second backward, "
                "or restore() to go back to w without an update"
            )
        facts = self._facts
        with working():
            grads = self._gradients()
            groups = self.param_groups
            settings = facts.reader.read(groups)
            ascent, blend = settings.ascent, settings.blend
            _ = self.max_grad_norm  # before anything moves
            if facts.perturbed and not ascent.along_momentum:
                raise RuntimeError(
                    f"ascent={ascent.key!r} climbs from w, and the weights are ahead of it, where "
                    f"Momentum-SAM left them: call optimizer.restore(), and take the gradients anew"
                )
            facts.scale = scale
            when = self.when
            facts.scale_matters = when.needs_norm or ascent.scale_matters
            if ascent.along_momentum:
                facts.decision = NO_CLIMB
            elif (graph := recording()) is not None:
                facts.decision = Decision(graph.climbs, {})
            else:
                # A blend with a schedule may have been chosen since the groups were filled.
                counts = {**when.memory, **groups[0]}
                facts.decision = when.decide(counts, lambda: self._sq_norm(grads))
            if not facts.decision.climbs:
                facts.blend = None if blend is None else blend.reuse
                facts.begin_second()
                facts.aside = put_aside(groups) if zero_grad else pairs_of(groups)
                return False
            try:
                # From here on restore() is needed. Which weights are away the buckets know.
                if any([bucket.masters for bucket in facts.engine.buckets]):
                    facts.engine.take_in(self.state, groups)  # the climb is from loaded masters
                facts.leave()
                facts.blend = blend
                keep = blend is not None or (facts.measures and not facts.each)
                facts.keeps = keep
                unscale = 1 / (scale or 1.0)
                total = facts.engine.climb(ascent, grads, groups, groups[0], keep, unscale)
                facts.climbed(ascent, groups, total)
            except BaseException:
                self.restore()
                raise
        forget_copies()
        if zero_grad:
            self.zero_grad()
        return True

    def _closure_scale(self) -> float | None:
        """The loss scale that ``scaler.step(optimizer, closure)`` tells, where it matters."""
        return float(self.grad_scale) if self._is_scaled() and self._scale_matters() else None

    def _scale_matters(self) -> bool:
        """Whether the climb depends on the size of the gradients."""
        self._fill_groups()  # of a group that was added to the base optimizer
        return self.when.needs_norm or ascents.chosen(self.param_groups).scale_matters

    def _is_scaled(self) -> bool:
        """Whether a GradScaler has said that the gradients are scaled."""
        return self._facts.scaler.handed.get("grad_scale") is not None

    def _sq_norm(self, grads: Sequence[Gradients]) -> float:
        """The squared norm of the gradients at w, unscaled as far as is known."""
        facts, groups = self._facts, self.param_groups
        total = facts.engine.reduce(SQUARES, grads, groups)
        if all([group["ascent"] is not None for group in groups]):
            facts.first = total
        return total.item() / (facts.scale or 1.0) ** 2
