"""The page: docs/study.md with its picture, from the rows that are there."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .figure import save
from .methods import LATE, LOOK, METHODS, MOMENTUM
from .rows import Row, Rows
from .summary import Block, Interval, Result, blocks
from .tasks import BATCH_SIZE, TASKS, Task
from .training import DIRECTIONS, DISTANCE, LOOKS, RADIUS, SHARPNESS_IMAGES

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = "study/differences.png"
SGD = METHODS[0].name


def last(row: Row) -> float:
    """Test accuracy after the last epoch, in points."""
    return 100 * row["test"]["last"]["accuracy"]


def best(row: Row) -> float:
    """Test accuracy after the epoch that was best on the validation images, in points."""
    return 100 * row["test"]["best"]["accuracy"]


def write(rows: Rows, docs: Path = DOCS) -> None:
    """Write the page and the picture."""
    found = blocks(rows)
    shown = [block for block in found if len(block.results) > 1]
    picture = docs / PICTURE
    if shown:
        picture.parent.mkdir(exist_ok=True)
        save(picture, [(title(block), block) for block in shown], {"last": last, "best": best})
    (docs / "study.md").write_text(page(found))


def page(found: Sequence[Block]) -> str:
    """The page's text."""
    shown = [block for block in found if len(block.results) > 1]
    parts = [_HEAD, _progress(found)]
    if shown:
        parts.append(_findings(shown))
        parts += [_block(block) for block in shown]
    return "\n".join([*parts, _method()])


def title(block: Block) -> str:
    """Its name in words."""
    kind = "CIFAR-10 images" if block.task.cifar else "digits"
    labels = f"{block.noise:.0%} of the labels flipped" if block.noise else "clean labels"
    return f"{block.task.images:,} {kind}, {labels}".replace("%", " %")


_HEAD = f"""\
# The family on real data

<!-- Written by `python -m examples.family report` from examples/results/family.jsonl. -->

Does it help, and what does it cost? The same network is trained with SGD and with members of SAM's
family. Each has settings of its own, tuned with equally many trials on validation images, and the
same seeds: first weights, training images, flipped labels and the order of batches are the same.
Labels are clean, or 40 % of the training labels are wrong ones. The code is
[examples/family](../examples/family). `python -m examples.family run` goes on where the results
end, `python -m examples.family report` writes this page.

![Differences of test accuracy to SGD]({PICTURE})
"""


def _progress(found: Sequence[Block]) -> str:
    done, total = (sum(counts) for counts in zip(*(block.done() for block in found), strict=True))
    lines = [
        "## How much of it is done",
        "",
        f"{done:,} of {total:,} runs. A method appears below once it has runs to report.",
        "",
        "| data | runs | complete methods |",
        "| --- | ---: | --- |",
    ]
    for block in found:
        complete, (there, runs) = block.complete, block.done()
        names = "all" if len(complete) == len(METHODS) else ", ".join(complete) or "–"
        lines.append(f"| {title(block)} | {there} of {runs} | {names} |")
    return "\n".join([*lines, ""])


_FINDINGS = """\
## What comes out

Test accuracy against SGD's. *Better* and *worse*: the 95 % interval of the paired differences
leaves 0 out. Nothing is corrected for there being many comparisons: of twenty without any
difference one is expected to look like one.

| data | | better | worse | not told apart |
| --- | --- | --- | --- | --- |"""


