"""One-line faults, and whether the tests notice. Not a part of `make test`.

    python tests/mutants.py [--only NAME ...] [--jobs N]

A mutant replaces one piece of text, which must stand in its file exactly once, in a copy of this
checkout; where it is C++ the CPU library is built again there. Then the tests run that should
notice. Prints a line for each mutant, and the survivors; exits with 1 if there are any.

First the tests run on the code as it is, for a test that fails anyway kills nothing: its mutants
are errors, as one is whose text is not found.
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
OPTIONS = "switched_on or not_allocated"
FAILS = "operation_that_fails"
CUDA = ("tests/test_native_kernels.py", "-k", "cuda_kernels_match")
ALIGNMENT = ("tests/test_triton.py", "-k", "aligned")
LAYOUT = ("tests/test_layout.py", "-k", "reference")
STEPS = ("tests/test_semantics.py", "-k", "reference")
ROUNDING = ("tests/test_rounding.py", "-k", "bits or reference_rounds or exact_results")
FROZEN = ("tests/test_frozen.py", "-k", "reference")
WIDTHS = ("tests/test_grad_dtype.py", "-k", "reference and not asam")
MASTERS = ("tests/test_masters.py", "-k", "reference and not hundred")
MEMBERS = ("tests/test_properties.py", "-k", "any_member")
FORMULAS = ("tests/test_family.py", "-k", "reference and formulas and sgd")
AVERAGES = ("tests/test_averages.py", "-k", "not native")
AHEAD = ("tests/test_native.py", "-k", "two_launches")
WHEN = ("tests/test_schedule.py", "-k", "not native")
TOLD = ("tests/test_last_step.py", "-k", "not native")
AVERAGE = ("tests/test_table.py", "-k", "average and reference")
AVERAGE_IN_TRITON = ("tests/test_table.py", "-k", "average and triton")
AVERAGE_IN_NATIVE = ("tests/test_table.py", "-k", "average and native")
ALONE = ("tests/test_table.py", "-k", "gradient_alone")
LOOKSAM = ("tests/test_looksam.py", "-k", "reference")
MSAM = ("tests/test_msam.py", "-k", "not native")
MSAM_IN_TRITON = ("tests/test_triton.py", "-k", "two_launches")
MASTERS_IN_TRITON = ("tests/test_masters.py", "-k", "triton")
# fmt: off
MUTANTS = [
    # ---- rounding at random
    Mutant("rounding-forgets-the-number", "fused_sam/backends/base.py",
           "offset, seed_of(number))", "offset, seed_of(1))", ROUNDING),
    Mutant("rounding-forgets-the-offset", "fused_sam/backends/base.py",
           "offset = run.start + chunk.start", "offset = chunk.start", ROUNDING),
    Mutant("rounding-to-infinity", "fused_sam/backends/rounding.py",
           "return torch.where(magnitude < limit, rounded, values.to(dtype))", "return rounded",
           ROUNDING),
    Mutant("rounding-of-subnormals", "fused_sam/backends/rounding.py",
           "half = torch.where(magnitude < _SMALLEST_NORMAL, small, normal)", "half = normal",
           ROUNDING),
    Mutant("triton-rounding-takes-other-bits", "fused_sam/backends/triton/kernels.py",
           "(noise >> 19)) >> 13", "(noise & 0x1FFF)) >> 13", ROUNDING),
    # ---- what trains
    Mutant("thawing-is-not-noticed", "fused_sam/memory/layout.py",
           "and not any(map(_REQUIRES_GRAD, self.frozen))", "and True", FROZEN),
    Mutant("a-gradient-does-not-thaw", "fused_sam/memory/layout.py",
           "and all(map(operator.is_, map(_GRAD, self.frozen), itertools.repeat(None)))",
           "and True", FROZEN),
    Mutant("runs-go-on-where-a-part-ends", "fused_sam/backends/runs.py",
           "and slot.part == first.part", "and True", LAYOUT),
    Mutant("parts-begin-where-the-first-does", "fused_sam/memory/bucket.py",
           "begin = self._parts[slot.part][0]", "begin = self._parts[0][0]", LAYOUT),
    Mutant("one-part-holds-all", "fused_sam/memory/bucket.py",
           "if self._parts and stop", "if self._parts or stop", LAYOUT),
    Mutant("what-freezes-leaves", "fused_sam/memory/layout.py",
           "if trains(param) or (param in known and param.data_ptr() == known[param])",
           "if trains(param)", FROZEN),
    # ---- gradients of another dtype, and masters
    Mutant("momentum-in-the-weights-dtype", "fused_sam/memory/bucket.py",
           "return self.grad_dtype if name in self._like_grad else self.dtype",
           "return self.dtype", WIDTHS),
    Mutant("a-new-grad-dtype-is-not-noticed", "fused_sam/memory/gradients.py",
           "if gradient_dtype(param) != slot.grad_dtype:", "if False:", WIDTHS),
    Mutant("loading-rounds-wide-state", "fused_sam/checkpoint.py",
           "self._keep_wide(state_dict)\n", "pass\n", MASTERS),
    Mutant("loading-into-a-copy-rounds-wide-state", "fused_sam/checkpoint.py",
           "if rule is not None:  # else", "if self._facts.engine.layout.rule is not None:  # else",
           MASTERS),
    Mutant("states-of-masters-in-half", "fused_sam/memory/bucket.py",
           "if self.masters:\n            return torch.float32",
           "if self.masters:\n            pass", MASTERS),
    Mutant("climbs-from-the-weight-of-a-master", "fused_sam/backends/base.py",
           "weights = run.of(bucket.saved)[chunk].to(dtype)",
           "weights = run.weights[chunk].to(dtype)", MASTERS),
    Mutant("no-climb-rounds-a-master-anew", "fused_sam/backends/base.py",
           "stays = run.weights[chunk].to(dtype)", "stays = weights", MASTERS),
    Mutant("lr-zero-moves-masters", "fused_sam/backends/base.py",
           "before = saved.clone() if bucket.masters and frozen is not False else saved",
           "before = saved", MASTERS),
    Mutant("perturbed-masters-begin-anew", "fused_sam/memory/state.py",
           "if value is None and not away:", "if value is None:", MASTERS),
    Mutant("kept-in-the-weights-dtype", "fused_sam/memory/bucket.py",
           "dtype=self.grad_dtype)", "dtype=self.dtype)", MEMBERS),
    Mutant("wide-gradients-are-squared-in-float32", "fused_sam/backends/base.py",
           "if sums.squares(group) and bucket.grad_dtype.itemsize <= dtype.itemsize:",
           "if sums.squares(group):", WIDTHS),
    Mutant("masters-win-over-the-weights", "fused_sam/backends/base.py",
           "master.copy_(torch.where(same, master, weights.float()))", "pass", MASTERS),
    Mutant("weights-win-over-the-masters", "fused_sam/backends/base.py",
           "master.copy_(torch.where(same, master, weights.float()))",
           "master.copy_(weights.float())", MASTERS),
    Mutant("triton-masters-look-at-perturbed-weights", "fused_sam/backends/triton/kernels.py",
           "at_w = (offs >= 0) & (perturbed == 0)", "at_w = offs >= 0", MASTERS_IN_TRITON),
    Mutant("triton-does-not-save-what-changed", "fused_sam/backends/triton/kernels.py",
           "_store(saved + at + offs, w, changed if mask is None else changed & mask)", "pass",
           MASTERS_IN_TRITON),
    # ---- averages of the gradients
    Mutant("friendly-follows-the-new-average", "fused_sam/ascents/friendly.py",
           "grad - sigma * average, grad)",
           "grad - sigma * (lam * average + rest * grad), grad)", AVERAGE),
    Mutant("friendly-takes-a-zeros-sign", "fused_sam/ascents/friendly.py",
           "direction = where(sigma > 0, direction, grad)", "direction = direction", ALONE),
    Mutant("vasso-takes-a-zeros-sign", "fused_sam/ascents/vasso.py",
           "average = where(rest > 0, average, grad)", "average = average", ALONE),
    Mutant("the-average-takes-in-what-is-not-finite", "fused_sam/backends/base.py",
           "m.copy_(torch.where(reduced[0].isfinite(), new, m))", "m.copy_(new)", AVERAGE),
    Mutant("triton-averages-what-is-not-finite", "fused_sam/backends/triton/kernels.py",
           "tl.where(finite, new, m)", "new", AVERAGE_IN_TRITON),
    Mutant("triton-reads-the-average-of-the-first-slot", "fused_sam/backends/triton/kernels.py",
           "_load(average + at + offs, mask, dtype)", "_load(average + offs, mask, dtype)",
           AVERAGE_IN_TRITON),
    Mutant("triton-follows-with-the-columns-of-the-terms", "fused_sam/backends/triton/kernels.py",
           """            follows = _columns(row_ptr + COLUMNS - FOLLOWS, FOLLOWS)
            held""", """            follows = _columns(row_ptr, FOLLOWS)
            held""", AVERAGE_IN_TRITON),
    Mutant("an-average-begins-in-a-capture", "fused_sam/backends/capture.py",
           "if climb and AVERAGE not in bucket.members:", "if False:",
           ("tests/test_capture.py", "-k", "begun and reference")),
    Mutant("native-averages-what-is-not-finite", "csrc/cpu/kernels_impl.h",
           "if (!words::is_finite(T(numbers[0]))) continue;", "", AVERAGE_IN_NATIVE),
    Mutant("native-follows-the-average-of-the-slots-start", "csrc/cpu/kernels_impl.h",
           "average_of<T>(p, piece) + i, g, n", "average_of<T>(p, piece), g, n",
           ("tests/test_native.py", "-k", "many_tiles")),
    # ---- the rules' texts, as torch runs them
    Mutant("sgd-dampens-the-first-gradient", "fused_sam/rules/sgd.py",
           "undampened = where(fresh, 1.0, undampened)", "undampened = undampened", REFERENCE),
    Mutant("sgd-nesterov-without-momentum", "fused_sam/rules/sgd.py",
           "grad + momentum * momentum_buffer, momentum_buffer)",
           "grad + momentum_buffer, momentum_buffer)", REFERENCE),
    Mutant("sgd-decays-uphill", "fused_sam/rules/sgd.py",
           "grad + weight_decay * param, grad)", "grad - weight_decay * param, grad)", REFERENCE),
    Mutant("adamw-decay-without-lr", "fused_sam/rules/adam.py",
           "1 - lr * weight_decay, 1.0)", "1 - weight_decay, 1.0)", REFERENCE),
    Mutant("adam-one-step-ahead", "fused_sam/rules/adam.py",
           "-expm1(step * log1)", "-expm1((step + 1) * log1)", REFERENCE),
    Mutant("adam-eps-under-the-root", "fused_sam/rules/adam.py",
           "sqrt(second / correction2) + eps", "sqrt(second / correction2 + eps)", REFERENCE),
    Mutant("adam-zero-decay-times-infinity", "fused_sam/rules/adam.py",
           "where(coupled != 0, grad + coupled * param, grad)", "grad + coupled * param",
           table("reference", EDGE)),
    Mutant("rmsprop-zero-decay-times-infinity", "fused_sam/rules/rmsprop.py",
           "where(weight_decay != 0, grad + weight_decay * param, grad)",
           "grad + weight_decay * param", table("reference", EDGE)),
    Mutant("rmsprop-clamp", "fused_sam/rules/rmsprop.py",
           "variance = where(variance < 0, 0.0, variance)", "variance = variance",
           table("reference", EDGE)),
    Mutant("amsgrad-loses-nan", "fused_sam/text.py", "torch.maximum(x, y)", "torch.fmax(x, y)",
           table("reference", EDGE)),
    Mutant("lerp-towards-the-start", "fused_sam/text.py",
           "end - (end - start) * (1 - weight)", "end - (end - start) * weight", REFERENCE),
    # ---- the climb's texts
    Mutant("maximize-climbs-uphill", "fused_sam/ascents/sam.py",
           'rho = -group["rho"] if group.get("maximize") else group["rho"]', 'rho = group["rho"]',
           table("reference", GROUPS)),
    Mutant("asam-without-eta", "fused_sam/ascents/sam.py",
           "grad = where(adaptive != 0, abs(param) + eta, 1.0)",
           "grad = where(adaptive != 0, abs(param), 1.0)", REFERENCE),
    Mutant("asam-unsquared", "fused_sam/ascents/sam.py",
           "scale * (t * t * grad)", "scale * (t * grad)", REFERENCE),
    Mutant("zero-norm-climbs", "fused_sam/ascents/sam.py",
           "is_finite(norm) & (norm > 0)", "is_finite(norm)", STEPS),
    # ---- the reference backend
    Mutant("climb-of-zero-adds", "fused_sam/backends/base.py",
           "torch.where(scale == 0, stays, moved)", "moved", table("reference", EDGE)),
    Mutant("lr-zero-subtracts", "fused_sam/backends/base.py", "if frozen is True:", "if False:",
           table("reference", EDGE)),
    Mutant("maximize-descends", "fused_sam/backends/base.py",
           "                    grad.neg_()", "                    pass", REFERENCE),
    Mutant("loss-scale-stays", "fused_sam/backends/base.py", "grad.div_(grad_scale)", "pass",
           table("reference", SCALER)),
    Mutant("skipped-step-counts", "fused_sam/backends/base.py",
           "stepping * (1 - found_inf)", "stepping", table("reference", SCALER)),
    Mutant("found-inf-is-a-flag", "fused_sam/backends/base.py",
           "found_inf = (found_inf != 0).float()", "found_inf = found_inf.float()",
           table("reference", SCALER)),
    Mutant("climb-has-no-number", "fused_sam/backends/base.py",
           "bucket.climb.fill_(number)", "pass", table("reference", FAILS)),
    Mutant("runs-across-groups", "fused_sam/backends/runs.py",
           "and slot.row == first.row", "", table("reference", GROUPS)),
    Mutant("padding-is-not-cleared", "fused_sam/backends/runs.py",
           "memory.index_fill_(0, self.padding, 0)", "pass", table("reference", "eps_zero")),
    Mutant("one-bucket-climbs-alone", "fused_sam/backends/combine.py",
           "return torch.where(total > largest, torch.inf, total)", "return total", STEPS),
    # ---- the tables of both GPU backends; the CPU's kernels read them too
    Mutant("addresses-of-other-slots", "fused_sam/backends/tables.py",
           "data_ptr() if slot.numel else 0 for slot in bucket.slots]",
           "data_ptr() if slot.numel else 0 for slot in bucket.slots[::-1]]", TRITON),
    Mutant("misaligned-weights", "fused_sam/backends/tables.py",
           "weights and address % _ACCESS == 0", "address % _ACCESS == 0", ALIGNMENT),
    Mutant("weights-are-aligned", "fused_sam/backends/tables.py",
           "address % _ACCESS == 0 for address in weights", "True for _ in weights", ALIGNMENT),
    Mutant("misaligned-gradients", "fused_sam/backends/tables.py",
           "weights and address % _ACCESS == 0", "weights", ALIGNMENT),
    Mutant("never-fresh", "fused_sam/backends/tables.py",
           "| FRESH * (bool(fresh) and fresh[i])", "", NATIVE),
    Mutant("everything-was-perturbed", "fused_sam/backends/tables.py",
           "| PERTURBED * perturbed[i]", "| PERTURBED", TRITON),
    Mutant("stale-hyperparameters", "fused_sam/backends/tables.py",
           "if known is not None and known[0] == wanted and", "if known is not None and",
           table("native", GROUPS)),
    Mutant("rows-from-zero", "fused_sam/backends/tables.py",
           "for row, own in rows.items():", "for row, own in enumerate(rows.values()):",
           table("native", OPTIONS)),
    Mutant("all-groups-keep-all-states", "fused_sam/backends/tables.py",
           "kept = sum(1 << i for i, state in enumerate(rule.states) if state.is_kept(group))",
           "kept = (1 << len(rule.states)) - 1", table("triton", OPTIONS)),
    Mutant("maximize-is-no-bit", "fused_sam/backends/tables.py",
           '| MAXIMIZE * bool(group["maximize"])', "", NATIVE),
    # ---- Triton
    Mutant("triton-no-group-differs", "fused_sam/backends/triton/operations.py",
           "mixed = any([row != states[0] for row in states])", "mixed = False",
           table("triton", OPTIONS)),
    Mutant("triton-amsgrad-loses-nan", "fused_sam/backends/triton/words.py",
           "tl.PropagateNan.ALL", "tl.PropagateNan.NONE", table("triton", EDGE)),
    Mutant("triton-expm1-cancels", "fused_sam/backends/triton/words.py",
           "tl.where(x > -0.35, x * series, tl.exp(x) - 1)", "tl.exp(x) - 1",
           ("tests/test_triton.py", "-k", "bias_correction")),
    Mutant("triton-climb-of-zero-adds", "fused_sam/backends/triton/kernels.py",
           "tl.where(scale == 0, stays, MOVE(w, g, *scalars))", "MOVE(w, g, *scalars)",
           table("triton", EDGE)),
    Mutant("triton-climb-has-no-number", "fused_sam/backends/triton/kernels.py",
           "tl.store(climb_ptr, number)", "pass", table("triton", FAILS)),
    Mutant("triton-update-keeps-the-number", "fused_sam/backends/triton/kernels.py",
           "tl.store(climb_ptr, 0)\n    steps", "pass\n    steps", table("triton", FAILS)),
    Mutant("triton-lr-zero-subtracts", "fused_sam/backends/triton/kernels.py",
           "value = tl.where(lr == 0, w, value)", "pass", table("triton", EDGE)),
    Mutant("triton-skipped-step-counts", "fused_sam/backends/triton/kernels.py",
           "if steps:\n                    for i in", "if True:\n                    for i in",
           table("triton", SCALER)),
    Mutant("triton-missing-gradients-count", "fused_sam/backends/triton/kernels.py",
           "tl.store(step_ptr + slot, count + 1, (flags & MISSING) == 0)",
           "tl.store(step_ptr + slot, count + 1, slot < n_slots)", TRITON),
    Mutant("triton-ticket-stays", "fused_sam/backends/triton/kernels.py",
           "tl.store(ticket_ptr, 0)", "pass", TRITON),
    Mutant("triton-stale-saved", "fused_sam/backends/triton/kernels.py",
           "tl.where(condition, x.to(tl.int64), y.to(tl.int64))", "x.to(tl.int64)", TRITON),
    Mutant("triton-missing-gradients-stay-away", "fused_sam/backends/triton/kernels.py",
           "elif returns:", "elif returns & (count < 0):", TRITON),
    Mutant("triton-32-bit-offsets", "fused_sam/backends/triton/kernels.py",
           "begin = tl.load(place + 1)", "begin = tl.load(place + 1).to(tl.int32)",
           ("tests/test_triton.py", "-k", "offsets")),
    # ---- C++: the mathematics
    Mutant("cpp-dampens-the-first-gradient", "csrc/mathematics.h",
           "undampened = words::where(fresh, T(1.0), undampened);", "", NATIVE),
    Mutant("cpp-amsgrad-loses-nan", "csrc/words.h", "x > y || x != x ? x : y", "x > y ? x : y",
           table("native", EDGE)),
    Mutant("cpp-rmsprop-clamp", "csrc/mathematics.h",
           "variance = words::where((variance < T(0)), T(0.0), variance);", "",
           table("native", EDGE)),
    Mutant("cpp-zero-decay-times-infinity", "csrc/mathematics.h",
           "words::where((coupled != T(0)), (grad + (coupled * param)), grad)",
           "(grad + (coupled * param))", table("native", EDGE)),
    Mutant("cpp-asam-unsquared", "csrc/mathematics.h",
           "((t * t) * grad)));\n  }\n};\n\n// climbs by the numbers of PNormSum",
           "(t * grad)));\n  }\n};\n\n// climbs by the numbers of PNormSum", NATIVE),
    Mutant("cpp-lerp", "csrc/mathematics.h", "((end - start) * (T(1) - weight))",
           "((end - start) * weight)", NATIVE),
    # ---- C++: the CPU
    Mutant("cpu-lr-zero-subtracts", "csrc/cpu/kernels_impl.h",
           "weights[i] = frozen ? old : updated;", "weights[i] = updated;", table("native", EDGE)),
    Mutant("cpu-climb-of-zero-adds", "csrc/cpu/kernels_impl.h",
           "if (scalars.scale == T(0)) continue;", "", table("native", EDGE)),
    Mutant("cpu-climb-has-no-number", "csrc/cpu/bindings.cpp",
           "set_climb(climb, saved, number);", "", table("native", FAILS)),
    Mutant("cpu-stale-saved", "csrc/cpu/kernels_impl.h",
           "const bool away = (piece.flags & kPerturbed) != 0;", "const bool away = true;", NATIVE),
    Mutant("cpu-climb-of-zero-stays-ahead", "csrc/cpu/kernels_impl.h",
           "if (is_saved && scalars.scale == T(0)) restore(p, piece);", "",
           ("tests/test_msam.py", "-k", "native and is_zero")),
    Mutant("cpu-decay-ahead-is-scaled", "csrc/cpu/kernels_impl.h",
           "descent * grad[i] + decay * (ahead[i] - at_w[i])",
           "descent * (grad[i] + decay * (ahead[i] - at_w[i]))", AHEAD),
    Mutant("cpu-sums-what-does-not-climb", "csrc/cpu/kernels_impl.h",
           "!piece.grad.at || !(piece.flags & kSummed)", "!piece.grad.at", AHEAD),
    Mutant("cpu-missing-gradients-count", "csrc/cpu/bindings.cpp",
           "if (!(p.flags[i] & kMissing)) p.step[i] += 1.0f;", "p.step[i] += 1.0f;", NATIVE),
    Mutant("cpu-skipped-step-counts", "csrc/cpu/bindings.cpp",
           "if (p.step && !skip) {", "if (p.step) {", table("native", SCALER)),
    Mutant("cpu-row-beyond-the-table", "csrc/cpu/bindings.cpp",
           "slot.row < numbers / columns),", "slot.row <= numbers / columns),",
           ("tests/test_native.py", "-k", "refuse")),
    # ---- CUDA, under emulation
    Mutant("cuda-misaligned-climb", "csrc/cuda/kernels.cuh",
           "for_packs<S, 2>(piece.numel, piece.has(kAligned),",
           "for_packs<S, 2>(piece.numel, true,", CUDA),
    Mutant("cuda-misaligned-update", "csrc/cuda/kernels.cuh",
           "for_packs<S, kMaxUnroll>(piece.numel, piece.has(kAligned),",
           "for_packs<S, kMaxUnroll>(piece.numel, true,", CUDA),
    Mutant("cuda-misaligned-return", "csrc/cuda/kernels.cuh",
           "copy<S>(piece.weights, saved, piece.numel, piece.has(kAligned));",
           "copy<S>(piece.weights, saved, piece.numel, true);", CUDA),
    Mutant("cuda-averages-what-is-not-finite", "csrc/cuda/kernels.cuh",
           "Ascent::Average::kIs && words::is_finite(T(numbers[0]));", "Ascent::Average::kIs;",
           CUDA),
    Mutant("cuda-average-stays-without-a-climb", "csrc/cuda/kernels.cuh",
           "if (takes_in) write(", "if (takes_in && !stays) write(", CUDA),
    Mutant("cuda-sums-the-gradient-itself", "csrc/cuda/kernels.cuh",
           "direction_of<Average>(T(load(grad[u].at[k])), m, group);",
           "T(load(grad[u].at[k]));", CUDA),
    Mutant("cuda-average-of-the-buckets-start", "csrc/cuda/kernels.cuh",
           "static_cast<ComputeOf<S>*>(p.average) + piece.at;",
           "static_cast<ComputeOf<S>*>(p.average);", CUDA),
    Mutant("cuda-missing-gradients-count", "csrc/cuda/kernels.cuh",
           "if (!(p.flags[i] & kMissing)) p.step[i] += 1.0f;", "p.step[i] += 1.0f;", CUDA),
    Mutant("cuda-skipped-step-counts", "csrc/cuda/kernels.cuh",
           "!skip && i < p.num_slots", "i < p.num_slots", CUDA),
    Mutant("cuda-ticket-stays", "csrc/cuda/kernels.cuh",
           "    if (threadIdx.x == 0) *ticket = 0;", "", CUDA),
    Mutant("cuda-reduce-ticket-stays", "csrc/cuda/kernels.cuh",
           "[c] = double(T(sum));\n  }\n  if (threadIdx.x == 0) *ticket = 0;",
           "[c] = double(T(sum));\n  }", CUDA),
    Mutant("cuda-stale-kept", "csrc/cuda/kernels.cuh",
           "piece.has(kHeld) && (found.b != 0 || found.d != 0)",
           "found.b != 0 || found.d != 0", CUDA),
    Mutant("cuda-direction-is-subtracted", "csrc/cuda/kernels.cuh",
           "grad[u].at[k] = after;\n            after = T(0);", "grad[u].at[k] = after;", CUDA),
    # ---- maxima and blends
    Mutant("buckets-maxima-are-added", "fused_sam/backends/combine.py",
           'every.amax(0) if how == "max" else every.sum(0)', "every.sum(0)",
           table("reference", "p_norm")),
    Mutant("triton-maximum-loses-nan", "fused_sam/backends/triton/kernels.py",
           "terms, 0.0).to(terms.dtype)) + nan", "terms, 0.0).to(terms.dtype))",
           table("triton", "no_ascent")),
    Mutant("cpp-maximum-is-a-sum", "csrc/words.h", "return maximum(all, term);",
           "return all + term;", table("native", "p_norms")),
    Mutant("p-norms-share-is-not-a-share", "fused_sam/ascents/pnorm.py",
           "return share * power(share, exponent)", "return power(share, exponent)",
           table("reference", "p_norms")),
    Mutant("p-norm-forgets-asams-t", "fused_sam/ascents/pnorm.py",
           "scale * (t * (sign(grad) * power(share, exponent)))",
           "scale * (sign(grad) * power(share, exponent))", MEMBERS),
    Mutant("p-norm-climbs-by-infinity", "fused_sam/ascents/pnorm.py",
           "is_finite(largest) & (largest > 0) & is_finite(total)", "(largest > 0)",
           ("tests/test_family.py", "-k", "infinite and reference")),
    Mutant("p-norm-climbs-by-zero", "fused_sam/ascents/pnorm.py",
           "is_finite(largest) & (largest > 0) & is_finite(total)", "is_finite(largest)",
           table("reference", "p_norms or no_ascent")),
    Mutant("p-norm-tells-the-p-norm", "fused_sam/ascents/pnorm.py",
           'total ** (1 / _conjugate(group["p"]))', 'total ** (1 / group["p"])',
           table("reference", "p_norm")),
    Mutant("usam-forgets-the-loss-scale", "fused_sam/ascents/usam.py",
           "return rho * unscale, *others", "return rho, *others",
           ("tests/test_family.py", "-k", "usam_needs and reference")),
    Mutant("usam-climbs-to-infinity", "fused_sam/ascents/usam.py",
           "where(is_finite(sq_norm), rho, 0.0)", "rho",
           ("tests/test_family.py", "-k", "infinite and reference")),
    Mutant("friendly-takes-the-new-average", "fused_sam/ascents/friendly.py",
           "grad - sigma * average", "grad - sigma * (lam * average + rest * grad)", AVERAGES),
    Mutant("friendly-begins-with-a-share", "fused_sam/ascents/friendly.py",
           "where(there, lam * average + rest * grad, grad)",
           "where(there, lam * average + rest * grad, rest * grad)", AVERAGES),
    Mutant("friendly-averages-scaled-gradients", "fused_sam/ascents/friendly.py",
           "grad = unscale * grad", "grad = grad", AVERAGES),
    Mutant("vasso-climbs-along-the-old-average", "fused_sam/ascents/vasso.py",
           "return average, average", "return where(there, average - theta * grad, grad), average",
           AVERAGES),
    Mutant("vasso-averages-scaled-gradients", "fused_sam/ascents/vasso.py",
           "grad = unscale * grad", "grad = grad", AVERAGES),
    Mutant("averages-take-infinity-in", "fused_sam/backends/base.py",
           "m.copy_(torch.where(reduced[0].isfinite(), new, m))", "m.copy_(new)", AVERAGES),
    Mutant("averages-begin-with-zero", "fused_sam/memory/members.py",
           "{AVERAGE: math.nan,", "{AVERAGE: 0.0,", AVERAGES),
    Mutant("averages-in-half-precision", "fused_sam/memory/bucket.py",
           "if name in MEMBER_STATES:\n            return self.compute_dtype",
           "if name in MEMBER_STATES:\n            return self.dtype", AVERAGES),
    Mutant("spoilt-averages-stay", "fused_sam/memory/members.py",
           "        for buffer in buffers:\n            buffer.clear()\n", "", AVERAGES),
    Mutant("gsam-adds-what-it-should-subtract", "fused_sam/blends/gsam.py",
           "where(known, -alpha, 0.0)", "where(known, alpha, 0.0)", FORMULAS),
    Mutant("gsam-projects-on-g", "fused_sam/blends/gsam.py",
           "divide(mixed, second)", "divide(mixed, first)", FORMULAS),
    Mutant("gsam-decomposes-infinity", "fused_sam/blends/gsam.py",
           "known = is_finite(share)", "known = is_finite(second)",
           table("reference", "decompose")),
    Mutant("wsam-clips-g-by-the-other-norm", "fused_sam/blends/wsam.py",
           "weight * clip2, -weight * clip1", "weight * clip2, -weight * clip2", FORMULAS),
    Mutant("coupled-wsam-clips-g-by-the-other-norm", "fused_sam/blends/wsam.py",
           "(1 - weight) * clip1", "(1 - weight) * clip2", FORMULAS),
    Mutant("wsam-steps-with-infinity", "fused_sam/blends/wsam.py",
           "where(known, 0.0, clip2), where(known, clip1, 0.0)",
           "where(known, 0.0, 0.0), where(known, clip1, clip1)",
           ("tests/test_blends.py", "-k", "reference")),
    Mutant("wsam-subtracts-before-the-step", "fused_sam/backends/base.py",
           "values = (value if after is None else value - after[chunk], *others)",
           "values = (value, *others)", FORMULAS),
    Mutant("a-blend-clips-by-a-difference", "fused_sam/blends/base.py",
           "blended = blended + others", "blended = blended + (unblended - second).clamp_min(0)",
           ("tests/test_blends.py", "-k", "blur and reference")),
    # ---- which steps climb
    Mutant("span-includes-its-end", "fused_sam/schedule.py",
           "step < self.stop", "step <= self.stop", WHEN),
    Mutant("every-begins-with-a-plain-step", "fused_sam/schedule.py",
           "step % self.k == 0", "step % self.k == self.k - 1", WHEN),
    Mutant("from-begins-late", "fused_sam/schedule.py",
           "step >= self.start", "step > self.start", WHEN),
    Mutant("chance-forgets-the-step", "fused_sam/schedule.py",
           'random.Random(f"{self.seed} {step}")', 'random.Random(f"{self.seed}")', WHEN),
    Mutant("aesam-takes-infinity-in", "fused_sam/schedule.py",
           "if not math.isfinite(square):", "if False:", WHEN),
    Mutant("aesam-deviates-from-the-old-mean", "fused_sam/schedule.py",
           "(square - mean) ** 2", "(square - group[MEAN]) ** 2", WHEN),
    Mutant("aesam-judges-scaled-gradients", "fused_sam/climb.py",
           "total.item() / (facts.scale or 1.0) ** 2", "total.item()", WHEN),
    Mutant("given-up-steps-count", "fused_sam/climb.py",
           "if not facts.decision.climbs:",
           "groups[0].update(facts.decision.memory)\n            if not facts.decision.climbs:",
           WHEN),
    Mutant("a-plain-step-loses-its-gradients", "fused_sam/descent.py",
           "            put_back(facts.aside)\n", "            pass\n", WHEN),
    # ---- what a step tells
    Mutant("told-of-an-older-climb", "fused_sam/descent.py",
           "keeps = facts.keeps and climbed and ahead is None",
           "keeps = facts.measures and climbed and ahead is None", TOLD),
    Mutant("told-of-scaled-gradients", "fused_sam/laststep.py",
           "norm = norm * moved(inverse, norm.device, norm.dtype).squeeze()", "pass", TOLD),
    Mutant("told-of-the-momentums-norm", "fused_sam/facts.py",
           "if plain and not (self.each or ascent.along_momentum):", "if plain and not self.each:",
           TOLD),
    Mutant("told-of-one-micro-batch", "fused_sam/facts.py",
           "if plain and not (self.each or ascent.along_momentum):",
           "if plain and not ascent.along_momentum:", TOLD),
    Mutant("rho-falls-below-zero", "fused_sam/rho.py",
           "max(0.0, rho_min + (rho_max - rho_min) * part)", "rho_min + (rho_max - rho_min) * part",
           ("tests/test_rho.py",)),
    Mutant("rho-resumes-from-elsewhere", "fused_sam/rho.py",
           '            group["lr"] = rho\n', "            pass\n", ("tests/test_rho.py",)),
    Mutant("gsam-zero-times-infinity", "fused_sam/backends/mixing.py",
           "torch.where(y == 0, mixed, mixed + y * kept.to(grad.dtype))",
           "mixed + y * kept.to(grad.dtype)", table("reference", "decompose")),
    Mutant("stale-kept", "fused_sam/backends/base.py",
           "kept = run.of(blending.kept.flat) if held else None",
           "kept = run.of(blending.kept.flat)", table("reference", "gsam")),
    Mutant("cpu-stale-kept", "csrc/cpu/kernels_impl.h",
           "if (!(flags & kHeld)) found.b = found.d = 0;", "",
           table("native", "gsam")),
    Mutant("triton-stale-kept", "fused_sam/backends/triton/kernels.py",
           "blends & ((flags & HELD) != 0)", "blends", table("triton", "gsam")),
    Mutant("groups-that-do-not-climb-blend", "fused_sam/backends/tables.py",
           'blends = blends and group["ascent"] is not None', "pass", table("native", "gsam")),
    Mutant("clips-what-is-not-blended", "fused_sam/descent.py",
           "sq_norm = blending.sq_norm(sq_norm, groups, others)", "pass",
           table("reference", "gsam_clips")),
    Mutant("wsam-after-is-scaled", "fused_sam/blends/wsam.py",
           "where(known, divide(weight, scale), 0.0)", "where(known, weight, 0.0)",
           ("tests/test_blends.py", "-k", "loss_scale and reference")),
    Mutant("wsam-clips-scaled-norms", "fused_sam/blends/base.py",
           "scale = 1.0 if self.scale is None else self.scale", "scale = 1.0",
           ("tests/test_blends.py", "-k", "loss_scale and reference")),
    Mutant("wsam-after-goes-downhill", "fused_sam/backends/mixing.py",
           'return -lr if group.get("maximize") else lr', "return lr",
           ("tests/test_blends.py", "-k", "uphill and reference")),
    Mutant("triton-wsam-after-goes-downhill", "fused_sam/backends/triton/kernels.py",
           "rate = tl.where((flags & MAXIMIZE) != 0, -lr, lr)", "rate = lr",
           table("triton", "test_wsam")),
    Mutant("cpu-wsam-after-goes-downhill", "csrc/cpu/kernels_impl.h",
           "piece.flags & kMaximize ? -double(group.lr) : double(group.lr)", "double(group.lr)",
           ("tests/test_blends.py", "-k", "uphill and native")),
    Mutant("zero-times-an-infinite-second", "fused_sam/backends/mixing.py",
           "mixed = torch.where(x == 0, 0.0, x * grad)", "mixed = x * grad",
           ("tests/test_blends.py", "-k", "not_looked_at and reference")),
    Mutant("kept-is-lost-in-a-move", "fused_sam/memory/layout.py",
           "if held and bucket.kept is not None:", "if False:",
           ("tests/test_blends.py", "-k", "anew and reference")),
    Mutant("looksam-keeps-what-is-parallel", "fused_sam/blends/looksam.py",
           "where(known, -share, 0.0)", "where(known, 0.0, 0.0)", table("reference", "looksam")),
    Mutant("looksam-keeps-rounding", "fused_sam/blends/looksam.py",
           "(square > 1e-13 * second)", "(square > 0)", LOOKSAM),
    Mutant("looksam-sums-in-float32", "fused_sam/ascents/gram.py",
           "reads_kept=True, wide=True", "reads_kept=True", LOOKSAM),
    Mutant("looksam-carries-a-skipped-norm", "fused_sam/engine.py",
           "carried.copy_(_unless(found_inf, length, carried))", "carried.copy_(length)",
           table("reference", "looksam")),
    Mutant("looksam-keeps-a-skipped-direction", "fused_sam/backends/base.py",
           "new = torch.where(found_inf != 0, direction, new)", "pass",
           table("reference", "looksam")),
    Mutant("looksam-keeps-an-old-direction", "fused_sam/engine.py",
           "if there and not new", "if False", table("reference", "looksam")),
    Mutant("looksam-knows-no-frozen-ones", "fused_sam/engine.py",
           "without = self.layout.members.waiting(DIRECTION)", "without = []",
           ("tests/test_looksam.py", "-k", "takes_no_part and not native")),
    Mutant("looksam-drops-directions-in-a-skipped-step", "fused_sam/engine.py",
           "old.copy_(_unless(found_inf, torch.zeros_like(old), old))", "old.zero_()",
           table("reference", "looksam")),
    Mutant("looksam-by-the-norm-of-all-groups", "fused_sam/engine.py",
           "climbing = self.climbing(grads, groups)\n        if", "climbing = grads\n        if",
           table("reference", "looksam")),
    Mutant("looksam-clips-by-the-gradient", "fused_sam/blends/base.py",
           "if self.blend.reuse is not None:", "if self.blend.reuses:",
           table("reference", "looksam")),
    Mutant("looksam-norm-of-another-direction", "fused_sam/engine.py",
           "self.layout.members.number(LENGTH).zero_()", "pass", LOOKSAM),
    Mutant("looksam-direction-in-half-precision", "fused_sam/memory/bucket.py",
           "if name in MEMBER_STATES:", 'if name == "sam_average":', LOOKSAM),
    Mutant("looksam-trial-does-not-climb", "fused_sam/checkup.py",
           "group[BLEND.name] = None", "pass", LOOKSAM),
    Mutant("looksam-begins-with-a-plain-step", "fused_sam/schedule.py",
           "= {STEP: 0}\n", "= {STEP: 1}\n", LOOKSAM),
    Mutant("looksam-saves-no-norm", "fused_sam/memory/members.py",
           "entries[0] = {**entries[0], **members.numbers}", "pass", LOOKSAM),
    Mutant("looksam-carries-a-coarse-norm", "fused_sam/memory/members.py",
           "torch.zeros((), dtype=torch.float64", "torch.zeros((), dtype=torch.float32",
           table("reference", "looksam")),
    Mutant("cpu-looksam-steps-with-the-direction", "csrc/cpu/kernels_impl.h",
           "        } else {\n          grad = mixed;\n        }",
           "        }\n        grad = mixed;", table("native", "looksam")),
    Mutant("triton-keeps-no-direction", "fused_sam/backends/triton/kernels.py",
           "_store(direction + at + offs, mixed, mask)", "pass", table("triton", "looksam")),
    # ---- ahead of w
    Mutant("msam-climbs-with-the-momentum", "fused_sam/onepass.py",
           'return -self._group[name] if name == "rho" else self._group[name]',
           "return self._group[name]", MSAM),
    Mutant("msam-returns-by-the-new-rho", "fused_sam/onepass.py",
           "            self._go_back()\n            self._facts.training = False",
           "            if self._facts.perturbed:\n"
           "                length = self.grad_norm.item()\n"
           "                self._facts.forget_climb()\n"
           "                for group in self.param_groups:\n"
           "                    for p in group['params'] if length else ():\n"
           "                        step = group['rho'] / length\n"
           "                        p.data.add_(self.state[p]['momentum_buffer'], alpha=step)\n"
           "            self._facts.training = False",
           ("tests/test_msam.py", "-k", "way_back and not native")),
    Mutant("msam-goes-along-a-momentum-that-rests", "fused_sam/onepass.py",
           " and id(slot.param) not in missed", "", MSAM),
    Mutant("msam-sums-a-momentum-that-rests", "fused_sam/backends/base.py",
           "summed = momentum_of(bucket, ahead.momentum, climbing(bucket, grads.present, groups))",
           "summed = momentum_of(bucket, ahead.momentum, bucket.state(ahead.momentum).present)",
           MSAM),
    Mutant("msam-decays-w", "fused_sam/backends/ahead.py",
           "if not any([decays(groups[row]) for row in bucket.rows]):", "if True:", MSAM),
    Mutant("msam-unscales-no-decay", "fused_sam/backends/ahead.py",
           "if grad_scale is not None:", "if False:", MSAM),
    Mutant("msam-eval-twice-is-train", "fused_sam/onepass.py",
           "self._facts.training = False", "self._facts.training = not self._facts.training",
           MSAM),
    Mutant("msam-train-twice-goes-farther", "fused_sam/onepass.py",
           "        if not facts.perturbed:\n            self._leave(ascent)",
           "        self._leave(ascent)", MSAM),
    Mutant("msam-trains-after-loading-without-train", "fused_sam/onepass.py",
           "if not facts.training or any([name in entry for entry in self.state.values()]):",
           "if not facts.training:", MSAM),
    Mutant("msam-forgets-which-were-missing", "fused_sam/onepass.py",
           "engine.layout.frozen + [", "[] + [",
           ("tests/test_msam.py", "-k", "what_is_frozen and not native")),
    Mutant("triton-msam-sum-leaves-a-slot-out", "fused_sam/backends/triton/kernels.py",
           "summed = ((flags & SUMMED) != 0) & ((flags & MISSING) == 0)",
           "summed = ((flags & SUMMED) != 0) & ((flags & MISSING) == 0) & (slot != 1)",
           MSAM_IN_TRITON),
    Mutant("triton-msam-sums-nothing-of-a-skipped-step", "fused_sam/backends/triton/kernels.py",
           "if summed & (steps == 0):", "if summed & (steps != steps):", MSAM_IN_TRITON),
    # ---- memory
    Mutant("skipped-first-step-loses-fresh", "fused_sam/memory/state.py",
           "if found_inf is not None and dampened and found_inf.item():", "if False:",
           table("reference", SCALER)),
    Mutant("replaced-state-is-not-noticed", "fused_sam/memory/state.py",
           "and all(map(operator.is_, map(dict.get, *self._shown), self._windows))", "", LAYOUT),
    Mutant("state-is-lost-in-a-move", "fused_sam/memory/state.py",
           "window.copy_(_tensor(value))", "window.zero_()", LAYOUT),
    Mutant("states-in-the-compute-dtype", "fused_sam/memory/state.py",
           "zeros(dtype=bucket.state_dtype(name))", "zeros(dtype=bucket.compute_dtype)", REFERENCE),
    Mutant("moved-while-perturbed", "fused_sam/memory/bucket.py",
           "self._number, self.perturbed = _CARRIED, perturbed", "self._number = _CARRIED", LAYOUT),
    Mutant("unaligned-windows", "fused_sam/memory/bucket.py",
           "stop = start + -(-numel // ALIGNMENT) * ALIGNMENT", "stop = start + numel", LAYOUT),
    Mutant("stale-saved", "fused_sam/memory/bucket.py",
           "(self._number, self.perturbed), self._coming = self._coming, None",
           "self._number, self._coming = self._coming[0], None\n"
           "        self.perturbed = (True,) * len(self.slots)", REFERENCE),
    Mutant("settles-away", "fused_sam/memory/bucket.py",
           "and self.climb.item() == number", "and number != 0",
           table("reference", FAILS)),
    Mutant("settles-at-w", "fused_sam/memory/bucket.py",
           "and self.climb.item() == number", "and number == 0",
           table("reference", FAILS)),
    # ---- the protocol
    Mutant("clip-enlarges", "fused_sam/scaling.py", ".clamp_max_(1.0)", "",
           table("reference", "clips")),
    Mutant("clip-forgets-the-loss-scale", "fused_sam/scaling.py",
           "return scale / coefficient", "return 1 / coefficient", table("reference", SCALER)),
    Mutant("used-gradients-are-fresh", "fused_sam/gradients.py",
           "setattr(grad, _USED, True)", "pass", STEPS),
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
        """What pytest exits with; None if it takes too long."""
        try:
            return self.run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests).returncode
        except subprocess.TimeoutExpired:
            return None

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
            code = self.pytest(mutant.tests)
            # 1: tests failed; 2: they cannot be collected; negative: the interpreter was killed, as
            # by an access out of bounds. All else is not about the code.
            if code is not None and code > 2:
                raise RuntimeError(f"pytest exits with {code}: {' '.join(mutant.tests)}")
            return code != 0
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
                if mutant.tests in broken:
                    raise RuntimeError(f"these fail without it: {' '.join(mutant.tests)}")
                word = "killed" if in_a_checkout(lambda c: c.kills(mutant)) else "SURVIVES"
            except RuntimeError as error:
                word = f"ERROR: {error}"
            print(f"{time.monotonic() - start:5.0f} s  {mutant.name:35} {word}", flush=True)
            return word

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            selections = list(dict.fromkeys(mutant.tests for mutant in chosen))
            codes = pool.map(lambda tests: in_a_checkout(lambda c: c.pytest(tests)), selections)
            broken = [tests for tests, code in zip(selections, codes, strict=True) if code != 0]
            words = list(pool.map(try_mutant, chosen))
    alive = [m.name for m, word in zip(chosen, words, strict=True) if word != "killed"]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed", *alive, sep="\n  ")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
