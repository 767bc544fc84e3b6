"""The device that is measured. Import this before anything that imports triton.

Without a GPU everything runs in small on the CPU, the Triton kernels in their interpreter: a dry
run, which finds mistakes and whose figures mean nothing.
"""

import sys

import torch

from .machine import ROOT

DRY = not torch.cuda.is_available()
DEVICE = torch.device("cpu") if DRY else torch.device("cuda", 0)

if DRY:
    sys.path.insert(0, str(ROOT / "tests"))
    import interpreter  # noqa: F401
