"""The climb of half-precision weights: rounded at random, to one of the two neighbours."""

import copy
import io

import numpy as np
import pytest
import torch
from oracle import Textbook, assert_same_bits, inject, params_of, same_bits

from fused_sam import FusedSAM
from fused_sam.ascents import ASCENTS
from fused_sam.backends.rounding import round_stochastically, seed_of

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
HALVES = [torch.bfloat16, torch.float16]
DIGITS = {torch.bfloat16: 7, torch.float16: 10}
"""Binary digits after the first one."""


def scrambled(x):
    """The hash, written a second time: in NumPy's unsigned integers."""
    x = np.asarray(x, dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> np.uint32(shift)) * np.uint32(factor)
    return x ^ x >> np.uint32(16)


def rounded(values, dtype, offset, number):
    """What becomes of float32 values, in float64: the neighbours, and which one is chosen."""
    noise = scrambled(np.arange(offset, offset + len(values), dtype=np.uint32) ^ scrambled(number))
    exact = np.abs(values.astype(np.float64))
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(exact))
    smallest = torch.finfo(dtype).tiny
    unit = np.where(exact < smallest, smallest, 2.0**exponent) * 2.0 ** -DIGITS[dtype]
    whole = np.floor(exact / unit)
    rest = exact / unit - whole
    if dtype == torch.bfloat16:
        up = rest + (noise >> 16) / 2**16 >= 1
    else:
        below = np.floor(rest * 2**21) + (noise >> 11) >= 2**21
        up = np.where(exact < smallest, below, rest + (noise >> 19) / 2**13 >= 1)
    return np.copysign((whole + up) * unit, values)


def values_of(dtype, n=4096):
    """float32 values of every size that the dtype holds, the smallest and the exact ones too."""
    generator = np.random.default_rng(0)
    info = torch.finfo(dtype)
    low, high = np.log2(float(info.smallest_normal)) - DIGITS[dtype] - 3, np.log2(info.max) - 0.01
    values = (2.0 ** generator.uniform(low, high, n)).astype(np.float32)
    values *= generator.choice([-1, 1], n).astype(np.float32)
    values[::7] = torch.from_numpy(values[::7]).to(dtype).float().numpy()
    return values


