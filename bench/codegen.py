"""What the compiler makes of the Triton kernels, for GPUs that need not be there.

    python bench/codegen.py [results.json]

For each kernel, dtype and target it reads from the intermediate code what one element costs on the
path of full, aligned chunks, and from the machine code how wide the accesses are there and on the
other path, how many registers the kernel takes and whether any are spilled. Prints a table: all
kernels for sm_90, those of the traffic budget and RMSprop for the other targets.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the compiler is wanted

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_sam.ascents import ASCENTS, GRAM, SQUARES
from fused_sam.backends.triton import kernels
from fused_sam.backends.triton import operations as backend
from fused_sam.backends.triton.words import compiled as text
from fused_sam.blends import BLENDS
from fused_sam.rules import ADAM, RMSPROP, SGD

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"fp32": 4, "bf16-masters": 4, "bf16": 2, "fp16": 2, "fp64": 8}
UPDATES = {
    "sgd": (SGD, (False,)),
    "sgd-momentum": (SGD, (True,)),
    "adamw": (ADAM, (True, True, False)),
    "adam-amsgrad": (ADAM, (True, True, True)),
    "rmsprop": (RMSPROP, (True, False, False)),
    "rmsprop-all": (RMSPROP, (True, True, True)),
}
"""Rule and the state buffers that it keeps."""
BLENDED = {
    f"{plain}-{blend}": (plain, blend)
    for plain, blend in itertools.product(
        ("sgd-momentum", "adamw"), ("gsam", "wsam", "looksam", "looksam-reuse")
    )
}
"""Updates that see a blend of both gradients."""
UPDATES |= {name: UPDATES[plain] for name, (plain, _) in BLENDED.items()}
REDUCES = {
    "reduce": (ASCENTS["sam"].sums, False),
    "reduce-asam": (ASCENTS["sam"].sums, True),
    "squares": (SQUARES, False),
    "reduce-max": (ASCENTS["p-norm"].sums.chain[0], False),
    "reduce-p-norm": (ASCENTS["p-norm"].sums, False),
    "reduce-gram": (GRAM, True),
    "reduce-friendly": (ASCENTS["friendly"].sums, False),
    "reduce-vasso": (ASCENTS["vasso"].sums, False),
}
"""The sum, and whether it reads the weights, or what is kept."""
CLIMBS = {
    "ascend": ASCENTS["sam"],
    "ascend-p-norm": ASCENTS["p-norm"],
    "ascend-keep": ASCENTS["sam"],
    "ascend-friendly": ASCENTS["friendly"],
    "ascend-vasso": ASCENTS["vasso"],
}
KERNELS = [*REDUCES, *CLIMBS, *UPDATES, "restore"]
MASTERS = ("ascend", "ascend-friendly", "sgd-momentum", "adamw", "restore")
"""Compiled for bfloat16 weights and gradients with float32 masters and states, too."""
EVERYWHERE = (
    *("reduce", "ascend", "sgd-momentum", "adamw", "rmsprop"),
    *("reduce-gram", "ascend-keep", "sgd-momentum-gsam", "sgd-momentum-wsam"),
    *("reduce-friendly", "reduce-vasso", "ascend-friendly", "ascend-vasso"),
    *("sgd-momentum-looksam", "sgd-momentum-looksam-reuse"),
)
NOT_ALIGNED = (
    "total_ptr",
    "number_ptr",
    "earlier_ptr",
    "numbers_ptr",
    "loss_scale_ptr",
    "grad_scale_ptr",
    "found_inf_ptr",
)
REGISTER_FILE, THREADS = 65536, {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
"""Per multiprocessor (CUDA programming guide, table of compute capabilities)."""


def build(name, dtype, target):
    """Kernel ``name`` compiled for ``target``, as the backend would.

    ``dtype``: of all, or "bf16-masters": then masters and states are float32.
    """
    masters, dtype = dtype.endswith("-masters"), dtype.removesuffix("-masters")
    wide = "fp32" if masters else dtype
    compute = "*fp64" if dtype == "fp64" else "*fp32"
    types = dict.fromkeys(("flags_ptr", "ticket_ptr"), "*i32")
    types |= dict.fromkeys(("slots_ptr", "grads_ptr", "climb_ptr"), "*i64")
    types |= dict.fromkeys(("n_chunks", "n_slots", "number"), "i32")
    types["saved_ptr"] = "*" + wide
    types |= {"partials_ptr": compute, "hyper_ptr": compute, "total_ptr": "*fp64"}
    types |= dict.fromkeys(("grad_scale_ptr", "found_inf_ptr"))
    constants = {"MASTERS": masters} if name in CLIMBS or name in UPDATES else {}
    constants |= {"WEIGHT": triton_dtype(dtype)}
    if name != "restore":
        constants["GRAD"] = triton_dtype(dtype)
    if name in UPDATES:
        rule, kept = UPDATES[name]
        constants |= {"SCALARS": text(rule.scalars), "RULE": text(rule.update), "KEPT": kept}
        constants |= {"COLUMNS": 1 + len(rule.column_names), "MIXED": False}
        types["states"] = ("*" + wide,) * len(kept)
        types["step_ptr"] = "*fp32" if rule.counts else None
        blend = blend_of(BLENDED[name][1]) if name in BLENDED else None
        constants["COEFFICIENTS"] = None if blend is None else text(blend.coefficients)
        constants["AFTER"] = blend is not None and blend.after
        constants["BLEND_NUMBERS"] = 0 if blend is None else blend.count
        constants["BLEND_COLUMNS"] = 0 if blend is None else len(blend.column_names)
        if blend is not None:
            types |= {"kept_ptr": "*" + dtype, "numbers_ptr": "*fp64", "blend_ptr": compute}
            types["loss_scale_ptr"] = "*fp64"
            if blend.reuses:
                types["kept_ptr"] = compute
            types["direction_ptr"] = None if blend.reuse is None else compute
        function = kernels.update_kernel
    elif name in REDUCES:
        sums, reads = REDUCES[name]
        constants |= {"TERMS": text(sums.terms), "READS": reads}
        constants |= {"COUNT": sums.count, "MAX": sums.how == "max", "EARLIER": sums.earlier}
        types["earlier_ptr"] = "*fp64" if sums.earlier else None
        types["kept_ptr"] = "*" + dtype if sums.reads_kept else None
        types["partials_ptr"] = "*fp64" if sums.wide else compute
        function = kernels.reduce_kernel
    elif name in CLIMBS:
        ascent = CLIMBS[name]
        constants |= {"SCALARS": text(ascent.scalars), "MOVE": text(ascent.move)}
        constants |= {"NUMBERS": len(ascent.sums.chain)}
        types["kept_ptr"] = "*" + dtype if name == "ascend-keep" else None
        function = kernels.ascend_kernel
    else:
        function = kernels.restore_kernel
    sums = REDUCES[name][0] if name in REDUCES else CLIMBS[name].sums if name in CLIMBS else None
    average = None if sums is None else sums.average
    if sums is not None:
        followed = 0 if average is None else len(average.column_names)
        constants |= {"COLUMNS": len(sums.column_names) + followed, "FOLLOWS": followed}
        constants["FOLLOW"] = None if average is None else text(average.follow)
        types["average_ptr"] = None if average is None else compute
    in_double = name in REDUCES and REDUCES[name][0].wide
    tile = backend.WIDE_TILE_BYTES if in_double else backend.TILE_BYTES[function.__name__]
    if name in BLENDED and BLENDED[name][1].startswith("looksam"):
        wide = "fp64" if dtype == "fp64" else "fp32"  # of the direction
    if average is not None:
        wide = "fp64" if dtype == "fp64" else "fp32"
    constants["BLOCK"] = tile // ITEMSIZE[wide]
    constants["TILES"] = backend.CHUNK // constants["BLOCK"]
    options = {"num_warps": backend.THREADS // target.warp_size}
    if target.backend == "cuda":
        options |= backend.CUDA_OPTIONS
        roomy = name in UPDATES and (dtype == "fp64" or name.endswith("-looksam"))
        if roomy or in_double:
            options |= backend.MANY_REGISTERS
    source = ASTSource(function, *signature(function, types, constants))
    return triton.compile(source, target=target, options=options), constants["BLOCK"]


def blend_of(name):
    """A blend, or what it becomes in the steps that do not climb."""
    blend = BLENDS[name.removesuffix("-reuse")]
    return blend.reuse if name.endswith("-reuse") else blend


def triton_dtype(name):
    return {"fp32": tl.float32, "fp64": tl.float64, "bf16": tl.bfloat16, "fp16": tl.float16}[name]


def signature(function, types, constants):
    """Types, constants and alignments of the arguments, as ASTSource wants them."""
    sig, const, attrs = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        kind = types.get(name)
        if name in constants:
            sig[name], const[(i,)] = "constexpr", constants[name]
        elif isinstance(kind, tuple):
            sig[name] = kind
            attrs |= {(i, j): [["tt.divisibility", 16]] for j in range(len(kind))}
        elif kind is None:
            sig[name], const[(i,)] = "constexpr", None
        else:
            sig[name] = kind
            if kind.startswith("*") and name not in NOT_ALIGNED:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return sig, const, attrs


def tile_loops(ttir):
    """Of each loop over full, aligned chunks: loads and stores of a tile, and bytes of an element.

    Those without a mask.
    """
    loops, stack = [], []
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}") and stack:
            counts = stack.pop()
            if counts is not None and (counts["load"] or counts["store"]):
                loops.append((counts["load"], counts["store"], counts["bytes"]))
        if line.endswith("{"):
            stack.append(Counter() if "scf.for" in line else None)
        access = re.search(r"tt\.(load|store) ([^:{]*).*: tensor<", line)
        if access and access[2].count("%") == (1 if access[1] == "load" else 2):
            innermost = next(counts for counts in reversed(stack) if counts is not None)
            innermost[access[1]] += 1
            innermost["bytes"] += int(re.search(r"!tt.ptr<b?f(\d+)", line)[1]) // 8
    return sorted(loops, reverse=True)


def scalar_accesses(ttir):
    """Loads and stores of single numbers: the tables."""
    return len(re.findall(r"tt\.(?:load|store) .*: !tt\.ptr<", ttir))


def wide_and_narrow(compiled, target):
    """Accesses to global memory that no mask guards: how many are 128 bits wide, how many not."""
    if target.backend == "cuda":
        found = re.findall(r"^\s*(?:ld|st)\.global\.(\S+)", compiled.asm["ptx"], re.MULTILINE)
        wide = [kind for kind in found if kind in ("v4.b32", "v2.b64")]
    else:
        found = re.findall(r"(?:global|buffer)_(?:load|store)_(\w+)", compiled.asm["amdgcn"])
        wide = [kind for kind in found if kind == "dwordx4"]
    return len(wide), len(found) - len(wide)


def wide_under_masks(compiled, target):
    """Accesses of 128 bits that a mask guards; None where masks are branches, as on AMD."""
    if target.backend == "hip":
        return None
    ptx = compiled.asm["ptx"]
    return len(re.findall(r"^\s*@!?%p\d+ (?:ld|st)\.global\.v", ptx, re.MULTILINE))


def resources(compiled, target):
    """Registers of a thread, and bytes of stack and local memory (0: nothing spilled)."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        scratch = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]), scratch + 4 * spilled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        machine_code = _tool("cuobjdump", "-sass", file.name)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    spills = len(re.findall(r"\b(?:LDL|STL)\b", machine_code))
    return int(registers), int(stack) + int(local) + spills


