"""Momentum-SAM: one pass, weights that live ahead of w, against the oracle of tests/family.py."""

import copy
import io
import pickle

import pytest
import torch
from family import MSAM as Oracle
from family import Surface, give, parameters
from oracle import assert_same_bits
from torch import nn

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM
from fused_sam.backends.base import Backend
from fused_sam.batchnorm import recompute_batchnorm
from fused_sam.blends import GSAM
from fused_sam.schedule import Every

SHAPES = [(5,), (3, 4), (2,)]
STEPS = 6
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd-decay": (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "sgd-dampening": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.2}),
}


class AdamOracle(Oracle):
    state = "exp_avg"


def start(dtype=torch.float64):
    return parameters(SHAPES, dtype)


def make(name="sgd-decay", backend="auto", dtype=torch.float64, groups=None, **options):
    base, more = BASES[name]
    params = start(dtype)
    opt = FusedSAM(
        groups(params) if groups else params,
        base,
        ascent=MSAM(),
        backend=backend,
        **{"lr": 0.05, "rho": 0.4, **more, **options},
    )
    return opt, params


def oracle(name="sgd-decay", groups=None, **options):
    base, more = BASES[name]
    cls = Oracle if base is torch.optim.SGD else AdamOracle
    common = {"lr": 0.05, "rho": 0.4, "weight_decay": 0.0, **more, **options}
    rows = groups or [{"params": range(3)}]
    return cls(start(), [{**common, **row} for row in rows], base)


def plain(opt, params, surface, i):
    give(params, surface.gradient(params, i, 0))
    opt.step()


def two_steps(opt, params, surface, i):
    give(params, surface.gradient(params, i, 0))
    assert not opt.first_step(zero_grad=True)
    opt.second_step()


def unaware(opt, params, surface, i):
    """A SAM loop that knows nothing of it: its second backward is at the same weights."""
    give(params, [torch.full_like(p, torch.nan) for p in params])
    opt.first_step(zero_grad=True)
    give(params, surface.gradient(params, i, 0))
    opt.second_step()


def closure(opt, params, surface, i):
    def run():
        opt.zero_grad()
        give(params, surface.gradient(params, i, 0))
        return "loss"

    assert opt.step(run) == "loss"


def compare(params, member, bound=1e-11):
    for p, w in zip(params, member.weights, strict=True):
        torch.testing.assert_close(p.detach().double(), w.detach(), rtol=bound, atol=bound)


@pytest.mark.parametrize("loop", [plain, two_steps, unaware, closure])
@pytest.mark.parametrize("name", BASES)
def test_the_weights_live_ahead_of_w(name, loop, backend):
    """Guards the sign, the norm, the way back, and where the decay is taken, in float64."""
    missing = {(2, 0): (1,), (3, 0): (0, 2)}
    opt, params = make(name, backend)
    surface, member = Surface(SHAPES, missing), oracle(name)
    for i in range(STEPS):
        loop(opt, params, surface, i)
        member.step(surface)
        compare(params, member)
        assert opt.is_perturbed
        away = [p.detach().clone() for p in params]
        opt.eval()
        opt.eval()
        for p, w, out in zip(params, member.weights, member.out, strict=True):
            torch.testing.assert_close(p.detach(), (w - out).detach(), rtol=1e-11, atol=1e-11)
        opt.train()
        opt.train()
        for p, w in zip(params, away, strict=True):
            assert_same_bits(p, w)


def test_groups_and_those_that_stay(backend):
    """Guards per-group rho, decay, maximize and ascent=None."""
    options = [
        {"rho": 0.7, "weight_decay": 0.3, "lr": 0.02},
        {"ascent": None, "weight_decay": 0.2},
        {"maximize": True},
    ]

    def groups(params):
        return [{"params": [p], **o} for p, o in zip(params, options, strict=True)]

    opt, params = make("sgd-decay", backend, groups=groups)
    rows = [{"params": [i], **o} for i, o in enumerate(options)]
    surface, member = Surface(SHAPES), Staying("sgd-decay", rows)
    for i in range(STEPS):
        plain(opt, params, surface, i)
        member.step(surface)
        compare(params, member)


