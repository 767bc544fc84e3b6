"""From results to docs/: tables, plots, the losses with their reasons, and README's section.

python -m bench.report bench/results/cpu.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .losses import Loss, describe, losses
from .machine import ROOT
from .measure import COPY
from .results import entries, load
from .stats import Spread, ratio, spread

DOCS = ROOT / "docs"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"

Records = Mapping[str, dict[str, Any]]


def write(path: Path) -> None:
    """Write docs/benchmarks.md (on a GPU: benchmarks-cuda.md), its plots and README's section."""
    results = load(path)
    device = results["machine_info"]["device"]
    suffix = "" if device == "cpu" else f"-{device}"
    images = DOCS / "benchmarks"
    images.mkdir(parents=True, exist_ok=True)
    _draw(results, images, suffix)
    text = page(results, suffix, path)
    (DOCS / f"benchmarks{suffix}.md").write_text(text)
    if device == "cpu":
        write_section(ROOT / "README.md", section(results))
    print(f"wrote docs/benchmarks{suffix}.md, docs/benchmarks/*{suffix}.png and README.md")


def write_quick(path: Path, target: Path) -> None:
    """The tables alone, for a run whose figures are not to be published."""
    target.write_text(page(load(path), "", path, plots=False))
    print(f"wrote {target}")


def write_section(readme: Path, text: str) -> None:
    """Put ``text`` between README's markers, which come before "Limitations" at first."""
    old = readme.read_text()
    block = f"{BEGIN}\n{text}{END}\n"
    if BEGIN in old:
        before, rest = old.split(BEGIN, 1)
        new = before + block + rest.split(END, 1)[1].removeprefix("\n")
    else:
        before, rest = old.split("## Limitations", 1)
        new = f"{before}{block}\n## Limitations{rest}"
    readme.write_text(new)


# ------------------------------------------------------------------------------------------- picks


def ours(record: dict[str, Any]) -> str:
    """The FusedSAM whose backend ``"auto"`` takes."""
    return next(iter(record["families"]))


def best(record: dict[str, Any], family: str) -> str | None:
    """The fastest form of a family in this case."""
    names = [name for name, found in record["families"].items() if found == family]
    return min(names, key=lambda n: spread(record["seconds"][n]).median, default=None)


def share_of_limit(record: dict[str, Any], name: str) -> Spread | None:
    """Time of the traffic budget at copy speed, over time taken, round by round, in per cent."""
    if COPY not in record["seconds"] or name not in record["seconds"]:
        return None
    traffic = record["budget"] * 4 * record["numel"] / record["copy_bytes"]
    found = ratio(record["seconds"][COPY], record["seconds"][name])
    return found.times(100 * traffic)


def _models(records: Records) -> list[dict[str, Any]]:
    return [record for name, record in records.items() if name.startswith("test_model[")]


def _main_models(records: Records, base: str = "SGD") -> list[dict[str, Any]]:
    """One record for each model: warm, with the machine's threads."""
    found: dict[str, dict[str, Any]] = {}
    for record in _models(records):
        if record["base"] == base and record["cache"] == "warm":
            old = found.get(record["workload"])
            if old is None or record["threads"] > old["threads"]:
                found[record["workload"]] = record
    return list(found.values())


def _sweep(records: Records, test: str, key: str) -> list[dict[str, Any]]:
    found = [record for name, record in records.items() if name.startswith(f"{test}[")]
    return sorted(found, key=lambda record: record[key])


# ------------------------------------------------------------------------------------------- plots


FAMILIES = ("textbook SAM", "pytorch_optimizer SAM", "foreach SAM", "compiled foreach SAM")


def _draw(results: dict[str, Any], images: Path, suffix: str) -> None:
    try:
        from . import plots
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    records = entries(results, "record")
    machine = _hardware(results["machine_info"])
    main = [record for record in _main_models(records) if record["tensors"] > 1]
    names = [_short(record) for record in main]
    bars = {
        "textbook SAM, default": [plots.relative(r, "textbook SAM, default") for r in main],
        **{
            f"{family}, fastest form": [plots.relative(r, best(r, family)) for r in main]
            for family in FAMILIES
            if any(best(r, family) for r in main)
        },
    }
    title = f"SAM step with SGD, median and p20 to p80 of paired ratios, {machine}"
    plots.save_ratios(images / f"models{suffix}.png", names, bars, title)
    large = [r for r in main if COPY in r["seconds"]]
    if large:
        limit = {
            "FusedSAM": [share_of_limit(r, ours(r)) for r in large],
            **{
                f"{family}, fastest form": [share_of_limit(r, best(r, family) or "") for r in large]
                for family in FAMILIES[:3]
            },
        }
        title = f"SAM step with SGD as a share of its memory limit, {machine}"
        plots.save_limit(images / f"limit{suffix}.png", [_short(r) for r in large], limit, title)
    sweeps = {
        "tensors": _sweep(records, "test_tensors", "tensors"),
        "numel": _sweep(records, "test_size", "numel"),
        "groups": _sweep(records, "test_groups", "groups"),
    }
    if all(sweeps.values()):
        plots.save_sweeps(images / f"sweeps{suffix}.png", sweeps, machine)


