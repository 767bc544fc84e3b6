"""What ``optimizer.last_step`` tells: against sums over the injected gradients in float64."""

import copy
import math

import pytest
import torch
from family import dot, give, norm
from oracle import assert_same_bits

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM, USAM, FriendlySAM, PNorm, VaSSO
from fused_sam.blends import GSAM, WSAM, CoupledWSAM
from fused_sam.schedule import AESAM, Every

SHAPES = [(5,), (3, 4), (), (65,)]
CLOSE = {"rtol": 1e-5, "atol": 0}
SAM_ON = {"ascent": None}


def make(backend="reference", last=None, base=torch.optim.SGD, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    groups = [{"params": params[:3]}, {"params": params[3:], **(last or {})}]
    options = {"lr": 0.01, "rho": 0.1, **options}
    return FusedSAM(groups, base, backend=backend, **options), params


def gradients(params, seed, missing=()):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    return [None if i in missing else g for i, g in enumerate(grads)]


def two_passes(opt, params, seed=0, scale=1.0, missing=((), ())):
    g, h = (gradients(params, 2 * seed + i, missing[i]) for i in range(2))
    give(params, g, scale)
    if opt.first_step():
        give(params, h, scale)
    opt.second_step()
    return g, h


def told(opt):
    step = opt.last_step
    return step.grad_norm, step.second_grad_norm, step.cosine


def assert_told(opt, *expected):
    """None, or a tensor () of this value."""
    for value, right in zip(told(opt), expected, strict=True):
        if right is None:
            assert value is None
        else:
            assert value.shape == () and not value.requires_grad
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.item(), right, rtol=1e-12, atol=1e-12, equal_nan=True)


def of(g, h):
    """||g||, ||h|| and the cosine; of g what h has."""
    inside = [None if y is None else x for x, y in zip(g, h, strict=True)]
    return norm(g), norm(h), dot(inside, h) / norm(inside) / norm(h)


# The options, and which of the three are known for nothing.
MEMBERS = {
    "sam": ({}, (1, 0, 0)),
    "asam": ({"adaptive": True}, (0, 0, 0)),
    "usam": ({"ascent": USAM()}, (1, 0, 0)),
    "p-norm": ({"ascent": PNorm(math.inf)}, (0, 0, 0)),
    "friendly": ({"ascent": FriendlySAM()}, (0, 0, 0)),
    "clipped": ({"max_grad_norm": 0.1}, (1, 1, 0)),
    "gsam": ({"blend": GSAM(0.3), "adaptive": True, "max_grad_norm": 0.1}, (1, 1, 1)),
    "wsam": ({"blend": WSAM(max_norm=0.1)}, (1, 1, 1)),
    "vasso-wsam": ({"blend": CoupledWSAM(), "ascent": VaSSO()}, (1, 1, 1)),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_what_a_step_has_computed_is_known_and_the_rest_if_it_measures(name, backend):
    """Guards the bits too: those of a step that measures are the same."""
    options, free = MEMBERS[name]
    opt, params = make(backend, **options)
    twin, others = make(backend, **options)
    assert told(opt) == (None,) * 3 and opt.last_step.climbed is None
    twin.measures = True
    for seed in range(3):
        g, h = two_passes(opt, params, seed)
        two_passes(twin, others, seed)
        values = of(g, h)
        assert opt.last_step.climbed is True
        assert_told(opt, *[v if known else None for v, known in zip(values, free, strict=True)])
        assert_told(twin, *values)
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adamax])
def test_missing_gradients_and_groups_that_do_not_climb(base, backend):
    opt, params = make(backend, SAM_ON, base, max_grad_norm=1.0)
    inside = slice(0, 3)
    missing = (1,), (0,)
    g, h = two_passes(opt, params, missing=missing)
    assert_told(opt, norm(g[inside]), None, None)  # the norm that clips is of all groups
    opt.measures = True
    g, h = two_passes(opt, params, missing=missing)
    assert_told(opt, norm(g[inside]), *of(g[inside], h[inside])[1:])
    opt.param_groups[0]["adaptive"] = True  # of g there is what the blend's sums have
    g, h = two_passes(opt, params, missing=missing)
    there = [None, *g[1:3]]
    assert_told(opt, norm(there), *of(g[inside], h[inside])[1:])


def test_zero_and_infinite_gradients(backend):
    opt, params = make(backend)
    opt.measures = True
    for value, length in ((0.0, 0.0), (math.inf, math.inf)):
        give(params, [torch.full_like(p, value) for p in params])
        opt.first_step()
        give(params, [torch.ones_like(p) for p in params])
        opt.second_step()
        assert_told(opt, length, math.sqrt(sum(p.numel() for p in params)), math.nan)


