"""Blends around the step: other base optimizers, scalers, checkpoints, changes between passes."""

import copy
import io

import pytest
import torch
from oracle import Textbook, assert_same_bits, blend, exact, inject, params_of

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM, SAM
from fused_sam.blends import GSAM, WSAM, CoupledWSAM

SGD = torch.optim.SGD


def make(backend, base=SGD, **options):
    params = [torch.nn.Parameter(torch.randn(n)) for n in (3, 65, 7)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    return FusedSAM(groups, base, lr=0.05, backend=backend, blend=GSAM(alpha=0.4), **options)


def some_grads(opt, seed, missing=()):
    generator = torch.Generator().manual_seed(seed)
    return {
        p: None if i in missing else torch.randn(p.shape, generator=generator)
        for i, p in enumerate(params_of(opt))
    }


def test_a_value_checks_itself_and_prints_what_it_is():
    assert str(GSAM(alpha=0.2)) == "GSAM(alpha=0.2)"
    assert GSAM(0.2).options() == {"blend": "gsam", "blend_alpha": 0.2}
    with pytest.raises(ValueError, match=r"alpha must be finite and >= 0, got -1"):
        GSAM(-1)
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match=r"blend=SAM\(\).*pass it as ascent=SAM"):
        FusedSAM([{"params": [p], "blend": SAM()}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"blend='mix' is not known; choose from \['gsam', .*\], or N"
    ):
        FusedSAM([p], lr=0.1, blend="mix")
    q = torch.nn.Parameter(torch.ones(1))
    groups = [{"params": [p]}, {"params": [q], "blend": None}]
    with pytest.raises(ValueError, match=r"blend='gsam' and None"):
        FusedSAM(groups, lr=0.1, blend=GSAM(0.1))
    FusedSAM([{"params": [p]}, {"params": [q], "ascent": None}], lr=0.1, blend=GSAM(0.1))
    for gamma in (1, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), got"):
            WSAM(gamma)
    with pytest.raises(ValueError, match="max_norm=0 would stop"):
        CoupledWSAM(max_norm=0)
    with pytest.raises(ValueError, match=r"blend='gsam' needs a gradient at w.*'msam'"):
        FusedSAM([p], lr=0.1, momentum=0.9, ascent=MSAM(), blend=GSAM(0.1))


@pytest.mark.parametrize("scale", [None, 4.0])
def test_a_base_optimizer_without_a_rule_sees_the_blend(scale, backend):
    """Guards the gradients that it finds, with hooks that look at w, and a loss scale."""
    opt = make(backend, torch.optim.Adamax)
    first, second = some_grads(opt, 1, missing=(0,)), some_grads(opt, 2, missing=(1,))
    seen = blend(opt.param_groups, first, second)
    inject(first)
    opt.first_step()
    inject(second)
    if scale is not None:
        opt.grad_scale = torch.tensor(scale)
    opt.base_optimizer.register_step_pre_hook(lambda *_: None)
    opt.second_step()
    for p in params_of(opt):
        if second[p] is not None:
            want = seen[p].value / (scale or 1)
            assert (exact(p.grad) - want).abs().max() <= 1e-6 * seen[p].magnitude.max()


def test_hooks_that_need_w_do_not_lose_what_is_kept(backend):
    """Guards the way back that comes before the update: the blend is the same."""
    opt = make(backend, momentum=0.9)
    twin = copy.deepcopy(opt)
    opt.base_optimizer.register_step_pre_hook(lambda *_: None)
    for one in (opt, twin):
        inject(some_grads(one, 1))
        one.first_step()
        inject(some_grads(one, 2))
        one.second_step()
    for p, q in zip(params_of(opt), params_of(twin), strict=True):
        assert_same_bits(p, q)


def test_a_layout_that_is_built_anew_between_the_passes_keeps_the_gradients(backend):
    opt = make(backend, momentum=0.9)
    textbook = Textbook(opt)
    textbook.first_step(some_grads(opt, 1, missing=(1,)))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.randn(9))]})
    textbook.second_step(some_grads(opt, 2))


