"""The native backend beside the case table: its operations, its bits, its build, its limits."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_sam import FusedSAM, backends, info
from fused_sam.ascents import ASCENTS, MSAM, FriendlySAM, VaSSO
from fused_sam.backends import native, resolve, tables
from fused_sam.backends.native import library, operations, translate
from fused_sam.memory import Bucket
from fused_sam.memory.members import AVERAGE
from fused_sam.memory.window import must_stay
from fused_sam.rules import ADAM, SGD

ROOT = Path(__file__).parent.parent
needs_native = pytest.mark.skipif(
    native.missing("cpu") is not None, reason=f"native: {native.missing('cpu')}"
)
RULE_OPTIONS = [
    (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)),
    (torch.optim.Adam, dict(lr=0.01, amsgrad=True, weight_decay=0.01)),
    (torch.optim.RMSprop, dict(lr=0.01, momentum=0.5, centered=True)),
]
SIZES = [(3, 5), (1,), (2 * 16384 + 7,), (511,), (16384,)]


def make(base=torch.optim.SGD, dtype=torch.float32, backend="native", sizes=SIZES, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params, FusedSAM(params, base, backend=backend, **options)


# --------------------------------------------------------------------------------------- operations


@needs_native
@pytest.mark.parametrize("pinned", (False, True))
def test_operations_do_what_their_schemas_say(pinned):
    """opcheck: mutations as declared, fake kernels of the right shapes, no trouble under AOT."""
    params = [torch.nn.Parameter(torch.randn(70)), torch.nn.Parameter(torch.randn(33))]
    for param in params:
        param.grad = torch.randn_like(param)
    held = params[1].detach() if pinned else None  # noqa: F841 (an alias: it must not move)
    bucket = Bucket([(p, 0) for p in params], {p for p in params if must_stay(p)})
    bucket.move_in()
    own = operations._tables(bucket)
    assert sum(slot.pinned for slot in bucket.slots) == pinned
    grads = bucket.gradients()
    group = dict(rho=0.1, eta=0.0, adaptive=False, maximize=False, theta=0.5)
    places = own.slots, own.addresses(grads).table
    start = bucket.saved, None
    ops = torch.ops.fused_sam
    total = torch.ones(1, dtype=torch.float64)
    for ascent, average in (
        (ASCENTS["sam"], None),
        (ASCENTS["vasso"], bucket.member(AVERAGE).flat),
    ):
        table = (
            own.flags({0: 0}, bucket.perturbed, grads),
            tables.sums_table(own, bucket, ascent.sums, [group]),
        )
        args = *start, average, None, None, *places, *table, 0, 0
        torch.library.opcheck(ops.reduce.default, (*args, operations._SUMS[ascent.sums.name]))
        args = *start, average, bucket.climb, *places, *table, total, None, 1, 0, 0
        torch.library.opcheck(ops.ascend_.default, (*args, operations._ASCENTS[ascent.name]))
    adam = dict(torch.optim.AdamW(params, amsgrad=True).param_groups[0])
    numbers, _ = tables.rule_rows(ADAM, [adam], [0])
    flags = own.flags({0: tables.rule_bits(ADAM, adam, False)}, (True, True), grads)
    states = [torch.zeros_like(bucket.saved) for _ in ADAM.states]
    torch.library.opcheck(
        ops.update_.default,
        (
            *(*states, torch.zeros(2), None, bucket.climb, bucket.saved, None, None, total),
            *(*places, flags, own.hyper("adam", 1, numbers), torch.ones(1), None, None, None),
            *(torch.tensor(2.0), torch.zeros(()), 0, 0, operations._RULES["Adam"], -1),
        ),
    )
    torch.library.opcheck(
        ops.restore_.default,
        (bucket.climb, bucket.saved, own.slots, flags, 0),
    )


def test_addresses_of_weights_stand_at_their_own_slots():
    """Guards memory: nobody can check this column, by which kernels reach the weights."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 70, 64, 9)]
    held = [params[i].detach() for i in (0, 2)]  # aliases: these must not move
    bucket = Bucket([(p, 0) for p in params], {p for p in params if must_stay(p)})
    bucket.move_in()
    table = operations._tables(bucket).slots[: 4 * len(params)].view(-1, 4)
    expected = [params[1], params[3], *held]
    for slot, row, p in zip(bucket.slots, table.tolist(), expected, strict=True):
        assert row == [slot.start, p.numel(), 0, p.data_ptr()]


