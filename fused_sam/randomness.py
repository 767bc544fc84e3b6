"""Random states: what a forward is about to draw from, and drawing the same numbers again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WITHOUT_NUMBERS = ("cpu", "meta")  # the CPU's generator is always recorded


@dataclass(frozen=True, eq=False)
class Randomness:
    """The random states of one moment.

    Attributes:
        cpu: of torch's generator for the CPU.
        devices: of torch's generator for each device in use.
        python: of the module ``random``.
        numpy: of NumPy's global generator; None where NumPy is not imported. Generators that a
            program has made for itself are not known here.
    """

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> Randomness:
        """The states as they are, of the CPU and these devices; waits for none of them.

        Raises:
            RuntimeError: a device does not tell its random state.
        """
        in_use = dict.fromkeys(d for d in devices if d.type not in _WITHOUT_NUMBERS)
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            tuple((device, _of(device, "get_rng_state")()) for device in in_use),
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def draws_as(self, other: Randomness) -> bool:
        """Whether torch draws the same from both."""
        states = [self.cpu, *[state for _, state in self.devices]]
        others = [other.cpu, *[state for _, state in other.devices]]
        return len(states) == len(others) and all(map(torch.equal, states, others))

    def replay(self) -> None:
        """Set the states, so that the same numbers are drawn again."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            _of(device, "set_rng_state")(state)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _of(device: torch.device, name: str) -> Any:
    """A function of torch's module for this device, bound to the device."""
    function = getattr(torch.get_device_module(device), name, None)
    if function is None:
        raise RuntimeError(
            f"torch.{device.type} has no {name}(): the random numbers of a pass on {device} "
            f"cannot be drawn again; leave the model unattached, and out of first_pass() and "
            f"second_pass()"
        )
    if device.type == "mps":  # there is one, and it is not named
        return function
    return lambda *state: function(*state, device=device)
