"""The file of results: one line of JSON for each run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent.parent / "results" / "family.jsonl"

Row = dict[str, Any]
Key = tuple[Any, ...]


def key(run: Mapping[str, Any]) -> Key:
    """What tells two runs apart: of a run that is planned, or of a row."""
    names = ("task", "noise", "method", "seed", "epochs")
    return (*(run[name] for name in names), *sorted(run["setting"].items()))


class Rows:
    """The rows of a file, by their keys.

    Raises:
        ValueError: a line is no row; the message says which.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[Key, Row] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self._found[key(row)] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no row, perhaps because its run was stopped while "
                    f"it was written ({error!r}): remove the line"
                ) from error

    def __contains__(self, run: Mapping[str, Any]) -> bool:
        return key(run) in self._found

    def __getitem__(self, run: Mapping[str, Any]) -> Row:
        return self._found[key(run)]

    def add(self, row: Row) -> None:
        """Keep a row, and write it down at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._found[key(row)] = row
