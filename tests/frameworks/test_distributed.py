"""DistributedDataParallel under the frameworks, on two processes: the textbook on all batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from ranks import ACCUMULATE, SGD, WORLD, Small, all_batches
from textbook import grouped, textbook
from torch.nn.functional import cross_entropy


def test_ranks_climb_and_step_with_the_gradients_of_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    processes = []
    for rank in range(WORLD):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
            "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "NODE_RANK": "0", "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here)]),
        }  # fmt: skip
        command = [sys.executable, str(here / "ranks.py"), f"{rank}.pt"]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]

    expected = Small()
    groups = grouped(all_batches(), ACCUMULATE * WORLD)
    state = torch.get_rng_state()
    textbook(
        expected,
        torch.optim.SGD(expected.parameters(), **SGD),
        groups,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        [state] * sum(map(len, groups)),
    )
    first, second = (torch.load(f"{rank}.pt") for rank in range(WORLD))
    assert list(first) == ["with_accelerate", "with_the_trainer", "with_lightning"]
    for name, trained in first.items():
        for key, value in expected.state_dict().items():
            assert torch.equal(trained[key], second[name][key]), f"{name}: ranks differ in {key}"
            torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-12, msg=name)