class Staying(Oracle):
    """The oracle with a group that does not climb, and one that goes uphill."""

    def __init__(self, name, rows):
        base, more = BASES[name]
        common = {"lr": 0.05, "rho": 0.4, **more}
        super().__init__(start(), [{**common, **row} for row in rows], base)

    def step(self, surface, skip=False):
        i = self.number
        self.number += 1
        g = surface.gradient(self.weights, i, 0)
        with torch.no_grad():
            for j, (w, out) in enumerate(zip(self.weights, self.out, strict=True)):
                sign = -1 if self.row[j].get("maximize") else 1
                g[j] = g[j] + sign * self.row[j].get("weight_decay", 0.0) * w
                w -= out
        for group in self.base.param_groups:
            group["weight_decay"] = 0.0
        self.descend(g)
        taking = [self.row[j].get("ascent", "sam") is not None for j in range(3)]
        v = [self.base.state[w]["momentum_buffer"] for w in self.weights]
        length = sum((x**2).sum() for x, t in zip(v, taking, strict=True) if t) ** 0.5
        with torch.no_grad():
            for j, w in enumerate(self.weights):
                self.out[j] = -self.row[j]["rho"] / length * v[j] * taking[j]
                w += self.out[j]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("loop", ["step", "closure"])
def test_under_a_scaler_and_clipped(loop, clip, dtype, backend):
    """Guards the scale of the decay, clipping before it, and skipped steps, which stay ahead."""
    opt, params = make("sgd-decay", backend, dtype, max_grad_norm=clip)
    broken = {(3, 0)}
    surface, member = Surface(SHAPES, broken=broken), oracle("sgd-decay")
    member.clip = None
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    for i in range(STEPS):
        scaler.scale(torch.zeros(()))
        before = [p.detach().clone() for p in params]
        scale = scaler.get_scale()
        if loop == "step":
            give(params, surface.gradient(params, i, 0), scale)
            scaler.step(opt)
        else:
            scaler.step(opt, lambda i=i, s=scale: give(params, surface.gradient(params, i, 0), s))
        scaler.update(None if loop == "step" else scale)  # it sees no gradients of closures
        skip = (i, 0) in broken
        if clip is not None and not skip:
            inner = surface.gradient
            surface.gradient = lambda w, i, h, inner=inner: clipped(inner(w, i, h), clip)
            member.step(surface)
            surface.gradient = inner
        else:
            member.step(surface, skip)
        compare(params, member, 1e-11 if dtype == torch.float64 else 1e-4)
        if skip:
            for p, w in zip(params, before, strict=True):
                assert_same_bits(p, w)


def clipped(grads, most):
    length = torch.cat([g.flatten() for g in grads]).norm()
    return [g * min(1.0, most / (length.item() + 1e-6)) for g in grads]


def test_rho_of_the_way_out_is_that_of_the_way_back(backend):
    opt, params = make("sgd", backend)
    twin, others = make("sgd", backend)
    surface = Surface(SHAPES)
    plain(opt, params, surface, 0)
    plain(twin, others, surface, 0)
    opt.param_groups[0]["rho"] = 3.0
    opt.eval()
    twin.eval()
    for p, w in zip(params, others, strict=True):
        assert_same_bits(p, w.detach())


@pytest.mark.parametrize("name", ["sgd-decay", "adamw"])
def test_a_resumed_run_goes_on_as_the_first(name, backend):
    opt, params = make(name, backend)
    surface = Surface(SHAPES)
    for i in range(3):
        plain(opt, params, surface, i)
    with pytest.raises(RuntimeError, match=r"optimizer\.eval\(\)"):
        opt.state_dict()
    with pytest.raises(RuntimeError, match=r"optimizer\.eval\(\)"):
        copy.deepcopy(opt)
    opt.eval()
    file = io.BytesIO()
    torch.save((opt.state_dict(), params), file)
    opt.train()
    file.seek(0)
    twin, others = make(name, backend)
    state, weights = torch.load(file, weights_only=False)
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w.data)
    twin.load_state_dict(state)
    give(others, surface.gradient(others, 3, 0))
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        twin.step()
    twin.train()
    for i in range(3, STEPS):
        plain(opt, params, surface, i)
        plain(twin, others, surface, i)
        for p, w in zip(params, others, strict=True):
            assert_same_bits(p, w.detach())


