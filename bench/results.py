"""Files of results: pytest-benchmark's JSON, with a record of all peers in ``extra_info``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .machine import ROOT

RESULTS = ROOT / "bench" / "results"


def load(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: there is none, or it is something else; the message names it.
    """
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
        if all("extra_info" in test for test in loaded["benchmarks"]) and loaded["machine_info"]:
            return loaded
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no results of the benchmarks: {error!r}") from error
    raise ValueError(f"{path} has results of other benchmarks; these are made by `make bench`")


def entries(results: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """What tests left under ``extra_info[kind]``, by the tests' names."""
    return {
        test["name"]: test["extra_info"][kind]
        for test in results["benchmarks"]
        if kind in test["extra_info"]
    }


def tidy(path: Path) -> None:
    """Write the file in fewer lines."""
    results = load(path)
    for test in results["benchmarks"]:
        test["stats"].pop("data", None)
    text = json.dumps(results, indent=1, sort_keys=True)
    path.write_text(_join_numbers(text) + "\n")


def _join_numbers(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        number = line.strip().rstrip(",")
        closes = number == "]"
        inside = bool(lines) and (lines[-1].endswith("[") or lines[-1].endswith(" "))
        if inside and (_is_number(number) or closes):
            lines[-1] = lines[-1].rstrip() + line.strip() + (" " if not closes else "")
        else:
            lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def keep(path: Path) -> Path:
    """Copy the results to where they stay, under the commit that was measured."""
    info = load(path)["machine_info"]
    target = RESULTS / "commits" / f"{info['commit'].rstrip('+')}-{path.name}"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    return target
