"""How the cost grows: with the number of tensors, of parameters and of groups."""

import pytest

from bench.peers import best_peers
from bench.workloads import flat, split

TOTAL = 1_000_000
TENSORS = (1, 10, 100, 1_000, 10_000)
SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
GPU_SIZES = (*SIZES, 10**9)
GROUPS = (1, 4, 16, 64)
GROUPED_TENSORS = 256


@pytest.mark.parametrize("tensors", TENSORS)
def test_tensors(compare, device, quick, tensors):
    if quick and tensors not in (1, 100, 1_000):
        pytest.skip("not in the quick run")
    compare(split(TOTAL, tensors), "SGD", best_peers(device), seconds=4.0)


@pytest.mark.parametrize("size", GPU_SIZES)
def test_size(compare, device, quick, size):
    if size not in (SIZES if device.type == "cpu" else GPU_SIZES):
        pytest.skip("for GPUs")
    if quick and size > 10**7:
        pytest.skip("not in the quick run")
    competitors = best_peers(device)
    if size >= 10**9:  # there is room for two
        textbook = next(p for p in competitors if p.name == "textbook SAM, fused")
        competitors = [competitors[0], textbook]
    compare(flat(size), "SGD", competitors, seconds=4.0)


@pytest.mark.parametrize("groups", GROUPS)
def test_groups(compare, device, quick, groups):
    if quick and groups not in (1, 16):
        pytest.skip("not in the quick run")
    workload = split(TOTAL, GROUPED_TENSORS)
    compare(workload, "SGD", best_peers(device), seconds=3.0, groups=groups)
