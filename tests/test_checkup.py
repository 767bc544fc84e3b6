"""optimizer.check(): one step, tried and taken back."""

import copy
import random

import pytest
import torch
from oracle import assert_same_bits, params_of
from torch import nn

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM


def make(*layers, dtype=torch.float32, attach=False, **options):
    torch.manual_seed(0)
    layers = layers or (nn.BatchNorm1d(8), nn.Dropout(0.5))
    model = nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 1)).to(dtype)
    opt = FusedSAM(model.parameters(), **{"lr": 0.1, "rho": 0.05, **options})
    if attach:
        opt.attach(model)
    x = torch.randn(6, 4, dtype=dtype)
    return model, opt, lambda: model(x).square().mean().backward()


def test_all_is_right_with_an_attached_model(backend):
    model, opt, run = make(attach=True, backend=backend)
    found = opt.check(model, run)
    assert found.is_right and found.caches == ()
    assert abs(found.share_of_rho - 1) < 1e-3
    assert str(found).count("ok ") == 4 and "100% of rho" in str(found)


def test_masks_and_statistics_without_an_attached_model():
    model, opt, run = make()
    found = opt.check(model, run)
    assert found.sees_epsilon and not found.same_numbers and not found.same_statistics
    assert not found.is_right
    assert str(found).count("WRONG") == 2 and "optimizer.attach(model)" in str(found)
    model, opt, run = make(nn.BatchNorm1d(8))
    assert opt.check(model, run).same_numbers
    model, opt, run = make(nn.Tanh())
    assert opt.check(model, run).is_right


def test_a_model_that_computes_with_copies():
    """As float8 layers that keep casts, or an EMA copy in the place of the model."""
    model, opt, _ = make(nn.Tanh())
    other, x = copy.deepcopy(model), torch.randn(6, 4)

    def run():
        other.zero_grad()
        other(x).square().mean().backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = q.grad

    found = opt.check(model, run)
    assert not found.sees_epsilon and "copies of them" in str(found)


def test_a_climb_that_rounding_takes_away():
    model, opt, run = make(nn.Tanh(), rho=1e-12)
    found = opt.check(model, run)
    assert found.share_of_rho < 0.5 and not found.climbs and "rounds the climb away" in str(found)


def test_no_climb_at_all():
    model, opt, run = make(nn.Tanh(), rho=0.0)
    found = opt.check(model, run)
    assert found.share_of_rho != found.share_of_rho and not found.is_right


@pytest.mark.parametrize("options", [{"adaptive": True}, {"maximize": True}], ids=str)
def test_the_share_of_other_climbs(options, backend):
    model, opt, run = make(nn.Tanh(), backend=backend, **options)
    assert abs(opt.check(model, run).share_of_rho - 1) < 1e-3


def test_nothing_is_left_of_it(backend):
    model, opt, run = make(attach=True, backend=backend, momentum=0.9, max_grad_norm=1.0)
    run()
    opt.first_step(zero_grad=True)
    run()
    opt.second_step()
    opt.zero_grad()
    run()
    grads = [p.grad for p in params_of(opt)]
    kept = copy.deepcopy((model.state_dict(), opt.state_dict(), [g.clone() for g in grads]))
    norm, drawn = opt.grad_norm, (torch.get_rng_state(), random.getstate())
    opt.check(model, run)
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert opt.grad_norm.equal(norm) and not opt.is_perturbed
    for name, value in model.state_dict().items():
        assert_same_bits(value, kept[0][name], name)
    for i, entry in opt.state_dict()["state"].items():
        for name, value in entry.items():
            assert_same_bits(value, kept[1]["state"][i][name], name)
    assert opt.state_dict()["param_groups"] == kept[1]["param_groups"]
    for p, grad, value in zip(params_of(opt), grads, kept[2], strict=True):
        assert p.grad is grad and torch.equal(grad, value)
    opt.first_step(zero_grad=True)  # and the first pass that was made counts
    run()
    opt.second_step()


def test_caches_are_named():
    model, opt, run = make(nn.Tanh())
    with torch.autocast("cpu", torch.bfloat16), nn.utils.parametrize.cached():
        found = opt.check(model, run)
    assert len(found.caches) == 2 and "autocast" in str(found) and "cached()" in str(found)
    assert found.sees_epsilon


def test_what_has_one_pass_cannot_be_checked():
    """Guards against weights that are at w afterwards, for they were ahead of it."""
    model = nn.Linear(3, 2)
    opt = FusedSAM(model.parameters(), lr=0.1, momentum=0.9, ascent=MSAM())

    def run():
        model(torch.ones(4, 3)).sum().backward()

    run()
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="compares the two passes"):
        opt.check(model, run)
    assert opt.is_perturbed and all(map(torch.equal, before, model.parameters()))


def test_what_cannot_be_checked():
    model, opt, run = make()
    with pytest.raises(RuntimeError, match="left no gradient"):
        opt.check(model, lambda: None)
    assert not opt.is_perturbed
    run()
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"check\(\) between"):
        opt.check(model, run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_that_are_rounded_at_random_draw_no_numbers_of_the_model(dtype):
    """Guards against a false alarm: at w a weight is its master, rounded to nearest."""
    torch.manual_seed(0)
    model = nn.Linear(30, 20, dtype=dtype)
    opt = FusedSAM(model.parameters(), lr=0.01, momentum=0.9, master_weights=True)

    def forward_backward():
        model(torch.ones(4, 30, dtype=dtype).cumsum(0)).float().square().mean().backward()

    for _ in range(3):
        forward_backward()
        opt.first_step(zero_grad=True)
        forward_backward()
        opt.second_step(zero_grad=True)
    before = [p.detach().clone() for p in model.parameters()]
    assert opt.check(model, forward_backward).same_numbers
    assert all(map(torch.equal, before, model.parameters()))
    assert opt.param_groups[0]["ascent"] == "sam"
