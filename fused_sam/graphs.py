"""A whole SAM step as one CUDA graph: ``step = capture(model, loss_fn, optimizer, batch)``."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import optimizer as torch_optimizer
from torch.utils import _pytree as pytree

from . import ascents, blends
from .attached import check_model
from .batchnorm import frozen_running_stats
from .caches import forget_copies
from .devicegraph import DeviceGraph
from .devices import on
from .gradients import are_fresh
from .modes import working
from .optimizer import FusedSAM
from .options import CLIMBS, check_values, to_numbers_
from .randomness import Randomness
from .recording import Recording
from .rules import check_options
from .schedule import NO_CLIMB, Always, Decision, When

__all__ = ["CapturedStep", "capture"]

LossFn = Callable[[Any, Any], Tensor]

_ASCENTS, _BLENDS = ("sam", "p-norm", "usam"), (None, "gsam", "wsam")
"""What has nothing that it carries from step to step: a warm-up leaves no trace."""

_NUMBER = (int, float)
_AGAIN = "capture it again: step = fused_sam.graphs.capture(...)"


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

        step = fused_sam.graphs.capture(model, loss_fn, optimizer, example_batch)
        for batch in loader:
            loss = step(batch)

    Weights, running statistics, random numbers, scaler and counters are as before afterwards, and
    so is optimizer state; state that was missing is there, at zero. The second pass draws the
    random numbers of the first and leaves running statistics alone. ``when`` makes a second graph,
    of a plain step, in the same memory.

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
        A function of a batch that returns the loss at w, (), a tensor of its own.

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
        self._device = self._check_can_be_captured()
        leaves, self._structure = pytree.tree_flatten(batch)
        for leaf in leaves:
            _check_leaf(leaf, self._device)
        self._inputs = [leaf.detach().clone() for leaf in leaves]
        self._batch = pytree.tree_unflatten(self._inputs, self._structure)
        self._graphs: dict[bool, _Graph] = {}
        self._written: list[Tensor] = []
        with on(self._device), torch.inference_mode(False), torch.enable_grad(), self._undone():
            for climbs in (True,) if type(self._optimizer.when) is Always else (True, False):
                pool = self._graphs[True].device.pool if self._graphs else None
                self._graphs[climbs] = self._capture(climbs, pool)
        for graph in self._graphs.values():
            graph.recording.skip.zero_()
        self._groups = list(self._optimizer.param_groups)
        self._layout = self._optimizer._facts.engine.layout
        self._modules = list(model.modules())
        self._fixed = self._what_is_fixed()
        self._parts = self._parts_of_model()
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    # ------------------------------------------------------------------------------------- capture

    def _check_can_be_captured(self) -> torch.device:
        opt = self._optimizer
        check_model(self._model, [p for group in opt.param_groups for p in group["params"]])
        if isinstance(self._model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise RuntimeError(
                f"capture() takes a model of one process and one device, got "
                f"{type(self._model).__name__}: step without a graph"
            )
        opt._refuse_away("capture()")
        opt._refresh()
        opt._facts.captures.renew()
        engine = opt._facts.engine
        devices = {bucket.device for bucket in engine.buckets}
        if len(devices) != 1:
            raise RuntimeError(
                f"capture() needs all parameters on one device, they are on "
                f"{sorted(map(str, devices))}"
            )
        (device,) = devices
        _check_device(device)
        if engine.layout.rule is None:
            raise RuntimeError(
                f"{type(opt.base_optimizer).__name__} steps by itself, on the host: capture() needs "
                f"a base optimizer that is fused, one of fused_sam.rules.RULES"
            )
        for backend, bucket in zip(engine.backends, engine.buckets, strict=True):
            if not backend.replays(bucket):
                raise RuntimeError(
                    f"backend={backend.name!r} bakes hyperparameters of {bucket.dtype} weights "
                    f"into a graph: choose backend='triton'"
                )
        ascent, blend = ascents.chosen(opt.param_groups), blends.chosen(opt.param_groups)
        if ascent.key not in _ASCENTS:
            raise RuntimeError(
                f"ascent={ascent.key!r} carries something from step to step, which capture() cannot "
                f"put back after its warm-up: step without a graph, or with one of {_ASCENTS}"
            )
        if blend is not None and blend.key not in _BLENDS:
            raise RuntimeError(
                f"blend={blend.key!r} carries something from step to step, which capture() cannot "
                f"put back after its warm-up: step without a graph, or with one of {_BLENDS}"
            )
        if opt.when.needs_norm:
            raise RuntimeError(
                f"{opt.when} reads the gradient's norm on the host in the middle of a step, which a "
                f"graph cannot: choose a schedule that goes by the number of the step"
            )
        if self._scaler is not None and ascent.scale_matters:
            raise RuntimeError(
                f"ascent={ascent.key!r} needs the loss scale on the host, which a graph keeps on "
                f"the device: use bfloat16 without a scaler, or step without a graph"
            )
        self._refuse_hooks()
        if are_fresh(opt.param_groups):
            raise RuntimeError(
                "there are gradients that no step has used, and capture() does both passes "
                "itself: call optimizer.zero_grad() before"
            )
        return device

    def _refuse_hooks(self) -> None:
        opt = self._optimizer
        guard = 1  # of FusedSAM, which hooks the base optimizer
        count = len(torch_optimizer._global_optimizer_pre_hooks)
        count += len(torch_optimizer._global_optimizer_post_hooks)
        for each in (opt, opt.base_optimizer):
            count += len(getattr(each, "_optimizer_step_pre_hooks", ()))
            count += len(getattr(each, "_optimizer_step_post_hooks", ()))
        if count > guard:
            raise RuntimeError(
                "step hooks are registered on the optimizer, and a graph cannot call them: remove "
                "them, or step without a graph"
            )

    def _capture(self, climbs: bool, pool: Any) -> _Graph:
        graph = _Graph(self._optimizer, self._device, pool)

        def rehearse() -> None:
            try:
                with graph.recording.rehearsing(), _deciding(self._optimizer, climbs):
                    loss = self._run(climbs, contextlib.nullcontext())
            except BaseException:
                self._optimizer.restore()
                self._optimizer.zero_grad()
                raise
            graph.make_outputs(loss, climbs)

        def record() -> None:
            with graph.recording.capturing(), _deciding(self._optimizer, climbs):
                graph.keep(self._run(climbs, graph.device.second_pass()), climbs)

        graph.device.warm_up(rehearse)
        self._refuse_other_gradients()
        graph.recording.lay_out()
        try:
            graph.device.record(record)
        except BaseException as error:
            self._optimizer._facts.forget_climb()  # which has not happened
            self._optimizer.zero_grad()
            if isinstance(error, RuntimeError):
                raise RuntimeError(
                    f"the step could not be captured: {error}. A graph cannot hold what makes the "
                    f"host wait, such as .item(), print(), or a batch from the CPU. Nothing has "
                    f"changed"
                ) from error
            raise
        graph.params = self._written
        return graph

    def _run(self, climbs: bool, second: contextlib.AbstractContextManager[None]) -> Tensor:
        """A whole step."""
        opt, record = self._optimizer, self._optimizer._facts.record
        record.clear()
        opt.zero_grad()
        with record.unrecorded():
            loss = self._forward_backward()
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
        self._written = [param for param in params if param.grad is not None]
        opt.zero_grad()
        return loss.detach()

    def _forward_backward(self) -> Tensor:
        loss = self._loss_fn(self._model, self._batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"loss_fn(model, batch) must return a loss of one number, got "
                f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
            )
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        return loss

    def _refuse_other_gradients(self) -> None:
        ours = {p for group in self._optimizer.param_groups for p in group["params"]}
        for name, param in self._model.named_parameters():
            if param not in ours and param.grad is not None:
                param.grad = None
                raise RuntimeError(
                    f"{name} gets a gradient and is not the optimizer's: a graph would not add to "
                    f"it as backward() does. Call requires_grad_(False), or add it to a group"
                )

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """A block after which all that steps change besides weights and state is as before."""
        opt, scaler = self._optimizer, self._scaler
        counts = [dict(group) for group in opt.param_groups]
        random = Randomness.now([self._device])
        numbers: list[Tensor] = []
        if scaler is not None:
            scaler.scale(torch.zeros((), device=self._device))  # makes them
            numbers = [scaler._scale, scaler._growth_tracker]
        tensors = [*dict.fromkeys(self._model.buffers()), *numbers]
        saved = [tensor.detach().clone() for tensor in tensors]
        total, norm = opt._facts.total, opt._facts.norm
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)
            for group, count in zip(opt.param_groups, counts, strict=True):
                group.update(count)
                if CLIMBS not in count:
                    group.pop(CLIMBS, None)
            random.replay()
            opt._facts.total, opt._facts.norm = total, norm
            if scaler is not None:
                scaler._per_optimizer_states.pop(id(opt), None)

    # -------------------------------------------------------------------------------------- replay

    def __call__(self, batch: Any) -> Tensor:
        """Take a step; returns the loss at w, ()."""
        opt, facts = self._optimizer, self._optimizer._facts
        with on(self._device), working():
            self._check_that_it_fits()
            self._load(batch)
            first = opt.param_groups[0]
            decision = opt.when.decide(first, lambda: 0.0)
            graph = self._graphs[decision.climbs]
            count = first.get(CLIMBS, 0)
            if decision.climbs:
                first[CLIMBS] = count + 1
            try:
                graph.recording.write()
            except BaseException:
                first[CLIMBS] = count
                raise
            graph.device.replay()
            increment_version(graph.params)
            if decision.climbs:
                facts.total, facts.norm = graph.total, graph.norm
            for group in opt.param_groups:
                group.update(decision.memory)
            facts.arrive()
            forget_copies()
            for each in (opt, opt.base_optimizer):  # learning-rate schedulers look for it
                each._opt_called = True  # type: ignore[attr-defined]
            assert graph.loss is not None
            return graph.loss.clone()

    def _load(self, batch: Any) -> None:
        leaves, structure = pytree.tree_flatten(batch)
        if structure != self._structure:
            raise ValueError(
                f"the batch has the structure {structure}, and {self._structure} was captured"
            )
        for leaf, ours in zip(leaves, self._inputs, strict=True):
            _check_leaf(leaf, self._device)
            if leaf.shape != ours.shape or leaf.dtype != ours.dtype:
                raise ValueError(
                    f"the batch has a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}, and "
                    f"{tuple(ours.shape)} and {ours.dtype} was captured; capture one step for each, "
                    f"or leave out the last batch of an epoch (DataLoader(..., drop_last=True))"
                )
        for leaf, ours in zip(leaves, self._inputs, strict=True):
            ours.copy_(leaf, non_blocking=True)

    def _check_that_it_fits(self) -> None:
        opt, facts = self._optimizer, self._optimizer._facts
        opt._refuse_away("a captured step")
        groups, engine = opt.param_groups, facts.engine
        same = engine.layout is self._layout and len(groups) == len(self._groups)
        if not (same and self._layout.is_current(groups) and self._layout.has_its_looks()):
            _outdated("parameters were added, removed, thawed, moved or restrided")
        if not all(map(operator.is_, groups, self._groups)):
            _outdated("the parameter groups were replaced")
        parts = self._parts_of_model()
        same = len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))
        if not same or list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            _outdated("a layer, a parameter or a buffer of the model was moved or replaced")
        self._refuse_hooks()
        for group in groups:
            to_numbers_(group)
            check_values(group)
            assert engine.layout.rule is not None
            check_options(engine.layout.rule, group)
        _ = opt.max_grad_norm
        engine.take_in(opt.state, groups)
        now = self._what_is_fixed()
        if now != self._fixed:
            for what, value in now.items():
                if value != self._fixed.get(what, value):
                    _outdated(f"{what} was {self._fixed[what]} and is {value}")
            _outdated("options of groups were added or removed")
        if are_fresh(groups):
            raise RuntimeError(
                "there are gradients that no step has used, and a captured step does both passes "
                "itself: call optimizer.zero_grad() before"
            )

    def _parts_of_model(self) -> list[Any]:
        """Every layer, parameter and buffer of the model, or what stands in its place now."""
        dicts = [(m._modules, m._parameters, m._buffers) for m in self._modules]
        return list(itertools.chain.from_iterable(map(dict.values, itertools.chain(*dicts))))

    def _what_is_fixed(self) -> dict[str, Any]:
        """By name, all that a graph has baked in and that may change where it is."""
        opt, scaler = self._optimizer, self._scaler
        layout = opt._facts.engine.layout
        fixed: dict[str, Any] = {
            "training mode of the model's layers": [m.training for m in self._modules],
            "requires_grad of the parameters": [p.requires_grad for p in layout.params],
            "which parameters have state": [
                (name, tuple(buffer.present))
                for bucket in layout.buckets
                for name, buffer in bucket.states.items()
            ],
        }
        ascent, loose = ascents.chosen(opt.param_groups), {"params", CLIMBS, *opt.when.memory}
        for row, group in enumerate(opt.param_groups):
            fixed[f"what group {row} keeps and reads"] = (
                layout.rule.kept(group) if layout.rule else (),
                [bool(sums.reads_param(group)) for sums in ascent.sums.chain],
            )
            for name, value in group.items():
                if name not in loose:
                    fixed[f"{name!r} of group {row}"] = _kind(value)
        if scaler is not None:
            fixed["the scaler"] = (
                *(scaler.is_enabled(), scaler.get_growth_factor(), scaler.get_backoff_factor()),
                *(scaler.get_growth_interval(), id(scaler._scale), id(scaler._growth_tracker)),
            )
        return fixed


class _Graph:
    """One graph, its tables and what it returns.

    Attributes:
        loss, total: where it puts the loss at w and what the climb reduced.
        norm: which norm that is.
        params: those that it writes.
    """

    def __init__(self, optimizer: FusedSAM, device: torch.device, pool: Any) -> None:
        self._optimizer = optimizer
        self.recording = Recording(device)
        self.device = DeviceGraph(device, pool)
        self.loss: Tensor | None = None
        self.total: Tensor | None = None
        self.norm: Callable[[Tensor], Tensor] = torch.sum
        self.params: list[Tensor] = []

    def make_outputs(self, loss: Tensor, climbs: bool) -> None:
        """After a rehearsal: outside of the graph's pool, which other graphs use too."""
        facts = self._optimizer._facts
        self.loss = torch.empty_like(loss.reshape(()))
        self.total = torch.empty_like(facts.total) if climbs and facts.total is not None else None

    def keep(self, loss: Tensor, climbs: bool) -> None:
        """The end of the graph."""
        facts = self._optimizer._facts
        assert self.loss is not None
        self.loss.copy_(loss.reshape(()))
        if climbs and self.total is not None and facts.total is not None:
            self.total.copy_(facts.total)
            self.norm = facts.norm


