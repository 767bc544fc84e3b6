"""What rounding leaves of the climb of half-precision weights.

    python bench/half_precision.py

For models of several sizes, with w ~ N(0, 0.02) and rho = 0.05: the projection of the actual move
on the gradient, in units of rho, and the length of the whole move, noise included; rounded at
random, as FusedSAM does, and to nearest. A bucket of 2 million weights with the same step for each
of them stands for the model. Prints the table of docs/half_precision.md.
"""

import torch

from fused_sam import FusedSAM

ELEMENTS = 2_000_000
RHO, SPREAD = 0.05, 0.02
SIZES = {"1 M": 1e6, "11.7 M": 11.7e6, "25 M": 25e6, "124 M": 124e6, "1 B": 1e9, "7 B": 7e9}


def left(move, g, rho):
    """The projection of a move on g, and its length, in units of rho."""
    return (move * g).sum().item() / g.norm().item() / rho, move.norm().item() / rho


def measure(dtype, parameters):
    """``left`` by FusedSAM and by rounding to nearest."""
    rho = RHO * (ELEMENTS / parameters) ** 0.5
    w = (torch.randn(ELEMENTS) * SPREAD).to(dtype)
    g = torch.randn(ELEMENTS).to(dtype)
    p = torch.nn.Parameter(w.clone())
    p.grad = g.clone()
    FusedSAM([p], torch.optim.SGD, rho=rho, lr=0.1).first_step()
    exact = w.float() + rho / g.float().norm() * g.float()
    moves = p.detach().double() - w.double(), exact.to(dtype).double() - w.double()
    return [left(move, g.double(), rho) for move in moves]


def main():
    """Measure and print."""
    torch.manual_seed(0)
    print("| parameters | dtype | at random | its length | to nearest | its length |")
    print("|---|---|---|---|---|---|")
    for name, parameters in SIZES.items():
        for dtype in (torch.bfloat16, torch.float16):
            (along, length), (near, near_length) = measure(dtype, parameters)
            kind = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {kind} | {along:.3f} | {length:.1f} | {near:.3f} | {near_length:.1f} |"
            )


if __name__ == "__main__":
    main()
