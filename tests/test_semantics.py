"""What a step means: two styles, closures, loss scaling, hooks, schedulers, other optimizers."""

import warnings

import pytest
import torch
from oracle import Textbook, assert_same_bits, inject, params_of
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fused_sam import FusedSAM
from fused_sam.ascents import USAM

SGD, ADAM, ADAMW, RMSPROP = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)
FUSED = {
    "sgd": (SGD, {"momentum": 0.8, "weight_decay": 0.05}),
    "adam": (ADAM, {"weight_decay": 0.05}),
    "adamw": (ADAMW, {"amsgrad": True}),
    "rmsprop": (RMSPROP, {"momentum": 0.5, "centered": True, "eps": 1e-3}),
    "adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
}
OTHERS = {
    "radam": (torch.optim.RAdam, {}),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.1}),
    "adamax": (torch.optim.Adamax, {}),
    "asgd": (torch.optim.ASGD, {}),
    "rprop": (torch.optim.Rprop, {}),
    "muon": (torch.optim.Muon, {"weight_decay": 0.1}),
    "adafactor": (torch.optim.Adafactor, {}),
}


class Lion(torch.optim.Optimizer):
    """An optimizer of the user's own, without torch's usual options."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["beta"])
                    p.sub_(momentum.sign(), alpha=group["lr"])


class SubclassOfSGD(SGD):
    """May do anything, so it must not be taken for SGD."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


class RenamedSGD(SGD):
    """Does what SGD does, but unfused, because it is not that very class."""


OTHERS |= {"own": (Lion, {}), "subclass": (SubclassOfSGD, {"momentum": 0.9})}
ALL = FUSED | OTHERS


def make_params(shapes=((5, 7), (3,), (65,)), dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def grads_like(params, scale=1.0):
    return {p: torch.randn(p.shape).to(p.dtype) * scale for p in params}


def none_for(params):
    return dict.fromkeys(params)


def weights_of(opt):
    return [p.detach().clone() for p in params_of(opt)]


def assert_weights(opt, expected):
    for i, (p, w) in enumerate(zip(params_of(opt), expected, strict=True)):
        assert_same_bits(p, w, f"weights {i}")


def quadratic(params, targets, calls=None, opt=None, zero=False):
    """A closure for 0.5 * |w - target|^2; the gradient at w is w - target."""

    def closure():
        if zero:
            opt.zero_grad()
        if calls is not None:
            calls.append([p.detach().clone() for p in params])
        loss = sum(0.5 * (p - t).square().sum() for p, t in zip(params, targets, strict=True))
        loss.backward()
        return loss

    return closure


def setup(cls=SGD, **options):
    params = make_params()
    targets = [torch.randn_like(p) for p in params]
    return params, targets, FusedSAM(params, cls, **{"lr": 0.05, "rho": 0.3, **options})


# ------------------------------------------------------ where other implementations fail (table)


@pytest.mark.parametrize("rule", ALL)
def test_restore_covers_params_without_second_grad(rule, backend):
    """Row 1: a gradient in pass 1 and none in pass 2: restored, no update, no state."""
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3)])
    opt = FusedSAM(params, cls, rho=0.5, backend=backend, lr=0.05, **options)
    before = weights_of(opt)
    inject(grads_like(params))
    opt.first_step(zero_grad=True)
    assert all(not torch.equal(p, w) for p, w in zip(params, before, strict=True))
    params[1].grad = torch.randn(3, 3)
    opt.second_step()
    assert_same_bits(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    # Adagrad makes its state at construction.
    assert all(not value.any() for value in opt.state.get(params[0], {}).values())


def test_plain_update_for_params_without_first_grad(backend):
    """Row 2: none in pass 1, one in pass 2: a plain base update; it is not perturbed."""
    params = make_params()
    opt = FusedSAM(params, rho=0.5, backend=backend, lr=0.1, momentum=0.9, weight_decay=0.1)
    textbook = Textbook(opt)
    for _ in range(2):
        textbook.step({**grads_like(params), params[1]: None}, grads_like(params))


@pytest.mark.parametrize("rule", ALL)
def test_no_gradients_at_all_is_a_no_op(rule, backend):
    """Row 3: steps without any gradient neither crash nor move anything."""
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3)])
    opt = FusedSAM(params, cls, backend=backend, lr=0.05, **options)
    before = weights_of(opt)
    opt.first_step()
    assert opt.is_perturbed and opt.grad_norm == 0
    opt.second_step()
    opt.second_step()
    opt.first_step()
    opt.step()
    assert_weights(opt, before)


@pytest.mark.parametrize("fresh", [False, True], ids=["at w", "at w + epsilon"])
def test_a_closure_that_leaves_no_gradient_is_an_error(fresh, backend):
    """Row 3, second half: it would be a step that does nothing, or no second pass."""
    params, targets, opt = setup(backend=backend)
    before, calls = weights_of(opt), []
    if fresh:
        quadratic(params, targets)()
    with pytest.raises(RuntimeError, match=r"leaves no gradient.*first_step.*integrations"):
        opt.step(lambda: calls.append(1) or 3.5)
    assert len(calls) == 1 and not opt.is_perturbed
    assert_weights(opt, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_gradient_does_not_perturb(adaptive, dtype, backend):
    """Row 4: no 0 / 0."""
    params = make_params(dtype=dtype)
    opt = FusedSAM(params, rho=0.5, adaptive=adaptive, backend=backend, lr=0.1, momentum=0.5)
    Textbook(opt).step({p: torch.zeros_like(p) for p in params}, grads_like(params))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("rule", ALL)
def test_non_finite_first_gradient_does_not_perturb(rule, value, backend):
    """Row 5: nothing moves in pass 1, and the step from w takes the second gradient."""
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3)])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    opt = FusedSAM(params, cls, rho=0.5, backend=backend, lr=0.05, **options)
    twin = FusedSAM(twins, cls, rho=0.5, backend=backend, lr=0.05, **options)
    before, grads = weights_of(opt), grads_like(params)
    grads[params[0]][2, 3] = value
    inject(grads)
    opt.first_step()
    assert_weights(opt, before)
    assert not opt.grad_norm.isfinite()
    opt.restore()
    assert_weights(opt, before)
    inject(grads)
    opt.first_step(zero_grad=True)
    grads = grads_like(params)
    inject(grads)
    inject({t: grads[p] for p, t in zip(params, twins, strict=True)})
    opt.second_step()
    twin.second_step()
    assert_weights(opt, twins)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("rule", FUSED)