@needs_native
def test_operations_refuse_tables_that_do_not_fit():
    """Sizes, dtypes and rows are checked before any memory is touched; addresses cannot be."""
    _, opt = make()
    bucket = opt._facts.engine.buckets[0]
    own = operations._tables(bucket)
    grads = bucket.gradients()
    addresses, flags = own.addresses(grads).table, own.flags({0: 0}, bucket.perturbed, grads)
    hyper = tables.sums_table(own, bucket, ASCENTS["sam"].sums, opt.param_groups)
    good = [bucket.saved, *[None] * 4, own.slots, addresses, flags, hyper, 0, 0]
    slots = own.slots.clone()
    slots[1] += bucket.size  # numel of the first slot
    overflowing = own.slots.clone()
    overflowing[:2] = torch.tensor([1, 2**63 - 1])  # their sum is negative
    bad_row = own.slots.clone()
    bad_row[2] = 1
    for i, wrong in (
        (0, bucket.saved[:-64]),
        (1, bucket.saved[:-64]),  # what is kept
        (2, bucket.saved),  # an average that the sum does not need
        (3, torch.zeros(1, dtype=torch.float64)),  # numbers of which the sum needs none
        (5, slots),
        (5, overflowing),
        (5, bad_row),
        (5, own.slots[:-4]),
        (6, addresses.int()),
        (7, flags[1:]),
        (7, flags.long()),
        (8, hyper[:-1]),
        (8, hyper.double()),
        (9, 1),  # weights of float64 with what is saved of float32
        (9, 4),
        (10, -1),
        (10, 4),
    ):
        with pytest.raises(RuntimeError, match="fused_sam"):
            torch.ops.fused_sam.reduce.default(*good[:i], wrong, *good[i + 1 :], 0)
    averaged = good.copy()
    averaged[8] = torch.zeros(1, 6)
    for average in (None, bucket.saved[:-64], bucket.saved.double()):
        averaged[2] = average
        with pytest.raises(RuntimeError, match="fused_sam: average"):
            torch.ops.fused_sam.reduce.default(*averaged, operations._SUMS["VassoSamNorm"])
    for number in (-1, len(operations._SUMS)):
        with pytest.raises(RuntimeError, match="unknown sums"):
            torch.ops.fused_sam.reduce.default(*good, number)
    sgd, _ = tables.rule_rows(SGD, opt.param_groups, [0])
    for bits in (1, 2, 1 << 7):  # a state that is not there, and two that no rule has
        kept = own.flags({0: bits << tables.KEPT_SHIFT}, bucket.perturbed, grads)
        with pytest.raises(RuntimeError, match="of which one is missing or unknown"):
            torch.ops.fused_sam.update_.default(
                *(None, None, None, None, None, bucket.climb, bucket.saved),
                *(*[None] * 3, own.slots, addresses, kept, own.hyper("sgd", 1, sgd), *[None] * 6),
                *(0, 0, operations._RULES["Sgd"], -1),
            )
    flags = own.flags({0: 0}, bucket.perturbed, grads)
    numbers = torch.zeros(3, dtype=torch.float64)
    good = (bucket.saved.clone(), None, numbers, torch.zeros(1), 0)
    looks, reuses = operations._BLENDS["LookSam"], operations._BLENDS["LookSamReuse"]
    for kept, direction, three, hyper, blend in (
        (None, *good[1:]),
        (good[0][:-64], *good[1:]),
        (good[0], good[0], *good[2:]),
        (*good[:2], None, *good[3:]),
        (*good[:2], numbers[:2], *good[3:]),
        (*good[:3], None, 0),
        (*good[:3], torch.zeros(2), 0),
        (*good[:4], len(operations._BLENDS)),
        (*good[:4], looks),
        (good[0], good[0].double(), *good[2:4], looks),
        (*good[:4], reuses),  # which has one number
    ):
        with pytest.raises(RuntimeError, match=r"fused_sam: .*(blend|kept|numbers|direction)"):
            torch.ops.fused_sam.update_.default(
                *(None, None, None, None, None, bucket.climb, bucket.saved),
                *(kept, direction, None, own.slots, addresses, flags, own.hyper("sgd", 1, sgd)),
                *(None, three, hyper, None, None, None, 0, 0, operations._RULES["Sgd"], blend),
            )
    wide, state = torch.zeros(1, dtype=torch.float64), bucket.saved.clone()
    for momentum, total, decay in (
        (None, wide, None),
        (state, torch.zeros(1), None),
        (state, wide[:0], None),
        (state, wide, torch.zeros(2)),
        (state, wide, wide),
    ):
        with pytest.raises(RuntimeError, match=r"fused_sam: (total|decay) "):
            torch.ops.fused_sam.update_.default(
                *(momentum, None, None, None, None, bucket.climb, bucket.saved, None, None),
                *(total, own.slots, addresses, flags, own.hyper("sgd", 1, sgd), decay),
                *(*[None] * 5, 0, 0, operations._RULES["Sgd"], -1),
            )