def _tool(name, *args):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def occupancy(registers, arch):
    """Share of a multiprocessor's threads that its registers allow; warps take 256 at a time."""
    per_warp = -(-registers * 32 // 256) * 256
    programs = REGISTER_FILE // (per_warp * backend.THREADS // 32)
    return min(1.0, programs * backend.THREADS / THREADS[arch])


def report(name, dtype, arch):
    """All facts about one kernel as a dict."""
    target = TARGETS[arch]
    compiled, block = build(name, dtype, target)
    wide, narrow = wide_and_narrow(compiled, target)
    registers, spilled = resources(compiled, target)
    loops = tile_loops(compiled.asm["ttir"])
    return {
        "kernel": name,
        "dtype": dtype,
        "arch": arch,
        "loops": [counts for *counts, _ in loops],
        "bytes_per_element": loops[0][-1],
        "accesses_per_thread": [size * block / 16 / backend.THREADS for *_, size in loops],
        "scalar_accesses": scalar_accesses(compiled.asm["ttir"]),
        "wide": wide,
        "narrow": narrow,
        "wide_under_masks": wide_under_masks(compiled, target),
        "registers": registers,
        "spilled": spilled,
        "flushes": compiled.asm.get("ptx", "").count(".ftz"),
        "occupancy": occupancy(registers, arch) if arch in THREADS else None,
    }


def main():
    """Compile everything, print the table, and write it as JSON where asked."""
    results = [
        report(name, dtype, arch)
        for name in KERNELS
        for dtype in ("fp32", "bf16", "bf16-masters")
        for arch in TARGETS
        if (arch == "sm_90" or name in EVERYWHERE)
        and (name in MASTERS or not dtype.endswith("-masters"))
    ]
    print(f"Triton {triton.__version__}\n")
    print("| kernel | dtype | target | loads + stores | bytes/element | registers | occupancy |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        loads, stores = r["loops"][0]
        share = "" if r["occupancy"] is None else f"{r['occupancy']:.0%}"
        print(
            f"| {r['kernel']} | {r['dtype']} | {r['arch']} | {loads} + {stores} "
            f"| {r['bytes_per_element']} | {r['registers']} | {share} |"
        )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
