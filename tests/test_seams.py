"""Where two parts of the family meet: one-pass members, schedules, blends, scalers, checks."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM, USAM
from fused_sam.blends import GSAM
from fused_sam.schedule import Every, From

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, **options}
    return model, FusedSAM(model.parameters(), torch.optim.SGD, **options)


def backward(model, scaler=None):
    loss = model(X.to(next(model.parameters()).dtype)).float().square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def train(model, opt, steps):
    for _ in range(steps):
        opt.zero_grad()
        backward(model)
        opt.step()


def assert_same(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------- Momentum-SAM


def test_a_closure_of_one_pass_need_not_clear_gradients():
    """Guards against the last step's gradients, which would be added to."""
    (model, opt), (other, like) = make(ascent=MSAM()), make(ascent=MSAM())
    for _ in range(4):
        opt.step(lambda: backward(model))
    train(other, like, 4)
    assert_same(model, other)


def test_a_closure_of_one_pass_adds_to_gradients_that_no_step_has_used():
    (model, opt), (other, like) = make(ascent=MSAM()), make(ascent=MSAM())
    backward(model)
    opt.step(lambda: backward(model))
    backward(other)
    backward(other)
    like.step()
    assert_same(model, other)


def test_a_warmup_from_zero_goes_ahead_with_its_first_step():
    """Guards against taking it for a checkpoint library that wants to see state."""
    model, opt = make(ascent=MSAM(), lr=0.0)
    w = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 1)
    ahead = [p.detach().clone() for p in model.parameters()]
    assert any(not torch.equal(p, before) for p, before in zip(ahead, w, strict=True))
    opt.eval()
    for p, before in zip(model.parameters(), w, strict=True):
        assert torch.equal(p, before)
    opt.train()
    for p, before in zip(model.parameters(), ahead, strict=True):
        assert torch.equal(p, before)


def test_a_warmup_from_zero_goes_on():
    """Guards against a complaint that weights were written to."""
    model, opt = make(ascent=MSAM(), lr=0.0)
    train(model, opt, 1)
    opt.param_groups[0]["lr"] = 0.1
    train(model, opt, 2)


def test_a_checkpoint_library_makes_state_at_w():
    model, opt = make(ascent=MSAM())
    w = [p.detach().clone() for p in model.parameters()]
    assert get_optimizer_state_dict(model, opt)["state"]
    assert not opt.is_perturbed
    for p, before in zip(model.parameters(), w, strict=True):
        assert torch.equal(p, before)
    opt.train()
    train(model, opt, 2)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("at_w", [False, True])
def test_parameters_come_while_the_weights_are_ahead(at_w, two):
    """Guards the way back of the old ones, and no complaint that they were written to."""
    (model, opt), (other, like) = make(ascent=MSAM()), make(ascent=MSAM())
    train(model, opt, 2)
    train(other, like, 2)
    late = nn.Linear(3, 3)
    if at_w:
        opt.eval()
    opt.add_param_group({"params": list(late.parameters())})
    if at_w:
        opt.train()
    for _ in range(2):
        opt.zero_grad()
        backward(model)
        if two:
            opt.first_step(zero_grad=True)
            opt.second_step()
        else:
            opt.step()
    train(other, like, 2)
    assert_same(model, other)


def test_what_is_written_ahead_of_w_is_noticed_though_parameters_come():
    model, opt = make(ascent=MSAM())
    train(model, opt, 2)
    with torch.no_grad():
        model[0].weight.zero_()
    opt.add_param_group({"params": list(nn.Linear(3, 3).parameters())})
    backward(model)
    opt.first_step()
    with pytest.raises(RuntimeError, match="written to while they were ahead"):
        opt.second_step()


def evaluate(model, opt):
    model.eval()
    with torch.no_grad():
        model(X)


BACK = {
    "eval": (False, lambda model, opt: opt.eval()),
    "an evaluation": (True, evaluate),
    "saving the model": (True, lambda model, opt: model.state_dict()),
    "saving": (True, lambda model, opt: opt.state_dict()),
}


@pytest.mark.parametrize(("attached", "go_back"), BACK.values(), ids=BACK)
def test_no_way_back_to_w_undoes_what_was_written_ahead_of_it(attached, go_back):
    """Guards the weights of a model that is loaded ahead of w, and evaluated then."""
    model, opt = make(ascent=MSAM())
    if attached:
        opt.attach(model)
    train(model, opt, 2)
    model(X)
    assert opt.is_perturbed
    with torch.no_grad():
        model[0].weight.fill_(2)
    with pytest.raises(RuntimeError, match=r"written to while.*optimizer\.restore\(\) goes back"):
        go_back(model, opt)
    assert (model[0].weight == 2).all()
    opt.restore()
    assert (model[0].weight != 2).all()
    model.train()
    go_back(model, opt)


def test_another_ascent_does_not_climb_from_ahead_of_w():
    model, opt = make(ascent=MSAM())
    train(model, opt, 2)
    opt.eval()
    w = [p.detach().clone() for p in model.parameters()]
    opt.train()
    opt.param_groups[0]["ascent"] = "sam"
    backward(model)
    with pytest.raises(RuntimeError, match=r"ahead of it.*restore\(\)"):
        opt.first_step()
    opt.restore()
    for p, before in zip(model.parameters(), w, strict=True):
        assert torch.equal(p, before)


