"""The CUDA library where there is no GPU: that it loads, and what it launches, over stubs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_sam.backends.native import library

ROOT = Path(__file__).parent.parent


def run(*command, **environment):
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def needed():
    """The libraries that the CUDA library names."""
    found = library._library("_native_cuda")
    if found is None:
        pytest.skip("the CUDA library was not built: FUSED_SAM_BUILD=cuda, with nvcc")
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf: install binutils")
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", str(found)))


@pytest.fixture(scope="module")
def stubs(needed, tmp_path_factory):
    """A folder with a libtorch_cuda and a CUDA runtime of the name that the library wants."""
    if torch.version.cuda:
        pytest.skip(
            "this torch has a libtorch_cuda of its own: tests/test_gpu.py loads the library"
        )
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler: install g++ or clang++")
    folder = tmp_path_factory.mktemp("stubs")
    (runtime,) = [name for name in needed if name.startswith("libcudart.so")]
    (folder / "versions").write_text(f"{runtime} {{ global: *; }};")  # of its symbols
    for name, source, *options in (
        (runtime, "stub_cudart.cpp", f"-Wl,--version-script={folder / 'versions'}"),
        ("libtorch_cuda.so", "stub_torch_cuda.cpp", str(folder / runtime)),
    ):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname={name}", "-o", str(folder / name)]
        run(*command, str(ROOT / "tests" / "native" / source), *options)
    return folder


LOAD = """
import ctypes, sys, torch
torch.version.cuda = "of the stubs"
from fused_sam.backends import native
why = native.missing("cuda")  # ctypes binds all symbols at once, as RTLD_NOW
assert why is None, why
"""

LAUNCH = """
from fused_sam.backends.native.operations import _ASCENTS, _BLENDS, _RULES, _SUMS
runtime = ctypes.CDLL(sys.argv[1])
runtime.stub_launches.restype = ctypes.c_char_p
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
saved, state, ticket = *torch.zeros(2, 128), torch.zeros(1, dtype=torch.int32)
climb = torch.zeros(1, dtype=torch.int64)
# One slot of 70 elements, and its one chunk.
slots, grads = torch.tensor([0, 70, 0, 0, 0, 0]), torch.tensor([64])
flags = torch.zeros(1, dtype=torch.int32)
ops = torch.ops.fused_sam
three = torch.zeros(1, 3)
tables = slots, grads, flags, three
start = cuda, saved

def reduce(name, tables, kept=None, earlier=None, average=None):
    args = *start, kept, average, earlier, ticket, *tables, 0, 0, _SUMS[name]
    return ops.reduce.default.redispatch(*args)

total = reduce("SamNorm", tables)
assert total.shape == (1,) and total.dtype == torch.float64
kept = torch.zeros(128)
sam = climb, 0, 0, 0, _ASCENTS["Sam"]
ops.ascend_.default.redispatch(*start, kept, None, climb, *tables, total, *sam)

def update(rule, columns, states, step, *blend, ahead=(None, None)):
    numbers, hyper, number = blend or (None, None, -1)
    direction = torch.zeros(128) if number == _BLENDS["LookSam"] else None
    args = *states, step, ticket, climb, saved, kept, direction, ahead[0], slots, grads, flags
    more = torch.zeros(1, columns), ahead[1], numbers, hyper, None, None, None, 0, 0, _RULES[rule]
    more = *more, number
    args = *args, *more
    ops.update_.default.redispatch(cuda, *args)

update("Sgd", 5, [None, None, None], None)
update("Adam", 10, [state, state, None], torch.zeros(1))
update("Sgd", 5, [state, None, None], None, ahead=(total, torch.zeros(1)))
update("Adam", 10, [state, state, None], torch.zeros(1), ahead=(total, None))
missing = ("Adam", 10, [state, None, None]), ("RmsProp", 7, [None, state, state])
for rule, columns, states in missing:
    try:
        update(rule, columns, states, torch.zeros(1))
    except RuntimeError as error:
        assert "a state is missing" in str(error)
    else:
        raise AssertionError("a missing state was not noticed")
