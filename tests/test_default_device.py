"""Under a default device that is not the parameters': ``with torch.device(...)`` and the like.

Under a default of ``meta`` whatever the package makes without naming a device has no memory, and
the step that reads it fails. Under one of ``cuda`` it would wait for the GPU instead.
"""

import ast
from pathlib import Path

import pytest
import torch
from oracle import same_bits
from torch.utils._device import _device_constructors

import fused_sam
from fused_sam import FusedSAM

SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
SIZES = [(65,), (3, 5), (), (0,)]
CASES = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adamw": (ADAMW, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (RMSPROP, {"lr": 0.01, "centered": True}),
    "asam": (SGD, {"lr": 0.1, "adaptive": True, "eta": 0.1}),
    "clipping": (ADAMW, {"lr": 0.01, "max_grad_norm": 0.5}),
    "tensor-lr": (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    "float64": (ADAMW, {"lr": 0.01, "dtype": torch.float64}),
    "bfloat16": (RMSPROP, {"lr": 0.01, "dtype": torch.bfloat16}),
    "two-dtypes": (SGD, {"lr": 0.1, "dtype": None}),
}


def train(backend, base, dtype=torch.float32, **options):
    """Every way through the optimizer; the parameters and states at its end."""
    generator = torch.Generator().manual_seed(0)

    def random(size, dtype):
        return torch.randn(size, generator=generator, device="cpu").to(dtype)

    dtypes = [dtype or (torch.float32, torch.float64)[i % 2] for i in range(len(SIZES))]
    params = [torch.nn.Parameter(random(*kind)) for kind in zip(SIZES, dtypes, strict=True)]
    factors = [random(*kind) for kind in zip(SIZES, dtypes, strict=True)]

    def closure():
        opt.zero_grad()
        loss = sum((p * f).double().square().sum() for p, f in zip(params, factors, strict=True))
        loss.backward()
        return loss

    def steps(missing=None):
        for method in (opt.first_step, opt.second_step):
            closure()
            if missing is not None:
                params[missing].grad = None
            method()

    opt = FusedSAM(params, base, backend=backend, rho=0.1, **options)
    steps()
    opt.step(closure)
    opt.first_step()
    opt.restore()
    checkpoint = opt.state_dict()
    opt = FusedSAM(params, base, backend=backend, **options)
    opt.load_state_dict(checkpoint)
    steps(missing=0)
    for found_inf in (1.0, 0.0):
        opt.grad_scale = torch.tensor(2.0, device="cpu")
        opt.found_inf = torch.tensor(found_inf, device="cpu")
        steps()
        opt.step(closure)
    opt.add_param_group({"params": [torch.nn.Parameter(random(7, torch.float32))]})
    params[1].data = params[1].data.clone()
    steps()
    return [*params, *[v for p in params for _, v in sorted(opt.state[p].items())]]


@pytest.mark.parametrize("case", CASES)
def test_steps_do_not_depend_on_the_default_device(case, backend):
    """Guards every tensor that is made on the way: it is where the parameters are, or the host."""
    base, options = CASES[case]
    expected = train(backend, base, **options)
    with torch.device("meta"):
        actual = train(backend, base, **options)
    for a, b in zip(actual, expected, strict=True):
        assert same_bits(a, b)


def test_every_factory_call_names_its_device():
    """Guards the lines that the test above does not run, the demo's besides."""
    names = {function.__name__ for function in _device_constructors()}
    assert "zeros" in names
    unnamed = [
        f"{path.name}:{node.lineno}"
        for path in Path(fused_sam.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{name}" for name in names}
        and "device" not in [keyword.arg for keyword in node.keywords]
    ]
    assert unnamed == []
