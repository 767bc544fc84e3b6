"""Progress bars."""

from __future__ import annotations

import tqdm


def progress(total: int, what: str, unit: str) -> tqdm.tqdm[None]:
    """A bar on the standard error; nothing where that is not a terminal."""
    return tqdm.tqdm(total=total, desc=what, unit=unit, leave=False, disable=None)
