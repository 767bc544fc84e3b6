"""Predicted GPU time of a SAM step, from bytes and bandwidth alone.

python -m bench.predict > docs/predicted.md
"""

from . import workloads

GPUS = {"A100 80GB SXM": 2039e9, "H100 SXM": 3350e9, "H200 SXM": 4800e9}
"""Bytes per second of memory bandwidth by NVIDIA's datasheets."""
SHARE = 0.9 * 0.9
"""Of the datasheet's bandwidth: a large copy reaches 90 %, and the kernels 90 % of a copy."""
LAUNCHES = 3 * 2e-6
"""Seconds: three kernels, about 2 us each from one's end to the next one's start."""
ACCESSES = {"SGD with momentum": 10, "AdamW": 12}
MODELS = ["ResNet-18", "ResNet-50", "WRN-28-10", "ViT-B/16", "GPT-2-small"]


INTRODUCTION = """
**These figures are predictions. Nobody has measured them.** They are the GPU time of `first_step` +
`second_step` in float32, without forward and backward, from the traffic budget (10 accesses of 4
bytes per parameter for SGD with momentum, 12 for AdamW) and the datasheet's memory bandwidth, of
which a large copy is taken to reach 90 %, and the kernels 90 % of that copy; plus 2 µs for each of
three launches. Gradients that are still in the L2 cache, which would make it faster, are not
counted. `bench/gpu.sh` measures.
"""


def seconds(numel: int, accesses: int, bandwidth: float) -> float:
    """Time of a SAM step without forward and backward, fp32."""
    return 4 * numel * accesses / (bandwidth * SHARE) + LAUNCHES


def main() -> None:
    """Print the page."""
    print("# Predicted time of a SAM step")
    print(INTRODUCTION)
    print("| model | parameters | base | " + " | ".join(GPUS) + " |")
    print("|---|---|---|" + "---|" * len(GPUS))
    for name in MODELS:
        numel = workloads.model(name).numel
        for base, accesses in ACCESSES.items():
            times = [f"{1e3 * seconds(numel, accesses, rate):.2f} ms" for rate in GPUS.values()]
            print(f"| {name} | {numel:,} | {base} | " + " | ".join(times) + " |")


if __name__ == "__main__":
    main()
