"""The command line: ``python -m fused_sam.demo``."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .config import EPOCHS, NOISE, RHO, SEEDS, Config

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
"""What the demo needs besides PyTorch: each module's name and its package's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo with ``arguments``, by default those of the process."""
    require_packages()
    # Only now, for it imports them.
    from .experiment import run

    run(parse(arguments))


def require_packages() -> None:
    """Exit with a message that tells what to install, if something is missing."""
    missing = [
        name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise SystemExit(f"The demo needs {', '.join(missing)}: pip install 'fused_sam[demo]'")


def parse(arguments: Sequence[str] | None) -> Config:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_sam.demo",
        description="Train a small network on handwritten digits with SGD, with a textbook SAM and "
        "with FusedSAM; print a table, and write a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=_count, default=EPOCHS, help="epochs to train each network for")
    add("--seeds", type=_count, default=SEEDS, help="how often to repeat everything")
    add(
        "--noise",
        type=_share,
        nargs="+",
        default=NOISE,
        metavar="SHARE",
        help="shares of the training labels to flip; the picture shows the largest",
    )
    add("--rho", type=_radius, default=RHO, help="SAM's radius, and the sharpness's")
    add("--output", type=_file, default=Path("fused_sam_demo.png"), help="the picture to write")
    add(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train",
    )
    return Config(**vars(parser.parse_args(arguments)))


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def _radius(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be finite and above 0, got {text}")
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"invalid device value: {text!r}") from error


if __name__ == "__main__":
    main()