@pytest.mark.parametrize("number", [1, 2, 2**31 + 5, 2**40 + 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_reference_rounds_as_the_hash_says(dtype, number):
    values = values_of(dtype)
    for offset in (0, 64, 2**31 - 100, 2**32 + 192):
        got = round_stochastically(torch.from_numpy(values), dtype, offset, seed_of(number))
        expected = rounded(values, dtype, offset % 2**32, number % 2**32)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.double().numpy(), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_exact_results_stay_and_what_has_no_two_neighbours_goes_to_the_nearest(dtype):
    """Guards every number of the dtype; NaN, infinity and what lies beyond the largest number."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for number in range(3):
        got = round_stochastically(every.float(), dtype, 0, seed_of(number))
        assert torch.equal(got.isnan(), every.isnan())
        assert same_bits(got[~got.isnan()], every[~every.isnan()])
    info = torch.finfo(dtype)
    beyond = [info.max * (1 + info.eps * part) for part in (0.1, 0.24, 0.26, 0.4, 2.0)]
    beyond = torch.tensor([*beyond, torch.inf, 3.4e38, torch.nan])
    beyond = torch.cat([beyond, -beyond])
    for number in range(20):
        got = round_stochastically(beyond, dtype, 0, seed_of(number))
        torch.testing.assert_close(got, beyond.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_mean_over_many_climbs_is_exact(dtype):
    """Guards against a bias, at any size: within 5 standard errors, 1/2 unit each."""
    values = values_of(dtype, 2000)
    climbs = 400
    total = np.zeros(len(values))
    for number in range(climbs):
        got = round_stochastically(torch.from_numpy(values), dtype, 640, seed_of(number))
        total += got.double().numpy()
    smallest = torch.finfo(dtype).tiny
    unit = np.maximum(2.0 ** np.floor(np.log2(np.abs(values))), smallest) * 2.0 ** -DIGITS[dtype]
    errors = (total / climbs - values) / unit
    assert np.abs(errors).max() < 5 * 0.5 / climbs**0.5
    assert abs(errors.mean()) < 5 * 0.5 / (climbs * len(values)) ** 0.5


# ---------------------------------------------------------------------------- through the optimizer


def exact_climb(dtype, backend):
    """Parameters, gradients of +-1 whose norm is 64, and the climb of each element, 2**-k.

    So epsilon is exact, and w + epsilon has one rounding, to float32: the same everywhere.
    """
    generator = torch.Generator().manual_seed(3)
    params = []
    for i, n in enumerate((1, 63, 1000, 2048, 3032 - 2048)):
        value = torch.randn(n, generator=generator) * (1e-3 if i % 2 else 1)
        memory = torch.empty(n + 1, dtype=dtype)
        # One that stays where it is, off 16 bytes, lies last in the flat buffers.
        place = memory[1:] if i == 1 else memory[:n].clone()
        params.append(torch.nn.Parameter(place.copy_(value)))
    grads = {p: torch.randn(p.shape, generator=generator).sign().to(dtype) for p in params}
    assert sum(p.numel() for p in params) == 4096
    opt = FusedSAM(params, SGD, rho=64 * 2.0**-13, backend=backend, lr=0.0)
    return opt, grads


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_backends_climb_to_the_bits_of_the_hash(dtype, backend):
    """Guards the same bits everywhere: offsets of pinned and moved slots, the number."""
    opt, grads = exact_climb(dtype, backend)
    (bucket,) = opt._facts.engine.buckets
    slots = {slot.param: slot for slot in bucket.slots}
    assert [slot.pinned for slot in bucket.slots] == [False] * 4 + [True]
    before = {p: p.detach().clone() for p in grads}
    for number in (1, 2, 3):
        inject(grads)
        opt.first_step()
        for p, w in before.items():
            moved = (w.float() + grads[p].float() * 2.0**-13).numpy()
            expected = rounded(moved, dtype, slots[p].start, number)
            np.testing.assert_array_equal(p.detach().double().numpy(), expected)
        opt.second_step()
        for p, w in before.items():
            assert_same_bits(p, w)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nothing_moves_where_the_scale_is_zero_and_no_number_is_lost(dtype, backend):
    params = [torch.nn.Parameter(torch.randn(70).to(dtype)) for _ in range(2)]
    with torch.no_grad():
        params[0][:4] = torch.tensor([torch.inf, -torch.inf, -0.0, 0.0])
        params[0][4] = torch.finfo(dtype).max
    before = [p.detach().clone() for p in params]
    opt = FusedSAM(params, SGD, rho=0.0, backend=backend, lr=0.1)
    for rho, factor in ((0.0, 1.0), (0.5, 0.0), (0.5, torch.inf), (0.5, torch.nan)):
        opt.param_groups[0]["rho"] = rho
        for p in params:
            p.grad = torch.ones_like(p) * factor
        opt.first_step()
        for p, w in zip(params, before, strict=True):
            assert_same_bits(p, w)
        opt.restore()
    for p in params:
        p.grad = torch.ones_like(p)
    opt.param_groups[0]["rho"] = 1e-3
    opt.first_step()
    assert params[0][:2].tolist() == [torch.inf, -torch.inf]
    assert params[0][4] == torch.finfo(dtype).max
    opt.restore()
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p, w)


def projection(opt, p, g):
    """The actual move's projection on g, in units of rho."""
    before = p.detach().clone()
    p.grad = g.clone()
    opt.first_step()
    move = p.detach().double() - before.double()
    opt.restore()
    g = g.double()
    return ((move * g).sum() / g.norm() / opt.param_groups[0]["rho"]).item()


@pytest.mark.parametrize("parameters", [2e6, 25e6], ids=["2 M", "as 25 M"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_climb_is_as_long_as_rho_along_the_gradient(dtype, parameters, backend):
    """Guards SAM itself in half precision: rounding to nearest leaves as little as 0.28 of rho.

    Each element climbs by 0.05 / sqrt(parameters) or so, its noise is some hundred times that: of
    2 million the mean is good to 0.002.
    """
    if backend == "triton":
        pytest.skip("interpreted; it has the bits of the others")
    n = 2_000_000
    w = (torch.randn(n) * 0.02).to(dtype)
    g = torch.randn(n).to(dtype)
    p = torch.nn.Parameter(w)
    opt = FusedSAM([p], SGD, rho=0.05 * (n / parameters) ** 0.5, backend=backend, lr=0.1)
    for _ in range(2):
        assert abs(projection(opt, p, g) - 1) < 0.01


@pytest.mark.parametrize("cls", [SGD, ADAMW, torch.optim.RAdam])
def test_a_resumed_run_climbs_to_the_same_bits(cls, backend):
    """Guards the number of the climb in checkpoints, copies, and what the base optimizer loads."""
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(100, generator=generator).bfloat16() for _ in range(12)]

    def steps(opt, which):
        (p,) = params_of(opt)
        seen = []
        for i in which:
            for half, g in ((opt.first_step, grads[2 * i]), (opt.second_step, grads[2 * i + 1])):
                p.grad = g.clone()
                half()
                seen.append(p.detach().clone())
        return seen

    def make():
        p = torch.nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(6)))
        p.data = p.data.bfloat16()
        return FusedSAM([p], cls, rho=1e-3, backend=backend, lr=0.01)

    opt = make()
    steps(opt, range(3))
    file = io.BytesIO()
    torch.save((opt.state_dict(), params_of(opt)[0].detach()), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed, twin = make(), copy.deepcopy(opt)
    params_of(resumed)[0].data.copy_(weights)
    resumed.load_state_dict(state)
    expected = steps(opt, range(3, 6))
    for other in (resumed, twin):
        for a, b in zip(steps(other, range(3, 6)), expected, strict=True):
            assert_same_bits(a, b)
    cls([torch.nn.Parameter(torch.zeros(100))], lr=0.1).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_steps_as_the_textbook(dtype, backend):
    """Guards ASAM, maximize and missing gradients besides the rounding."""
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (65, 3)]
    groups = [{"params": params[:1], "adaptive": True}, {"params": params[1:], "maximize": True}]
    textbook = Textbook(FusedSAM(groups, SGD, rho=0.1, eta=0.01, backend=backend, lr=0.1))
    for i in range(3):
        grads = {p: torch.randn_like(p) for p in params[: 1 + i % 2]}
        textbook.step(grads, {p: torch.randn_like(p) for p in params})


def test_a_number_that_is_read_when_the_kernel_runs_rounds_alike(backend):
    """A CUDA graph has it on the device, where the host writes the next one before each replay."""
    param = torch.nn.Parameter(torch.randn(128).bfloat16())
    opt = FusedSAM([param], backend=backend, rho=0.5, lr=0.1)
    param.grad = torch.randn_like(param)
    engine, groups = opt._facts.engine, opt.param_groups
    (bucket,), (work,) = engine.buckets, engine.backends
    grads = bucket.gradients()
    total = work.reduce(bucket, ASCENTS["sam"].sums, grads, groups)
    climbed = []
    for number in (7, torch.tensor([7]), torch.tensor([8])):
        work.ascend_(bucket, ASCENTS["sam"], grads, groups, total, number)
        assert bucket.climb.item() == int(number)
        climbed.append(param.detach().clone())
        param.data.copy_(bucket.saved)
    assert same_bits(climbed[0], climbed[1]) and not same_bits(climbed[0], climbed[2])
