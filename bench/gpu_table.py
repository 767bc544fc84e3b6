"""What a run of bench/gpu.sh has found, as one page: ``python -m bench.gpu_table FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHARE, RATIO, HOST = 0.95, 1.5, 100e-6
"""The aims: share of the copy's bandwidth, times the best peer, seconds on the host."""
FROM, TENSORS = 25_000_000, 161
"""Parameters from which the first aim counts, and the tensors of the last."""

Row = dict[str, Any]


def page(folder: Path) -> str:
    """Everything in ``folder``, as Markdown."""
    lines = ["# FusedSAM on a GPU", ""]
    facts = _read(folder, "facts")[:1]
    if facts and facts[0]["dry"]:
        lines += ["**A dry run on a CPU: the figures mean nothing.**", ""]
    lines += [_words(row) for row in facts] + [""]
    done = folder / "parts.tsv"
    parts = [line.split("\t") for line in done.read_text().splitlines()] if done.exists() else []
    lines += _table("Parts", ["part", "seconds", "outcome"], parts)
    kernels, host = _read(folder, "kernels"), _read(folder, "host")
    whole = {name: _read(folder, name) for name in ("steps", "graphs", "compiled")}
    lines += _table("Aims", ["aim", "by", "found", ""], _aims(kernels, whole, host))
    lines += _kernels(kernels) + _traffic(_read(folder, "traffic")) + _steps(whole)
    lines += _table(
        "Host time of a step, the GPU idle",
        ["model", "tensors", "base", "backend", "us", "p20 to p80"],
        [[r["model"], r["tensors"], r["base"], r["backend"], *_micro(r)] for r in _measured(host)],
    )
    lines += _table(
        "A training step",
        ["model", "batch", "backend", "ms", "optimizer's share", "p20 to p80"],
        [
            [
                r["model"],
                r["batch"],
                r["backend"],
                f"{1e3 * r['median']:.2f}",
                *_percent(r["share"]),
            ]
            for r in _read(folder, "training")
        ],
    )
    lines += _table(
        "A training step of each member, relative to SGD's",
        ["model", "batch", "member", "passes", "ms", "times SGD's", "p20 to p80"],
        [
            [
                r["model"],
                r["batch"],
                r["member"],
                r["passes"],
                f"{1e3 * r['median']:.2f}",
                f"{r['times_sgd']['median']:.2f}",
                f"{r['times_sgd']['p20']:.2f} to {r['times_sgd']['p80']:.2f}",
            ]
            for r in _read(folder, "family")
        ],
    )
    lines += _table(
        "A training step, and its CUDA graph",
        ["model", "batch", "peer", "ms", "times the first", "p20 to p80"],
        [
            [
                r["model"],
                r["batch"],
                r["peer"],
                f"{1e3 * r['median']:.3f}",
                f"{r['times_first']['median']:.2f}",
                f"{r['times_first']['p20']:.2f} to {r['times_first']['p80']:.2f}",
            ]
            for r in _read(folder, "training_graphs")
        ],
    )
    return "\n".join(lines + _sweep(_measured(_read(folder, "sweep"))))


# ------------------------------------------------------------------------------------------- pieces


def _aims(kernels: list[Row], whole: dict[str, list[Row]], host: list[Row]) -> Iterable[list[Any]]:
    large = [r for r in _measured(kernels) if r["kernel"] != "copy" and r["numel"] >= FROM]
    aim = f"at least {SHARE:.0%} of the copy's bandwidth from {FROM:,} parameters"
    for backend in dict.fromkeys(r["backend"] for r in large):
        worst = min((r for r in large if r["backend"] == backend), key=_share)
        found = f"lowest {_share(worst):.1%}: {worst['kernel']}, {worst['numel']:,}"
        yield [aim, backend, found, _met(_share(worst) >= SHARE)]
    for name, rows in whole.items():
        ours, best = _ours(rows), _best(rows)
        if best:
            key = min(best, key=lambda k: best[k]["times_ours"]["median"])
            ratio = best[key]["times_ours"]["median"]
            found = f"lowest {ratio:.2f}: {' '.join(key)}, {best[key]['peer']}"
            aim = f"at least {RATIO} times as fast as the best peer"
            yield [aim, f"{name}, {ours[key]['peer']}", found, _met(ratio >= RATIO)]
    for row in _measured(host):
        if row["tensors"] == TENSORS:
            aim = f"at most {1e6 * HOST:.0f} us on the host for {TENSORS} tensors"
            found = f"{1e6 * row['median']:.0f} us"
            yield [aim, f"{row['backend']}, {row['base']}", found, _met(row["median"] <= HOST)]


