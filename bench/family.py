"""A whole training step of each member of SAM's family, against SGD's on the same network.

python -m bench.family bench/results/family.json     writes the section of docs/family.md
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM, FriendlySAM
from fused_sam.blends import GSAM, LookSAM
from fused_sam.schedule import Every, From

from .machine import ROOT
from .measure import timed
from .peers import BASES
from .report import write_section
from .results import entries, load
from .stats import ratio, spread

K = 5
"""Steps of a round: a whole period of the members that climb in every fifth."""
NEVER = 10**9


@dataclass(frozen=True)
class Member:
    """A row of the table.

    Attributes:
        name: what it is called.
        passes: forward and backward in a step, on average.
        options: FusedSAM's; None is SGD in torch's fastest form.
    """

    name: str
    passes: float
    options: dict[str, Any] | None


MEMBERS = (
    Member("SGD", 1, None),
    Member("MSAM", 1, {"ascent": MSAM(), "rho": 1.0}),
    Member("late-phase SAM, before it climbs", 1, {"when": From(NEVER)}),
    Member("late-phase SAM, once it climbs", 2, {"when": From(0)}),
    Member(f"SAM in every {K}th step", 1 + 1 / K, {"when": Every(K)}),
    Member(f"LookSAM, k = {K}", 1 + 1 / K, {"blend": LookSAM(k=K)}),
    Member("SAM", 2, {}),
    Member("ASAM", 2, {"adaptive": True}),
    Member("GSAM", 2, {"blend": GSAM(0.1)}),
    Member("Friendly-SAM", 2, {"ascent": FriendlySAM()}),
)
"""The first is what all others are compared with."""


class Trainee:
    """A network that a member trains, and the seconds of its steps."""

    def __init__(self, member: Member, network: nn.Module) -> None:
        self.member, self.network = member, network
        cls, options = BASES["SGD"]
        if member.options is None:
            self.optimizer: Any = cls(network.parameters(), **options, fused=True)
        else:
            more = {"rho": 0.05, **member.options}
            self.optimizer = FusedSAM(network.parameters(), cls, model=network, **more, **options)
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> float:
        """A step; returns its seconds."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.network(images), labels)
            loss.backward()
            return loss

        return timed(images.device, lambda: self.optimizer.step(closure))


def measure(
    make: Callable[[], nn.Module], images: Tensor, labels: Tensor, rounds: int
) -> list[dict[str, Any]]:
    """K steps of all members in each round, one step of each in turn; after a round to warm up.

    In turn, so that a time when the machine is slower is everybody's.

    Returns:
        For each member its name, passes, and the seconds of a step, on average, in each round.
    """
    trainees = []
    for member in MEMBERS:
        torch.manual_seed(0)
        trainees.append(Trainee(member, make()))
    for number in range((1 + rounds) * K):
        first = number % len(trainees)
        for trainee in trainees[first:] + trainees[:first]:
            trainee.seconds.append(trainee.step(images, labels))
    return [
        {
            "name": t.member.name,
            "passes": t.member.passes,
            "wall": [
                float(f"{sum(t.seconds[i : i + K]) / K:.4g}") for i in range(K, len(t.seconds), K)
            ],
        }
        for t in trainees
    ]


def table(batches: Sequence[dict[str, Any]]) -> list[str]:
    """Each member's step in units of SGD's: medians of the rounds' ratios, p20 and p80."""
    heads = "".join(f" {found['batch']} images |" for found in batches)
    lines = [f"| times SGD's step | passes |{heads}", "| --- | ---: |" + " ---: |" * len(batches)]
    _, *others = zip(*(found["members"] for found in batches), strict=True)  # the first is SGD
    for rows in others:
        pairs = zip(rows, batches, strict=True)
        cells = [ratio(row["wall"], found["members"][0]["wall"]) for row, found in pairs]
        texts = [f"{s.median:.2f} ({s.p20:.2f}–{s.p80:.2f})" for s in cells]
        lines.append(f"| {rows[0]['name']} | {rows[0]['passes']:g} | {' | '.join(texts)} |")
    return lines


def _listed(values: Iterable[object]) -> str:
    return " and ".join(map(str, values))


def page(results: dict[str, Any]) -> str:
    """The section of docs/family.md."""
    info, found = results["machine_info"], entries(results, "family")["test_family"]
    batches, before, after = found["batches"], info["load_before"], found["load_after"]
    walls = [batch["members"][0]["wall"] for batch in batches]
    sizes = _listed(batch["batch"] for batch in batches)
    rounds = _listed(map(len, walls))
    steps = _listed(f"{1e3 * spread(wall).median:.0f}" for wall in walls)
    text = (
        f"{info['cpu']}, {info['threads']} threads, torch {info['versions']['torch']}, commit "
        f"`{info['commit']}`, {info['date'][:10]}: {found['network']} on batches of {sizes} images "
        f"of {found['pixels']}×{found['pixels']}, float32, SGD with momentum and weight decay. "
        f"Whole training steps, forward and backward included, all members in one process, one "
        f"step of each in turn; median of {rounds} rounds of {K} steps, 20th and 80th percentile. "
        f"SGD's step took {steps} ms, in torch's fused form. The smaller the batch, the more an "
        f"optimizer weighs. The machine's load was {before:g} before and {after:g} after: other "
        "work than this is in the spread. `python -m bench --suite suite_family` measures again."
    )
    lines = textwrap.wrap(text, 100)
    return "\n".join(["", *lines, "", *table(batches), ""])


def main(path: str) -> None:
    """Write the section from a file of results."""
    write_section(ROOT / "docs" / "family.md", page(load(Path(path))))


if __name__ == "__main__":
    main(sys.argv[1])