def test_scaler_step_with_closure_unscales(rule, backend):
    """Row 6: the second gradient is divided by the scale; equal to the step without a scaler."""
    cls, options = FUSED[rule]
    params, targets, opt = setup(cls, backend=backend, **options)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = FusedSAM(twins, cls, rho=0.3, lr=0.05, backend=backend, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)

    def scaled():
        loss = sum(0.5 * (p - t).square().sum() for p, t in zip(params, targets, strict=True))
        scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        opt.zero_grad()
        scaled()
        scaler.step(opt, scaled)
        scaler.update()
        twin.zero_grad()
        quadratic(twins, targets)()
        twin.step(quadratic(twins, targets))
        # A power of two: scaling is exact, and so is its undoing. The norm is rounded elsewhere.
        for p, t in zip(params, twins, strict=True):
            torch.testing.assert_close(p, t, rtol=1e-6, atol=1e-6)


def test_resume_starts_with_the_momentum_that_was_saved(backend):
    """Row 7; bit for bit, with every rule, in test_checkpoint.py."""
    params, targets, opt = setup(momentum=0.9, backend=backend)
    opt.step(quadratic(params, targets))
    buffers = opt.state_dict()["state"]
    assert all(buffers[i]["momentum_buffer"].any() for i in range(len(params)))


@pytest.mark.parametrize("rule", ALL)
def test_groups_and_state_are_the_base_optimizers_very_objects(rule, backend):
    """Row 8: after construction, add_param_group, load_state_dict, a step, assignment."""
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3), (4, 2)])
    opt = FusedSAM(params[:2], cls, backend=backend, lr=0.05, **options)

    def check():
        assert opt.param_groups is opt.base_optimizer.param_groups
        assert opt.state is opt.base_optimizer.state

    check()
    opt.add_param_group({"params": [params[2]], "rho": 0.7})
    check()
    assert len(opt.base_optimizer.param_groups) == 2
    inject(grads_like(params))
    opt.first_step()
    opt.second_step()
    check()
    opt.load_state_dict(opt.state_dict())
    check()
    assert [group["rho"] for group in opt.base_optimizer.param_groups] == [0.05, 0.7]
    opt.base_optimizer.load_state_dict(opt.state_dict())
    check()
    opt.base_optimizer.param_groups[0]["lr"] = 0.5
    assert opt.param_groups[0]["lr"] == 0.5
    inject(grads_like(params))
    opt.first_step()
    opt.second_step()
    check()


@pytest.mark.parametrize("adaptive", [False, True])
def test_fp16_norm_does_not_overflow(adaptive, backend):
    """Row 9: the sum of the squares is far beyond fp16's 65504, and so is the norm."""
    params = make_params([(70,), (5, 5)], dtype=torch.float16)
    opt = FusedSAM(params, rho=0.5, adaptive=adaptive, backend=backend, lr=1e-5)
    big = {p: torch.full_like(p, 3e4) for p in params}
    Textbook(opt).step(big, grads_like(params))
    assert opt.grad_norm > 65504 or adaptive


def test_saved_weights_are_allocated_once(backend):
    """Row 10; allocations are counted in test_layout.py."""
    params = make_params()
    opt = FusedSAM(params, backend=backend, lr=0.1)
    addresses = set()
    for _ in range(3):
        inject(grads_like(params))
        opt.first_step()
        addresses |= {b.saved.data_ptr() for b in opt._facts.engine.buckets}
        opt.second_step()
    assert len(addresses) == 1


def test_frozen_parameters_are_untouched(backend):
    """Row 11: requires_grad stays as it is; a frozen parameter neither moves nor gets state."""
    params = make_params()
    params[1].requires_grad_(False)
    opt = FusedSAM(params, ADAMW, backend=backend, lr=0.1)
    before = params[1].detach().clone()
    for _ in range(2):
        opt.step(quadratic(params, [torch.zeros_like(p) for p in params]))
    assert [p.requires_grad for p in params] == [True, False, True]
    assert_same_bits(params[1], before)
    assert params[1] not in opt.state


# ------------------------------------------------------------------------------------- two steps


@pytest.mark.parametrize("rule", ALL)
def test_step_after_first_step_is_second_step(rule, backend):
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3)])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    opt = FusedSAM(params, cls, backend=backend, lr=0.05, **options)
    twin = FusedSAM(twins, cls, backend=backend, lr=0.05, **options)
    for _ in range(3):
        for finish in (opt.first_step, twin.first_step), (opt.step, twin.second_step):
            grads = [torch.randn_like(p) for p in params]
            inject(dict(zip(params, grads, strict=True)))
            inject(dict(zip(twins, grads, strict=True)))
            assert finish[0]() is finish[1]()  # None, or that it climbed
    assert_weights(opt, twins)