@needs_native
def test_states_that_adam_always_keeps_must_be_there_and_in_the_flags():
    """Guards memory: kernels read the states that a slot's bits name, and none is at null."""
    _, opt = make(torch.optim.Adam)
    bucket = opt._facts.engine.buckets[0]
    own, grads, state = operations._tables(bucket), bucket.gradients(), bucket.saved.clone()
    numbers, _ = tables.rule_rows(ADAM, opt.param_groups, [0])
    before = [p.detach().clone() for p in bucket.params]

    def update(states, kept):
        flags = own.flags({0: kept << tables.KEPT_SHIFT}, bucket.perturbed, grads)
        torch.ops.fused_sam.update_.default(
            *(*states, torch.zeros(len(SIZES)), None, bucket.climb),
            *(bucket.saved, *[None] * 3, own.slots, own.addresses(grads).table, flags),
            *(own.hyper("adam", 1, numbers), *[None] * 6, 0, 0, operations._RULES["Adam"], -1),
        )

    for states in ((state, None, None), (None, state, state)):
        with pytest.raises(RuntimeError, match="a state is missing that the rule always needs"):
            update(states, 3)
    for kept in (0, 1, 2, 7):
        with pytest.raises(RuntimeError, match=f"keeps the states {kept}, of which one is missing"):
            update((state, state, None), kept)
    assert all(map(torch.equal, bucket.params, before))


@needs_native
def test_the_climb_has_its_number_until_the_return():
    """Guards what tells after an exception whether ``saved`` holds w."""
    _, opt = make(momentum=0.9, lr=0.1)
    engine, groups = opt._facts.engine, opt.param_groups
    bucket, backend, grads = engine.buckets[0], engine.backends[0], engine.buckets[0].gradients()
    total = backend.reduce(bucket, ASCENTS["sam"].sums, grads, groups)
    for number, back in (
        (3, lambda: backend.restore_(bucket)),
        (4, lambda: backend.update_(bucket, SGD, None, grads, groups)),
        (5, lambda: backend.update_(bucket, SGD, None, grads, groups, found_inf=torch.ones(()))),
    ):
        assert bucket.climb.item() == 0
        backend.ascend_(bucket, ASCENTS["sam"], grads, groups, total, number)
        assert bucket.climb.item() == number
        back()
    assert bucket.climb.item() == 0


