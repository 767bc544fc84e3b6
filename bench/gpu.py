"""The Triton backend on a GPU, in parts; bench/gpu.sh runs them all.

    python -m bench.gpu PART OUTPUT_FOLDER

A part writes PART.json. Times are GPU times by events, or replays of CUDA graphs where a launch
would take longer than its work; each is measured after warm-up, on random data, in rounds that
take all competitors in turn; medians with 20th and 80th percentiles.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton as triton_package

from fused_sam import FusedSAM
from fused_sam.backends import capture
from fused_sam.backends import triton as backend

from . import workloads
from .models import MODULES
from .peers import BASES, RHO, as_groups, fused_sam_peers, parameters, peers
from .stats import spread

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ROUNDS = 30
SIZES = [1_000_000, 11_700_000, 25_600_000, 86_000_000, 340_000_000, 1_000_000_000]
STEP_MODELS = ["ResNet-18", "ResNet-50", "WRN-28-10", "ViT-B/16", "GPT-2-small"]
BUDGET = {"sq_norm": 1, "perturb_": 4, "update_ SGD": 5, "update_ AdamW": 7}
"""Accesses to each element: the traffic budget of docs/predicted.md."""

Work = Callable[[], Any]


# ---------------------------------------------------------------------------------------- measuring


def seconds(work: Work, repeats: int) -> float:
    """Device time of one call, over ``repeats`` calls in a row."""
    clock = Clock()
    for _ in range(repeats):
        work()
    clock.tick()
    return clock.seconds()[0] / repeats


class Clock:
    """Marks points in the device's time; ``seconds`` waits and returns the times between them."""

    def __init__(self) -> None:
        self.marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        """Mark now."""
        if DEVICE.type == "cpu":
            self.marks.append(time.perf_counter())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        """The times between marks."""
        if DEVICE.type == "cpu":
            return [b - a for a, b in itertools.pairwise(self.marks)]
        self.marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.marks)]


