"""Which steps climb, in every style of loop, against the oracle of tests/family.py in float64."""

import copy
import io
import math

import pytest
import torch
from family import Member, Surface, give, norm, parameters
from oracle import assert_same_bits
from torch import nn

from fused_sam import FusedSAM
from fused_sam.schedule import AESAM, Always, Every, From, Probability, Span, When

SHAPES = [(5,), (3, 4), ()]
STEPS = 7
# Which steps climb by each. The draws are random.Random's, which are the same everywhere.
SCHEDULES = {
    "always": (Always(), [0, 1, 2, 3, 4, 5, 6]),
    "every": (Every(3), [0, 3, 6]),
    "from": (From(4), [4, 5, 6]),
    "span": (Span(1, 3), [1, 2]),
    "probability": (Probability(0.5, seed=2), [2, 3, 6]),
    "never": (Probability(0.0), []),
}


def start(dtype=torch.float64):
    return parameters(SHAPES, dtype)


def aware(opt, params, surface, i):
    """A loop that asks whether it climbed."""
    give(params, surface.gradient(params, i, 0))
    if opt.first_step(zero_grad=True):
        give(params, surface.gradient(params, i, 1))
    opt.second_step(zero_grad=True)


def aware_keeping(opt, params, surface, i):
    """The same without ``zero_grad``, as under a GradScaler."""
    give(params, surface.gradient(params, i, 0))
    if opt.first_step():
        give(params, surface.gradient(params, i, 1))
    opt.step()


def closure(opt, params, surface, i):
    calls = []

    def run():
        give(params, surface.gradient(params, i, len(calls)))
        calls.append(opt.is_perturbed)
        return len(calls)

    assert opt.step(run) == 1
    assert calls == [False, True][: len(calls)]


def accumulate(opt, params, surface, i):
    halves = []

    def run(batch):
        for p, g in zip(params, surface.gradient(params, i, len(halves)), strict=True):
            p.grad = g if p.grad is None else p.grad + g
        halves.append(opt.is_perturbed)

    opt.accumulate([None], run)
    assert halves == [False, True][: len(halves)]


def compare(params, member):
    # Float64 all the way: rounding, carried on by seven steps of numbers of order one.
    for p, w in zip(params, member.weights, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-11, atol=1e-11)


def make(when, base=torch.optim.SGD, backend="auto", **options):
    params = start()
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02, "rho": 0.3, **options}
    model = nn.ParameterList(params)
    opt = FusedSAM(params, base, when=when, backend=backend, model=model, **options)
    return opt, params, model


def oracle(climbs, **options):
    group = {"params": range(3), "lr": 0.05, "momentum": 0.9, "weight_decay": 0.02, "rho": 0.3}
    return Member(start(), [{**group, **options}], torch.optim.SGD, climbs)


@pytest.mark.parametrize("loop", [aware, aware_keeping, closure, accumulate])
@pytest.mark.parametrize("name", SCHEDULES)
def test_some_steps_climb_and_the_others_are_the_base_optimizers(name, loop, backend):
    """Guards the numbers in every style, and that a plain step has one pass."""
    when, climbing = SCHEDULES[name]
    opt, params, _model = make(when, backend=backend)
    surface, member = Surface(SHAPES), oracle(lambda i: i in climbing)
    for i in range(STEPS):
        loop(opt, params, surface, i)
        member.step(surface)
        compare(params, member)
        assert not opt.is_perturbed


@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_loop_that_knows_nothing_of_it_stays_right(zero_grad, backend):
    """Its second backward is at w in a plain step, and that gradient is used."""
    opt, params, _model = make(Every(2), backend=backend)
    surface, member = Surface(SHAPES), oracle(lambda i: True)
    member.climb = lambda g: (
        Member.climb(member, g) if (member.number - 1) % 2 == 0 else member.weights
    )
    for i in range(STEPS):
        give(params, surface.gradient(params, i, 0))
        opt.first_step(zero_grad=zero_grad)
        opt.zero_grad()
        give(params, surface.gradient(params, i, 1))
        opt.second_step(zero_grad=True)
        member.step(surface)
        compare(params, member)


