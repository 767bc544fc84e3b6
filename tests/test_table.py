"""Every rule with every option, in every dtype, against the textbook in float64 (tests/oracle.py).

Sizes are small, so that interpreters and emulations of the kernels can run the same table.
"""

import pytest
import torch
from oracle import Textbook, params_of

from fused_sam import FusedSAM

SHAPES = [(), (1,), (0,), (3,), (63,), (64,), (65,), (7, 9)]
NOT_INTERPRETED = [(1,), (63,), (64,)]
"""Empty in Triton's interpreter, where every tensor costs alike, and these are one masked tile as
the others are. Sizes around its tiles and chunks: test_triton.py."""
COMPLEX = [torch.complex64]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

SGD, ADAM, ADAMW, RMSPROP = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)
RULES = {
    "sgd": (SGD, {}),
    "sgd-decay": (SGD, {"weight_decay": 0.07}),
    "sgd-momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.03}),
    "sgd-dampening": (SGD, {"momentum": 0.8, "dampening": 0.3}),
    "sgd-nesterov": (SGD, {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05}),
    "sgd-maximize": (SGD, {"momentum": 0.6, "maximize": True, "weight_decay": 0.04}),
    "sgd-maximize-nesterov": (SGD, {"momentum": 0.6, "maximize": True, "nesterov": True}),
    "sgd-negative-dampening": (SGD, {"momentum": 0.5, "dampening": -0.5}),
    "adam": (ADAM, {"betas": (0.85, 0.97)}),
    "adam-default-betas": (ADAM, {"eps": 1e-6}),
    "adam-decay": (ADAM, {"betas": (0.7, 0.95), "weight_decay": 0.1, "eps": 1e-4}),
    "adam-amsgrad": (ADAM, {"amsgrad": True, "betas": (0.8, 0.5)}),
    "adam-maximize": (ADAM, {"maximize": True, "weight_decay": 0.2}),
    "adam-zero-betas": (ADAM, {"betas": (0.0, 0.0), "eps": 1e-3}),
    "adam-decoupled": (ADAM, {"decoupled_weight_decay": True, "weight_decay": 0.2}),
    "adamw": (ADAMW, {"betas": (0.9, 0.98), "weight_decay": 0.3}),
    "adamw-no-decay": (ADAMW, {"weight_decay": 0.0, "eps": 1e-5}),
    "adamw-amsgrad": (ADAMW, {"amsgrad": True, "betas": (0.6, 0.4), "weight_decay": 0.1}),
    "adamw-maximize": (ADAMW, {"maximize": True, "amsgrad": True, "weight_decay": 0.1}),
    "rmsprop": (RMSPROP, {"alpha": 0.95}),
    "rmsprop-decay": (RMSPROP, {"alpha": 0.9, "weight_decay": 0.1, "eps": 1e-3}),
    "rmsprop-momentum": (RMSPROP, {"alpha": 0.8, "momentum": 0.9, "eps": 1e-5}),
    "rmsprop-centered": (RMSPROP, {"alpha": 0.7, "centered": True, "eps": 1e-3}),
    "rmsprop-all": (
        RMSPROP,
        {
            "alpha": 0.6,
            "centered": True,
            "momentum": 0.5,
            "maximize": True,
            "weight_decay": 0.05,
            "eps": 1e-2,
        },
    ),
}
REPRESENTATIVES = ["sgd-nesterov", "sgd-dampening", "adam-amsgrad", "adamw", "rmsprop-all"]


def make_params(dtype, backend):
    generator = torch.Generator().manual_seed(0)
    kind = torch.complex128 if dtype.is_complex else torch.float64
    shapes = [(0,) if backend == "triton" and s in NOT_INTERPRETED else s for s in SHAPES]
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=kind, generator=generator).to(dtype))
        for shape in shapes
    ]