# --------------------------------------------------------------------------------------------- page


def page(results: dict[str, Any], suffix: str, path: Path, *, plots: bool = True) -> str:
    """The report."""
    info, records = results["machine_info"], entries(results, "record")
    image = (
        (lambda name, alt: [f"![{alt}](benchmarks/{name}{suffix}.png)", ""])
        if plots
        else (lambda name, alt: [])
    )
    found = list(losses(records))
    lines = ["# Benchmarks", "", *_conditions(info, path), "", *_METHOD, ""]
    lines += ["## Models", "", *image("models", "step time of the peers in units of FusedSAM's")]
    lines += [*_model_table(_main_models(records)), "", _FRESH_MEMORY, ""]
    lines += image("limit", "share of the memory limit")
    lines += ["## Where FusedSAM loses", "", _LOSSES, "", *_loss_lines(found), ""]
    lines += ["## Growth", "", *image("sweeps", "cost against tensors, parameters and groups")]
    lines += [*_growth(records), ""]
    lines += ["## Calls, memory, host time, first step", "", *_costs(results), ""]
    lines += ["## Training", "", *_training(results), ""]
    lines += ["## Models, groups and host time, case by case", ""]
    for record in [r for n, r in records.items() if not n.startswith(("test_size", "test_t"))]:
        lines += [f"### {describe(record)}", "", *_case(record), ""]
    return "\n".join(lines).rstrip() + "\n"


_METHOD = [
    "A time is that of `first_step` and `second_step`, forward and backward left out, with "
    "random gradients. Peers step in turn in one process, in an order that rotates; a ratio is "
    "taken round by round. Figures are medians with the 20th and the 80th percentile in "
    "brackets. Every peer's weights are first compared with FusedSAM's after the climb and after"
    " three steps. *Warm*: each measurement follows a step of the same peer. *Cold*: it follows "
    "a pass over twice the size of the largest cache. The *limit* is the traffic budget (SGD "
    "with momentum: 10 accesses of 4 bytes per parameter; AdamW: 12) at the speed of a copy "
    "between two tensors of 128 MiB, measured in the same rounds; models that fit into the "
    "caches have none. On a CPU it can be passed: a copy is half writing, for which the memory "
    "reads the lines first, and a step is mostly reading; the foreach SAM, which needs one "
    "access less, is measured by the same budget, and on a shared machine the copy's own speed "
    "scatters. The options: SGD with momentum 0.9 and weight decay, AdamW with weight decay, "
    "float32, gradients of all parameters.",
    "",
    "The peers: *textbook SAM*, the loop over the parameters that everybody writes "
    "(`fused_sam/demo/textbook.py`: norm of the norms, clone, add, restore by pointer); "
    "*pytorch_optimizer SAM* from PyPI; *foreach SAM*, written by hand in as few passes as "
    "PyTorch's operations allow (`bench/peers.py`); and that one under "
    "`torch.compile`. The first three with the base optimizer's default, foreach and fused form; "
    "for more than 100 M parameters and in sweeps with the fused one, and the textbook's default.",
]


_LOSSES = (
    "Steps without forward and backward; what each optimizer takes within training stands under "
    "[Training](#training)."
)


_FRESH_MEMORY = (
    "Peers that clone the weights in every step ask for fresh memory; on Linux, a CPU tensor above "
    "32 MiB comes straight from the kernel, page by page, each time, which is most of what they "
    "lose there. FusedSAM and the foreach SAM allocate once."
)


def _conditions(info: dict[str, Any], path: Path) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    shown = path.resolve()
    name = shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else path.name
    return [
        f"Measured {info['date']} at commit `{info['commit']}`; written by `make bench` from "
        f"`{name}`.",
        "",
        f"- hardware: {_hardware(info)}; caches "
        + ", ".join(f"{level} {size}" for level, size in info["caches"].items())
        + f"; memory {info['memory_gib']} GiB",
        f"- software: {info['system']}, Python {info['python']}, {versions}",
        f"- load of the machine before: {info['load_before']}",
    ]


