"""Run the suites and write the report: ``python -m bench [--quick] [--device cuda]``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report
from .machine import ROOT
from .results import RESULTS, keep, load, tidy

SUITES = ("suite_models", "suite_sweeps", "suite_costs", "suite_training")
"""All that the report shows."""

ALL = (*SUITES, "suite_family")
"""And the one that has a page of its own, docs/family.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns pytest's exit status: a suite that failed fails the run, and the rest is shown."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes, nothing published")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--suite", choices=ALL, action="append", help="only these")
    parser.add_argument("--keep", action="store_true", help="keep the results under the commit too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; see python -m fused_sam.info")
    args.out.mkdir(parents=True, exist_ok=True)
    fresh = args.out / f"{args.device}.new"
    fresh.unlink(missing_ok=True)
    status = _run_suites(args.suite or SUITES, args.device, args.quick, fresh)
    try:
        load(fresh)
    except ValueError:
        print("nothing was measured, and no file was changed")
        return status or 1
    # Only a run of everything that succeeded takes the place of published results.
    whole = status == 0 and not args.quick and not args.suite and args.out == RESULTS
    path = args.out / f"{args.device}{'-quick' if args.quick else '' if whole else '-part'}.json"
    fresh.replace(path)
    tidy(path)
    if not whole:
        report.write_quick(path, path.with_suffix(".md"))
        return status
    if args.keep:
        print(f"kept as {keep(path)}")
    report.write(path)
    return status


def _run_suites(suites: Sequence[str], device: str, quick: bool, path: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    command += [f"bench/{suite}.py" for suite in suites]
    command += [f"--bench-device={device}", *(["--quick"] if quick else [])]
    command += [f"--benchmark-json={path.resolve()}", "--benchmark-columns=median,rounds"]
    command += ["--benchmark-disable-gc", "--benchmark-quiet", "--durations=5"]
    with tempfile.TemporaryDirectory() as cache:  # first steps are to be first steps
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