def test_step_without_closure_or_first_step_says_what_to_do(backend):
    params = make_params()
    opt = FusedSAM(params, backend=backend, lr=0.1)
    inject(grads_like(params))
    before = weights_of(opt)
    with pytest.raises(RuntimeError, match=r"first_step\(\).*closure"):
        opt.step()
    assert_weights(opt, before)
    inject(grads_like(params))
    opt.first_step()
    opt.second_step()
    with pytest.raises(RuntimeError, match=r"first_step\(\).*closure"):
        opt.step()


@pytest.mark.parametrize("rule", FUSED)
def test_second_step_alone_is_a_base_step(rule, backend):
    cls, options = FUSED[rule]
    params = make_params()
    opt = FusedSAM(params, cls, backend=backend, lr=0.05, **options)
    textbook = Textbook(opt)
    for _ in range(2):
        textbook.second_step({**grads_like(params), params[1]: None})
    assert not opt.is_perturbed


def test_first_step_twice_is_an_error_and_keeps_w(backend):
    params = make_params()
    opt = FusedSAM(params, rho=0.5, backend=backend, lr=0.1)
    before = weights_of(opt)
    inject(grads_like(params))
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"twice.*second_step.*restore"):
        opt.first_step()
    assert opt.is_perturbed
    opt.restore()
    assert_weights(opt, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_restore_goes_back_without_an_update(dtype, backend):
    params = make_params(dtype=dtype)
    opt = FusedSAM(params, rho=0.5, backend=backend, lr=0.1, momentum=0.9)
    before = weights_of(opt)
    opt.restore()
    assert_weights(opt, before)
    textbook = Textbook(opt)
    textbook.first_step({**grads_like(params), params[0]: None})
    assert opt.is_perturbed
    opt.restore()
    assert not opt.is_perturbed and not opt.state
    assert_weights(opt, before)
    opt.restore()
    assert_weights(opt, before)
    textbook.restore()
    textbook.step(grads_like(params), grads_like(params))


@pytest.mark.parametrize("style", ["first_step", "second_step"])
def test_zero_grad_flag(style, backend):
    """The flag sets gradients to None in either step; without it they stay where they are."""
    params = make_params()
    opt = FusedSAM(params, backend=backend, lr=0.1)
    inject(grads_like(params))
    opt.first_step(zero_grad=style == "first_step")
    assert all((p.grad is None) == (style == "first_step") for p in params)
    inject(grads_like(params))
    opt.second_step(zero_grad=style == "second_step")
    assert all((p.grad is None) == (style == "second_step") for p in params)


def test_first_gradient_is_not_overwritten_by_the_climb(backend):
    """Some accumulate both gradients; what autograd left must be there after first_step."""
    params = [*make_params(), *make_params(dtype=torch.bfloat16)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "adaptive": True}]
    opt = FusedSAM(groups, backend=backend, lr=0.1)
    grads = grads_like(params)
    inject(grads)
    opt.first_step()
    for p in params:
        assert_same_bits(p.grad, grads[p])


def test_grad_norm(backend):
    params = make_params()
    opt = FusedSAM(params, backend=backend, lr=0.1)
    with pytest.raises(RuntimeError, match="first_step"):
        _ = opt.grad_norm
    inject({p: torch.full_like(p, 2.0) for p in params})
    opt.first_step()
    # 35 + 3 + 65 elements of 2
    torch.testing.assert_close(opt.grad_norm, torch.tensor(2 * 103**0.5))
    assert opt.grad_norm.shape == () and not opt.grad_norm.requires_grad
    opt.second_step()
    torch.testing.assert_close(opt.grad_norm, torch.tensor(2 * 103**0.5))


def test_grad_norm_is_one_over_groups_dtypes_and_devices(backend):
    """Not a norm per group: both groups move by the same factor of their gradient."""
    params = [*make_params(), *make_params(dtype=torch.float64)]
    opt = FusedSAM([{"params": [p]} for p in params], rho=1.0, backend=backend, lr=0.1)
    before = weights_of(opt)
    inject({p: torch.full_like(p, 3.0) for p in params})
    opt.first_step()
    # Every element moves by 1 / sqrt(206); float32 numbers below 4 have gaps below 5e-7.
    for p, w in zip(params, before, strict=True):
        torch.testing.assert_close(p - w, torch.full_like(w, 206**-0.5), rtol=0, atol=1e-6)


def test_maximize_climbs_down_the_objective(backend):
    """The perturbation goes against the gradient: the worst case of what is maximised."""
    params = make_params()
    opt = FusedSAM(params, rho=0.5, backend=backend, lr=0.1, maximize=True)
    before, grads = weights_of(opt), grads_like(params)
    inject(grads)
    opt.first_step()
    moved = sum(((p - w) * grads[p]).sum() for p, w in zip(params, before, strict=True))
    torch.testing.assert_close(moved.detach(), -0.5 * opt.grad_norm, rtol=1e-5, atol=0)


def test_asam_is_invariant_to_rescaling(backend):
    """Kwon et al. 2021, definition 3: scaling w by a and g by 1/a scales epsilon by a (eta = 0)."""
    p, q = nn.Parameter(torch.randn(50)), None
    q = nn.Parameter(p.detach() * 4)
    epsilons = []
    g = torch.randn(50)
    for w, grad in (p, g), (q, g / 4):
        opt = FusedSAM([w], rho=0.5, adaptive=True, backend=backend, lr=0.1)
        before = w.detach().clone()
        w.grad = grad.clone()
        opt.first_step()
        epsilons.append(w.detach() - before)
    torch.testing.assert_close(epsilons[1], 4 * epsilons[0], rtol=1e-5, atol=4e-6)


def test_weight_decay_acts_on_w_not_on_the_perturbed_weights(backend):
    params = [nn.Parameter(torch.ones(100))]
    opt = FusedSAM(params, rho=50.0, backend=backend, lr=0.5, weight_decay=0.5)
    params[0].grad = torch.ones(100)
    opt.first_step(zero_grad=True)
    params[0].grad = torch.zeros(100)
    opt.second_step()
    assert torch.equal(params[0].detach(), torch.full((100,), 0.75))


