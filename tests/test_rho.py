"""Schedules of rho: against torch's schedulers of the learning rate, and GSAM's formula."""

import copy
import io
import math
import re
from pathlib import Path

import pytest
import torch
from family import give
from oracle import assert_same_bits
from torch.optim import lr_scheduler as torchs

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM
from fused_sam.blends import GSAM
from fused_sam.rho import ProportionalRho, RhoScheduler

SHAPES = [(5,), (3, 4)]


def make(**options):
    generator = torch.Generator().manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.02, "rho": 0.3}]
    options = {"lr": 0.1, "rho": 0.6, "momentum": 0.9, **options}
    return FusedSAM(groups, torch.optim.SGD, **options), params


def step(opt, params, seed):
    for half in (opt.first_step, opt.second_step):
        generator = torch.Generator().manual_seed(seed)
        give(params, [torch.randn(p.shape, generator=generator) + p.detach() for p in params])
        half()


def values(opt, name="rho"):
    return [group[name] for group in opt.param_groups]


def test_rho_is_on_gsams_line(recwarn):
    """Guards a warm-up that begins below lr_min, each group's own rate, and rho below zero."""
    opt, params = make(blend=GSAM(0.4))
    warm_up = torchs.LambdaLR(opt, lambda i: [0.0, 0.5, 1.0, 0.75, 0.1][i])
    scheduler = ProportionalRho(warm_up, rho_max=0.6, rho_min=0.1, lr_max=0.1, lr_min=0.01)
    for i, factor in enumerate((0.0, 0.5, 1.0, 0.75, 0.1)):
        assert values(opt, "lr") == scheduler.get_last_lr() == [0.1 * factor, 0.02 * factor]
        rhos = [0.1 + 0.5 * (lr - 0.01) / 0.09 for lr in values(opt, "lr")]
        assert values(opt) == pytest.approx(rhos, rel=1e-12)
        assert values(opt)[0] == pytest.approx({2: 0.6, 4: 0.1}.get(i, rhos[0]))
        step(opt, params, i)
        if i < 4:
            scheduler.step()
    assert scheduler.last_epoch == 4 and scheduler.state_dict() == warm_up.state_dict()
    ProportionalRho(warm_up, rho_max=0.6, lr_max=0.1, lr_min=0.05)
    assert values(opt) == [0.0, 0.0]
    assert not recwarn.list


SCHEDULERS = {
    "cosine": lambda o: torchs.CosineAnnealingLR(o, T_max=5, eta_min=0.1),
    "warm-up": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=2), torchs.ExponentialLR(o, 0.5)], [2]
    ),
    "lambda": lambda o: torchs.LambdaLR(o, lambda i: 1 / (1 + i)),
    "one cycle": lambda o: torchs.OneCycleLR(o, max_lr=0.6, total_steps=9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_drives_rho_as_it_drives_a_learning_rate(name):
    opt, params = make()
    twins = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rho} for rho in (0.6, 0.3)]
    twin = torch.optim.SGD(twins)
    scheduler, expected = RhoScheduler(opt, SCHEDULERS[name]), SCHEDULERS[name](twin)
    for i in range(6):
        assert values(opt) == values(twin, "lr") == scheduler.get_last_lr()
        assert values(opt, "lr") == [0.1, 0.02]
        step(opt, params, i)
        twin.step()
        scheduler.step()
        expected.step()


def test_a_scheduler_that_is_told_a_metric():
    opt, params = make()
    scheduler = RhoScheduler(opt, torchs.ReduceLROnPlateau, factor=0.5, patience=0)
    for i in range(3):
        step(opt, params, i)
        scheduler.step(1.0)
    assert values(opt) == [0.15, 0.075]


def both(opt):
    of_lr = torchs.CosineAnnealingLR(opt, T_max=8, eta_min=0.01)
    of_rho = RhoScheduler(opt, torchs.CosineAnnealingLR, T_max=6, eta_min=0.1)
    return torchs.ChainedScheduler([of_lr, of_rho], optimizer=opt)