def test_a_step_that_was_given_up_is_no_blend(backend):
    opt = make(backend, momentum=0.9)
    textbook = Textbook(opt)
    textbook.first_step(some_grads(opt, 1))
    textbook.restore()
    textbook.second_step(some_grads(opt, 2))
    textbook.step(some_grads(opt, 3), some_grads(opt, 4))


def test_unscaled_gradients_after_the_climb_are_refused(backend):
    """Guards two gradients of different scales: what is kept is still scaled."""
    opt, scaler = make(backend), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # which makes its scale
    inject(some_grads(opt, 1))
    opt.first_step()
    inject(some_grads(opt, 2))
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"unscale_.*blend='gsam'.*one scale.*max_grad_norm"):
        scaler.step(opt)
    opt.restore()


def test_checkpoints_hold_plain_data_and_resume_to_the_bit(backend):
    opt = make(backend, momentum=0.9)
    for i in range(2):
        inject(some_grads(opt, 2 * i))
        opt.first_step()
        inject(some_grads(opt, 2 * i + 1))
        opt.second_step()
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "w": [p.detach() for p in params_of(opt)]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = FusedSAM(
        [{"params": params} for params in ([torch.zeros(3), torch.zeros(65)], [torch.zeros(7)])],
        SGD,
        lr=1.0,
        backend=backend,
        momentum=0.9,
        blend=GSAM(0.1),
    )
    for p, w in zip(params_of(other), saved["w"], strict=True):
        p.requires_grad_().data.copy_(w)
    other.load_state_dict(saved["opt"])
    assert other.param_groups[0]["blend"] == "gsam"
    assert other.param_groups[0]["blend_alpha"] == 0.4
    assert other.param_groups[1]["lr"] == 0.02
    for one in (opt, other):
        inject(some_grads(one, 8))
        one.first_step()
        inject(some_grads(one, 9))
        one.second_step()
    for p, q in zip(params_of(opt), params_of(other), strict=True):
        assert_same_bits(p, q)


def test_plain_sam_keeps_no_gradients(backend):
    """Guards memory: what a blend wants is allocated with its first climb."""
    opt = FusedSAM([torch.nn.Parameter(torch.ones(5))], SGD, lr=0.1, backend=backend)
    inject(some_grads(opt, 1))
    opt.first_step()
    assert opt._facts.engine.buckets[0].kept is None
    opt.restore()
    opt.param_groups[0].update(GSAM(0.1).options())
    inject(some_grads(opt, 1))
    opt.first_step()
    assert opt._facts.engine.buckets[0].kept is not None