def test_rho_zero_is_the_base_optimizer(backend):
    params, targets, opt = setup(momentum=0.9, rho=0.0, backend=backend)
    calls = []
    opt.step(quadratic(params, targets, calls))
    for at_w, climbed in zip(*calls, strict=True):
        assert torch.equal(at_w, climbed)


def test_version_counters_tell_autograd_of_every_write(backend):
    """A graph from before a write cannot be used after it: autograd raises, as for torch.optim."""
    params = make_params()
    opt = FusedSAM(params, rho=0.5, backend=backend, lr=0.1)

    def loss():
        return sum(p.square().sum() for p in params)

    for write in opt.first_step, opt.restore, opt.second_step:
        before = loss()
        if write == opt.restore:
            opt.first_step()
            before = loss()
        else:
            inject(grads_like(params))
        versions = [p._version for p in params]
        write()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.backward()
        opt.restore()


# --------------------------------------------------------------------------------------- closures


def closure_twin(params, targets, rho, lr):
    """The textbook for the quadratic: g' = g + epsilon."""
    grads = [p.detach() - t for p, t in zip(params, targets, strict=True)]
    norm = torch.stack([g.norm() for g in grads]).norm()
    return [p.detach() - lr * (g + rho / norm * g) for p, g in zip(params, grads, strict=True)]


@pytest.mark.parametrize(
    "gradients",
    ["none", "fresh", "stale", "zeroed in place", "stale, zeroed by the closure", "accumulated"],
)
def test_closure_runs_once_with_fresh_gradients_else_twice(gradients, backend):
    """Stale gradients are tensors that a step has used, whatever was written into them since."""
    params, targets, opt = setup(backend=backend)
    if gradients not in ("none", "fresh"):
        opt.step(quadratic(params, targets))
        assert all(p.grad is not None for p in params)
    if gradients == "zeroed in place":
        opt.zero_grad(set_to_none=False)
    if gradients == "accumulated":
        opt.zero_grad(set_to_none=False)
        quadratic(params, targets)()
    if gradients == "fresh":
        quadratic(params, targets)()
    expected = closure_twin(params, targets, rho=0.3, lr=0.05)
    calls = []
    zero = gradients == "stale, zeroed by the closure"
    value = opt.step(quadratic(params, targets, calls, opt, zero))
    once = gradients == "fresh"
    assert len(calls) == (1 if once else 2)
    assert (value is None) == once
    # float32, |w| < 4, three roundings
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-6)


def test_closure_returns_the_loss_at_w(backend):
    params, targets, opt = setup(backend=backend)
    at_w = sum(0.5 * (p - t).square().sum() for p, t in zip(params, targets, strict=True))
    assert torch.equal(opt.step(quadratic(params, targets)).detach(), at_w.detach())


def test_closure_runs_with_grad_enabled(backend):
    params, targets, opt = setup(backend=backend)
    with torch.no_grad():
        loss = opt.step(quadratic(params, targets))
        assert not torch.is_grad_enabled()
    assert loss.requires_grad


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("cls", [SGD, Lion])
def test_closure_that_raises_leaves_w(cls, call, backend):
    """Also KeyboardInterrupt, in either pass; the next step is as if nothing had been."""
    params, targets, opt = setup(cls, backend=backend)
    before, calls = weights_of(opt), []
    good = quadratic(params, targets)

    def bad():
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return good()

    with pytest.raises(KeyboardInterrupt):
        opt.step(bad)
    assert not opt.is_perturbed
    assert_weights(opt, before)
    expected = closure_twin(params, targets, rho=0.3, lr=0.05)
    opt.zero_grad()
    opt.step(good)
    if cls is SGD:
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-6)


def test_closure_with_a_sparse_second_gradient_leaves_w(backend):
    """The error comes after the climb, and must not leave the weights there."""
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = FusedSAM(embedding.parameters(), rho=0.5, backend=backend, lr=0.1)
    before, calls = weights_of(opt), []

    def closure():
        calls.append(1)
        index = torch.tensor([1, 3])
        out = embedding(index) if len(calls) == 2 else embedding.weight[index]
        out.sum().backward()

    with pytest.raises(RuntimeError, match="sparse"):
        opt.step(closure)
    assert not opt.is_perturbed
    assert_weights(opt, before)


@pytest.mark.parametrize("style", ["computes", "has computed"])
def test_closure_between_the_two_steps_is_the_second_half(style, backend):
    """Frameworks hand over a closure that does nothing where the user gave none."""
    params, targets, opt = setup(backend=backend)
    expected = closure_twin(params, targets, rho=0.3, lr=0.05)
    quadratic(params, targets)()
    opt.first_step(zero_grad=True)
    if style == "computes":
        assert opt.step(quadratic(params, targets)) is None
    else:
        quadratic(params, targets)()
        assert opt.step(lambda: None) is None
    assert not opt.is_perturbed
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- GradScaler


def scaled_backward(scaler, params, targets):
    loss = sum(0.5 * (p - t).square().sum() for p, t in zip(params, targets, strict=True))
    scaler.scale(loss).backward()


