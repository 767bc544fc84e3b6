"""The picture: differences to SGD, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import Row
from .summary import Block

Gets = Mapping[str, Callable[[Row], float]]

# Colours of Okabe and Ito, told apart by colour-blind readers too.
_STYLES = {
    "last": {"color": "#0072B2", "marker": "o", "offset": -0.14},
    "best": {"color": "#D55E00", "marker": "D", "offset": 0.14},
}
_COLUMNS = 2


def save(path: Path, shown: Sequence[tuple[str, Block]], gets: Gets) -> None:
    """Write a PNG with a panel for each block.

    Args:
        path: where to.
        shown: blocks with their titles.
        gets: what of a row is compared, after the last epoch and after the best one, in points.
    """
    lines = -(-len(shown) // _COLUMNS)
    most = max(len(block.results) for _, block in shown)
    figure = Figure(figsize=(11, lines * (1.2 + 0.36 * most)), layout="constrained")
    panels = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
    for axes, (title, block) in zip(panels, shown, strict=False):
        _draw(axes, block, gets)
        axes.set_title(title)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})


def _draw(axes: Axes, block: Block, gets: Gets) -> None:
    results = block.results[1:]
    for name, get in gets.items():
        style = _STYLES[name]
        gaps = [result.difference(get) for result in results]
        errors = [
            [0.0 if gap.low is None else gap.mean - gap.low for gap in gaps],
            [0.0 if gap.high is None else gap.high - gap.mean for gap in gaps],
        ]
        axes.errorbar(
            [gap.mean for gap in gaps],
            [place + float(style["offset"]) for place in range(len(gaps))],
            xerr=errors,
            fmt=style["marker"],
            color=style["color"],
            capsize=3,
            label=f"{name} epoch",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), [result.cell.method.name for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy less SGD's [points], 95 % interval")
    axes.grid(axis="x", alpha=0.3)
