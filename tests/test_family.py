"""Members of the family against tests/family.py: six steps in float64, and no drift."""

import copy
import io
import math

import family
import pytest
import torch
from family import Surface, give, parameters
from oracle import assert_same_bits

from fused_sam import FusedSAM
from fused_sam.ascents import USAM, FriendlySAM, PNorm, VaSSO
from fused_sam.blends import GSAM, WSAM, CoupledWSAM, LookSAM
from fused_sam.schedule import Every

SHAPES = [(5,), (3, 4), (), (2, 3)]
STEPS = 6
MISSING = {(1, 0): (1,), (2, 1): (0, 3), (3, 0): (2,), (3, 1): (2,)}


class Oracles:
    """The member's oracle with its options."""

    @staticmethod
    def of(cls, **options):
        return type(cls.__name__, (cls,), options)


MEMBERS = {
    "sam": ({}, family.Member),
    "p-norm": ({"ascent": PNorm(1.5)}, Oracles.of(family.PNorm, p=1.5)),
    "p-norm-3": ({"ascent": PNorm(3)}, Oracles.of(family.PNorm, p=3.0)),
    "p-norm-inf": ({"ascent": PNorm(math.inf)}, Oracles.of(family.PNorm, p=math.inf)),
    "usam": ({"ascent": USAM()}, family.USAM),
    "friendly": (
        {"ascent": FriendlySAM(sigma=0.9, lam=0.6)},
        Oracles.of(family.Friendly, sigma=0.9, lam=0.6),
    ),
    "vasso": ({"ascent": VaSSO(theta=0.4)}, Oracles.of(family.VaSSO, theta=0.4)),
    "gsam": ({"blend": GSAM(0.3)}, Oracles.of(family.GSAM, alpha=0.3)),
    "coupled-wsam": (
        {"blend": CoupledWSAM(0.88)},
        Oracles.of(family.CoupledWSAM, gamma=0.88),
    ),
    "coupled-wsam-clips": (
        {"blend": CoupledWSAM(0.6, max_norm=1.5)},
        Oracles.of(family.CoupledWSAM, gamma=0.6, max_norm=1.5),
    ),
    "wsam": ({"blend": WSAM(0.88)}, Oracles.of(family.DecoupledWSAM, gamma=0.88)),
    "wsam-clips": (
        {"blend": WSAM(0.8, max_norm=1.5)},
        Oracles.of(family.DecoupledWSAM, gamma=0.8, max_norm=1.5),
    ),
    "looksam": ({"blend": LookSAM(k=2, alpha=0.6)}, Oracles.of(family.LookSAM, k=2, alpha=0.6)),
    "gsam-usam": (
        {"blend": GSAM(0.2), "ascent": USAM()},
        type("Both", (family.GSAM, family.USAM), {"alpha": 0.2}),
    ),
}
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.02}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamax": (torch.optim.Adamax, {}),  # which has no rule: it steps by itself
}
GROUPS = [
    {"params": [0], "rho": 0.7, "sigma": 0.5},
    {"params": [1], "adaptive": True, "eta": 0.1, "lam": 0.3, "theta": 0.7},
    {"params": [2, 3], "lr": 0.02},
]


def start():
    return parameters(SHAPES)


def make(name, base="sgd", backend="auto", groups=GROUPS, **options):
    params = start()
    cls, more = BASES[base]
    rows = [{**group, "params": [params[i] for i in group["params"]]} for group in groups]
    options = {"lr": 0.05, "rho": 0.4, **more, **MEMBERS[name][0], **options}
    return FusedSAM(rows, cls, backend=backend, **options), params


def oracle(name, base="sgd", groups=GROUPS, **options):
    cls, more = BASES[base]
    common = {"lr": 0.05, "rho": 0.4, "adaptive": False, "eta": 0.0, **more}
    rows = [{**common, **group} for group in groups]
    return MEMBERS[name][1](start(), rows, cls, **options)


def step(opt, params, surface, i):
    give(params, surface.gradient(params, i, 0))
    if opt.first_step(zero_grad=True):
        give(params, surface.gradient(params, i, 1))
    opt.second_step(zero_grad=True)