def test_measuring_begins_with_a_climb(backend):
    """Guards sums with what an earlier climb has kept, or none."""
    opt, params = make(backend, adaptive=True)
    opt.measures = True
    two_passes(opt, params)
    opt.measures = False
    give(params, gradients(params, 7))
    opt.first_step()
    opt.measures = True
    h = gradients(params, 8)
    give(params, h)
    opt.second_step()
    assert_told(opt, None, norm(h), None)
    g, h = two_passes(opt, params)
    assert_told(opt, *of(g, h))
    with pytest.raises(TypeError, match="measures must be True or False, got 100"):
        opt.measures = 100


@pytest.mark.parametrize("measures", [False, True])
def test_a_step_that_does_not_climb_has_one_gradient(measures, backend):
    opt, params = make(backend, when=Every(2), blend=GSAM(0.3))
    opt.measures = measures
    two_passes(opt, params)
    g, _ = two_passes(opt, params, 1)
    assert opt.last_step.climbed is False
    assert_told(opt, norm(g) if measures else None, None, None)
    opt.max_grad_norm = 0.1
    two_passes(opt, params)
    g, _ = two_passes(opt, params, 1)
    assert_told(opt, norm(g), None, None)
    # A loop that knows nothing of schedules does its second backward, at w.
    two_passes(opt, params)
    give(params, gradients(params, 3))
    opt.first_step(zero_grad=True)
    g = gradients(params, 4)
    give(params, g)
    opt.second_step()
    assert_told(opt, norm(g), None, None)


def test_aesam_has_computed_the_norm():
    opt, params = make(when=AESAM(10))
    climbed = set()
    for seed in range(6):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.zeros(()))
        g = [x / 2**seed for x in gradients(params, seed)]
        h = gradients(params, seed + 9)
        give(params, g, 64.0)
        if opt.first_step(scaler=scaler):
            give(params, h, 64.0)
        scaler.step(opt)
        climbed.add(opt.last_step.climbed)
        assert_told(opt, norm(g), None, None)
    assert climbed == {True, False}


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("how", ["step", "unscale_", "closure"])
def test_a_loss_scale_does_not_show(how, measures, backend):
    """Guards a scale that changes after the step: the scaler writes it in place."""
    opt, params = make(backend, max_grad_norm=0.5 if measures else None)
    opt.measures = measures
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    steps = []
    for seed in range(3):
        scaler.scale(torch.zeros(()))
        scale = scaler.get_scale()
        g, h = gradients(params, seed), gradients(params, seed + 9)
        give(params, g, scale)
        if how == "closure":
            scaler.step(opt, lambda h=h, scale=scale: give(params, h, scale))
        else:
            opt.first_step()
            give(params, h, scale)
            if how == "unscale_":
                scaler.unscale_(opt)
            scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        steps.append((opt.last_step, g, h))
    assert scale == 4096.0
    for step, g, h in steps:
        expected = of(g, h)
        assert math.isclose(step.grad_norm.item(), expected[0], rel_tol=1e-12)
        if measures:
            assert math.isclose(step.second_grad_norm.item(), expected[1], rel_tol=1e-12)
            assert math.isclose(step.cosine.item(), expected[2], rel_tol=1e-12)


