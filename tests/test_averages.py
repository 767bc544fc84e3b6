"""Ascents that keep an average of the gradients: when it changes, and what happens to it."""

import copy
import io

import pytest
import torch
from family import Surface, give
from oracle import assert_same_bits
from test_family import SHAPES, STEPS, compare, make, oracle, step

from fused_sam import FusedSAM
from fused_sam.ascents import FriendlySAM, VaSSO
from fused_sam.memory.members import AVERAGE
from fused_sam.schedule import Every

MEMBERS = ["friendly", "vasso"]


def averages(opt):
    """What a checkpoint holds of each parameter; None where that is no average."""
    state, count = opt.state_dict()["state"], len(SHAPES)
    found = [state.get(i, {}).get(AVERAGE) for i in range(count)]
    return [None if m is None or m.isnan().all() else m.clone() for m in found]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert_same_bits(a, b)


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def scaled_step(opt, params, surface, i, scaler):
    """A step of a loop with a GradScaler."""
    scaler.scale(torch.zeros(()))  # which makes its scale
    scale = scaler.get_scale()
    give(params, surface.gradient(params, i, 0), scale)
    if opt.first_step(zero_grad=True, scaler=scaler):
        give(params, surface.gradient(params, i, 1), scale)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


@pytest.mark.parametrize("name", MEMBERS)
def test_the_average_is_of_finite_unscaled_gradients(name, backend):
    """Guards a first step that is skipped, and a later one; the loss scale changes with both.

    The first average is that of the first gradient that is finite: the device alone knows which.
    """
    opt, params = make(name, backend=backend)
    broken = {(0, 0), (0, 1), (3, 0), (3, 1)}
    surface, member = Surface(SHAPES, {(1, 0): (2,)}, broken), oracle(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for i in range(STEPS):
        before = averages(opt)
        scales.append(scaler.get_scale())
        scaled_step(opt, params, surface, i, scaler)
        member.step(surface, skip=i in (0, 3))
        compare(params, member)
        if i in (0, 3):
            assert_same(averages(opt), before)
        for m, expected in zip(averages(opt), member.average, strict=True):
            assert (m is None) == (expected is None)
            if m is not None:
                torch.testing.assert_close(m, expected, rtol=1e-11, atol=1e-11)
    assert len(set(scales)) == 3


@pytest.mark.parametrize("name", MEMBERS)
def test_a_loss_scale_that_nobody_told_spoils_no_average(name, backend):
    """Guards what comes after the error: averages of scaled gradients would stay for long."""
    opt, params = make(name, backend=backend)
    surface, scaler = Surface(SHAPES), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(opt, params, surface, 0, scaler)
    before = [p.detach().clone() for p in params]
    give(params, surface.gradient(params, 1, 0), 1024.0)
    opt.first_step(zero_grad=True)
    give(params, surface.gradient(params, 1, 1), 1024.0)
    with pytest.raises(RuntimeError, match=r"first_step\(scaler=scaler\).*begin anew"):
        scaler.step(opt)
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)
    assert averages(opt) == [None] * len(SHAPES)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_average_changes_in_climbing_steps_only(name, backend):
    opt, params = make(name, backend=backend, when=Every(2))
    surface, member = Surface(SHAPES), oracle(name, climbs=lambda i: i % 2 == 0)
    for i in range(STEPS):
        before = averages(opt)
        step(opt, params, surface, i)
        member.step(surface)
        compare(params, member)
        if i % 2:
            assert_same(averages(opt), before)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("base", ["sgd", "adamw", "adamax"])
def test_a_checkpoint_holds_the_average(name, base, backend):
    """Guards a base optimizer that steps by itself: its own state must not seem to be there."""
    surface = Surface(SHAPES, {(0, 0): (1,)})
    opt, params = make(name, base, backend)
    give(params, surface.gradient(params, 0, 0))
    opt.first_step()
    assert not any(opt.state.values())
    opt.restore()
    for i in range(3):
        step(opt, params, surface, i)
    assert not any(AVERAGE in entry for entry in opt.state.values())
    saved = through_a_file(opt.state_dict())
    twin, others = make("sam", base, backend)
    for p, w in zip(others, params, strict=True):
        p.data.copy_(w.detach())
    step(twin, others, surface, 3)  # it has a state that is to go
    for p, w in zip(others, params, strict=True):
        p.data.copy_(w.detach())
    with pytest.warns(UserWarning, match=rf"ascent='{name}', which replaces .*ascent='sam'"):
        twin.load_state_dict(saved)
    assert not any(AVERAGE in entry for entry in twin.state.values())
    for i in range(3, STEPS):
        step(opt, params, surface, i)
        step(twin, others, surface, i)
        for p, w in zip(params, others, strict=True):
            assert_same_bits(p, w)

    # Without one it begins anew.
    for entry in saved["state"].values():
        entry.pop(AVERAGE, None)
    twin.load_state_dict(saved)
    assert averages(twin) == [None] * len(SHAPES)


