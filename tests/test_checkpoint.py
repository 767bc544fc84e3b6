"""Checkpoints, copies, reruns: everything here is compared bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from oracle import assert_same_bits, inject, params_of, same_bits
from torch import nn

from fused_sam import FusedSAM
from fused_sam.blends import LookSAM

SGD, ADAM, ADAMW, RMSPROP = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)
FUSED = {
    "sgd": (SGD, {}),
    "sgd-momentum": (SGD, {"momentum": 0.8, "dampening": 0.2, "weight_decay": 0.05}),
    "adam": (ADAM, {"weight_decay": 0.05, "amsgrad": True}),
    "adamw": (ADAMW, {"betas": (0.8, 0.9)}),
    "rmsprop": (RMSPROP, {"momentum": 0.5, "centered": True, "eps": 1e-3}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
}
ALL = FUSED | {
    "radam": (torch.optim.RAdam, {}),
    "muon": (torch.optim.Muon, {}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make_model(dtype=torch.float32):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))
    return model.to(dtype)


def groups_of(model):
    return [
        {"params": list(model[0].parameters()), "rho": 0.4},
        {"params": list(model[1].parameters()), "lr": 0.03},
    ]


def make(rule="sgd-momentum", dtype=torch.float32, backend="auto", **options):
    model = make_model(dtype)
    cls, base_options = ALL[rule]
    options = {"lr": 0.05, "rho": 0.2, **base_options, **options}
    return model, FusedSAM(groups_of(model), cls, backend=backend, **options)


def train(opt, steps, start=0):
    """Steps with gradients that depend on the step's number alone; some are missing."""
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)

        def grads(skip, generator=generator):
            made = {
                p: torch.randn(p.shape, generator=generator).to(p.dtype) for p in params_of(opt)
            }
            if skip is not None:
                made[params_of(opt)[skip]] = None
            return made

        inject(grads(None if i % 3 else 0))
        opt.first_step()
        inject(grads(None if i % 4 else 1))
        opt.second_step()


def assert_same(opt, other):
    """Weights, state and hyperparameters, all bitwise."""
    for i, (p, q) in enumerate(zip(params_of(opt), params_of(other), strict=True)):
        assert_same_bits(p, q, f"weights {i}")
        a, b = opt.state.get(p, {}), other.state.get(q, {})
        assert a.keys() == b.keys()
        for name in a:
            assert_same_bits(torch.as_tensor(a[name]), torch.as_tensor(b[name]), f"{name} {i}")
    for g, h in zip(opt.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in g.items() if k != "params"} == {
            k: v for k, v in h.items() if k != "params"
        }


def through_a_file(obj, **options):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, **options)


# ------------------------------------------------------------------------------ resume and rerun


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ALL)
def test_resume_gives_the_bits_of_an_unbroken_run(rule, dtype, backend):
    if dtype != torch.float32 and rule not in FUSED:
        pytest.skip("the base optimizer's own business")
    model, opt = make(rule, dtype, backend)
    train(opt, 3)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    train(opt, 4, start=3)
    model2, opt2 = make(rule, dtype, backend, lr=0.7, rho=3.0)
    model2.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    assert [g["rho"] for g in opt2.param_groups] == [0.4, 0.2]
    train(opt2, 4, start=3)
    assert_same(opt, opt2)


def test_loading_into_a_trained_optimizer_forgets_its_own_state(backend):
    """State that the checkpoint lacks must be gone, not zero or left over."""
    model, opt = make(backend=backend)
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    train(opt, 2)
    first = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert not opt.state
    train(opt, 2)
    for p, w in zip(model.parameters(), first, strict=True):
        assert_same_bits(p, w)


def test_state_dict_in_another_order_loads(backend):
    """Tensors of the optimizer itself may come back at another parameter."""
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    opt = FusedSAM(params, backend=backend, lr=0.1, momentum=0.9)
    train(opt, 1, start=1)
    saved = opt.state_dict()
    expected = copy.deepcopy(saved["state"])
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    opt.load_state_dict(saved)
    opt.zero_grad()
    opt.second_step()  # brings the state into the buffers, and steps nothing
    for i, p in enumerate(params):
        buffer = expected[1 - i]["momentum_buffer"]
        assert_same_bits(opt.state[p]["momentum_buffer"], buffer, f"momentum_buffer {i}")


@pytest.mark.parametrize("rule", FUSED)
def test_rerun_gives_the_same_bits(rule, backend):
    runs = [make(rule, backend=backend)[1] for _ in range(2)]
    for opt in runs:
        train(opt, 5)
    assert_same(*runs)


# ------------------------------------------------------------------------------- other optimizers


