"""FusedSAM: Sharpness-Aware Minimization as a drop-in ``torch.optim.Optimizer``."""

from .optimizer import FusedSAM

__version__ = "0.1.0"

__all__ = ["FusedSAM", "__version__"]
