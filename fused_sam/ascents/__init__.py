"""The climbs: one file each, listed here."""

from __future__ import annotations

from .base import Ascent, Sums
from .sam import SAM
from .squares import SQUARES

__all__ = ["ASCENTS", "SAM", "SQUARES", "SUMS", "Ascent", "Sums"]

ASCENTS: tuple[Ascent, ...] = (SAM,)

SUMS: tuple[Sums, ...] = (*[ascent.sums for ascent in ASCENTS], SQUARES)
"""All that is ever reduced."""
