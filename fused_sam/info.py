"""``python -m fused_sam.info``: versions, backends, and for each missing one why and the remedy.

``python -m fused_sam.info "native (cuda)"``, with names of backends as they are printed, has exit
status 1 where one of them is missing.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .backends import missing


def availability() -> dict[str, str | None]:
    """Each backend on each kind of device; None where it runs, else why not and what to do."""
    found = {"reference": None, "native (cpu)": _missing("native", "cpu")}
    no_gpu = None if torch.cuda.is_available() else "this torch sees no GPU"
    for name in ("native", "triton"):
        found[f"{name} (cuda)"] = _missing(name, "cuda") or no_gpu
    return found


def _missing(name: str, device: str) -> str | None:
    try:
        return missing(name, torch.device(device))
    except ValueError as error:  # of FUSED_SAM_CPU
        return f"{error}; unset it"


def report() -> str:
    """The text that ``python -m fused_sam.info`` prints."""
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [
        f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
    ]
    lines = [
        f"fused-sam  {__version__}",
        f"torch      {torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})",
        f"python     {platform.python_version()}, {platform.platform()}",
        f"devices    {', '.join(devices)}",
        "backends",
    ]
    for name, why in availability().items():
        note = "available" if why is None else f"missing: {why}"
        if name == "native (cpu)" and why is None:
            note += f" ({torch.ops.fused_sam.cpu_kernels()} kernels)"
        lines.append(f"  {name:14} {note}")
    return "\n".join(lines)


def main(required: Sequence[str]) -> int:
    """Print the report; return the exit status: 1 if one of these backends is missing.

    Raises:
        SystemExit: there is no backend of that name.
    """
    print(report())
    found = availability()
    if unknown := set(required) - found.keys():
        raise SystemExit(f"{sorted(unknown)} are no backends; choose from {list(found)}")
    return int(any(found[name] is not None for name in required))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
