"""A whole SAM step as one CUDA graph: ``step = capture(model, loss_fn, optimizer, batch)``."""

from .captured import CapturedStep, capture

__all__ = ["CapturedStep", "capture"]