def _hardware(info: dict[str, Any]) -> str:
    threads = info["threads"]
    return info.get("gpu") or f"{info['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def _model_table(records: Sequence[dict[str, Any]]) -> list[str]:
    present = [f for f in FAMILIES if any(best(r, f) for r in records)]
    head = ["model", "tensors", "parameters", "FusedSAM [ms]", "share of the limit"]
    head += ["textbook SAM, default", *(f"{family}, fastest form" for family in present)]
    rows = []
    for record in records:
        limit = share_of_limit(record, ours(record))
        row = [_short(record), f"{record['tensors']}", _millions(record["numel"])]
        row += [_ms(record, ours(record)), "in cache" if limit is None else _percent(limit)]
        row += [_times(record, "textbook SAM, default")]
        row += [_times(record, best(record, family), form=True) for family in present]
        rows.append(row)
    backend = ours(records[0]) if records else "FusedSAM"
    note = f'SGD, warm. {backend} is what `backend="auto"` takes here; ratios are the peer\'s time'
    return [f"{note} over FusedSAM's, so above 1 FusedSAM is faster.", "", *_table(head, rows)]


def _case(record: dict[str, Any]) -> list[str]:
    limits = COPY in record["seconds"]
    head = ["peer", "step [ms]", "times FusedSAM's"]
    head += ["share of the limit", "GB/s of the budget"] if limits else []
    head += ["first step [ms]"]
    rows = []
    for name in record["families"]:
        row = [name, _ms(record, name), _times(record, name)]
        if limits:
            share = share_of_limit(record, name)
            assert share is not None
            traffic = 4e-9 * record["budget"] * record["numel"]
            rate = traffic / spread(record["seconds"][name]).median
            row += [_percent(share), f"{rate:.1f}"]
        first = record["first"][name]
        row += [f"{1e3 * first:.1f}" if first < 10 else f"{1e3 * first:.0f}"]
        rows.append(row)
    lines = _table(head, rows)
    if limits:
        rate = record["copy_bytes"] / spread(record["seconds"][COPY]).median / 1e9
        lines += ["", f"Copy: {rate:.1f} GB/s, read and written."]
    if record["norm_error"] > 1e-4:
        lines += [
            "",
            f"torch's float32 norm of these gradients is {100 * record['norm_error']:.2f} % wrong, "
            "and so is the climb of every implementation that takes it from torch; but for that "
            "the trajectories are equal.",
        ]
    lines += [f"- not run: {name}: {why}" for name, why in record["skipped"].items()]
    lines += ["", f"{len(record['seconds'][ours(record)])} rounds of {record['inner']}."]
    return lines


def _loss_lines(found: Sequence[Loss]) -> list[str]:
    if not found:
        return ["In no case of this run was any peer's median below FusedSAM's."]
    certain = [loss for loss in found if loss.certain]
    unsure = [loss for loss in found if not loss.certain]
    lines = []
    titles = "Faster beyond chance (sign test over the rounds, 1 %)", "Faster in the median alone"
    for title, group in zip(titles, (certain, unsure), strict=True):
        by_reason: dict[str, list[Loss]] = {}
        for loss in group:
            by_reason.setdefault(loss.reason, []).append(loss)
        for reason, some in by_reason.items():
            lines += [f"{title}; why: {reason}.", ""]
            rows = [[loss.case, loss.peer, _spread(loss.factor, 2)] for loss in some]
            lines += [*_table(["case", "faster peer", "its time over FusedSAM's"], rows), ""]
    return lines[:-1]


def _growth(records: Records) -> list[str]:
    lines: list[str] = []
    for test, key, title in (
        ("test_tensors", "tensors", "tensors"),
        ("test_size", "numel", "parameters, in one tensor"),
        ("test_groups", "groups", "groups (256 tensors)"),
    ):
        found = _sweep(records, test, key)
        if not found:
            continue
        names = list(dict.fromkeys(name for record in found for name in record["families"]))
        rows = [
            [f"{r[key]:,}", *(_ms(r, n) if n in r["seconds"] else "–" for n in names)]
            for r in found
        ]
        lines += [*_table([title, *(f"{name} [ms]" for name in names)], rows), ""]
        if key == "tensors" and len(found) > 1:
            low, high = found[0], found[-1]
            costs = {
                n: (spread(high["seconds"][n]).median - spread(low["seconds"][n]).median)
                / (high["tensors"] - low["tensors"])
                for n in names
            }
            text = ", ".join(f"{n} {1e6 * cost:.2f} µs" for n, cost in costs.items())
            lines += [f"Cost of one more tensor, from first to last row: {text}.", ""]
        if key == "numel" and len(found) > 1:
            text = ", ".join(
                f"{r['numel']:,}: {1e9 * spread(r['seconds'][ours(r)]).median / r['numel']:.2f} ns"
                for r in found
            )
            lines += [f"FusedSAM's cost per parameter: {text}.", ""]
    return lines[:-1]


