"""The two passes of a step: same random numbers, and running statistics of the first alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from . import ascents, blends
from .attached import check_model
from .batchnorm import frozen_running_stats
from .checkpoint import Checkpointing
from .checkup import Checkup, examine
from .gradients import are_fresh, put_aside, put_back
from .laststep import Losses

NoSync = Callable[[], AbstractContextManager[Any]]


class Passes(Checkpointing):
    """The part of ``FusedSAM`` that knows of models and batches."""

    @abstractmethod
    def first_step(self, zero_grad: bool = False) -> bool:
        """Climb, unless the schedule says otherwise."""

    @abstractmethod
    def train(self) -> None:
        """Go ahead of w, where the pass of Momentum-SAM belongs."""

    def attach(self, model: nn.Module) -> None:
        """Let the optimizer see the forwards of ``model``, the module that training calls.

        From then on the second pass draws the random numbers of the first (dropout masks; of
        torch on the CPU and on every device in use, of Python's ``random`` and of NumPy's global
        generator), running statistics (BatchNorm's, for instance) are left alone in it, and saving
        or copying the model while the weights are perturbed is an error. That holds for the two
        steps and for ``step(closure)``.

        With ``ascent=MSAM()`` the weights then come and go by themselves. A step leaves them at w.
        A forward of the model in training mode, or ``first_pass()``, goes ahead. A forward in
        evaluation mode without gradients, ``model.state_dict()`` and ``optimizer.state_dict()`` go
        back to w. After ``optimizer.eval()`` they stay at w until ``optimizer.train()``.

        Attaching the same model again does nothing; another model takes the place of the first. The
        model is held weakly. A deepcopy of model and optimizer together stays attached; what is
        unpickled is not.

        Args:
            model: e.g. the DistributedDataParallel, or what ``torch.compile`` returned.

        Raises:
            TypeError, ValueError: it is not a module, or has none of the optimizer's parameters.
            RuntimeError: the weights are perturbed.
        """
        self._refuse_away("attach()")
        check_model(model, [p for group in self.param_groups for p in group["params"]])
        self._facts.attached.attach(model)

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """A block for forward and backward at w: the second pass can draw its random numbers again.

        A step may have several such blocks, one for each micro-batch. With ``ascent=MSAM()`` the
        one pass is there where ``train()`` goes.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._refuse_away("first_pass()")
        self.train()
        facts = self._facts
        with facts.record.first_block(facts.devices()):
            yield

    @contextmanager
    def second_pass(self, model: nn.Module | None = None) -> Iterator[None]:
        """A block for forward and backward at w + epsilon, with the random numbers of the first.

        Running statistics of the model are left alone. The k-th block of a step draws what the
        k-th ``first_pass()`` drew.

        Args:
            model: may be left out if one is attached.

        Raises:
            RuntimeError: no model is known; or there was no first_pass(), or no first_step().
        """
        facts = self._facts
        if not facts.between:
            raise RuntimeError(
                "second_pass() comes after first_step(), which climbs to w + epsilon"
            )
        if model is None:
            model = facts.attached.model
        if model is None:
            raise RuntimeError(
                "second_pass() does not know whose running statistics to leave alone: call "
                "second_pass(model), or optimizer.attach(model) once"
            )
        with facts.record.second_block(), frozen_running_stats(model):
            yield

    def accumulate(
        self,
        micro_batches: Iterable[Any],
        forward_backward: Callable[[Any], Any],
        *,
        no_sync: NoSync | None = None,
        ascent: Literal["global", "local"] = "global",
    ) -> list[Any]:
        """A whole SAM step over several micro-batches, each of which is seen in both passes.

        The second pass has the random numbers of the first, and leaves running statistics alone;
        so the model must be attached. As in any torch loop, gradients add up: divide the loss by
        the number of micro-batches where a mean is wanted. A step that does not climb has one pass.
        Under a GradScaler, use first_pass(), first_step(), second_pass() and
        ``scaler.step(optimizer)`` instead.

        Args:
            micro_batches: what ``forward_backward`` takes, one after the other; kept for the step.
            forward_backward: computes the loss of a micro-batch and calls backward. It runs twice
                for each: at w, and at w + epsilon, where ``optimizer.is_perturbed`` is True.
            no_sync: e.g. DistributedDataParallel's: a context manager in which gradients are not
                reduced over the ranks, entered for all but the last micro-batch of each pass.
            ascent: ``"global"``: one climb, along the gradient of all micro-batches. ``"local"``:
                each micro-batch climbs from w along its own gradient, and the base optimizer sees
                the sum of the gradients found there: m-sharpness (Foret et al., section 4.1). Then
                the gradients at w are not reduced over the ranks: each rank climbs along its own.

        Returns:
            What ``forward_backward`` returned at w, in a list.

        Raises:
            RuntimeError: no model is attached; the weights are perturbed; there are gradients that
                no step has used. If ``forward_backward`` raises, the weights return to w.
            ValueError: there is no micro-batch; ``ascent`` is something else, or ``"local"`` with
                MSAM, FriendlySAM, VaSSO, AESAM or a blend.
        """
        batches = list(micro_batches)
        if not batches:
            raise ValueError("accumulate() got no micro-batch")
        if ascent not in ("global", "local"):
            raise ValueError(f"ascent={ascent!r} is not known; choose 'global' or 'local'")
        self._refuse_away("accumulate()")
        each = ascent == "local" and self._each_climbs()
        if self._facts.attached.model is None:
            raise RuntimeError(
                "accumulate() does not know whose running statistics to leave alone in the second "
                "pass: call optimizer.attach(model) once, or pass model=model to FusedSAM"
            )
        if are_fresh(self.param_groups):
            raise RuntimeError(
                "accumulate() does both passes itself, and there are gradients that no step has "
                "used: call optimizer.zero_grad() before, or leave the backward to it"
            )
        self.zero_grad()
        losses = Losses()

        def run(batch: Any) -> Any:
            return losses.note(forward_backward(batch), self._facts.perturbed)

        quiet = no_sync or nullcontext
        sync: list[NoSync] = [quiet] * (len(batches) - 1) + [nullcontext]
        try:
            with torch.enable_grad():
                if each:
                    returned = self._accumulate_local(batches, run, sync, quiet)
                else:
                    returned = self._accumulate_global(batches, run, sync)
            self._facts.losses = losses
            self.step()
        except BaseException:
            self.restore()
            raise
        return returned

    def check(self, model: nn.Module, forward_backward: Callable[[], Any]) -> Checkup:
        """Try a step, take it back, and tell whether it would be SAM's; print what it returns.

        It answers: does the second pass see w + epsilon? Does it draw the same random numbers, and
        leave running statistics alone? Which share of rho is left after rounding? What keeps copies
        of the weights? Afterwards weights, state, gradients, buffers and random states are as
        before.

        Args:
            model: the module whose buffers are compared; attached or not.
            forward_backward: computes the loss of one batch, the same each time, and calls
                backward. It runs four times.

        Raises:
            RuntimeError: the weights are perturbed; ``forward_backward`` leaves no gradient.
            ValueError: the ascent is MSAM, which has one pass.
        """
        self._refuse_away("check()")
        if ascents.chosen(self.param_groups).along_momentum:
            raise ValueError(
                "check() compares the two passes of a step, and a step with ascent=MSAM() has one"
            )
        return examine(self, model, forward_backward)

    def _each_climbs(self) -> bool:
        """Whether the micro-batches of the step that begins climb, each by itself."""
        ascent, blend = ascents.chosen(self.param_groups), blends.chosen(self.param_groups)
        if ascent.along_momentum:
            raise ValueError(
                f"accumulate(..., ascent='local') climbs for each micro-batch, and the groups' "
                f"ascent={ascent.key!r} climbs once in a step; use accumulate(..., ascent='global')"
            )
        if ascent.average is not None:
            raise ValueError(
                f"ascent='local' climbs for each micro-batch, and the groups' ascent="
                f"{ascent.key!r} keeps an average of the whole batch's gradients: of parts it "
                f"would change several times in a step, and on each rank to something else; use "
                f"ascent='global'"
            )
        if blend is not None:
            raise ValueError(
                f"ascent='local' leaves it to backward to add up the second gradients of the "
                f"micro-batches, and to DistributedDataParallel to reduce them; "
                f"blend={blend.key!r} would have to come before, for each micro-batch and rank by "
                f"itself; use ascent='global', or blend=None"
            )
        if self.when.needs_norm:
            raise ValueError(
                f"ascent='local' climbs for each micro-batch, and {self.when} judges the gradient "
                f"of the whole batch; use ascent='global'"
            )
        return self.when.decide(self.param_groups[0], lambda: 0.0).climbs

    def _accumulate_global(
        self, batches: list[Any], run: Callable[[Any], Any], sync: list[NoSync]
    ) -> list[Any]:
        returned = []
        for batch, context in zip(batches, sync, strict=True):
            with context(), self.first_pass():
                returned.append(run(batch))
        if self.first_step(zero_grad=True):
            for batch, context in zip(batches, sync, strict=True):
                with context(), self.second_pass():
                    run(batch)
        return returned

    def _accumulate_local(
        self, batches: list[Any], run: Callable[[Any], Any], sync: list[NoSync], quiet: NoSync
    ) -> list[Any]:
        returned = []
        facts, sums = self._facts, put_aside(self.param_groups)
        for batch, context in zip(batches, sync, strict=True):
            self.restore()
            with quiet(), self.first_pass():
                returned.append(run(batch))
            facts.each = len(batches) > 1
            try:
                self.first_step(zero_grad=True)
            finally:
                facts.each = False
            put_back(sums)  # backward adds to them, and DistributedDataParallel reduces them
            with context(), self.second_pass():
                run(batch)
            if len(returned) < len(batches):
                sums = put_aside(self.param_groups)
        return returned

    def _refuse_away(self, what: str) -> None:
        if self._facts.between:
            raise RuntimeError(
                f"{what} between first_step() and second_step(): finish the step, or go back to w "
                f"with restore()"
            )