@pytest.mark.parametrize("rule", ALL)
def test_scaler_step_without_closure_is_the_second_step(rule, backend):
    """Two steps under a GradScaler equal those without: the scale is a power of two."""
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3)])
    targets = [torch.randn_like(p) for p in params]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    opt = FusedSAM(params, cls, rho=0.3, backend=backend, lr=0.05, **options)
    twin = FusedSAM(twins, cls, rho=0.3, backend=backend, lr=0.05, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        scaled_backward(scaler, params, targets)
        opt.first_step(zero_grad=True)
        scaled_backward(scaler, params, targets)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        quadratic(twins, targets)()
        twin.first_step(zero_grad=True)
        quadratic(twins, targets)()
        twin.second_step(zero_grad=True)
        assert not opt.is_perturbed
        for p, t in zip(params, twins, strict=True):
            torch.testing.assert_close(p, t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("rule", ["adagrad", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_reaches_every_gradient(dtype, rule, strided, backend):
    """fp16 cannot hold 2**16; a gradient with other strides than its weights is copied."""
    cls, options = ALL[rule]
    p = nn.Parameter(torch.randn(6, 5).to(dtype))
    twin = nn.Parameter(p.detach().clone())
    opt = FusedSAM([p], cls, backend=backend, lr=0.05, **options)
    base = FusedSAM([twin], cls, backend=backend, lr=0.05, **options)
    # A grid on which neither scaling nor unscaling rounds.
    grad = torch.randint(-8, 8, (6, 5)).to(dtype) / 16
    twin.grad = grad.clone()
    scaled = grad * 2.0**12
    p.grad = scaled.t().contiguous().t() if strided else scaled
    opt.grad_scale = torch.tensor(2.0**12)
    opt.found_inf = torch.tensor(0.0)
    opt.second_step()
    base.second_step()
    assert_same_bits(p, twin)
    del opt.grad_scale, opt.found_inf
    p.grad, twin.grad = torch.full_like(p, 32768.0), torch.full_like(p, 0.5)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    opt.second_step()
    base.second_step()
    assert_same_bits(p, twin)


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("pass_", [1, 2])
def test_scaler_skips_an_infinite_step_and_restores_exactly(pass_, rule, backend):
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3)])
    opt = FusedSAM(params, cls, rho=0.3, backend=backend, lr=0.05, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.zeros(1))  # makes the scale
    before = weights_of(opt)
    for i in (1, 2):
        grads = grads_like(params)
        if i == pass_:
            grads[params[1]][0, 0] = torch.inf
        inject(grads)
        if i == 1:
            opt.first_step()
        else:
            scaler.step(opt)
    scaler.update()
    assert not opt.is_perturbed
    if pass_ == 2:
        assert_weights(opt, before)
        assert scaler.get_scale() == 128.0
        for entry in opt.state.values():
            assert not any(v.any() for v in entry.values() if isinstance(v, torch.Tensor))
    else:
        assert all(p.isfinite().all() for p in params)
    inject(grads_like(params))
    opt.first_step()
    inject(grads_like(params))
    scaler.step(opt)
    assert all(not torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("fresh", [True, False], ids=["closure-once", "closure-twice"])
@pytest.mark.parametrize("bad", ["first", "second", "both"])
@pytest.mark.parametrize("rule", FUSED)
def test_scaler_step_with_closure_skips_where_either_pass_is_not_finite(rule, bad, fresh, backend):
    """The scaler sees the first gradients at most: the second ones are checked here."""
    cls, options = FUSED[rule]
    params, _, opt = setup(cls, backend=backend, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.zeros(1))
    before, passes = weights_of(opt), []

    def backward():
        passes.append(1)
        grads = grads_like(params)
        if bad == "both" or len(passes) == (1 if bad == "first" else 2):
            grads[params[0]][1, 1] = torch.inf
        inject(grads)

    if fresh:
        backward()
    scaler.step(opt, backward)
    assert len(passes) == 2 and not opt.is_perturbed
    assert_weights(opt, before)
    for entry in opt.state.values():
        assert not any(value.any() for value in entry.values())


def test_closure_that_raises_under_a_scaler_leaves_no_scale_behind(backend):
    """Else the next plain step would divide by it, and the next scaler.step square it."""
    params, targets, opt = setup(backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled_backward(scaler, params, targets)

    def bad():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scaler.step(opt, bad)
    Textbook(opt).second_step(grads_like(params))


@pytest.mark.parametrize("left", ["stale", "zeroed in place"])
def test_scaler_looking_at_used_gradients_does_not_make_them_fresh(left, backend):
    """Its check for inf writes to them in place; the closure must still run twice."""
    params, targets, opt = setup(backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled_backward(scaler, params, targets)
    opt.first_step(zero_grad=True)
    scaled_backward(scaler, params, targets)
    scaler.step(opt)
    scaler.update()
    if left == "zeroed in place":
        opt.zero_grad(set_to_none=False)
    expected, calls = closure_twin(params, targets, rho=0.3, lr=0.05), []

    def closure():
        calls.append(1)
        opt.zero_grad()
        scaled_backward(scaler, params, targets)

    scaler.step(opt, closure)
    assert len(calls) == 2
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-6)


def test_unscale_then_step_clips_as_usual(backend):
    """scaler.unscale_ before scaler.step, between which users clip."""
    params, targets, opt = setup(backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = weights_of(opt)
    scaled_backward(scaler, params, targets)
    opt.first_step(zero_grad=True)
    scaled_backward(scaler, params, targets)
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    scaler.step(opt)
    scaler.update()
    moved = torch.stack([(p - w).norm() for p, w in zip(params, before, strict=True)]).norm()
    # lr 0.05 times norm 0.5
    torch.testing.assert_close(moved.detach(), torch.tensor(0.025), rtol=1e-4, atol=0)


def test_unscale_then_closure_is_an_error(backend):
    params, targets, opt = setup(backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = weights_of(opt)
    scaled_backward(scaler, params, targets)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"unscale_.*max_grad_norm"):
        scaler.step(opt, quadratic(params, targets))
    assert_weights(opt, before)


@pytest.mark.parametrize("rule", ["sgd", "adam", "own"])
def test_scaler_step_without_second_gradients_restores(rule, backend):
    """GradScaler then hands over found_inf = 0, a number and not a tensor."""
    cls, options = ALL[rule]
    params, targets, opt = setup(cls, backend=backend, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = weights_of(opt)
    scaled_backward(scaler, params, targets)
    opt.first_step(zero_grad=True)
    scaler.step(opt)
    assert not opt.is_perturbed
    assert_weights(opt, before)


def test_disabled_scaler_is_not_there(backend):
    params, targets, opt = setup(backend=backend)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    expected = closure_twin(params, targets, rho=0.3, lr=0.05)
    scaler.step(opt, quadratic(params, targets))
    scaler.update()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------- max_grad_norm elsewhere


@pytest.mark.parametrize("strided", [False, True])
def test_max_grad_norm_with_an_unfused_base(strided, backend):
    p = nn.Parameter(torch.randn(6, 5))
    opt = FusedSAM([p], RenamedSGD, max_grad_norm=0.5, backend=backend, lr=1.0)
    before = p.detach().clone()
    grad = torch.randn(6, 5)
    p.grad = grad.t().contiguous().t() if strided else grad.clone()
    opt.second_step()
    torch.testing.assert_close(p.detach(), before - grad * (0.5 / grad.norm()))


def test_nan_gradient_with_max_grad_norm_poisons_nothing_that_is_skipped(backend):
    """NaN reaches the clip coefficient, and through it anything that is divided by it."""
    for dtype in torch.float32, torch.bfloat16:
        params = make_params(dtype=dtype)
        opt = FusedSAM(
            params, RMSPROP, adaptive=True, max_grad_norm=1.0, backend=backend, lr=0.01, eps=1e-2
        )
        before = weights_of(opt)
        grads = grads_like(params)
        grads[params[0]][1, 1] = torch.nan
        inject(grads_like(params))
        opt.first_step()
        inject(grads)
        opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(1.0)
        opt.step()
        del opt.grad_scale, opt.found_inf
        assert_weights(opt, before)
        Textbook(opt).step(grads_like(params), grads_like(params))


# --------------------------------------------------------------------- schedulers, hooks, wrap()


@pytest.mark.parametrize("on", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("style", ["two steps", "step", "closure"])
@pytest.mark.parametrize("rule", ["sgd", "own"])
def test_schedulers_work_without_warnings(rule, style, on, backend):
    cls, options = ALL[rule]
    params, targets, opt = setup(cls, backend=backend, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = opt if on == "optimizer" else opt.base_optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(target, step_size=1, gamma=0.5)
        for i in range(3):
            assert opt.param_groups[0]["lr"] == 0.05 * 0.5**i
            if style == "closure":
                opt.step(quadratic(params, targets))
            else:
                quadratic(params, targets)()
                opt.first_step(zero_grad=True)
                quadratic(params, targets)()
                opt.step() if style == "step" else opt.second_step()
            opt.zero_grad()
            scheduler.step()


def test_one_cycle_cycles_momentum(backend):
    params, targets, opt = setup(momentum=0.9, backend=backend)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5)
    seen = set()
    for _ in range(4):
        opt.step(quadratic(params, targets))
        scheduler.step()
        seen.add(opt.param_groups[0]["momentum"])
    assert len(seen) > 2


@pytest.mark.parametrize("style", ["second_step", "step", "closure"])
@pytest.mark.parametrize("rule", ["sgd", "own"])
def test_step_hooks_run_once_a_step_on_either_optimizer(rule, style, backend):
    cls, options = ALL[rule]
    params, targets, opt = setup(cls, backend=backend, **options)
    seen = []

    def hook(name):
        return lambda optimizer, args, kwargs: seen.append((name, optimizer))

    handles = [
        opt.register_step_pre_hook(hook("pre")),
        opt.register_step_post_hook(hook("post")),
        opt.base_optimizer.register_step_pre_hook(hook("base pre")),
        opt.base_optimizer.register_step_post_hook(hook("base post")),
    ]
    for _ in range(2):
        seen.clear()
        if style == "closure":
            opt.step(quadratic(params, targets))
        else:
            inject(grads_like(params))
            opt.first_step()
            assert not seen
            getattr(opt, style)()
        base = opt.base_optimizer
        assert seen == [("pre", opt), ("base pre", base), ("base post", base), ("post", opt)]
        opt.zero_grad()
    for handle in handles:
        handle.remove()
    seen.clear()
    opt.step(quadratic(params, targets))
    assert not seen


@pytest.mark.parametrize("style", ["second_step", "step", "closure"])
@pytest.mark.parametrize("rule", ["sgd", "own"])
def test_global_hooks_run_once_a_step(rule, style, backend):
    cls, options = ALL[rule]
    params, targets, opt = setup(cls, backend=backend, **options)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *args: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *args: seen.append("post")),
    ]
    try:
        if style == "closure":
            opt.step(quadratic(params, targets))
        else:
            inject(grads_like(params))
            opt.first_step()
            getattr(opt, style)()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["pre", "post"]


def test_base_hooks_see_w(backend):
    """A hook that writes to the weights, such as a projection, must not write to w + epsilon."""
    params, targets, opt = setup(rho=2.0, backend=backend)
    before, seen = weights_of(opt), []
    opt.base_optimizer.register_step_pre_hook(
        lambda *args: seen.append([p.detach().clone() for p in params])
    )
    opt.step(quadratic(params, targets))
    for p, w in zip(seen[0], before, strict=True):
        assert_same_bits(p, w)


def test_base_pre_hook_that_clips_is_heeded(backend):
    params, targets, opt = setup(backend=backend)
    before = weights_of(opt)

    def clip(optimizer, args, kwargs):
        for p in params:
            p.grad = torch.ones_like(p)

    opt.base_optimizer.register_step_pre_hook(clip)
    opt.step(quadratic(params, targets))
    for p, w in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.05, rtol=0, atol=5e-7)


@pytest.mark.parametrize("rule", ALL)
def test_wrap_continues_an_existing_optimizer(rule, backend):
    """State, groups and hooks of the optimizer stay; the step after wrapping is the next one."""
    cls, options = ALL[rule]
    params = make_params([(5, 7), (3, 3)])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    bases = [
        cls([{"params": ps[:1], "lr": 0.02}, {"params": ps[1:]}], lr=0.05, **options)
        for ps in (params, twins)
    ]
    grads = [torch.randn_like(p) for p in params]
    for ps, base in zip((params, twins), bases, strict=True):
        inject(dict(zip(ps, grads, strict=True)))
        base.step()
    opt = FusedSAM.wrap(bases[0], rho=0.0, backend=backend)
    assert opt.base_optimizer is bases[0]
    assert opt.param_groups is bases[0].param_groups and opt.state is bases[0].state
    assert [group["rho"] for group in opt.param_groups] == [0.0, 0.0]
    for _ in range(2):
        grads = [torch.randn_like(p) for p in params]
        inject(dict(zip(params, grads, strict=True)))
        opt.first_step()
        inject(dict(zip(params, grads, strict=True)))
        opt.second_step()
        inject(dict(zip(twins, grads, strict=True)))
        bases[1].step()
    for p, t in zip(params, twins, strict=True):
        torch.testing.assert_close(p, t, rtol=1e-5, atol=1e-6)


def test_wrap_reads_the_options_of_groups(backend):
    params = make_params()
    base = SGD([{"params": params[:1], "rho": 0.5, "adaptive": True}, {"params": params[1:]}], lr=1)
    opt = FusedSAM.wrap(base, rho=0.1, eta=0.01, max_grad_norm=3.0, backend=backend)
    assert [(g["rho"], g["adaptive"], g["eta"]) for g in opt.param_groups] == [
        (0.5, True, 0.01),
        (0.1, False, 0.01),
    ]
    assert opt.max_grad_norm == 3.0
    Textbook(opt).step(grads_like(params), grads_like(params))


# ----------------------------------------------------------------------- any other base optimizer


@pytest.mark.parametrize("rule", OTHERS)
def test_any_other_optimizer_equals_the_textbook(rule, backend):
    """The base optimizer runs on both sides, so from the same w the update is bitwise the same.

    Only the gradients' norm differs by rounding, which the injected gradients keep out of the step.
    """
    cls, options = OTHERS[rule]
    params = make_params([(5, 7), (3, 3), (8, 2)])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    opt = FusedSAM(params, cls, rho=0.5, backend=backend, lr=0.05, **options)
    base = cls(twins, lr=0.05, **options)
    for i in range(4):
        Textbook(opt).first_step({**grads_like(params), params[i % 3]: None})
        grads = [torch.randn_like(p) for p in params]
        grads[(i + 1) % 3] = None
        inject(dict(zip(params, grads, strict=True)))
        inject(dict(zip(twins, grads, strict=True)))
        opt.second_step()
        base.step()
        assert_weights(opt, twins)
        assert opt.state.keys() == set(params) & opt.state.keys()


def test_adadeltas_own_rho_is_not_sams(backend):
    """torch.optim.Adadelta has an option of that name, 0.9: it must not become the radius."""
    params = make_params()
    try:
        opt = FusedSAM(params, torch.optim.Adadelta, rho=0.05, backend=backend, lr=0.05)
    except (TypeError, ValueError) as error:
        assert "Adadelta" in str(error) and "rho" in str(error)
        return
    before = weights_of(opt)
    inject(grads_like(params))
    opt.first_step()
    moved = torch.stack([(p - w).norm() for p, w in zip(params, before, strict=True)]).norm()
    torch.testing.assert_close(moved.detach(), torch.tensor(0.05), rtol=1e-4, atol=0)


def test_changing_rho_and_lr_between_steps(backend):
    params = make_params()
    opt = FusedSAM(params, backend=backend, lr=0.1, momentum=0.9)
    textbook = Textbook(opt)
    for rho, lr in (0.5, 0.1), (0.1, 0.2), (0.0, 0.01), (1, 1):
        opt.param_groups[0].update(rho=rho, lr=lr)
        textbook.step(grads_like(params), grads_like(params))


def test_a_parameter_moved_to_another_group_takes_its_options(backend):
    """Layer-wise unfreezing moves parameters between groups; the order of all stays the same."""
    params = make_params()
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.7, "rho": 2.0}]
    opt = FusedSAM(groups, backend=backend, lr=0.1, momentum=0.9)
    textbook = Textbook(opt)
    textbook.step(grads_like(params), grads_like(params))
    opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())
    textbook.step(grads_like(params), grads_like(params))


