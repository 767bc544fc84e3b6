"""The Triton backend's tables and launches; for its arithmetic see test_table.py."""

import math
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import Textbook, inject

from fused_sam import FusedSAM, backends
from fused_sam.ascents import MSAM, FriendlySAM, VaSSO
from fused_sam.backends import capture, tables

triton = pytest.importorskip("fused_sam.backends.triton")
operations = triton.operations
pytestmark = pytest.mark.skipif(not triton.INTERPRETED, reason="TRITON_INTERPRET=1 is not set")

CHUNK = operations.CHUNK
SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def make(sizes, base=SGD, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    return params, FusedSAM(params, base, backend="triton", **options)


def random_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.randn(p.shape, generator=generator).to(p.dtype) for p in params}


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were to be launched; none is."""
    names = []

    def record(launcher, kernel, *rest):
        names.append(kernel.fn.__name__)

    monkeypatch.setattr(operations._Launcher, "launch", record)
    return names


@pytest.fixture
def uploads(monkeypatch):
    """How many tables were uploaded."""
    sizes = []
    upload = tables.Tables._upload

    def record(self, values, *args):
        sizes.append(len(values))
        return upload(self, values, *args)

    monkeypatch.setattr(tables.Tables, "_upload", record)
    return sizes


@pytest.fixture
def hints(monkeypatch):
    """Checks what the kernels promise the compiler: every pointer that is called aligned is it.

    ``pointers`` counts them. The compiler turns such a promise into accesses that fault.
    """
    import triton.language as tl

    # A first launch lets the interpreter put its own functions into triton.language.
    params, opt = make([CHUNK + 5], ADAMW, lr=0.1)
    step_as_given(opt, random_grads(params, 0), random_grads(params, 1))
    counter = SimpleNamespace(pointers=0)
    multiple_of = tl.multiple_of

    def check(value, multiple, **rest):
        multiple = getattr(multiple, "value", multiple)
        assert not np.any(value.handle.data % multiple), f"no multiple of {multiple}"
        counter.pointers += value.dtype.is_ptr()
        return multiple_of(value, multiple, **rest)

    monkeypatch.setattr(tl, "multiple_of", check)
    return counter


def launcher_of(opt):
    """The tables and the launcher of the one bucket."""
    (bucket,) = opt._facts.engine.buckets
    return bucket.cache[operations._Launcher]


def aligned_slots(opt):
    """What the tables with gradients, of the one bucket, say of each slot's alignment."""
    tables_of_flags = launcher_of(opt)._known["flags"].values()
    flags = [table.tolist() for table in tables_of_flags]
    return {
        tuple(bool(flag & tables.ALIGNED) for flag in row)
        for row in flags
        if not any(flag & tables.MISSING for flag in row)
    }


def step_as_given(opt, *passes):
    """A whole step with these very gradients: oracle.step copies them to aligned memory."""
    for method, grads in zip((opt.first_step, opt.second_step), passes, strict=True):
        for p, grad in grads.items():
            p.grad = grad
        method()


THREE = ["reduce_kernel", "ascend_kernel", "update_kernel"]


