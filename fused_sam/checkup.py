"""One step, tried and taken back: what the second pass sees of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .gradients import put_aside, put_back
from .options import ASCENT, BLEND, CLIMBS, OPTIONS
from .randomness import Randomness
from .record import Record
from .schedule import Always

if TYPE_CHECKING:
    from .passes import Passes

_TOLERANCE = 0.1


@dataclass(frozen=True)
class Checkup:
    """What a step does with a model; print it.

    Attributes:
        sees_epsilon: whether the second pass depends on the climb; else SAM is the base optimizer.
        same_numbers: whether the second pass draws the random numbers of the first: without a climb
            it then has the same gradients, bit for bit. False as well where the model's kernels are
            not deterministic.
        same_statistics: whether the second pass leaves the model's buffers alone.
        share_of_rho: how far the weights have moved along the climb, as a share of how far they
            were to. Rounding may take it away. NaN if nothing was to move.
        caches: what keeps copies of the weights around the call.
    """

    sees_epsilon: bool
    same_numbers: bool
    same_statistics: bool
    share_of_rho: float
    caches: tuple[str, ...]

    @property
    def climbs(self) -> bool:
        """Whether nearly all of rho is climbed."""
        return abs(self.share_of_rho - 1) < _TOLERANCE

    @property
    def is_right(self) -> bool:
        """Whether nothing is in the way of SAM."""
        return self.sees_epsilon and self.same_numbers and self.same_statistics and self.climbs

    def __str__(self) -> str:
        share = f"{self.share_of_rho:.0%} of rho is climbed"
        lines = [
            "ok     the second pass sees w + epsilon"
            if self.sees_epsilon
            else "WRONG  the second pass does not see w + epsilon: does the model compute with "
            "these parameters, or with copies of them?",
            "ok     both passes draw the same random numbers"
            if self.same_numbers
            else "WRONG  the passes draw different random numbers: call optimizer.attach(model), "
            "or use first_pass() and second_pass(model)",
            "ok     the second pass leaves running statistics alone"
            if self.same_statistics
            else "WRONG  the second pass changes running statistics: call optimizer.attach(model), "
            "or use second_pass(model)",
            f"ok     {share}"
            if self.climbs
            else f"WRONG  {share}: the gradient is zero or not finite, or the weights' dtype "
            f"rounds the climb away",
        ]
        return "\n".join([*lines, *[f"note   {cache}" for cache in self.caches]])


def examine(optimizer: Passes, model: nn.Module, forward_backward: Callable[[], Any]) -> Checkup:
    """Try a step and take it back; see ``FusedSAM.check``."""
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]

    def gradients() -> list[Tensor | None]:
        optimizer.zero_grad()
        with torch.enable_grad():
            forward_backward()
        return [p.grad for p in params]

    with _undone(optimizer, model) as rewind:
        first = gradients()
        if all(grad is None for grad in first):
            raise RuntimeError(
                "check(): forward_backward left no gradient; it has to call backward"
            )
        with _without_climb(groups):
            optimizer.first_step()
        without = gradients()
        rewind()
        before = [p.detach().clone() for p in params]
        exact = _exact_climb(optimizer, gradients())
        optimizer.first_step()
        share = _share(params, before, exact)
        buffers = [b.clone() for b in model.buffers()]
        climbed = gradients()
        kept = all(map(_same, buffers, model.buffers()))
        return Checkup(
            sees_epsilon=not all(map(_same, without, climbed)),
            same_numbers=all(map(_same, first, without)),
            same_statistics=kept,
            share_of_rho=share,
            caches=tuple(_caches(model)),
        )


@contextmanager
def _undone(optimizer: Passes, model: nn.Module) -> Iterator[Callable[[], None]]:
    """Take back, at the end and at each call of what it yields, all that a try has changed."""
    facts = optimizer._facts
    owner: Any = facts.owner()
    start = Randomness.now(facts.devices())
    buffers = [(b, b.clone()) for b in model.buffers()]
    state = {p: {k: _copied(v) for k, v in entry.items()} for p, entry in optimizer.state.items()}
    members = {
        p: {name: value.clone() for name, value in entry.items()}
        for p, entry in facts.engine.layout.members.values().items()
    }
    numbers = {k: value.clone() for k, value in facts.engine.layout.members.numbers.items()}
    aside = put_aside(optimizer.param_groups)
    kept = facts.record, facts.total, facts.decision, facts.scale, owner._when
    climbs = [group.get(CLIMBS) for group in optimizer.param_groups]
    blends = [group[BLEND.name] for group in optimizer.param_groups]
    # It climbs, whatever a schedule says, or a blend that has one.
    facts.record, owner._when = Record(), Always()
    for group in optimizer.param_groups:
        group[BLEND.name] = None

    def rewind() -> None:
        optimizer.restore()
        optimizer.zero_grad()
        start.replay()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
            for param, entry in state.items():
                for name, value in entry.items():
                    if isinstance(value, Tensor):
                        optimizer.state[param][name].copy_(value)
            facts.engine.layout.members.adopt(members, numbers)

    try:
        yield rewind
    finally:
        rewind()
        facts.record, facts.total, facts.decision, facts.scale, owner._when = kept
        for group, number, blend in zip(optimizer.param_groups, climbs, blends, strict=True):
            group[BLEND.name] = blend
            if number is None:
                group.pop(CLIMBS, None)
            else:
                group[CLIMBS] = number
        put_back(aside)


@contextmanager
def _without_climb(groups: list[dict[str, Any]]) -> Iterator[None]:
    # With rho = 0 a half-precision weight would still be its master, rounded anew, at random.
    ascents = [group[ASCENT.name] for group in groups]
    for group in groups:
        group[ASCENT.name] = None
    try:
        yield
    finally:
        for group, ascent in zip(groups, ascents, strict=True):
            group[ASCENT.name] = ascent


def _exact_climb(optimizer: Passes, grads: list[Tensor | None]) -> list[Tensor | None]:
    """Epsilon for each parameter, in float64, from these gradients at w."""
    rest, groups, epsilons = iter(grads), [], []
    for group in optimizer.param_groups:
        copies = []
        for param in group["params"]:
            grad, copy = next(rest), None
            if grad is not None:
                copy = nn.Parameter(_wide(param))
                copy.grad = _wide(grad)
                copies.append(copy)
            epsilons.append(copy)
        options = {name: group[name] for name in OPTIONS}
        groups.append({"params": copies, **options, "maximize": group.get("maximize", False)})
    before = [None if copy is None else copy.detach().clone() for copy in epsilons]
    kind: Any = type(optimizer._facts.owner())
    exact = kind(groups, torch.optim.SGD, lr=0.0, backend="reference")
    kept = optimizer._facts.engine.layout.members.values()
    pairs = zip(epsilons, optimizer._all_params(), strict=True)
    exact._facts.engine.layout.members.adopt(
        {c: kept.get(p, {}) for c, p in pairs if c is not None}, {}
    )
    exact.first_step()
    return [
        None if copy is None or start is None else copy.detach() - start
        for copy, start in zip(epsilons, before, strict=True)
    ]


def _wide(tensor: Tensor) -> Tensor:
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(wide, copy=True)


def _share(params: list[Tensor], before: list[Tensor], exact: list[Tensor | None]) -> float:
    """The projection of the move on the exact climb, in units of its length."""
    along = wanted = 0.0
    for param, start, epsilon in zip(params, before, exact, strict=True):
        if epsilon is not None:
            moved = _wide(param) - _wide(start)
            along += (moved * epsilon.conj()).real.sum().item()
            wanted += epsilon.abs().square().sum().item()
    return along / wanted if wanted else float("nan")


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _caches(model: nn.Module) -> Iterator[str]:
    kinds = {p.device.type for p in model.parameters()}
    if torch.is_autocast_cache_enabled() and any(map(torch.is_autocast_enabled, kinds)):
        yield "autocast keeps casts of the weights; they are dropped whenever the weights change"
    parametrize = sys.modules.get("torch.nn.utils.parametrize")
    if parametrize is not None and parametrize._cache_enabled:
        yield "parametrize.cached() keeps weights; they are dropped whenever the weights change"
    names = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("torchao")}
    if names:
        yield f"torchao's {', '.join(sorted(names))} may keep casts of the weights"
