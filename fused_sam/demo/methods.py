"""The three ways to train that the demo compares."""

from __future__ import annotations

import torch

from fused_sam import FusedSAM

from .textbook import TextbookSAM
from .training import Method, Setting

# With RHO, what fused_sam.demo.tune found.
SGD_SETTING = {"lr": 0.003, "weight_decay": 0.2}
SAM_SETTING = {"lr": 0.1, "weight_decay": 0.02}


def make_methods(rho: float) -> tuple[Method, Method, Method]:
    """SGD, the textbook's SAM and FusedSAM."""
    sam = Setting(**SAM_SETTING, rho=rho)
    return (
        Method("SGD", torch.optim.SGD, Setting(**SGD_SETTING)),
        Method("textbook SAM", TextbookSAM, sam),
        Method("FusedSAM", FusedSAM, sam),
    )
