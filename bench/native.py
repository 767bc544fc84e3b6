"""The native backend on a CPU beside the textbook SAM and the limit set by copying.

    python bench/native.py [rounds]

All take turns in one run; printed are medians in ms, the 20th and 80th percentiles of ours, ratios
pair by pair, the share of the copy limit (the traffic budget's passes at the speed of a large
tensor copy), and the peak of memory above parameters, gradients and optimizer state.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from fused_sam import FusedSAM
from fused_sam.backends import native
from fused_sam.demo.textbook import TextbookSAM

SETTINGS = (
    ("SGD", torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=5e-4), 10),
    ("AdamW", torch.optim.AdamW, dict(lr=1e-3), 12),
)


def resnet50():
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in (
                (planes, width, 1, 1),
                (planes, planes, 3, 3),
                (4 * planes, planes, 1, 1),
            ):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * planes, width, 1, 1), (4 * planes,), (4 * planes,)]
            width = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


def resnet20():
    shapes, width = [(16, 3, 3, 3), (16,), (16,)], 16
    for planes in (16, 32, 64):
        for _ in range(3):
            for shape in ((planes, width, 3, 3), (planes, planes, 3, 3)):
                shapes += [shape, shape[:1], shape[:1]]
            width = planes
    return [*shapes, (10, 64), (10,)]


def parameters(shapes):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.05) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 0.01
    return params


def resident(field="VmRSS"):
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def timed(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def compare(name, shapes, rounds):
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    source, target = torch.randn(numel), torch.empty(numel)
    for label, base, options, passes in SETTINGS:
        contestants = {
            form: TextbookSAM(parameters(shapes), base, **options, **extra)
            for form, extra in (
                ("textbook", {}),
                ("textbook foreach", dict(foreach=True)),
                ("textbook fused", dict(fused=True)),
            )
        }
        contestants["native"] = FusedSAM(parameters(shapes), base, backend="native", **options)
        times = {form: [] for form in (*contestants, "copy")}
        for _ in range(rounds + 2):
            for form, opt in contestants.items():
                times[form].append(timed(lambda: (opt.first_step(), opt.second_step())))  # noqa: B023
            times["copy"].append(timed(lambda: target.copy_(source)))
        times = {form: values[2:] for form, values in times.items()}
        ours = sorted(times["native"])
        low, high = ours[len(ours) // 5], ours[-1 - len(ours) // 5]
        # A copy is two passes, and the fastest one is the limit.
        share = passes / 2 * statistics.median(times["copy"]) / statistics.median(ours)
        print(f"{name}, {label}, {torch.get_num_threads()} threads: native", end=" ")
        print(
            f"{statistics.median(ours):.3f} ms ({low:.3f} to {high:.3f}), {share:.2f} of the limit"
        )
        for form in contestants:
            if form != "native":
                pairs = [a / b for a, b in zip(times[form], times["native"], strict=True)]
                print(
                    f"  {form:16} {statistics.median(times[form]):8.3f} ms, "
                    f"{statistics.median(pairs):.2f} x native"
                )


def memory(shapes):
    """Run in a process of its own: the peak is that of the whole process."""
    params = parameters(shapes)
    size = sum(p.numel() * p.element_size() for p in params)
    opt = FusedSAM(params, torch.optim.SGD, backend="native", lr=0.1, momentum=0.9)
    opt.first_step()
    opt.second_step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    for _ in range(3):
        opt.first_step()
        opt.second_step()
    extra = resident("VmHWM") - before
    held = sum(t.numel() * t.element_size() for b in opt._layout.buckets for t in (b.saved,))
    print(
        f"memory: saved weights {held / size:.4f} of the parameters, steps {extra / size:.4f} more"
    )


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    why = native.missing("cpu")
    if why is not None:
        raise SystemExit(f"native: {why}")
    memory(resnet50())
    for threads in (2, 1):
        torch.set_num_threads(threads)
        compare("ResNet-50", resnet50(), rounds)
        compare("ResNet-20", resnet20(), rounds * 20)