@pytest.mark.parametrize("rule", ALL)
def test_checkpoint_of_the_base_class_loads(rule, backend):
    """A run with torch.optim goes on under FusedSAM with its momentum; ascent options stay."""
    model, opt = make(rule, backend=backend)
    other = make_model()
    cls, options = ALL[rule]
    base = cls([{k: v for k, v in g.items() if k != "rho"} for g in groups_of(other)], **options)
    plain = FusedSAM.wrap(base, rho=0.0, backend=backend)
    for _ in range(2):
        inject({p: torch.randn_like(p) for p in params_of(base)})
        base.step()
    model.load_state_dict(other.state_dict())
    saved = through_a_file(base.state_dict())
    for group in saved["param_groups"]:
        for key in ("rho", "adaptive", "eta"):
            group.pop(key)
    opt.load_state_dict(saved)
    assert [g["rho"] for g in opt.param_groups] == [0.4, 0.2]
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in base.param_groups]
    grads = [torch.randn_like(p) for p in params_of(opt)]
    inject(dict(zip(params_of(opt), grads, strict=True)))
    inject(dict(zip(params_of(base), grads, strict=True)))
    opt.second_step()
    plain.second_step()
    for p, q in zip(params_of(opt), params_of(plain), strict=True):
        assert_same_bits(p, q)
        for name, value in plain.state[q].items():
            assert_same_bits(torch.as_tensor(opt.state[p][name]), torch.as_tensor(value), name)


@pytest.mark.parametrize("rule", ALL)
def test_checkpoint_loads_into_the_base_class(rule, backend):
    """And the base class goes on: its next step equals our plain update to rounding."""
    model, opt = make(rule, backend=backend)
    train(opt, 3)
    other = make_model()
    other.load_state_dict(model.state_dict())
    cls, options = ALL[rule]
    base = cls(
        [{k: v for k, v in g.items() if k != "rho"} for g in groups_of(other)], lr=0.9, **options
    )
    base.load_state_dict(through_a_file(opt.state_dict()))
    grads = [torch.randn_like(p) for p in params_of(opt)]
    for o in opt, base:
        inject(dict(zip(params_of(o), grads, strict=True)))
    base.step()
    opt.second_step()
    for p, q in zip(params_of(opt), params_of(base), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert opt.state[p].keys() == base.state[q].keys()


def davda54_state_dict(opt, **base_defaults):
    """What state_dict() of davda54/sam holds: the saved weights, and every option in the groups."""
    params, groups = 0, []
    for group in opt.param_groups:
        indices = list(range(params, params + len(group["params"])))
        params += len(indices)
        groups.append({"rho": 0.6, "adaptive": False, **base_defaults, "params": indices})
    return {
        "state": {i: {"old_p": p.detach().clone()} for i, p in enumerate(params_of(opt))},
        "param_groups": groups,
    }


@pytest.mark.parametrize("rule", FUSED)
def test_checkpoint_of_davda54_sam_loads(rule, backend):
    """Its old_p is dropped; it never saved momentum, so the run starts like a new one."""
    _, opt = make(rule, backend=backend)
    defaults = {k: v for k, v in opt.base_optimizer.defaults.items()}
    saved = davda54_state_dict(opt, **{**defaults, "lr": 0.02})
    file = through_a_file(saved)
    opt.load_state_dict(file)
    assert all(entry.keys() == {"old_p"} for entry in file["state"].values())
    assert not any(opt.state.values())
    assert [(g["rho"], g["eta"], g["lr"]) for g in opt.param_groups] == [(0.6, 0.0, 0.02)] * 2
    _, fresh = make(rule, backend=backend)
    for group in fresh.param_groups:
        group.update(rho=0.6, lr=0.02)
    train(opt, 3)
    train(fresh, 3)
    assert_same(opt, fresh)
    assert not any("old_p" in entry for entry in opt.state_dict()["state"].values())


def test_checkpoint_with_the_wrong_groups_changes_nothing(backend):
    model, opt = make(backend=backend)
    train(opt, 2)
    before = copy.deepcopy(opt.state_dict())
    params = list(model.parameters())
    for groups in [{"params": params}], [{"params": params}, {"params": []}]:
        wrong = SGD(groups, lr=0.1).state_dict()
        with pytest.raises(ValueError, match="group"):
            opt.load_state_dict(wrong)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        for name, value in entry.items():
            assert_same_bits(after["state"][i][name], value)


def test_a_checkpoint_of_another_member_is_told_of(backend):
    """Guards against a run that is resumed with another method than its script says."""
    params = list(make_model().parameters())
    sam = FusedSAM(params, SGD, lr=0.1, momentum=0.9, backend=backend)
    inject({p: torch.ones_like(p) for p in params})
    sam.first_step()
    sam.second_step()
    saved = sam.state_dict()
    opt = FusedSAM(make_model().parameters(), SGD, lr=0.2, blend=LookSAM(5), backend=backend)
    own = {"state": saved["state"], "param_groups": opt.state_dict()["param_groups"]}
    with pytest.warns(UserWarning, match=r"blend=None, which replaces .*blend='looksam'.*alone"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["blend"] is None
    opt.load_state_dict({**own, "param_groups": saved["param_groups"]})  # it is SAM already
    opt = FusedSAM(make_model().parameters(), SGD, lr=0.2, blend=LookSAM(5), backend=backend)
    opt.load_state_dict(own)
    assert opt.param_groups[0]["blend"] == "looksam"
    assert opt.param_groups[0]["lr"] == 0.2
    assert len(opt.state) == len(params)


def test_load_state_dict_does_not_change_its_argument(backend):
    _, opt = make("adam", backend=backend)
    train(opt, 2)
    saved = through_a_file(opt.state_dict())
    kept = copy.deepcopy(saved)
    train(opt, 1)
    opt.load_state_dict(saved)
    train(opt, 2)
    assert saved["param_groups"] == kept["param_groups"]
    for i, entry in kept["state"].items():
        for name, value in entry.items():
            assert_same_bits(saved["state"][i][name], value, f"{name} {i}")


def test_checkpoint_is_plain_tensors_and_small(backend):
    """weights_only loads it, and it holds the state once, not the flat buffers."""
    model, opt = make("adam", backend=backend)
    train(opt, 2)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    elements = sum(p.numel() for p in model.parameters())
    assert len(file.getvalue()) < 3 * 4 * elements + 8 * 1024
    file.seek(0)
    torch.load(file, weights_only=True)


# --------------------------------------------------------------------------------- perturbed


@pytest.mark.parametrize(
    "use",
    [
        lambda opt: opt.state_dict(),
        lambda opt: opt.load_state_dict({"state": {}, "param_groups": []}),
        pickle.dumps,
        copy.deepcopy,
        copy.copy,
    ],
    ids=["state_dict", "load_state_dict", "pickle", "deepcopy", "copy"],
)
def test_perturbed_weights_cannot_be_saved(use, backend):
    model, opt = make(backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    inject({p: torch.randn_like(p) for p in model.parameters()})
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"perturbed.*second_step\(\) or restore\(\)"):
        use(opt)
    opt.restore()
    opt.state_dict()
    for p, w in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, w)


# ------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("rule", ALL)
def test_copy_of_model_and_optimizer_goes_on_alone(rule, how, backend):
    model, opt = make(rule, backend=backend, max_grad_norm=2.0)
    train(opt, 3)
    if how == "deepcopy":
        model2, opt2 = copy.deepcopy((model, opt))
    elif how == "pickle":
        model2, opt2 = pickle.loads(pickle.dumps((model, opt)))
    else:
        model2, opt2 = through_a_file((model, opt), weights_only=False)
    assert params_of(opt2)[0] is model2[0].weight
    assert opt2.backend == opt.backend and opt2.max_grad_norm == 2.0
    assert opt2.param_groups is opt2.base_optimizer.param_groups
    assert opt2.state is opt2.base_optimizer.state
    assert repr(opt2) == repr(opt)
    kept = copy.deepcopy(model.state_dict())
    train(opt2, 3, start=3)
    for name, value in model.state_dict().items():
        assert_same_bits(value, kept[name])
    train(opt, 3, start=3)
    assert_same(opt, opt2)


def test_copy_of_an_optimizer_alone_has_parameters_of_its_own(backend):
    model, opt = make(backend=backend)
    train(opt, 1)
    opt2 = copy.deepcopy(opt)
    kept = model[0].weight.detach().clone()
    train(opt2, 1)
    assert_same_bits(model[0].weight, kept)
    assert not same_bits(params_of(opt2)[0], kept)


# ------------------------------------------------------------------------------------ lr = 0


EDGES = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 6e-8, -6e4]


