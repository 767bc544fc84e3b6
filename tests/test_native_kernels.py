"""The kernels of csrc/ by themselves, without torch: in C++ programs under the sanitizers, and the
CUDA ones as machine code."""

import collections
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_sam
from fused_sam.ascents import KERNELS, SQUARES, SUMS
from fused_sam.backends.native.translate import rules

ROOT = Path(__file__).parent.parent
CPU_SOURCES = [
    str(path)
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    if path.name != "bindings.cpp"  # which needs torch
]
ADDRESS = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=undefined,float-cast-overflow",
]
THREAD = ["-fsanitize=thread", "-DFLOAT_ONLY"]
ARCHITECTURES = (80, 90, 100, 120)

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="csrc/ is not here")


def build(tmp_path, source, *options):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler: install g++ or clang++")
    sanitize = [option for option in options if option.startswith("-fsanitize")]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    probe = [compiler, *sanitize, str(empty), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"{compiler} cannot link {' '.join(sanitize)}: install its sanitizer runtime")
    program = tmp_path / "program"
    command = [
        *[compiler, "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-pthread"],
        *[*options, str(ROOT / "tests" / "native" / source), "-o", str(program)],
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return program


def run(program, **environment):
    done = subprocess.run(
        [program], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cpu_kernels_match_the_textbook_without_memory_errors(tmp_path):
    """Every rule, option and dtype, odd sizes; each instruction set; ASan and UBSan watch."""
    program = build(tmp_path, "cpu_kernels.cpp", *ADDRESS, *CPU_SOURCES)
    best = run(program).split()[0]
    for instructions in {"baseline", "avx2", best} - {best}:
        run(program, FUSED_SAM_CPU=instructions)


def test_cpu_kernels_have_no_data_races(tmp_path):
    """Spans share no element: ThreadSanitizer sees three threads take them in any order."""
    run(build(tmp_path, "cpu_kernels.cpp", *THREAD, *CPU_SOURCES))


def test_fuzzed_tables_do_no_harm_to_the_operations(tmp_path):
    """Tables that are wrong in random places, to the library of the package, built with ASan."""
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux: its sanitizer is loaded into Python")

    def runtime(name):
        told = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        )
        return told.stdout.strip()

    if not Path(runtime("libasan.so")).is_absolute():
        pytest.skip("g++ has no sanitizer runtime: install libasan")
    library = tmp_path / "_native.so"
    command = [
        *[compiler, "-std=c++20", "-O0", "-shared", "-fPIC", *ADDRESS],
        *["-DTORCH_TARGET_VERSION=0x020a000000000000", *[f"-I{path}" for path in include_paths()]],
        *[*CPU_SOURCES, str(ROOT / "csrc" / "cpu" / "bindings.cpp"), "-o", str(library)],
        *[*[f"-L{path}" for path in library_paths()], "-ltorch_cpu"],
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "native" / "fuzz.py"), str(library), "3000"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libstdc++.so.6"))),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        },
    )
    assert done.returncode == 0, done.stderr
    taken, refused = map(int, done.stdout.split())
    assert taken > 300 and refused > 300


