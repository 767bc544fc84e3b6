"""FusedSAM on a GPU, in parts; bench/gpu.sh runs them all.

    python -m bench.gpu PART OUTPUT_FOLDER

A part writes PART.json. Competitors take turns in every round, after warm-up, on random data; a
row has the median, the 20th and the 80th percentile, in seconds. Times are the device's, by events:
of replayed CUDA graphs, but for eager steps, which are the host's wherever it is the slower one.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_sam import FusedSAM
from fused_sam.graphs import capture

from . import workloads
from .device import DEVICE, DRY
from .family import measure as measure_family
from .launches import ACCESSES, VARIANTS, Work, available, kernels_only, launches, variant
from .machine import conditions, largest_cache
from .models import MODULES
from .peers import BASES, RHO, Peer, as_groups, fused_sam_peers, has, parameters, peers
from .stats import ratio, spread

Rows = Iterator[dict[str, Any]]

# In order of worth: the time may not suffice for all.
SIZES = [25_600_000, 340_000_000, 86_000_000, 11_700_000, 1_000_000_000, 1_000_000]
MODELS = ["ResNet-50", "ViT-B/16", "GPT-2-small", "ResNet-18", "WRN-28-10"]
ROUNDS, AIM = 30, 5e-3
COPIED = 1 << 29
if DRY:
    SIZES, MODELS, ROUNDS, AIM, COPIED = [5000], ["tiny"], 2, 1e-6, 1 << 16


# ---------------------------------------------------------------------------------------- measuring


class Clock:
    """Marks points in the device's time; ``seconds`` waits and returns the times between them."""

    def __init__(self) -> None:
        self.marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        """Mark now."""
        if DRY:
            self.marks.append(time.perf_counter())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        """The times between marks."""
        if DRY:
            return [b - a for a, b in itertools.pairwise(self.marks)]
        self.marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.marks)]


def seconds(work: Work, repeats: int) -> float:
    """Device time of one call, over ``repeats`` calls in a row."""
    clock = Clock()
    for _ in range(repeats):
        work()
    clock.tick()
    return clock.seconds()[0] / repeats


