"""A few steps over awkward sizes, for compute-sanitizer to watch: PyTorch's caching is off."""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation with bounds

import torch

from fused_sam import FusedSAM

from .device import DEVICE
from .launches import available


def main():
    """Every rule and backend, gradients that are missing and unaligned, restore, clipping."""
    torch.manual_seed(0)
    for backend in available():
        for base, options in (
            (torch.optim.SGD, {"momentum": 0.9}),
            (torch.optim.AdamW, {"amsgrad": True}),
            (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
        ):
            steps(backend, base, **options)
            print(backend, base.__name__, flush=True)


def steps(backend, base, **options):
    """Three steps and a way back."""
    sizes = [1, 63, 4095, 4097, 20_003]
    params = [torch.nn.Parameter(torch.randn(n, device=DEVICE)) for n in sizes]
    shared = torch.randn(5000, device=DEVICE)  # it has another owner, so the window stays in it
    params.append(torch.nn.Parameter(shared[3:4200]))
    opt = FusedSAM(params, base, backend=backend, lr=0.01, max_grad_norm=1.0, **options)
    for i in range(3):
        for method in (opt.first_step, opt.second_step):
            for j, p in enumerate(params):
                flat = torch.randn(p.numel() + i, device=DEVICE)
                p.grad = flat[i:] if j != i else None
            method()
    opt.first_step()
    opt.restore()
    assert all(p.isfinite().all() for p in params)


if __name__ == "__main__":
    main()