def random_grads(params, seed, missing=()):
    """A gradient for every parameter but the missing ones; a few elements are exactly zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    grads = {}
    for i, p in enumerate(params):
        kind = torch.complex128 if p.is_complex() else torch.float64
        g = torch.randn(p.shape, dtype=kind, generator=generator)
        g.view(-1)[::17] = 0 if g.numel() > 1 else 0.25
        grads[p] = None if i in missing else g.to(p.dtype)
    return grads


MISSING = [
    ((), ()),
    ((4, 6), ()),
    ((), (0, 5, 6)),
    ((3,), (3, 7)),
    (range(len(SHAPES)), (1,)),
    ((2,), range(len(SHAPES))),
]
"""Which parameters lack a gradient in the first and in the second pass of each step."""


def run(opt, steps=MISSING, between=None, **options):
    """The steps against a textbook, which is returned to go on with."""
    return run_on(Textbook(opt), steps, between, **options)


def run_on(textbook, steps, between=None, **options):
    opt = textbook.opt
    params = params_of(opt)
    for i, (first, second) in enumerate(steps):
        if between:
            between(opt, i)
        textbook.step(
            random_grads(params, 2 * i, first), random_grads(params, 2 * i + 1, second), **options
        )
    return textbook


@pytest.mark.parametrize("dtype", DTYPES + COMPLEX, ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("rule", RULES)
def test_one_group_steps_as_the_textbook(rule, adaptive, dtype, backend):
    """Guards each rule's arithmetic, with gradients missing in either pass."""
    if adaptive and dtype.is_complex:
        pytest.skip("adaptive is an error for complex parameters: test_errors.py")
    cls, options = RULES[rule]
    opt = FusedSAM(
        make_params(dtype, backend),
        cls,
        rho=0.3,
        adaptive=adaptive,
        eta=0.02 if adaptive else 0.0,
        backend=backend,
        lr=0.04,
        **options,
    )
    assert opt.backend == backend
    run(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_groups_keep_their_own_options(rule, dtype, backend):
    """Guards per-group hyperparameters: a row mixed up shows in every element."""
    cls, options = RULES[rule]
    params = make_params(dtype, backend)
    flip = not options.get("maximize", False)
    groups = [
        {"params": params[:3], "rho": 0.5, "lr": 0.01},
        {"params": params[3:5], "adaptive": True, "eta": 0.1, "weight_decay": 0.2},
        {"params": params[5:7], "maximize": flip, "adaptive": True, "rho": 0.1},
        {"params": params[7:], "lr": 0.0, "weight_decay": 0.0},
    ]

    def between(opt, i):
        # Hyperparameters are read anew at every step.
        opt.param_groups[i % 4]["rho"] *= 1.5
        opt.param_groups[(i + 1) % 4]["lr"] += 0.003
        opt.param_groups[(i + 2) % 4]["weight_decay"] += 0.01

    run(FusedSAM(groups, cls, rho=0.2, backend=backend, lr=0.03, **options), between=between)


@pytest.mark.parametrize("rule", REPRESENTATIVES)
def test_dtypes_mix_under_one_norm(rule, backend):
    """Guards the global norm over buckets, and that each bucket keeps its own precision."""
    cls, options = RULES[rule]
    params = [p for dtype in DTYPES + COMPLEX for p in make_params(dtype, backend)[3:6]]
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(7)).tolist()
    params = [params[i] for i in order]
    opt = FusedSAM(params, cls, rho=0.3, backend=backend, lr=0.02, **options)
    run(opt, [((), ()), ((1, 4), (2, 4)), ((0,), ())])


@pytest.mark.parametrize("dtype", DTYPES + COMPLEX, ids=str)
@pytest.mark.parametrize("lr_shape", [(), (1,)], ids=["scalar", "one-element"])
@pytest.mark.parametrize("rule", REPRESENTATIVES)
def test_lr_as_a_tensor(rule, lr_shape, dtype, backend):
    """Guards lr as torch's schedulers under torch.compile hold it: changed in place, and zero."""
    cls, options = RULES[rule]
    lr = torch.full(lr_shape, 0.05)
    opt = FusedSAM(make_params(dtype, backend), cls, rho=0.3, backend=backend, lr=lr, **options)
    assert opt.param_groups[0]["lr"] is lr

    def between(opt, i):
        lr.fill_((0.05, 0.0, 0.02)[i])

    run(opt, [((), ()), ((1, 4), (2, 4)), ((0,), ())], between=between)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e3], ids=["clips", "does-not-clip"])
