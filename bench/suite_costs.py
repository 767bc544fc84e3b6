"""What a step costs besides time; and the time that it takes when there is nothing to compute."""

import pytest

from bench.costs import costs
from bench.peers import peers
from bench.workloads import Workload, model


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_costs(benchmark, device, base):
    """Operator calls, kernel launches and memory on ResNet-18's shapes."""
    workload = model("ResNet-18")
    competitors = peers(device)
    found = {peer.name: costs(peer, workload, base, device) for peer in competitors}
    benchmark.pedantic(lambda: costs(competitors[0], workload, base, device), rounds=1)
    benchmark.extra_info["costs"] = {
        "workload": workload.name,
        "tensors": len(workload.shapes),
        "numel": workload.numel,
        "base": base,
        "peers": found,
    }


def test_host_time(compare, device):
    """ResNet-50's 161 tensors with one number each: what is left is the host's work."""
    workload = Workload("161 scalars", ((1,),) * len(model("ResNet-50").shapes))
    compare(workload, "SGD", peers(device), seconds=3.0)
