"""Accelerate: its loop with ``SAM.backward`` against the textbook."""

import copy
import functools
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from textbook import RHO, Net, assert_same_model, batches, grouped, once_in_two, textbook
from torch.nn.functional import cross_entropy

from fused_sam import FusedSAM
from fused_sam.integrations.accelerate import SAM

SGD = {"lr": 0.1, "momentum": 0.9}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def loss_of(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def prepared(accumulate=1, half=False, dtype=torch.float64):
    """As a user prepares; fp16, which Accelerate has for GPUs only, put in by hand."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if half:
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net = Net(dtype)
    opt = FusedSAM(net.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.7)
    before = copy.deepcopy(net)
    return accelerator, before, *accelerator.prepare(net, opt, scheduler)


def train(accelerator, model, optimizer, scheduler, data, clip=None):
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=None))
    sam = SAM(accelerator, model, optimizer)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of")
        for batch in loader:
            with accelerator.accumulate(model):
                losses.append(sam.backward(loss_of, model, batch).item())
                if accelerator.sync_gradients and clip:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return losses


def reference(net, groups, states, **options):
    opt = torch.optim.SGD(net.parameters(), **SGD)
    after_step = torch.optim.lr_scheduler.StepLR(opt, 1, 0.7).step
    losses = textbook(net, opt, groups, loss_of, states, after_step=after_step, **options)
    return losses, opt


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_is_the_textbook(accumulate, clip):
    data = batches(7)  # the last group is incomplete
    accelerator, expected, model, optimizer, scheduler = prepared(accumulate)
    losses = train(accelerator, model, optimizer, scheduler, data, clip)

    groups = grouped(data, accumulate)
    states = once_in_two(model.drawn, groups)
    right, opt = reference(expected, groups, states, divide_by=accumulate, clip_norm=clip)
    assert_same_model(model, expected)
    assert losses == pytest.approx(right, abs=1e-12)
    assert scheduler.get_last_lr() == [opt.param_groups[0]["lr"]]


def test_sixteen_bit_with_a_scaler_is_the_textbook():
    data = batches(6, dtype=torch.float32)
    accelerator, expected, model, optimizer, scheduler = prepared(2, True, torch.float32)
    train(accelerator, model, optimizer, scheduler, data, clip=0.05)

    groups = grouped(data, 2)
    half = functools.partial(torch.autocast, "cpu", torch.float16)
    states = once_in_two(model.drawn, groups)
    reference(expected, groups, states, clip_norm=0.05, autocast=half, scale=1024.0)
    assert_same_model(model, expected, atol=5e-4)


def test_a_resumed_training_has_the_bits_of_one_without_a_stop(fresh_accelerate):
    data = batches(8)
    accelerator, _, *parts = prepared(2)
    accelerator.register_for_checkpointing(parts[2])
    train(accelerator, *parts, data)
    accelerator.save_state("state")
    train(accelerator, *parts, data)
    straight = copy.deepcopy(parts[0])

    fresh_accelerate()
    accelerator, _, *parts = prepared(2)
    accelerator.register_for_checkpointing(parts[2])
    accelerator.load_state("state")
    train(accelerator, *parts, data)
    assert_same_model(parts[0], straight, atol=0)


def test_a_batch_out_of_the_loops_variables_is_refused_when_accumulating():
    accelerator, _, model, optimizer, _ = prepared(2)
    sam = SAM(accelerator, model, optimizer)
    with pytest.raises(TypeError, match=r"backward\(loss_of, batch\)"):
        sam.backward(lambda: loss_of(model, batches(1)[0]))


def test_another_optimizer_is_refused():
    accelerator, net, *_ = prepared()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"FusedSAM\.wrap"):
        SAM(accelerator, model, optimizer)


def test_deepspeed_is_refused():
    accelerator, _, model, optimizer, _ = prepared()
    AcceleratorState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    with pytest.raises(RuntimeError, match="DEEPSPEED takes steps by itself"):
        SAM(accelerator, model, optimizer)
