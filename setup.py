"""Build script: only what must be computed stands here, the metadata is in pyproject.toml.

The environment variable FUSED_SAM_BUILD says which native libraries to build from csrc/:

    auto   (default) the CPU library where torch and a C++ compiler are, and the CUDA library too
           where nvcc is, in CUDA_HOME or on the PATH, and of the same CUDA as torch
    none   no library: the pure-Python package
    cpu    the CPU library, or an error
    cuda   both, or an error; CUDA for TORCH_CUDA_ARCH_LIST, by default 8.0, 9.0, 10.0 and 12.0

No GPU is looked for, and nothing is downloaded. The libraries are for the stable ABIs of Python
and LibTorch: one binary serves Python >= 3.10 and torch >= 2.10.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError

MODES = ("auto", "none", "cpu", "cuda")
ARCHITECTURES = "8.0;9.0;10.0;12.0"
CSRC = Path("csrc")
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # 2.10
# Never -ffast-math: the checks for infinity and NaN must work. Without contraction all instruction
# sets give the same bits; the last two allow square roots and comparisons to vectorise.
OPTIMIZE = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
OPTIMIZE += ["-fno-unswitch-loops"]  # or it makes so many versions that it vectorises none
REMEDY = (
    "install torch >= 2.10 and a C++ compiler, and for CUDA nvcc, then `FUSED_SAM_BUILD={} pip "
    "install --no-build-isolation --force-reinstall --no-deps --no-cache-dir .`"
)


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH where one of them is set, else the PATH's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def find_compiler() -> str | None:
    """The C++ compiler that torch will use."""
    if sys.platform == "win32":
        return "msvc"  # setuptools finds it by itself, or says what is missing
    words = shlex.split(os.environ.get("CXX", "c++"))
    return shutil.which(words[0]) if words else None


def why_not() -> str | None:
    """What is missing to build the CPU library."""
    try:
        import torch
    except ImportError:
        return "torch is not there to build against (in an isolated build it never is)"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    return None if find_compiler() else "there is no C++ compiler"


def why_no_cuda() -> str | None:
    """What is missing to build the CUDA library. A torch for the CPU alone does not hinder it."""
    import torch

    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc, neither in CUDA_HOME nor on the PATH"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", told)
    theirs = torch.version.cuda
    # The library takes the CUDA runtime that torch has loaded, and its name has the major version.
    if theirs and release and release[1] != theirs.split(".")[0]:
        return f"nvcc is of CUDA {release[1]} and torch of CUDA {theirs}; take an nvcc of torch's"
    return None


def build_class() -> type:
    """BuildExtension of torch, which builds the CUDA library too: by nvcc, whatever torch is."""
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    class BuildNative(BuildExtension):
        def get_export_symbols(self, ext: Extension) -> list[str]:
            return []  # a library for torch, not a module for Python

        def run(self) -> None:
            # What an earlier build left would be packed too.
            for left in Path(self.build_lib).glob("fused_sam/_native*"):
                left.unlink()
            super().run()

        def build_extension(self, ext: Extension) -> None:
            if ext.name != "fused_sam._native_cuda":
                super().build_extension(ext)
                return
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            windows = sys.platform == "win32"
            host = [] if windows else ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            with tempfile.TemporaryDirectory() as stubs:
                # What is linked must be named in the library even if nothing asks for it here: the
                # loader looks for a symbol in no other place. And torch must find its own guards
                # and streams there: libtorch_cuda and the CUDA runtime are torch's, which has
                # loaded both by then, wherever they lie (the runtime in a wheel of NVIDIA's).
                link = [f"-L{path}" for path in [*library_paths(), stubs]]
                link += [] if windows else ["-Xlinker", "--no-as-needed"]
                link += ["-ltorch_cuda", "-ltorch_cpu", "--cudart=shared"]
                if not windows and not any(
                    Path(path, "libtorch_cuda.so").exists() for path in library_paths()
                ):
                    self.run_nvcc(empty_library(stubs, "libtorch_cuda.so"))
                self.run_nvcc(
                    [
                        *["-shared", "-o", str(target), "-std=c++20", "-O3", "--threads=0"],
                        *[f"-D{name}={value}" for name, value in DEFINES],
                        *[f"-I{path}" for path in include_paths()],
                        *[*architecture_flags(), *host],
                        *[*ext.sources, *(path for path in ext.depends if path.endswith(".cu"))],
                        *link,
                    ]
                )

        def run_nvcc(self, arguments: list[str]) -> None:
            command = [str(find_nvcc()), *arguments]
            print(" ".join(command), flush=True)
            if subprocess.run(command).returncode:
                raise CompileError(
                    "nvcc failed; without the CUDA library: FUSED_SAM_BUILD=cpu, or none"
                )

    return BuildNative


def empty_library(folder: str, name: str) -> list[str]:
    """Arguments of nvcc for a library to link against where torch, being for the CPU, has none."""
    source = Path(folder, "empty.cpp")
    source.touch()
    return ["-shared", "-Xlinker", f"-soname={name}", "-o", str(Path(folder, name)), str(source)]


def architecture_flags() -> list[str]:
    """For TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"); the newest one as PTX too, for what is to come."""
    names = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    names = [name for name in names if name] or ARCHITECTURES.split(";")
    if "+PTX" not in "".join(names):
        names[-1] += "+PTX"
    flags = []
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; write numbers such as {ARCHITECTURES!r}"
            )
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def native(mode: str) -> dict[str, object]:
    """Arguments of setup() for the libraries of this mode."""
    if mode not in MODES:
        raise SystemExit(f"FUSED_SAM_BUILD={mode!r} is not known; choose one of {', '.join(MODES)}")
    why = "FUSED_SAM_BUILD=none asks for it" if mode == "none" else why_not()
    no_cuda = why_no_cuda() if why is None and mode in ("auto", "cuda") else None
    if mode == "cuda":
        why = why or no_cuda
    if why is not None:
        if mode in ("cpu", "cuda"):
            raise SystemExit(f"FUSED_SAM_BUILD={mode} cannot be met: {why}; {REMEDY.format(mode)}")
        print(
            f"fused-sam: building the pure-Python package, without the native backend: {why}. "
            f"To have it: {REMEDY.format('cpu')}",
            file=sys.stderr,
        )
        return {}
    from torch.utils.cpp_extension import CppExtension

    headers = sorted(str(path) for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    extensions = [
        CppExtension(
            "fused_sam._native",
            sorted(str(path) for path in CSRC.glob("cpu/*.cpp")),
            depends=headers,
            define_macros=DEFINES,
            extra_compile_args=["/O2"]
            if sys.platform == "win32"
            else [*OPTIMIZE, "-g0", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ]
    if mode == "auto" and no_cuda and find_nvcc():
        print(f"fused-sam: building without the CUDA library: {no_cuda}", file=sys.stderr)
    if mode != "cpu" and no_cuda is None:
        # Among the sources torch's BuildExtension would refuse a .cu where torch is for the CPU.
        kernels = sorted(str(path) for path in CSRC.glob("cuda/*.cu"))
        extensions.append(
            Extension(
                "fused_sam._native_cuda",
                [str(CSRC / "cuda" / "bindings.cpp")],
                depends=[*headers, *kernels],
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build_class()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native(os.environ.get("FUSED_SAM_BUILD", "").strip().lower() or "auto"))
