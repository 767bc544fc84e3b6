"""The device that is measured.

Without a GPU it is the CPU, and everything runs in small: a dry run, which finds mistakes and whose
figures mean nothing. Triton takes part under TRITON_INTERPRET=1.
"""

import torch

DRY = not torch.cuda.is_available()
DEVICE = torch.device("cpu") if DRY else torch.device("cuda", 0)
