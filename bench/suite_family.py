"""The members of the family: whole training steps against SGD's, all in turn."""

import os

import torch

from bench.family import measure
from bench.models import MODULES

# device: (network, images in a batch, pixels)
CASES = {"cpu": ("ResNet-18", 8, 64), "cuda": ("ResNet-18", 256, 224)}


def test_family(benchmark, device, quick):
    name, batch, pixels = CASES[device.type]
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(10, (batch,), device=device)
    rounds = 2 if quick else 12
    found = benchmark.pedantic(
        lambda: measure(lambda: MODULES[name]().to(device), images, labels, rounds), rounds=1
    )
    benchmark.extra_info["family"] = {
        "network": name,
        "batch": batch,
        "pixels": pixels,
        "load_after": round(os.getloadavg()[0], 2),
        "members": found,
    }
