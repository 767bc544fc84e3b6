"""What all adapters are made of: the micro-batches of a step, and the second pass over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from ..optimizer import FusedSAM

T = TypeVar("T")
NoSync = Callable[[], AbstractContextManager[Any]]


class MicroBatches:
    """The micro-batches whose gradients add up to one step.

    The framework decides when a step is due. Until then each micro-batch goes through ``first``;
    then ``second`` climbs and runs the same ones again. What comes after, clipping and
    ``optimizer.step()``, is the framework's. Holds no optimizer, so a model that has one of these
    can be copied.
    """

    def __init__(self) -> None:
        self._again: list[Callable[[], Any]] = []

    def __len__(self) -> int:
        return len(self._again)

    def first(self, optimizer: FusedSAM, forward_backward: Callable[[], T]) -> T:
        """Run a micro-batch at w and remember it; returns what ``forward_backward`` does."""
        with optimizer.first_pass():
            result = forward_backward()
        self.remember(forward_backward)
        return result

    def remember(self, forward_backward: Callable[[], Any]) -> None:
        """Keep a micro-batch that has run at w in ``optimizer.first_pass()`` already."""
        self._again.append(forward_backward)

    def forget(self, optimizer: FusedSAM) -> None:
        """Drop what is remembered: its gradients are gone."""
        self._again.clear()
        optimizer.restore()

    def climb(self, optimizer: FusedSAM, scaler: Any = None) -> None:
        """Climb with the sum of the gradients.

        In a step that does not climb they stay, and there is no second pass.

        Args:
            optimizer: holds the weights at w.
            scaler: the GradScaler whose scale the gradients have.
        """
        if optimizer.first_step(scaler=scaler):
            optimizer.zero_grad()
        else:
            self._again.clear()

    def second(self, optimizer: FusedSAM, no_sync: NoSync = nullcontext) -> None:
        """Run all micro-batches again, at w + epsilon, and forget them.

        Args:
            optimizer: holds the weights at w + epsilon; back at w if a micro-batch raises.
            no_sync: as ``DistributedDataParallel.no_sync``, entered for all but the last.
        """
        again, self._again = self._again, []
        try:
            for i, forward_backward in enumerate(again):
                with no_sync() if i + 1 < len(again) else nullcontext(), optimizer.second_pass():
                    forward_backward()
        except BaseException:
            optimizer.restore()
            raise


def check_options(names: Iterable[str], where: str, prefix: str = "") -> None:
    """Raise unless these are options of ``FusedSAM.wrap`` that an adapter hands on.

    Raises:
        TypeError: one is not; ``where`` names the adapter, in which all begin with ``prefix``.
    """
    known = list(inspect.signature(FusedSAM.wrap).parameters)[1:]  # the first is the optimizer
    known.remove("model")  # the adapter attaches it
    for name in names:
        if name not in known:
            raise TypeError(
                f"{where} has no option {prefix + name!r}; known are those of FusedSAM.wrap: "
                f"{', '.join(prefix + option for option in known)}"
            )


def be_at_w(optimizer: Any) -> None:
    """Go to w where Momentum-SAM is ahead of it: an evaluation begins, or training is over.

    Args:
        optimizer: any, in its proxies or not.
    """
    sam = unwrapped(optimizer)
    if isinstance(sam, FusedSAM):
        sam._be_at_w("evaluating")


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the proxies of Lightning, Fabric and Accelerate."""
    while True:
        inside = vars(optimizer)
        inner = inside.get("_optimizer", inside.get("optimizer"))
        if inner is None:
            return optimizer
        optimizer = inner


def fused_sam_in(optimizer: Any, where: str) -> FusedSAM:
    """The FusedSAM inside of ``optimizer``.

    Raises:
        TypeError: there is none; ``where`` names the adapter.
    """
    sam = unwrapped(optimizer)
    if not isinstance(sam, FusedSAM):
        raise TypeError(
            f"{where} needs a FusedSAM, got {type(sam).__name__}; make one with "
            f"FusedSAM.wrap(optimizer, rho=...)"
        )
    return sam


def no_sync_of(model: Any) -> NoSync:
    """``model.no_sync`` if it has one (DistributedDataParallel, FSDP), else nothing to enter."""
    no_sync: NoSync = getattr(model, "no_sync", nullcontext)
    return no_sync
