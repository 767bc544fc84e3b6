"""The native backend beside the case table: its operations, its bits, its build, its limits."""

import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from fused_sam import FusedSAM, info
from fused_sam.backends import native, resolve
from fused_sam.layout import Bucket, _must_stay
from fused_sam.rules import RULES

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
    bucket = Bucket([(p, 0) for p in params], {p for p in params if _must_stay(p)})
    bucket.move_in()
    tables = native._tables(bucket)
    assert len(tables.pinned) == pinned
    grads = tables.grads(bucket.gradients())
    groups = [dict(rho=0.1, eta=0.0, adaptive=False, maximize=False)]
    hyper = tables.hyper(bucket, groups, native._ASCENT)
    start = bucket.weights, tables.pinned, bucket.saved, tables.slots, grads, hyper
    ops = torch.ops.fused_sam
    torch.library.opcheck(ops.sq_norm.default, (*start, True))
    torch.library.opcheck(ops.climb_.default, start)
    torch.library.opcheck(ops.perturb_.default, (*start, torch.ones(1)))
    adam = dict(torch.optim.AdamW(params, amsgrad=True).param_groups[0])
    number, order, row = native._UPDATE["adam"]
    states = [torch.zeros_like(bucket.saved) for _ in order]
    torch.library.opcheck(
        ops.update_.default,
        (
            *(bucket.weights, tables.pinned, *states, torch.zeros(2), None, bucket.saved),
            *(tables.slots, grads, tables.hyper(bucket, [adam], row)),
            *(torch.ones(2, dtype=torch.uint8), torch.tensor(2.0), torch.zeros(()), number),
        ),
    )


def test_pinned_addresses_stand_at_their_own_slots():
    """Guards the column that only CUDA reads: on the CPU the list of pinned weights serves."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 70, 64, 9)]
    held = [params[i].detach() for i in (0, 2)]  # aliases: these must not move
    bucket = Bucket([(p, 0) for p in params], {p for p in params if _must_stay(p)})
    bucket.move_in()
    table = native._tables(bucket).slots[: 4 * len(params)].view(-1, 4)
    expected = [(params[1], 0), (params[3], 0), *[(p, p.data_ptr()) for p in held]]
    for slot, row, (p, address) in zip(bucket.slots, table.tolist(), expected, strict=True):
        assert row == [slot.start, p.numel(), 0, address]


@needs_native
def test_operations_refuse_tables_that_do_not_fit():
    """Sizes, dtypes and rows are checked before any memory is touched; addresses cannot be."""
    _, opt = make()
    bucket = opt._layout.buckets[0]
    tables = native._tables(bucket)
    grads = tables.grads(bucket.gradients())
    hyper = tables.hyper(bucket, opt.param_groups, native._ASCENT)
    good = [bucket.weights, [], bucket.saved, tables.slots, grads, hyper]
    slots = tables.slots.clone()
    slots[1] += bucket.size  # numel of the first slot
    overflowing = tables.slots.clone()
    overflowing[:2] = torch.tensor([1, 2**63 - 1])  # their sum is negative
    bad_row = tables.slots.clone()
    bad_row[2] = 1
    for i, wrong in (
        (0, bucket.weights[:-64]),
        (0, bucket.weights.double()),
        (2, bucket.saved[:-64]),
        (3, slots),
        (3, overflowing),
        (3, bad_row),
        (3, tables.slots[:-4]),
        (4, grads.int()),
        (5, hyper[:, :-1].contiguous()),
        (5, hyper.double()),
    ):
        with pytest.raises(RuntimeError, match="fused_sam"):
            torch.ops.fused_sam.climb_.default(*good[:i], wrong, *good[i + 1 :])
    number, _, row = native._UPDATE["sgd"]
    options = tables.hyper(bucket, [dict(opt.param_groups[0], momentum=0.9)], row)
    with pytest.raises(RuntimeError, match="a state is missing"):
        torch.ops.fused_sam.update_.default(
            *(bucket.weights, [], None, None, None, None, None, bucket.saved, tables.slots),
            *(grads, options, torch.zeros(len(SIZES), dtype=torch.uint8), None, None, number),
        )


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


def test_what_a_cuda_graph_reads_is_its_own(monkeypatch):
    """Tables that are filled in a capture serve nobody else, and live as long as the bucket."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table.clone())
    capturing = False
    monkeypatch.setattr(native._Tables, "_is_capturing", lambda self: capturing)
    params = [torch.nn.Parameter(torch.ones(3))]
    bucket = Bucket([(p, 0) for p in params], set())
    tables = native._tables(bucket)
    tables.on_cpu = False
    group = dict(torch.optim.SGD(params).param_groups[0])
    row = native._UPDATE["sgd"][2]
    grads = [torch.ones(3)]
    warm = tables.hyper(bucket, [group], row), tables.grads(grads)
    capturing = True
    captured = tables.hyper(bucket, [group], row), tables.grads(grads)
    alive = [weakref.ref(table) for table in captured]
    assert all(a is not b for a, b in zip(warm, captured, strict=True))
    del captured
    capturing = False
    again = tables.hyper(bucket, [group], row), tables.grads(grads)
    assert all(a is b for a, b in zip(warm, again, strict=True))
    group["lr"] = 0.5
    tables.hyper(bucket, [group], row)
    many = [[torch.ones(3)] for _ in range(2 * native._MAX_SMALL)]
    for other in many:
        tables.grads(other)
    assert all(table() is not None for table in alive)


