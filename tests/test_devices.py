"""Several devices, of which one is current: no machine has to have them."""

import contextlib
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_sam import FusedSAM, devices
from fused_sam.backends import capture
from fused_sam.memory import window

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def current(monkeypatch):
    """The index of the current device, in a list, of CUDA's that this machine need not have."""
    now = [0]

    @contextlib.contextmanager
    def device(which):
        before, now[0] = now[0], torch.device(which).index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    return now


def test_memory_of_a_gpu_that_is_not_current_gets_windows(monkeypatch, current):
    """torch refuses to exchange it: parameters of the second GPU were all pinned, or an error."""

    def from_dlpack(tensor):
        if tensor.device.index != current[0]:  # as Tensor.__dlpack__ has it
            raise BufferError("Can't export tensors on a different CUDA device index.")
        return tensor.clone()

    monkeypatch.setattr(window, "from_dlpack", from_dlpack)
    window.has_windows.cache_clear()
    try:
        with FakeTensorMode():
            for device in (FIRST, SECOND):
                assert window.has_windows(device)
                assert window.make_window(torch.empty(3, device=device)).device == device
    finally:
        window.has_windows.cache_clear()
    assert current == [0]


def test_a_capture_is_looked_for_on_the_device_itself(monkeypatch, current):
    """torch tells of the current device's stream, which may be another GPU's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == [1])
    assert capture.is_capturing(SECOND)
    assert not capture.is_capturing(FIRST)
    assert not capture.is_capturing(CPU)
    assert current == [0]


class Recorder:
    """Stands for a tensor, and tells how it was moved."""

    def to(self, device, dtype, non_blocking):
        return non_blocking


def test_numbers_on_their_way_to_a_cpu_are_waited_for():
    """Without waiting torch returns pinned memory there, which a copy fills later."""
    assert devices.moved(Recorder(), FIRST, torch.float32) is True
    assert devices.moved(Recorder(), CPU, torch.float32) is False


def test_the_norm_over_two_buckets_goes_through_moved(monkeypatch):
    """Parts of the norm, its sum and a scaler's numbers may all have to go to another device."""
    seen = []

    def moved(tensor, device, dtype):
        seen.append(dtype)
        return devices.moved(tensor, device, dtype)

    for module in ("fused_sam.engine", "fused_sam.backends.combine"):
        monkeypatch.setattr(importlib.import_module(module), "moved", moved)
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64)]
    opt = FusedSAM(params, lr=0.1)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for half in (opt.first_step, opt.second_step):
        for param in params:
            param.grad = torch.ones_like(param)
        half()
    single, double = torch.float32, torch.float64
    parts = totals = [double, double]  # of the two buckets, to the first and back
    assert seen == [*parts, *totals, single, single, double, single]