class _Decided(When):
    """Climbs or does not, whatever the number of the step."""

    memory: Mapping[str, float] = {}  # noqa: RUF012

    def __init__(self, climbs: bool) -> None:
        object.__setattr__(self, "_decision", Decision(True, {}) if climbs else NO_CLIMB)

    def decide(self, group: Mapping[str, Any], sq_norm: Callable[[], float]) -> Decision:
        """As was said."""
        decision: Decision = self._decision  # type: ignore[attr-defined]
        return decision


@contextlib.contextmanager
def _deciding(optimizer: FusedSAM, climbs: bool) -> Iterator[None]:
    when = optimizer._when
    optimizer._when = _Decided(climbs)
    try:
        yield
    finally:
        optimizer._when = when


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(
            f"capture() makes a CUDA graph, and the parameters are on {device}: move the model to a "
            f"GPU before, or call the optimizer's two steps"
        )


def _check_leaf(leaf: Any, device: torch.device) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"a batch is a tensor, or tuples, lists and dicts of tensors; got "
            f"{type(leaf).__name__} in it"
        )
    if leaf.device != device:
        raise ValueError(
            f"the batch has a tensor on {leaf.device}, and the graph reads {device}: call "
            f"tensor.to({str(device)!r}, non_blocking=True) before"
        )


def _kind(value: Any) -> Any:
    """What of an option must stay: of numbers, that they are numbers."""
    if isinstance(value, Tensor):
        return "a number" if value.device.type == "cpu" else f"the tensor at {value.data_ptr()}"
    if isinstance(value, _NUMBER) and not isinstance(value, bool):
        return "a number"
    return tuple(map(_kind, value)) if isinstance(value, tuple) else value


def _outdated(why: str) -> None:
    raise RuntimeError(f"since the step was captured {why}. Nothing was done; {_AGAIN}")