class OnDevice(torch.Tensor):
    """A number that says it is on a device of its own, as a learning rate may be on a GPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="meta")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        result = func(*args, **(kwargs or {}))
        return cls(result) if func is torch.ops.aten.squeeze.default else result


def test_learning_rate_on_a_device_and_a_plain_zero_are_told_apart():
    """The host does not read a rate on a device; where it puts 0.0 meanwhile is no known rate."""
    params = [torch.nn.Parameter(torch.ones(3))]
    bucket = Bucket([(p, 0) for p in params], set())
    bucket.move_in()
    own = tables.Tables(bucket)
    group = dict(torch.optim.SGD(params).param_groups[0])
    for lr, expected in ((OnDevice(torch.tensor(0.5)), 0.5), (0.0, 0.0), (0.25, 0.25)):
        group["lr"] = lr
        for _ in range(2):
            assert own.hyper("sgd", 1, *tables.rule_rows(SGD, [group], [0]))[0] == expected


@needs_native
def test_constants_agree_with_the_sources():
    """Python fills the tables that csrc/ reads: their bits and sizes are one."""
    header = (ROOT / "csrc" / "tables.h").read_text()
    for name, value in re.findall(r"constexpr int(?:32_t)? k(\w+) = (\d+);", header):
        known = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert getattr(tables, known, int(value)) == int(value)
    assert int(re.search(r"kMaximize = (\d+)", header)[1]) == tables.MAXIMIZE
    launch = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    assert int(re.search(r"kChunk = (\d+)", launch)[1]) == operations.CHUNK


@needs_native
def test_a_library_of_other_mathematics_is_not_used(monkeypatch):
    """Guards a stale binary: two columns swapped would give other numbers, and no error."""
    native.missing.cache_clear()
    monkeypatch.setattr(translate, "digest", lambda: "0123456789abcdef")
    try:
        assert "was built from other sources" in native.missing("cpu")
    finally:
        native.missing.cache_clear()


# --------------------------------------------------------------------------------------------- bits


def run_steps():
    """Two steps of every rule in every dtype; all parameters and states."""
    result = []
    for base, options in RULE_OPTIONS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for adaptive in (False, True):
                params, opt = make(base, dtype, rho=0.3, adaptive=adaptive, **options)
                for _ in range(2):
                    opt.first_step()
                    opt.second_step()
                result += [p.detach() for p in params]
                result += [v for p in params for _, v in sorted(opt.state[p].items())]
    return result


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run_steps())
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_native
def test_bits_do_not_depend_on_the_instruction_set(tmp_path):
    """The kernels for every x86-64 give the bits of those for AVX-512."""
    code = (
        f"import sys, torch; sys.path[:0] = [{str(ROOT / 'tests')!r}]; import test_native as t;"
        f"torch.save([torch.ops.fused_sam.cpu_kernels(), t.run_steps()], sys.argv[1])"
    )
    here, seen = run_steps(), set()
    for name in ("baseline", "avx2"):
        path = tmp_path / name
        subprocess.run(
            [sys.executable, "-c", code, str(path)],
            check=True,
            env={**os.environ, "FUSED_SAM_CPU": name, "PYTHONPATH": str(ROOT)},
        )
        kernels, there = torch.load(path)
        seen.add(kernels)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True)), name
    assert "baseline" in seen


# ------------------------------------------------------------------------------------------- limits


@needs_native
def test_many_parameters_in_many_groups_step_as_the_reference():
    """10 000 parameters, 64 groups with options of their own, every seventh without a gradient."""
    runs = {}
    for backend in ("reference", "native"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(i % 5)) for i in range(10_000)]
        groups = [
            dict(params=params[i::64], lr=0.01 * (i + 1), rho=0.01 * i, momentum=0.5 * (i % 2))
            for i in range(64)
        ]
        opt = FusedSAM(groups, torch.optim.SGD, backend=backend)
        for i, param in enumerate(params):
            param.grad = None if i % 7 == 0 else torch.randn_like(param)
        opt.first_step()
        opt.second_step()
        runs[backend] = torch.cat([p.detach() for p in params])
    # A handful of roundings of numbers up to 8.
    assert torch.allclose(*runs.values(), rtol=0, atol=8 * 8 * 2**-24)


ROUGH = 3 * 6 * 2**-9
"""bfloat16 rounds a gradient with its decay, the momentum and the weights, in each of 6 steps."""
MOMENTUM_SAM = {
    "float32": (torch.float32, None, False, 1e-5, 1e-5),
    "float64": (torch.float64, None, False, 1e-13, 1e-13),
    "bf16": (torch.bfloat16, None, False, ROUGH, ROUGH),
    "bf16-wide-gradients": (torch.bfloat16, torch.float32, False, ROUGH, ROUGH),
    "bf16-masters": (torch.bfloat16, torch.float32, True, ROUGH, 1e-5),
    "fp16-masters": (torch.float16, None, True, ROUGH, 6 * 2**-10),
    "float32-narrow-gradients": (torch.float32, torch.float16, False, 6 * 2**-10, 6 * 2**-10),
}
"""Dtypes of weights and gradients, masters, and how far two backends' weights and states may be
apart, in units of the largest: the reference rounds a gradient with its decay to its dtype."""
BASES = {
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "uphill": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3, "maximize": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}


@needs_native
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("nesterov", kind) for kind in MOMENTUM_SAM],
        *[(name, kind) for name in ("uphill", "adam", "adamw") for kind in ("float64", "bf16")],
    ],
)
def test_momentum_sam_takes_two_launches(name, kind):
    """Guards an update ahead of w, its decay, its sum and the climb, over spans and tiles.

    With a gradient that is missing, scales, a skipped step, lr 0, and a group that does not climb.
    A way to w and back leads to the same bits: the update sums what a reduction sums.
    """
    (base, options), (dtype, grad_dtype, masters, *bounds) = BASES[name], MOMENTUM_SAM[kind]
    still = {"ascent": None}
    if base is torch.optim.SGD:
        still |= {"momentum": 0.0, "nesterov": False, "dampening": 0.0}
    runs, launched = [], Launched()
    for backend in ("reference", "native"):
        params, _ = make(dtype=dtype)
        for p in params:
            p.grad, p.grad_dtype = None, grad_dtype or dtype
        opt = FusedSAM(
            [{"params": params[:-1]}, {"params": params[-1:], **still}],
            base,
            backend=backend,
            ascent=MSAM(),
            **{"lr": 0.05, "rho": 3.0, "weight_decay": 0.3, "master_weights": masters, **options},
        )
        runs.append((opt, params))
    start = [p.detach().clone().double() for p in params]
    for i in range(6):
        launched.names.clear()
        for opt, params in runs:
            for j, p in enumerate(params):
                grad = torch.cos(start[j] * (i + j + 1)) * (4 if i % 2 else 1)
                p.grad = None if (i, j) == (1, 2) else grad.to(p.grad_dtype)
            opt.grad_scale = torch.tensor(4.0 if i % 2 else 1.0)
            opt.found_inf = torch.tensor(float(i == 3))
            opt.param_groups[0]["lr"] = 0.0 if i == 4 else 0.05
            with launched:
                opt.step()
        assert launched.names == ["update_", "ascend_"], i
        for opt, params in runs:
            away = [p.detach().clone() for p in params]
            opt.eval()
            opt.train()
        # Half precision is rounded by the climb's number, which is another one.
        assert dtype.itemsize == 2 or all(map(torch.equal, params, away))
        for p, q in zip(*[params for _, params in runs], strict=True):
            theirs, ours = [opt.state.get(x, {}) for (opt, _), x in zip(runs, (p, q), strict=True)]
            pairs = [(p, q, bounds[0]), *[(theirs[key], ours[key], bounds[1]) for key in theirs]]
            for a, b, bound in pairs:
                atol = bound * a.detach().abs().max().item()
                torch.testing.assert_close(b.detach(), a.detach(), rtol=0, atol=atol)


class Launched(TorchDispatchMode):
    """Notes which operations of ours run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_sam":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("ascent", [FriendlySAM(), VaSSO()], ids=lambda ascent: ascent.key)
