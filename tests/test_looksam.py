"""LookSAM: what its direction goes through, and the loops around it. Its arithmetic: test_table."""

import copy
import math

import pytest
import torch
from family import Surface, give, norm
from oracle import assert_same_bits
from test_averages import through_a_file
from test_family import SHAPES, STEPS, compare, make, oracle, step
from test_table import Failing

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM
from fused_sam.blends import GSAM, LookSAM
from fused_sam.memory.members import DIRECTION, LENGTH
from fused_sam.schedule import AESAM, Always, Every, From

SGD = torch.optim.SGD


def kept(opt):
    """What a checkpoint holds of each parameter's direction, and the norm."""
    state = opt.state_dict()["state"]
    found = [state.get(i, {}).get(DIRECTION) for i in range(len(SHAPES))]
    return [None if d is None else d.clone() for d in found], state[0][LENGTH].clone()


def unaware(opt, params, surface, i):
    """A SAM loop that knows nothing of ``when``: its second backward may be at w."""
    give(params, surface.gradient(params, i, 0))
    opt.first_step(zero_grad=True)
    give(params, surface.gradient(params, i, 1))
    opt.second_step(zero_grad=True)


def closure(opt, params, surface, i):
    half = iter((0, 1))

    def run():
        opt.zero_grad()
        give(params, surface.gradient(params, i, next(half)))

    opt.step(run)


@pytest.mark.parametrize("loop", [unaware, closure])
def test_other_loops(loop, backend):
    opt, params = make("looksam", backend=backend)
    surface, member = Surface(SHAPES), oracle("looksam")
    for i in range(STEPS):
        loop(opt, params, surface, i)
        member.step(surface)
        compare(params, member)


