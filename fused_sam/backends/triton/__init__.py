"""The Triton backend: one kernel for each pass, with the mathematics handed in."""

from .operations import INTERPRETED, TritonBackend

__all__ = ["INTERPRETED", "TritonBackend"]