five = slots, grads, flags, torch.zeros(1, 5)
largest = reduce("PNormMax", five)
both = torch.cat([largest, reduce("PNormSum", five, None, largest)])
p_norm = None, 1, 0, 0, _ASCENTS["PNorm"]
ops.ascend_.default.redispatch(*start, None, None, climb, *five, both, *p_norm)
average = torch.zeros(128)
for name, columns in (("FriendlySam", 7), ("VassoSam", 6)):
    group = slots, grads, flags, torch.zeros(1, columns)
    total = reduce(f"{name}Norm", group, average=average)
    climbs = *group, total, None, 1, 0, 0, _ASCENTS[name]
    ops.ascend_.default.redispatch(*start, kept, average, climb, *climbs)
    for wrong, said in ((None, "average is there where it is needed"),
                        (average.double(), "average has a wrong dtype")):
        for call in (
            lambda: reduce(f"{name}Norm", group, average=wrong),
            lambda: ops.ascend_.default.redispatch(*start, kept, wrong, climb, *climbs),
        ):
            try:
                call()
            except RuntimeError as error:
                assert said in str(error), error
            else:
                raise AssertionError("an average that is missing or wrong was not noticed")
three = reduce("Gram", (slots, grads, flags, torch.zeros(1, 0)), kept)
assert three.shape == (3,)
update("Sgd", 5, [None, None, None], None, three, torch.zeros(1, 1), _BLENDS["Gsam"])
update("Sgd", 5, [None, None, None], None, three, torch.zeros(1, 2), _BLENDS["Wsam"])
update("Sgd", 5, [None, None, None], None, three, torch.zeros(1, 1), _BLENDS["LookSam"])
update("Sgd", 5, [None, None, None], None, total, torch.zeros(1, 1), _BLENDS["LookSamReuse"])
ops.restore_.default.redispatch(cuda, climb, saved, slots, flags, 0)
assert runtime.stub_device() == 0
print(runtime.stub_launches().decode(), end="")
"""


def python(stubs, code, *arguments):
    path = os.pathsep.join([str(stubs), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    command = [sys.executable, "-c", code, *arguments]
    return run(*command, LD_LIBRARY_PATH=path, PYTHONPATH=str(ROOT))


def test_the_library_loads_and_registers_its_kernels(stubs):
    """It was linked against no torch library: "undefined symbol: aoti_torch_dtype_float32"."""
    check = """
for name in ("reduce", "ascend_", "update_", "restore_"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_sam::{name}", "CUDA"), name
"""
    python(stubs, LOAD + check)


def test_an_older_library_next_to_a_new_one_is_not_used(stubs):
    """Each of the two tells from which mathematics it was built, and the CUDA one may be stale."""
    stale = LOAD.replace(
        'why = native.missing("cuda")',
        """torch.ops.fused_sam.cuda_mathematics = lambda: "0123456789abcdef"
why = native.missing("cuda")""",
    ).replace("assert why is None, why", 'assert "was built from other sources" in why, why')
    assert stale.count("sources") == 1
    python(stubs, stale)


def test_the_runtime_and_the_guards_are_those_of_torch(needed):
    """A static runtime has a current device of its own."""
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} < set(needed)
    assert any(name.startswith("libcudart.so.") for name in needed)


def test_kernels_are_launched_on_the_tensors_device_and_its_stream(stubs, needed):
    """Whatever device is current; afterwards it is current again. And states are checked."""
    (runtime,) = [name for name in needed if name.startswith("libcudart.so")]
    launches = python(stubs, LOAD + LAUNCH, runtime).splitlines()
    kernels = [re.search(r"(reduce|ascend|update|restore)_kernel", line)[1] for line in launches]
    step = ["reduce", "ascend", "update"]
    blended = ["reduce", *["update"] * 4]
    others = ["reduce", "reduce", "ascend", *["reduce", "ascend"] * 2]
    assert kernels == [*step, *["update"] * 3, *others, *blended, "restore"]
    for line in launches:
        assert line.endswith(" grid 1 block 256 device 1 stream 71")


def test_what_cannot_be_loaded_is_reported_in_the_loaders_words(stubs, tmp_path):
    """And a program can ask for the exit status: bench/gpu.sh does."""
    empty = tmp_path / "empty.cpp"
    empty.touch()
    broken = tmp_path / "libtorch_cuda.so"
    run(shutil.which("g++") or "clang++", "-shared", "-o", str(broken), str(empty))
    code = """
import torch
torch.version.cuda = "of the stubs"
from fused_sam import info
status = info.main(["native (cuda)"])
assert status == 1, status
assert info.main(["native (cpu)"]) == 0
"""
    path = os.pathsep.join([str(tmp_path), str(stubs)])
    printed = run(sys.executable, "-c", code, LD_LIBRARY_PATH=path, PYTHONPATH=str(ROOT))
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in printed