@pytest.mark.parametrize("rule", REPRESENTATIVES)
def test_max_grad_norm_clips_the_second_gradient(rule, max_grad_norm, dtype, backend):
    """Guards clipping as torch.nn.utils.clip_grad_norm_ does it, over all groups."""
    cls, options = RULES[rule]
    params = make_params(dtype, backend)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.01}]
    opt = FusedSAM(
        groups, cls, rho=0.2, max_grad_norm=max_grad_norm, backend=backend, lr=0.05, **options
    )
    run(opt, [((), ()), ((1, 4), (2, 4)), ((0,), range(len(SHAPES)))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["no-clip", "clip"])
@pytest.mark.parametrize("rule", REPRESENTATIVES)
def test_grad_scale_and_found_inf(rule, max_grad_norm, dtype, backend):
    """Guards the two attributes that a GradScaler sets: unscaling and skipping on the device."""
    cls, options = RULES[rule]
    opt = FusedSAM(
        make_params(dtype, backend),
        cls,
        rho=0.2,
        max_grad_norm=max_grad_norm,
        backend=backend,
        lr=0.05,
        **options,
    )
    textbook = Textbook(opt)
    for i, found_inf in enumerate([0.0, 1.0, 0.0, 2.0]):
        opt.grad_scale = torch.tensor(4.0)
        opt.found_inf = torch.tensor(found_inf)
        run_on(textbook, [((), (i,))], grad_scale=4.0, found_inf=found_inf != 0)
    del opt.grad_scale, opt.found_inf
    run_on(textbook, [((), ())])


@pytest.mark.parametrize("rule", REPRESENTATIVES)
def test_a_skipped_first_step_stays_a_first_step(rule, backend):
    """Guards momentum's undampened first gradient, per group, when a GradScaler skips step one."""
    cls, options = RULES[rule]
    params = make_params(torch.float32, backend)
    groups = [{"params": params[:5]}, {"params": params[5:]}]
    if "dampening" in options:
        groups[0]["dampening"] = 0.0
    opt = FusedSAM(groups, cls, backend=backend, lr=0.05, **options)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    textbook = run(opt, [((), ())], grad_scale=2.0, found_inf=True)
    del opt.grad_scale, opt.found_inf
    run_on(textbook, [((), ()), ((), ())])


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("cls", [SGD, ADAM, ADAMW])
def test_foreach_and_fused_are_accepted(cls, flags, backend):
    """Guards that the choice of torch's implementation changes nothing here."""
    opt = FusedSAM(make_params(torch.float32, backend), cls, backend=backend, lr=0.05, **flags)
    run(opt, MISSING[:2])


@pytest.mark.parametrize("cls", [ADAM, ADAMW, RMSPROP])
def test_capturable_is_accepted(cls, backend):
    opt = FusedSAM(
        make_params(torch.float32, backend), cls, backend=backend, lr=0.05, capturable=True
    )
    run(opt, MISSING[:2])


def test_hyperparameters_as_tensors(backend):
    """Guards the options that torch takes as tensors besides lr."""
    decay = torch.tensor(0.25)
    opt = FusedSAM(
        make_params(torch.float32, backend), SGD, backend=backend, lr=0.05, weight_decay=decay
    )
    run(opt, MISSING[:2])
    betas = (torch.tensor(0.875), torch.tensor(0.75))
    opt = FusedSAM(
        make_params(torch.float32, backend),
        ADAM,
        backend=backend,
        lr=torch.tensor(0.05),
        betas=betas,
    )
    run(opt, MISSING[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum_switched_on_and_off(dtype, backend):
    """Guards state that appears in the middle of training, and that stays when it is not used."""

    def between(opt, i):
        opt.param_groups[0]["momentum"] = (0.0, 0.0, 0.9, 0.0, 0.5)[i]

    opt = FusedSAM(make_params(dtype, backend), SGD, backend=backend, lr=0.05, dampening=0.5)
    run(opt, MISSING[:5], between=between)


@pytest.mark.parametrize("rule", ["adam-amsgrad", "rmsprop-all", "rmsprop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_zero_keeps_padding_out_of_the_norm(rule, dtype, backend):
    """Guards padding: with eps = 0 it would become 0 / 0, and the next adaptive norm NaN."""
    cls, options = RULES[rule]
    params = make_params(dtype, backend)
    for p in params:
        p.data.abs_().add_(0.1)
    opt = FusedSAM(
        params, cls, rho=0.2, adaptive=True, backend=backend, lr=1e-3, **{**options, "eps": 0.0}
    )

    def never_zero(seed):
        return {p: g.abs_() + 0.5 for p, g in random_grads(params, seed).items()}

    textbook = Textbook(opt)
    for i in range(3):
        textbook.step(never_zero(2 * i), never_zero(2 * i + 1))


def test_state_that_no_group_of_a_bucket_needs_is_not_allocated(backend):
    """Two dtypes are two buckets; momentum in one of them costs the other nothing."""
    params = [torch.nn.Parameter(torch.ones(5, dtype=t)) for t in (torch.float32, torch.float64)]
    groups = [{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}]
    opt = FusedSAM(groups, SGD, lr=0.1, backend=backend)
    run(opt, MISSING[:1] * 2)
    assert opt.state[params[0]].keys() == {"momentum_buffer"} and not opt.state[params[1]]
    assert [list(bucket.states) for bucket in opt._layout.buckets] == [["momentum_buffer"], []]
