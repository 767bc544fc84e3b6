"""The gradients that a base optimizer may be given: one file each."""

from __future__ import annotations

from .base import Blend
from .plain import PLAIN

__all__ = ["PLAIN", "Blend"]