def test_a_step_without_gradients_leaves_the_weights_where_the_next_may_start():
    model, opt = make(ascent=MSAM())
    train(model, opt, 2)
    opt.zero_grad()
    opt.step()
    train(model, opt, 1)
    opt.zero_grad()
    opt.step()
    opt.eval()
    opt.train()
    train(model, opt, 1)


@pytest.mark.parametrize("options", [{"when": Every(2)}, {"base_optimizer": torch.optim.NAdam}])
def test_a_checkpoint_of_one_pass_loads_only_where_that_has_a_meaning(options):
    model, _ = make()
    opt = FusedSAM(model.parameters(), **{"lr": 0.1, **options})
    checkpoint = opt.state_dict()
    checkpoint["param_groups"][0] |= {"ascent": "msam", "momentum": 0.9}
    with pytest.raises(ValueError, match=r"MSAM\(\)"):
        opt.load_state_dict(checkpoint)


def test_check_has_nothing_to_say_of_one_pass():
    model, opt = make(ascent=MSAM())
    train(model, opt, 2)
    with pytest.raises(ValueError, match="has one"):
        opt.check(model, lambda: backward(model))
    train(model, opt, 1)


# ------------------------------------------------------------------------------------- the others


def test_a_blend_has_no_gradient_of_the_batch_where_each_micro_batch_climbs():
    model, opt = make(blend=GSAM(0.3))
    opt.attach(model)
    with pytest.raises(ValueError, match="blend='gsam' would have to come before"):
        opt.accumulate([0, 1], lambda _: backward(model), ascent="local")
    assert not opt.is_perturbed


def test_check_leaves_the_number_of_climbs():
    """Guards the rounding of what follows, which goes by that number."""
    model, opt = make(torch.bfloat16)
    opt.check(model, lambda: backward(model))
    assert "sam_climbs" not in opt.param_groups[0]
    opt.step(lambda: backward(model))
    opt.check(model, lambda: backward(model))
    assert opt.param_groups[0]["sam_climbs"] == 1


@pytest.mark.parametrize("options", [{}, {"ascent": USAM()}, {"blend": GSAM(0.3)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_resumed_run_climbs_from_the_masters_that_were_loaded(dtype, options):
    """Guards the first climb, which must not take the rounded weights for them."""
    model, opt = make(dtype, master_weights=True, **options)
    for _ in range(3):
        opt.step(lambda: backward(model))
    other, like = make(dtype, master_weights=True, **options)
    other.load_state_dict(model.state_dict())
    like.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step(lambda: backward(model))
    like.step(lambda: backward(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        master, its = opt.state[p]["master_weight"], like.state[q]["master_weight"]
        assert torch.equal(master, its)


def test_climbs_are_counted_where_the_scale_is_told():
    """Guards rounding at random, which must differ from step to step."""
    model, opt = make(torch.bfloat16, ascent=USAM())
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for i in range(3):
        backward(model, scaler)
        opt.first_step(zero_grad=True, scaler=scaler)
        backward(model, scaler)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert opt.param_groups[0]["sam_climbs"] == i + 1


@pytest.mark.parametrize("unscale", [None, "before", "after"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_step_that_does_not_climb_has_one_pass_under_a_scaler(zero, unscale):
    """Guards the scaler's look at the gradients, which are put aside."""
    (model, opt), (other, like) = make(when=Every(2)), make(when=Every(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for i in range(4):
        opt.zero_grad()
        backward(model, scaler)
        if unscale == "before" and i % 2:
            scaler.unscale_(opt)
        if opt.first_step(zero_grad=zero):
            opt.zero_grad()
            backward(model, scaler)
        if unscale == "after":
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        like.step(lambda: backward(other))
    assert_same(model, other)


def test_a_step_that_does_not_climb_is_skipped_if_its_gradients_are_infinite():
    model, opt = make(when=From(10))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    backward(model, scaler)
    model[0].weight.grad[0, 0] = torch.inf
    w = [p.detach().clone() for p in model.parameters()]
    assert not opt.first_step(zero_grad=True)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 8
    for p, before in zip(model.parameters(), w, strict=True):
        assert torch.equal(p, before)


@pytest.mark.parametrize("zero", [False, True])
def test_a_second_pass_at_w_after_unscaling_is_refused(zero):
    """Guards against a step with gradients that are still scaled."""
    model, opt = make(when=From(10))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    backward(model, scaler)
    scaler.unscale_(opt)
    assert not opt.first_step(zero_grad=zero)
    opt.zero_grad()
    backward(model, scaler)
    with pytest.raises(RuntimeError, match="before first_step"):
        scaler.step(opt)


def test_a_second_pass_at_w_may_be_unscaled():
    (model, opt), (other, like) = make(when=From(10)), make(when=From(10))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for _ in range(2):
        backward(model, scaler)
        assert not opt.first_step(zero_grad=True)
        backward(model, scaler)
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        like.step(lambda: backward(other))
    assert_same(model, other)
