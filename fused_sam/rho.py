"""Schedules of rho: one that follows the learning rate, and any of torch's.

torch's schedulers drive the learning rate only. Both classes here are ``LRScheduler`` themselves:
what takes a scheduler of torch takes them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .options import RHO, check_size


class _Around(LRScheduler):
    """A scheduler that goes around another one, whose numbers it passes on to rho."""

    scheduler: LRScheduler

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler inside; rho follows."""
        self.scheduler.step(*args, **kwargs)
        self._pass_on()

    def get_last_lr(self) -> list[Any]:
        """What the scheduler inside has computed last: learning rates, or values of rho."""
        values: list[Any] = self.scheduler.get_last_lr()
        return values

    @abstractmethod
    def _pass_on(self) -> None:
        """Give each group its rho."""


class ProportionalRho(_Around):
    """A scheduler that lets rho follow the learning rate, as GSAM's authors do.

    In each group, whenever the learning rate has changed (Zhuang et al., ICLR 2022, section 4)::

        rho = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)

    The line goes on beyond ``lr_min`` and ``lr_max``, as in the authors' code (a warm-up begins
    below), and ends at 0. It takes the place of the scheduler it is given::

        scheduler = ProportionalRho(
            CosineAnnealingLR(optimizer, T_max=100), rho_max=0.6, rho_min=0.1, lr_max=3e-3
        )

    A learning rate on a GPU is waited for.

    Args:
        scheduler: drives the learning rate; step(), state_dict() and all else are its own.
        rho_max: rho where the learning rate is ``lr_max``, finite and >= 0.
        rho_min: rho where it is ``lr_min``, finite and >= 0.
        lr_max: the largest learning rate, > ``lr_min``.
        lr_min: the smallest one, finite and >= 0.

    Raises:
        TypeError, ValueError: an argument cannot be used; its optimizer is no FusedSAM.
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        *,
        rho_max: float,
        rho_min: float = 0.0,
        lr_max: float,
        lr_min: float = 0.0,
    ) -> None:
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"ProportionalRho goes around a scheduler of torch, got {type(scheduler).__name__}"
            )
        line = {"rho_max": rho_max, "rho_min": rho_min, "lr_max": lr_max, "lr_min": lr_min}
        for name, value in line.items():
            check_size(name, value)
        if not lr_max > lr_min:
            raise ValueError(f"lr_max must be > lr_min, got {lr_max!r} and {lr_min!r}")
        _check_optimizer("ProportionalRho", scheduler.optimizer)
        self.scheduler = scheduler
        self._line = (rho_max, rho_min, lr_max, lr_min)
        self._pass_on()

    def state_dict(self) -> dict[str, Any]:
        """That of the scheduler; rho itself is in the optimizer's."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of the scheduler."""
        self.scheduler.load_state_dict(dict(state_dict))

    def _pass_on(self) -> None:
        rho_max, rho_min, lr_max, lr_min = self._line
        for group in self.scheduler.optimizer.param_groups:
            part = (float(group["lr"]) - lr_min) / (lr_max - lr_min)
            group[RHO.name] = max(0.0, rho_min + (rho_max - rho_min) * part)


class RhoScheduler(_Around):
    """Any scheduler of torch, for rho instead of the learning rate.

    ::

        RhoScheduler(optimizer, CosineAnnealingLR, T_max=100, eta_min=0.1)  # from its rho to 0.1

    Step it besides the scheduler of the learning rate, or both as one:
    ``ChainedScheduler([of_lr, of_rho], optimizer)``.

    Args:
        optimizer: a FusedSAM; each group begins with its own rho.
        scheduler: a class of ``torch.optim.lr_scheduler``, or a function that makes a scheduler for
            an optimizer: for it rho is the learning rate.
        *args, **kwargs: what the scheduler takes besides the optimizer.

    Raises:
        TypeError: the optimizer is no FusedSAM.
    """

    def __init__(
        self, optimizer: Any, scheduler: Callable[..., LRScheduler], *args: Any, **kwargs: Any
    ) -> None:
        _check_optimizer("RhoScheduler", optimizer)
        self.optimizer = optimizer
        groups = [
            {"params": [torch.zeros(0, device="cpu")], "lr": float(group[RHO.name])}
            for group in optimizer.param_groups
        ]
        self._stand_in = torch.optim.SGD(groups)
        self.scheduler = scheduler(self._stand_in, *args, **kwargs)
        # It never steps, and the scheduler would say so.
        self._stand_in._opt_called = True  # type: ignore[attr-defined]
        self._pass_on()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's, and each group's rho."""
        rhos = [group["lr"] for group in self._stand_in.param_groups]
        return {"scheduler": self.scheduler.state_dict(), "rho": rhos}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what state_dict() has returned, before the optimizer's checkpoint or after it."""
        self.scheduler.load_state_dict(state_dict["scheduler"])
        for group, rho in zip(self._stand_in.param_groups, state_dict["rho"], strict=True):
            group["lr"] = rho
        self._pass_on()

    def _pass_on(self) -> None:
        # A group that was added since keeps its rho.
        for group, mine in zip(
            self.optimizer.param_groups, self._stand_in.param_groups, strict=False
        ):
            group[RHO.name] = float(mine["lr"])


def _check_optimizer(who: str, optimizer: Any) -> None:
    groups = getattr(optimizer, "param_groups", ())
    if not groups or any([RHO.name not in group for group in groups]):
        raise TypeError(
            f"{who} needs a FusedSAM, whose groups have a rho, got {type(optimizer).__name__}; "
            f"make one with FusedSAM.wrap(optimizer, rho=...)"
        )