def compare(params, member):
    for p, w in zip(params, member.weights, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("missing", [{}, MISSING], ids=["all", "missing"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MEMBERS)
def test_members_follow_their_formulas(name, base, missing, backend):
    """Guards groups of their own rho, ASAM's T in one of them, and gradients that are missing."""
    opt, params = make(name, base, backend)
    surface, member = Surface(SHAPES, missing), oracle(name, base)
    for i in range(STEPS):
        step(opt, params, surface, i)
        member.step(surface)
        compare(params, member)


@pytest.mark.parametrize("name", MEMBERS)
def test_clipped_and_now_and_then(name, backend):
    """Guards the norm of what the base optimizer sees, blended or not, in every third step."""
    options = {"when": Every(3), "max_grad_norm": 0.7}
    if name == "looksam":
        options["blend"] = LookSAM(k=None, alpha=0.6)  # ``when`` says it
    opt, params = make(name, backend=backend, **options)
    surface = Surface(SHAPES)
    member = oracle(name, clip=0.7, climbs=lambda i: i % 3 == 0)
    for i in range(STEPS):
        step(opt, params, surface, i)
        member.step(surface)
        compare(params, member)


@pytest.mark.parametrize("name", MEMBERS)
def test_groups_that_do_not_climb(name, backend):
    groups = [GROUPS[0], {**GROUPS[1], "ascent": None}, GROUPS[2]]
    opt, params = make(name, backend=backend, groups=groups)
    surface, member = Surface(SHAPES), oracle(name, groups=groups)
    for i in range(STEPS):
        step(opt, params, surface, i)
        member.step(surface)
        compare(params, member)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("way", ["file", "copy"])
def test_a_resumed_run_goes_on_as_the_first(name, way, backend):
    surface = Surface(SHAPES)
    opt, params = make(name, backend=backend)
    for i in range(3):
        step(opt, params, surface, i)
    if way == "file":
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        twin, others = make(name, backend=backend)
        for p, w in zip(others, params, strict=True):
            p.data.copy_(w.detach())
        twin.load_state_dict(torch.load(file))
    else:
        twin = copy.deepcopy(opt)
        others = [p for group in twin.param_groups for p in group["params"]]
    for i in range(3, STEPS):
        step(opt, params, surface, i)
        step(twin, others, surface, i)
        for p, w in zip(params, others, strict=True):
            assert_same_bits(p, w.detach())


def test_usam_needs_the_loss_scale(backend):
    """Guards against a climb as long as the loss scale says; with it the scale does not show."""
    ends = []
    for scale in (1.0, 4096.0):
        opt, params = make("usam", backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        surface = Surface(SHAPES)
        for i in range(STEPS):
            scaler.scale(torch.zeros(()))
            give(params, [g * scale for g in surface.gradient(params, i, 0)])
            opt.first_step(zero_grad=True, scaler=scaler)
            give(params, [g * scale for g in surface.gradient(params, i, 1)])
            scaler.step(opt)
            scaler.update()
        ends.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)

    before = [p.detach().clone() for p in params]
    give(params, surface.gradient(params, 0, 0))
    opt.first_step()
    give(params, surface.gradient(params, 0, 1))
    with pytest.raises(RuntimeError, match=r"first_step\(scaler=scaler\)"):
        scaler.step(opt)
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)


def test_an_infinite_gradient_moves_nothing(backend):
    for name in MEMBERS:
        opt, params = make(name, backend=backend)
        before = [p.detach().clone() for p in params]
        give(params, Surface(SHAPES, broken={(0, 0)}).gradient(params, 0, 0))
        assert opt.first_step()
        for p, w in zip(params, before, strict=True):
            assert_same_bits(p, w)


@pytest.mark.parametrize("blend", [GSAM(0.0), CoupledWSAM(0.5)], ids=str)
def test_a_blend_that_is_sam_is_sam_to_the_bit(blend, backend):
    """Guards the gradient at w, which must not be looked at."""
    runs = []
    for other in (None, blend):
        opt, params = make("sam", backend=backend, blend=other)
        for i in range(STEPS):
            step(opt, params, Surface(SHAPES), i)
        runs.append(params)
    for p, w in zip(*runs, strict=True):
        if backend == "reference":  # torch's own kernel serves SAM, and rounds otherwise
            torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-13, atol=1e-13)
        else:
            assert_same_bits(p, w.detach())