def test_added_group_steps_with_its_own_options(backend):
    params = make_params()
    opt = FusedSAM(params[:1], rho=0.3, backend=backend, lr=0.1, momentum=0.9)
    textbook = Textbook(opt)
    textbook.step(grads_like(params[:1]), grads_like(params[:1]))
    opt.add_param_group({"params": params[1], "rho": 0.9, "lr": 0.3})
    textbook.step(grads_like(params[:2]), grads_like(params[:2]))
    opt.base_optimizer.add_param_group({"params": [params[2]], "momentum": 0.0})
    textbook.step(grads_like(params), grads_like(params))
    assert [group["rho"] for group in opt.param_groups] == [0.3, 0.9, 0.3]


def test_added_to_the_base_optimizer_a_group_steps_with_a_scaler(backend):
    """Guards the question whether the loss scale matters, which comes before all else."""
    params = make_params()
    opt = FusedSAM(params[:1], backend=backend, lr=0.1, ascent=USAM())
    opt.base_optimizer.add_param_group({"params": params[1:]})
    grads = {p: None if g is None else 4 * g for p, g in grads_like(params).items()}
    Textbook(opt).first_step(grads, scale=4.0)


def test_group_without_parameters(backend):
    """torch accepts it, as a place for parameters to come."""
    opt = FusedSAM([{"params": []}], backend=backend, lr=0.1)
    opt.first_step()
    assert opt.grad_norm == 0
    opt.second_step()
    params = make_params()
    opt.add_param_group({"params": params})
    Textbook(opt).step(grads_like(params), grads_like(params))


