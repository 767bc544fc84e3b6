"""The options that FusedSAM adds to a parameter group, each declared once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: its key in a group, and the keyword of the constructor.
        default: for groups that do not set it.
        check: raises TypeError or ValueError for a value that cannot be used.
    """

    name: str
    default: Any
    check: Callable[[str, Any], None]


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a number of Python's."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_size(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number >= 0."""
    check_number(name, value)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite and >= 0, got an int beyond all floats") from None
    if not (finite and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def _check_clip(name: str, value: Any) -> None:
    if value is not None:
        check_size(name, value)
        if value == 0:
            raise ValueError(f"{name}=0 would stop all learning; use None for no clipping")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_p(name: str, value: Any) -> None:
    check_number(name, value)
    if not value >= 1.1:
        raise ValueError(f"{name} must be >= 1.1 (it may be math.inf), got {value!r}")


def _check_share(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")


def _check_gamma(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an integer that is not less."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value!r}")


def _check_period(name: str, value: Any) -> None:
    if value is not None:
        check_count(name, value, 1)


def _check_member(name: str, value: Any) -> None:
    if isinstance(value, type):
        raise TypeError(f"{name} must be an instance: {value.__name__}(...), got the class {value}")
    if value is not None and not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of fused_sam.{name}s, the name of one, or None, got {value!r}"
        )


RHO = Option("rho", 0.05, check_size)
ADAPTIVE = Option("adaptive", False, _check_flag)
ETA = Option("eta", 0.0, check_size)
ASCENT = Option("ascent", "sam", _check_member)
MAX_GRAD_NORM = Option("max_grad_norm", None, _check_clip)
P = Option("p", 2.0, _check_p)
SIGMA = Option("sigma", 1.0, check_size)
LAM = Option("lam", 0.95, _check_share)
THETA = Option("theta", 0.9, _check_share)
BLEND = Option("blend", None, _check_member)
BLEND_ALPHA = Option("blend_alpha", 0.0, check_size)
BLEND_K = Option("blend_k", None, _check_period)
BLEND_GAMMA = Option("blend_gamma", 0.9, _check_gamma)
BLEND_MAX_NORM = Option("blend_max_norm", None, _check_clip)

OPTIONS: Mapping[str, Option] = {
    option.name: option
    for option in (
        *(RHO, ADAPTIVE, ETA, ASCENT, P, SIGMA, LAM, THETA),
        *(BLEND, BLEND_ALPHA, BLEND_K, BLEND_GAMMA, BLEND_MAX_NORM, MAX_GRAD_NORM),
    )
}
"""What a group holds besides the base optimizer's options, by name."""

CLIMBS = "sam_climbs"
"""Key in the first group: how many climbs there were. It is no option: the optimizer counts. The
rounding of half precision depends on it, so a checkpoint must hold it."""


MISSED = "sam_missed"
"""Key in a group of a checkpoint with Momentum-SAM: the indices of its parameters that had no
gradient in the last step. They stay at w."""


def check_values(group: Mapping[str, Any]) -> None:
    """Raise unless every one of these options can be used as it stands in a group."""
    for option in OPTIONS.values():
        option.check(option.name, group[option.name])


def agreed_max_grad_norm(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The ``max_grad_norm`` of all groups: one norm over all of them is clipped.

    Raises:
        TypeError, ValueError: they differ, or it cannot be used.
    """
    # A group that was added to the base optimizer has it from the next step on.
    values = [group[MAX_GRAD_NORM.name] for group in groups if MAX_GRAD_NORM.name in group]
    if any([value != values[0] for value in values]):
        raise ValueError(
            f"groups have different values of max_grad_norm, {', '.join(map(str, values))}, and "
            f"one norm over all gradients is clipped: give all groups the same"
        )
    value: float | None = values[0] if values else None
    _check_clip(MAX_GRAD_NORM.name, value)
    return value


def numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which NumPy's scalars, and in our options torch's on a CPU, are Python's numbers.

    A checkpoint that holds NumPy's does not load with ``weights_only``. Each step would wait for a
    tensor on a GPU. A learning rate may be a tensor, as in torch.optim.
    """
    return {name: _number(name, value) for name, value in options.items()}


def to_numbers_(group: dict[str, Any]) -> None:
    """The same for our options of a group, in place."""
    for name in OPTIONS:
        if name in group and type(group[name]) not in _PLAIN:
            group[name] = _number(name, group[name])


_PLAIN = (float, bool, str, int, type(None))


def _number(name: str, value: Any) -> Any:
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    ours = name in OPTIONS and isinstance(value, Tensor) and value.device.type == "cpu"
    return value.item() if ours and value.dim() == 0 else value
