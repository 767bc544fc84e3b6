#!/bin/bash
# Everything that needs a GPU, in under ten minutes: tests, memory checks, benchmarks.
#
#   bench/gpu.sh [results folder]
#
# Needs a checkout, and a python3 with CUDA torch, Triton and pytest; no network, nothing installed.
# Where nvcc is, the native backend is built in place first, and takes part.
# A part that fails or takes too long is reported, and the rest still runs. The exit status is 0 if
# all parts succeeded.
cd "$(dirname "$0")/.." || exit 2
results=${1:-bench/results/gpu}
mkdir -p "$results" || exit 2
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}
failures=()
started=$SECONDS

part() { # name, seconds at most, command...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "=== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$results/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failures+=("$name: exit status $status")
    [ "$status" = 124 ] && echo "$name: stopped after $limit s"
    echo "=== $name: $((SECONDS - begin)) s, exit status $status"
}

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "$python has no torch with a CUDA or ROCm GPU; set PYTHON to one that has" >&2
    exit 2
}

if command -v nvcc > /dev/null; then
    part build 120 env FUSED_SAM_BUILD=cuda "$python" setup.py -q build_ext --inplace
    part loads 60 "$python" -m fused_sam.info "native (cuda)"
else
    echo "nvcc is not there: the native backend is left out"
fi
part tests 150 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/test_gpu.py
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" bench/small_case.py
    done
else
    echo "compute-sanitizer is not there: its parts are left out"
fi
part copy 20 "$python" -m bench.gpu copy "$results"
part kernels 70 "$python" -m bench.gpu kernels "$results"
part steps 100 "$python" -m bench.gpu steps "$results"
part host 30 "$python" -m bench.gpu host "$results"
part training 50 "$python" -m bench.gpu training "$results"
part compiled 90 "$python" -m bench.gpu compiled "$results"
if "$python" -c 'import pytest_benchmark, pytorch_optimizer' 2> /dev/null; then
    part suites 75 "$python" -m bench --device cuda --quick --out "$results"
else
    echo "pytest-benchmark or pytorch_optimizer is not there: the suites of make bench are left out"
fi
remaining=$((585 - (SECONDS - started)))
[ "$remaining" -gt 20 ] && part sweep "$remaining" "$python" -m bench.gpu sweep "$results"
"$python" -m bench.gpu table "$results" > "$results/README.md" || failures+=("table")

echo "$((SECONDS - started)) s in all; results are in $results"
[ ${#failures[@]} = 0 ] || {
    printf 'FAILED %s\n' "${failures[@]}"
    exit 1
}
