"""What torch.optim checks of a group at construction only: it can be changed, or loaded, later."""

from __future__ import annotations

import math

from torch import Tensor

from .base import Group, Rule

_RANGES = {
    "betas": (0.0, 1.0),
    "momentum": (0.0, math.inf),
    "alpha": (0.0, math.inf),
    "eps": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "lr_decay": (0.0, math.inf),
}
"""From where on, and below what, an option's value makes sense; the same for every class."""


def check_options(rule: Rule, group: Group) -> None:
    """Raise unless a group has all options that the rule reads, and their values make sense.

    A learning rate may be anything, and tensors elsewhere than on a CPU are not looked at: the
    host would wait for them.

    Raises:
        KeyError: there is no such option.
        ValueError: a value is out of its range, or too large for a float.
    """
    name = rule.optimizer.__name__
    try:
        rule.numbers(group)
        _float(group["lr"])
    except KeyError as error:
        raise KeyError(
            f"a parameter group has no {error.args[0]!r}, which {name} needs; set it, or load a "
            f"checkpoint of {name}"
        ) from error
    except OverflowError as error:
        raise ValueError(
            f"an option of {name} is too large for a float; use a smaller one"
        ) from error
    for option, (low, high) in _RANGES.items():
        if option in group:
            value = group[option]
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if not low <= _float(number) < high:
                    raise ValueError(
                        f"{option}={value!r} was set in a parameter group; {name} needs "
                        f"{low:g} <= {option} < {high:g}"
                    )


def _float(value: float | Tensor) -> float:
    """A number, or the one in a tensor on a CPU; 0 for one elsewhere."""
    return 0.0 if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)