def test_what_is_written_ahead_of_w_is_not_lost_silently(backend):
    """A model's checkpoint loaded while its weights are ahead would be undone by the next step."""
    opt, params = make("sgd", backend)
    surface = Surface(SHAPES)
    plain(opt, params, surface, 0)
    with torch.no_grad():
        params[1].fill_(2.0)
    give(params, surface.gradient(params, 1, 0))
    with pytest.raises(RuntimeError, match=r"optimizer\.eval\(\) before model\.load_state_dict"):
        opt.step()
    opt.restore()
    opt.eval()
    with torch.no_grad():
        params[1].fill_(2.0)
    opt.train()
    plain(opt, params, surface, 1)
    opt.eval()
    assert 0 < (params[1] - 2.0).abs().max() < 1.0


def test_along_a_momentum_that_is_zero_there_is_no_climb(backend):
    """Guards a climb of weights that were ahead of w, and are to be at w."""
    opt, params = make("sgd", backend, momentum=0.5)  # 0.9 v - 0.9 v, fused, is not 0
    plain(opt, params, Surface(SHAPES), 0)
    opt.eval()
    home = [p.detach().clone() for p in params]
    opt.train()
    assert not any(map(torch.equal, params, home))
    give(params, [-0.5 * opt.state[p]["momentum_buffer"] for p in params])
    opt.step()
    for p, w in zip(params, home, strict=True):
        assert_same_bits(p, w)


def test_a_closure_that_raises_moves_nothing(backend):
    opt, params = make("sgd", backend)
    surface = Surface(SHAPES)
    plain(opt, params, surface, 0)
    before = [p.detach().clone() for p in params]

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        opt.step(fail)
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)
    plain(opt, params, surface, 1)


class Model(nn.ParameterList):
    """Runs where its parameters are, and notes it."""

    def __init__(self, params):
        super().__init__(params)
        self.seen = []

    def __call__(self):
        return nn.Module.__call__(self)  # which a ParameterList refuses

    def forward(self):
        self.seen.append([p.detach().clone() for p in self])


def both(backend="auto", **options):
    """An optimizer with an attached model, and the same without, which stays ahead."""
    opt, params = make(backend=backend, **options)
    model = Model(params)
    opt.attach(model)
    return opt, model, *make(backend=backend, **options)


def assert_equal(params, others):
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q.detach())


def in_evaluation(model):
    with torch.no_grad():
        model.eval()()
    model.train()


def test_with_an_attached_model_the_weights_come_and_go(backend):
    """Guards that w is there for whoever reads it between two steps, and in the middle of one."""
    opt, model, twin, others = both(backend)
    surface, missing = Surface(SHAPES, {(2, 0): (1,)}), []
    for i in range(STEPS):
        model()
        give(model, surface.gradient(model, i, 0))
        assert_equal(model, others)  # both are ahead
        if i == 3:
            in_evaluation(model)
        if i == 4:
            model.state_dict()
        assert opt.is_perturbed == (i in (1, 2, 5))
        plain(twin, others, surface, i)
        opt.step()
        assert not opt.is_perturbed
        missing.append([p.detach().clone() for p in others])
        twin.eval()
        assert_equal(model, others)
        opt.state_dict()
        copy.deepcopy([model, opt])
        twin.train()
        in_evaluation(model)
        assert_equal(model, model.seen[-1])


