import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    import interpreter  # noqa: F401  (before anything imports triton)

from fused_sam import backends

CPU = torch.device("cpu")


def _runs_here(name):
    try:
        backends.resolve(name, CPU)
    except (ValueError, RuntimeError, ImportError):
        return False
    return True


BACKENDS = [name for name in ("reference", "triton", "native") if _runs_here(name)]
"""All that run on this machine's CPU; each goes through the same table of cases."""


INTERPRETED = {"test_capture", "test_default_device", "test_grad_dtype"}
INTERPRETED |= {"test_masters", "test_rounding", "test_table", "test_triton"}
"""Modules for Triton's interpreter, which is slow: those about arithmetic, not about semantics."""


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        slow = metafunc.module.__name__ not in INTERPRETED
        backends_here = [name for name in BACKENDS if not (slow and name == "triton")]
        metafunc.parametrize("backend", backends_here)


BUILDING = {"test_codegen", "test_cuda_library", "test_demo", "test_native_kernels"}
"""Modules that build something once for all of their tests: one process runs them."""

LONG = {"test_codegen", "test_cuda_library", "test_injection", "test_native_kernels"}
"""Modules that take as long as all others together: ``make test-long``."""

MANY_TIMES = {"test_injection", "test_stateful"}
"""Modules that run the same lines thousands of times."""


def _counts(item):
    """Whether coverage is counted, which doubles the time of Python: others run the lines, too.

    Those of Triton's kernels test_triton runs.
    """
    interpreted = (
        getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton"
    )
    return not interpreted and item.module.__name__ not in MANY_TIMES


@pytest.hookimpl(tryfirst=True)  # or pytest-xdist has looked for its groups already
def pytest_collection_modifyitems(items):
    for item in items:
        if not _counts(item):
            item.add_marker("no_cover")
        if item.module.__name__ in LONG:
            item.add_marker("long")
        if item.module.__name__ in BUILDING:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