def test_a_skipped_step_has_a_norm_that_is_not_finite(backend):
    opt, params = make(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for i in range(2):
        give(params, [torch.full_like(p, math.inf) for p in params])
        (opt.first_step if i == 0 else lambda: scaler.step(opt))()
    assert opt.last_step.climbed and opt.last_step.grad_norm.item() == math.inf


@pytest.mark.parametrize("attached", [False, True])
def test_msam_has_a_gradient_away_from_w_only(attached, backend):
    opt, params = make(backend, momentum=0.9, ascent=MSAM())
    model = torch.nn.Module()
    model.params = torch.nn.ParameterList(params)
    if attached:
        opt.attach(model)
    opt.measures = True
    for seed in range(3):
        opt.train()
        g = gradients(params, seed)
        give(params, g)
        if attached:
            model.state_dict()  # back at w, after the pass
        opt.step()
        assert opt.last_step.climbed is (seed > 0)
        assert_told(opt, *((None, norm(g)) if seed else (norm(g), None)), None)


# ------------------------------------------------------------------------------------- the losses


def a_model(**options):
    torch.manual_seed(4)
    model = torch.nn.Linear(4, 1)
    options = {"lr": 0.1, "rho": 0.5, "model": model, **options}
    return model, FusedSAM(model.parameters(), torch.optim.SGD, **options)


def loss_of(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss


def by_hand(model, xs):
    """The loss at w and at w + epsilon, and g, in plain torch."""
    twin = torch.nn.Linear(4, 1)  # which nobody is attached to
    twin.load_state_dict(model.state_dict())
    twin.double()
    params = list(twin.parameters())

    def total():
        return sum(twin(x.double()).square().mean() for x in xs)

    loss = total()
    g = torch.autograd.grad(loss, params)
    epsilon = [0.5 * x / norm(g) for x in g]
    with torch.no_grad():
        torch._foreach_add_(params, epsilon)
        away = total()
        torch._foreach_sub_(params, epsilon)
    return loss.item(), away.item(), norm(g)


def test_closures_tell_both_losses():
    model, opt = a_model()
    x = torch.randn(6, 4)
    loss, away, length = by_hand(model, [x])
    returned = opt.step(lambda: loss_of(model, x))
    step = opt.last_step
    assert step.loss.grad_fn is None and returned.grad_fn is not None
    for value, right in ((step.loss, loss), (step.loss_perturbed, away), (step.grad_norm, length)):
        torch.testing.assert_close(value.item(), right, **CLOSE)
    # With the gradients there the closure runs away from w only.
    opt.zero_grad()
    loss, away, _ = by_hand(model, [x])
    loss_of(model, x)
    opt.step(lambda: loss_of(model, x).item())
    assert opt.last_step.loss is None
    torch.testing.assert_close(opt.last_step.loss_perturbed, away, **CLOSE)
    # What is not a number is not kept, nor is what an exception has ended.
    opt.zero_grad()

    def breaks():
        if opt.is_perturbed:
            raise KeyError
        return loss_of(model, x)

    with pytest.raises(KeyError):
        opt.step(breaks)
    assert opt.last_step.loss is None  # that of the step before
    for wrap in (lambda loss: {"loss": loss}, bool):  # Lightning's closures return True
        opt.step(lambda wrap=wrap: wrap(loss_of(model, x)))
        opt.zero_grad()
        assert opt.last_step.loss is None and opt.last_step.loss_perturbed is None
        assert opt.last_step.climbed


def test_a_closure_that_runs_once_is_at_w():
    model, opt = a_model(when=Every(2))
    x = torch.randn(6, 4)
    for climbs in (True, False):
        loss, *_ = by_hand(model, [x])
        opt.step(lambda: loss_of(model, x))
        opt.zero_grad()
        torch.testing.assert_close(opt.last_step.loss.item(), loss, **CLOSE)
        second = opt.last_step.loss_perturbed
        assert (second is not None) is climbs is opt.last_step.climbed
    model, opt = a_model(ascent=MSAM(), momentum=0.9)
    for i in range(2):
        loss = opt.step(lambda: loss_of(model, x)).item()
        step = opt.last_step
        assert (step.loss, step.loss_perturbed)[i] == loss
        assert (step.loss_perturbed, step.loss)[i] is None
        opt.zero_grad()


@pytest.mark.parametrize("ascent", ["global", "local"])
def test_accumulated_steps_add_their_losses_up(ascent):
    model, opt = a_model()
    opt.measures = True
    xs = [torch.randn(6, 4) for _ in range(3)]
    loss, away, length = by_hand(model, xs)
    opt.accumulate(xs, lambda x: loss_of(model, x), ascent=ascent)
    step = opt.last_step
    torch.testing.assert_close(step.loss.item(), loss, **CLOSE)
    if ascent == "global":
        torch.testing.assert_close(step.loss_perturbed.item(), away, **CLOSE)
        torch.testing.assert_close(step.grad_norm.item(), length, **CLOSE)
        assert step.cosine is not None
    else:
        # Each has climbed by itself: there is no g.
        assert step.loss_perturbed > step.loss
        assert step.grad_norm is None and step.cosine is None
        square = sum(p.grad.square().sum() for p in model.parameters())
        torch.testing.assert_close(step.second_grad_norm, square.sqrt())


# ------------------------------------------------------------------------------ what surrounds it


def test_an_object_keeps_its_values_and_a_half_done_step_does_not_count(backend):
    opt, params = make(backend)
    opt.measures = True
    g, h = two_passes(opt, params)
    step = opt.last_step
    give(params, gradients(params, 5))
    opt.first_step()
    assert opt.last_step is step
    opt.restore()
    assert opt.last_step is step
    two_passes(opt, params, 3)
    values = step.grad_norm.item(), step.second_grad_norm.item(), step.cosine.item()
    for value, right in zip(values, of(g, h), strict=True):
        assert math.isclose(value, right, rel_tol=1e-12)


def test_hooks_proxies_and_copies(backend):
    """Guards what a proxy of a framework writes: it must land on the optimizer."""
    opt, params = make(backend)
    proxy = object.__new__(type("Proxy", (FusedSAM,), {}))
    proxy.__dict__ = {**opt.__dict__}
    proxy.measures = True
    seen = []
    opt.base_optimizer.register_step_post_hook(lambda *_: seen.append(opt.last_step))
    two_passes(proxy, params)
    assert proxy.last_step is opt.last_step is seen[0]
    assert opt.last_step.cosine is not None and opt.measures
    assert copy.deepcopy(opt).last_step.climbed is None


def test_halves_and_float32(backend):
    """Guards the dtype, and sums that float32 would not hold."""
    opt, params = make(backend, dtype=torch.bfloat16)
    opt.measures = True
    g, h = two_passes(opt, params)
    for value, right in zip(told(opt), of(*[[x.double() for x in y] for y in (g, h)]), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.item(), right, rtol=1e-5, atol=0)
