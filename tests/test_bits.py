"""The bits of 60 trajectories, recorded: a rebuild of the inside must reproduce them.

A guard for as long as that takes, not a promise: another torch, NumPy, Triton or CPU may round
otherwise, and there this is skipped. `python tests/test_bits.py --record` writes tests/bits.json
anew, for a change that is meant to change bits.
"""

import base64
import hashlib
import json
import platform
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    import interpreter  # noqa: F401  (before anything imports triton)
import pytest
from oracle import bits, params_of, real

from fused_sam import FusedSAM

FILE = Path(__file__).with_name("bits.json")
BACKENDS = ("reference", "native", "triton")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
C64 = torch.complex64
SGD, ADAM, ADAMW, RMSPROP = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)
SHAPES = ((3, 5), (), (65,), (0,))
ALL = {"centered": True, "momentum": 0.5, "weight_decay": 0.05, "eps": 1e-2}
CASES = {
    "sgd": (SGD, F32, {}),
    "sgd-momentum": (SGD, F32, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd-nesterov": (SGD, BF16, {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05}),
    "sgd-maximize": (SGD, F64, {"momentum": 0.6, "maximize": True}),
    "sgd-complex": (SGD, C64, {"momentum": 0.6, "weight_decay": 0.1}),
    "sgd-groups": (SGD, F32, {"groups": True, "adaptive": True, "eta": 0.01}),
    "sgd-clipped": (SGD, F16, {"momentum": 0.9, "max_grad_norm": 0.5}),
    "sgd-mixed": (SGD, (F32, F64, BF16, F16), {"momentum": 0.9}),
    "sgd-pinned": (SGD, F32, {"momentum": 0.9, "pinned": True}),
    "sgd-skipped": (SGD, F32, {"momentum": 0.9, "dampening": 0.5, "scaler": (1, 0, 0, 1)}),
    "adam": (ADAM, F32, {"amsgrad": True, "betas": (0.8, 0.5), "weight_decay": 0.1}),
    "adam-scaled": (ADAM, BF16, {"weight_decay": 0.1, "scaler": (0, 1, 0, 0)}),
    "adam-clipped": (ADAM, F64, {"max_grad_norm": 0.5, "betas": (0.0, 0.9)}),
    "adamw": (ADAMW, F32, {"adaptive": True, "eta": 0.02, "weight_decay": 0.2}),
    "adamw-maximize": (ADAMW, BF16, {"amsgrad": True, "maximize": True}),
    "adamw-groups": (ADAMW, F32, {"groups": True, "max_grad_norm": 2.0, "scaler": (0, 0, 2, 0)}),
    "adamw-mixed": (ADAMW, (F32, F16, C64), {"pinned": True, "amsgrad": True}),
    "rmsprop": (RMSPROP, F32, {"alpha": 0.9}),
    "rmsprop-all": (RMSPROP, BF16, {**ALL, "alpha": 0.6}),
    "rmsprop-scaled": (RMSPROP, F64, {**ALL, "adaptive": True, "scaler": (0, 0, 1, 0)}),
}
MISSING = [((), ()), ((2,), (0,)), ((), (2,)), ((0, 1), ())]
"""Which parameters lack a gradient in the first and in the second pass of each step."""


def environment():
    try:
        import triton

        triton = triton.__version__
    except ImportError:
        triton = None
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": triton,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def numbers(shape, dtype, seed):
    """Numbers in [-2, 2) from NumPy's PCG64, rounded to ``dtype``."""
    n = int(np.prod(shape)) * (2 if dtype.is_complex else 1)
    values = torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).uniform(-2, 2, n))
    if dtype.is_complex:
        return torch.view_as_complex(values.view(*shape, 2)).to(dtype)
    return values.view(shape).to(dtype)


def make_params(dtypes, pinned):
    held, params = [], []
    for k, dtype in enumerate(dtypes):
        for i, shape in enumerate(SHAPES):
            value = numbers(shape, dtype, 10 * k + i)
            if pinned and i % 2 == 0:
                # Views of what others hold stay where they are; one element off, so misaligned.
                held.append(torch.zeros(value.numel() + 2, dtype=dtype))
                value = held[-1][1:-1].view(shape).copy_(value)
            params.append(torch.nn.Parameter(value))
    return params, held


