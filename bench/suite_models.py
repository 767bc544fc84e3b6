"""The shapes of published models: step time without forward and backward, all peers in turn."""

import pytest
import torch

from bench.peers import best_peers, peers
from bench.workloads import flat, model

# (model, base optimizer, cold caches, threads or None for the machine's, compiled peer too)
CASES = [
    ("ResNet-20", "SGD", False, None, True),
    ("ResNet-20", "SGD", True, None, False),
    ("ResNet-20", "SGD", False, 1, False),
    ("ResNet-20", "AdamW", False, None, False),
    ("ResNet-20", "AdamW", False, 1, False),
    ("ResNet-18", "SGD", False, None, True),
    ("ResNet-50", "SGD", False, None, False),
    ("ResNet-50", "SGD", True, None, False),
    ("ResNet-50", "SGD", False, 1, False),
    ("ResNet-50", "AdamW", False, None, False),
    ("ResNet-50", "AdamW", False, 1, False),
    ("WRN-28-10", "SGD", False, None, False),
    ("ViT-B/16", "SGD", False, None, False),
    ("ViT-B/16", "AdamW", False, None, False),
    ("GPT-2-small", "SGD", False, None, False),
    ("flat", "SGD", False, None, True),
    ("flat", "AdamW", False, None, True),
]
QUICK = [
    ("ResNet-20", "SGD", False, None, False),
    ("ResNet-20", "SGD", True, None, False),
    ("ResNet-20", "AdamW", False, None, False),
    ("ResNet-18", "SGD", False, None, False),
    ("ResNet-50", "SGD", False, None, False),
]
FLAT = 25_557_032
ALL_FORMS_UP_TO = 100_000_000
"""Parameters; above, only each peer's default and best form, for the sake of memory."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_model(compare, device, threads, quick, case):
    if quick and case[:4] not in [other[:4] for other in QUICK]:
        pytest.skip("not in the quick run")
    name, base, cold, count, compiled = case
    if count:
        if device.type != "cpu" or torch.get_num_threads() <= count:
            pytest.skip("one number of threads only")
        threads(count)
    workload = flat(FLAT) if name == "flat" else model(name)
    few = workload.numel > ALL_FORMS_UP_TO
    compiled = (compiled or device.type != "cpu") and not quick
    competitors = (best_peers if few else peers)(device, compiled=compiled)
    compare(workload, base, competitors, seconds=8.0, cold=cold)