def test_the_way_ahead_is_as_long_as_rho_whoever_has_written_to_the_momentum():
    """Guards the sum that a step leaves for the next forward: it is that of what is there then."""
    opt, model, *_ = both()
    surface = Surface(SHAPES)
    for i in range(3):
        model()
        give(model, surface.gradient(model, i, 0))
        opt.step()
        home = [p.detach().clone() for p in model]
        if i == 1:
            opt.state[model[1]]["momentum_buffer"].mul_(3.0)
        model()
        way = torch.cat([(p.detach() - w).flatten() for p, w in zip(model, home, strict=True)])
        torch.testing.assert_close(way.norm().item(), 0.4, rtol=1e-12, atol=0)


def test_an_update_that_fails_leaves_w(backend):
    """Guards both buckets: one has made its update and waits for the climb, the other has not."""
    params = [*start(torch.float32), *start()]
    opt = FusedSAM(params, ascent=MSAM(), momentum=0.9, lr=0.05, rho=0.4, backend=backend)
    surface = Surface(SHAPES * 2)
    for i in range(2):
        plain(opt, params, surface, i)
    twin = copy.deepcopy(opt.eval() or [opt, params])
    opt.train()
    before = [p.detach().clone() for p in twin[1]]
    twin[0].train()
    plain(*twin, surface, 2)
    twin[0].eval()
    second = opt._facts.engine.buckets[1]
    opt._facts.engine.backends[1] = Failing()
    with pytest.raises(MemoryError):
        plain(opt, params, surface, 2)
    assert not opt.is_perturbed
    for p, w, stepped in zip(params, before, twin[1], strict=True):
        assert_same_bits(p, w if any(p is q for q in second.params) else stepped.detach())


class Failing:
    """A backend whose update fails."""

    def stays(self, bucket):
        return True

    def update_(self, *args, **options):
        raise MemoryError

    def restore_(self, bucket):
        Backend().restore_(bucket)


def test_copies_of_an_attached_model_are_refused_ahead_of_w_and_saving_goes_to_w():
    """A copy has taken some weights already when its hooks are asked."""
    opt, model, twin, others = both()
    surface = Surface(SHAPES)
    for each, params in ((opt, model), (twin, others)):
        plain(each, params, surface, 0)
    model()
    for fails in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
        with pytest.raises(RuntimeError, match=r"copying or pickling the model.*\.eval\(\)"):
            fails()
    twin.eval()
    assert_equal(model.state_dict().values(), others)
    copy.deepcopy(model)
    model()
    opt.first_step()
    with pytest.raises(RuntimeError, match="saving the model while the weights are perturbed"):
        model.state_dict()


def test_after_eval_an_attached_model_stays_at_w_until_train():
    opt, model, twin, others = both()
    surface = Surface(SHAPES)
    for each, params in ((opt, model), (twin, others)):
        plain(each, params, surface, 0)
    opt.eval()
    opt.eval()
    model()
    assert not opt.is_perturbed
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        plain(opt, model, surface, 1)
    opt.train()
    for each, params in ((opt, model), (twin, others)):
        plain(each, params, surface, 1)
    twin.eval()
    assert_equal(model, others)


def test_gradients_that_no_attached_model_took_are_refused():
    """Guards modules that run past the attached one, and those that train in evaluation mode."""
    opt, model, *_ = both()
    surface = Surface(SHAPES)
    plain(opt, model, surface, 0)
    with pytest.raises(RuntimeError, match="another module than that one runs, or runs in eval"):
        plain(opt, model, surface, 1)
    model.eval()
    opt.train()
    model()  # with gradients: who trains in evaluation mode says so
    plain(opt, model, surface, 1)


def test_a_closure_goes_ahead_by_itself():
    opt, model, twin, others = both()
    surface = Surface(SHAPES)
    for i in range(3):
        closure(opt, model, surface, i)
        closure(twin, others, surface, i)
    twin.eval()
    assert_equal(model, others)

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        opt.step(fail)
    assert_equal(model, others)


