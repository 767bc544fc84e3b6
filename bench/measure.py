"""Measuring: peers take their steps in turn, so that whatever else happens meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .machine import largest_cache
from .peers import BASES, Peer, as_groups, parameters
from .workloads import Workload

BUDGET = {"SGD": 10, "AdamW": 12}
"""Accesses of 4 bytes per parameter in one step, as the design has it, SGD with momentum."""

COPY = "copy"
"""The name under which the copy that sets the limit is timed among the peers."""
_COPY_BYTES = 128 * 2**20
_LIMIT_FROM = 4_000_000
"""Parameters from which on memory, and not a cache, sets the limit."""
_TRAJECTORY_STEPS = 3


def synchronize(device: torch.device) -> None:
    """Wait for a device that works on its own."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class Runner:
    """One peer on parameters of its own, with gradients that all share and none may change."""

    def __init__(
        self,
        peer: Peer,
        workload: Workload,
        base: str,
        gradients: Sequence[Sequence[Tensor]],
        groups: int = 1,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        self.peer, self.gradients = peer, gradients
        self.device = gradients[0][0].device
        start = parameters(workload.shapes, self.device, seed=0) if start is None else start
        self.params = [torch.nn.Parameter(p.detach().clone()) for p in start]
        cls, options = BASES[base]
        self.construction = timed(self.device, lambda: self._make(cls, options, groups))
        self.first: float | None = None

    def _make(self, cls: Any, options: dict[str, Any], groups: int) -> None:
        self.optimizer = self.peer.make(as_groups(self.params, groups), cls, dict(options))

    def climb(self) -> float:
        """Seconds of first_step()."""
        return self._half(0, self.optimizer.first_step)

    def descend(self) -> float:
        """Seconds of second_step()."""
        return self._half(1, self.optimizer.second_step)

    def step(self) -> float:
        """Seconds of a whole step, forward and backward left out."""
        return self.climb() + self.descend()

    def _half(self, which: int, call: Callable[[], object]) -> float:
        for p, grad in zip(self.params, self.gradients[which], strict=True):
            p.grad = grad
        return timed(self.device, call)


def random_gradients(workload: Workload, device: torch.device) -> list[list[Tensor]]:
    """Gradients of the two passes."""
    generator = torch.Generator(device).manual_seed(1)
    return [
        [torch.randn(*s, generator=generator, device=device) for s in workload.shapes]
        for _ in range(2)
    ]


class Arena:
    """Peers on one workload, stepping in turn.

    Attributes:
        norm_error: relative error of the gradients' norm as torch computes it.
        runners: the peers that work here, in the order given.
        skipped: peers that do not, with the reason.
        seconds: for each name the time of each round; rounds correspond.
    """

    def __init__(
        self,
        workload: Workload,
        base: str,
        peers: Sequence[Peer],
        device: torch.device,
        groups: int = 1,
        cold: bool = False,
    ) -> None:
        self.workload, self.base, self.device, self.cold = workload, base, device, cold
        self.groups = groups
        self.runners: list[Runner] = []
        self.skipped: dict[str, str] = {}
        gradients = random_gradients(workload, device)
        self.norm_error = _norm_error(gradients[0])
        self._start = parameters(workload.shapes, device, seed=0)
        self._first_points: list[list[Tensor]] | None = None
        self.distance: dict[str, float] = {}
        for peer in peers:
            try:
                runner = Runner(peer, workload, base, gradients, groups, self._start)
                self._check_trajectory(runner)
            except (RuntimeError, ImportError, torch._dynamo.exc.TorchDynamoException) as error:
                if peer is peers[0]:
                    raise
                self.skipped[peer.name] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            self.runners.append(runner)
        self._first_points = None
        self._start = []
        self.seconds: dict[str, list[float]] = {runner.peer.name: [] for runner in self.runners}
        self._copy = None
        if workload.numel >= _LIMIT_FROM:
            self._copy = torch.ones(2, _COPY_BYTES // 4, device=device).unbind()
            self.seconds[COPY] = []
        self._evict = torch.zeros(2 * largest_cache(device) // 4, device=device) if cold else None
        # A step that takes long needs no repetition to be seen.
        slowest = max(runner.step() for runner in self.runners)
        self.inner = 1 if cold else max(1, min(20, round(2e-3 / slowest)))

    def _check_trajectory(self, runner: Runner) -> None:
        """Take the first steps; assert that the weights go where the first peer's went.

        Distances are relative to how far the weights moved. What is tolerated is the rounding of
        the weights themselves (2**-24 of about 0.02, against a climb of 0.05 over all weights), and
        in the climb the error of torch's own norm, which peers inherit.
        """
        points = []
        for step in range(_TRAJECTORY_STEPS):
            seconds = runner.climb()
            # All weights of the first step and those after the last; others would take memory.
            if step == 0:
                points.append([p.detach().clone() for p in runner.params])
            seconds += runner.descend()
            runner.first = seconds if step == 0 else runner.first
        points.append([p.detach().clone() for p in runner.params])
        if self._first_points is None:
            self._first_points = points
            self._moves = [_distance(point, self._start) for point in points]
        relative = [
            _distance(point, ours) / move
            for point, ours, move in zip(points, self._first_points, self._moves, strict=True)
        ]
        self.distance[runner.peer.name] = max(relative)
        climb, steps = relative
        same = climb < 1e-3 + 1.1 * self.norm_error and steps < 1e-3
        assert same, f"{runner.peer.name} walks elsewhere: {relative}"

    def others_turn(self) -> None:
        """All peers but the first, and the copy: one measurement each; then ready the first."""
        rotation = len(self.seconds[self.runners[0].peer.name]) % max(1, len(self.runners) - 1)
        others = self.runners[1:]
        for runner in others[rotation:] + others[:rotation]:
            self._prepare(runner)
            self.seconds[runner.peer.name].append(self._steps(runner))
        if self._copy is not None:
            source, target = self._copy
            self.seconds[COPY].append(timed(self.device, lambda: target.copy_(source)))
        self._prepare(self.runners[0])

    def first_turn(self) -> None:
        """The first peer: one measurement."""
        self.seconds[self.runners[0].peer.name].append(self._steps(self.runners[0]))

    def _prepare(self, runner: Runner) -> None:
        if self._evict is not None:
            self._evict.add_(1)
        else:
            runner.step()  # its data are in the caches now, as far as they fit

    def _steps(self, runner: Runner) -> float:
        return sum(runner.step() for _ in range(self.inner)) / self.inner

    def rounds_for(self, seconds: float, least: int = 5, most: int = 100) -> int:
        """How many rounds fit into a time."""
        start = time.perf_counter()
        self.others_turn()
        self.first_turn()
        for times in self.seconds.values():
            times.clear()
        return max(least, min(most, round(seconds / (time.perf_counter() - start))))

    def record(self) -> dict[str, Any]:
        """All that reports need."""
        return {
            "workload": self.workload.name,
            "tensors": len(self.workload.shapes),
            "numel": self.workload.numel,
            "groups": self.groups,
            "base": self.base,
            "cache": "cold" if self.cold else "warm",
            "threads": torch.get_num_threads(),
            "inner": self.inner,
            "budget": BUDGET[self.base],
            "copy_bytes": 2 * _COPY_BYTES,
            "families": {runner.peer.name: runner.peer.family for runner in self.runners},
            "seconds": {
                name: [float(f"{t:.4g}") for t in times] for name, times in self.seconds.items()
            },
            "first": {runner.peer.name: runner.first for runner in self.runners},
            "construction": {runner.peer.name: runner.construction for runner in self.runners},
            "distance": self.distance,
            "norm_error": self.norm_error,
            "skipped": self.skipped,
        }


@torch.no_grad()
def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(a - b) for a, b in zip(one, other, strict=True)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _norm_error(grads: Sequence[Tensor]) -> float:
    """How wrong torch's float32 norm is: on a CPU it loses small addends in tensors of millions."""
    norm, exact = (
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=dtype)).double())
        for dtype in (torch.float32, torch.float64)
    )
    return abs(float(norm / exact) - 1)
