"""The native backend: C++ on a CPU, CUDA C++ on a GPU (csrc/), one operation for each pass."""

from .library import is_spoilt, missing
from .operations import NativeBackend

__all__ = ["NativeBackend", "is_spoilt", "missing"]