def test_a_checkpoint_that_does_not_fit_changes_nothing(backend):
    opt, params = make("friendly", backend=backend)
    for i in range(2):
        step(opt, params, Surface(SHAPES), i)
    before, saved = averages(opt), through_a_file(opt.state_dict())
    saved["state"][1][AVERAGE] = torch.zeros(4, 3)
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"'sam_average' of parameter 1, .*\(3, 4\).*\(4, 3\)"):
        opt.load_state_dict(saved)
    assert_same(averages(opt), before)
    assert opt.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("name", MEMBERS)
def test_the_average_survives_a_new_layout(name, backend):
    """Guards a group that is added, a parameter in other memory, one that freezes and thaws."""
    opt, params = make(name, backend=backend)
    twin, others = make(name, backend=backend)
    surface = Surface(SHAPES)
    for i in range(STEPS):
        step(opt, params, surface, i)
        if i == 1:
            twin.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        if i == 2:
            others[1].data = others[1].detach().clone()
        if i == 3:
            others[2].requires_grad_(False)
            others[2].data = others[2].detach().clone()  # so it leaves the layout
            others[0].data = others[0].detach().clone()
            twin._refresh()
            assert AVERAGE in twin.state_dict()["state"][2]
            twin = copy.deepcopy(twin)
            others = [p for group in twin.param_groups for p in group["params"]][: len(SHAPES)]
            others[2].requires_grad_()
        step(twin, others, surface, i)
        for p, w in zip(params, others, strict=True):
            assert_same_bits(p, w.detach())
    assert_same(averages(opt), averages(twin)[: len(SHAPES)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_half_precision_is_in_float32(dtype, backend):
    """Guards an average that stands still: of lam = 0.999 bfloat16 rounds every step away."""
    p = torch.nn.Parameter(torch.ones(65, dtype=dtype))
    opt = make_one([p], backend, FriendlySAM(lam=0.999))
    g = torch.linspace(-1, 1, 65)
    for i in range(9):
        p.grad = (g if i == 0 else g + 0.5).to(dtype)
        opt.first_step()
        opt.restore()
    m = opt.state_dict()["state"][0][AVERAGE]
    expected = g.to(dtype).double()
    for _ in range(8):
        expected = 0.999 * expected + 0.001 * (g + 0.5).to(dtype).double()
    assert m.dtype == torch.float32
    torch.testing.assert_close(m.double(), expected, rtol=1e-6, atol=1e-6)
    twin = make_one([torch.nn.Parameter(p.detach().clone())], backend, FriendlySAM())
    twin.load_state_dict(through_a_file(opt.state_dict()))
    assert_same_bits(twin.state_dict()["state"][0][AVERAGE], m)


def make_one(params, backend, ascent):
    return FusedSAM(params, torch.optim.SGD, lr=0.1, ascent=ascent, backend=backend)


def test_each_micro_batch_by_itself_is_refused():
    model = torch.nn.Linear(3, 1)
    opt = make_one(list(model.parameters()), "reference", FriendlySAM())
    opt.attach(model)
    with pytest.raises(ValueError, match=r"'friendly' keeps an average.*ascent='global'"):
        opt.accumulate([torch.ones(3)], lambda x: model(x).sum().backward(), ascent="local")


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"sigma must be finite and >= 0, got -1"):
        FriendlySAM(sigma=-1)
    with pytest.raises(ValueError, match=r"lam must be from 0 to 1, got 1\.5"):
        FriendlySAM(lam=1.5)
    with pytest.raises(ValueError, match=r"theta must be from 0 to 1, got -0\.1"):
        VaSSO(theta=-0.1)
    # As the authors' training scripts have them.
    assert FriendlySAM().options() == {"ascent": "friendly", "sigma": 1.0, "lam": 0.95}
    assert VaSSO().options() == {"ascent": "vasso", "theta": 0.9}


def test_a_checkup_leaves_the_average_alone(backend):
    """Guards the climb that it takes for the exact one: along the average's direction."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    opt = make_one(list(model.parameters()), backend, FriendlySAM())
    x = torch.randn(5, 3)
    for _ in range(2):
        opt.step(lambda: model(torch.randn(5, 3)).square().sum().backward())
    before = opt.state_dict()["state"]
    before = {i: entry[AVERAGE].clone() for i, entry in before.items()}
    assert opt.check(model, lambda: model(x).square().sum().backward()).is_right
    for i, entry in opt.state_dict()["state"].items():
        assert_same_bits(entry[AVERAGE], before[i])
