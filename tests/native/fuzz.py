"""Calls the CPU operations with tables that are wrong in random places: run as a script.

    python fuzz.py LIBRARY CALLS

A sanitizer watches, if the library was built with one. What is wrong must be refused, or do no
harm. Addresses and dtypes of gradients stay right, or
are refused: nobody can check those.
"""

import random
import sys

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMBERS = (-(2**63), -1, 0, 1, 2, 63, 64, 65, 128, 2**31, 2**62, 2**63 - 1)
STATES = 3


class Arguments:
    """Right ones, made anew for every call."""

    def __init__(self):
        self.dtype = random.choice(DTYPES)
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        sizes = [random.choice((0, 1, 5, 64, 70)) for _ in range(random.randint(1, 4))]
        pinned = random.randint(0, len(sizes))
        moved = len(sizes) - pinned
        table, start = [], 0
        for numel in sizes:
            table += [start, numel, random.randrange(2), 0]
            start += -(-numel // 64) * 64
        end = table[4 * moved] if pinned else start
        self.size = start
        grad_dtype = random.choice((self.dtype, random.choice(DTYPES)))
        self.grads = [torch.randn(max(n, 1)).to(grad_dtype) for n in sizes]
        masters = self.dtype.itemsize == 2 and random.random() < 0.5
        self.values = {
            "weights": self.buffer(end),
            "pinned": [self.buffer(n) for n in sizes[moved:]],
            "saved": self.buffer(start, torch.float32 if masters else None),
            "grad_dtype": DTYPES.index(grad_dtype),
            "climb": torch.zeros(1, dtype=torch.int64),
            "slots": torch.tensor(table),
            "grads": torch.tensor([grad.data_ptr() for grad in self.grads]),
            "flags": torch.randint(0, 1 << 8, (len(sizes),), dtype=torch.int32)
            | random.choice((0, 1, 3, 7)) << 8,
            "total": torch.rand(1, dtype=torch.float64),
            "step": random.choice((None, torch.ones(len(sizes)))),
            "grad_scale": random.choice((None, torch.ones((), dtype=self.compute))),
            "found_inf": random.choice((None, torch.zeros(()))),
            "number": random.randrange(8),
        }
        self.values["kept"] = random.choice((None, self.buffer(start, grad_dtype)))
        self.values["earlier"] = random.choice((None, self.numbers()))
        self.values["numbers"] = random.choice((None, self.numbers()))
        self.values["blend_hyper"] = random.choice((None, torch.rand(2, dtype=self.compute)))
        self.values["blend"] = random.choice((-1, -1, -1, 0, 1))
        self.values |= {
            f"state{k}": self.buffer(start, random.choice((None, *DTYPES))) for k in range(STATES)
        }

    def buffer(self, numel, dtype=None):
        return torch.randn(numel).to(dtype or self.dtype)

    def numbers(self):
        return torch.rand(random.choice((1, 2, 3)), dtype=torch.float64)

    def spoil(self):
        """Make one of them wrong; or leave it, or make it right by chance."""
        name = random.choice([*self.values])
        value = self.values[name]
        if name in ("slots", "flags") and value.numel() and random.random() < 0.8:
            number = random.choice(NUMBERS)
            value[random.randrange(value.numel())] = (
                number if name == "slots" else number & 0x7FFFFFFF
            )
        elif isinstance(value, list):
            self.values[name] = value[1:] if value and random.random() < 0.5 else [*value, *value]
        elif isinstance(value, torch.Tensor):
            self.values[name] = random.choice(
                (value[:-1] if value.dim() else value, value.double(), value.int(), value.t())
            )
        else:
            numbers = ("number", "blend", "grad_dtype")
            self.values[name] = random.choice((-1, 7, 2**40)) if name in numbers else None

    def call(self, operation):
        """Call an operation; returns whether it took the arguments."""
        v = self.values
        hyper = torch.rand(random.choice((2 * 2520, 2 * 2520, 13)), dtype=self.compute)
        head = (v["weights"], v["pinned"])
        tables = (v["slots"], v["grads"], v["flags"])
        arguments = {
            "reduce": (
                *(*head, v["saved"], v["kept"], v["earlier"], None, *tables),
                *(hyper, v["grad_dtype"], v["number"]),
            ),
            "ascend_": (
                *(*head, v["saved"], v["kept"], v["climb"], *tables, hyper),
                *(v["total"], v["grad_dtype"], 1, v["number"]),
            ),
            "update_": (
                *(*head, *[v[f"state{k}"] for k in range(STATES)], v["step"], None),
                *(v["climb"], v["saved"], v["kept"], *tables, hyper, v["numbers"]),
                *(v["blend_hyper"], v["grad_scale"], v["found_inf"]),
                *(v["grad_dtype"], v["number"], v["blend"]),
            ),
            "restore_": (*head, v["climb"], v["saved"], v["slots"], v["flags"]),
        }[operation]
        try:
            getattr(torch.ops.fused_sam, operation).default(*arguments)
        except (RuntimeError, TypeError):
            return False
        return True


def main(library, calls):
    """Fuzz; prints how many calls were taken and how many refused."""
    torch.ops.load_library(library)
    random.seed(0)
    torch.manual_seed(0)
    counts = {True: 0, False: 0}
    for _ in range(calls):
        arguments = Arguments()
        for _ in range(random.choice((0, 1, 1, 1, 2))):
            arguments.spoil()
        counts[arguments.call(random.choice(("reduce", "ascend_", "update_", "restore_")))] += 1
    print(counts[True], counts[False])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
