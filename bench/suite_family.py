"""The members of the family: whole training steps against SGD's, all in turn."""

import os

import torch

from bench.family import measure
from bench.models import MODULES

# device: (network, pixels, {images in a batch: rounds})
CASES = {"cpu": ("ResNet-18", 64, {8: 16, 32: 6}), "cuda": ("ResNet-18", 224, {32: 12, 256: 12})}


def test_family(benchmark, device, quick):
    name, pixels, batches = CASES[device.type]

    def measured(batch, rounds):
        images = torch.randn(batch, 3, pixels, pixels, device=device)
        labels = torch.randint(10, (batch,), device=device)
        members = measure(lambda: MODULES[name]().to(device), images, labels, rounds)
        return {"batch": batch, "members": members}

    def all_of_them():
        return [measured(batch, 1 if quick else rounds) for batch, rounds in batches.items()]

    benchmark.extra_info["family"] = {
        "network": name,
        "pixels": pixels,
        "batches": benchmark.pedantic(all_of_them, rounds=1),
        "load_after": round(os.getloadavg()[0], 2),
    }
