#!/bin/bash
# Everything that needs a GPU, in two calls of nine minutes: what is true, and who is faster.
#
#   bench/gpu.sh truth     tests, kernels one by one, memory checks, DRAM traffic
#   bench/gpu.sh peers     steps against others, graph replay, host time, training, family, whole
#                          training steps as graphs, compiled
#   bench/gpu.sh PART...   these parts only, where one that must be left out fails; `suites` too,
#                          those of `python -m bench`
#
#   RESULTS    where the table and the archive go (bench/results/gpu)
#   DEADLINE   seconds from the start at which all is over (540)
#   COMMIT     what the figures belong to, where there is no git
#   PYTHON     an interpreter with CUDA torch, Triton and pytest (python3)
#   DRY=1      without a GPU: all of it in small on the CPU, whose figures mean nothing
#
# Needs a checkout and no network, and installs nothing. Where nvcc is, the native CUDA library is
# built in place first. A part that fails is reported, and the rest still runs. See bench/parts.sh.
cd "$(dirname "$0")/.." || exit 2
truth="tests kernels memcheck racecheck traffic"
peers="steps host training family graphs training_graphs compiled sweep"
NAMED=
case $* in
    truth) RUN=gpu-truth PARTS=$truth ;;
    peers) RUN=gpu-peers PARTS=$peers ;;
    *) RUN=gpu-parts PARTS=$* NAMED=yes ;;
esac
for name in ${PARTS:-nothing}; do
    [[ " $truth $peers suites " == *" $name "* ]] || {
        echo "bench/gpu.sh: no part is called $name; choose truth, peers, or of these:" \
            "$truth $peers suites" >&2
        exit 2
    }
done
PARTS="facts build $PARTS"

python=${PYTHON:-python3}
device=cuda library=fused_sam/_native_cuda.abi3.so
export python device library PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # nobody knows which plugins are there
unset TRITON_INTERPRET
if [ -n "$DRY" ]; then
    device=cpu library=fused_sam/_native.abi3.so
    export CUDA_VISIBLE_DEVICES= FUSED_SAM_TEST_DEVICE=cpu TRITON_INTERPRET=1
else
    TORCH_CUDA_ARCH_LIST=$("$python" -c \
        'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
        echo "$python has no torch that sees a GPU; set PYTHON to one that has" >&2
        exit 2
    }
    export TORCH_CUDA_ARCH_LIST
fi

build() { # the native library, unless it is newer than its sources; it must load
    if [ -n "$(find csrc setup.py -newer "$library" 2>&1)" ]; then
        FUSED_SAM_BUILD=$device "$python" setup.py -q build_ext --inplace || return
    fi
    "$python" -c "from fused_sam.backends import native; exit(native.missing('$device'))"
}
export -f build

table() {
    "$python" -m bench.gpu_table "$work"
}

RESULTS=${RESULTS:-bench/results/gpu} DEADLINE=${DEADLINE:-540}
. bench/parts.sh

measured() { # NAME, and the rest as for part: a part of bench/gpu.py
    part "$@" "$python" -m bench.gpu "$1" "$work"
}

there() { # NAME TOOL: whether the tool that this part needs is there
    wanted "$1" || return
    [ -n "$DRY" ] || command -v "$2" > /dev/null || {
        left_out "$1" "$2 is not there"
        return 1
    }
}

# The least is what a part needs to be worth beginning; the limits of a call add up to its time.
measured facts 5 20
if [ -n "$DRY" ] || command -v nvcc > /dev/null; then
    part build 5 90 bash -c build
else
    note build "left out: nvcc is not there, and the native CUDA kernels take no part" 0
fi
# A test that hangs is named; a warning of that machine must not hide what a test says.
part tests 30 140 "$python" -m pytest -v -p no:cacheprovider -W default \
    -o faulthandler_timeout=100 tests/test_gpu.py
measured kernels 20 75
for name in memcheck racecheck; do
    sanitizer=(compute-sanitizer --tool $name --error-exitcode 1)
    # torch asks the driver questions whose answer may be an error: these are no faults.
    [ $name != memcheck ] || sanitizer+=(--report-api-errors no)
    [ -z "$DRY" ] || sanitizer=()
    there $name compute-sanitizer &&
        part $name 20 65 "${sanitizer[@]}" "$python" -m bench.small_case
done
there traffic ncu && part traffic 20 70 "$python" -m bench.traffic "$work"

measured steps 30 95
measured host 10 20
measured training 20 40
measured family 20 60
measured graphs 30 75
measured training_graphs 20 60
measured compiled 40 85
measured sweep 15 40
if "$python" -c 'import pytest_benchmark' 2> /dev/null; then
    part suites 60 400 env PYTEST_ADDOPTS="-p benchmark" \
        "$python" -m bench --device $device --quick --out "$work"
elif wanted suites; then
    left_out suites "pytest-benchmark is not installed"
fi