def test_averages_of_many_tiles_are_the_references(ascent):
    """Guards each tile's place in the average, and checkpoints between backends."""
    runs = []
    for backend, other in (("native", "reference"), ("reference", "native")):
        params, opt = make(dtype=torch.float64, backend=backend, ascent=ascent, rho=0.3)
        for i in range(4):
            if i == 2:
                twin = make(dtype=torch.float64, backend=other, ascent=ascent)
                for p, w in zip(twin[0], params, strict=True):
                    p.data.copy_(w.detach())
                twin[1].load_state_dict(opt.state_dict())
                params, opt = twin
            for half in (opt.first_step, opt.second_step):
                for j, p in enumerate(params):
                    p.grad = torch.cos(p.detach() * (j + 1) + i)
                half()
        entries = opt.state_dict()["state"].values()
        runs.append([p.detach() for p in params] + [entry[AVERAGE] for entry in entries])
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


@needs_native
def test_no_gradients_at_all_leave_everything():
    params, opt = make(momentum=0.9, lr=0.1)
    before = [p.detach().clone() for p in params]
    opt.zero_grad()
    opt.first_step()
    opt.second_step()
    assert opt.grad_norm == 0
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@needs_native
def test_reduced_precision_rounds_as_torch():
    """By update_ with lr 1: w - g of every bf16 and fp16, rounded to the nearest."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        param = torch.nn.Parameter(every.clone())
        param.grad = torch.randn(every.numel()).to(dtype)
        want = (every.float() - param.grad.float()).to(dtype)
        FusedSAM([param], lr=1.0, backend="native").second_step()
        finite = ~want.isnan()
        assert torch.equal(param.detach().view(torch.int16)[finite], want.view(torch.int16)[finite])
        assert param.detach()[~finite].isnan().all()


# -------------------------------------------------------------------------- choice, build, packages


@needs_native
def test_auto_takes_native_on_a_cpu():
    assert FusedSAM([torch.nn.Parameter(torch.ones(2))], lr=0.1).backend == "native"


def test_a_missing_backend_is_an_error_with_the_remedy(monkeypatch):
    """By name never a silent fallback; "auto" takes another one."""
    native.missing.cache_clear()
    monkeypatch.setattr(library, "_library", lambda name: None)
    try:
        with pytest.raises(RuntimeError, match="FUSED_SAM_BUILD=cpu pip install"):
            resolve("native", torch.device("cpu"))
        assert resolve("auto", torch.device("cpu")).name != "native"
        assert "missing: its cpu library was not built" in info.report()
    finally:
        native.missing.cache_clear()


def test_a_library_that_cannot_be_loaded_says_so(monkeypatch, tmp_path):
    broken = tmp_path / "_native.abi3.so"
    broken.write_text("no library")
    with pytest.raises(OSError) as error:
        ctypes.CDLL(str(broken))
    native.missing.cache_clear()
    monkeypatch.setattr(library, "_library", lambda name: broken)
    monkeypatch.setattr(library, "_is_registered", lambda device_type: False)
    try:
        assert f"cannot be loaded ({error.value})" in native.missing("cpu")
    finally:
        native.missing.cache_clear()


@needs_native
@pytest.mark.parametrize("left", [0, 63, 64, 0.5, -1])
def test_a_library_that_is_cut_short_is_not_loaded(left, monkeypatch, tmp_path):
    """The loader ended the process, by a bus error; and "auto" said nothing of an empty one."""
    if sys.platform != "linux":
        pytest.skip("loaders of other systems look for themselves")
    whole = library._library("_native").read_bytes()
    short = tmp_path / "_native.abi3.so"
    short.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    native.missing.cache_clear()
    monkeypatch.setattr(library, "_library", lambda name: short)
    monkeypatch.setattr(library, "_is_registered", lambda device_type: False)
    backends._say_once.cache_clear()
    try:
        assert "is cut short, or empty; build it again" in native.missing("cpu")
        with pytest.warns(UserWarning, match=r"cut short.*the slower 'reference'"):
            assert resolve("auto", torch.device("cpu")).name == "reference"
        assert resolve("auto", torch.device("cpu")).name == "reference"  # it is said once
    finally:
        native.missing.cache_clear()
        backends._say_once.cache_clear()


def test_info_tells_of_a_bad_wish_for_kernels():
    """It ended in a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "fused_sam.info"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FUSED_SAM_CPU": "sse9"},
    )
    assert done.returncode == 0, done.stderr
    if library._library("_native") is not None:
        assert "missing: FUSED_SAM_CPU='sse9' names no kernels" in done.stdout


