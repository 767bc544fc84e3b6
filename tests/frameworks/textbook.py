"""The textbook loop that every framework is compared with, and the model it is compared on.

The loop is the paper's, parameter by parameter, around the real ``torch.optim`` class; it shares
nothing with the package. Everything is float64 unless a test is about a narrower type, so that two
right computations agree to 1e-12 and a wrong one is off by 1e-6 and more.
"""

import copy
from contextlib import nullcontext

import torch
from torch import nn

RHO = 0.1


class Net(nn.Module):
    """Linear, BatchNorm, dropout: what a second pass can get wrong. Notes its random states.

    ``drawn`` holds the CPU generator's state before each training forward.
    """

    def __init__(self, dtype=torch.float64, features=6, classes=3):
        super().__init__()
        # No bias: BatchNorm takes it out again, its gradient is rounding, and Adam follows it.
        self.first = nn.Linear(features, 8, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm1d(8, dtype=dtype)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(8, classes, dtype=dtype)
        self.drawn = []

    def forward(self, x):
        if self.training:
            self.drawn.append(torch.get_rng_state())
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


def batches(count, size=5, dtype=torch.float64, features=6, classes=3, seed=1):
    """``count`` batches (x, y) of ``size`` rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count * size, features, dtype=dtype, generator=generator)
    y = torch.randint(classes, (count * size,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def grouped(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def once_in_two(states, groups):
    """The random states of the first passes; those of the second must be the same ones.

    ``states`` are those of all forwards: for each group first pass, then second pass.
    """
    firsts, i = [], 0
    for group in groups:
        first, second = states[i : i + len(group)], states[i + len(group) : i + 2 * len(group)]
        i += 2 * len(group)
        assert len(second) == len(group), "a forward is missing"
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b), "the second pass has drawn other random numbers"
        firsts += first
    assert i == len(states), f"{len(states)} forwards, {i} expected"
    return firsts


def textbook(
    model,
    optimizer,
    groups,
    loss_fn,
    states,
    *,
    rho=RHO,
    divide_by=None,
    clip_norm=None,
    clip_value=None,
    autocast=nullcontext,
    scale=1.0,
    after_step=lambda: None,
):
    """Train ``model`` by SAM; returns the loss at w of each micro-batch.

    Args:
        groups: for each step its micro-batches.
        states: the random state of each micro-batch's forward.
        rho: of all steps, or a list with that of each.
        divide_by: what each loss is divided by; the size of the group if None.
        scale: the loss scale.
    """
    losses, states = [], iter(states)
    rhos = iter(rho if isinstance(rho, list) else [rho] * len(groups))
    params = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for group in groups:
        share = divide_by or len(group)
        drawn = [next(states) for _ in group]

        def backward(group=group, drawn=drawn, share=share):
            values = []
            for p in params:
                p.grad = None
            for batch, state in zip(group, drawn, strict=True):
                torch.set_rng_state(state)
                with autocast():
                    loss = loss_fn(model, batch)
                values.append(loss.item())
                (loss / share * scale).backward()
            return values

        losses += backward()
        radius = next(rhos)
        w = [p.detach().clone() for p in params]
        buffers = copy.deepcopy(dict(model.named_buffers()))
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        with torch.no_grad():
            for p in params:
                p.add_(p.grad * (radius / norm))
        backward()
        with torch.no_grad():
            for p, before in zip(params, w, strict=True):
                p.copy_(before)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for p in params:
            p.grad /= scale
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, clip_norm)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(params, clip_value)
        optimizer.step()
        after_step()
    return losses


def assert_same_model(actual, expected, atol=1e-12):
    """Parameters and running statistics, all of them."""
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        off = (actual[name] - value).abs().max().item()
        assert off <= atol, f"{name} is off by {off:.3g}"
