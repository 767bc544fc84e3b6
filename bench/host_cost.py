"""Host time of first_step() + second_step() on Triton and on native, kernels left out.

    python bench/host_cost.py [results.json]

Runs anywhere: the tensors are on the CPU, and what would launch a kernel does nothing. What is
left is everything else that the host does in a step, with all tables warm: looking for changes,
collecting gradients and their addresses, looking tables up. Prints the time and its parts.
"""

import cProfile
import gc
import json
import os
import platform
import pstats
import statistics
import sys
import time
import types
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # its launches could not be replaced

import torch

from fused_sam import FusedSAM, backends
from fused_sam.backends.native import operations as native
from fused_sam.backends.triton import operations as triton

PARAMETERS = 161
"""As ResNet-50 has."""
REPEATS = 400


class NoLaunch:
    """Stands for a kernel, and for a compiled one: launching it does nothing."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, grid):
        return self._run

    def _run(self, *args, **options):
        return self


class NoOperations:
    """Stands for ``torch`` in the native backend, whose operations do nothing."""

    def __init__(self):
        total = torch.ones(1, dtype=torch.float64)
        names = ("reduce", "ascend_", "update_", "restore_")
        nothing = {n: types.SimpleNamespace(default=lambda *args: total) for n in names}
        self.ops = types.SimpleNamespace(fused_sam=types.SimpleNamespace(**nothing))

    def __getattr__(self, name):
        return getattr(torch, name)


def without_launches(base=torch.optim.SGD, parameters=PARAMETERS, backend="triton", **options):
    """A FusedSAM whose kernels are not launched, and gradients for its two passes."""
    backends._no_triton = lambda device: None
    for name in ("reduce_kernel", "ascend_kernel", "update_kernel", "restore_kernel"):
        kernel = getattr(triton.kernels, name)
        setattr(triton.kernels, name, NoLaunch(kernel.fn))
    native.torch = NoOperations()
    params = [torch.nn.Parameter(torch.randn(4, 5, 3)) for _ in range(parameters)]
    opt = FusedSAM(params, base, backend=backend, **options)
    return opt, params, [[torch.randn(4, 5, 3) for _ in params] for _ in range(2)]


def one_step(opt, params, gradients, zero_grad):
    """Seconds in first_step() and second_step(), gradients being there beforehand."""
    spent = 0.0
    for method, grads in zip((opt.first_step, opt.second_step), gradients, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        start = time.perf_counter()
        method(zero_grad=zero_grad)
        spent += time.perf_counter() - start
    return spent


_SGD = torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
_ADAMW = torch.optim.AdamW, {"lr": 1e-3}
CASES = {
    (backend, name): case
    for backend in ("triton", "native")
    for name, case in (("SGD, momentum", _SGD), ("AdamW", _ADAMW))
}


def main():
    """Measure and profile every case."""
    results = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    for (backend, name), (base, options) in CASES.items():
        opt, params, gradients = without_launches(base, backend=backend, **options)
        for zero_grad in (False, True):
            times = []
            gc.collect()
            gc.disable()
            for _ in range(REPEATS):
                times.append(1e6 * one_step(opt, params, gradients, zero_grad))
            gc.enable()
            low, median, high = (statistics.quantiles(times[50:], n=10)[i] for i in (1, 4, 7))
            what = f"{backend}, {name}, {PARAMETERS} parameters, zero_grad={zero_grad}"
            print(f"{what}: {median:.0f} us (p20 {low:.0f}, p80 {high:.0f}, min {min(times):.0f})")
            results[what] = {"median": median, "p20": low, "p80": high, "unit": "us"}
        profile = cProfile.Profile()
        for _ in range(200):
            profile.enable()
            one_step(opt, params, gradients, False)
            profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
