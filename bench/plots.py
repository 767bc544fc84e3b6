"""The report's plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .stats import Spread, ratio, spread

# Colours of Okabe and Ito, told apart by colour-blind readers too; hatches and markers besides.
STYLES: dict[str, tuple[str, str, str]] = {
    # family: colour, hatch, marker
    "FusedSAM": ("#0072B2", "", "o"),
    "FusedSAM reference": ("#56B4E9", "..", "P"),
    "textbook SAM, default": ("#D55E00", "//", "s"),
    "textbook SAM": ("#E69F00", "\\\\", "D"),
    "pytorch_optimizer SAM": ("#CC79A7", "xx", "^"),
    "foreach SAM": ("#009E73", "--", "v"),
    "compiled foreach SAM": ("#000000", "++", "X"),
}

Bars = Mapping[str, Sequence[Spread | None]]
"""For each label a bar for each case."""


def style(label: str) -> tuple[str, str, str]:
    """Colour, hatch and marker of a peer or a family."""
    for key in (label, label.split(",")[0], "FusedSAM" if label.startswith("FusedSAM") else ""):
        if key in STYLES:
            return STYLES[key]
    raise KeyError(label)


def save_ratios(path: Path, cases: Sequence[str], bars: Bars, title: str) -> None:
    """Bars of how many times FusedSAM's time the others take, with a line at 1."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, cases, bars)
    axes.set_ylim(bottom=0)
    colour = STYLES["FusedSAM"][0]
    axes.axhline(1, color=colour, linewidth=1.5, zorder=0.8, label="FusedSAM = 1")
    axes.set(ylabel="step time [times FusedSAM's]", title=title)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=130)


def save_limit(path: Path, cases: Sequence[str], bars: Bars, title: str) -> None:
    """Bars of the share of the limit that is reached, in per cent."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, cases, bars)
    axes.axhline(100, color="0.4", linestyle=":", label="the traffic budget at copy speed")
    axes.set(ylabel="share of the limit [%]", title=title)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=130)


def _draw_bars(axes: Axes, cases: Sequence[str], bars: Bars) -> None:
    width = 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        colour, hatch, _ = style(label)
        shown = [(x, v) for x, v in enumerate(values) if v is not None]
        axes.bar(
            [x + (i - (len(bars) - 1) / 2) * width for x, _ in shown],
            [v.median for _, v in shown],
            width,
            yerr=[[v.median - v.p20 for _, v in shown], [v.p80 - v.median for _, v in shown]],
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
            error_kw={"elinewidth": 1, "ecolor": "0.3"},
            label=label,
        )
    axes.set_xticks(range(len(cases)), cases)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def save_sweeps(path: Path, sweeps: Mapping[str, Sequence[dict[str, Any]]], device: str) -> None:
    """Three panels: cost against number of tensors, of parameters, and of groups.

    Args:
        path: where to.
        sweeps: records of ``"tensors"``, ``"numel"`` and ``"groups"``, by increasing abscissa.
        device: what ran it.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _lines(left, sweeps["tensors"], "tensors", lambda r: 1e3)
    total = f"{sweeps['tensors'][0]['numel']:,} parameters" if sweeps["tensors"] else ""
    left.set(xlabel=f"number of tensors that share {total}", ylabel="step time [ms]")
    left.set_title("Cost against number of tensors")
    _lines(middle, sweeps["numel"], "numel", lambda r: 1e9 / r["numel"])
    middle.set(xlabel="parameters, in one tensor", ylabel="step time per parameter [ns]")
    middle.set_title("Cost per parameter against size")
    _lines(right, sweeps["groups"], "groups", lambda r: 1e3)
    right.set(xlabel="number of parameter groups (256 tensors)", ylabel="step time [ms]")
    right.set_title("Cost against number of groups")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"SAM step with SGD, forward and backward left out, {device}")
    figure.savefig(path, dpi=130)


def _lines(axes: Axes, records: Sequence[dict[str, Any]], key: str, factor: Any) -> None:
    names = list(dict.fromkeys(n for r in records for n in r["families"]))
    for name in names:
        colour, _, marker = style(name)
        shown = [r for r in records if name in r["families"]]
        found = [spread(r["seconds"][name]).times(factor(r)) for r in shown]
        x = [r[key] for r in shown]
        axes.plot(x, [s.median for s in found], color=colour, marker=marker, label=name)
        axes.fill_between(
            x, [s.p20 for s in found], [s.p80 for s in found], color=colour, alpha=0.15
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, digits in ((axes.xaxis, (1.0,)), (axes.yaxis, (1.0, 2.0, 5.0))):
        axis.set_major_locator(LogLocator(subs=digits))
        axis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)


def relative(record: dict[str, Any], name: str | None) -> Spread | None:
    """How many times the first peer's time ``name`` takes, round by round."""
    if name is None or name not in record["seconds"]:
        return None
    return ratio(record["seconds"][name], record["seconds"][next(iter(record["families"]))])
