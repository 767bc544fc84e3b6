"""Random shapes, strides, dtypes, groups and missing gradients, against the textbook in float64."""

import math
import random

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from oracle import Textbook

from fused_sam import FusedSAM, Lion
from fused_sam.ascents import SAM, USAM, FriendlySAM, PNorm, VaSSO
from fused_sam.blends import GSAM, WSAM, CoupledWSAM, LookSAM
from fused_sam.schedule import Always, Every, From, Probability, Span

SETTINGS = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SGD, ADAM, ADAMW, RMSPROP = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]

SIZES = st.sampled_from([0, 1, 2, 3, 5, 63, 64, 65, 129])
SHAPES = st.one_of(
    st.just(()),
    st.tuples(SIZES),
    st.tuples(st.sampled_from([0, 1, 3, 8]), SIZES),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(1, 4)] * 4),
    st.tuples(st.integers(1, 3), st.integers(1, 3), *[st.integers(1, 3)] * 3),
)
LAYOUTS = st.sampled_from(["contiguous", "reversed", "channels_last", "permuted"])
GRAD_LAYOUTS = st.sampled_from(
    ["same", "same", "same", "contiguous", "reversed", "expanded", "gaps", "offset", "missing"]
)

FUSED_OPTIONS = st.one_of(
    st.tuples(
        st.just(SGD),
        st.fixed_dictionaries(
            {"momentum": st.sampled_from([0.0, 0.9]), "weight_decay": st.sampled_from([0.0, 0.1])},
            optional={"maximize": st.booleans(), "nesterov": st.just(False)},
        ),
    ),
    st.tuples(
        st.sampled_from([ADAM, ADAMW]),
        st.fixed_dictionaries(
            {"betas": st.sampled_from([(0.9, 0.999), (0.5, 0.7), (0.0, 0.9)])},
            optional={
                "amsgrad": st.booleans(),
                "maximize": st.booleans(),
                "weight_decay": st.sampled_from([0.0, 0.2]),
            },
        ),
    ),
    st.tuples(
        st.just(RMSPROP),
        st.fixed_dictionaries(
            {"alpha": st.sampled_from([0.9, 0.5]), "eps": st.just(1e-2)},
            optional={
                "centered": st.booleans(),
                "momentum": st.sampled_from([0.0, 0.7]),
                "weight_decay": st.sampled_from([0.0, 0.1]),
            },
        ),
    ),
)


def laid_out(tensor, layout):
    """The same values in other strides."""
    if layout == "reversed":
        order = range(tensor.dim() - 1, -1, -1)
    elif layout == "permuted" and tensor.dim() > 2:
        order = [1, *range(2, tensor.dim()), 0]
    elif layout == "channels_last" and tensor.dim() in (4, 5):
        order = [0, *range(2, tensor.dim()), 1]
    else:
        return tensor.contiguous()
    inverse = sorted(range(tensor.dim()), key=list(order).__getitem__)
    return tensor.permute(*order).contiguous().permute(*inverse) if tensor.dim() else tensor


def grad_of(param, layout, generator):
    if layout == "missing":
        return None
    kind = torch.complex128 if param.is_complex() else torch.float64
    grad = torch.randn(param.shape, dtype=kind, generator=generator).to(param.grad_dtype)
    if layout == "same":
        return torch.empty_strided(param.shape, param.stride(), dtype=param.grad_dtype).copy_(grad)
    if layout == "expanded" and grad.numel():
        return grad.flatten()[0].expand(param.shape)
    if layout == "gaps" and grad.dim():
        wide = torch.zeros(*param.shape, 2, dtype=param.grad_dtype)
        wide[..., 1] = grad
        return wide[..., 1]
    if layout == "offset":
        flat = torch.zeros(grad.numel() + 1, dtype=param.grad_dtype)
        flat[1:] = grad.flatten()
        return flat[1:].view(param.shape)
    return laid_out(grad, layout)


@SETTINGS
@given(data=st.data(), rule=FUSED_OPTIONS, seed=st.integers(0, 2**16))
def test_any_parameters_and_gradients_step_as_the_textbook(backend, data, rule, seed):
    generator = torch.Generator().manual_seed(seed)
    cls, options = rule
    groups, params = [], []
    for _ in range(data.draw(st.integers(1, 3), label="groups")):
        group = {"params": []}
        for _ in range(data.draw(st.integers(1, 4), label="params")):
            dtype = data.draw(st.sampled_from(DTYPES))
            kind = torch.complex128 if dtype.is_complex else torch.float64
            weights = torch.randn(data.draw(SHAPES), dtype=kind, generator=generator).to(dtype)
            group["params"].append(torch.nn.Parameter(laid_out(weights, data.draw(LAYOUTS))))
            if not dtype.is_complex:
                # Wider and narrower gradients, now and then.
                grad_dtypes = [dtype, dtype, torch.float32, torch.bfloat16]
                group["params"][-1].grad_dtype = data.draw(st.sampled_from(grad_dtypes))
        params += group["params"]
        group["rho"] = data.draw(st.sampled_from([0.0, 0.05, 2.0]))
        group["lr"] = data.draw(st.sampled_from([0.0, 0.01, 0.3]))
        group["eta"] = data.draw(st.sampled_from([0.0, 0.01]))
        group["adaptive"] = data.draw(st.booleans()) and not any(
            p.is_complex() for p in group["params"]
        )
        groups.append(group)
    clip = data.draw(st.sampled_from([None, None, 0.3]), label="max_grad_norm")
    if any(p.dtype == torch.float64 for p in params):
        clip = None  # the clip coefficient is as coarse as the coarsest norm in it
    strides = [p.stride() for p in params]
    opt = FusedSAM(groups, cls, max_grad_norm=clip, backend=backend, **options)
    textbook = Textbook(opt)
    for _ in range(2):
        first, second = (
            {p: grad_of(p, data.draw(GRAD_LAYOUTS), generator) for p in params} for _ in range(2)
        )
        textbook.step(first, second)
    assert [p.stride() for p in params] == strides