FEATURES = {
    "SSE3": "sse3",
    "SSSE3": "ssse3",
    "SSE4_1": "sse4.1",
    "SSE4_2": "sse4.2",
    "POPCNT": "popcnt",
    "GCC_HAVE_SYNC_COMPARE_AND_SWAP_16": "has_cx16",
    "LAHF_SAHF": "has_lahf",
    "AVX": "avx",
    "AVX2": "avx2",
    "FMA": "fma",
    "BMI": "bmi",
    "BMI2": "bmi2",
    "F16C": "has_f16c",
    "LZCNT": "has_lzcnt",
    "MOVBE": "has_movbe",
    "AVX512F": "avx512f",
    "AVX512BW": "avx512bw",
    "AVX512CD": "avx512cd",
    "AVX512DQ": "avx512dq",
    "AVX512VL": "avx512vl",
}
"""What dispatch.cpp calls the features whose macros a compiler defines."""
OTHERS = {"SSE", "SSE2", "SSE_MATH", "SSE2_MATH", "MMX", "FXSR", "k8"}  # every x86-64 has them
NO_INSTRUCTIONS = {"XSAVE", "EVEX512", "CRC32"}
"""What the system does, a length of vectors, and a part of SSE4.2."""


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="csrc/ is not here")
@pytest.mark.parametrize("level", ["v2", "v3", "v4"])
def test_the_cpu_is_asked_for_all_that_the_compiler_was_allowed(level):
    """LZCNT, MOVBE and F16C were not asked for: a CPU without them would stop at an instruction."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs a compiler for x86-64")

    def macros(march):
        told = subprocess.run(
            [compiler, f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        )
        return set(re.findall(r"#define __(\w+?)(?:__)? 1$", told.stdout, re.MULTILINE))

    before = {"v2": "x86-64", "v3": "x86-64-v2", "v4": "x86-64-v3"}[level]
    new = macros(f"x86-64-{level}") - macros(before)
    allowed = {macro for macro in new if not macro.startswith("FP_FAST")}
    unknown = allowed - FEATURES.keys() - OTHERS - NO_INSTRUCTIONS
    assert not unknown, f"a compiler may use {unknown}, of which this test does not know"
    source = (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text()
    body = source.split(f"static bool has_{level}() {{")[1].split("}")[0]
    for feature in allowed & FEATURES.keys():
        asked = FEATURES[feature]
        assert f'"{asked}"' in body or re.search(rf"&& {asked}\b", body), feature


@needs_native
@pytest.mark.parametrize("same", (True, False))
def test_two_copies_of_the_package_in_one_process(same, tmp_path):
    """A second library of the same operations ended the process: what one has loaded serves both.

    If it is not the same library, the second copy says so, and its other backends run.
    """
    shutil.copytree(ROOT / "fused_sam", tmp_path / "fused_sam")
    if not same:
        with open(tmp_path / "fused_sam" / library._library("_native").name, "ab") as copy:
            copy.write(b"another")
    code = """