def _costs(results: dict[str, Any]) -> list[str]:
    records, lines = entries(results, "record"), []
    host = next((r for n, r in records.items() if n.startswith("test_host_time")), None)
    for found in entries(results, "costs").values():
        weights = 4 * found["numel"]
        head = ["peer", "operator calls", "extra memory [MB]", "of the weights"]
        launches = any(cost["launches"] for cost in found["peers"].values())
        head += ["kernel launches"] if launches else []
        rows = []
        for name, cost in found["peers"].items():
            row = [name, f"{cost['calls']}", f"{cost['extra_bytes'] / 1e6:.1f}"]
            row += [f"{cost['extra_bytes'] / weights:.2f} ×"]
            rows.append(row + ([f"{cost['launches']}"] if launches else []))
        lines += [
            f"{found['workload']}, {found['base']}, one step. Extra memory: the highest point "
            "above parameters, gradients and the base optimizer's state.",
            "",
            *_table(head, rows),
            "",
        ]
    if host:
        rows = [[n, _us(host, n), _times(host, n)] for n in host["families"]]
        head = ["peer", "host time [µs]", "times FusedSAM's"]
        lines += [
            "Host time: ResNet-50's 161 tensors with one number each, so that nothing is left but "
            "the host's work.",
            "",
            *_table(head, rows),
            "",
        ]
    compiled = [r for r in records.values() if "compiled foreach SAM" in r["families"]]
    if compiled:
        rows = [
            [
                describe(r),
                str(r["tensors"]),
                f"{r['first']['compiled foreach SAM']:.1f}",
                f"{r['first'][ours(r)] + r['construction'][ours(r)]:.3f}",
            ]
            for r in compiled
        ]
        head = [
            "case",
            "tensors",
            "compiled foreach SAM [s]",
            "FusedSAM, construction included [s]",
        ]
        lines += [
            "First step, compilation included. The cases ran in one process in the order of the "
            "table, the compiler's caches being empty before the first, which pays for starting "
            "the compiler too. So that the whole run keeps within its time, it is not run for "
            "every model.",
            "",
            *_table(head, rows),
            "",
        ]
    return lines[:-1]