def _kernels(rows: list[Row]) -> list[str]:
    copies = [r for r in rows if r["kernel"] == "copy"] if rows else []
    title = "Kernels: share of the copy's bandwidth"
    title += "".join(f", {r['bytes_per_second'] / 1e12:.3f} TB/s" for r in copies)
    found = [r for r in _measured(rows) if r["kernel"] != "copy"]
    sizes = sorted({r["numel"] for r in found})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for r in found:
        cell = f"{_share(r):.1%} ({1e6 * r['median']:.0f} us)"
        cells.setdefault((r["backend"], r["kernel"]), {})[r["numel"]] = cell
    body = [[*key, *[values.get(n, "") for n in sizes]] for key, values in cells.items()]
    return _table(title, ["backend", "kernel", *[f"{n:,}" for n in sizes]], body) + _left_out(rows)


def _traffic(rows: list[Row]) -> list[str]:
    body = []
    for r in rows:
        if "read" in r and "written" in r:
            megabytes = [f"{r[name] / 1e6:.0f}" for name in ("budget", "read", "written")]
            share = f"{(r['read'] + r['written']) / r['budget']:.3f}"
            body.append([r["backend"], r["kernel"], f"{r['numel']:,}", *megabytes, share])
    columns = ["backend", "kernel", "elements", "budget, MB", "read", "written", "of the budget"]
    return _table("DRAM bytes of one launch", columns, body)


def _steps(whole: dict[str, list[Row]]) -> list[str]:
    """A table for each part and base: peers down, models across."""
    lines = []
    replayed = {(r["model"], r["base"], r["peer"]): r for r in _measured(whole["graphs"])}
    titles = {"steps": "Eager steps", "graphs": "Replayed steps", "compiled": "torch.compile"}
    for name, rows in whole.items():
        cells: dict[str, dict[str, dict[str, str]]] = {}
        for r in _measured(rows):
            gpu = replayed.get((r["model"], r["base"], r["peer"]), r)
            # What takes longer than its kernels waits for the host, and is the host's time.
            host = " host" if r["median"] > 1.2 * gpu["median"] else ""
            ratio = r["times_ours"]
            text = f"{1e3 * r['median']:.3f}{host}, {ratio['median']:.2f} "
            text += f"({ratio['p20']:.2f}-{ratio['p80']:.2f})"
            cells.setdefault(r["base"], {}).setdefault(r["peer"], {})[r["model"]] = text
        for base, peers in cells.items():
            models = list(dict.fromkeys(model for values in peers.values() for model in values))
            body = [[peer, *[v.get(model, "") for model in models]] for peer, v in peers.items()]
            title = f"{titles[name]}, {base}: ms, times the first (p20-p80)"
            lines += _table(title, ["", *models], body)
        lines += _left_out(rows)
    return lines


def _sweep(rows: list[Row]) -> list[str]:
    keys = dict.fromkeys((r["numel"], r["kernel"]) for r in rows)
    cells: dict[str, dict[Any, str]] = {}
    for r in rows:
        cells.setdefault(r["variant"], {})[r["numel"], r["kernel"]] = f"{_share(r):.1%}"
    body = [[name, *[values.get(key, "") for key in keys]] for name, values in cells.items()]
    columns = ["variant", *[f"{kernel}, {numel // 10**6} M" for numel, kernel in keys]]
    return _table("Sweep of the Triton kernels: share of the copy's bandwidth", columns, body)


def _ours(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """The first FusedSAM for each model and base."""
    found: dict[tuple[str, str], Row] = {}
    for r in _measured(rows):
        if r["peer"].startswith("FusedSAM"):
            found.setdefault((r["model"], r["base"]), r)
    return found


def _best(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """The fastest of the others for each model and base."""
    found: dict[tuple[str, str], Row] = {}
    for r in sorted(_measured(rows), key=lambda r: float(r["median"])):
        if not r["peer"].startswith("FusedSAM"):
            found.setdefault((r["model"], r["base"]), r)
    return {key: row for key, row in found.items() if key in _ours(rows)}


# -------------------------------------------------------------------------------------------- words


def _read(folder: Path, name: str) -> list[Row]:
    path = folder / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def _measured(rows: list[Row]) -> list[Row]:
    return [r for r in rows if "median" in r]


def _left_out(rows: list[Row]) -> list[str]:
    """What has no figures, with the reason."""
    found = [r for r in rows if "left_out" in r or "failed" in r]
    return [*[f"- {_words(r)}" for r in found], *([""] if found else [])]


def _words(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items())


def _share(row: Row) -> float:
    return float(row["share_of_copy"])


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def _micro(row: Row) -> list[str]:
    return [f"{1e6 * row['median']:.0f}", f"{1e6 * row['p20']:.0f} to {1e6 * row['p80']:.0f}"]


def _percent(row: Row) -> list[str]:
    return [f"{row['median']:.2%}", f"{row['p20']:.2%} to {row['p80']:.2%}"]


def _table(title: str, columns: list[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A titled table, or nothing where there are no rows."""
    body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    if not body:
        return []
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [f"## {title}", "", *head, *body, ""]


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
