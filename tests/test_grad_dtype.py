"""Gradients that are wider or narrower than their weights (Tensor.grad_dtype)."""

import io

import pytest
import torch
from oracle import Textbook, assert_same_bits, params_of
from torch import nn

from fused_sam import FusedSAM

SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PAIRS = [(BF16, F32), (F16, F32), (F32, BF16), (F32, F16), (F64, F32), (F32, F64), (BF16, F16)]
RULES = {
    "sgd": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}),
    "adamw": (ADAMW, {"amsgrad": True}),
    "rmsprop": (RMSPROP, {"momentum": 0.5, "centered": True, "eps": 1e-2}),
}

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has none")


def make(weight, grad, shapes=((3, 5), (70,), (0,))):
    params = [nn.Parameter(torch.randn(shape).to(weight)) for shape in shapes]
    for p in params:
        p.grad_dtype = grad
    return params


def grads_of(params, missing=()):
    kind = {p: p.grad_dtype or torch.float32 for p in params}
    return {p: torch.randn(p.shape).to(kind[p]) for i, p in enumerate(params) if i not in missing}


def follow(textbook, n=3, **options):
    params = params_of(textbook.opt)
    for i in range(n):
        textbook.step(grads_of(params, {i - 1}), grads_of(params, {i}), **options)


def options_of(rule):
    cls, options = RULES[rule]
    return cls, {**options, "rho": 0.3, "lr": 0.05}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("rule", RULES)
def test_each_pair_of_dtypes_steps_as_the_textbook(rule, adaptive, pair, backend):
    if backend == "triton" and adaptive:
        pytest.skip("interpreted")
    cls, options = options_of(rule)
    opt = FusedSAM(make(*pair), cls, adaptive=adaptive, eta=0.01, backend=backend, **options)
    textbook = Textbook(opt)
    follow(textbook)
    follow(textbook, 1, found_inf=True, run=scaled(opt, 4.0, 1.0), grad_scale=4.0)
    follow(textbook, 1, run=scaled(opt, 4.0, 0.0), grad_scale=4.0)


def scaled(opt, scale, found_inf):
    def run():
        opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(found_inf)
        opt.second_step()
        del opt.grad_scale, opt.found_inf

    return run


def test_all_pairs_in_one_optimizer(backend):
    """Guards the norm over buckets of every pair, groups of their own and pinned weights."""
    params = [p for pair in (*PAIRS, (F32, F32), (BF16, BF16)) for p in make(*pair, [(5,)])]
    held = torch.randn(8).bfloat16()
    params.append(nn.Parameter(held[1:4]))
    params[-1].grad_dtype = F32
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.0, "maximize": True}]
    opt = FusedSAM(groups, SGD, rho=0.3, momentum=0.9, backend=backend, lr=0.05)
    follow(Textbook(opt))
    assert len(opt._facts.engine.buckets) == len(PAIRS) + 2


@pytest.mark.parametrize("size", [1e5, 1e-9])
def test_float16_weights_climb_by_gradients_that_float16_cannot_hold(size, backend):
    """Guards the range of the gradients: 1e5 is infinite in float16, and 1e-9 is zero."""
    (p,) = make(F16, F32, [(200,)])
    opt = FusedSAM([p], SGD, rho=0.5, backend=backend, lr=0.1)
    before = p.detach().clone()
    p.grad = torch.randn(200) * size
    norm = p.grad.norm()
    opt.first_step()
    torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-5, atol=0)
    moved = (p.detach().float() - before.float()).norm()
    assert 0.4 < moved < 0.6
    opt.restore()
    assert_same_bits(p, before)


def test_gradients_of_any_dtype_may_change_it_from_step_to_step(backend):
    (p,) = make(BF16, None, [(70,)])
    textbook = Textbook(FusedSAM([p], SGD, rho=0.3, momentum=0.9, backend=backend, lr=0.1))
    for first, second in ((F32, BF16), (BF16, F32), (F16, F64), (F32, F32)):
        textbook.step({p: torch.randn(70).to(first)}, {p: torch.randn(70).to(second)})


def test_a_dtype_that_changes_later_is_noticed(backend):
    """Guards a declaration after construction, and between the two steps."""
    (p,) = make(BF16, BF16, [(70,)])
    textbook = Textbook(FusedSAM([p], SGD, rho=0.3, momentum=0.9, backend=backend, lr=0.1))
    follow(textbook, 1)
    p.grad_dtype = F32
    textbook.step({p: torch.randn(70)}, {p: torch.randn(70)})
    textbook.first_step({p: torch.randn(70)})
    p.grad = None
    p.grad_dtype = F16
    textbook.second_step({p: torch.randn(70).half()})


def test_states_have_the_dtypes_of_torch(backend):
    (p,), (q,) = make(BF16, F32, [(5,)]), make(BF16, F32, [(5,)])
    ours = FusedSAM([p], SGD, rho=0.3, momentum=0.9, backend=backend, lr=0.1)
    theirs = SGD([q], momentum=0.9, lr=0.1)
    for x in (p, q):
        x.grad = torch.ones(5)
    ours.second_step()
    theirs.step()
    assert ours.state[p]["momentum_buffer"].dtype == theirs.state[q]["momentum_buffer"].dtype == F32


def test_a_checkpoint_keeps_a_wide_momentum(backend):
    """Guards against torch's loading, which rounds state to its parameter's dtype."""
    (p,) = make(BF16, F32, [(70,)])
    opt = FusedSAM([p], SGD, rho=0.3, momentum=0.9, backend=backend, lr=0.1)
    textbook = Textbook(opt)
    for _ in range(2):
        textbook.step(grads_of([p]), grads_of([p]))
    momentum = opt.state[p]["momentum_buffer"].clone()
    assert not torch.equal(momentum, momentum.bfloat16().float())
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    (twin,) = make(BF16, F32, [(70,)])
    twin.data.copy_(p.data)
    other = FusedSAM([twin], SGD, rho=0.3, momentum=0.9, backend=backend, lr=0.1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        for half in ("first_step", "second_step"):
            p.grad = torch.randn(70)
            twin.grad = p.grad.clone()
            getattr(opt, half)()
            getattr(other, half)()
            assert_same_bits(p, twin.detach())


def test_gradients_in_which_nothing_can_be_computed_are_refused():
    p = nn.Parameter(torch.zeros(3))
    p.grad_dtype = torch.float8_e4m3fn
    with pytest.raises(TypeError, match=r"float8_e4m3fn.*grad_dtype"):
        FusedSAM([p], lr=0.1)


def test_base_optimizers_without_a_rule_climb_by_them_too(backend):
    (p,) = make(F16, F32, [(70,)])
    before = p.detach().clone()
    opt = FusedSAM([p], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    twin = FusedSAM.wrap(type("Own", (SGD,), {})([p], lr=0.1), rho=0.5, backend=backend)
    assert twin._facts.engine.layout.rule is None
    assert opt._facts.engine.layout.rule is not None
    p.grad = torch.randn(70) * 1e5
    twin.first_step()
    assert 0.4 < (p.detach().float() - before.float()).norm() < 0.6
    p.grad = torch.ones(70)
    twin.second_step()
    torch.testing.assert_close(p.detach(), before - 0.1, rtol=2e-3, atol=1e-3)