# ------------------------------------------------------------------------- any member, any options

FEW = settings(SETTINGS, max_examples=80)
ASCENTS = [SAM(), PNorm(1.2), PNorm(3), PNorm(math.inf), USAM(), FriendlySAM(0.5, 0.3), VaSSO(0.3)]
BLENDS = [None, None, GSAM(0.4), WSAM(0.6), WSAM(0.9, max_norm=0.5), CoupledWSAM(0.9, 0.5)]
BLENDS.append(LookSAM(k=2, alpha=0.5))
WHENS = [Always(), Always(), Every(2), From(1), Span(1, 2), Probability(0.5, seed=1)]
BASES = [
    (SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (SGD, {"momentum": 0.5, "dampening": 0.2, "maximize": True}),
    (ADAM, {"weight_decay": 0.1, "amsgrad": True}),
    (ADAMW, {"weight_decay": 0.1, "maximize": True}),
    (RMSPROP, {"centered": True, "momentum": 0.5, "eps": 1e-2}),
    (torch.optim.Adagrad, {"weight_decay": 0.1}),
    (Lion, {"weight_decay": 0.1}),
]
KINDS = [
    (torch.float32, None, False),
    (torch.float64, None, False),
    (torch.bfloat16, None, False),
    (torch.bfloat16, None, True),
    (torch.bfloat16, torch.float32, True),
    (torch.float16, torch.float32, False),
]
"""Of weights, of gradients (None: the same), and whether there are masters."""


def scaled_steps(textbook, passes, scale, skip):
    """One step as a GradScaler makes it."""
    opt, (first, second) = textbook.opt, passes
    first, second = [
        {p: None if g is None else (g * scale).to(g.dtype) for p, g in grads.items()}
        for grads in (first, second)
    ]
    textbook.first_step(first, scale)
    opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(float(skip))
    textbook.second_step(second, grad_scale=scale, found_inf=skip)
    del opt.grad_scale, opt.found_inf


@FEW
@given(seed=st.integers(2**20, 2**32))
def test_any_member_with_any_options_steps_as_its_formula(seed):
    """Guards pairs that no test names: every draw is a construction that must work.

    Three steps, of which the second may be skipped, with gradients that are missing, and groups
    that do not climb. All draws are of one seed: those of Hypothesis resemble one another, and
    80 of them left most pairs out.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ascent, blend, when = rng.choice(ASCENTS), rng.choice(BLENDS), rng.choice(WHENS)
    if isinstance(blend, LookSAM):
        when = Always()  # it says itself when
    cls, options = rng.choice(BASES)
    dtype, grad_dtype, masters = rng.choice(KINDS)
    scale, clip = rng.choice([1.0, 8.0]), rng.choice([None, 0.3])
    groups, params = [], []
    for i in range(rng.randint(1, 3)):
        shapes = rng.choices([(), (3,), (65,), (4, 8)], k=rng.randint(1, 2))
        mine = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
        for p in mine if grad_dtype else ():
            p.grad_dtype = grad_dtype
        params += mine
        groups.append(
            {"params": mine, "rho": rng.choice([0.05, 0.5]), "lr": rng.choice([0.01, 0.1])}
        )
        groups[-1].update(rng.choice([{}, {"adaptive": True}, {"adaptive": True, "eta": 0.1}]))
        if i and rng.random() < 0.4:
            groups[-1]["ascent"] = None
    members = {"ascent": ascent, "blend": blend, "when": when, "max_grad_norm": clip}
    note(f"{members}, {cls.__name__}, {options}, {dtype}, {grad_dtype}, masters={masters}")
    note(f"{scale=}, {groups}")
    opt = FusedSAM(groups, cls, master_weights=masters, backend="reference", **members, **options)
    textbook = Textbook(opt, opt.when.climbs if opt.when != Always() else lambda number: True)
    skips = rng.random() < 0.5
    for i in range(3):
        passes = [
            {
                p: None
                if rng.random() < 0.1
                else torch.randn(p.shape, generator=generator).to(p.grad_dtype)
                for p in params
            }
            for _ in range(2)
        ]
        if scale == 1.0:
            textbook.step(*passes)
        else:
            scaled_steps(textbook, passes, scale, skips and i == 1)
