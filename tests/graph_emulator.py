"""A CUDA graph without a GPU: every operation of torch's is written down, and done again.

As in a graph, addresses, tensors and numbers of the host are those of the capture, and what makes
the host wait is an error. Unlike in one, what is captured runs once; the tests capture steps that
skip, so nothing is left of it but in the model's buffers, which ``capture`` puts back.
"""

import contextlib
import ctypes

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_sam import recording

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


def storages(values):
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
    return {x.untyped_storage()._cdata for x in tensors}


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.events.append((func, args, kwargs or {}, out))
        return out


class EmulatedGraph:
    """What ``fused_sam.graphs.device.DeviceGraph`` is, with the CPU's generator."""

    def __init__(self, device, other=None):
        self._log = None

    def warm_up(self, run):
        for _ in range(2):
            run()

    def record(self, run):
        with Log() as self._log:
            run()

    @contextlib.contextmanager
    def second_pass(self):
        self._log.events.append("second pass")
        yield
        self._log.events.append("it is over")

    def replay(self):
        start = torch.get_rng_state()
        with torch.no_grad():
            for event in self._log.events:
                if event == "second pass":
                    after = torch.get_rng_state()
                    torch.set_rng_state(start)
                elif event == "it is over":
                    torch.set_rng_state(after)
                else:
                    self._redo(*event)

    def _redo(self, func, args, kwargs, out):
        new = func(*args, **kwargs)
        known = storages((args, kwargs))
        for old, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True):
            own = isinstance(old, torch.Tensor) and old.untyped_storage()._cdata not in known
            if own and old.numel():
                old.detach().copy_(value)


class HostRecording(recording.Recording):
    """Tables in the host's memory, which nothing that is captured may write."""

    def table(self, values, dtype):
        table = super().table(values, dtype)
        if self._block is not None:
            size, start = table.untyped_storage().nbytes(), table.data_ptr()
            assert start - self._block.data_ptr() < size
            data = recording.array(recording.CODES[dtype], tuple(values())).tobytes()
            ctypes.memmove(start, data, len(data))
        return table

    def _send(self, data):
        assert len(data) == self._block.numel()
        ctypes.memmove(self._block.data_ptr(), data, len(data))
        self.sent = getattr(self, "sent", 0) + 1
