"""How often Triton compiles while an optimizer trains, without a GPU: run as a script, prints JSON.

The real launcher runs, with a driver that names an H100 and loads and starts nothing. So what is
compiled is compiled for it, and whatever Triton specializes on counts as on a GPU.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fused_sam.backends.triton  # noqa: F401  (makes it backends.triton)
from fused_sam import FusedSAM, backends


class Driver:
    """An H100 that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Counter:
    """Counts compilations and launches by the kernel's name."""

    def __init__(self):
        self.compiled, self.launched = [], []
        driver.set_active(Driver())
        self._compile, triton.compiler.compile = triton.compiler.compile, self._on_compile
        compiled = triton.compiler.CompiledKernel
        compiled._init_handles = lambda kernel: None
        compiled.run = property(lambda kernel: lambda *args: self.launched.append(kernel.name))
        compiled.function = None
        compiled.launch_metadata = lambda kernel, grid, stream, *args: None

    def _on_compile(self, source, **options):
        self.compiled.append(source.name)
        return self._compile(source, **options)


def main():
    """Fifty steps in which every hyperparameter changes, with clipping and a loss scale too."""
    counter = Counter()
    backends._no_triton = lambda device: None
    results = {}
    for name, base, options in (
        ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
        ("adamw", torch.optim.AdamW, {"lr": 1e-3}),
    ):
        counter.compiled.clear()
        params = [torch.nn.Parameter(torch.randn(16 * i)) for i in range(1, 20)]
        groups = [{"params": params[:7]}, {"params": params[7:], "weight_decay": 0.1, "lr": 0.2}]
        opt = FusedSAM(groups, base, backend="triton", **options)
        for p in params:
            p.grad = torch.randn_like(p)
        launches = []
        for step in range(50):
            for group in opt.param_groups:
                group["lr"] *= 0.9
                group["rho"] = 0.1 + step / 100
                group["weight_decay"] = step / 1000
                if "momentum" in group:
                    group["momentum"] = 0.5 + step / 200
                else:
                    group["betas"] = (0.5 + step / 200, 0.9 + step / 1000)
            counter.launched.clear()
            if step % 2:  # the backend remembers what Triton compiled; ask Triton again
                launcher = next(iter(opt._facts.engine.buckets[0].cache.values()))
                launcher.compiled.clear()
            opt.first_step()
            opt.second_step()
            launches.append(list(counter.launched))
        results[name] = {"compiled": list(counter.compiled), "launches": launches}
    results["variants"] = list(variants(counter))
    json.dump(results, sys.stdout)


def variants(counter):
    """Updates that differ in what is compiled in: each must compile, once."""
    for base, option in (
        (torch.optim.SGD, "momentum"),
        (torch.optim.Adam, "amsgrad"),
        (torch.optim.RMSprop, "centered"),
    ):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            params = [torch.nn.Parameter(torch.randn(9).to(dtype)) for _ in range(3)]
            groups = [{"params": params[:1], option: 1}, {"params": params[1:]}]
            opt = FusedSAM(groups, base, backend="triton", lr=0.1, adaptive=True)
            opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            counter.compiled.clear()
            counter.launched.clear()
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(10).to(dtype)[1:]
                opt.first_step()
                opt.restore()
                opt.first_step()
                opt.second_step()
            yield {
                "case": f"{base.__name__} {dtype}",
                "compiled": list(counter.compiled),
                "launched": list(counter.launched),
            }


if __name__ == "__main__":
    main()
