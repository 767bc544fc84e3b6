"""The base optimizers that are fused: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping

from torch.optim import Optimizer

from .adagrad import ADAGRAD
from .adam import ADAM, ADAMW
from .base import MASTER, STEP, Group, Rule, State
from .check import check_options
from .lion import LION, Lion
from .rmsprop import RMSPROP
from .sgd import SGD

__all__ = ["MASTER", "RULES", "STEP", "Group", "Lion", "Rule", "State", "check_options"]

RULES: Mapping[type[Optimizer], Rule] = {
    rule.optimizer: rule for rule in (SGD, ADAM, ADAMW, RMSPROP, ADAGRAD, LION)
}
"""By the exact class of the base optimizer: a subclass may do anything."""