def test_cuda_kernels_match_the_textbook_under_emulation(tmp_path):
    """The CUDA kernels as they are, threads as fibres in several orders; ASan and UBSan watch."""
    program = build(tmp_path, "cuda_kernels.cpp", *ADDRESS)
    run(program)
    # Guards the guard: a wide access where the address does not allow it is seen.
    wrong = subprocess.run([program, "misaligned"], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "misaligned address" in wrong.stderr


# ------------------------------------------------------------------------------------- machine code


def find_cuobjdump():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin"] if home else []
    try:
        import triton
    except ImportError:
        pass
    else:
        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
    return shutil.which("cuobjdump", path=path)


@pytest.fixture(scope="module")
def cuda_library():
    found = sorted(Path(fused_sam.__file__).parent.glob("_native_cuda.*"))
    if not found:
        pytest.skip("the CUDA library was not built: FUSED_SAM_BUILD=cuda, with nvcc")
    if find_cuobjdump() is None:
        pytest.skip("there is no cuobjdump: install the CUDA toolkit, or triton")
    return str(found[0])


def cuobjdump(*arguments):
    done = subprocess.run([find_cuobjdump(), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


VALUES = [value.name for value in (*rules(), *SUMS, *KERNELS)]


def kernel_name(mangled):
    """'update Sgd float' of a mangled kernel name.

    'after': with what a blend subtracts; 'ahead': with what a climb along the momentum needs.
    """
    kernel = re.search(r"(reduce|ascend|update|restore)_kernel", mangled)[1]
    value = re.search(rf"\d({'|'.join(VALUES)})E", mangled)
    rest = mangled[(value or re.search(r"_kernelI", mangled)).end() :]
    dtype = re.match(r"f|d|NS\w*?(BFloat16|Float16)", rest)
    dtype = dtype[1] or {"f": "float", "d": "double"}[dtype[0]]
    flags = zip(("after", "ahead"), re.findall(r"Lb([01])E", mangled), strict=False)
    flags = [name for name, flag in flags if flag == "1"]
    return " ".join([kernel, *([value[1]] if value else []), dtype, *flags])


DTYPES = ("float", "double", "BFloat16", "Float16")


def variants(rule):
    """Which states are kept, by their indices, in each variant of a rule."""
    always = {i for i, state in enumerate(rule.states) if state.kept is None}
    every = itertools.product([False, True], repeat=len(rule.states))
    kept = [{i for i, is_kept in enumerate(choice) if is_kept} for choice in every]
    return [states for states in kept if always <= states]


def budget(architecture):
    """128-bit loads and stores that each kernel's code must have.

    A loop over ``n`` accesses in flight stands twice in the code, for n and for 1 (n + 1 in all),
    or once where n is 1. It loads and stores each buffer of the traffic budget once per element.
    """
    counts = {}
    copy = 2 + 1
    for dtype in DTYPES:
        average = 2 if dtype.endswith("16") else 1  # accesses: it is in float32 then
        for sums in SUMS:
            # g; and g and w, or what is kept. The squares read g, whether the bit is set or not.
            operands = 1 + 1 if sums is SQUARES else 1 + 2
            operands += 2 * average if sums.average else 0
            counts[f"reduce {sums.name} {dtype}"] = (4 + 1) * operands, 0
        for ascent in KERNELS:
            # w, g, average -> w, saved, average, and where g is kept
            followed = average if ascent.average else 0
            loads, stores = 2 + followed, 3 + followed
            counts[f"ascend {ascent.name} {dtype}"] = (2 + 1) * loads, (2 + 1) * stores
        counts[f"restore {dtype}"] = 2 * copy, 2 * copy  # where nothing else is, it stands twice
        for rule in rules():
            loads = stores = copy
            copies = 0
            for states in variants(rule):
                loops = 2 + 1 if dtype == "float" and 2 not in states else 1
                copies += loops
                loads += loops * (3 + len(states))  # saved, g', what is kept, states
                stores += loops * (1 + len(states))  # w, states
            counts[f"update {rule.name} {dtype}"] = loads, stores
            # A direction has a store of its own.
            directed = stores + (copies if dtype == "float" else 0)
            counts[f"update {rule.name} {dtype} after"] = loads, directed
            if rule.momentum is not None:
                # What is ahead of w is read, and nothing is kept; the squares of a skipped step.
                counts[f"update {rule.name} {dtype} ahead"] = loads + 4 + 1, stores
    _split(counts, architecture < 100)
    return counts


def _split(counts, older):
    """What ptxas 13.0 makes of some of them.

    For older GPUs the restore stands once, and a climb along an average branches on whether it
    takes the gradients in. For newer ones a climb branches on whether a group is adaptive. Loads
    and stores behind a branch stand in the code twice, and run once.
    """
    for dtype in DTYPES:
        changed, wide = {}, not dtype.endswith("16")
        averages = [ascent.name for ascent in KERNELS if ascent.average]
        if older:
            changed[f"restore {dtype}"] = -3, -3
            changed |= {f"ascend {name} {dtype}": (3, 9) for name in averages if wide}
        elif wide:
            changed = {f"ascend {name} {dtype}": (4, 4) for name in ("Sam", "Usam")}
        for name, (loads, stores) in changed.items():
            counts[name] = counts[name][0] + loads, counts[name][1] + stores


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_traffic_is_the_budget_in_128_bit_accesses(cuda_library, architecture):
    """Each buffer of the budget is read or written once per element; nothing spills."""
    text = cuobjdump("-sass", "-arch", f"sm_{architecture}", cuda_library)
    seen = {}
    for part in text.split("Function : ")[1:]:
        mangled, code = part.split("\n", 1)
        access = collections.Counter(re.findall(r"\b(LDG?|STG?|LDL|STL)\.(E?[A-Z0-9.]*)", code))
        wide = collections.Counter()
        for (operation, modifiers), n in access.items():
            assert operation not in ("LDL", "STL"), f"{mangled} spills: {operation}"
            if ".128" in modifiers:
                wide[operation[:2]] += n
        seen[kernel_name(mangled)] = wide["LD"], wide["ST"]
    assert seen == budget(architecture)


def test_cuda_kernels_keep_everything_in_registers(cuda_library):
    """No stack, no spills, and at least two blocks of 256 threads on a multiprocessor."""
    text = cuobjdump("-res-usage", cuda_library)
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert len(usage) == sum(len(budget(architecture)) for architecture in ARCHITECTURES)
    for name, registers, stack, _, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 128, name


def test_cuda_library_is_for_all_architectures(cuda_library):
    text = cuobjdump("-lelf", cuda_library)
    for architecture in ARCHITECTURES:
        assert f"sm_{architecture}" in text