import sys
from fused_sam.backends import native
assert native.missing("cpu") is None
for name in [name for name in sys.modules if name.partition(".")[0] == "fused_sam"]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
import torch
from fused_sam import FusedSAM
from fused_sam.backends import native
assert native.__file__.startswith(sys.argv[1])
print(FusedSAM([torch.nn.Parameter(torch.ones(2))], lr=0.1).backend, native.missing("cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    if same:
        assert done.stdout == "native None\n"
    else:
        assert "another copy of fused_sam has loaded its own cpu library" in done.stdout
        assert not done.stdout.startswith("native")


def test_other_devices_are_refused_with_a_reason():
    assert "not on meta" in native.missing("meta")
    if not torch.version.cuda:
        assert native.missing("cuda") is not None


def test_info_names_every_backend():
    report = info.report()
    for name in ("fused-sam", "torch", "reference", "native (cpu)", "native (cuda)"):
        assert name in report


def test_info_has_an_exit_status_for_the_backends_asked_for(monkeypatch, capsys):
    """A script learns from it that a library was built and does not load."""
    found = {"reference": None, "native (cuda)": "of a reason"}
    monkeypatch.setattr(info, "availability", lambda: found)
    assert info.main([]) == info.main(["reference"]) == 0
    assert info.main(["reference", "native (cuda)"]) == 1
    assert "missing: of a reason" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"'cuda'.*choose from.*'native .cuda.'"):
        info.main(["cuda"])


def setup(mode, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "FUSED_SAM_BUILD": mode, **environment},
    )


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")
@pytest.mark.parametrize(
    "mode, environment, message",
    [
        ("fast", {}, "FUSED_SAM_BUILD='fast' is not known"),
        ("cpu", {"CXX": "no-compiler", "PATH": ""}, "there is no C.. compiler"),
        ("cuda", {"CUDA_HOME": "/nowhere"}, "there is no nvcc"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(mode, environment, message):
    done = setup(mode, **environment)
    assert done.returncode != 0
    assert re.search(message, done.stderr)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")
@pytest.mark.parametrize("environment", [{"CXX": "no-compiler"}, {"CXX": ""}, {"PATH": ""}])
def test_without_a_compiler_the_package_is_pure_python_and_says_so(environment):
    done = setup("auto", **{"CXX": "c++", **environment})
    assert done.returncode == 0, done.stderr
    assert "without the native backend: there is no C++ compiler" in done.stderr
    assert "FUSED_SAM_BUILD=cpu pip install" in done.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
@pytest.mark.parametrize("name", ("_native", "_native_cuda"))
def test_libraries_use_the_stable_abi_alone(name):
    """No C++ symbol of torch is asked for: one binary serves every torch from 2.10 on."""
    found = library._library(name)
    if found is None:
        pytest.skip(f"{name} was not built")
    wanted = subprocess.run(["nm", "-DCu", found], capture_output=True, text=True, check=True)
    assert "aoti_torch" in wanted.stdout
    assert not re.search(r"\b(at|c10|torch)::|\bPy[A-Z_]", wanted.stdout)