def run(name, backend):
    """The trajectory's final numbers, {what: tensor}, and a digest of all that it went through."""
    cls, dtypes, options = CASES[name]
    options = dict(options)
    groups, pinned = options.pop("groups", False), options.pop("pinned", False)
    scaler = options.pop("scaler", None)
    params, _held = make_params(dtypes if isinstance(dtypes, tuple) else (dtypes,), pinned)
    if groups:
        more = {"lr": torch.tensor(0.02), "weight_decay": 0.1, "rho": 0.5, "adaptive": False}
        more |= {"momentum": 0.8} if cls is SGD else {"amsgrad": True}
        groups = [{"params": params[:2]}, {"params": params[2:], **more}]
    opt = FusedSAM(groups or params, cls, backend=backend, **{"rho": 0.3, "lr": 0.05, **options})
    digest = hashlib.sha256()
    for i, missing in enumerate(MISSING):
        for half, method in enumerate((opt.first_step, opt.second_step)):
            for k, p in enumerate(params):
                g = numbers(p.shape, p.dtype, 1000 * (2 * i + half + 1) + k)
                p.grad = None if k % len(SHAPES) in missing[half] else g
            if scaler and half == 1:
                opt.grad_scale = torch.tensor(4.0)
                opt.found_inf = torch.tensor(float(scaler[i]))
            method()
            for value in (*params, opt.grad_norm):
                digest.update(raw(value))
    final = {"grad_norm": opt.grad_norm}
    for k, p in enumerate(params_of(opt)):
        final[f"weights {k}"] = p.detach()
        for state, value in sorted(opt.state.get(p, {}).items()):
            final[f"{state} {k}"] = value
            digest.update(raw(value))
    return final, digest.hexdigest()[:16]


def raw(tensor):
    return bits(tensor).contiguous().numpy().tobytes()


def packed(final):
    data = b"".join(map(raw, final.values()))
    return base64.b64encode(zlib.compress(data, 9)).decode()


def differences(final, recorded):
    """What differs from the recorded numbers and by how many units in the last place at most."""
    data, lines = zlib.decompress(base64.b64decode(recorded)), []
    if len(data) != len(b"".join(map(raw, final.values()))):
        return ["other states than were recorded"]
    for what, tensor in final.items():
        now = bits(tensor).contiguous().numpy()
        then = np.frombuffer(data[: now.nbytes], now.dtype).reshape(now.shape)
        data = data[now.nbytes :]
        if not np.array_equal(now, then):
            apart = max(abs(a - b) for a, b in zip(ordered(now), ordered(then), strict=True))
            lines.append(
                f"{what}: {(now != then).sum()} of {now.size}, by {apart} ulp at most, which is "
                f"{relative(tensor, then):.1f} ulp of the largest"
            )
    return lines or ["only what lay on the way: the final numbers are the same"]


def relative(tensor, then):
    """How far a tensor is from the recorded one, in ulp of its largest number.

    Near zero, where terms cancel, a rounding is many ulp of a number, and few of the largest.
    """
    now = real(tensor.detach())
    then = torch.from_numpy(then.copy()).view(now.dtype).double()
    return ((now - then).abs().max() / then.abs().max() / torch.finfo(now.dtype).eps).item()


def ordered(numbers):
    """The bits of floating-point numbers as integers that count the numbers from zero."""
    low = np.iinfo(numbers.dtype).min
    return [n if n >= 0 else int(low) - n for n in map(int, numbers.ravel())]


RECORDED = json.loads(FILE.read_text()) if FILE.exists() else {"environment": None}


@pytest.mark.skipif(
    RECORDED["environment"] != environment(),
    reason=f"bits were recorded with {RECORDED['environment']}, and here is {environment()}",
)
@pytest.mark.parametrize("name", CASES)
def test_trajectory_has_the_recorded_bits(name, backend):
    """Guards every bit of the weights, the states and the norm while the inside is rebuilt."""
    digest, recorded = RECORDED[f"{name} {backend}"]
    final, now = run(name, backend)
    assert now == digest, "\n".join([f"{name} {backend}", *differences(final, recorded)])


def record():
    lines = {"environment": environment()}
    for name in CASES:
        for backend in BACKENDS:
            final, digest = run(name, backend)
            lines[f"{name} {backend}"] = digest, packed(final)
    rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines.items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: python tests/test_bits.py --record")
    record()