def test_micro_batches(backend):
    """Guards ``accumulate``: one pass over the micro-batches in a step that does not climb."""
    runs = []
    for size in (4, 2):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 1).double()
        options = {"blend": LookSAM(k=2), "backend": backend, "model": model, "lr": 0.1}
        opt = FusedSAM(model.parameters(), SGD, **options)
        calls = []

        def run(x, model=model, calls=calls):
            calls.append(len(x))
            model(x).pow(4).sum().backward()

        for _ in range(3):
            opt.accumulate(torch.randn(4, 3).double().split(size), run)
        assert len(calls) == (2 + 1 + 2) * (4 // size)
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("base", ["sgd", "adamw", "adamax"])
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_resumed_run_goes_on_to_the_bit(base, taken, backend):
    """Guards both kinds of step, and a base optimizer that steps by itself."""
    surface = Surface(SHAPES, {(0, 1): (1,), (2, 0): (2,)})
    opt, params = make("looksam", base, backend)
    for i in range(taken):
        step(opt, params, surface, i)
    assert not any(name.startswith("sam") for entry in opt.state.values() for name in entry)
    saved = through_a_file(opt.state_dict())
    assert saved["state"][0][LENGTH].shape == () and DIRECTION in saved["state"][3]
    twin, others = make("looksam", base, backend)
    for i in range(2):
        step(twin, others, Surface(SHAPES), i)  # it has a direction that is to go
    for p, w in zip(others, params, strict=True):
        p.data.copy_(w.detach())
    twin.load_state_dict(saved)
    for i in range(taken, taken + 3):
        step(opt, params, surface, i)
        step(twin, others, surface, i)
        for p, w in zip(params, others, strict=True):
            assert_same_bits(p, w.detach())

    # Loading what is there changes nothing: some of it is the optimizer's own memory.
    length = twin._facts.engine.layout.members.numbers[LENGTH]
    before = length.clone()
    twin.load_state_dict(twin.state_dict())
    assert_same_bits(length, before)

    # Without it, it begins anew.
    for entry in saved["state"].values():
        entry.pop(DIRECTION, None)
        entry.pop(LENGTH, None)
    twin.load_state_dict(saved)
    assert before and not length
    saved["state"][0][LENGTH] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'sam_direction_norm' of parameter 0.*shape \(2,\)"):
        twin.load_state_dict(saved)


def test_state_is_there_for_who_asks_beforehand(backend):
    """Guards a checkpoint library that loads into what ``state_dict()`` shows."""
    opt, params = make("looksam", backend=backend)
    for group in opt.param_groups:
        group["lr"] = 0.0
    give(params, [torch.zeros_like(p) for p in params])
    opt.step()
    directions, length = kept(opt)
    assert not length and not any(d.any() for d in directions)


def test_a_step_knows_the_norm_that_it_has_gone_by(backend):
    opt, params = make("looksam", backend=backend)
    surface = Surface(SHAPES)
    step(opt, params, surface, 0)
    assert opt.last_step.climbed and opt.last_step.cosine is not None
    gradient = surface.gradient(params, 1, 0)
    step(opt, params, surface, 1)
    assert not opt.last_step.climbed and opt.last_step.second_grad_norm is None
    assert opt.last_step.grad_norm.item() == pytest.approx(norm(gradient), rel=1e-12)


def test_the_direction_survives_a_new_layout(backend):
    """Guards a group that is added, a parameter in other memory, a copy, a trial step."""
    opt, params = make("looksam", backend=backend)
    twin, others = make("looksam", backend=backend)
    surface = Surface(SHAPES)
    for i in range(STEPS):
        step(opt, params, surface, i)
        if i == 1:
            twin.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        if i == 3:
            others[1].data = others[1].detach().clone()
        if i == 5:
            twin = copy.deepcopy(twin)
            others = [p for group in twin.param_groups for p in group["params"]][: len(SHAPES)]
        step(twin, others, surface, i)
        for p, w in zip(params, others, strict=True):
            assert_same_bits(p, w.detach())
    for d, other in zip(kept(opt)[0], kept(twin)[0], strict=True):
        assert_same_bits(d, other)


@pytest.mark.parametrize("how", ["frozen", "frozen and gone", "in a group that does not climb"])
def test_who_takes_no_part_in_a_sam_step_has_no_direction(how, backend):
    """Guards the steps after it: they would go along the direction of an older one."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    opt = FusedSAM(params, SGD, lr=0.1, blend=LookSAM(k=1), backend=backend)

    def sam_step():
        for half in (opt.first_step, opt.second_step):
            for p in params:
                p.grad = torch.randn(3) if p.requires_grad else None
            half()

    sam_step()
    if how == "in a group that does not climb":
        opt.add_param_group({"params": [opt.param_groups[0]["params"].pop(0)], "ascent": None})
    else:
        params[0].requires_grad_(False)
        params[0].grad = None
        if how == "frozen and gone":
            params[0].data = params[0].data.clone()
    sam_step()
    params[0].requires_grad_(True)
    kept = opt._facts.engine.layout.members.values()
    assert [bool(kept[p][DIRECTION].any()) for p in params] == [False, True, True]


def test_a_checkpoint_has_the_norm_though_a_parameter_is_listed_twice(backend):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = FusedSAM(params, SGD, lr=0.1, blend=LookSAM(k=1), backend=backend)
    for half in (opt.first_step, opt.second_step):
        give(params, [torch.randn(3) for _ in params])
        half()
    before = opt.state_dict()["state"][0][LENGTH]
    opt.param_groups[0]["params"].append(params[0])
    found = [e[LENGTH] for e in opt.state_dict()["state"].values() if LENGTH in e]
    assert found == [before] and before > 0


def test_a_step_of_nothing_but_frozen_parameters_is_none(backend):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = FusedSAM(params, SGD, lr=0.1, blend=LookSAM(k=1), backend=backend)
    for p in params:
        p.requires_grad_(False)
        p.data = p.data.clone()
    opt.first_step()
    opt.second_step()
    assert all(torch.equal(p, torch.ones(3)) for p in params)


def test_a_trial_step_climbs_and_leaves_the_direction_alone(backend):
    """Guards ``check`` in a step that would not climb."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    opt = FusedSAM(model.parameters(), SGD, lr=0.1, blend=LookSAM(k=5), backend=backend)
    x = torch.randn(5, 3)
    opt.step(lambda: model(x).square().sum().backward())
    opt.zero_grad()
    before, length = kept(opt)
    assert length > 0
    assert opt.check(model, lambda: model(x).square().sum().backward()).is_right
    after, same = kept(opt)
    assert_same_bits(length, same)
    for d, other in zip(before, after, strict=True):
        assert_same_bits(d, other)
    assert opt.param_groups[0]["blend"] == "looksam" and opt.param_groups[0]["sam_step"] == 1


def test_the_loss_scale_does_not_show(backend):
    """Guards a direction of gradients of another scale; a step with infinite ones is skipped."""
    ends = []
    for scales in ((1.0,) * 6, (1024.0, 4.0, 2.0**20, 64.0, 2.0, 8.0)):
        opt, params = make("looksam", backend=backend)
        surface = Surface(SHAPES, broken={(2, 0), (2, 1)})
        for i, scale in enumerate(scales):
            opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(float(i == 2))
            give(params, surface.gradient(params, i, 0), scale)
            if opt.first_step(zero_grad=True):
                give(params, surface.gradient(params, i, 1), scale)
            opt.second_step(zero_grad=True)
        ends.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


def plain_step_after(first, second, gradient, backend, alpha=0.5, dtype=None, **options):
    """How far a step of SGD that does not climb moves, in units of lr, after a SAM step."""
    p = torch.nn.Parameter(torch.zeros_like(first, dtype=dtype))
    blend = LookSAM(k=2, alpha=alpha)
    opt = FusedSAM([p], SGD, rho=0.1, lr=1.0, blend=blend, backend=backend, **options)
    give([p], [first])
    assert opt.first_step()
    give([p], [second])
    opt.second_step()
    opt.param_groups[0]["lr"] = 1.0
    with torch.no_grad():
        p.zero_()
    give([p], [gradient])
    assert not opt.first_step()
    opt.second_step()
    return -p.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_nearly_parallel(dtype, backend):
    """Guards the norm at cos = 1 - 5e-7, which sums in float32 get wrong by 11 %."""
    generator = torch.Generator().manual_seed(0)
    g, other = (torch.randn(4099, dtype=torch.float64, generator=generator) for _ in range(2))
    other = other - other.dot(g) / g.dot(g) * g
    second = (g + 1e-3 * norm([g]) / norm([other]) * other).to(dtype)
    g = g.to(dtype)
    moved = plain_step_after(g, second, g, backend).double() - g.double()
    assert abs(moved.norm() / (0.5 * g.double().norm()) - 1) < 1e-3
    # Of a coarse direction only its rounding is left: 2**-24 of what is 1000 times as large.
    assert torch.nn.functional.cosine_similarity(moved, other, dim=0) > 1 - 1e-6


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([1.0, 2.0, 3.0], [0.3, 0.6, 0.9]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([math.inf, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [1.0, math.nan, 3.0]),
    ],
)
def test_where_there_is_no_direction_the_step_is_the_base_optimizers(first, second, backend):
    """Guards 0 / 0, what rounding leaves of parallel gradients, and zero times infinity."""
    gradient = torch.tensor([3.0, -1.0, 2.0])
    moved = plain_step_after(torch.tensor(first), torch.tensor(second), gradient, backend)
    torch.testing.assert_close(moved, gradient, rtol=0, atol=0)


def test_where_the_first_gradient_is_zero_the_direction_is_the_second(backend):
    zero, second = torch.zeros(3), torch.tensor([3.0, 0.0, 4.0])
    moved = plain_step_after(zero, second, torch.tensor([0.0, 2.0, 0.0]), backend)
    torch.testing.assert_close(moved, torch.tensor([0.6, 2.0, 0.8]))


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_direction_of_half_precision_is_in_float32(dtype, masters, backend):
    """Guards a direction of which the dtype would leave nothing: 1e-3 of gradients of 1e-4."""
    first = torch.tensor([1.0, 2.0, -1.0, 0.5]) * 2**-13
    second = first + torch.tensor([0.0, 0.0, 1.0, 0.0]) * 2**-20
    first, second = first.to(dtype), second.to(dtype)
    gradient = torch.tensor([1.0, 0.0, 0.0, 0.0]).to(dtype)
    options = {"dtype": dtype, "master_weights": masters}
    moved = plain_step_after(first, second, gradient, backend, **options).double()
    g, h = first.double(), second.double()
    direction = h - g.dot(h) / g.dot(g) * g
    want = gradient.double() + 0.5 * direction / (direction.norm() or 1)
    torch.testing.assert_close(moved, want, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_an_update_that_fails_leaves_no_norm_of_another_direction(backend):
    """Guards the steps after it: of two buckets one may have the new direction, one the old."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=t)) for t in (torch.float32, torch.float64)]
    opt = FusedSAM(params, SGD, lr=0.1, blend=LookSAM(k=2), backend=backend)

    def half(seed):
        generator = torch.Generator().manual_seed(seed)
        give(params, [torch.randn(3, generator=generator).to(p.dtype) for p in params])

    half(0)
    opt.first_step()
    half(1)
    opt.second_step()
    half(2)
    opt.first_step()
    opt.second_step()
    length = opt._facts.engine.layout.members.numbers[LENGTH]
    assert length > 0
    half(3)
    assert opt.first_step()
    half(4)
    backends = opt._facts.engine.backends
    backends[1] = Failing(backends[1], "update_", "before")
    with pytest.raises(MemoryError):
        opt.second_step()
    assert length == 0
    opt.restore()


def test_a_group_that_becomes_one_of_looksam(backend):
    """Guards the count of steps, which the groups did not hold before."""
    opt, params = make("sam", backend=backend)
    surface, member = Surface(SHAPES), oracle("looksam")
    for group in opt.param_groups:
        group.update(LookSAM(k=2, alpha=0.6).options())
    for i in range(STEPS):
        step(opt, params, surface, i)
        member.step(surface)
        compare(params, member)
    assert opt.when == Every(2)


def test_before_the_first_sam_step_it_is_the_base_optimizer(backend):
    opt, params = make("looksam", backend=backend, blend=LookSAM(None, 0.6), when=From(3))
    surface, member = Surface(SHAPES), oracle("sam", climbs=lambda i: i >= 3)
    for i in range(4):
        step(opt, params, surface, i)
        member.step(surface)
        compare(params, member)


def test_what_makes_no_sense_is_refused(backend):
    p = torch.nn.Parameter(torch.ones(2))

    def make_one(**options):
        return FusedSAM([p], SGD, lr=0.1, backend=backend, **options)

    assert str(LookSAM()) == "LookSAM(k=10, alpha=0.7)"
    assert make_one(blend=LookSAM(k=5)).when == Every(5)
    assert make_one(blend=LookSAM(k=5), when=Every(5)).when == Every(5)
    assert make_one(blend=LookSAM(k=None), when=AESAM(9)).when == AESAM(9)
    assert make_one(blend=GSAM(0.1)).when == Always()
    for k, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k must be"):
            LookSAM(k=k)
    with pytest.raises(ValueError, match=r"alpha must be finite and >= 0, got -1"):
        LookSAM(alpha=-1)
    with pytest.raises(ValueError, match=r"with k=10 .*when=Every\(k=5\).*leave when out"):
        make_one(blend=LookSAM(), when=Every(5))
    with pytest.raises(ValueError, match=r"with k=None .*when=Always\(\).*give it a k"):
        make_one(blend=LookSAM(k=None))
    with pytest.raises(ValueError, match=r"blend='looksam' needs a gradient at w.*'msam'"):
        make_one(blend=LookSAM(), ascent=MSAM(), momentum=0.9)
    q = torch.nn.Parameter(torch.ones(2))
    rows = [{"params": [p], "blend": LookSAM(k=2)}, {"params": [q], "blend": LookSAM(k=3)}]
    with pytest.raises(ValueError, match="blend_k=2 and 3"):
        FusedSAM(rows, SGD, lr=0.1)