def measure(works: dict[str, Work], rounds: int = ROUNDS, aim: float = 5e-3) -> dict[str, Any]:
    """Times of all, in turn in every round; each long enough for the clock.

    Returns, for each, seconds: median, p20, p80, and every round's.
    """
    repeats = {}
    for name, work in works.items():
        for _ in range(3):
            work()
        repeats[name] = max(1, min(200, int(aim / max(seconds(work, 2), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, repeats[name]))
    return {name: {**summary(values), "all": values} for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, by name."""
    return dataclasses.asdict(spread(values))


def replayed(works: Sequence[Work]) -> Work:
    """All of ``works``, one after the other, as one CUDA graph; warmed up."""
    for work in works:
        work()
    if DEVICE.type == "cpu":
        return lambda: [work() for work in works]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # What is measured is kernels: the graph reads the tables that are there and uploads none. They
    # outlive it.
    capturing, capture.is_capturing = capture.is_capturing, lambda device: False
    try:
        with torch.cuda.graph(graph):
            for work in works:
                work()
    finally:
        capture.is_capturing = capturing
    return graph.replay


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_package.__version__,
        "device": DEVICE.type,
    }
    if DEVICE.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(DEVICE)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = _output(*query)
        facts["l2_bytes"] = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return facts


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


# -------------------------------------------------------------------------------------------- parts


@functools.cache
def copy_bandwidth(numel: int = 1 << 29) -> float:
    """Bytes per second, read and written, of a large device-to-device copy: the ceiling."""
    source = torch.randn(numel, device=DEVICE)
    target = torch.empty_like(source)
    time_of = measure({"copy": lambda: target.copy_(source)}, aim=2e-2)["copy"]["median"]
    return 2 * 4 * numel / time_of


def flat_optimizer(numel: int, base: str, tensors: int = 1) -> tuple[Any, Any, Any]:
    """A FusedSAM over ``numel`` numbers; its bucket, and its gradients as the backend gets them."""
    cls, options = BASES[base]
    shapes = workloads.split(numel, tensors).shapes
    params = parameters(shapes, DEVICE, seed=1)
    for p in params:
        p.grad = torch.randn_like(p)
    opt = FusedSAM(params, cls, rho=RHO, backend="triton", **options)
    opt.first_step()
    opt.second_step()
    (bucket,) = opt._layout.buckets
    return opt, bucket, bucket.gradients()


def kernel_works(numel: int, base: str, copies: int) -> dict[str, list[Work]]:
    """Launches of each kernel over ``copies`` optimizers in turn, more than L2 holds."""
    works: dict[str, list[Work]] = {"sq_norm": [], "perturb_": [], f"update_ {base}": []}
    for _ in range(copies):
        opt, bucket, grads = flat_optimizer(numel, base)
        triton, groups = opt._backends[0], opt.param_groups
        norm = triton.sq_norm(bucket, grads, groups).clone()
        works["sq_norm"].append(functools.partial(triton.sq_norm, bucket, grads, groups))
        works["perturb_"].append(functools.partial(triton.perturb_, bucket, grads, groups, norm))
        works[f"update_ {base}"].append(
            functools.partial(triton.update_, bucket, grads, groups, opt._layout.rule)
        )
        # So that update_ reads `saved`, as it does after perturb_.
        bucket.perturbed = [True] * len(bucket.slots)
    return works


def kernels(sizes: Sequence[int] = SIZES) -> Iterator[dict[str, Any]]:
    """Each kernel's bandwidth and its share of the copy's, over sizes."""
    ceiling = copy_bandwidth()
    for numel in sizes:
        for base in ("SGD", "AdamW"):
            needed = numel * 4 * (6 if base == "AdamW" else 5)
            if DEVICE.type == "cuda" and needed > 0.9 * torch.cuda.mem_get_info()[0]:
                yield {"numel": numel, "base": base, "skipped": f"{needed / 1e9:.0f} GB needed"}
                continue
            copies = max(1, min(16, 300_000_000 // (numel * 16)))
            all_works = kernel_works(numel, base, copies)
            if base == "AdamW":
                del all_works["sq_norm"], all_works["perturb_"]
            graphs = {name: replayed(works) for name, works in all_works.items()}
            for name, result in measure(graphs).items():
                result = {k: v / copies for k, v in result.items() if k != "all"}
                rate = BUDGET[name] * 4 * numel / result["median"]
                yield {
                    "kernel": name,
                    "numel": numel,
                    **result,
                    "bytes_per_second": rate,
                    "share_of_copy": rate / ceiling,
                }
            del all_works, graphs
            _free()


def sweep(sizes: Sequence[int] = (25_600_000, 340_000_000)) -> Iterator[dict[str, Any]]:
    """The update and climb under other chunk sizes, programs, threads and tiles."""
    default = {name: getattr(backend, name) for name in ("CHUNK", "PROGRAMS", "THREADS")}
    tiles = dict(backend.TILE_BYTES)
    variants = [
        {},
        *({"CHUNK": chunk} for chunk in (2048, 8192, 16384)),
        *({"PROGRAMS": programs} for programs in (4, 6, 12, 16)),
        {"THREADS": 256, "tile": 2, "PROGRAMS": 4},
        {"THREADS": 512, "tile": 4, "PROGRAMS": 2},
        {"tile": 2},
    ]
    for numel in sizes:
        for variant in variants:
            for name, value in default.items():
                setattr(backend, name, variant.get(name, value))
            for name, value in tiles.items():
                backend.TILE_BYTES[name] = value * variant.get("tile", 1)
            try:
                works = kernel_works(numel, "SGD", 1)
                results = measure({k: replayed(v) for k, v in works.items()}, rounds=10)
            finally:
                for name, value in default.items():
                    setattr(backend, name, value)
                backend.TILE_BYTES.update(tiles)
            for name, result in results.items():
                rate = BUDGET[name] * 4 * numel / result["median"]
                yield {
                    "kernel": name,
                    "numel": numel,
                    "variant": variant or "default",
                    "median": result["median"],
                    "share_of_copy": rate / copy_bandwidth(),
                }
            del works
            _free()


def _step(optimizer: Any) -> None:
    optimizer.first_step()
    optimizer.second_step()


def steps(models: Sequence[str] = STEP_MODELS, compiled: bool = False) -> Iterator[dict[str, Any]]:
    """Whole SAM steps without forward and backward, against the peers, side by side."""
    for name in models:
        workload = workloads.model(name)
        for base, (cls, options) in BASES.items():
            found = peers(DEVICE)
            if compiled:
                found = [*fused_sam_peers(DEVICE), peers(DEVICE, compiled=True)[-1]]
            works: dict[str, Work] = {}
            failed, memory = {}, {}
            for peer in found:
                before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
                try:
                    params = parameters(workload.shapes, DEVICE, seed=1)
                    for p in params:
                        p.grad = torch.randn_like(p)
                    optimizer = peer.make(as_groups(params, 1), cls, dict(options))
                    work = functools.partial(_step, optimizer)
                    work()
                except Exception as error:  # another's failure must not hide the rest
                    failed[peer.name] = repr(error)[:200]
                    continue
                works[peer.name] = work
                if DEVICE.type == "cuda":
                    memory[peer.name] = torch.cuda.memory_allocated() - before
            results = measure(works)
            ours = next(iter(works))
            for peer_name, result in results.items():
                pairs = zip(result["all"], results[ours]["all"], strict=True)
                yield {
                    "model": name,
                    "base": base,
                    "peer": peer_name,
                    **summary(result["all"]),
                    "times_ours": statistics.median(theirs / own for theirs, own in pairs),
                    "bytes": memory.get(peer_name),
                }
            for peer_name, error in failed.items():
                yield {"model": name, "base": base, "peer": peer_name, "failed": error}
            del works, optimizer, params
            _free()


def compiled_steps() -> Iterator[dict[str, Any]]:
    """Against the foreach SAM under torch.compile, which takes long to compile."""
    yield from steps(["ResNet-18", "ResNet-50"], compiled=True)


def host() -> Iterator[dict[str, Any]]:
    """Host time of first_step and second_step with their launches, the GPU idle before."""
    for name in ("ResNet-18", "ResNet-50", "ViT-B/16"):
        for base, (cls, options) in BASES.items():
            params = parameters(workloads.model(name).shapes, DEVICE, seed=1)
            opt = FusedSAM(params, cls, rho=RHO, backend="triton", **options)
            times = []
            for _ in range(200):
                for p in params:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                _step(opt)
                times.append(time.perf_counter() - start)
            yield {"model": name, "base": base, **summary(times[50:])}


def training(batch: int = 256, size: int = 224) -> Iterator[dict[str, Any]]:
    """A training step of ResNet-50 with real forward and backward: the optimizer's share."""
    model = MODULES["ResNet-50"]().to(DEVICE, memory_format=torch.channels_last)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(1000, (batch,), device=DEVICE)

    def backward() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()

    totals, optimizers = [], []
    for i in range(25):
        clock = Clock()
        backward()
        clock.tick()
        opt.first_step(zero_grad=True)
        clock.tick()
        backward()
        clock.tick()
        opt.second_step(zero_grad=True)
        clock.tick()
        parts = clock.seconds()
        if i >= 5:
            totals.append(sum(parts))
            optimizers.append(parts[1] + parts[3])
    share = [part / total for part, total in zip(optimizers, totals, strict=True)]
    yield {
        "model": "ResNet-50",
        "batch": batch,
        "step": summary(totals)["median"],
        "optimizer": summary(optimizers)["median"],
        "share": summary(share),
    }


def copy() -> Iterator[dict[str, Any]]:
    """The copy bandwidth alone."""
    yield {"bytes_per_second": copy_bandwidth()}


PARTS = {
    "copy": copy,
    "kernels": kernels,
    "steps": steps,
    "host": host,
    "training": training,
    "compiled": compiled_steps,
    "sweep": sweep,
}


def _free() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------- report


def run(part: str, folder: Path) -> None:
    """Run a part; what it has found is written after every result."""
    rows: list[dict[str, Any]] = []
    for row in PARTS[part]():
        print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
        path = folder / f"{part}.json"
        path.write_text(json.dumps({"machine": machine(), "results": rows}, indent=1))


def table(folder: Path) -> str:
    """Everything that the parts have written, as Markdown."""
    lines: list[str] = []
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists():
            lines += [f"## {part}", "", "No results.", ""]
            continue
        content = json.loads(path.read_text())
        facts = ", ".join(f"{k} {v}" for k, v in content["machine"].items())
        lines += [f"## {part}", "", facts, ""]
        columns = list(dict.fromkeys(key for row in content["results"] for key in row))
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in content["results"]:
            lines.append("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """See the module's docstring; the part ``table`` prints what the others have written."""
    part, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if part == "table":
        print(table(folder))
    else:
        run(part, folder)


if __name__ == "__main__":
    main()
