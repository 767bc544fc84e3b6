"""Whatever cannot be used is refused, naming the value and the remedy, and nothing is touched."""

import pytest
import torch
from oracle import assert_same_bits, inject, params_of
from torch import nn

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM, PNorm
from fused_sam.backends import resolve

SGD = torch.optim.SGD


def weights():
    return [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]


def overlapping():
    flat = torch.randn(10)
    return [nn.Parameter(flat[:6]), nn.Parameter(flat[4:])]


def lazy():
    return list(nn.LazyLinear(3).parameters())


class Opaque(torch.Tensor):
    """As DTensor: what it holds is not where data_ptr() points."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return NotImplemented  # torch makes a TypeError of it


class NeedsClosure(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure):
        return closure()


BAD_ARGUMENTS = {
    "rho negative": (dict(rho=-0.1), ValueError, r"rho .*>= 0.*-0\.1"),
    "rho nan": (dict(rho=float("nan")), ValueError, "rho .*finite.*nan"),
    "rho inf": (dict(rho=float("inf")), ValueError, "rho .*finite.*inf"),
    "rho str": (dict(rho="0.05"), TypeError, "rho .*number.*'0.05'"),
    "rho none": (dict(rho=None), TypeError, "rho .*number.*None"),
    "rho bool": (dict(rho=True), TypeError, "rho .*number.*True"),
    "eta negative": (dict(eta=-1), ValueError, "eta .*>= 0.*-1"),
    "eta nan": (dict(eta=float("nan")), ValueError, "eta .*finite.*nan"),
    "eta str": (dict(eta="x"), TypeError, "eta .*number.*'x'"),
    "adaptive number": (dict(adaptive=1), TypeError, "adaptive .*True or False.*1"),
    "adaptive str": (dict(adaptive="no"), TypeError, "adaptive .*True or False.*'no'"),
    "ascent unknown": (dict(ascent="up"), ValueError, r"ascent='up' .*\['sam'.*\], or None"),
    "ascent number": (dict(ascent=1), TypeError, "ascent .*name.*None.*1"),
    "ascent class": (dict(ascent=MSAM), TypeError, r"ascent .*an instance: MSAM\(\.\.\.\)"),
    "unknown keyword": (dict(momentun=0.9), TypeError, "'momentun'.*SGD.*rho.*momentum"),
    "keyword of another": (dict(betas=(0.9, 0.9)), TypeError, "'betas'.*SGD"),
    "unknown backend": (dict(backend="cuda"), ValueError, "'cuda'.*'auto'.*'reference'"),
    "max_grad_norm zero": (dict(max_grad_norm=0), ValueError, "max_grad_norm.*0.*None"),
    "max_grad_norm negative": (dict(max_grad_norm=-1.0), ValueError, r"max_grad_norm.*-1\.0"),
    "max_grad_norm nan": (dict(max_grad_norm=float("nan")), ValueError, "max_grad_norm.*nan"),
    "max_grad_norm str": (dict(max_grad_norm="1"), TypeError, "max_grad_norm.*'1'"),
    "differentiable": (dict(differentiable=True), ValueError, "differentiable=True.*leave it out"),
    "lr negative": (dict(lr=-1.0), ValueError, "learning rate.*-1"),
    "base instance": (
        dict(base_optimizer=SGD([torch.zeros(1, requires_grad=True)], lr=1)),
        TypeError,
        r"instance of SGD.*FusedSAM\.wrap\(",
    ),
    "base str": (dict(base_optimizer="SGD"), TypeError, r"torch\.optim\.Optimizer.*'SGD'"),
    "base no optimizer": (dict(base_optimizer=nn.Linear), TypeError, r"Optimizer.*Linear"),
    "base LBFGS": (dict(base_optimizer=torch.optim.LBFGS), TypeError, "LBFGS.*closure.*SGD"),
    "base needs closure": (dict(base_optimizer=NeedsClosure), TypeError, "NeedsClosure.*closure"),
    "base is SAM": (dict(base_optimizer=FusedSAM), TypeError, "FusedSAM"),
    "base has a rho": (dict(base_optimizer=torch.optim.Adadelta), ValueError, "Adadelta.*'rho'"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case):
    options, error, message = BAD_ARGUMENTS[case]
    params = weights()
    before = [(p.detach().clone(), p.data_ptr()) for p in params]
    groups = [{"params": params}]
    with pytest.raises(error, match=message):
        FusedSAM(groups, **{"lr": 0.1, **options})
    for p, (w, address) in zip(params, before, strict=True):
        assert_same_bits(p, w)
        assert p.data_ptr() == address
    assert len(groups) == 1 and groups[0]["params"] == params


def adaptive_complex():
    return [{"params": [nn.Parameter(torch.randn(3, dtype=torch.complex64))], "adaptive": True}]


BAD_PARAMS = {
    "empty list": (list, ValueError, "empty"),
    "exhausted generator": (lambda: iter(()), ValueError, "empty.*generator"),
    "one tensor": (lambda: weights()[0], TypeError, "iterable.*Tensor"),
    "a set": (lambda: set(weights()), TypeError, "order.*set.*list"),
    "a set in a group": (lambda: [{"params": set(weights())}], TypeError, "set"),
    "no tensor": (lambda: [*weights(), 3.0], TypeError, "Tensor.*float"),
    "names and tensors mixed": (lambda: [("a", weights()[0]), "b"], TypeError, "str"),
    "group without params": (lambda: [{"lr": 1}], ValueError, "'params'.*'lr'"),
    "group among tensors": (lambda: [*weights(), {"params": weights()}], TypeError, "dict"),
    "tensor among groups": (lambda: [{"params": weights()}, weights()[0]], ValueError, "dict"),
    "not a leaf": (lambda: [weights()[0] * 2], ValueError, "non-leaf"),
    "sparse": (
        lambda: [nn.Parameter(torch.eye(3).to_sparse())],
        TypeError,
        r"sparse_coo.*to_dense\(\)",
    ),
    "meta": (
        lambda: [nn.Parameter(torch.empty(3, device="meta"))],
        ValueError,
        r"meta.*to_empty",
    ),
    "lazy": (lazy, ValueError, "not initialized.*run"),
    "overlapping": (overlapping, ValueError, r"\(6,\).*\(6,\).*overlap.*(same|one) Parameter"),
    "overlapping across groups": (
        lambda: [{"params": [p]} for p in overlapping()],
        ValueError,
        "overlap",
    ),
    "twice across groups": (
        lambda: [{"params": p} for p in weights()[:1] * 2],
        ValueError,
        "more than one parameter group",
    ),
    "float8": (
        lambda: [nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))],
        TypeError,
        r"shape \(3,\).*torch\.float8_e4m3fn",
    ),
    "subclass with memory of its own": (
        lambda: [nn.Parameter(Opaque(torch.ones(3)))],
        TypeError,
        r"shape \(3,\).*Opaque.*plain tensors",
    ),
    "complex and adaptive": (adaptive_complex, TypeError, "adaptive.*complex.*adaptive=False"),
    "bad rho in a group": (lambda: [{"params": weights(), "rho": -2}], ValueError, "rho.*-2"),
    "bad eta in a group": (lambda: [{"params": weights(), "eta": "1"}], TypeError, "eta.*'1'"),
    "bad adaptive in a group": (
        lambda: [{"params": weights(), "adaptive": None}],
        TypeError,
        "adaptive.*None",
    ),
    "differentiable in a group": (
        lambda: [{"params": weights(), "differentiable": True}],
        ValueError,
        "differentiable",
    ),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_bad_parameters(case):
    make, error, message = BAD_PARAMS[case]
    with pytest.raises(error, match=message):
        FusedSAM(make(), lr=0.1)


def test_overlapping_parameters_are_untouched():
    params = overlapping()
    before = [(p.detach().clone(), p.data_ptr()) for p in params]
    with pytest.raises(ValueError, match="overlap"):
        FusedSAM(params, lr=0.1)
    for p, (w, address) in zip(params, before, strict=True):
        assert_same_bits(p, w)
        assert p.data_ptr() == address


def test_gaps_in_memory_that_is_shared():
    """Every second column: it cannot move away from whoever holds the rest, nor be one block."""
    table = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"strides \(6, 2\).*contiguous\(\)"):
        FusedSAM([nn.Parameter(table[:, ::2])], lr=0.1)


# -------------------------------------------------------------------------------- add_param_group

BAD_GROUPS = {
    "rho negative": (lambda old: {"params": weights(), "rho": -1.0}, ValueError, r"rho.*-1\.0"),
    "adaptive str": (lambda old: {"params": weights(), "adaptive": "1"}, TypeError, "adaptive"),
    "not a dict": (lambda old: weights(), (TypeError, ValueError), "dict"),
    "no params": (lambda old: {"lr": 0.1}, ValueError, "'params'"),
    "known already": (lambda old: {"params": old[:1]}, ValueError, "more than one parameter group"),
    "a set": (lambda old: {"params": set(weights())}, TypeError, "set"),
    "overlaps the others": (
        lambda old: {"params": [nn.Parameter(old[0].data.view(-1)[2:5])]},
        ValueError,
        "overlap",
    ),
    "overlaps itself": (lambda old: {"params": overlapping()}, ValueError, "overlap"),
    "not a leaf": (lambda old: {"params": [old[0] * 2]}, ValueError, "non-leaf"),
    "complex and adaptive": (lambda old: adaptive_complex()[0], TypeError, "complex"),
}


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_group_added(case, perturbed, backend):
    """The optimizer goes on as if the group had never been offered."""
    make, error, message = BAD_GROUPS[case]
    params = weights()
    opt = FusedSAM(params, rho=0.5, backend=backend, lr=0.1, momentum=0.9)
    before = [p.detach().clone() for p in params]
    if perturbed:
        inject({p: torch.randn_like(p) for p in params})
        opt.first_step()
    now = [p.detach().clone() for p in params]
    options = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    with pytest.raises(error, match=message):
        opt.add_param_group(make(params))
    assert len(opt.param_groups) == 1 and params_of(opt) == params
    assert {k: v for k, v in opt.param_groups[0].items() if k != "params"} == options
    for p, w in zip(params, now, strict=True):
        assert_same_bits(p, w)
    opt.restore()
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)
    inject({p: torch.randn_like(p) for p in params})
    opt.first_step()
    opt.second_step()


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("rule", [SGD, torch.optim.Adamax])
def test_sparse_gradient_in_the_first_pass(rule, backend):
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = FusedSAM(embedding.parameters(), rule, backend=backend, lr=0.1)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(5, 3\).*sparse_coo.*sparse=False"):
        opt.first_step()
    assert not opt.is_perturbed
    assert_same_bits(embedding.weight, before)
    opt.zero_grad()
    embedding.weight.grad = torch.ones(5, 3)
    opt.first_step()
    opt.second_step()


@pytest.mark.parametrize("rule", [SGD, torch.optim.Adamax])
def test_sparse_gradient_in_the_second_pass(rule, backend):
    """Still perturbed, so that the user may choose; restore() goes back, a dense one goes on."""
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = FusedSAM(embedding.parameters(), rule, rho=0.5, backend=backend, lr=0.1)
    before = embedding.weight.detach().clone()
    embedding.weight.grad = torch.ones(5, 3)
    opt.first_step(zero_grad=True)
    perturbed = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(5, 3\).*sparse_coo.*sparse=False"):
        opt.second_step()
    assert opt.is_perturbed
    assert_same_bits(embedding.weight, perturbed)
    opt.restore()
    assert_same_bits(embedding.weight, before)


def test_gradient_of_a_subclass(backend):
    """After a step with plain ones, so that it is the quick look at gradients that must see it."""
    params = weights()
    opt = FusedSAM(params, backend=backend, lr=0.1)
    inject({p: torch.randn_like(p) for p in params})
    opt.first_step()
    opt.second_step()
    before = [p.detach().clone() for p in params]
    params[1].grad = Opaque(torch.ones(5))
    with pytest.raises(RuntimeError, match=r"\(5,\).*Opaque.*plain tensors"):
        opt.first_step()
    assert not opt.is_perturbed
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)


# ----------------------------------------------------------------------------- options set later


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("rho", -1.0, ValueError),
        ("rho", float("nan"), ValueError),
        ("rho", "a", TypeError),
        ("eta", float("inf"), ValueError),
        ("adaptive", 1, TypeError),
    ],
)
def test_bad_option_set_in_a_group(option, value, error, backend):
    params = weights()
    opt = FusedSAM([{"params": [p]} for p in params], rho=0.5, backend=backend, lr=0.1)
    before = [p.detach().clone() for p in params]
    good = opt.param_groups[1][option]
    opt.param_groups[1][option] = value
    inject({p: torch.randn_like(p) for p in params})
    with pytest.raises(error, match=option):
        opt.first_step()
    assert not opt.is_perturbed
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)
    opt.param_groups[1][option] = good
    opt.first_step()
    opt.second_step()


# -------------------------------------------------------------------------------------------- wrap


def test_wrap_refuses_what_is_no_optimizer():
    opt = FusedSAM(weights(), lr=0.1)
    for value, message in (opt, "FusedSAM"), (SGD, "type"), (None, "NoneType"):
        with pytest.raises(TypeError, match=message):
            FusedSAM.wrap(value)


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (SGD, {"differentiable": True}, ValueError, "differentiable"),
        (torch.optim.LBFGS, {}, TypeError, "closure"),
        (torch.optim.Adadelta, {}, ValueError, "'rho'"),
    ],
)
def test_wrap_refuses_what_the_class_refuses(cls, options, error, message):
    params = weights()
    base = cls(params, lr=0.1, **options)
    address = params[0].data_ptr()
    groups = [dict(group) for group in base.param_groups]
    with pytest.raises(error, match=message):
        FusedSAM.wrap(base)
    assert params[0].data_ptr() == address
    assert base.param_groups == groups


def test_wrap_refuses_bad_options_and_leaves_the_optimizer_alone():
    params = weights()
    base = SGD(params, lr=0.1)
    groups = [dict(group) for group in base.param_groups]
    for options in {"rho": -1}, {"eta": "x"}, {"adaptive": 2}, {"backend": "x"}:
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            FusedSAM.wrap(base, **options)
        assert base.param_groups == groups
    with pytest.raises(ValueError, match="max_grad_norm"):
        FusedSAM.wrap(base, max_grad_norm=0)


# ----------------------------------------------------------------------------------------- backend


def test_unknown_backend_by_name():
    with pytest.raises(ValueError, match=r"'tpu'.*'auto'"):
        resolve("tpu", torch.device("cpu"))


def test_backend_is_named():
    assert FusedSAM(weights(), backend="reference", lr=0.1).backend == "reference"
    assert FusedSAM(weights(), lr=0.1).backend


def test_inference_parameters_are_refused():
    """They have no version counter to bump: first_step would fail after it has climbed."""
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.randn(5))
    with pytest.raises(ValueError, match="inference mode"):
        FusedSAM([p], lr=0.1)


# --------------------------------------------------------------------------- members of the family


@pytest.mark.parametrize(
    "p, error, message",
    [
        (1.0, ValueError, r"p must be >= 1\.1 .*got 1\.0"),
        (float("nan"), ValueError, "p must be >= 1.1 .*nan"),
        ("2", TypeError, "p must be a number, got '2'"),
        (True, TypeError, "p must be a number, got True"),
    ],
)
def test_values_check_themselves(p, error, message):
    with pytest.raises(error, match=message):
        PNorm(p)
    with pytest.raises(error, match=message):
        FusedSAM([{"params": weights(), "ascent": "p-norm", "p": p}], lr=0.1)


def test_groups_that_climb_must_agree():
    params = weights() + weights()
    groups = [{"params": params[:1], "ascent": PNorm(3)}, {"params": params[1:]}]
    with pytest.raises(ValueError, match=r"'p-norm' and 'sam'.*no norm in common.*None"):
        FusedSAM(groups, lr=0.1)
    groups[1]["ascent"] = PNorm(2)
    with pytest.raises(ValueError, match=r"p=3 and 2.*no norm in common.*None"):
        FusedSAM(groups, lr=0.1)
    groups[1]["ascent"] = None
    opt = FusedSAM(groups, lr=0.1)
    assert [group["ascent"] for group in opt.param_groups] == ["p-norm", None]
    opt.param_groups[1]["ascent"] = "sam"
    inject({p: torch.ones_like(p) for p in params})
    with pytest.raises(ValueError, match="'p-norm' and 'sam'"):
        opt.first_step()
    assert not opt.is_perturbed


def test_p_norms_of_complex_numbers_are_refused():
    params = [nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    with pytest.raises(
        TypeError, match=r"ascent='p-norm' is not defined for complex.*'sam' or None"
    ):
        FusedSAM(params, lr=0.1, ascent=PNorm(3))
    FusedSAM(params, lr=0.1, ascent=PNorm(2))