def test_learning_rate_on_a_device_and_a_plain_zero_are_told_apart():
    """The host does not read a rate on a device; where it puts 0.0 meanwhile is no known rate."""
    params = [torch.nn.Parameter(torch.ones(3))]
    bucket = Bucket([(p, 0) for p in params], set())
    tables = native._tables(bucket)
    group = dict(torch.optim.SGD(params).param_groups[0])
    column = native.HYPER.index("lr")
    for lr, expected in ((OnDevice(torch.tensor(0.5)), 0.5), (0.0, 0.0), (0.25, 0.25)):
        group["lr"] = lr
        for _ in range(2):
            row = tables.hyper(bucket, [group], native._UPDATE["sgd"][2])[0]
            assert row[column] == expected


@needs_native
def test_constants_agree_with_the_sources():
    """Python fills the tables that csrc/ reads: the order of their columns is one."""
    rules = (ROOT / "csrc" / "rules.h").read_text()
    struct = re.search(r"struct Hyper \{(.*?)\};", rules, re.S)[1]
    assert tuple(re.findall(r"^  T (\w+);", struct, re.M)) == native.HYPER
    kernels = (ROOT / "csrc" / "cpu" / "kernels.h").read_text()
    launch = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    assert int(re.search(r"kSpan = (\d+)", kernels)[1]) == native.SPAN
    assert int(re.search(r"kChunk = (\d+)", launch)[1]) == native.CHUNK
    assert int(re.search(r"kPartials = (\d+)", launch)[1]) == native.PARTIALS


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
    """By perturb_ with norm 0.5 and rho 0.5: w + g of every bf16 and fp16, rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        param = torch.nn.Parameter(every.clone())
        param.grad = torch.randn(every.numel()).to(dtype)
        opt = FusedSAM([param], rho=0.5, lr=0.1, backend="native")
        bucket = opt._layout.buckets[0]
        opt._backends[0].perturb_(bucket, [param.grad], opt.param_groups, torch.tensor([0.25]))
        want = (every.float() + param.grad.float()).to(dtype)
        finite = ~want.isnan()
        assert torch.equal(param.detach().view(torch.int16)[finite], want.view(torch.int16)[finite])
        assert param.detach()[~finite].isnan().all()
        assert torch.equal(bucket.saved[: every.numel()].view(torch.int16), every.view(torch.int16))


# -------------------------------------------------------------------------- choice, build, packages


@needs_native
def test_auto_takes_native_on_a_cpu():
    assert FusedSAM([torch.nn.Parameter(torch.ones(2))], lr=0.1).backend == "native"


def test_a_missing_backend_is_an_error_with_the_remedy(monkeypatch):
    """By name never a silent fallback; "auto" takes another one."""
    native.missing.cache_clear()
    monkeypatch.setattr(native, "_library", lambda name: None)
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
    native.missing.cache_clear()
    monkeypatch.setattr(native, "_library", lambda name: broken)
    try:
        assert "cannot be loaded" in native.missing("cpu")
    finally:
        native.missing.cache_clear()


def test_other_devices_are_refused_with_a_reason():
    assert "not on meta" in native.missing("meta")
    if not torch.version.cuda:
        assert native.missing("cuda") is not None


def test_info_names_every_backend():
    report = info.report()
    for name in ("fused-sam", "torch", "reference", "native (cpu)", "native (cuda)"):
        assert name in report


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
    library = native._library(name)
    if library is None:
        pytest.skip(f"{name} was not built")
    wanted = subprocess.run(["nm", "-DCu", library], capture_output=True, text=True, check=True)
    assert "aoti_torch" in wanted.stdout
    assert not re.search(r"\b(at|c10|torch)::|\bPy[A-Z_]", wanted.stdout)


def test_every_rule_has_its_kernel():
    for rule in RULES.values():
        _, order, _ = native._UPDATE[rule.name]
        assert {*order, "step"} >= rule.all_state
