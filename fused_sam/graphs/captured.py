"""Capturing a step, and taking it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils import _pytree as pytree

from ..batchnorm import frozen_running_stats
from ..caches import forget_copies
from ..devices import on
from ..gradients import put_back
from ..laststep import LastStep
from ..modes import working
from ..optimizer import FusedSAM
from ..options import CLIMBS
from ..randomness import Randomness
from ..recording import Recording
from ..schedule import NO_CLIMB, Always
from .baked import Baked, are_same, parts_of
from .conditions import (
    check_can_be_captured,
    check_leaf,
    of_others,
    refuse_other_gradients,
)
from .device import DeviceGraph

LossFn = Callable[[Any, Any], Tensor]


def capture(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: FusedSAM,
    example_batch: Any,
    *,
    scaler: Any = None,
) -> CapturedStep:
    """Capture a whole step: forward, backward, climb, forward, backward, update.

    ::

        step = capture(model, loss_fn, optimizer, example_batch)
        for batch in loader:
            loss = step(batch)

    Weights, running statistics, random numbers, scaler and counters are as before afterwards, and
    so is optimizer state; state that was missing is there, at zero. The second pass draws the
    random numbers of the first and leaves running statistics alone. ``when`` makes a second graph,
    of a plain step, in the same memory. With ``ascent=MSAM()`` the weights are at w afterwards, and
    after each step.

    Args:
        model: in the mode in which it trains, on one CUDA device; ``torch.compile`` is fine with
            ``mode="default"``.
        loss_fn: ``(model, batch) -> loss``, one number. It runs a few times now, and never again:
            what it does on the host, it does now.
        optimizer: with a fused base optimizer, and a backend that runs it on the GPU.
        example_batch: a tensor, or tuples, lists and dicts of tensors, all on the device; later
            ones must have its structure, shapes and dtypes.
        scaler: a ``torch.amp.GradScaler``: scale, step and update are part of the step.

    Returns:
        A function of a batch that returns the loss at w, (), a tensor of its own; with
        ``ascent=MSAM()`` the loss where the gradient is taken.

    Raises:
        TypeError, ValueError, RuntimeError: the step cannot be captured. The message says why, and
            everything is as it was.
    """
    return CapturedStep(model, loss_fn, optimizer, example_batch, scaler)


class CapturedStep:
    """A step that was captured; ``capture`` makes it. Calling it with a batch takes a step.

    Raises:
        ValueError: the batch is not like the one that was captured.
        RuntimeError: something that the graph has baked in has changed; nothing was done.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, optimizer: FusedSAM, batch: Any, scaler: Any
    ) -> None:
        if not isinstance(optimizer, FusedSAM):
            raise TypeError(f"capture() takes a FusedSAM, got {type(optimizer).__name__}")
        owner = optimizer._facts.owner()
        self._optimizer: FusedSAM = owner if isinstance(owner, FusedSAM) else optimizer
        self._model, self._loss_fn = model, loss_fn
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._device = check_can_be_captured(model, self._optimizer, self._scaler)
        leaves, self._structure = pytree.tree_flatten(batch)
        for leaf in leaves:
            check_leaf(leaf, self._device)
        self._inputs = [leaf.detach().clone() for leaf in leaves]
        self._batch = pytree.tree_unflatten(self._inputs, self._structure)
        self._graphs: dict[bool, _Graph] = {}
        with on(self._device), torch.inference_mode(False), torch.enable_grad(), self._undone():
            for climbs in self._kinds_of_step():
                other = next((graph.device for graph in self._graphs.values()), None)
                self._graphs[climbs] = self._capture(climbs, other)
        for graph in self._graphs.values():
            graph.recording.skip.zero_()
        self._baked = Baked(model, self._optimizer, self._scaler)

    def _kinds_of_step(self) -> tuple[bool, ...]:
        """Whether they climb."""
        if self._optimizer._follows() is not None:
            return (False,)
        return (True,) if type(self._optimizer.when) is Always else (True, False)

    # ------------------------------------------------------------------------------------- capture

    def _capture(self, climbs: bool, other: DeviceGraph | None) -> _Graph:
        graph, opt = _Graph(self._device, climbs, other), self._optimizer
        missed = [*map(id, opt._facts.missed)]
        began = bool(opt.state)

        def rehearse() -> None:
            try:
                with graph.recording.rehearsing():
                    self._run(climbs, contextlib.nullcontext())
            except BaseException:
                opt.restore()
                opt.zero_grad()
                raise

        def record() -> None:
            with graph.recording.capturing():
                graph.params = self._run(climbs, graph.device.second_pass())

        graph.device.warm_up(rehearse)
        refuse_other_gradients(self._model, opt)
        if began and missed != [*map(id, opt._facts.missed)]:
            raise RuntimeError(
                "the parameters that got no gradient in the last step are others than those of "
                "this one, and Momentum-SAM leaves them where they are: take one step like this "
                "one before the capture"
            )
        graph.recording.lay_out()
        modules = list(self._model.modules())
        parts = parts_of(modules)
        try:
            graph.device.record(record)
        except BaseException as error:
            opt._facts.forget_climb()  # which has not happened
            opt.zero_grad()
            if isinstance(error, RuntimeError):
                raise RuntimeError(
                    f"the step could not be captured: {error}. A graph cannot hold what makes the "
                    f"host wait, such as .item(), print(), or a batch from the CPU. Nothing has "
                    f"changed"
                ) from error
            raise
        if not are_same(parts, parts_of(modules)):
            raise RuntimeError(
                "the step puts another tensor in the place of a buffer or parameter of the model, "
                "and a graph would read the old one each time: write into it, with copy_() or so"
            )
        graph.keep(opt)
        return graph

    def _run(self, climbs: bool, second: contextlib.AbstractContextManager[None]) -> list[Tensor]:
        """A whole step; returns the parameters that it has written."""
        opt, record = self._optimizer, self._optimizer._facts.record
        record.clear()
        opt.zero_grad()
        ahead = opt._follows()
        if ahead is not None:
            opt._leave(ahead)
        with record.unrecorded():
            self._forward_backward()
            if ahead is None:
                opt._begin(zero_grad=True, scale=None)
            if climbs:
                with second, frozen_running_stats(self._model):
                    self._forward_backward()
        if self._scaler is None:
            opt._descend()
        else:
            self._scaler.step(opt)
            self._scaler.update()
        params = [p for group in opt.param_groups for p in group["params"]]
        written = [param for param in params if param.grad is not None]
        opt.zero_grad()
        return written

    def _forward_backward(self) -> None:
        loss = self._loss_fn(self._model, self._batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"loss_fn(model, batch) must return a loss of one number, got "
                f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
            )
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        facts = self._optimizer._facts
        facts.losses.note(loss.reshape(()), facts.perturbed)

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """A block after which all that steps change besides weights and state is as before.

        State is there then, which ``found_inf`` keeps as it was.
        """
        opt, scaler = self._optimizer, self._scaler
        facts = opt._facts
        counts = [dict(group) for group in opt.param_groups]
        dicts: list[dict[str, Any]] = [
            d for m in self._model.modules() for d in (m._parameters, m._buffers)
        ]
        parts = [dict(each) for each in dicts]
        others = [(p, p.grad) for p in of_others(self._model, opt).values()]
        for param, _ in others:
            param.grad = None
        random = Randomness.now([self._device])
        numbers: list[Tensor] = []
        if scaler is not None:
            scaler.scale(torch.zeros((), device=self._device))  # makes them
            numbers = [scaler._scale, scaler._growth_tracker]
            pending = scaler._per_optimizer_states  # of others, which an update() would forget
            scaler._per_optimizer_states = type(pending)(pending.default_factory)
        tensors = [*filter(_can_be_written, dict.fromkeys(self._model.buffers())), *numbers]
        saved = [tensor.detach().clone() for tensor in tensors]
        buckets = facts.engine.buckets
        kept = [{name: m.flat.clone() for name, m in b.members.items()} for b in buckets]
        total, norm, last = facts.total, facts.norm, facts.last
        try:
            yield
        except BaseException:
            for each, were in zip(dicts, parts, strict=True):
                each.update(were)
            raise
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)
            for group, count in zip(opt.param_groups, counts, strict=True):
                group.update(count)
                if CLIMBS not in count:
                    group.pop(CLIMBS, None)
            random.replay()
            facts.total, facts.norm, facts.last = total, norm, last
            put_back(others)
            for bucket, old in zip(buckets, kept, strict=True):
                for name, member in bucket.members.items():  # a climb moves an average
                    member.put_back(old.get(name))
            if scaler is not None:
                scaler._per_optimizer_states = pending

    # -------------------------------------------------------------------------------------- replay

    def __call__(self, batch: Any) -> Tensor:
        """Take a step; returns the loss at w, ()."""
        opt, facts = self._optimizer, self._optimizer._facts
        with on(self._device), working():
            self._baked.check()
            self._load(batch)
            opt.restore()  # from where Momentum-SAM lives, if a forward went there
            first = opt.param_groups[0]
            one_pass, when = opt._follows() is not None, opt.when
            counts = {**when.memory, **first}
            decision = NO_CLIMB if one_pass else when.decide(counts, lambda: 0.0)
            graph = self._graphs[decision.climbs]
            if decision.climbs or one_pass:
                first[CLIMBS] = first.get(CLIMBS, 0) + 1
            graph.recording.write()
            graph.device.replay()
            increment_version(graph.params)
            facts.last = graph.last.copied()
            facts.coming = None
            if graph.total is not None:
                facts.total, facts.norm = graph.total.clone(), graph.norm
            for group in opt.param_groups:
                group.update(decision.memory)
            facts.arrive()
            forget_copies()
            for each in (opt, opt.base_optimizer):  # learning-rate schedulers look for it
                each._opt_called = True  # type: ignore[attr-defined]
            loss = facts.last.loss_perturbed if one_pass else facts.last.loss
            assert isinstance(loss, Tensor)
            return loss

    def _load(self, batch: Any) -> None:
        leaves, structure = pytree.tree_flatten(batch)
        if structure != self._structure:
            raise ValueError(
                f"the batch has the structure {structure}, and {self._structure} was captured"
            )
        for leaf, ours in zip(leaves, self._inputs, strict=True):
            check_leaf(leaf, self._device)
            if leaf.shape != ours.shape or leaf.dtype != ours.dtype:
                raise ValueError(
                    f"the batch has a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}, and "
                    f"{tuple(ours.shape)} and {ours.dtype} was captured; capture a step for each, "
                    f"or leave out the last batch of an epoch (DataLoader(..., drop_last=True))"
                )
        for leaf, ours in zip(leaves, self._inputs, strict=True):
            ours.copy_(leaf, non_blocking=True)


def _can_be_written(tensor: Tensor) -> bool:
    """Whether it is no expanded tensor, several of whose elements are one."""
    return all(n < 2 or step != 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


class _Graph:
    """One graph, its tables, and what it leaves in its own memory for the caller to copy.

    Attributes:
        total, norm: what the climb has reduced, and which norm that is; total is None without one.
        last: what the step knows about itself.
        params: those that it writes.
    """

    total: Tensor | None
    norm: Callable[[Tensor], Tensor]
    last: LastStep
    params: list[Tensor]

    def __init__(self, device: torch.device, climbs: bool, other: DeviceGraph | None) -> None:
        self.recording = Recording(device, climbs)
        self.device = DeviceGraph(device, other)

    def keep(self, optimizer: FusedSAM) -> None:
        """The step was captured."""
        facts = optimizer._facts
        self.last, self.norm = facts.last, facts.norm
        self.total = facts.total if self.last.climbed else None
