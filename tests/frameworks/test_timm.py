"""timm: its training loop with ``SAMScaler`` against the textbook."""

import copy
import functools
from contextlib import contextmanager

import pytest
import timm
import torch
from textbook import RHO, Net, assert_same_model, batches, grouped, once_in_two, textbook
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy

from fused_sam import FusedSAM
from fused_sam.integrations.timm import SAMScaler

SGD = {"lr": 0.1, "momentum": 0.9}


def train_one_epoch(model, optimizer, loss_scaler, data, accumulate, autocast=None, **clipping):
    """The loop of timm's train.py, with the forward handed to the scaler."""

    def loss_of(input, target):
        with (autocast or (lambda: torch.autocast("cpu", enabled=False)))():
            loss = cross_entropy(model(input), target)
        return loss / accumulate

    losses = []
    model.train()
    optimizer.zero_grad()
    for i, (input, target) in enumerate(data):
        need_update = (i + 1) % accumulate == 0
        loss = loss_scaler(
            loss_of, optimizer, inputs=(input, target), need_update=need_update, **clipping
        )
        losses.append(loss.item() * accumulate)
        if need_update:
            optimizer.zero_grad()
    return losses


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_is_the_textbook(accumulate, clip):
    data, model = batches(6), Net()
    expected = copy.deepcopy(model)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    clipping = {}
    if clip:
        clipping = {"clip_grad": 0.02, "clip_mode": clip, "parameters": list(model.parameters())}
    scaler = SAMScaler(model, device="cpu", enabled=False)
    losses = train_one_epoch(model, opt, scaler, data, accumulate, **clipping)

    groups = grouped(data, accumulate)
    base = torch.optim.SGD(expected.parameters(), **SGD)
    states = once_in_two(model.drawn, groups)
    options = {f"clip_{clip}": 0.02} if clip else {}
    right = textbook(expected, base, groups, loss_fn, states, **options)
    assert_same_model(model, expected)
    assert losses == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("clip", [None, "norm"])
def test_sixteen_bit_is_the_textbook(clip):
    data, model = batches(6, dtype=torch.float32), Net(torch.float32)
    expected = copy.deepcopy(model)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    clipping = {"clip_grad": 0.05, "parameters": list(model.parameters())} if clip else {}
    half = functools.partial(torch.autocast, "cpu", torch.float16)
    scaler = SAMScaler(model, device="cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train_one_epoch(model, opt, scaler, data, 2, half, **clipping)

    groups = grouped(data, 2)
    base = torch.optim.SGD(expected.parameters(), **SGD)
    states = once_in_two(model.drawn, groups)
    options = {"clip_norm": 0.05} if clip else {}
    textbook(expected, base, groups, loss_fn, states, autocast=half, scale=1024.0, **options)
    assert_same_model(model, expected, atol=5e-4)


def test_the_second_pass_synchronises_with_its_last_micro_batch_alone():
    class Distributed(Net):
        synced, entered = True, ()

        @contextmanager
        def no_sync(self):
            self.synced = False
            yield
            self.synced = True

        def forward(self, x):
            self.entered += (self.synced,)
            return super().forward(x)

    model = Distributed()
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    scaler = SAMScaler(model, device="cpu", enabled=False)
    train_one_epoch(model, opt, scaler, batches(3), 3)
    assert model.entered == (True, True, True, False, False, True)  # the first pass is the loop's


def test_an_overflow_skips_the_step_and_is_told_to_the_scaler():
    model = Net(torch.float32)
    before = copy.deepcopy(model)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    scaler = SAMScaler(model, device="cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    half = functools.partial(torch.autocast, "cpu", torch.float16)
    train_one_epoch(model, opt, scaler, batches(1, dtype=torch.float32), 1, half)
    for actual, expected in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert scaler.state_dict()["scale"] == 2.0**39


def test_a_model_an_optimizer_a_scheduler_and_an_average_of_timm():
    """A network of timm's with its decay groups, cosine schedule and EMA."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, drop_rate=0.2).double()
    expected = copy.deepcopy(model)
    make = functools.partial(create_optimizer_v2, opt="sgd", lr=0.05, weight_decay=1e-2)
    opt = FusedSAM.wrap(make(model), rho=RHO)
    base = make(expected)
    schedule = {"t_initial": 4, "lr_min": 1e-3, "t_in_epochs": False}
    schedules = [CosineLRScheduler(o, **schedule) for o in (opt, base)]
    averages = [ModelEmaV3(m, decay=0.5) for m in (model, expected)]
    scaler = SAMScaler(model, device="cpu", enabled=False)
    drawn = []
    model.register_forward_pre_hook(lambda *_: drawn.append(torch.get_rng_state()))
    images = torch.randn(4, 2, 3, 32, 32, dtype=torch.float64)
    data = [(x, torch.tensor([i % 3, 1])) for i, x in enumerate(images)]
    for i, batch in enumerate(data):
        train_one_epoch(
            model, opt, scaler, [batch], 1, clip_grad=0.05, parameters=list(model.parameters())
        )
        averages[0].update(model)
        schedules[0].step_update(i + 1)

    for i, (group, state) in enumerate(zip(grouped(data, 1), drawn[::2], strict=True)):
        textbook(expected, base, [group], loss_fn, [state], clip_norm=0.05)
        averages[1].update(expected)
        schedules[1].step_update(i + 1)
    assert_same_model(model, expected, atol=1e-11)
    assert_same_model(averages[0].module, averages[1].module, atol=1e-11)
    assert opt.param_groups[0]["lr"] == base.param_groups[0]["lr"] != 0.05


def test_what_an_unmodified_loop_passes_is_refused():
    model = Net()
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    scaler = SAMScaler(model, device="cpu", enabled=False)
    loss = loss_fn(model, batches(1)[0])
    with pytest.raises(TypeError, match="needs the function that computes the loss, got Tensor"):
        scaler(loss, opt, inputs=())
    with pytest.raises(ValueError, match="create_graph=True"):
        scaler(loss_fn, opt, create_graph=True, inputs=())
    with pytest.raises(ValueError, match=r"needs parameters=model.parameters\(\)"):
        scaler(loss_fn, opt, clip_grad=1.0, inputs=())
    with pytest.raises(TypeError, match="SAMScaler needs a FusedSAM, got SGD"):
        scaler(loss_fn, opt.base_optimizer, inputs=())