def test_groups_and_state_can_be_assigned(backend):
    """As some wrappers do to share groups: the base optimizer takes what is assigned."""
    params = make_params()
    opt = FusedSAM(params, rho=0.3, backend=backend, lr=0.1, momentum=0.9)
    textbook = Textbook(opt)
    textbook.step(grads_like(params), grads_like(params))
    opt.param_groups = [{**opt.param_groups[0], "lr": 0.2, "params": params[:2]}]
    assert opt.base_optimizer.param_groups is opt.param_groups
    opt.state = type(opt.state)(dict, {params[0]: opt.state[params[0]]})
    assert opt.base_optimizer.state is opt.state
    textbook.state[params[1]].clear()
    textbook.step(grads_like(params[:2]), grads_like(params[:2]))


def test_keywords_reach_an_optimizer_that_takes_any(backend):
    """Its signature says nothing of what it knows, so nothing can be refused here."""

    class AnyOptions(SGD):
        def __init__(self, params, **options):
            super().__init__(params, options.pop("learning_rate"), **options)

    opt = FusedSAM(make_params(), AnyOptions, backend=backend, learning_rate=0.3, momentum=0.9)
    assert opt.param_groups[0]["lr"] == 0.3 and opt.param_groups[0]["momentum"] == 0.9


def test_named_parameters_keep_their_names(backend):
    model = nn.Linear(3, 2)
    opt = FusedSAM(model.named_parameters(), backend=backend, lr=0.1)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    params = list(model.parameters())
    Textbook(opt).step(grads_like(params), grads_like(params))


