"""Where a peer is faster than FusedSAM, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .stats import Spread, ratio, surely_less


@dataclass(frozen=True)
class Loss:
    """A case in which a peer took less time; ``factor`` is its time over FusedSAM's."""

    case: str
    peer: str
    factor: Spread
    certain: bool
    reason: str


def losses(records: Mapping[str, dict[str, Any]]) -> Iterator[Loss]:
    """All of them, by the backend that ``"auto"`` takes."""
    for record in records.values():
        ours = next(iter(record["families"]))
        for peer, family in record["families"].items():
            if family == "FusedSAM":
                continue
            times = record["seconds"][peer], record["seconds"][ours]
            factor = ratio(*times)
            if factor.median < 1:
                certain, reason = surely_less(*times), _reason(record, ours, family)
                yield Loss(describe(record), peer, factor, certain, reason)


def describe(record: dict[str, Any]) -> str:
    """The case in words."""
    words = [record["workload"], record["base"]]
    words += ["cold caches"] if record["cache"] == "cold" else []
    words += [f"{record['groups']} groups"] if record["groups"] > 1 else []
    words += [f"{record['threads']} thread" + ("s" if record["threads"] > 1 else "")]
    return ", ".join(words)


def _reason(record: dict[str, Any], ours: str, family: str) -> str:
    small = record["numel"] < 500_000 or record["numel"] / record["tensors"] < 20_000
    parts = []
    if ours.endswith("reference"):
        parts.append(
            "the reference backend is written in PyTorch's own operations, which pass over "
            "memory more often than the traffic budget has it"
        )
    if family == "compiled foreach SAM":
        parts.append(
            "it is the foreach SAM, whose pointers move instead of weights, and the compiler fuses "
            "its passes for exactly these shapes and options; it pays with the first step's time, "
            "which stands below, and again for every new shape"
        )
    elif family == "foreach SAM":
        parts.append(
            "it saves w and returns to it by moving pointers, which is one access per parameter "
            "less than FusedSAM's 10 (AdamW: 12). The price is that every parameter "
            "changes its memory twice in every step, which breaks views of it, CUDA graphs and "
            "whatever else holds an address, and that missing or infinite gradients go wrong; "
            "FusedSAM does not trade that"
        )
    elif family == "textbook SAM" and ours.endswith("reference") and not small:
        parts.append(
            "returning by pointer costs it no pass, so that with a fused base optimizer it has 13 "
            "accesses per parameter, as many as the reference backend, which copies w back"
        )
    if small:
        parts.append(
            "there is little to compute, so that the host's work counts: FusedSAM looks for "
            "changed parameters, groups, states and gradients in every step, which the peer takes "
            "as given"
        )
    return "; ".join(parts) or "no explanation yet: it must be looked into"
