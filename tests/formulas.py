"""What the members of the family differ in, for the oracle: from their formulas, in float64.

What each follows when it climbs, and what the base optimizer sees. Each value comes with the
magnitude of the terms that it was summed from: see oracle.py.
"""

import math
from dataclasses import dataclass

import torch

AVERAGED = ("friendly", "vasso")


@dataclass
class Expected:
    """The exact value and the magnitude of the terms that it was summed from; 0: bit for bit."""

    value: torch.Tensor
    magnitude: torch.Tensor | float
    neighbour: bool = False  # rounded to either neighbour, not to the nearest


def exact(tensor):
    """A copy in double precision; every lower precision fits in it."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def real(tensor):
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def climbing_of(groups):
    return [group for group in groups if group["ascent"]]


def directions(groups, grads, averages, unscale):
    """What the climb follows, and the averages that it leaves: {param: Expected} both.

    Args:
        groups: the optimizer's.
        grads: {param: gradient or None}, as they are, scaled.
        averages: {param: average} of those that have one.
        unscale: the inverse of their loss scale.
    """
    found, left = {}, {}
    for group in climbing_of(groups):
        for p in group["params"]:
            if grads.get(p) is None:
                continue
            g, m = exact(grads[p]), averages.get(p)
            if group["ascent"] not in AVERAGED:
                found[p] = Expected(g, real(g).abs())
                continue
            g = unscale * g
            terms = real(g).abs()
            found[p] = left[p] = Expected(g, terms)
            if m is None:
                continue
            m = exact(m)
            size = real(m).abs()
            if group["ascent"] == "friendly":  # Li et al. 2024: the old average, as in their code
                sigma, lam = group["sigma"], group["lam"]
                found[p] = Expected(g - sigma * m, terms + sigma * size)
                left[p] = Expected(lam * m + (1 - lam) * g, lam * size + (1 - lam) * terms)
            else:  # Li & Giannakis 2023
                theta = group["theta"]
                left[p] = Expected((1 - theta) * m + theta * g, (1 - theta) * size + theta * terms)
                found[p] = left[p]
    return found, left


def wsam(groups, first, second, scale=1.0):
    """Yue et al. 2023: {param: (seen, after)} of the climbing ones, each Expected or None.

    The base optimizer sees ``seen``, which is scaled as the gradients are; then the learning rate
    times ``after``, which is not, is subtracted.

    Args:
        groups: the optimizer's.
        first, second: {param: gradient or None} of both passes.
        scale: their loss scale.
    """
    climbing = climbing_of(groups)
    there = [p for group in climbing for p in group["params"] if second.get(p) is not None]
    pairs = {
        p: (None if first.get(p) is None else exact(first[p]), exact(second[p])) for p in there
    }

    def clip(tensors, limit):
        norm = math.sqrt(sum(real(x).square().sum().item() for x in tensors)) / scale
        return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))

    limit, gamma = climbing[0]["blend_max_norm"], climbing[0]["blend_gamma"]
    weight = gamma / (1 - gamma)
    clip1 = clip([g for g, _ in pairs.values() if g is not None], limit)
    clip2 = clip([h for _, h in pairs.values()], limit)
    found = {}
    for p, (g, h) in pairs.items():
        g = torch.zeros_like(h) if g is None else g
        g, h = clip1 * g, clip2 * h
        sizes = real(g).abs(), real(h).abs()
        if climbing[0]["blend"] == "wsam":
            terms = weight / scale * (sizes[0] + sizes[1])
            found[p] = Expected(g, sizes[0]), Expected(weight / scale * (h - g), terms)
        else:
            terms = weight * sizes[1] + abs(1 - weight) * sizes[0]
            found[p] = Expected(weight * h + (1 - weight) * g, terms), None
    return found
