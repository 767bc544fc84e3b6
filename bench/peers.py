"""Who is compared: FusedSAM, and the ways of writing SAM that people use.

Every peer is an object with ``first_step()`` and ``second_step()`` over the same parameter groups,
and all walk the same trajectory: ``tests/test_bench.py`` and every benchmark check it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam import FusedSAM, backends
from fused_sam.demo.textbook import TextbookSAM

RHO = 0.05

BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
}
"""Base optimizers with the options of all benchmarks."""

FORMS: dict[str, dict[str, bool]] = {"default": {}, "foreach": {"foreach": True}}
FORMS["fused"] = {"fused": True}
"""The forms in which ``torch.optim`` has its optimizers."""


class ForeachSAM:
    """SAM in as few passes over memory as PyTorch's own operations allow.

    Each parameter has two buffers. The climb is one pass, ``spare = w + scale * g``, after which
    the buffers change places, so that saving w and returning to it move pointers only. That is one
    access per number less than saving w in a buffer of its own: 9 with SGD's fused form.

    Where the scale lives on a GPU that pass would wait for it, and the climb is a copy of w and a
    stochastic gradient *ascent* with ``lr = scale`` by torch's fused kernel, which takes a tensor.

    Args:
        groups: parameter groups.
        base: the base optimizer's class.
        rho: radius of the neighbourhood.
        **options: of the base optimizer.
    """

    def __init__(
        self, groups: Iterable[Any], base: type[Optimizer], rho: float = RHO, **options: Any
    ) -> None:
        self.base_optimizer = base(groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        for group in self.param_groups:
            group.setdefault("rho", rho)
        self.params = [p for group in self.param_groups for p in group["params"]]
        self.spare = [torch.empty_like(p.data) for p in self.params]

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb."""
        grads: list[Tensor] = [p.grad for p in self.params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).add_(1e-12)
        weights = [p.data for p in self.params]
        start = 0
        for group in self.param_groups:
            part = slice(start, start := start + len(group["params"]))
            self._climb(weights[part], self.spare[part], grads[part], group["rho"] / norm)
        if norm.device.type == "cpu":
            self._swap(weights)

    @torch.no_grad()
    def second_step(self) -> None:
        """Return, and let the base optimizer step."""
        self._swap([p.data for p in self.params])
        self.base_optimizer.step()

    def _climb(
        self, weights: list[Tensor], spare: list[Tensor], grads: list[Tensor], scale: Tensor
    ) -> None:
        if scale.device.type == "cpu":
            alpha = scale.item()
            for w, out, grad in zip(weights, spare, grads, strict=True):
                torch.add(w, grad, alpha=alpha, out=out)
            return
        torch._foreach_copy_(spare, weights)
        torch._fused_sgd_(
            weights,
            grads,
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=-scale,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    def _swap(self, current: Sequence[Tensor]) -> None:
        for p, other in zip(self.params, self.spare, strict=True):
            p.data = other
        self.spare = list(current)


class CompiledSAM(ForeachSAM):
    """The foreach SAM as ``torch.compile`` fuses it: the climb is one graph, the step another.

    The learning rate is a tensor, else each change of it would compile anew.
    """

    def __init__(
        self, groups: Iterable[Any], base: type[Optimizer], rho: float = RHO, **options: Any
    ) -> None:
        options["lr"] = torch.tensor(options["lr"])
        if "capturable" in inspect.signature(base).parameters:  # else Adam takes no tensor
            options["capturable"] = True
        super().__init__(groups, base, rho, **options, foreach=True)
        self._graph = torch.compile(self._norm_and_climb)
        self._step = torch.compile(self.base_optimizer.step)

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb."""
        weights = [p.data for p in self.params]
        self._graph(weights, self.spare, [p.grad for p in self.params])
        self._swap(weights)

    @torch.no_grad()
    def second_step(self) -> None:
        """Return, and let the base optimizer step."""
        self._swap([p.data for p in self.params])
        self._step()

    def _norm_and_climb(
        self, weights: list[Tensor], spare: list[Tensor], grads: list[Tensor]
    ) -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) + 1e-12
        start = 0
        for group in self.param_groups:
            part = slice(start, start := start + len(group["params"]))
            epsilon = torch._foreach_mul(grads[part], group["rho"] / norm)
            torch._foreach_copy_(spare[part], torch._foreach_add(weights[part], epsilon))


@dataclass(frozen=True)
class Peer:
    """One column of a comparison.

    Attributes:
        name: what reports call it: the implementation and the form of its base optimizer.
        family: the implementation.
        make: ``(groups, base class, options) -> optimizer``.
    """

    name: str
    family: str
    make: Callable[[Iterable[Any], type[Optimizer], dict[str, Any]], Any]


def _fused_sam(backend: str) -> Peer:
    def make(groups: Iterable[Any], base: type[Optimizer], options: dict[str, Any]) -> Any:
        return FusedSAM(groups, base, rho=RHO, backend=backend, **options)

    return Peer(f"FusedSAM {backend}", "FusedSAM", make)


def _form(family: str, cls: Callable[..., Any], form: str) -> Peer:
    def make(groups: Iterable[Any], base: type[Optimizer], options: dict[str, Any]) -> Any:
        return cls(groups, base, rho=RHO, **options, **FORMS[form])

    return Peer(f"{family}, {form}", family, make)


def _pytorch_optimizer_sam(*args: Any, **kwargs: Any) -> Any:
    from pytorch_optimizer import SAM

    # Its own passes are batched where torch allows that together with the base's form.
    return SAM(*args, **kwargs)


def _compiled() -> Peer:
    def make(groups: Iterable[Any], base: type[Optimizer], options: dict[str, Any]) -> Any:
        return CompiledSAM(groups, base, **options)

    return Peer("compiled foreach SAM", "compiled foreach SAM", make)


def available_backends(device: torch.device) -> list[str]:
    """The names of the backends that run here, the one that ``"auto"`` takes first."""
    names = [backends.resolve("auto", device).name]
    for name in ("native", "triton", "reference"):
        try:
            found = backends.resolve(name, device).name
        except (ValueError, RuntimeError, ImportError):
            continue
        names += [found] if found not in names else []
    return names


def has(package: str) -> bool:
    """Whether a package is installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def fused_sam_peers(device: torch.device) -> list[Peer]:
    """FusedSAM with each backend that runs here; the first is what ``"auto"`` takes."""
    return [_fused_sam(name) for name in available_backends(device)]


def peers(device: torch.device, *, compiled: bool = False) -> list[Peer]:
    """All peers, FusedSAM first."""
    found = fused_sam_peers(device)
    families: dict[str, Callable[..., Any]] = {"textbook SAM": TextbookSAM}
    if has("pytorch_optimizer"):
        families["pytorch_optimizer SAM"] = _pytorch_optimizer_sam
    families["foreach SAM"] = ForeachSAM
    for family, cls in families.items():
        found += [_form(family, cls, form) for form in FORMS]
    return [*found, _compiled()] if compiled else found


def best_peers(device: torch.device, *, compiled: bool = False) -> list[Peer]:
    """FusedSAM, the textbook's default form, and every other implementation's fastest form."""
    wanted = ("textbook SAM, default", *(f"{p.family}, fused" for p in peers(device)))
    return [
        p
        for p in peers(device, compiled=compiled)
        if p.family in ("FusedSAM", "compiled foreach SAM") or p.name in wanted
    ]


def parameters(shapes: Iterable[Sequence[int]], device: torch.device, seed: int) -> list[Tensor]:
    """Parameters with random values; the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(*shape, generator=generator, device=device).mul_(0.02))
        for shape in shapes
    ]


def as_groups(params: Sequence[Tensor], count: int) -> list[dict[str, Any]]:
    """The parameters in ``count`` groups of about equal length, each with its weight decay."""
    bounds = [round(i * len(params) / count) for i in range(count + 1)]
    return [
        {"params": list(params[start:stop])}
        if count == 1
        else {"params": list(params[start:stop]), "weight_decay": 1e-4 * (1 + i)}
        for i, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
