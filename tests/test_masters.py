"""master_weights=True: float32 weights and state besides those of half precision."""

import copy
import io
import pickle

import pytest
import torch
from oracle import assert_same_bits, inject, params_of
from torch import nn

from fused_sam import FusedSAM

SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAME = "master_weight"
RULES = {
    "sgd": (SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (ADAMW, {"amsgrad": True}),
    "rmsprop": (RMSPROP, {"momentum": 0.5, "centered": True, "eps": 1e-2}),
}


def make(backend, rule="sgd", dtype=BF16, shapes=((3, 5), (70,), (0,)), grad=None, **options):
    cls, base_options = RULES[rule]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in params if grad else ():
        p.grad_dtype = grad
    options = {"rho": 0.05, "lr": 0.01, **base_options, **options}
    return FusedSAM(params, cls, backend=backend, master_weights=True, **options)


def grads_of(opt, missing=()):
    params = params_of(opt)
    return {
        p: None if i in missing else torch.randn(p.shape).to(p.grad_dtype)
        for i, p in enumerate(params)
    }


def masters(opt):
    """The masters, and what the parameters must be: the same, rounded."""
    for bucket in opt._facts.engine.buckets:
        for slot in bucket.slots:
            yield slot.param, slot.shaped(slot.of(bucket.saved))


def check_rounded(opt):
    for p, master in masters(opt):
        assert master.dtype == F32
        assert_same_bits(p, master.to(p.dtype))


def step(opt, first=(), second=(), **scaling):
    inject(grads_of(opt, first))
    opt.first_step()
    inject(grads_of(opt, second))
    for name, value in scaling.items():
        setattr(opt, name, torch.tensor(value))
    opt.second_step()
    for name in scaling:
        delattr(opt, name)


@pytest.mark.parametrize("dtypes", [(BF16, None), (F16, None), (BF16, F32)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_masters_step_as_float32_weights_would(rule, dtypes, backend):
    """Guards each rule on the masters: the base optimizer's own step in float32, to rounding.

    Gradients are missing in either pass, a step is skipped, the learning rate is 0 for one.
    """
    opt = make(backend, rule, dtypes[0], grad=dtypes[1])
    params = params_of(opt)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    cls, options = RULES[rule]
    base = cls(twins, lr=0.01, **options)
    plan = [((), ()), ((1,), (0,)), ((0, 1), ()), ((), ()), ((), (1,))]
    for i, (first, second) in enumerate(plan):
        before = [m.clone() for _, m in masters(opt)]
        weights = [p.detach().clone() for p in params]
        inject(grads_of(opt, first))
        opt.first_step()
        for m, b in zip(masters(opt), before, strict=True):
            assert_same_bits(m[1], b)
        moved = [not torch.equal(p, w) for p, w in zip(params, weights, strict=True)]
        assert moved == [i not in first and p.numel() > 0 for i, p in enumerate(params)]
        grads = grads_of(opt, second)
        inject(grads)
        for p, t in zip(params, twins, strict=True):
            t.grad = None if grads[p] is None else grads[p].float()
        lr = 0.0 if i == 3 else 0.01
        opt.param_groups[0]["lr"] = base.param_groups[0]["lr"] = lr
        opt.second_step()
        base.step()
        check_rounded(opt)
        for p, t in zip(params, twins, strict=True):
            torch.testing.assert_close(dict(masters(opt))[p], t.detach(), rtol=2e-5, atol=2e-6)
            for name, value in base.state[t].items():
                if value is not None:
                    assert opt.state[p][name].dtype == F32
                    torch.testing.assert_close(opt.state[p][name], value, rtol=2e-5, atol=2e-6)
        if lr == 0:
            for m, b in zip(masters(opt), before, strict=True):
                assert_same_bits(m[1], b)


def test_skipped_steps_keep_masters_and_return(backend):
    opt = make(backend)
    step(opt)
    before = [(p.detach().clone(), m.clone()) for p, m in masters(opt)]
    step(opt, grad_scale=4.0, found_inf=1.0)
    for (p, m), (w, b) in zip(masters(opt), before, strict=True):
        assert_same_bits(p, w)
        assert_same_bits(m, b)
    inject(grads_of(opt))
    opt.first_step()
    opt.restore()
    for (p, m), (w, b) in zip(masters(opt), before, strict=True):
        assert_same_bits(p, w)
        assert_same_bits(m, b)


@pytest.mark.parametrize("plain", [False, True], ids=["sam step", "plain step"])
def test_a_weight_that_was_changed_from_outside_wins(plain, backend):
    """Guards clamping, averages and loading, which bump no counter: element by element."""
    opt = make(backend, shapes=((3, 5), (70,)), momentum=0.0, weight_decay=0.0, lr=0.0)
    for group in opt.param_groups:
        group["lr"] = 0.01
    step(opt)
    p = params_of(opt)[1]
    before = dict(masters(opt))[p].clone()
    p.data[::3] = 2.5
    opt.param_groups[0]["lr"] = 0.0
    if plain:
        inject(grads_of(opt))
        opt.second_step()
    else:
        step(opt)
    after = dict(masters(opt))[p]
    if not plain:  # with a learning rate of 0 a plain step need not write a master
        assert torch.equal(after[::3], torch.full_like(after[::3], 2.5))
    kept = torch.ones(70, dtype=torch.bool)
    kept[::3] = False
    assert_same_bits(after[kept], before[kept])
    assert torch.equal(p.detach()[::3], torch.full((24,), 2.5, dtype=BF16))
    opt.param_groups[0]["lr"] = 1.0
    inject({q: torch.full_like(q, 0.25) for q in params_of(opt)})
    opt.second_step()
    after = dict(masters(opt))[p]
    assert torch.equal(after[::3], torch.full_like(after[::3], 2.25))


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_checkpoints_and_copies_go_on_with_the_same_bits(rule, backend):
    """Guards float32 through torch's own loading, which casts, and through the model's loading."""
    opt = make(backend, rule)
    step(opt)
    step(opt)
    file = io.BytesIO()
    torch.save((opt.state_dict(), [p.detach() for p in params_of(opt)]), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    assert all(entry[NAME].dtype == F32 for entry in state["state"].values())
    resumed = make(backend, rule)
    for p, w in zip(params_of(resumed), weights, strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(state)
    others = [resumed, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    others.append(copy.deepcopy(opt))
    others[-1].load_state_dict(state)  # before its first step, when it has no layout
    for _ in range(2):
        for half in ("first_step", "second_step"):
            grads = [torch.randn(p.shape).to(p.dtype) for p in params_of(opt)]
            for one in (opt, *others):
                inject(dict(zip(params_of(one), grads, strict=True)))
                getattr(one, half)()
    for one in others:
        for (p, m), (q, n) in zip(masters(opt), masters(one), strict=True):
            assert_same_bits(p, q.detach())
            assert_same_bits(m, n)
    cls, _ = RULES[rule]
    cls([nn.Parameter(w) for w in weights], lr=0.1).load_state_dict(opt.state_dict())


def test_a_new_layout_keeps_the_masters(backend):
    """Guards them when a group is added, at w and between the two steps."""
    opt = make(backend)
    step(opt)
    before = {p: m.clone() for p, m in masters(opt)}
    opt.add_param_group({"params": [nn.Parameter(torch.randn(4).bfloat16())]})
    inject(grads_of(opt))
    opt.first_step()
    opt.add_param_group({"params": [nn.Parameter(torch.randn(4).bfloat16())]})
    inject(grads_of(opt, range(5)))
    opt.second_step()
    for p, m in masters(opt):
        if p in before:
            assert_same_bits(m, before[p])
    check_rounded(opt)


def test_only_half_precision_has_masters(backend):
    params = [nn.Parameter(torch.randn(5).to(dtype)) for dtype in (F32, BF16, torch.float64)]
    opt = FusedSAM(params, SGD, rho=0.1, momentum=0.9, backend=backend, lr=0.1, master_weights=True)
    step(opt)
    assert [NAME in opt.state[p] for p in params] == [False, True, False]
    plain = FusedSAM([nn.Parameter(params[1].detach().clone())], SGD, lr=0.1, backend=backend)
    plain.load_state_dict(FusedSAM([params[1]], SGD, lr=0.1).state_dict())
    assert [bucket.masters for bucket in opt._facts.engine.buckets] == [False, True, False]


def test_what_cannot_have_masters_is_refused():
    p = nn.Parameter(torch.randn(5))
    with pytest.raises(TypeError, match=r"master_weights=True needs.*SGD.*RAdam"):
        FusedSAM([p], torch.optim.RAdam, lr=0.1, master_weights=True)
    with pytest.raises(TypeError, match=r"master_weights must be True or False, got 1"):
        FusedSAM([p], SGD, lr=0.1, master_weights=1)


def regression(dtype, backend, steps=200, **options):
    """The weights after a regression with SAM, as float32; all of it from the same numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    y = x @ torch.randn(16, generator=generator)
    p = nn.Parameter((torch.randn(16, generator=generator) * 0.02).bfloat16().to(dtype))
    opt = FusedSAM([p], SGD, rho=0.05, lr=2e-3, momentum=0.9, backend=backend, **options)
    for _ in range(steps):
        for half in (opt.first_step, opt.second_step):
            w = p.detach().float().requires_grad_()
            (x @ w - y).square().mean().backward()
            p.grad = w.grad.to(dtype)
            half()
    if options:
        p = opt.state[p][NAME]
    return p.detach().float()


def test_two_hundred_steps_follow_the_float32_run(backend):
    """Guards the update's precision: within the rounding of weights and gradients, and no more."""
    if backend == "triton":
        pytest.skip("interpreted")
    exact = regression(F32, backend)
    with_masters = (regression(BF16, backend, master_weights=True) - exact).norm() / exact.norm()
    without = (regression(BF16, backend) - exact).norm() / exact.norm()
    print(f"with masters {with_masters:.2e}, without {without:.2e}")
    assert with_masters < 2.0**-8 < without


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_climb_of_nothing_moves_no_weight_that_has_a_master(dtype, broken, backend):
    """Guards rounding at random: a master would be rounded anew, and rarely to its weight."""
    p = nn.Parameter(torch.linspace(-1, 1, 70).to(dtype))
    opt = FusedSAM([p], torch.optim.SGD, lr=1e-3, rho=0.1, backend=backend, master_weights=True)
    for _ in range(2):
        p.grad = torch.cos(torch.arange(70.0)).to(dtype)
        opt.first_step()
        opt.second_step()
    w = p.detach().clone()
    assert not torch.equal(opt.state[p]["master_weight"], w.float())
    if broken:
        p.grad[3] = torch.inf
    else:
        opt.param_groups[0]["rho"] = 0.0
    opt.first_step()
    assert torch.equal(p, w)


def test_the_climb_begins_at_the_master(backend):
    """Guards a climb from the rounded weight: from between two neighbours some go to either."""
    p = nn.Parameter(torch.ones(4096, dtype=BF16))
    opt = FusedSAM([p], SGD, lr=0.003, rho=1e-3, backend=backend, master_weights=True)
    for half in (opt.first_step, opt.second_step):
        inject({p: torch.full_like(p, -1.0)})
        half()
    assert p.eq(1.0).all()
    inject({p: torch.full_like(p, 1.0)})
    opt.first_step()
    up = 1.0 + torch.finfo(BF16).eps
    assert p.eq(1.0).logical_or(p.eq(up)).all()
    # 0.003 of the way of 2 ** -7, give or take five deviations.
    assert abs(p.eq(up).float().mean() - 0.003 * 2**7) < 5 * (0.384 * 0.616 / 4096) ** 0.5


@pytest.mark.parametrize("rule", RULES)
def test_a_master_keeps_its_bits_where_lr_is_zero(rule, backend):
    """Guards zero times infinity, and a minus zero that something is subtracted from."""
    opt = make(backend, rule, shapes=((3,),), weight_decay=0.0)
    (p,) = params_of(opt)
    p.data = torch.tensor([-0.0, 1.0, -2.0], dtype=BF16)
    opt.param_groups[0]["lr"] = 0.0
    for second in (-1.0, 1.0, torch.inf):
        inject({p: torch.ones_like(p)})
        opt.first_step()
        inject({p: torch.full_like(p, second)})
        opt.second_step()
        assert_same_bits(p, torch.tensor([-0.0, 1.0, -2.0], dtype=BF16))
        assert_same_bits(opt.state[p][NAME], torch.tensor([-0.0, 1.0, -2.0]))


def test_a_new_layout_in_the_first_step_keeps_w(backend):
    """Guards a master that nobody has been shown yet: the weight is away from it."""
    opt = make(backend)
    before = [p.detach().clone() for p in params_of(opt)]
    inject(grads_of(opt))
    opt.first_step()
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=BF16))]})
    opt._refresh()
    for p, w in zip(params_of(opt), before, strict=False):
        assert_same_bits(dict(masters(opt))[p], w.float())
        assert p.numel() == 0 or not torch.equal(p, w)
    opt.restore()
    for p, w in zip(params_of(opt), before, strict=False):
        assert_same_bits(p, w)