def test_a_resumed_run_knows_which_gradients_were_missing(backend):
    """Those parameters are at w until the next step, whether or not a checkpoint lies between."""
    missing = {(1, 0): (1,)}
    opt, model, *_ = both(backend)
    surface = Surface(SHAPES, missing)
    for i in range(2):
        model()
        plain(opt, model, surface, i)
    again, others, *_ = both(backend)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    others.load_state_dict(weights)
    again.load_state_dict(state)
    for i in range(2, 4):
        for each, params in ((opt, model), (again, others)):
            params()
            plain(each, params, surface, i)
    assert_equal(model, others)
    assert_equal(model.seen[2], others.seen[0])


def with_batchnorm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    model[1].momentum = 0.3
    opt = FusedSAM(model.parameters(), momentum=0.9, lr=0.1, rho=2.0, ascent=MSAM())
    data = [(torch.randn(6, 3, dtype=torch.float64), None) for _ in range(3)]

    def train():
        for x, _ in data:
            model(x).sigmoid().sum().backward()
            opt.step()
            opt.zero_grad()

    return opt, model, data, train


@pytest.mark.parametrize("removed", [0, 1])
def test_who_had_no_gradient_is_known_by_more_than_its_place(removed, backend):
    """Guards the way ahead after a parameter has left its group: the others have moved up there."""
    params = [nn.Parameter(torch.full((2,), float(i))) for i in range(4)]
    opt = FusedSAM(params, torch.optim.SGD, ascent=MSAM(), rho=1.0, lr=0.1, momentum=0.9)
    for missing in (None, 2):
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.ones(2)
        opt.step()
    opt.eval()
    w = [p.detach().clone() for p in params]
    del opt.param_groups[0]["params"][removed]
    opt.train()
    moved = [not torch.equal(p, old) for p, old in zip(params, w, strict=True)]
    assert moved == [i not in (2, removed) for i in range(4)]


def test_what_is_frozen_stays_at_w_until_it_has_a_gradient_again(backend):
    """Guards the way ahead of what was frozen and thawed: its old momentum leads nowhere."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = FusedSAM(params, torch.optim.SGD, ascent=MSAM(), rho=1.0, lr=0.1, momentum=0.9)

    def step():
        for p in params:
            p.grad = torch.ones(2) if p.requires_grad else None
        opt.step()
        opt.eval()

    def moved():
        w = [p.detach().clone() for p in params]
        opt.train()
        found = [not torch.equal(p, old) for p, old in zip(params, w, strict=True)]
        opt.eval()
        return found

    step()
    params[0].requires_grad_(False)
    params[0].grad = None
    assert moved() == [False, True]
    opt = copy.deepcopy(opt)  # which does not take in what is frozen
    params = opt.param_groups[0]["params"]
    opt.train()
    step()
    params[0].requires_grad_(True)
    assert moved() == [False, True]
    opt.train()
    step()
    assert moved() == [True, True]


@pytest.mark.parametrize("attach", [False, True])
def test_statistics_are_those_of_the_weights_ahead_until_they_are_recomputed(attach):
    """One pass: BatchNorm's running statistics are updated in it, once, ahead of w."""
    opt, model, data, train = with_batchnorm()
    if attach:
        opt.attach(model)
    train()
    assert model[1].num_batches_tracked == 3
    ahead = model[1].running_mean.clone()
    if attach:
        recompute_batchnorm(model, data)
        assert opt._facts.training
    else:
        with pytest.raises(RuntimeError, match=r"recompute_batchnorm\(\).*optimizer\.eval\(\)"):
            recompute_batchnorm(model, data)
        assert_same_bits(model[1].running_mean, ahead)
        opt.eval()
        recompute_batchnorm(model, data)
    outputs = [model[0](x) for x, _ in data]
    mean = torch.stack([y.mean(0) for y in outputs]).mean(0)
    var = torch.stack([y.var(0) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(model[1].running_var, var.detach(), rtol=0, atol=1e-14)
    assert not torch.allclose(ahead, mean, atol=1e-3)
    assert model[1].momentum == 0.3 and model.training
    opt.train()
    train()


def test_statistics_are_not_gathered_at_w_plus_epsilon():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    opt = FusedSAM(model.parameters(), lr=0.1)
    x = torch.randn(6, 3)
    model(x).sigmoid().sum().backward()
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"recompute_batchnorm\(\) while the weights are pert"):
        recompute_batchnorm(model, [x])
    opt.restore()
    recompute_batchnorm(model, [x])


def test_eval_and_train_do_nothing_for_others():
    params = start()
    opt = FusedSAM(params, lr=0.1)
    before = [p.detach().clone() for p in params]
    opt.eval()
    plainly = Surface(SHAPES)
    give(params, plainly.gradient(params, 0, 0))
    opt.first_step()
    away = [p.detach().clone() for p in params]
    opt.eval()
    opt.train()
    for p, w in zip(params, away, strict=True):
        assert_same_bits(p, w)
    opt.restore()
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (torch.optim.SGD, {}, "SGD has none here; use SGD with momentum > 0"),
        (torch.optim.RMSprop, {}, "RMSprop has none"),
        (torch.optim.Adamax, {}, "Adamax has none"),
        (torch.optim.Adam, {"adaptive": True}, "adaptive=True"),
        (torch.optim.Adam, {"when": Every(2)}, "one pass in every step, so when=Every"),
        (torch.optim.Adam, {"blend": GSAM(0.1)}, "needs a gradient at w"),
    ],
)
def test_what_makes_no_sense_is_refused(base, options, match):
    with pytest.raises(ValueError, match=match):
        FusedSAM(start(), base, ascent=MSAM(), lr=0.1, **options)


