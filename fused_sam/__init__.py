"""FusedSAM: Sharpness-Aware Minimization as a drop-in ``torch.optim.Optimizer``."""

from .optimizer import FusedSAM
from .rules import Lion

__version__ = "0.1.0"

__all__ = ["FusedSAM", "Lion", "__version__"]
