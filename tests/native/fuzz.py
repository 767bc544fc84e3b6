"""Calls the CPU operations with tables that are wrong in random places: run as a script.

    python fuzz.py LIBRARY CALLS

A sanitizer watches, if the library was built with one. What is wrong must be refused, or do no
harm. Addresses of weights and gradients stay right, and lead to memory for as many elements as a
bucket has, of the widest type: nobody can check those.
"""

import functools
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
        size = sum([-(-numel // 64) * 64 for numel in sizes])
        wide = functools.partial(torch.randn, size, dtype=torch.float64)
        self.weights, self.grads = [[wide() for _ in sizes] for _ in range(2)]
        grad_dtype = random.choice((self.dtype, random.choice(DTYPES)))
        masters = self.dtype.itemsize == 2 and random.random() < 0.5
        table, start = [], 0
        for numel, weights in zip(sizes, self.weights, strict=True):
            table += [start, numel, random.randrange(2), weights.data_ptr()]
            start += -(-numel // 64) * 64
        self.values = {
            "saved": self.buffer(start, torch.float32 if masters else None),
            "weight_dtype": DTYPES.index(self.dtype),
            "grad_dtype": DTYPES.index(grad_dtype),
            "climb": torch.zeros(1, dtype=torch.int64),
            "slots": torch.tensor(table),
            "grads": torch.tensor([grad.data_ptr() for grad in self.grads]),
            "flags": torch.randint(0, 1 << 8, (len(sizes),), dtype=torch.int32)
            | random.choice((0, 1, 3, 7)) << 8
            | random.choice((0, 1, 2, 3)) << 16,
            "total": torch.rand(1, dtype=torch.float64),
            "step": random.choice((None, torch.ones(len(sizes)))),
            "grad_scale": random.choice((None, torch.ones((), dtype=self.compute))),
            "found_inf": random.choice((None, torch.zeros(()))),
            "number": random.randrange(10),
        }
        kept_dtype = random.choice((grad_dtype, random.choice(DTYPES)))
        self.values["kept"] = random.choice((None, self.buffer(start, kept_dtype)))
        self.values["average"] = random.choice((None, self.buffer(start, self.compute)))
        self.values["earlier"] = random.choice((None, self.numbers()))
        self.values["numbers"] = random.choice((None, self.numbers()))
        self.values["blend_hyper"] = random.choice(
            (None, torch.rand(2, dtype=self.compute), torch.rand(4, dtype=self.compute))
        )
        self.values["loss_scale"] = random.choice((None, torch.ones((), dtype=torch.float64)))
        self.values["blend"] = random.choice((-1, -1, -1, 0, 1, 2, 3, 4))
        there = self.values["blend"] == 3  # LookSAM's leaves a direction
        self.values["direction"] = self.buffer(start, self.compute) if there else None
        self.values["squares"] = random.choice((None, torch.zeros(1, dtype=torch.float64)))
        self.values["decay"] = random.choice((None, torch.rand(1008, dtype=self.compute)))
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
            if name == "slots":
                value.view(-1, 4)[random.randrange(len(self.weights)), random.randrange(3)] = number
            else:
                value[random.randrange(value.numel())] = number & 0x7FFFFFFF
        elif isinstance(value, torch.Tensor):
            self.values[name] = random.choice(
                (value[:-1] if value.dim() else value, value.double(), value.int(), value.t())
            )
        else:
            numbers = ("number", "blend", "weight_dtype", "grad_dtype")
            self.values[name] = random.choice((-1, 1, 7, 2**40)) if name in numbers else None

    def call(self, operation):
        """Call an operation; returns whether it took the arguments."""
        v = self.values
        hyper = torch.rand(random.choice((2 * 2520, 2 * 2520, 13)), dtype=self.compute)
        tables = (v["slots"], v["grads"], v["flags"])
        dtypes = v["weight_dtype"], v["grad_dtype"]
        arguments = {
            "reduce": (
                *(v["saved"], v["kept"], v["average"], v["earlier"], None, *tables),
                *(hyper, *dtypes, v["number"]),
            ),
            "ascend_": (
                *(v["saved"], v["kept"], v["average"], v["climb"], *tables, hyper),
                *(v["total"], None, 1, *dtypes, v["number"]),
            ),
            "update_": (
                *(*[v[f"state{k}"] for k in range(STATES)], v["step"], None),
                *(v["climb"], v["saved"], v["kept"], v["direction"]),
                *(
                    v["squares"],
                    *tables,
                    hyper,
                    v["decay"],
                    v["numbers"],
                    v["blend_hyper"],
                    v["loss_scale"],
                ),
                *(v["grad_scale"], v["found_inf"]),
                *(*dtypes, v["number"], v["blend"]),
            ),
            "restore_": (v["climb"], v["saved"], v["slots"], v["flags"], v["weight_dtype"]),
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
