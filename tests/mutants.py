"""One-line faults, and whether the tests notice. Not a part of `make test`.

    python tests/mutants.py [--only NAME ...] [--jobs N]

A mutant replaces one piece of text, which must stand in its file exactly once, in a copy of this
checkout; where it is C++ the CPU library is built again there. Then the tests run that should
notice. Prints a line for each mutant, and the survivors; exits with 1 if there are any.

First the tests run on the code as it is, for a test that fails anyway kills nothing.
"""

import argparse
import concurrent.futures
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIMIT = 900
"""Seconds for the tests of one mutant, after which it is dead: it may wait for ever."""


class Mutant(NamedTuple):
    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    """Arguments of pytest."""


def table(backend, more="one_group"):
    return ("tests/test_table.py", "-k", f"{backend} and ({more})")


REFERENCE, NATIVE, TRITON = map(table, ("reference", "native", "triton"))
GROUPS = "keep_their_own"
SCALER = "found_inf or first_step"
EDGE = "nan or below_zero or infinite or not_finite or lr_zero"
CUDA = ("tests/test_native_kernels.py", "-k", "cuda_kernels_match")
LAYOUT = ("tests/test_layout.py", "-k", "reference")
STEPS = ("tests/test_semantics.py", "-k", "reference")
# fmt: off
MUTANTS = [
    # ---- the rules in torch
    Mutant("sgd-dampens-the-first-gradient", "fused_sam/rules.py",
           'dampening = 0.0 if fresh else group["dampening"]', 'dampening = group["dampening"]',
           REFERENCE),
    Mutant("sgd-nesterov-without-momentum", "fused_sam/rules.py",
           'grad = grad.add_(momentum_buffer, alpha=group["momentum"])',
           "grad = grad.add_(momentum_buffer)", REFERENCE),
    Mutant("adamw-decay-without-lr", "fused_sam/rules.py",
           "param = param * (1 - lr * weight_decay)", "param = param * (1 - weight_decay)",
           REFERENCE),
    Mutant("adam-one-step-ahead", "fused_sam/rules.py",
           "torch.expm1(step * math.log(beta))", "torch.expm1((step + 1) * math.log(beta))",
           REFERENCE),
    Mutant("amsgrad-loses-nan", "fused_sam/rules.py",
           'torch.maximum(state["max_exp_avg_sq"]', 'torch.fmax(state["max_exp_avg_sq"]',
           table("reference", EDGE)),
    Mutant("rmsprop-clamp", "fused_sam/rules.py",
           "value=-1).clamp_min_(0).sqrt_()", "value=-1).sqrt_()", table("reference", EDGE)),
    Mutant("zero-decay-times-infinity", "fused_sam/rules.py",
           ' if group["weight_decay"] else grad\n    alpha, square', "\n    alpha, square",
           table("reference", EDGE)),
    # ---- the reference backend
    Mutant("maximize-climbs-uphill", "fused_sam/backends/reference.py",
           'rho = -group["rho"] if group.get("maximize") else group["rho"]', 'rho = group["rho"]',
           table("reference", GROUPS)),
    Mutant("climb-of-zero-adds", "fused_sam/backends/reference.py",
           "torch.where(scale == 0, weights, weights + epsilon)", "weights + epsilon",
           table("reference", EDGE)),
    Mutant("asam-without-eta", "fused_sam/backends/reference.py",
           'weights.abs().add_(group["eta"])', "weights.abs()", REFERENCE),
    Mutant("skipped-step-counts", "fused_sam/backends/reference.py",
           "stepping * (1 - found_inf)", "stepping", table("reference", SCALER)),
    Mutant("found-inf-is-a-flag", "fused_sam/backends/reference.py",
           "found_inf = (found_inf != 0).float()", "found_inf = found_inf.float()",
           table("reference", SCALER)),
    Mutant("padding-is-not-cleared", "fused_sam/backends/reference.py",
           "memory.index_fill_(0, run.padding, 0)", "pass", table("reference", "eps_zero")),
    # ---- Triton's tables
    Mutant("triton-dampening", "fused_sam/backends/triton.py",
           '1 - group["dampening"],', "1.0,", TRITON),
    Mutant("triton-stale-hyperparameters", "fused_sam/backends/triton.py",
           "if known is not None and known.values == values:", "if known is not None:",
           table("triton", GROUPS)),
    Mutant("triton-everything-was-perturbed", "fused_sam/backends/triton.py",
           "[saved * flag for flag in perturbed]", "[saved for flag in perturbed]", TRITON),
    Mutant("triton-rows-from-zero", "fused_sam/backends/triton.py",
           "for row, values in zip(self.rows, rows",
           "for row, values in zip(range(len(rows)), rows", table("triton", "not_allocated")),
    Mutant("triton-all-groups-keep-all-states", "fused_sam/backends/triton.py",
           "mixed = any([row != names for row in kept.values()])", "mixed = False",
           table("triton", "switched_on")),
    # ---- Triton's kernels
    Mutant("triton-asam-unsquared", "fused_sam/backends/triton_kernels.py",
           "scale * (t * t * g)", "scale * (t * g)", TRITON),
    Mutant("triton-climb-of-zero-adds", "fused_sam/backends/triton_kernels.py",
           "moved = tl.where(scale == 0, w, w + scale * (t * t * g))",
           "moved = w + scale * (t * t * g)", table("triton", EDGE)),
    Mutant("triton-lr-zero-subtracts", "fused_sam/backends/triton_kernels.py",
           "tl.where(hyper[0] == 0, w, new)", "new", table("triton", EDGE)),
    Mutant("triton-amsgrad-loses-nan", "fused_sam/backends/triton_kernels.py",
           "tl.PropagateNan.ALL", "tl.PropagateNan.NONE", table("triton", EDGE)),
    Mutant("triton-rmsprop-clamp", "fused_sam/backends/triton_kernels.py",
           "tl.where(variance < 0, 0.0, variance)", "variance", table("triton", EDGE)),
    Mutant("triton-zero-decay-times-infinity", "fused_sam/backends/triton_kernels.py",
           "return tl.where(weight_decay != 0, grad + weight_decay * param, grad)",
           "return grad + weight_decay * param", table("triton", EDGE)),
    Mutant("triton-dampens-the-first-gradient", "fused_sam/backends/triton_kernels.py",
           "tl.where(fresh, 1.0, undampened).to(", "undampened.to(", TRITON),
    Mutant("triton-skipped-step-counts", "fused_sam/backends/triton_kernels.py",
           "if steps:\n                for i in", "if True:\n                for i in",
           table("triton", SCALER)),
    Mutant("triton-32-bit-offsets", "fused_sam/backends/triton_kernels.py",
           "begin = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * SIZE",
           "begin = tl.load(chunks_ptr + 2 * chunk + 1) * SIZE",
           ("tests/test_triton.py", "-k", "offsets")),
    Mutant("triton-stale-saved", "fused_sam/backends/triton_kernels.py",
           "tl.where(perturbed, saved.to(tl.int64), weights.to(tl.int64))", "saved.to(tl.int64)",
           TRITON),
    # ---- the native backend's tables
    Mutant("native-pinned-addresses", "fused_sam/backends/native.py",
           "[memory.data_ptr() for memory in self.pinned]",
           "[memory.data_ptr() for memory in self.pinned[::-1]]",
           ("tests/test_native.py", "-k", "pinned")),
    Mutant("native-never-fresh", "fused_sam/backends/native.py",
           "_PERTURBED * perturbed + _FRESH * new", "_PERTURBED * perturbed", NATIVE),
    Mutant("native-stale-hyperparameters", "fused_sam/backends/native.py",
           "if table is None or known != wanted or capturing:", "if table is None or capturing:",
           table("native", GROUPS)),
    Mutant("native-maximize-climbs-uphill", "fused_sam/backends/native.py",
           '{"rho": -rho if maximize else rho}', '{"rho": rho}', table("native", GROUPS)),
    Mutant("native-options", "fused_sam/backends/native.py",
           "2 * bool(centered)", "bool(centered)", NATIVE),
    # ---- memory
    Mutant("skipped-first-step-loses-fresh", "fused_sam/layout.py",
           "if found_inf is not None and dampened and found_inf.item():", "if False:",
           table("reference", SCALER)),
    Mutant("replaced-state-is-not-noticed", "fused_sam/layout.py",
           "and all(map(operator.is_, map(dict.get, *self._shown), self._windows))", "", LAYOUT),
    Mutant("moved-while-perturbed", "fused_sam/layout.py",
           "bucket.perturbed[i] = True", "bucket.perturbed[i] = False", LAYOUT),
    Mutant("state-is-lost-in-a-move", "fused_sam/layout.py",
           "window.copy_(torch.as_tensor(value))", "window.zero_()", LAYOUT),
    Mutant("unaligned-windows", "fused_sam/layout.py",
           "start += -(-numel // ALIGNMENT) * ALIGNMENT", "start += numel", LAYOUT),
    Mutant("states-in-the-compute-dtype", "fused_sam/layout.py",
           "torch.zeros(bucket.size, dtype=bucket.dtype",
           "torch.zeros(bucket.size, dtype=bucket.compute_dtype", REFERENCE),
    # ---- the protocol
    Mutant("clip-enlarges", "fused_sam/optimizer.py", ".clamp_max_(1.0)", "",
           table("reference", "clips")),
    Mutant("stale-saved", "fused_sam/optimizer.py",
           "bucket.perturbed = [grad is not None for grad in bucket_grads]",
           "bucket.perturbed = [True for grad in bucket_grads]", REFERENCE),
    Mutant("one-bucket-climbs-alone", "fused_sam/optimizer.py",
           "return torch.where(sums.sum() > largest, torch.inf, sums)", "return sums", STEPS),
    Mutant("used-gradients-are-fresh", "fused_sam/optimizer.py",
           "grad._fused_sam_consumed = grad._version", "grad._fused_sam_consumed = -1", STEPS),
    # ---- C++: the mathematics
    Mutant("cpp-dampens-the-first-gradient", "csrc/rules.h",
           "fresh ? T(1) : group.one_minus_dampening", "group.one_minus_dampening", NATIVE),
    Mutant("cpp-amsgrad-loses-nan", "csrc/rules.h",
           "state[2] > exp_avg_sq || state[2] != state[2] ?", "state[2] > exp_avg_sq ?",
           table("native", EDGE)),
    Mutant("cpp-rmsprop-clamp", "csrc/rules.h", "avg = avg < T(0) ? T(0) : avg;", "",
           table("native", EDGE)),
    Mutant("cpp-zero-decay-times-infinity", "csrc/rules.h",
           "return decay != T(0) ? grad + decay * param : grad;", "return grad + decay * param;",
           table("native", EDGE)),
    Mutant("cpp-asam-unsquared", "csrc/rules.h", "adaptive ? t * t * grad", "adaptive ? t * grad",
           NATIVE),
    Mutant("cpp-lerp", "csrc/rules.h", "(end - start) * (T(1) - weight)", "(end - start) * weight",
           NATIVE),
    # ---- C++: the CPU
    Mutant("cpu-lr-zero-subtracts", "csrc/cpu/kernels_impl.h",
           "weights[i] = frozen ? old : updated;", "weights[i] = updated;", table("native", EDGE)),
    Mutant("cpu-climb-of-zero-adds", "csrc/cpu/kernels_impl.h",
           "if (scale == T(0)) continue;", "", table("native", EDGE)),
    Mutant("cpu-stale-saved", "csrc/cpu/kernels_impl.h",
           "flags & kPerturbed ? saved : piece.weights", "saved", NATIVE),
    Mutant("cpu-pinned-weights", "csrc/cpu/kernels_impl.h",
           "p.pinned[i - p.num_moved]", "p.pinned[0]", ("tests/test_layout.py", "-k", "native")),
    # ---- CUDA, under emulation
    Mutant("cuda-misaligned-update", "csrc/cuda/kernels.cuh",
           "is_aligned(piece.grad) && is_aligned(piece.weights);\n  S* states",
           "is_aligned(piece.grad);\n  S* states", CUDA),
    Mutant("cuda-misaligned-climb", "csrc/cuda/kernels.cuh",
           "is_aligned(piece.grad) && is_aligned(piece.weights);\n  if (scale",
           "is_aligned(piece.grad);\n  if (scale", CUDA),
    Mutant("cuda-misaligned-return", "csrc/cuda/kernels.cuh",
           "copy(piece.weights, saved, piece.numel, is_aligned(piece.weights));",
           "copy(piece.weights, saved, piece.numel, true);", CUDA),
    Mutant("cuda-missing-gradients-count", "csrc/cuda/kernels.cuh",
           "if (p.grads[i]) p.step[i] += 1.0f;", "p.step[i] += 1.0f;", CUDA),
    Mutant("cuda-ticket-stays", "csrc/cuda/kernels.cuh",
           "if (threadIdx.x == 0) *ticket = 0;", "", CUDA),
    # ---- from tensors to memory
    Mutant("missing-gradients-count", "csrc/bindings.cpp",
           "if (p.grads[i]) p.step[i] += 1.0f;", "p.step[i] += 1.0f;", NATIVE),
    Mutant("cpp-skipped-step-counts", "csrc/bindings.cpp",
           "if (p.step && !skip) {", "if (p.step) {", table("native", SCALER)),
    Mutant("row-beyond-the-table", "csrc/bindings.cpp",
           "slot.row < hyper.numel() / kHyperSize,", "slot.row <= hyper.numel() / kHyperSize,",
           ("tests/test_native.py", "-k", "refuse")),
]
# fmt: on