@pytest.mark.parametrize(
    ("dtype", "as_tensor"),
    [*((dtype, False) for dtype in DTYPES), (torch.float32, True)],
    ids=lambda value: {False: "float", True: "tensor"}.get(value, str(value)),
)
@pytest.mark.parametrize("rule", FUSED)
def test_lr_zero_returns_the_weights_bit_for_bit(rule, dtype, as_tensor, backend):
    """50 steps, with infinite, NaN and -0.0 gradients, and edge cases among the weights."""
    cls, options = FUSED[rule]
    generator = torch.Generator().manual_seed(11)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (1, 9, 64, 65)]
    for p in params[1:]:
        p.data[: len(EDGES)] = torch.tensor(EDGES)
    lr = torch.tensor(0.0) if as_tensor else 0.0
    opt = FusedSAM(
        [{"params": params[:2]}, {"params": params[2:], "adaptive": True, "eta": 0.1}],
        cls,
        rho=0.7,
        backend=backend,
        lr=lr,
        **options,
    )
    before = [p.detach().clone() for p in params]
    for i in range(50):
        for half, step in enumerate((opt.first_step, opt.second_step)):
            grads = {p: torch.randn(p.shape, generator=generator).to(dtype) for p in params}
            edge = int(torch.randint(4 * len(EDGES), (), generator=generator))
            if edge < len(EDGES):
                grads[params[i % 4]].fill_(EDGES[edge])
            if i % 5 == half:  # perturbed and not stepped, or the other way round
                grads[params[(i + 1) % 4]] = None
            inject(grads)
            step()
        for p, w in zip(params, before, strict=True):
            assert_same_bits(p, w, f"step {i}")
