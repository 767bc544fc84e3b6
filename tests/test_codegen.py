"""The Triton kernels as the compiler makes them, for GPUs that are not here.

The interpreter cannot be switched off in this process once triton is imported: scripts do the work.
"""

import itertools
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
BUDGET = {"reduce": 1, "ascend": 4, "sgd-momentum": 5, "adamw": 7}
BUDGET |= {"reduce-friendly": 2, "reduce-vasso": 2, "ascend-friendly": 6, "ascend-vasso": 6}
BUDGET |= {"ascend-keep": 5, "reduce-gram": 2, "sgd-momentum-gsam": 6}
BUDGET |= {"sgd-momentum-wsam": 6, "sgd-momentum-looksam": 7, "sgd-momentum-looksam-reuse": 6}
"""Accesses to each element: the traffic budget of docs/predicted.md, with an average or a blend."""


def _run(script, *args):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / script, *args], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    path = tmp_path_factory.mktemp("codegen") / "results.json"
    print(_run("bench/codegen.py", str(path)))
    return {(r["kernel"], r["dtype"], r["arch"]): r for r in json.loads(path.read_text())}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", BUDGET)
def test_traffic_is_the_budget(kernel, dtype, arch, kernels):
    loads_and_stores, *others = kernels[kernel, dtype, arch]["loops"]
    assert sum(loads_and_stores) == BUDGET[kernel]
    # The other path of update_: a parameter without a gradient is read and written once.
    assert others == ([] if kernel.startswith(("reduce", "ascend")) else [[1, 1]])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("kernel", "size"),
    [("ascend", 10), ("ascend-friendly", 18), ("sgd-momentum", 20), ("adamw", 28)],
)
def test_masters_cost_the_bytes_of_the_budget(kernel, size, arch, kernels):
    """bfloat16 weights and gradients, float32 masters and states; the reduction reads 2 bytes.

    What is looked at and written only where a weight was changed from outside has a mask.
    """
    assert kernels[kernel, "bf16-masters", arch]["bytes_per_element"] == size
    assert kernels["reduce", "bf16", arch]["bytes_per_element"] == 2


def is_mixed(r):
    """Whether buffers are of two dtypes: what members keep of half precision is in float32."""
    members = ("looksam", "friendly", "vasso")
    mixed = r["dtype"] == "bf16" and any(member in r["kernel"] for member in members)
    return mixed or r["dtype"] == "bf16-masters"


@pytest.mark.parametrize("arch", ARCHS)
def test_full_chunks_are_accessed_in_128_bits(arch, kernels):
    """What no mask guards is a tile of a full, aligned chunk, in accesses of 16 bytes, or a number
    from a table.

    LLVM unrolls the loops over tiles, each by a power of 2.
    """
    for r in kernels.values():
        if r["arch"] != arch or arch == "gfx942" or is_mixed(r):
            continue
        tiles = r["accesses_per_thread"]
        unrolled = itertools.product([1, 2, 4, 8, 16], repeat=len(tiles))
        assert r["wide"] in [sum(map(operator.mul, tiles, times)) for times in unrolled], r
        assert r["narrow"] <= r["scalar_accesses"], r


@pytest.mark.parametrize("arch", ARCHS[:-1])
def test_other_chunks_are_accessed_element_by_element(arch, kernels):
    """Guards misaligned slots: the masked path must not get a hint that is meant for the other."""
    # With masters the mask of full chunks says that nothing is perturbed.
    ours = {k: r for k, r in kernels.items() if r["arch"] == arch and k[1] != "bf16-masters"}
    wide = {key: r["wide_under_masks"] for key, r in ours.items()}
    assert wide and not any(wide.values()), wide


def test_amd_has_128_bit_accesses(kernels):
    """There masks are branches, not predicates: masked accesses cannot be told from the others."""
    for r in kernels.values():
        if r["arch"] == "gfx942" and not is_mixed(r):
            assert r["wide"] >= sum(r["accesses_per_thread"]), r


def test_nothing_is_spilled(kernels):
    assert {key: r["spilled"] for key, r in kernels.items() if r["spilled"]} == {}


def test_small_numbers_are_not_flushed_to_zero(kernels):
    """Guards g**2 below 1e-38 under a small eps: a root that flushes it makes 1 / 0."""
    assert {key: r["flushes"] for key, r in kernels.items() if r["flushes"]} == {}


def test_registers_leave_half_of_the_threads_on_sm_90(kernels):
    crowded = {k: r["occupancy"] for k, r in kernels.items() if r["arch"] == "sm_90"}
    assert len(crowded) == 61
    # Three float64 sums for each element of an access: of half precision that is eight.
    assert crowded.pop(("reduce-gram", "fp32", "sm_90")) == 0.25
    assert crowded.pop(("reduce-gram", "bf16", "sm_90")) == 0.25
    # Once in several steps: four to five operands of 16 bytes a thread are on their way even so.
    for rule, dtype in itertools.product(("sgd-momentum", "adamw"), ("fp32", "bf16")):
        assert crowded.pop((f"{rule}-looksam", dtype, "sm_90")) >= 0.25
    assert all(share >= 0.5 for share in crowded.values()), crowded


@pytest.fixture(scope="module")
def results():
    return json.loads(_run("tests/dispatch.py"))


def test_hyperparameters_do_not_recompile(results):
    """Guards run-time hyperparameters: 50 steps in which lr, rho, decay, momentum, betas change."""
    assert results["sgd"]["compiled"] == ["reduce_kernel", "ascend_kernel", "update_kernel"]
    assert results["adamw"]["compiled"] == ["update_kernel"]
    three = ["reduce_kernel", "ascend_kernel", "update_kernel"]
    for rule in ("sgd", "adamw"):
        assert results[rule]["launches"] == [three] * 50


def test_rare_variants_compile_and_launch(results):
    """Guards what the tables of traffic leave out, with the launcher's own types and options.

    Unaligned gradients, groups that keep different state, lr as a tensor, a loss scale: per dtype.
    """
    assert len(results["variants"]) == 12
    for case in results["variants"]:
        assert case["compiled"].count("update_kernel") == 1, case
        two = ["reduce_kernel", "ascend_kernel"]
        one_step = [*two, "restore_kernel", *two, "update_kernel"]
        assert case["launched"] == one_step * 2, case
