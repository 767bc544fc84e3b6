"""Options of the suites, and what pytest-benchmark's JSON says beside the figures."""

import gc

import pytest
import torch

from bench.machine import conditions
from bench.measure import Arena, Runner
from bench.peers import peers
from bench.workloads import split


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few rounds, small models")
    parser.addoption("--bench-device", default="cpu", help="cpu or cuda")


@pytest.fixture(scope="session")
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def device(request):
    device = torch.device(request.config.getoption("--bench-device"))
    # What the first use of a library costs is nobody's step.
    warm_up = split(1000, 3)
    for peer in peers(device):
        gradients = [[torch.ones(s, device=device) for s in warm_up.shapes]] * 2
        for base in ("SGD", "AdamW"):
            Runner(peer, warm_up, base, gradients).step()
    return device


@pytest.fixture
def compare(benchmark, device, quick):
    """Measure peers on a workload: the first by pytest-benchmark, the others in turn with it."""

    def run(workload, base, competitors, *, seconds=6.0, **options):
        arena = Arena(workload, base, competitors, device, **options)
        rounds = arena.rounds_for(0.6 if quick else seconds, least=3 if quick else 9)
        # Without collections of garbage, which would meet one peer and not another.
        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(arena.first_turn, setup=arena.others_turn, rounds=rounds)
        finally:
            gc.enable()
        benchmark.extra_info["record"] = arena.record()
        return arena

    return run


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device(config.getoption("--bench-device"))
    machine_info.clear()  # it has the machine's name
    machine_info.update(conditions(device))


def pytest_benchmark_update_commit_info(config, commit_info):
    for key in ("author_time", "branch", "project"):
        commit_info.pop(key, None)
