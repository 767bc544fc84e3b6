"""Momentum-SAM (Becker et al. 2024, arXiv 2401.12033): SAM at the price of the base optimizer.

The weights live at w - rho * v / ||v||, where v is the base optimizer's momentum: there the coming
step leads. The gradient is taken there, once, and the step is made from w. The norm is over the
parameters that have a gradient in the step. ``fused_sam/onepass.py`` goes there and back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from .base import Choice
from .sam import ASCENT as SAM_ASCENT


@dataclass(frozen=True)
class MSAM(Choice):
    """One pass: the weights live ahead of w, along the momentum. 0.3 to 10 are usual for rho.

    ``optimizer.eval()`` goes to w, for an evaluation or a checkpoint; ``optimizer.train()`` ahead
    of it again. The base optimizer is SGD with momentum, Adam or AdamW.
    """

    key: ClassVar[str] = "msam"


ASCENT = dataclasses.replace(SAM_ASCENT, key=MSAM.key, along_momentum=True)
