"""In which of torch's modes memory may be read, written and allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def working() -> contextlib.AbstractContextManager[Any]:
    """The mode of everything that touches the weights: no graph is recorded.

    Nor is it inference mode, in which all that is allocated could not be written to afterwards.

    Raises:
        RuntimeError: under ``FakeTensorMode`` operations compute nothing: what was a real weight
            would be a fake one, and what was to be saved would not be.
    """
    if torch._C._get_dispatch_mode(_FAKE) is not None:
        raise RuntimeError(
            "FusedSAM was used under FakeTensorMode, where nothing is computed; the weights are "
            "as they were: make the optimizer, and step, outside of it"
        )
    return _outside_inference() if torch.is_inference_mode_enabled() else torch.no_grad()


@contextlib.contextmanager
def _outside_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield
