"""What the first pass has drawn, and how far the second has drawn it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from .randomness import Randomness

Devices = Iterable[torch.device]


class Record:
    """The random states of a first pass, in the order in which they were met.

    A pass is told in one of two ways. Somebody says where its parts begin and end: ``blocks``.
    Or nobody does, and the forwards of an attached model are all that is seen: ``forwards``. A pass
    may have several of either.
    """

    def __init__(self) -> None:
        self._inside = False
        self.clear()

    def clear(self) -> None:
        """Forget: the step is over, or given up."""
        self._blocks: list[Randomness] = []
        self._forwards: list[tuple[bool, Randomness]] = []
        self._replaced: list[Randomness] = []
        self._blocks_done = 0

    @contextmanager
    def first_block(self, devices: Devices) -> Iterator[None]:
        """A part of the first pass; what raises in it is no part."""
        if not self._blocks:
            self._forwards.clear()  # an evaluation, for instance
        start = Randomness.now(devices)
        with self._entered():
            yield
        self._blocks.append(start)

    @contextmanager
    def second_block(self) -> Iterator[None]:
        """A part of the second pass.

        Raises:
            RuntimeError: the first pass had fewer parts.
        """
        if self._blocks_done == len(self._blocks):
            raise RuntimeError(
                f"second_pass() for the {_nth(self._blocks_done)} time in this step, and "
                f"first_pass() was there {len(self._blocks)} times: its random numbers are not "
                f"known; run each part of the first pass in first_pass()"
            )
        self._blocks[self._blocks_done].replay()
        self._blocks_done += 1
        with self._entered():
            yield

    def unrecorded(self) -> AbstractContextManager[None]:
        """A block in which somebody else sees to the random numbers of both passes."""
        return self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if self._inside:
            raise RuntimeError("first_pass() and second_pass() do not nest: leave the one before")
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def forward(self, training: bool, perturbed: bool, devices: Devices) -> None:
        """A forward of the attached model is about to begin.

        Raises:
            RuntimeError: it is one of the second pass, and the first had fewer.
        """
        if self._inside or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:
            self._recompute(perturbed, devices)
            return
        if training < any([train for train, _ in self._forwards]):
            return  # an evaluation
        if not perturbed:
            if not self._blocks:  # else the pass is told by blocks, and this one begins around one
                self._forwards.append((training, Randomness.now(devices)))
            return
        known = self._of_the_pass()
        done = len(self._replaced)
        if done == len(known):
            raise RuntimeError(
                f"the second pass runs the attached model for the {_nth(done)} "
                f"time, and the first pass ran it {len(known)} times with gradients enabled: the "
                f"random numbers are not known. Run both passes alike, through the module that was "
                f"attached; or say where they are: with optimizer.first_pass(): ..., with "
                f"optimizer.second_pass(): ..."
            )
        self._replaced.append(Randomness.now(devices))
        known[done].replay()

    def _recompute(self, perturbed: bool, devices: Devices) -> None:
        """Activation checkpointing of the whole model runs a forward again, in backward.

        It has set torch's random states to what they were before that forward, which in the second
        pass is not what the forward has drawn from.
        """
        if not self._forwards:
            raise RuntimeError(
                "the attached model runs with gradients enabled in backward only, as "
                "torch.utils.checkpoint does with use_reentrant=True: its random numbers are not "
                "known; use use_reentrant=False, or first_pass() and second_pass()"
            )
        if perturbed:
            now = Randomness.now(devices)
            for replaced, state in zip(self._replaced, self._of_the_pass(), strict=False):
                if now.draws_as(replaced):
                    state.replay()
                    return

    def _of_the_pass(self) -> list[Randomness]:
        """The forwards in training mode; all if there are none: a model may be trained in eval."""
        training = [state for train, state in self._forwards if train]
        return training or [state for _, state in self._forwards]

    def check_complete(self) -> None:
        """Raise unless the second pass had as many parts as the first."""
        for done, known, what in (
            (self._blocks_done, len(self._blocks), "first_pass() was there"),
            (len(self._replaced), len(self._of_the_pass()), "the attached model ran"),
        ):
            if done < known:
                raise RuntimeError(
                    f"{what} {known} times in the first pass and {done} times in the second: the "
                    f"random numbers of the two passes differ. Run both passes alike (an "
                    f"evaluation between them belongs in torch.no_grad()), or say where they are: "
                    f"with optimizer.first_pass(): ..., with optimizer.second_pass(): ... A batch "
                    f"that is given up ends with optimizer.restore()"
                )


def _nth(done: int) -> str:
    return {0: "first", 1: "second", 2: "third"}.get(done, f"{done + 1}th")