def _training(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for found in entries(results, "training_step").values():
        first = next(iter(found["whole"]))
        rows = []
        for name, whole in found["whole"].items():
            share = ratio(found["optimizer"][name], whole).times(100)
            row = [name, _spread(spread(whole).times(1e3), 1)]
            row += [_spread(spread(found["optimizer"][name]).times(1e3), 2), _spread(share, 1)]
            rows.append([*row, _spread(ratio(whole, found["whole"][first]), 2)])
        pixels = found["pixels"]
        head = ["peer", "whole step [ms]", "optimizer [ms]", "share [%]", "whole, times FusedSAM's"]
        lines += [
            f"A whole training step on {found['network']}, batch {found['batch']} of "
            f"{pixels}×{pixels} pixels, SGD: forward and backward twice, and the optimizer.",
            "",
            *_table(head, rows),
            "",
        ]
    for found in entries(results, "end_to_end").values():
        name = "the demo's network" if found["network"] == "demo" else found["network"]
        rows = [
            [
                peer,
                f"{100 * got['exact_accuracy']:.2f}",
                f"{got['exact_distance']:.0e}",
                f"{100 * got['accuracy']:.1f}",
                f"{got['seconds']:.2f}",
                f"{got['optimizer']:.3f}",
                f"{100 * got['optimizer'] / got['seconds']:.1f}",
            ]
            for peer, got in found["peers"].items()
        ]
        head = ["peer", "accuracy, float64 [%]", "largest difference", "accuracy, float32 [%]"]
        head += ["wall time [s]", "optimizer [s]", "share [%]"]
        lines += [
            f"End to end: {name} on handwritten digits, one thread, "
            "every batch with all peers in turn. In float64, "
            f"{found['exact_epochs']} epoch{'s' if found['exact_epochs'] > 1 else ''}: test "
            "accuracy, and the largest difference of any weight from FusedSAM's at the end; the "
            "trajectories are equal, but that pytorch_optimizer adds its norm up in float32 in any "
            f"case. In float32, {found['epochs']} epochs, the times; there "
            "rounding differs between peers and early training amplifies it, so that accuracies "
            "scatter as they do between seeds.",
            "",
            *_table(head, rows),
            "",
        ]
    return lines[:-1]


# ----------------------------------------------------------------------------------------- README


def section(results: dict[str, Any]) -> str:
    """README's performance section: one plot, one table, the conditions, the losses."""
    info, records = results["machine_info"], entries(results, "record")
    main = [record for record in _main_models(records) if record["tensors"] > 1]
    lost = [loss for loss in losses(records) if loss.certain]
    lines = [
        "## Performance",
        "",
        f"{_hardware(info)}, float32, SGD with momentum and weight decay, "
        f"torch {info['versions']['torch']}, commit `{info['commit']}`, {info['date'][:10]}: time "
        "of `first_step` and `second_step`, all peers in turn in one run, medians with 20th and "
        "80th percentile.",
        "",
        "![Step time of other implementations in units of FusedSAM's](docs/benchmarks/models.png)",
        "",
        *_model_table(main),
        "",
        *_in_training(results),
    ]
    if lost:
        lines += ["FusedSAM is slower, beyond chance, than", ""]
        by_peer: dict[str, list[Loss]] = {}
        for loss in lost:
            by_peer.setdefault(loss.peer, []).append(loss)
        for peer, some in by_peer.items():
            text = "; ".join(f"{x.case} (it takes {x.factor.median:.2f} ×)" for x in some)
            lines.append(f"- {peer}: {text}")
        lines.append("")
    else:
        lines += ["No peer was faster beyond chance in any case of that run.", ""]
    lines += [
        "How it was measured, every case, memory, operator calls, growth, and why FusedSAM loses "
        "where it does: [docs/benchmarks.md](docs/benchmarks.md). `make bench` does it again.",
        "",
    ]
    return "\n".join(lines)


def _in_training(results: dict[str, Any]) -> list[str]:
    """What is left of the ratios where forward and backward come between the steps."""
    cold = [r for r in _models(entries(results, "record")) if r["cache"] == "cold"]
    text = "; ".join(
        f"{_short(r)} textbook SAM, default {_times(r, 'textbook SAM, default')}, "
        f"{best(r, 'foreach SAM')} {_times(r, best(r, 'foreach SAM'))}"
        for r in cold
    )
    lines = [
        "*Warm*: each step follows another one, and what fits stays in the caches. In training, "
        f"forward and backward come between. With cold caches: {text}.",
        "",
    ]
    for found in entries(results, "training_step").values():
        whole = found["whole"]
        mine = next(iter(whole))
        gain = ratio(whole["textbook SAM, default"], whole[mine])
        share = ratio(found["optimizer"][mine], whole[mine]).times(100)
        lines += [
            f"- Whole training step, {found['network']} on {found['batch']} images of "
            f"{found['pixels']}×{found['pixels']}: {share.median:.1f} % of it is FusedSAM; with "
            f"the textbook SAM, default, it takes {_spread(gain, 2).replace(' ', ' × ', 1)}."
        ]
    return [*lines, ""]


# ------------------------------------------------------------------------------------------ format


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    align = ["---", *(["---:"] * (len(head) - 1))]
    return [f"| {' | '.join(cells)} |" for cells in (head, align, *rows)]


def _short(record: dict[str, Any]) -> str:
    return f"flat {_millions(record['numel'])}" if record["tensors"] == 1 else record["workload"]


def _millions(numel: int) -> str:
    return f"{numel / 1e6:.{2 if numel < 1e6 else 1}f} M"


def _spread(s: Spread, digits: int) -> str:
    return f"{s.median:.{digits}f} ({s.p20:.{digits}f}–{s.p80:.{digits}f})"


def _ms(record: dict[str, Any], name: str) -> str:
    found = spread(record["seconds"][name]).times(1e3)
    return _spread(found, 3 if found.median < 1 else 2 if found.median < 10 else 1)


def _us(record: dict[str, Any], name: str) -> str:
    return _spread(spread(record["seconds"][name]).times(1e6), 0)


def _percent(s: Spread) -> str:
    return _spread(s, 0).replace(" ", " % ", 1)


def _times(record: dict[str, Any], name: str | None, *, form: bool = False) -> str:
    if name is None or name not in record["seconds"]:
        return "–"
    found = ratio(record["seconds"][name], record["seconds"][ours(record)])
    text = _spread(found, 2).replace(" ", " × ", 1)
    return f"{text}, {name.rsplit(', ', 1)[1]}" if form and ", " in name else text


if __name__ == "__main__":
    write(Path(sys.argv[1]))
