"""The native backend: C++ on a CPU, CUDA C++ on a GPU (csrc/), one operation for each pass."""

from .library import missing
from .operations import NativeBackend

__all__ = ["NativeBackend", "missing"]
