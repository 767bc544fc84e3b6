"""Ctrl-C, from a real timer, while a large model steps: the signal comes when an operation returns.

That is between two lines of Python, where a flag may already be set, or may not yet be.
"""

import gc
import random
import signal
import time

import pytest
import torch

from fused_sam import FusedSAM

PARAMETERS = 20_000_000
INTERRUPTS = 8

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer here")


@pytest.fixture
def ctrl_c_after():
    """A function that has KeyboardInterrupt raised in so many seconds.

    No garbage is collected meanwhile: in the finalizers of what other tests have left it would be
    lost, with a warning.
    """

    def handler(number, frame):
        raise KeyboardInterrupt

    gc.collect()
    gc.disable()
    before = signal.signal(signal.SIGALRM, handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    gc.enable()


def interrupt(run, seconds, ctrl_c_after):
    """Whether KeyboardInterrupt came out of ``run``."""
    try:
        ctrl_c_after(seconds)
        run()
        ctrl_c_after(0)
    except KeyboardInterrupt:
        return True
    return False


def test_ctrl_c_loses_no_weights(backend, ctrl_c_after):
    params = [torch.nn.Parameter(torch.randn(PARAMETERS // 2)) for _ in range(2)]
    opt = FusedSAM(params, rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    w = [p.detach().clone() for p in params]
    start = time.perf_counter()
    opt.first_step()
    opt.restore()
    opt.first_step()
    start = time.perf_counter()
    opt.restore()
    back = time.perf_counter() - start
    start = time.perf_counter()
    opt.first_step()
    took = time.perf_counter() - start
    opt.restore()
    generator = random.Random(0)
    came = 0
    for _ in range(INTERRUPTS):
        came += interrupt(opt.first_step, generator.uniform(0, took), ctrl_c_after)
        if not opt.is_perturbed:
            assert all(map(torch.equal, params, w))
        came += interrupt(opt.restore, generator.uniform(0, back), ctrl_c_after)
        opt.restore()
        assert all(map(torch.equal, params, w))
    assert came, "no interrupt came in time"
    opt.first_step()
    interrupt(opt.second_step, generator.uniform(0, took), ctrl_c_after)
    opt.restore()
    # The rule: w - 0.1 * 1, for the whole bucket or for nothing of it.
    stepped = all(torch.equal(p, v - 0.1) for p, v in zip(params, w, strict=True))
    assert stepped or all(map(torch.equal, params, w))