def test_defaults_and_repr_name_the_ascent_options(backend):
    opt = FusedSAM(make_params(), rho=0.3, eta=0.1, adaptive=True, backend=backend, lr=0.2)
    assert opt.defaults["rho"] == 0.3 and opt.defaults["lr"] == 0.2
    assert "rho: 0.3" in repr(opt) and "lr: 0.2" in repr(opt)
    assert opt.backend == backend


def test_gradients_of_gradients_are_accepted(backend):
    """backward(create_graph=True) leaves gradients that require grad themselves."""
    params, targets, opt = setup(backend=backend)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = FusedSAM(twins, rho=0.3, lr=0.05, backend=backend)
    quadratic(twins, targets)()
    inject({p: t.grad for p, t in zip(params, twins, strict=True)})
    for p in params:
        p.grad.requires_grad_()
    opt.first_step()
    twin.first_step()
    opt.second_step()
    twin.second_step()
    assert_weights(opt, twins)


def test_a_parameter_that_leaves_while_perturbed_returns_to_w(backend):
    """Freezing callbacks change groups at any time; nothing may stay at w + epsilon."""
    stays, leaves = (torch.nn.Parameter(torch.randn(5)) for _ in range(2))
    opt = FusedSAM([stays, leaves], lr=0.1, backend=backend)
    before = leaves.detach().clone()
    inject({stays: torch.randn(5), leaves: torch.randn(5)})
    opt.first_step()
    opt.param_groups[0]["params"] = [stays]
    opt.restore()
    assert torch.equal(leaves, before)


def test_inference_gradients_step_once(backend):
    """They have no version counter: the step must not fail after it has updated."""
    p = torch.nn.Parameter(torch.zeros(3))
    opt = FusedSAM([p], lr=0.1, backend=backend)
    with torch.inference_mode():
        grad = torch.ones(3)
    p.grad = grad
    opt.second_step()
    assert torch.equal(p, torch.full((3,), -0.1))


def test_gradients_without_memory_count_as_the_zeros_they_are(backend):
    """Autograd leaves ZeroTensors in .grad, whose address is 0."""
    p = torch.nn.Parameter(torch.ones(100))
    opt = FusedSAM([p], lr=0.1, weight_decay=0.5, backend=backend)
    p.grad = torch._efficientzerotensor((100,))
    opt.first_step()
    opt.second_step()
    assert torch.equal(p, torch.full((100,), 1 - 0.1 * 0.5))


def test_what_overflows_for_one_dtype_moves_none(backend):
    """A norm beyond float32 in a model that mixes dtypes: no bucket climbs alone."""
    params = [torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64)]
    opt = FusedSAM(params, lr=0.1, backend=backend)
    inject({params[0]: torch.ones(2), params[1]: torch.full((2,), 1e30, dtype=torch.float64)})
    opt.first_step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_of_many_numbers_is_not_short(backend, adaptive):
    """torch's own float32 norm of 4 million numbers on a CPU is 1e-4 short: it sums naively."""
    p = torch.nn.Parameter(torch.ones(1 << 22))
    opt = FusedSAM([p], lr=0.1, adaptive=adaptive, backend=backend)
    p.grad = torch.randn(p.shape)
    opt.first_step()
    exact = p.grad.double().norm().item()
    # Sums of 2**17 squares in at least 8 lanes: random rounding of 2**14 additions, 2**7 * 2**-24
    # of the squares, half of it of the norm; a few times that at the worst.
    assert abs(opt.grad_norm.item() / exact - 1) < 4 * 2**7 * 2**-25
