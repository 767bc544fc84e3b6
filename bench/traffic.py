"""DRAM bytes of one launch of each kernel, read by ncu, beside the budget.

    python -m bench.traffic FOLDER

Writes FOLDER/traffic.json, and ncu's own traffic.csv. ncu empties the caches before each kernel.
What a kernel leaves in the L2 cache is not written to DRAM while it runs: with this many elements
that is a few percent.
"""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .device import DRY
from .launches import ACCESSES, Work, available, launches
from .peers import BASES

METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written"}
NUMEL = 5000 if DRY else 256_000_000
# The card's clocks are left as they are.
NCU = ["ncu", "--metrics", ",".join(METRICS), "--csv", "--print-units", "base"]
NCU += ["--profile-from-start", "off", "--clock-control", "none"]

Row = dict[str, Any]


def parse(text: str) -> list[Row]:
    """The kernels of ncu's CSV, which has a line for each metric: their names and bytes."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, Row] = {}
    for line in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if line["Metric Name"] in METRICS:
            kernel = kernels.setdefault(line["ID"], {"function": line["Kernel Name"]})
            value = float(line["Metric Value"].replace(",", ""))
            kernel[METRICS[line["Metric Name"]]] = value
    return list(kernels.values())


def beside(launched: list[Row], text: str) -> list[Row]:
    """What was launched, in order, with ncu's bytes.

    Raises:
        ValueError: ncu has not seen exactly these launches; the message has its own words.
    """
    found = parse(text)
    if len(found) != len(launched):
        said = " ".join(line for line in text.splitlines() if line.startswith("=="))
        raise ValueError(f"ncu saw {len(found)} kernels where {len(launched)} ran: {said}")
    return [{**row, **values} for row, values in zip(launched, found, strict=True)]


def launch_each() -> list[Row]:
    """Launch each kernel once between the marks that ncu waits for."""
    done = []
    for backend, base in itertools.product(available(), BASES):
        for kernel, (work,) in launches(NUMEL, base, backend).items():
            if kernel == "reduce, ascend_":
                continue  # two kernels, which are measured singly
            work()  # compiles it, and uploads its tables
            _marked(work)
            budget = ACCESSES[kernel] * 4 * NUMEL
            done.append({"backend": backend, "kernel": kernel, "numel": NUMEL, "budget": budget})
            print(f"{backend} {kernel}", flush=True)
    return done


def _marked(work: Work) -> None:
    if DRY:
        work()
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    work()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main(folder: str, launching: str = "") -> None:
    """Run ncu over this program, which then launches; without a GPU only the latter."""
    result, log = Path(folder, "traffic.json"), Path(folder, "traffic.csv")
    if launching or DRY:
        result.write_text(json.dumps({"rows": launch_each()}, indent=1))
        return
    launch = [sys.executable, "-m", "bench.traffic", folder, "launch"]
    subprocess.run([*NCU, "--log-file", str(log), *launch], check=True)
    rows = beside(json.loads(result.read_text())["rows"], log.read_text())
    result.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
