"""``fused_sam.Lion`` by itself; what FusedSAM makes of it is in the table of cases."""

import pickle

import pytest
import torch
from oracle import Expected, assert_close, descend, exact, inject, real

from fused_sam import Lion


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
def test_steps_are_those_of_the_paper(dtype, maximize):
    """Guards the class's own step: options per group, missing gradients, strides, state."""
    kind = torch.complex128 if dtype.is_complex else torch.float64
    shapes = [(3, 5), (65,), ()]
    params = [torch.nn.Parameter(torch.randn(shape, dtype=kind).to(dtype)) for shape in shapes]
    params[0].data = params[0].data.t()
    groups = [
        {"params": params[:2], "betas": (0.8, 0.6)},
        {"params": params[2:], "lr": torch.tensor(0.3)},
    ]
    opt = Lion(groups, lr=0.1, weight_decay=0.2, maximize=maximize)
    for i in range(4):
        grads = {p: torch.randn(p.shape, dtype=kind).to(dtype) for p in params}
        grads[params[i % 3]] = None if i else torch.zeros_like(params[0])
        before = {p: exact(p) for p in params}
        state = {p: {k: v.clone() for k, v in opt.state.get(p, {}).items()} for p in params}
        seen = {
            p: Expected(exact(g), real(exact(g)).abs()) for p, g in grads.items() if g is not None
        }
        weights, states = descend(Lion, opt.param_groups, before, state, seen)
        inject(grads)
        opt.step()
        for p in params:
            assert_close(p, weights[p], "weights")
            assert set(opt.state.get(p, {})) == set(states[p])
            for name, value in states[p].items():
                assert_close(opt.state[p][name], value, name)


def test_closure_pickling_and_a_scheduler():
    p = torch.nn.Parameter(torch.ones(3))
    opt = pickle.loads(pickle.dumps(Lion([p], lr=0.5)))
    p = opt.param_groups[0]["params"][0]
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3
    scheduler.step()
    assert p.tolist() == [0.5] * 3 and opt.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    "options, error",
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers"),
    ],
)
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        Lion([torch.nn.Parameter(torch.ones(1))], **options)


def test_sparse_gradients_are_refused():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"shape \(3,\).*sparse_coo.*dense"):
        Lion([p]).step()
