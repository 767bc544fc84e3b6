"""What became slower: ``python bench/compare.py OLD.json NEW.json``.

Machines drift from run to run, so what is compared is FusedSAM's time divided by that of a
yardstick which ran in turn with it: the textbook's, whose code does not change. A case is slower
if that ratio's median rose by more than ``THRESHOLD`` and the two spreads (p20 to p80) are apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.results import entries, load
from bench.stats import Spread, ratio

YARDSTICK = "textbook SAM, default"
THRESHOLD = 1.05


@dataclass(frozen=True)
class Verdict:
    """One case of one peer in both runs; ``old`` and ``new`` are in units of the yardstick."""

    case: str
    peer: str
    old: Spread
    new: Spread

    @property
    def change(self) -> float:
        """The new median over the old one."""
        return self.new.median / self.old.median

    @property
    def word(self) -> str:
        """Whether it is slower, faster or the same."""
        if self.change > THRESHOLD and self.new.p20 > self.old.p80:
            return "SLOWER"
        if self.change < 1 / THRESHOLD and self.new.p80 < self.old.p20:
            return "faster"
        return "same"


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Verdict]:
    """Every case that both have, for each backend of FusedSAM that both have."""
    before, after = entries(old, "record"), entries(new, "record")
    for case in before.keys() & after.keys():
        times = before[case]["seconds"], after[case]["seconds"]
        for peer in sorted(times[0].keys() & times[1].keys()):
            if peer.startswith("FusedSAM") and all(YARDSTICK in t for t in times):
                yield Verdict(case, peer, *(ratio(t[peer], t[YARDSTICK]) for t in times))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if anything is slower, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(prog="bench/compare.py", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    try:
        old, new = load(args.old), load(args.new)
        found = sorted(verdicts(old, new), key=lambda verdict: -verdict.change)
    except (ValueError, ZeroDivisionError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    for what in ("cpu", "gpu", "threads", "versions"):
        was, now = (r["machine_info"].get(what) for r in (old, new))
        if was != now:
            print(f"note: {what} differs: {was} and {now}")
    for case in sorted(entries(old, "record").keys() - entries(new, "record").keys()):
        print(f"note: only the old file has {case}")
    if not found:
        print("the two files have no case in common")
        return 2
    print(f"time in units of {YARDSTICK}, median (p20 to p80)")
    for v in found:
        print(f"{v.word:7} {v.change:5.2f}x  {v.case}, {v.peer}: {_text(v.old)} -> {_text(v.new)}")
    slower = sum(v.word == "SLOWER" for v in found)
    print(f"{slower} of {len(found)} slower beyond noise")
    return 1 if slower else 0


def _text(s: Spread) -> str:
    return f"{s.median:.3f} ({s.p20:.3f} to {s.p80:.3f})"


if __name__ == "__main__":
    sys.exit(main())