class Rateless(torch.optim.Optimizer):
    """A base optimizer that has no learning rate."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        """None that would be seen."""


def test_what_is_subtracted_by_the_learning_rate_needs_one(backend):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"blend='wsam' steps by the group's.*Rateless is lr=None"):
        FusedSAM([p], Rateless, backend=backend, blend=WSAM())
    FusedSAM([p], Rateless, backend=backend, blend=CoupledWSAM())


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW, torch.optim.Adamax])
def test_a_learning_rate_of_zero_keeps_the_bits(base, backend):
    """Guards the sharpness, which the learning rate multiplies: -0.0 - 0.0 and infinity too."""
    params = [torch.nn.Parameter(torch.tensor([-0.0, 1.0, 3e-39])) for _ in range(2)]
    options = {"weight_decay": 0.0, "backend": backend}
    opt = FusedSAM(params, base, rho=0.0, lr=0.0, blend=WSAM(), **options)
    before = [p.detach().clone() for p in params]
    for value in (1.0, torch.inf):
        inject({p: torch.ones(3) for p in params})
        opt.first_step()
        inject({p: torch.full((3,), value) for p in params})
        opt.second_step()
        for p, w in zip(params, before, strict=True):
            if base is not torch.optim.Adamax or value == 1.0:
                assert_same_bits(p, w)


@pytest.mark.parametrize(
    "blend", [WSAM(0.8, max_norm=0.7), CoupledWSAM(0.8, max_norm=0.7)], ids=str
)
@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_the_loss_scale_does_not_show(base, blend, backend):
    """Guards the norms that are clipped, and the sharpness: both are of unscaled gradients.

    The scale changes from step to step, one step is skipped, and max_grad_norm clips on top.
    """
    ends = []
    for scales in ((1.0,) * 5, (1024.0, 4.0, 2.0**20, 64.0, 1.0)):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n).double()) for n in (3, 65, 7)]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
        options = {"lr": 0.05, "rho": 0.1, "max_grad_norm": 0.5, "blend": blend}
        opt = FusedSAM(groups, base, backend=backend, **options)
        for i, scale in enumerate(scales):
            first, second = some_grads(opt, 2 * i), some_grads(opt, 2 * i + 1)
            inject({p: g.double() * scale for p, g in first.items()})
            opt.first_step()
            inject({p: g.double() * scale for p, g in second.items()})
            opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(float(i == 2))
            opt.second_step()
            del opt.grad_scale, opt.found_inf
        ends.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", [SGD, torch.optim.Adamax])
@pytest.mark.parametrize("blend", [WSAM(), CoupledWSAM()], ids=str)
def test_uphill_is_downhill_of_the_negative(blend, base, backend):
    """Guards the sign of what is subtracted after the step."""
    ends = []
    for sign in (1, -1):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 65))
        options = {"rho": 0.0, "lr": 0.1, "maximize": sign < 0, "blend": blend}
        opt = FusedSAM([p], base, backend=backend, **options)
        inject({p: torch.full((65,), sign * 1.0)})
        opt.first_step()
        inject({p: torch.full((65,), sign * 2.0)})
        opt.second_step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends)
    assert not torch.equal(ends[0], torch.linspace(-1, 1, 65))


@pytest.mark.parametrize("base", [SGD, torch.optim.Adamax])
@pytest.mark.parametrize("blend", [WSAM(0.0), CoupledWSAM(0.0)], ids=str)
def test_what_has_the_weight_zero_is_not_looked_at(blend, base, backend):
    """Guards zero times infinity: with gamma = 0 the step is the base optimizer's, with g."""
    p, q = [torch.nn.Parameter(torch.linspace(-1, 1, 65)) for _ in range(2)]
    opt, plain = FusedSAM([p], base, lr=0.1, backend=backend, blend=blend), base([q], lr=0.1)
    g = torch.linspace(2, 3, 65)
    inject({p: g, q: g})
    opt.first_step()
    inject({p: torch.full((65,), torch.inf)})
    opt.second_step()
    plain.step()
    torch.testing.assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("base", [SGD, torch.optim.Adamax])
def test_a_large_gradient_that_is_not_seen_does_not_blur_the_norm_that_clips(base, backend):
    """Guards the norm besides groups that do not climb: no small difference of large numbers."""
    climbs, stays = [torch.nn.Parameter(torch.zeros(65)) for _ in range(2)]
    groups = [{"params": [climbs]}, {"params": [stays], "ascent": None}]
    options = {"rho": 0.0, "lr": 1.0, "blend": WSAM(0.5), "max_grad_norm": 1e-3}
    opt = FusedSAM(groups, base, backend=backend, **options)
    seen = {}
    opt.base_optimizer.register_step_post_hook(lambda *_: seen.update(g=stays.grad.clone()))
    inject({climbs: torch.full((65,), 1e-2), stays: torch.full((65,), 1.0)})
    opt.first_step()
    inject({climbs: torch.full((65,), 1e3), stays: torch.full((65,), 1e-2)})
    opt.second_step()
    # The gradient of each of 130 elements is clipped to this.
    share = torch.full((65,), 1e-3 / 130**0.5)
    got = -stays.detach() if base is SGD else seen["g"]
    torch.testing.assert_close(got, share, rtol=1e-3, atol=0)


@pytest.mark.parametrize("blend", [WSAM(), CoupledWSAM(), GSAM(0.3)], ids=str)
def test_with_an_infinite_gradient_at_w_the_step_is_sams(blend, backend):
    """Guards the weights: what is kept then is not looked at."""
    p = torch.nn.Parameter(torch.zeros(65))
    opt = FusedSAM([p], SGD, lr=0.1, backend=backend, blend=blend)
    inject({p: torch.full((65,), torch.inf)})
    opt.first_step()
    inject({p: torch.full((65,), 2.0)})
    opt.second_step()
    torch.testing.assert_close(p.detach(), torch.full((65,), -0.2))
