"""The command line: ``python -m examples.family run`` and ``report``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import fused_sam
from bench.machine import conditions

from . import report
from .plan import cells, missing
from .rows import PATH, Rows
from .tasks import NOISE, TASKS, Task
from .training import train

_STATED = ("cpu", "gpu", "threads", "python", "commit", "versions")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    args = _parse(arguments)
    rows = Rows(args.rows)
    if args.command == "report":
        report.write(rows, args.docs)
    else:
        _run(args, rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.family")
    parser.add_argument("--rows", type=Path, default=PATH, help="the file of results")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that have no row yet")
    run.add_argument("--cifar", type=Path, metavar="FOLDER", help="with data_batch_1.bin to _5.bin")
    run.add_argument("--device", type=torch.device, default="cpu", help="where to train")
    names = [task.name for task in TASKS]
    run.add_argument("--tasks", nargs="+", choices=names, metavar="TASK", help=", ".join(names))
    run.add_argument("--noise", type=float, nargs="+", choices=NOISE, default=NOISE)
    run.add_argument("--hours", type=float, default=float("inf"), help="begin no run after them")
    page = commands.add_parser("report", help="write docs/study.md and its picture")
    page.add_argument("--docs", type=Path, default=report.DOCS)
    args = parser.parse_args(arguments)
    if args.command == "run" and args.cifar is None:
        needy = [task.name for task in TASKS if task.cifar and task.name in (args.tasks or [])]
        if needy:
            parser.error(f"{needy[0]} needs the files of CIFAR-10: --cifar FOLDER")
    return args


def _run(args: argparse.Namespace, rows: Rows) -> None:
    end = time.monotonic() + 3600 * args.hours
    tasks = [task for task in TASKS if _wanted(task, args)]
    stated = conditions(args.device)
    stated = {name: stated[name] for name in _STATED if name in stated}
    stated["versions"]["fused_sam"] = fused_sam.__version__
    for task in tasks:
        parts = task.load(args.cifar)
        for cell in cells([task], args.noise):
            for run in missing(cell, rows):
                if time.monotonic() > end:
                    return
                row = {**run.facts(), **train(run, parts, args.device), "device": str(args.device)}
                rows.add({**row, **stated})
                print(_line(row), flush=True)


def _wanted(task: Task, args: argparse.Namespace) -> bool:
    if args.tasks:
        return task.name in args.tasks
    # The digits are small everywhere; CIFAR-10 is taken as a whole where there is a GPU.
    return not task.cifar or (args.cifar is not None and task.cuda == (args.device.type == "cuda"))


def _line(row: dict) -> str:
    last, best = row["validation"]["last"]["accuracy"], row["validation"]["best"]["accuracy"]
    setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
    return (
        f"{row['task']} {row['noise']:.0%} flipped, {row['method']}, seed {row['seed']}: "
        f"{setting}: "
        f"validation {last:.1%} (best {best:.1%}), {row['cpu_seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