def test_a_loop_that_knows_nothing_of_it_updates_statistics_once():
    """Guards BatchNorm with an attached model: the second pass of a plain step is one too."""
    counts = []
    for when in (Always(), Probability(0.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        opt = FusedSAM(model.parameters(), when=when, lr=0.1, model=model)
        outputs = []
        for half in (opt.first_step, opt.second_step):
            outputs.append(model(torch.ones(6, 3).cumsum(0)))
            outputs[-1].square().sum().backward()
            half(zero_grad=True)
        counts.append(model[1].num_batches_tracked.item())
    assert counts == [1, 1]
    assert torch.equal(*outputs)  # at the same weights with the same masks


def test_given_up_steps_do_not_count(backend):
    opt, params, _model = make(Every(2), backend=backend)
    surface, member = Surface(SHAPES), oracle(lambda i: i % 2 == 0)
    for i in range(4):
        before = [p.detach().clone() for p in params]
        give(params, surface.gradient(params, i, 0))
        assert opt.first_step(zero_grad=True) == (i % 2 == 0)
        opt.restore()
        for p, w in zip(params, before, strict=True):
            assert_same_bits(p, w)
        aware(opt, params, surface, i)
        member.step(surface)
        compare(params, member)


@pytest.mark.parametrize("when", [Every(3), Probability(0.5, 2), AESAM(STEPS)], ids=str)
@pytest.mark.parametrize("way", ["file", "copy"])
def test_a_resumed_run_goes_on_as_the_first(when, way, backend):
    """Guards counters and averages in checkpoints and copies, bit for bit."""
    surface = Surface(SHAPES)
    opt, params, _model = make(when, backend=backend)
    for i in range(4):
        aware(opt, params, surface, i)
    if way == "file":
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        twin, others, _other_model = make(when, backend=backend)
        for p, w in zip(others, params, strict=True):
            p.data.copy_(w.detach())
        twin.load_state_dict(torch.load(file))
    else:
        twin = copy.deepcopy(opt)
        others = twin.param_groups[0]["params"]
    for i in range(4, STEPS):
        aware(opt, params, surface, i)
        aware(twin, others, surface, i)
        for p, w in zip(params, others, strict=True):
            assert_same_bits(p, w.detach())


def test_a_group_that_comes_later_counts_like_the_others():
    opt, params, _model = make(Every(2))
    surface = Surface(SHAPES)
    aware(opt, params, surface, 0)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["sam_step"] for group in opt.param_groups] == [1, 1]


def test_without_a_schedule_nothing_is_counted():
    opt, _params, _model = make(Always())
    assert "sam_step" not in opt.param_groups[0]


# ------------------------------------------------------------------------------------------- AE-SAM


def aesam_by_hand(squares, total, first=1.0, last=-1.0, decay=0.9):
    """Jiang et al. 2023, equations 4 to 6: which steps climb, and the averages in the end."""
    mean, variance, climbs = 0.0, math.exp(-10), []
    for t, square in enumerate(squares):
        if math.isfinite(square):
            mean = decay * mean + (1 - decay) * square
            variance = decay * variance + (1 - decay) * (square - mean) ** 2
        c = first + (last - first) * min(t / total, 1)
        climbs.append(math.isfinite(square) and square >= mean + c * variance**0.5)
    return climbs, mean, variance


def test_aesam_climbs_where_the_gradient_is_large(backend):
    surface = Surface(SHAPES, missing={(2, 0): (1,)}, broken={(4, 0)})
    opt, params, _model = make(AESAM(5), backend=backend)
    squares, climbed = [], []
    for i in range(STEPS):
        squares.append(norm(surface.gradient(params, i, 0)) ** 2)
        first = [p.detach().clone() for p in params]
        grads = surface.gradient(params, i, 0)
        give(params, grads)
        climbed.append(opt.first_step(zero_grad=True))
        for p, w in zip(params, first, strict=True):
            assert climbed[-1] or torch.equal(p, w)
        if climbed[-1]:
            give(params, surface.gradient(params, i, 1))
        elif i == 4:
            opt.zero_grad()
            opt._facts.aside = []  # the infinite gradient; a GradScaler would skip it
        opt.second_step(zero_grad=True)
    climbs, mean, variance = aesam_by_hand(squares, 5)
    assert climbed == climbs and {True, False} <= set(climbs)
    (group,) = opt.param_groups
    assert group["sam_mean"] == pytest.approx(mean, rel=1e-11)
    assert group["sam_variance"] == pytest.approx(variance, rel=1e-11)


def test_aesam_needs_the_loss_scale():
    """Guards against scaled gradients in its averages: the way is named, nothing is lost."""
    decisions = []
    for scales in ([1.0] * STEPS, [1024.0, 4.0, 64.0, 1.0, 2.0**20, 16.0, 256.0]):
        opt, params, _model = make(AESAM(3))
        scaler = torch.amp.GradScaler("cpu")
        surface = Surface(SHAPES)
        climbed = []
        for i, scale in enumerate(scales):
            scaler.scale(torch.zeros(()))  # which makes its scale
            scaler.update(scale)
            grads = surface.gradient(params, i, 0)
            give(params, [g * scale for g in grads])
            climbed.append(opt.first_step(scaler=scaler))
            if climbed[-1]:
                give(params, [g * scale for g in surface.gradient(params, i, 1)])
            scaler.step(opt)
        decisions.append((climbed, [p.detach().clone() for p in params]))
    assert decisions[0][0] == decisions[1][0]
    torch.testing.assert_close(decisions[0][1], decisions[1][1], rtol=1e-11, atol=1e-11)

    before = [p.detach().clone() for p in params]
    scaler.update(scale)
    give(params, [g * scale for g in surface.gradient(params, 0, 0)])
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"first_step\(scaler=scaler\)"):
        scaler.step(opt)
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)


