"""Parameters that are spread over processes: two real ones, which talk by gloo on this machine."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fused_sam import FusedSAM

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")
SGD = torch.optim.SGD


def _enter(rank, check, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


def in_two_processes(check):
    """Run ``check(rank)`` in two processes; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:  # a port found free may be taken by then
        mp.spawn(_enter, (check, folder), nprocs=2)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3))


def _refusals(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for use_orig_params in (False, True):
        shards = FullyShardedDataParallel(
            _model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        with pytest.raises(TypeError, match="FullyShardedDataParallel"):
            FusedSAM(shards.parameters(), SGD, lr=0.1)
    model = fully_shard(_model())
    with pytest.raises(TypeError, match="DTensor"):
        FusedSAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(TypeError, match="put it around"):
        ZeroRedundancyOptimizer(_model().parameters(), FusedSAM, base_optimizer=SGD, lr=0.1)


def test_shards_are_refused():
    """Guards against a norm of one rank's shards: silent, and wrong by the square root of ranks."""
    in_two_processes(_refusals)


def _train(model, opt, rank):
    for i in range(3):
        for half in (opt.first_step, opt.second_step):
            torch.manual_seed(10 * i + rank)
            model(torch.randn(4, 7)).square().sum().backward()
            half(zero_grad=True)


def _replicas(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ours = []
    for base, options in (
        (SGD, {}),
        (ZeroRedundancyOptimizer, {"optimizer_class": SGD}),
    ):
        model = nn.parallel.DistributedDataParallel(_model())
        opt = FusedSAM(model.parameters(), base, lr=0.05, momentum=0.9, rho=0.3, **options)
        _train(model, opt, rank)
        ours.append([p.detach().clone() for p in model.parameters()])
    # The textbook in this process alone: the gradients of both ranks, averaged.
    model = _model()
    base = SGD(model.parameters(), lr=0.05, momentum=0.9)
    for i in range(3):
        saved = None
        for half in range(2):
            base.zero_grad()
            for other in range(2):
                torch.manual_seed(10 * i + other)
                (model(torch.randn(4, 7)).square().sum() / 2).backward()
            if half == 0:
                saved = [p.detach().clone() for p in model.parameters()]
                norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
                with torch.no_grad():
                    for p in model.parameters():
                        p += 0.3 / norm * p.grad
        with torch.no_grad():
            for p, w in zip(model.parameters(), saved, strict=True):
                p.copy_(w)
        base.step()
    for weights in ours:
        for p, w in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(p, w.detach(), rtol=1e-4, atol=1e-5)
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p)
            assert torch.equal(both[0], both[1])


def test_replicas_train_as_one():
    """Guards DDP, and ZeroRedundancyOptimizer inside FusedSAM; replicas stay equal to the bit.

    Tolerance: float32 sums in another order, over three steps of numbers of order 10.
    """
    in_two_processes(_replicas)
