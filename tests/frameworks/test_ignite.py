"""Ignite: ``create_sam_trainer`` against the textbook."""

import copy
import functools

import pytest
import torch
from ignite.engine import DeterministicEngine, Events
from textbook import RHO, Net, assert_same_model, batches, grouped, once_in_two, textbook
from torch.nn.functional import cross_entropy

from fused_sam import FusedSAM
from fused_sam.integrations.ignite import create_sam_trainer

SGD = {"lr": 0.1, "momentum": 0.9}


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def run(model, data, epochs=1, **options):
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    trainer = create_sam_trainer(model, opt, cross_entropy, **options)
    losses = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output)
    )
    trainer.run(data, max_epochs=epochs)
    return losses, trainer, opt


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_is_the_textbook(accumulate):
    data, model = batches(5), Net()  # a group goes on in the next epoch, as in Ignite's trainer
    expected = copy.deepcopy(model)
    losses, *_ = run(model, data, 2, gradient_accumulation_steps=accumulate)

    groups = grouped(data + data, accumulate)
    base = torch.optim.SGD(expected.parameters(), **SGD)
    right = textbook(expected, base, groups, loss_fn, once_in_two(model.drawn, groups))
    assert_same_model(model, expected)
    assert losses == pytest.approx(right, abs=1e-12)


def test_sixteen_bit_with_a_scaler_is_the_textbook():
    data, model = batches(6, dtype=torch.float32), Net(torch.float32)
    expected = copy.deepcopy(model)
    run(
        model,
        data,
        amp_mode="amp",
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
        gradient_accumulation_steps=2,
    )
    groups = grouped(data, 2)
    base = torch.optim.SGD(expected.parameters(), **SGD)
    textbook(
        expected,
        base,
        groups,
        loss_fn,
        once_in_two(model.drawn, groups),
        autocast=functools.partial(torch.autocast, "cpu"),  # bfloat16 there
        scale=1024.0,
    )
    assert_same_model(model, expected, atol=2e-3)


def test_what_a_user_hands_over_is_used_as_in_ignites_own_trainer():
    model = Net()
    seen = []

    def prepare_batch(batch, device, non_blocking):
        seen.append((device, non_blocking))
        return batch["x"], batch["y"]

    def output_transform(x, y, y_pred, loss):
        return {"x": x, "y": y, "y_pred": y_pred, "loss": loss}

    data = [{"x": x, "y": y} for x, y in batches(2)]
    losses, trainer, _ = run(
        model,
        data,
        device="cpu",
        non_blocking=True,
        prepare_batch=prepare_batch,
        model_fn=lambda model, x: {"out": model(x)},
        model_transform=lambda output: output["out"],
        output_transform=output_transform,
        deterministic=True,
        scaler=True,
    )
    assert seen == [("cpu", True)] * 2
    assert isinstance(trainer, DeterministicEngine)
    assert isinstance(trainer.state.scaler, torch.amp.GradScaler)
    right = cross_entropy(losses[1]["y_pred"], losses[1]["y"])
    torch.testing.assert_close(losses[1]["loss"], right, rtol=0, atol=0)


def test_a_run_that_was_stopped_within_a_group_begins_a_new_one():
    model = Net()
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    trainer = create_sam_trainer(model, opt, cross_entropy, gradient_accumulation_steps=2)
    data = batches(4)
    stop = trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate()
    )
    trainer.run(data, max_epochs=1)
    stop.remove()
    before = copy.deepcopy(model)
    drawn = model.drawn = []
    base = torch.optim.SGD(before.parameters(), **SGD)
    base.load_state_dict(copy.deepcopy(opt.base_optimizer.state_dict()))
    trainer.state.iteration = trainer.state.epoch = 0
    trainer.state.epoch_length = None
    trainer.run(data[2:], max_epochs=1)
    groups = [data[2:]]
    textbook(before, base, groups, loss_fn, once_in_two(drawn, groups))
    assert_same_model(model, before)


def test_a_second_pass_that_raises_leaves_the_weights():
    model = Net()
    opt = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)

    def failing(y_pred, y):
        if opt.is_perturbed:
            raise KeyboardInterrupt
        return cross_entropy(y_pred, y)

    trainer = create_sam_trainer(model, opt, failing)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        trainer.run(batches(1))
    assert not opt.is_perturbed
    for actual, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amp_mode": "apex"}, "amp_mode='apex' is not supported"),
        ({"gradient_accumulation_steps": 0}, "must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_had_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        run(Net(), batches(1), **options)