def test_aesam_under_a_scaler_with_a_closure():
    opt, params, _model = make(AESAM(3))
    twin, others, _other = make(AESAM(3))
    scaler = torch.amp.GradScaler("cpu")
    surface = Surface(SHAPES)
    for i in range(STEPS):
        scaler.scale(torch.zeros(()))
        scale = (4.0, 1024.0)[i % 2]
        scaler.update(scale)

        def run(i=i, scale=scale):
            half = int(opt.is_perturbed)
            give(params, [scale * g for g in surface.gradient(params, i, half)])

        scaler.step(opt, run)
        aware(twin, others, surface, i)
    torch.testing.assert_close(params, others, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_sees_the_gradients_that_a_plain_step_keeps(unscale):
    """Guards against an update that no GradScaler has looked at: the gradients were put aside."""
    opt, params, _model = make(Every(2))
    surface = Surface(SHAPES, broken={(3, 0)})
    twin, others, _other = make(Every(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for i in range(STEPS):
        scaler.scale(torch.zeros(()))
        give(params, [64.0 * g for g in surface.gradient(params, i, 0)])
        if opt.first_step(zero_grad=True, scaler=scaler):
            give(params, [64.0 * g for g in surface.gradient(params, i, 1)])
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update(64.0)
        opt.zero_grad()
        if i != 3:
            aware(twin, others, surface, i)
        else:
            for group in twin.param_groups:
                group["sam_step"] += 1
    torch.testing.assert_close(params, others, rtol=1e-11, atol=1e-11)


def test_local_ascents_obey_and_aesam_cannot_judge_them():
    opt, params, _model = make(Every(2))
    perturbed = []

    def run(batch):
        give(params, Surface(SHAPES).gradient(params, batch, 0))
        perturbed.append(opt.is_perturbed)

    for _ in range(2):
        opt.accumulate([0, 1], run, ascent="local")
    assert perturbed == [False, True, False, True, False, False]
    opt, params, _model = make(AESAM(3))
    with pytest.raises(ValueError, match="global"):
        opt.accumulate([0, 1], run, ascent="local")


# ------------------------------------------------------------------------------------ the values


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Every(0), ValueError, "k must be >= 1, got 0"),
        (lambda: Every(2.0), TypeError, "k must be an integer, got 2.0"),
        (lambda: From(-1), ValueError, "start must be >= 0"),
        (lambda: Span(5, 4), ValueError, "stop must be >= 5, got 4"),
        (lambda: Probability(1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: Probability(0.5, seed="a"), TypeError, "seed must be an integer"),
        (lambda: Probability(math.nan), ValueError, "p must be finite"),
        (lambda: AESAM(0), ValueError, "total_steps must be >= 1"),
        (lambda: AESAM(9, decay=1.0), ValueError, r"decay must be in \[0, 1\)"),
        (lambda: AESAM(9, lambda1="x"), TypeError, "lambda1 must be a number"),
        (lambda: AESAM(9, lambda1=-1.0, lambda2=1.0), ValueError, "got -1.0 and 1.0.*exchange"),
        (lambda: FusedSAM(start(), lr=0.1, when=3), TypeError, r"such as Every\(5\).*got 3"),
    ],
)
def test_bad_schedules(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_schedule_of_ones_own():
    class OddSteps(When):
        def climbs(self, step):
            return step % 2 == 1

    opt, params, _model = make(OddSteps())
    give(params, Surface(SHAPES).gradient(params, 0, 0))
    assert not opt.first_step()
    assert repr(Span(1, 3)) == "Span(start=1, stop=3)"


def test_draws_are_as_frequent_as_asked():
    share = sum(Probability(0.3, 7).climbs(i) for i in range(10_000)) / 10_000
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 10_000)