def _findings(shown: Sequence[Block]) -> str:
    lines = [_FINDINGS]
    for block in shown:
        for name, get in (("last epoch", last), ("best epoch", best)):
            sides: dict[int, list[str]] = {1: [], -1: [], 0: []}
            for result in block.results[1:]:
                gap = result.difference(get)
                sides[gap.sign].append(f"{result.cell.method.name} {gap.mean:+.1f}")
            cells = [", ".join(sides[sign]) or "–" for sign in (1, -1, 0)]
            lines.append(f"| {title(block)} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _block(block: Block) -> str:
    seeds = {len(result.rows) for result in block.results}
    some = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    sgd = block.results[0]
    fit = sgd.mean(lambda row: 100 * row["train"]["accuracy"])
    lines = [
        f"## {title(block)[0].upper()}{title(block)[1:]}",
        "",
        f"{some} of {block.task.seeds} seeds. SGD ends with {_number(fit, 1)} % of the training "
        f"labels read as they are given{', wrong ones among them' * bool(block.noise)}.",
        "",
        "| method | setting | last epoch [%] | to SGD | best epoch [%] | to SGD |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for result in block.results:
        accuracies = [
            text
            for get in (last, best)
            for text in (_number(result.mean(get), 1), _gap(result, get))
        ]
        lines.append(
            f"| {result.cell.method.name} | {_setting(result)} | {' | '.join(accuracies)} |"
        )
    lines += [
        "",
        "| method | loss, last | loss, best | training labels read [%] | sharpness | rise "
        "| passes | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {result.cell.method.name} | {' | '.join(_other(result))} |" for result in block.results
    ]
    return "\n".join([*lines, ""])


def _other(result: Result) -> list[str]:
    columns: list[tuple[Callable[[Row], float | None], int]] = [
        (lambda row: row["test"]["last"]["loss"], 3),
        (lambda row: row["test"]["best"]["loss"], 3),
        (lambda row: 100 * row["train"]["accuracy"], 1),
        (lambda row: row["sharpness"], 3),
        (lambda row: row["rise"], 3),
    ]
    texts = [_number(result.mean(get), digits) for get, digits in columns]
    ratios = [result.ratio(get) for get in (lambda row: row["passes"], _seconds)]
    return [*texts, *[f"{ratio:.2f} ×" for ratio in ratios]]


def _seconds(row: Row) -> float:
    """How long its steps took; on a CPU of one thread its own time, which others do not share."""
    return float(row["cpu_seconds" if row["device"] == "cpu" else "wall_seconds"])


def _gap(result: Result, get: Callable[[Row], float | None]) -> str:
    if result.cell.method.name == SGD:
        return ""
    gap: Interval = result.difference(get)
    bounds = "" if gap.low is None else f" ({gap.low:+.1f} to {gap.high:+.1f})"
    return f"{gap.mean:+.1f}{bounds}"


def _setting(result: Result) -> str:
    task = result.cell.task
    ranges = {"lr": task.lrs, "weight_decay": task.decays, **result.cell.method.tuned}
    return ", ".join(
        f"{name.removeprefix('weight_')} {value:g}{'*' * (value in _ends(ranges[name]))}"
        for name, value in result.setting.items()
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


_METHOD = """\
## How it was done

- **Digits**: scikit-learn's 1,797 images of 8×8 pixels. 1,000 to train on, of which each seed draws
  its own; 300 to validate on, 497 to test on. The network is
  [the demo's](../fused_sam/demo/training.py): three convolutions with BatchNorm, 26 thousand
  weights.
- **CIFAR-10**: each seed draws from the first four batches; of the fifth, 2,000 images to validate
  on and 8,000 to test on. The original test set is not used. A ResNet of 8 layers (widths 16, 32
  and 64; the first convolution halves the image), or on a GPU all 40,000 images with a ResNet-18
  (widths 64 to 512, no halving at first). Not augmented: the network must be able to learn the
  training images by heart.
- **All**: batches of {batch}, momentum {momentum}, a cosine schedule from the learning rate to 0,
  float32. Epochs: {epochs}; twice as many where the method says so.
- **Tuning**, for each method on each of the training sets below: {settings}. A method's own
  settings take turns on these pairs in a Latin square: each of their values meets each learning
  rate once, and each decay. What counts is accuracy on the rightly labelled validation images after
  the last epoch. The seeds are not those that are reported. A * marks a value at the end of its
  range: a better one may lie beyond. The ranges of 100 and 300 digits were widened once, because
  the best settings lay at their ends. By then the test results of the first ranges for 300 digits
  had been seen.
- **Own settings** tried (the first three where there are nine pairs): {own}. Late-phase SAM climbs
  in the last {late} % of the steps, LookSAM in every {look}th step, with its default alpha.
- **Best epoch**: that with the highest validation accuracy of {looks} looked at. The test images
  are read once, after training: with the last weights, and with the best epoch's. Tuning never
  reads them.
- **Training labels read**: the share of the training images whose label, right or wrong, the
  network gives after the last epoch.
- **Sharpness**: the largest rise of the training loss [nats] found within an L2 distance of
  {radius} of the last weights, by projected gradient ascent. **Rise**: its mean rise at {distance}
  filter norms along {directions} random filter-normalised directions, which does without the
  weights' size. Both on {images} training images (all, if they are fewer), with the labels trained
  on.
- **Passes**: forward and backward on a batch, relative to SGD. **Time**: of the training steps,
  relative to SGD: the median of the seeds, on one thread. It is time of the CPU, because the
  machine had other work, which slows a thread down all the same: so it is coarse, and [the family's
  benchmark](family.md#what-a-step-costs) is not. On a GPU it is time by the clock.
- **Intervals** are Student's, of the differences to SGD with the same seed. They tell of other
  seeds: first weights, training images, flips. The test images are the same ones.
"""


def _method() -> str:
    kinds: dict[Any, list[Task]] = {}
    for task in TASKS:
        kinds.setdefault((task.lrs, task.decays, task.finalists), []).append(task)
    text = _METHOD.format(
        batch=BATCH_SIZE,
        momentum=MOMENTUM,
        epochs=", ".join(f"{task.epochs} ({task.name})" for task in TASKS),
        settings="; ".join(
            f"{len(lrs) * len(decays)} settings on {' and '.join(task.name for task in tasks)}, "
            f"learning rates {_list(lrs)}, each with weight decays {_list(decays)}, "
            f"and the best {finalists} again with a second seed"
            for (lrs, decays, finalists), tasks in kinds.items()
        ),
        own="; ".join(
            f"{method.name}: "
            + " and ".join(f"{name} {_list(values)}" for name, values in method.tuned.items())
            for method in METHODS
            if method.tuned
        ),
        late=round(100 * (1 - LATE)),
        look=LOOK,
        looks=LOOKS,
        radius=RADIUS,
        distance=DISTANCE,
        directions=DIRECTIONS,
        images=SHARPNESS_IMAGES,
    )
    return _wrapped(text)


def _wrapped(text: str) -> str:
    """Each item of the list in lines of at most 100 characters."""
    title, items = text.split("\n\n", 1)
    found = [" ".join(item.split()) for item in ("\n" + items).split("\n- ")[1:]]
    lines = [textwrap.fill(f"- {item}", 100, subsequent_indent="  ") for item in found]
    return "\n".join([title, "", *lines, ""])


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
