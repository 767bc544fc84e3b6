"""Real networks: the optimizer's share of a training step, and training from end to end."""

import statistics

import pytest
import torch
import torch.nn.functional as F

from bench.measure import timed
from bench.models import MODULES
from bench.peers import BASES, best_peers, peers
from fused_sam.batchnorm import frozen_running_stats

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
from fused_sam.demo.data import CLASSES, load_digits, shuffled_batches
from fused_sam.demo.threads import one_thread
from fused_sam.demo.training import BATCH_SIZE, accuracy, make_model

# network: (images in a batch, pixels)
CPU_STEPS = {"ResNet-20": (32, 32), "ResNet-18": (8, 64)}
GPU_STEPS = {"ResNet-18": (256, 224), "ResNet-50": (256, 224)}
EPOCHS = {"demo": 10, "ResNet-20": 6}
EXACT_EPOCHS = {"demo": 3, "ResNet-20": 3}
"""In float64, where rounding is too small for training to amplify it into other accuracies."""
SINGLE_NORM = "pytorch_optimizer"
"""It adds its norm up in float32, whatever the weights' dtype; training amplifies that too."""


class Trainee:
    """A network with an optimizer, and the time that each of its steps takes."""

    def __init__(self, peer, network):
        cls, options = BASES["SGD"]
        self.peer, self.network = peer, network
        self.optimizer = peer.make([{"params": list(network.parameters())}], cls, dict(options))
        self.whole, self.share = [], []

    def step(self, images, labels):
        """One SAM step; notes its time, and that of the optimizer."""
        device = images.device
        optimizer = 0.0

        def whole():
            nonlocal optimizer
            self.network.train()
            F.cross_entropy(self.network(images), labels).backward()
            optimizer += timed(device, self.optimizer.first_step)
            self._forget()
            with frozen_running_stats(self.network):
                F.cross_entropy(self.network(images), labels).backward()
            optimizer += timed(device, self.optimizer.second_step)
            self._forget()

        self.whole.append(timed(device, whole))
        self.share.append(optimizer)

    def _forget(self):
        for p in self.network.parameters():
            p.grad = None


def _rotated(trainees):
    """Another one first in each round, so that no place in the order is anybody's."""
    first = len(trainees[0].whole) % len(trainees)
    return trainees[first:] + trainees[:first]


@pytest.mark.parametrize("name", ["ResNet-20", "ResNet-18", "ResNet-50"])
def test_training_step(benchmark, device, quick, name):
    """A whole step on a real network: forward and backward twice, and the optimizer."""
    cases = CPU_STEPS if device.type == "cpu" else GPU_STEPS
    if name not in cases or (quick and name != "ResNet-20"):
        pytest.skip("not on this device, or not in the quick run")
    batch, pixels = cases[name]
    trainees = []
    for peer in best_peers(device):
        torch.manual_seed(0)
        trainees.append(Trainee(peer, MODULES[name]().to(device)))
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(10, (batch,), device=device)

    def round_of_all():
        for trainee in _rotated(trainees):
            trainee.step(images, labels)

    rounds = 3 if quick else 12
    benchmark.pedantic(round_of_all, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["training_step"] = {
        "network": name,
        "batch": batch,
        "pixels": pixels,
        "whole": {t.peer.name: t.whole[1:] for t in trainees},
        "optimizer": {t.peer.name: t.share[1:] for t in trainees},
    }


def _networks(name, device):
    digits = load_digits().to(device)
    if name == "demo":
        return (lambda: make_model(0).to(device)), digits.train, digits.test

    def coloured(part):
        return type(part)(part.images.expand(-1, 3, -1, -1).contiguous(), part.labels)

    def make():
        torch.manual_seed(0)
        return MODULES[name]().to(device)

    return make, coloured(digits.train), coloured(digits.test)


def _train(trainees, train, epochs):
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for images, labels in shuffled_batches(train, BATCH_SIZE, generator):
            for trainee in _rotated(trainees):
                trainee.step(images, labels)


def _distance(network, reference):
    pairs = zip(network.parameters(), reference.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", ["demo", "ResNet-20"])
def test_end_to_end(benchmark, device, quick, name):
    """Train with every peer, a batch each in turn: the same weights, and the time each took."""
    if quick and name != "demo":
        pytest.skip("not in the quick run")
    make, train, test = _networks(name, device)
    competitors = peers(device) if name == "demo" else best_peers(device)
    epochs, exact_epochs = (1, 1) if quick else (EPOCHS[name], EXACT_EPOCHS[name])
    trainees = [Trainee(peer, make()) for peer in competitors]
    exact = [Trainee(peer, make().double()) for peer in competitors]
    train_exactly, test_exactly = (part.to(device, torch.float64) for part in (train, test))
    with one_thread():
        _train(exact, train_exactly, exact_epochs)
        benchmark.pedantic(lambda: _train(trainees, train, epochs), rounds=1)
    found = benchmark.extra_info["end_to_end"] = {
        "network": name,
        "classes": CLASSES,
        "epochs": epochs,
        "exact_epochs": exact_epochs,
        "steps": len(trainees[0].whole),
        "peers": {
            t.peer.name: {
                "accuracy": accuracy(t.network, test),
                "exact_accuracy": accuracy(e.network, test_exactly),
                "exact_distance": _distance(e.network, exact[0].network),
                "seconds": sum(t.whole),
                "optimizer": sum(t.share),
                "median_step": statistics.median(t.whole),
            }
            for t, e in zip(trainees, exact, strict=True)
        },
    }
    for peer, got in found["peers"].items():
        same = got["exact_distance"] < 1e-6 or peer.startswith(SINGLE_NORM)
        assert same, f"{peer} ends elsewhere: {got}"
