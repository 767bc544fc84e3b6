"""Writes mathematics.h, which is next to this file, from the texts of rules and ascents.

python csrc/generate.py
"""

import subprocess
import sys
from pathlib import Path

from fused_sam.backends.native.translate import stamped_header

target = Path(__file__).with_name("mathematics.h")
target.write_text(stamped_header())
formatter = Path(sys.executable).with_name("clang-format")  # that of the virtual environment
subprocess.run([formatter if formatter.exists() else "clang-format", "-i", target], check=True)