class Checkout:
    """A copy of the working tree, to be mutated."""

    def __init__(self, place):
        self.place = Path(place)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        self.libraries = [path.relative_to(ROOT) for path in ROOT.glob("fused_sam/_native*.so")]
        for name in [*filter(None, names.split("\0")), *self.libraries]:
            if (ROOT / name).is_file():
                (self.place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.place / name)

    def run(self, *command, **environment):
        environment = {**os.environ, "PYTHONPATH": str(self.place), **environment}
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def pytest(self, tests):
        """Whether the tests fail; an error if they cannot run."""
        try:
            done = self.run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
        except subprocess.TimeoutExpired:
            return True
        # 1: tests failed; negative: the interpreter was killed, as by an access out of bounds.
        if done.returncode not in (0, 1) and done.returncode > 0:
            raise RuntimeError(f"pytest {tests} cannot run:\n{done.stdout}{done.stderr}")
        return done.returncode != 0

    def kills(self, mutant):
        path = self.place / mutant.file
        before = path.read_text()
        if before.count(mutant.text) != 1:
            raise RuntimeError(
                f"the text stands {before.count(mutant.text)} times in {mutant.file}: "
                f"{mutant.text!r}; write what stands there once"
            )
        path.write_text(before.replace(mutant.text, mutant.replacement))
        builds = path.suffix in (".h", ".cpp")
        try:
            if builds:
                build = ("setup.py", "-q", "build_ext", "--inplace")
                done = self.run(*build, FUSED_SAM_BUILD="cpu")
                if done.returncode:
                    raise RuntimeError(f"it does not compile:\n{done.stderr[-2000:]}")
            return self.pytest(mutant.tests)
        finally:
            path.write_text(before)
            for name in self.libraries if builds else ():
                shutil.copy2(ROOT / name, self.place / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the mutants with these names")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: 1)")
    args = parser.parse_args()
    names = [mutant.name for mutant in MUTANTS]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}; there are {names}")
    chosen = [mutant for mutant in MUTANTS if mutant.name in (args.only or names)]
    with tempfile.TemporaryDirectory() as place:
        free = queue.SimpleQueue()
        for i in range(args.jobs):
            free.put(Checkout(Path(place, str(i))))

        def in_a_checkout(work):
            checkout = free.get()
            try:
                return work(checkout)
            finally:
                free.put(checkout)

        def try_mutant(mutant):
            start = time.monotonic()
            try:
                word = "killed" if in_a_checkout(lambda c: c.kills(mutant)) else "SURVIVES"
            except RuntimeError as error:
                word = f"ERROR: {error}"
            print(f"{time.monotonic() - start:5.0f} s  {mutant.name:35} {word}", flush=True)
            return word

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            selections = list(dict.fromkeys(mutant.tests for mutant in chosen))
            fail = pool.map(lambda tests: in_a_checkout(lambda c: c.pytest(tests)), selections)
            if broken := [tests for tests, fails in zip(selections, fail, strict=True) if fails]:
                sys.exit(f"these fail without any mutant: {broken}")
            words = list(pool.map(try_mutant, chosen))
    alive = [m.name for m, word in zip(chosen, words, strict=True) if word != "killed"]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed", *alive, sep="\n  ")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