def measure(works: dict[str, Work], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Times of all, round by round; each long enough for the clock."""
    repeats = {}
    for name, work in works.items():
        seconds(work, 3)
        repeats[name] = max(1, min(200, int(AIM / max(seconds(work, 2), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, repeats[name]))
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, by name."""
    return dataclasses.asdict(spread(values))


def captured(works: Sequence[Work]) -> Work:
    """All of ``works``, one after the other, as the replay of one CUDA graph, which holds them."""

    def run() -> None:
        for work in works:
            work()

    if DRY:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        graph.replay()

    replay.works = works  # type: ignore[attr-defined]  # the graph reads their memory
    return replay


def free() -> None:
    """Give memory back that nothing holds."""
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device-to-device copy: the ceiling."""
    source = torch.randn(COPIED, device=DEVICE)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * 4 * COPIED / spread(times).median


# -------------------------------------------------------------------------------------------- parts


def facts() -> Rows:
    """What all figures of a run belong to."""
    found = conditions(DEVICE)
    if not DRY:
        found["l2_bytes"] = largest_cache(DEVICE)
    yield {**found, "backends": available(), "dry": DRY}


def _attempted(rows: Rows, **what: Any) -> Rows:
    """The rows, and if an exception ends them a row that says so: the rest must still run."""
    try:
        yield from rows
    except Exception as error:
        yield {**what, "failed": f"{type(error).__name__}: {error}"[:200]}
    free()


def _rows_of(numel: int, base: str, backend: str, rounds: int, **more: Any) -> Rows:
    """Each kernel's time over ``numel`` elements, and its share of the copy's bandwidth."""
    # Together more than four times what the cache holds, at one access to each element.
    copies = 2 if DRY else 1 + 4 * largest_cache(DEVICE) // (4 * numel)
    needed = 4 * numel * copies * (6 if base == "AdamW" else 5)
    if not DRY and needed > 0.9 * torch.cuda.mem_get_info()[0]:
        yield {"numel": numel, "base": base, "left_out": f"{needed / 1e9:.0f} GB are needed"}
        return
    all_works = launches(numel, base, backend, copies)
    with kernels_only():
        replays = {key: captured(works) for key, works in all_works.items()}
    for kernel, times in measure(replays, rounds).items():
        row = summary([t / copies for t in times])
        rate = ACCESSES[kernel] * 4 * numel / row["median"]
        rates = {"bytes_per_second": rate, "share_of_copy": rate / copy_bandwidth()}
        what = {"backend": backend, "kernel": kernel, "numel": numel, "copies": copies}
        yield {**what, **more, **row, **rates}


def kernels() -> Rows:
    """Each kernel, and the pair of ``first_step``, over sizes."""
    yield {"kernel": "copy", "numel": COPIED, "bytes_per_second": copy_bandwidth()}
    # One backend after the other: what crashes leaves the GPU unusable for all that follows.
    for backend, numel, base in itertools.product(available(), SIZES, BASES):
        rows = _rows_of(numel, base, backend, ROUNDS)
        yield from _attempted(rows, backend=backend, numel=numel, base=base)


def sweep() -> Rows:
    """The Triton kernels under other chunk sizes, programs, threads and tiles."""
    for numel, sizes in itertools.product(SIZES[:2], VARIANTS):
        what = ", ".join(f"{k} {v}" for k, v in sizes.items()) or "as it is"
        with variant(sizes):
            rows = _rows_of(numel, "SGD", "triton", min(ROUNDS, 10), variant=what)
            yield from _attempted(rows, numel=numel, variant=what)


def _step(optimizer: Any) -> None:
    optimizer.first_step()
    optimizer.second_step()


def _workload(name: str) -> workloads.Workload:
    return workloads.split(1000, 5) if DRY else workloads.model(name)


def _work(peer: Peer, model: str, base: str, graph: bool) -> Work:
    """A peer's step over the model's parameters, which has been done once."""
    cls, options = BASES[base]
    options = dict(options)
    if graph and not DRY and base == "AdamW" and peer.family != "FusedSAM":
        options["capturable"] = True
    params = parameters(_workload(model).shapes, DEVICE, seed=1)
    for p in params:
        p.grad = torch.randn_like(p)
    work = functools.partial(_step, peer.make(as_groups(params, 1), cls, options))
    work()
    return captured([work]) if graph else work


def _whole_steps(competitors: Sequence[Peer], *, graph: bool = False) -> Rows:
    """SAM steps without forward and backward, side by side; the first peer is compared with."""
    if not has("pytorch_optimizer"):
        yield {"peer": "pytorch_optimizer SAM", "left_out": "pytorch_optimizer is not installed"}
    for model, base in itertools.product(MODELS, BASES):
        works: dict[str, Work] = {}
        for peer in competitors:
            try:
                works[peer.name] = _work(peer, model, base, graph)
            except Exception as error:  # another's failure must not hide the rest
                why = f"{type(error).__name__}: {error}"[:200]
                yield {"model": model, "base": base, "peer": peer.name, "failed": why}
        results = measure(works)
        for peer_name, times in results.items():
            yield {
                "model": model,
                "base": base,
                "peer": peer_name,
                **summary(times),
                "times_ours": dataclasses.asdict(ratio(times, next(iter(results.values())))),
            }
        del works
        free()


def steps() -> Rows:
    """Steps as Python calls them: of small models, and of many tensors, this is the host's time."""
    yield from _whole_steps(peers(DEVICE))


def graphs() -> Rows:
    """The same steps as CUDA graphs: the GPU's time, whatever the host needs."""
    yield from _whole_steps(peers(DEVICE), graph=True)


def compiled() -> Rows:
    """Against the foreach SAM under torch.compile, which takes long to compile."""
    yield from _whole_steps([*fused_sam_peers(DEVICE), peers(DEVICE, compiled=True)[-1]])


def host() -> Rows:
    """Host time of a step with its launches, while the GPU has nothing else to do."""
    for backend, name, base in itertools.product(available(), MODELS[:2], BASES):
        what = {"model": name, "base": base, "backend": backend}
        yield from _attempted(_host_time(**what), **what)


def _host_time(model: str, base: str, backend: str) -> Rows:
    cls, options = BASES[base]
    params = parameters(_workload(model).shapes, DEVICE, seed=1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = FusedSAM(params, cls, rho=RHO, backend=backend, **options)
    times = []
    for _ in range(ROUNDS + 200 * (not DRY)):
        if not DRY:
            torch.cuda.synchronize()
        start = time.perf_counter()
        _step(optimizer)
        times.append(time.perf_counter() - start)
    row = {"model": model, "tensors": len(params), "base": base, "backend": backend}
    yield {**row, **summary(times[ROUNDS // 2 :])}


def training() -> Rows:
    """A training step with real forward and backward: the optimizer's share of it."""
    name, batch, size = ("ResNet-20", 2, 8) if DRY else ("ResNet-50", 256, 224)
    model = MODULES[name]().to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=DEVICE)

    def backward() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()

    for backend in available() if not DRY else ["native"]:
        options = {"rho": RHO, "lr": 0.1, "momentum": 0.9, "backend": backend}
        opt = FusedSAM(model.parameters(), torch.optim.SGD, **options)
        totals, optimizers = [], []
        for _ in range(ROUNDS):
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
            totals.append(sum(parts))
            optimizers.append(parts[1] + parts[3])
        totals, optimizers = totals[ROUNDS // 4 :], optimizers[ROUNDS // 4 :]
        yield {
            "model": name,
            "batch": batch,
            "backend": backend,
            **summary(totals),
            "optimizer": summary(optimizers),
            "share": dataclasses.asdict(ratio(optimizers, totals)),
        }


def family() -> Rows:
    """A whole training step of each member of SAM's family, relative to SGD's."""
    name, batch, size = ("ResNet-20", 2, 8) if DRY else ("ResNet-18", 256, 224)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=DEVICE)

    def make() -> torch.nn.Module:
        return MODULES[name]().to(DEVICE, memory_format=torch.channels_last)

    rows = measure_family(make, x, y, min(ROUNDS, 12))
    for row in rows:
        what = {"model": name, "batch": batch, "member": row["name"], "passes": row["passes"]}
        relative = dataclasses.asdict(ratio(row["wall"], rows[0]["wall"]))
        yield {**what, **summary(row["wall"]), "times_sgd": relative}


def _training_step(model: torch.nn.Module, optimizer: Any, x: Any, y: Any) -> None:
    for half in (optimizer.first_step, optimizer.second_step):
        for p in model.parameters():
            p.grad = None
        torch.nn.functional.cross_entropy(model(x), y).backward()
        half()


def training_graphs() -> Rows:
    """Training steps of a small network, forward and backward too: eager, and as CUDA graphs."""
    name, batch = "ResNet-20", 2 if DRY else 128
    x, y = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)
    cls, options = BASES["SGD"]
    works: dict[str, Work] = {}
    for peer in (*fused_sam_peers(DEVICE), peers(DEVICE, compiled=not DRY)[-1]):
        torch.manual_seed(0)
        model = MODULES[name]().to(DEVICE)
        optimizer = peer.make([{"params": list(model.parameters())}], cls, dict(options))
        work = functools.partial(_training_step, model, optimizer, x, y)
        works[peer.name] = work
        ours = isinstance(optimizer, FusedSAM)
        in_a_graph = f"{peer.name}, {'captured' if ours else 'in a graph'}"
        try:
            if not ours:  # its passes draw no random numbers, and move the running statistics twice
                works[in_a_graph] = captured([work])
            elif not DRY:
                step = capture(model, _loss, optimizer, (x, y))
                works[in_a_graph] = functools.partial(step, (x, y))
        except Exception as error:  # another's failure must not hide the rest
            # Of the reference it is none: torch computes with numbers of the host there.
            key = "left_out" if ours and optimizer.backend == "reference" else "failed"
            why = f"{type(error).__name__}: {error}"[:200]
            yield {"model": name, "batch": batch, "peer": in_a_graph, key: why}
    results = measure(works)
    first = next(iter(results.values()))
    for what, times in results.items():
        relative = dataclasses.asdict(ratio(times, first))
        yield {
            "model": name,
            "batch": batch,
            "peer": what,
            **summary(times),
            "times_first": relative,
        }


def _loss(model: torch.nn.Module, batch: tuple[Any, Any]) -> Any:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


_PARTS = (facts, kernels, steps, host, training, family, graphs, training_graphs, compiled, sweep)
PARTS = {part.__name__: part for part in _PARTS}


def main(name: str, folder: str) -> int:
    """Run a part; its file is written after every row, so that whoever is stopped leaves some.

    Returns the exit status: 1 if something of FusedSAM failed, but not for a peer.
    """
    rows: list[dict[str, Any]] = []
    for row in PARTS[name]():
        print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
        Path(folder, f"{name}.json").write_text(json.dumps({"rows": rows}, indent=1))
    return int(any("failed" in row and "FusedSAM" in row.get("peer", "FusedSAM") for row in rows))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