def following(opt):
    of_lr = torchs.CosineAnnealingLR(opt, T_max=8, eta_min=0.01)
    return ProportionalRho(of_lr, rho_max=0.6, rho_min=0.1, lr_max=0.1, lr_min=0.01)


@pytest.mark.parametrize("ascent", ["sam", MSAM()], ids=str)
@pytest.mark.parametrize("first", ["optimizer", "scheduler"])
@pytest.mark.parametrize("kind", [both, following])
def test_a_resumed_run_goes_on_with_the_same_bits(kind, first, ascent):
    """Guards a cosine of torch, which goes on from the value that stands in the group."""
    opt, params = make(ascent=ascent)
    scheduler = kind(opt)

    def train(opt, params, scheduler, steps):
        for i in steps:
            opt.train()
            step(opt, params, i)
            scheduler.step()

    train(opt, params, scheduler, range(3))
    opt.eval()
    file = io.BytesIO()
    torch.save([opt.state_dict(), scheduler.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved, of_scheduler, weights = torch.load(file, weights_only=True)
    twin, others = make(ascent=ascent)
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
    again = kind(twin)
    if first == "optimizer":
        twin.load_state_dict(saved)
    again.load_state_dict(of_scheduler)
    if first == "scheduler":
        twin.load_state_dict(saved)
    assert values(opt) == values(twin)
    train(opt, params, scheduler, range(3, 7))
    train(twin, others, again, range(3, 7))
    assert values(opt) == values(twin) and values(opt)[0] < 0.3
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "family.md").read_text()
    section = page.split("## rho that follows")[1].split("\n## ")[0]
    model = torch.nn.Linear(4, 1)
    scope = {
        **{"torch": torch, "FusedSAM": FusedSAM, "GSAM": GSAM, "model": model},
        "loader": [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(4)],
        "loss_fn": torch.nn.MSELoss(),
    }
    first, second = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    exec(first, scope)
    assert values(scope["optimizer"]) == pytest.approx([0.1])
    exec(second, scope)
    assert isinstance(scope["rho_scheduler"], RhoScheduler)


def test_groups_that_come_later_keep_their_rho():
    opt, _ = make()
    scheduler = RhoScheduler(opt, torchs.LambdaLR, lambda i: 1 / (1 + i))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "rho": 0.7})
    scheduler.step()
    assert values(opt) == [0.3, 0.15, 0.7]
    twin, again = copy.deepcopy((opt, scheduler))
    again.step()
    assert values(twin) == [0.6 / 3, 0.3 / 3, 0.7] and values(opt)[0] == 0.3


def test_what_cannot_be_used_is_refused():
    opt, _ = make()
    of_lr = torchs.LambdaLR(opt, lambda i: 1.0)
    line = {"rho_max": 0.6, "lr_max": 0.1}
    for name in ("rho_max", "lr_max", "rho_min", "lr_min"):
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got nan"):
            ProportionalRho(of_lr, **{**line, name: math.nan})
    with pytest.raises(ValueError, match=r"lr_max must be > lr_min, got 0\.1 and 0\.1"):
        ProportionalRho(of_lr, **line, lr_min=0.1)
    with pytest.raises(TypeError, match="around a scheduler of torch, got FusedSAM"):
        ProportionalRho(opt, **line)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match=r"ProportionalRho needs a FusedSAM.*got SGD"):
        ProportionalRho(torchs.LambdaLR(sgd, lambda i: 1.0), **line)
    with pytest.raises(TypeError, match=r"RhoScheduler needs a FusedSAM.*got SGD"):
        RhoScheduler(sgd, torchs.LambdaLR, lambda i: 1.0)
    # Of an unusable rho the next step says so.
    RhoScheduler(opt, torchs.LambdaLR, lambda i: -1.0)
    with pytest.raises(ValueError, match=r"rho must be finite and >= 0, got -0\.6"):
        opt.first_step()