def test_accumulate_takes_one_pass_and_no_local_ascents(backend):
    """Guards that the error of ``ascent="local"`` tells the reason, before anything runs."""
    opt, params = make(backend=backend)
    with pytest.raises(ValueError, match=r"climbs once in a step.*ascent='global'"):
        opt.accumulate([0, 1], pytest.fail, ascent="local")  # not that no model is attached
    model = nn.ParameterList(params)
    opt.attach(model)
    twin, others = make(backend=backend)
    surface, ran = Surface(SHAPES), []

    def run(batch):
        ran.append(batch)
        for p, g in zip(params, surface.gradient(params, batch, 0), strict=True):
            p.grad = g if p.grad is None else p.grad + g

    for _ in range(2):
        opt.accumulate([0, 1], run)
        sums = [surface.gradient(others, batch, 0) for batch in (0, 1)]
        for p, a, b in zip(others, *sums, strict=True):
            p.grad = a + b
        twin.step()
        twin.eval()
        assert_equal(params, others)
        twin.train()
    assert ran == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"climbs once in a step.*ascent='global'"):
        opt.accumulate([0, 1], run, ascent="local")
    assert ran == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)], ids=["bf16", "fp16"]
)
def test_decay_in_half_precision_is_neither_rounded_away_nor_infinite(dtype, scale, backend):
    """Guards decay that is too small for a gradient of half precision, and a scale too large."""
    w = torch.full((6,), 0.125, dtype=torch.float64)
    p = nn.Parameter(w.to(dtype))
    options = {"lr": 1.0, "momentum": 0.5, "weight_decay": 5e-4, "rho": 1e-3}
    opt = FusedSAM(
        [p], torch.optim.SGD, ascent=MSAM(), backend=backend, master_weights=True, **options
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    v = torch.zeros_like(w)
    for i in range(4):
        ahead = w - 1e-3 * v / v.norm() if i else w
        grad = torch.full_like(w, (-1) ** i * 0.0625)
        v = 0.5 * v + grad + 5e-4 * ahead
        w = w - v
        p.grad = (grad * scale).to(dtype)
        scaler.scale(torch.zeros(()))
        scaler.step(opt)
        scaler.update()
    opt.eval()
    torch.testing.assert_close(opt.state[p]["master_weight"].double(), w, rtol=0, atol=2e-6)