@pytest.mark.parametrize("base", [SGD, ADAMW, RMSPROP])
@pytest.mark.parametrize("n_params, n_groups", [(1, 1), (161, 1), (64, 64), (10_000, 64)])
def test_launches_do_not_grow_with_parameters_or_groups(n_params, n_groups, base, launches):
    """Guards 2 + 1 launches with mixed learning rates, weight decays and options."""
    params = [torch.nn.Parameter(torch.randn(3)) for _ in range(n_params)]
    groups = [
        {"params": params[i::n_groups], "lr": 0.1 + i, "weight_decay": i / 10, "rho": 0.1 * i}
        for i in range(n_groups)
    ]
    if n_groups > 1:
        groups[1].update({"maximize": True, "adaptive": True})
        groups[-1].update({SGD: {"momentum": 0.5}, ADAMW: {"amsgrad": True}}.get(base, {}))
    opt = FusedSAM(groups, base, backend="triton", lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    assert launches == THREE


def test_what_a_step_has_reduced_stays():
    """Guards numbers in memory that the next step writes to."""
    p = torch.nn.Parameter(torch.ones(65))
    opt = FusedSAM([p], torch.optim.SGD, lr=0.1, backend="triton")
    opt.measures, steps = True, []
    for size in (1.0, 2.0):
        step_as_given(opt, {p: torch.full((65,), size)}, {p: torch.full((65,), -3 * size)})
        steps.append(opt.last_step)
    for step, size in zip(steps, (1.0, 2.0), strict=True):
        assert step.cosine == -1
        for norm, exact in ((step.grad_norm, size), (step.second_grad_norm, 3 * size)):
            torch.testing.assert_close(norm.item(), exact * 65**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ascent", [FriendlySAM(), VaSSO()], ids=lambda ascent: ascent.key)
def test_an_average_costs_no_launch(ascent, launches):
    params, opt = make([5, 6], lr=0.1, ascent=ascent)
    inject(random_grads(params, 0))
    opt.first_step()
    opt.second_step()
    assert launches == THREE


def test_clipping_or_measuring_costs_one_launch_more(launches):
    for options, measures in (({"max_grad_norm": 1.0}, False), ({}, True)):
        params, opt = make([5, 6], lr=0.1, **options)
        opt.measures = measures
        inject(random_grads(params, 0))
        opt.first_step()
        opt.second_step()
        assert launches == [*THREE[:2], "reduce_kernel", "update_kernel"]
        launches.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", [SGD, ADAMW])
def test_sizes_around_a_chunk(base, dtype):
    """Guards the tail: sizes one off the chunk, and a tensor of several chunks."""
    tile = 2048 // dtype.itemsize
    sizes = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, tile - 1, tile, tile + 1, 1]
    options = MOMENTUM if base is SGD else {"lr": 0.1, "weight_decay": 0.1}
    params, opt = make(sizes, base, dtype, **options)
    textbook = Textbook(opt)
    for i in range(2):
        textbook.step(random_grads(params, 2 * i), random_grads(params, 2 * i + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unaligned_gradients(dtype):
    """Guards views into DDP's buckets, which start anywhere."""
    sizes = [CHUNK + 3, 17, 1]
    params, opt = make(sizes, dtype=dtype, **MOMENTUM)
    twins, twin = make(sizes, dtype=dtype, **MOMENTUM)
    for i in range(2):
        for method, seed in (("first_step", 2 * i), ("second_step", 2 * i + 1)):
            grads = random_grads(params, seed)
            flat = torch.cat([torch.zeros(1, dtype=dtype), *grads.values()])
            for p, view in zip(params, flat[1:].split(sizes), strict=True):
                p.grad = view
            for p, g in zip(twins, grads.values(), strict=True):
                p.grad = g
            getattr(opt, method)()
            getattr(twin, method)()
    assert not any(first for first, *_ in aligned_slots(opt))
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(opt.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"])


def test_one_misaligned_gradient_leaves_the_others_wide(hints):
    """Guards alignment as a fact about a slot: of three gradients one begins at an odd element."""
    sizes = [CHUNK, 2 * CHUNK, CHUNK + 5]
    params, opt = make(sizes, ADAMW, lr=0.1)
    for i in range(2):
        passes = [random_grads(params, 2 * i + k) for k in range(2)]
        for grads in passes:
            grads[params[1]] = torch.cat([torch.zeros(1), grads[params[1]]])[1:]
        step_as_given(opt, *passes)
    assert aligned_slots(opt) == {(True, False, True)}
    assert hints.pointers


def test_a_misaligned_pinned_parameter_is_not_taken_for_aligned(hints):
    """Guards weights that must stay where they are, off the grid, with gradients that are on it.

    All of them in the first step; in the second one another gradient is off it.
    """
    base = torch.randn(2 * CHUNK + 8)
    params = [torch.nn.Parameter(base[1 : 2 * CHUNK + 1])]
    params += [torch.nn.Parameter(torch.randn(n)) for n in (CHUNK, 5)]
    assert params[0].data_ptr() % 16 == 4
    opt = FusedSAM(params, ADAMW, backend="triton", lr=0.1)
    for i in range(2):
        passes = [random_grads(params, 2 * i + k) for k in range(2)]
        for grads in passes if i else ():
            grads[params[2]] = torch.cat([torch.zeros(1), grads[params[2]]])[1:]
        step_as_given(opt, *passes)
    opt.zero_grad()
    opt.first_step()
    opt.restore()
    slots = opt._facts.engine.buckets[0].slots
    first = tuple(slot.param is not params[0] for slot in slots)
    assert aligned_slots(opt) == {first, tuple(slot.param is params[1] for slot in slots)}
    assert hints.pointers


def test_pinned_parameters_are_reached_by_address():
    """Guards parameters that share their storage, at an unaligned address."""
    base = torch.randn(CHUNK + 40)
    params = [torch.nn.Parameter(base[3 : CHUNK + 20]), torch.nn.Parameter(torch.randn(9))]
    address = params[0].data_ptr()
    opt = FusedSAM(params, ADAMW, backend="triton", lr=0.1)
    textbook = Textbook(opt)
    for i in range(2):
        textbook.step(random_grads(params, 2 * i), random_grads(params, 2 * i + 1))
    assert params[0].data_ptr() == address
    assert torch.equal(base[3 : CHUNK + 20], params[0])


def test_offsets_beyond_two_to_the_31(monkeypatch):
    """Guards 64-bit offsets: tables that say a chunk begins 2**31 + elements into its tensor.

    The addresses and the flat offset are shifted back by as much, so that the memory is the same.
    """
    shift = (2**31 // CHUNK + 3) * CHUNK
    assert shift > 2**31
    params, opt = make([CHUNK + 7], ADAMW, lr=0.1)
    twins, twin = make([CHUNK + 7], ADAMW, lr=0.1)
    addresses = tables.Tables._addresses

    def shifted(self, at):
        return addresses(self, tuple(a - 4 * shift for a in at) if self is shifted.of else at)

    monkeypatch.setattr(tables.Tables, "_addresses", shifted)
    for i in range(4):
        grads = torch.randn(CHUNK + 7)
        params[0].grad, twins[0].grad = grads, grads.clone()
        if i == 0:
            launcher = shifted.of = operations._launcher(opt._facts.engine.buckets[0])
            launcher.slots[:4] += torch.tensor([-shift, shift, 0, -shift * 4])
            launcher.slots[5::2] += shift
        for optimizer in (opt, twin):
            (optimizer.second_step if i % 2 else optimizer.first_step)()
        assert torch.equal(params[0], twins[0])


class Traffic:
    """Counts the elements that kernels read and write in given tensors."""

    def __init__(self, monkeypatch, tensors):
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        spans = {
            name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
            for name, t in tensors.items()
        }
        self.counts = dict.fromkeys([f"{d} {n}" for d in ("read", "write") for n in tensors], 0)
        for direction, method in (
            ("read", "create_masked_load"),
            ("write", "create_masked_store"),
        ):
            original = getattr(Builder, method)

            def counted(builder, ptrs, *args, original=original, direction=direction):
                mask = args[0] if direction == "read" else args[1]
                for name, (begin, end) in spans.items():
                    inside = (ptrs.data >= begin) & (ptrs.data < end) & mask.data
                    self.counts[f"{direction} {name}"] += int(np.sum(inside))
                return original(builder, ptrs, *args)

            monkeypatch.setattr(Builder, method, counted)


def test_every_element_is_moved_once(monkeypatch):
    """Guards the traffic budget as the kernels run, tails included: 1 + 4 + 5 for momentum."""
    n = 2 * CHUNK + 77
    params, opt = make([n], **MOMENTUM)
    inject(random_grads(params, 0))
    opt.first_step()
    opt.second_step()
    bucket = opt._facts.engine.buckets[0]
    tensors = {
        "w": params[0].detach(),
        "g": params[0].grad,
        "saved": bucket.saved[:n],
        "m": bucket.states["momentum_buffer"].flat[:n],
    }
    first = {"read g": 2, "read w": 1, "write w": 1, "write saved": 1}
    second = {"read saved": 1, "read g": 1, "read m": 1, "write w": 1, "write m": 1}
    for method, expected in ((opt.first_step, first), (opt.second_step, second)):
        with monkeypatch.context() as patch:
            traffic = Traffic(patch, tensors)
            method()
        assert {k: v / n for k, v in traffic.counts.items() if v} == expected


def test_tables_are_uploaded_when_they_change(uploads):
    """Guards the steady state: no upload, no new table while addresses and options repeat."""
    params, opt = make([5, 6], ADAMW, lr=0.1)
    inject(random_grads(params, 0))

    def one_step():
        uploads.clear()
        opt.first_step()
        opt.second_step()
        return len(uploads)

    # Addresses; flags of the climb, which are the reduction's, and of the update; options of both.
    assert one_step() == 1 + 2 + 2
    assert one_step() == 1  # the state is not fresh any more
    assert [one_step() for _ in range(3)] == [0, 0, 0]
    opt.param_groups[0]["lr"] = 0.2
    assert one_step() == 1
    opt.param_groups[0]["rho"] = 0.2
    assert one_step() == 1
    assert one_step() == 0
    params[0].grad = None
    assert one_step() == 1 + 2


def test_a_captured_graph_owns_its_tables(monkeypatch, uploads):
    """Guards replay: a graph uploads what it reads, even what has not changed."""
    params, opt = make([5, CHUNK + 6], ADAMW, lr=0.1)
    textbook = Textbook(opt)
    for i in range(2):
        textbook.step(random_grads(params, i), random_grads(params, i))
    launcher = launcher_of(opt)
    before = [dict(known) for known in launcher._known.values()], dict(launcher._hyper)
    uploads.clear()
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)
    textbook.step(random_grads(params, 1), random_grads(params, 2))
    assert len(uploads) == 2 + 3 + 3  # addresses; flags; hyperparameters
    assert ([dict(known) for known in launcher._known.values()], dict(launcher._hyper)) == before
    monkeypatch.setattr(capture, "is_capturing", lambda device: False)
    textbook.step(random_grads(params, 3), random_grads(params, 4))


def test_step_counts_are_each_parameters_own():
    """Guards the counting by whichever program comes last: once for every slot that steps."""
    params, opt = make([1, 0, CHUNK + 1, 5 * CHUNK], ADAMW, lr=0.1)
    for missing in (None, 0, 2, 2, 3):
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.ones_like(p)
        opt.second_step()
    assert [opt.state[p]["step"].item() for p in params] == [4.0, 5.0, 3.0, 4.0]
    assert launcher_of(opt).ticket.item() == 0


def test_more_slots_than_a_block_count_their_steps():
    params, opt = make([1] * 1200, ADAMW, lr=0.1)
    inject(random_grads(params, 0))
    opt.second_step()
    assert torch.equal(opt._facts.engine.buckets[0].states["step"].flat, torch.ones(1200))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99, 0.999, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bias_correction(beta, dtype):
    """Guards 1 - beta**step from the first step to the ten millionth.

    With lr 1, eps 0 and gradients of 1 every step of Adam is 1: the moments are exactly what the
    corrections divide them by. They are set to that in float64. Each of them, its update (3
    operations, 2 rounded hyperparameters) and its correction (log(beta), the product, the series'
    last three operations) are good to 11 u; a quotient and a root halve and add: 32 u in all.
    """
    u = torch.finfo(dtype).eps / 2
    params, opt = make([1], torch.optim.Adam, dtype, lr=1.0, betas=(beta, beta), eps=0.0)
    inject({params[0]: torch.ones(1, dtype=dtype)})
    opt.second_step()
    state = opt.state[params[0]]
    for count in (1, 2, 5, 30, 1000, 10**5, 10**7):
        past = -math.expm1((count - 1) * math.log(beta)) if beta else float(count > 1)
        params[0].data.zero_()
        state["step"].fill_(count - 1)
        state["exp_avg"].fill_(past)
        state["exp_avg_sq"].fill_(past)
        opt.second_step()
        assert abs(params[0].item() + 1) <= 32 * u, count


# ------------------------------------------------------------------------------------- failures


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_sam.backends.triton", None)
    with pytest.raises(RuntimeError, match="pip install 'triton"):
        backends.resolve("triton", torch.device("cpu"))
    assert backends.resolve("auto", torch.device("cuda", 0)).name == "reference"


def test_on_a_cpu_without_the_interpreter_it_says_so(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        FusedSAM([torch.nn.Parameter(torch.ones(2))], backend="triton", lr=0.1)
    with pytest.raises(RuntimeError, match="no such target"):
        backends.resolve("triton", torch.device("mps"))


def test_the_interpreter_does_not_reach_a_gpu():
    with pytest.raises(RuntimeError, match="CPU memory only"):
        backends.resolve("triton", torch.device("cuda", 0))
    assert backends.resolve("auto", torch.device("cuda", 0)).name == "reference"


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0"])
def test_auto_is_triton_on_gpus(device, monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    assert backends.resolve("auto", torch.device(device)).name == "triton"


def test_auto_is_not_triton_on_a_cpu():
    assert backends.resolve("auto", torch.device("cpu")).name != "triton"


@pytest.mark.parametrize("masters", [None, False, True], ids=["float64", "bf16", "bf16-masters"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_momentum_sam_takes_two_launches(base, masters, monkeypatch):
    """Guards an update in place ahead of w, its sum and the climb: two launches, as the reference.

    With a gradient that is missing, a skipped step, and a group that does not climb. The number of
    the climb rounds bfloat16, which is the same for both: they differ by a rounding, now and then.
    """
    launched, inner = [], operations._Launcher.launch

    def launch(self, kernel, *args):
        launched.append(kernel.fn.__name__)
        return inner(self, kernel, *args)

    monkeypatch.setattr(operations._Launcher, "launch", launch)
    dtype = torch.float64 if masters is None else torch.bfloat16
    sizes, more = (5000, 3, 4), {"momentum": 0.9} if base is torch.optim.SGD else {}
    start = [torch.linspace(-1, 1, n).to(dtype) for n in sizes]
    runs = []
    for backend in ("reference", "triton"):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        groups = [{"params": params[:2]}, {"params": params[2:], "ascent": None}]
        options = {"lr": 0.1, "weight_decay": 0.1, "rho": 3.0, "master_weights": bool(masters)}
        opt = FusedSAM(groups, base, ascent=MSAM(), backend=backend, **options, **more)
        runs.append((opt, params))
    for i in range(5):
        launched.clear()
        for opt, params in runs:
            for j, p in enumerate(params):
                p.grad = None if (i, j) == (1, 1) else torch.cos(start[j] * (i + j + 1))
            opt.found_inf = torch.tensor(float(i == 3))
            opt.step()
        away = {"update_kernel": 1, "ascend_kernel": 2 if i == 2 else 1}
        assert Counter(launched) == away, i
        bound = 1e-13 if masters is None else 2**-7
        for p, q in zip(runs[0][1], runs[1][1], strict=True):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=bound, atol=bound)
    for opt, _ in runs:
        opt.eval()
    if masters:
        for p, q in zip(runs[0][1], runs[1][1], strict=True):
            a, b = (o.state[x]["master_weight"] for (o, _), x in zip(runs, (p, q), strict=True))
            # The reference rounds a gradient and its decay, below 2, to bfloat16: by 2**-8. That
            # goes 1 + 1.9 + 2.71 + 3.44 times into the weights, times lr.
            torch.testing.assert_close(b, a, rtol=0, atol=0.1 * 9.05 * 2**-8)
