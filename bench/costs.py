"""What a step costs besides time: operator calls, kernel launches, memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .measure import Runner, random_gradients, synchronize
from .peers import Peer
from .workloads import Workload

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipModuleLaunchKernel")


def costs(peer: Peer, workload: Workload, base: str, device: torch.device) -> dict[str, Any]:
    """Operator calls and launches of one step, and bytes beyond weights, gradients and state.

    Memory is what PyTorch's allocators were asked for, the highest point in the third step.
    """
    gradients = random_gradients(workload, device)
    with _profile(device) as before:
        runner = Runner(peer, workload, base, gradients)
        for _ in range(2):
            runner.step()
        synchronize(device)
    with _profile(device) as during:
        runner.step()
        synchronize(device)
    base_optimizer = getattr(runner.optimizer, "base_optimizer", runner.optimizer)
    state = sum(
        value.nbytes
        for entry in base_optimizer.state.values()
        for name, value in entry.items()
        if isinstance(value, torch.Tensor) and name != "old_p"
    )
    kept = sum(_allocations(before, device)) - state - 4 * workload.numel
    return {
        "calls": _calls(during),
        "launches": sum(event.name.startswith(_LAUNCHES) for event in during.events()),
        "extra_bytes": kept + _peak(_allocations(during, device)),
    }


def _profile(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, profile_memory=True, acc_events=True)


def _calls(found: profile) -> int:
    """Operators that Python called; those that operators call themselves are not counted."""
    return sum(_is_operator(event) and not _inside_operator(event) for event in found.events())


def _is_operator(event: Any) -> bool:
    return "::" in event.name and event.device_type == torch.autograd.DeviceType.CPU


def _inside_operator(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent):
            return True
        parent = parent.cpu_parent
    return False


def _allocations(found: profile, device: torch.device) -> list[int]:
    """Bytes allocated (freed: negative) on the device, in order of time."""
    kind = getattr(torch.autograd.DeviceType, device.type.upper())
    assert found.profiler is not None
    events = [
        event
        for event in found.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == kind
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _peak(allocations: list[int]) -> int:
    total = peak = 0
    for size in allocations:
        total += size
        peak = max(peak, total)
    return peak
