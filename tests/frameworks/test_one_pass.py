"""Momentum-SAM in every framework: it trains ahead of w, and all that is evaluated or saved is w.

The textbook keeps w after each step. The model notes its weights in each evaluation.
"""

import copy
import functools
from pathlib import Path

import fastai.callback.progress  # noqa: F401  (gives Learner its no_bar)
import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from fastai.basics import Learner
from fastai.callback.core import Callback as FastCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastDataLoader
from fastai.optimizer import OptimWrapper
from ignite.engine import Events, create_supervised_evaluator
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint
from skorch.helper import predefined_split
from textbook import Net, batches, grouped
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback, TrainingArguments

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM
from fused_sam.integrations.accelerate import SAM
from fused_sam.integrations.fastai import SAMCallback
from fused_sam.integrations.ignite import create_sam_trainer
from fused_sam.integrations.lightning import SAMMixin
from fused_sam.integrations.skorch import SAMNetMixin
from fused_sam.integrations.timm import SAMScaler
from fused_sam.integrations.transformers import SAMTrainer

RHO, SGD = 0.3, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


class Watched(Net):
    """Notes the weights that are evaluated."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        self.seen = []

    def forward(self, x):
        if not self.training:
            self.seen.append(weights_of(self))
        return super().forward(x)


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def msam(params):
    return FusedSAM(params, torch.optim.SGD, rho=RHO, ascent=MSAM(), **SGD)


def textbook(model, groups, states):
    """Becker et al.'s loop on ``model``; returns w after 0, 1, 2, ... steps."""
    params, states = [p for p in model.parameters() if p.requires_grad], iter(states)
    buffers = [torch.zeros_like(p) for p in params]
    history = [[p.detach().clone() for p in params]]
    model.train()
    for group in groups:
        for p, w, v in zip(params, history[-1], buffers, strict=True):
            length = torch.stack([v.norm() for v in buffers]).norm()
            p.data.copy_(w - RHO * v / length if length > 0 else w)
            p.grad = None
        for batch in group:
            torch.set_rng_state(next(states))
            (loss_fn(model, batch) / len(group)).backward()
        new = []
        for p, w, v in zip(params, history[-1], buffers, strict=True):
            v.mul_(SGD["momentum"]).add_(p.grad + SGD["weight_decay"] * p.detach())
            new.append(w - SGD["lr"] * v)
        history.append(new)
    for p, w in zip(params, history[-1], strict=True):
        p.data.copy_(w)
    assert next(states, None) is None, "there were more forwards than one for each batch"
    return history


def assert_weights(actual, expected, atol=1e-12):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def check(before, model, groups, evaluated, atol=1e-12):
    """The model is at the textbook's w, and what it was evaluated at was w after as many steps."""
    history = textbook(before, groups, model.drawn)
    assert_weights(weights_of(model), history[-1], atol)
    assert len(model.seen) == len(evaluated)
    for seen, steps in zip(model.seen, evaluated, strict=True):
        assert_weights(seen, history[steps], atol)
    for name, buffer in before.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=atol)
    return history


# -------------------------------------------------------------------------------------- Lightning


class Module(SAMMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Watched()

    def training_step(self, batch, batch_idx):
        return loss_fn(self.net, batch)

    def validation_step(self, batch, batch_idx):
        loss_fn(self.net, batch)

    def configure_optimizers(self):
        return msam(self.parameters())


def fit(module, data, epochs=1, ckpt_path=None, **options):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, DataLoader(data[:1], batch_size=None), ckpt_path=ckpt_path)
    return trainer


class SavingByHand(Callback):
    """Saves after each batch, in the middle of a step, too."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(f"{batch_idx}.ckpt")


def test_lightning_validates_and_saves_w_in_the_middle_of_a_step():
    data, module = batches(6), Module()
    before = copy.deepcopy(module.net)
    trainer = fit(
        module, data, accumulate_grad_batches=2, val_check_interval=1, callbacks=[SavingByHand()]
    )
    history = check(before, module.net, grouped(data, 2), [0, 1, 1, 2, 2, 3])
    for i, steps in enumerate([0, 1, 1, 2, 2, 3]):
        saved = torch.load(f"{i}.ckpt", weights_only=False)
        names = [f"net.{name}" for name, _ in before.named_parameters()]
        assert_weights([saved["state_dict"][name] for name in names], history[steps])
    assert not trainer.optimizers[0].is_perturbed


def test_lightning_averages_w():
    """The average is swapped in for a validation in the middle of a step, and out again."""
    data, module = batches(4), Module()
    before = copy.deepcopy(module.net)
    ema = EMAWeightAveraging(decay=0.5)
    fit(module, data, accumulate_grad_batches=2, val_check_interval=1, callbacks=[ema])
    history = textbook(before, grouped(data, 2), module.net.drawn)
    average = [0.5 * (a + b) for a, b in zip(history[1], history[2], strict=True)]
    expected = [history[0], history[1], history[1], average]  # it begins with the first step
    for seen, weights in zip(module.net.seen, expected, strict=True):
        assert_weights(seen, weights)
    assert_weights(weights_of(module.net), average)


def test_lightnings_swa_gathers_statistics_at_the_average():
    """Its last epoch runs the model in training mode to gather them, and takes no step."""
    data, module = batches(3), Module()
    before = copy.deepcopy(module.net)
    swa = StochasticWeightAveraging(swa_lrs=SGD["lr"], swa_epoch_start=1, annealing_epochs=1)
    trainer = fit(module, data, 3, callbacks=[swa])
    history = textbook(before, grouped(data * 3, 1), module.net.drawn[:9])
    # Of the weights with which the epochs begin.
    average = [sum(w) / 3 for w in zip(history[0], history[3], history[6], strict=True)]
    assert_weights(weights_of(module.net), average)
    outputs = [nn.functional.linear(x, average[0]) for x, _ in data]
    assert len(module.net.drawn) == 12
    mean = sum(y.mean(0) for y in outputs) / 3
    torch.testing.assert_close(module.net.norm.running_mean, mean, rtol=0, atol=1e-12)
    assert not trainer.optimizers[0].is_perturbed


def test_a_resumed_lightning_run_has_the_bits_of_one_without_a_stop():
    data = batches(5)

    def run(stops):
        torch.manual_seed(3)
        module, path = Module(), None
        for epochs in stops:
            module.net.drop.p = 0.0  # Lightning keeps no random states
            trainer = fit(module, data, epochs, path, accumulate_grad_batches=2)
            trainer.save_checkpoint(path := "last.ckpt")
            module = module if epochs == stops[-1] else Module()
        return weights_of(module.net)

    assert_weights(run([1, 2]), run([2]), atol=0)


# ----------------------------------------------------------------------------------- transformers


class Classifier(nn.Module):
    """A model as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.net = Watched()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class SavingModels(TrainerCallback):
    """Calls ``save_model`` after each micro-batch."""

    trainer, count = None, 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.trainer.save_model(f"by_hand/{self.count}")
        self.count += 1

    on_step_end = on_substep_end


def hugging_face(output, epochs=1, **options):
    rows = [{"x": x[i], "labels": y[i]} for x, y in batches(6) for i in range(len(y))]
    args = TrainingArguments(
        output, per_device_train_batch_size=5, per_device_eval_batch_size=30,
        num_train_epochs=epochs, use_cpu=True, report_to=[], disable_tqdm=True, seed=3,
        remove_unused_columns=False, max_grad_norm=0.0, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Classifier()
    optimizer = msam(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    saving = SavingModels()
    trainer = SAMTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows,
        optimizers=(optimizer, schedule), callbacks=[saving],
    )  # fmt: skip
    saving.trainer, before = trainer, copy.deepcopy(model.net)
    trainer.train(**options)
    return trainer, before


def saved_in(folder):
    return list(safetensors.torch.load_file(Path(folder) / "model.safetensors").items())


def test_transformers_evaluates_and_saves_w():
    trainer, before = hugging_face("out")
    history = check(before, trainer.model.net, grouped(batches(6), 2), [1, 2, 3])
    names = [f"net.{name}" for name, _ in before.named_parameters()]
    folders = [(f"out/checkpoint-{i}", i) for i in (1, 2, 3)]
    folders += [(f"by_hand/{i}", steps) for i, steps in enumerate([0, 1, 1, 2, 2, 3])]
    for folder, steps in folders:
        saved = dict(saved_in(folder))
        assert_weights([saved[name] for name in names], history[steps])


def test_a_resumed_trainer_has_the_bits_of_one_without_a_stop():
    straight, _ = hugging_face("straight", 2)
    resumed, _ = hugging_face("resumed", 2, resume_from_checkpoint="straight/checkpoint-4")
    assert_weights(weights_of(resumed.model), weights_of(straight.model), atol=0)


# ------------------------------------------------------------------------------------- Accelerate


def accelerated():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Watched()
    model, optimizer = accelerator.prepare(net, msam(net.parameters()))
    return accelerator, net, model, optimizer


def accelerate_loop(accelerator, model, optimizer, data, after=lambda i: None):
    sam = SAM(accelerator, model, optimizer)
    loader = accelerator.prepare(DataLoader(data, batch_size=None))
    for i, batch in enumerate(loader):
        model.train()
        with accelerator.accumulate(model):
            sam.backward(loss_fn, model, batch)
            optimizer.step()
            optimizer.zero_grad()
        after(i)


def test_accelerate_evaluates_and_saves_w_in_the_middle_of_a_step():
    data, (accelerator, net, model, optimizer) = batches(6), accelerated()
    before = copy.deepcopy(net)

    def after(i):
        accelerator.save_state(f"state{i}")
        model.eval()
        with torch.no_grad():
            model(data[0][0])

    accelerate_loop(accelerator, model, optimizer, data, after)
    history = check(before, net, grouped(data, 2), [0, 1, 1, 2, 2, 3])
    for i, steps in enumerate([0, 1, 1, 2, 2, 3]):
        saved = dict(saved_in(f"state{i}"))
        assert_weights([saved[name] for name, _ in before.named_parameters()], history[steps])


def test_a_resumed_accelerate_loop_has_the_bits_of_one_without_a_stop():
    data, (accelerator, net, *parts) = batches(4), accelerated()
    accelerate_loop(accelerator, *parts, data)
    accelerator.save_state("state")
    accelerate_loop(accelerator, *parts, data)
    again, other, *parts = accelerated()
    again.load_state("state")
    accelerate_loop(again, *parts, data)
    assert_weights(weights_of(other), weights_of(net), atol=0)


# --------------------------------------------------------------------------- timm, Ignite, skorch


def test_timm_validates_saves_and_averages_w():
    data, model = batches(6), Watched()
    before, optimizer = copy.deepcopy(model), msam(model.parameters())
    scaler, ema, saved = SAMScaler(model, device="cpu", enabled=False), ModelEmaV3(model, 0.5), []
    for i, (x, y) in enumerate(data):
        model.train()
        update = i % 2 == 1
        scaler(lambda x, y: loss_fn(model, (x, y)) / 2, optimizer, inputs=(x, y),
               need_update=update)  # fmt: skip
        if update:
            optimizer.zero_grad()
            ema.update(model)
        saved.append([p.clone() for p in map(model.state_dict().get, dict(
            before.named_parameters()))])  # fmt: skip
        model.eval()
        with torch.no_grad():
            model(x)
    history = check(before, model, grouped(data, 2), [0, 1, 1, 2, 2, 3])
    for weights, steps in zip(saved, [0, 1, 1, 2, 2, 3], strict=True):
        assert_weights(weights, history[steps])
    average = history[0]
    for w in history[1:]:
        average = [0.5 * (a + b) for a, b in zip(average, w, strict=True)]
    assert_weights(weights_of(ema.module), average)


def test_ignites_evaluator_sees_w_in_the_middle_of_a_step():
    data, model = batches(5), Watched()
    before, optimizer = copy.deepcopy(model), msam(model.parameters())
    trainer = create_sam_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=2)
    evaluator = create_supervised_evaluator(model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: evaluator.run(data[:1]))
    at_the_end = []
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: at_the_end.append(optimizer.is_perturbed)
    )
    trainer.run(data, max_epochs=2)
    check(before, model, grouped(data + data, 2), [0, 1, 1, 2, 2, 3, 3, 4, 4, 5])
    assert at_the_end == [False, False]


def test_skorch_validates_and_saves_w():
    class Sam(SAMNetMixin, NeuralNetClassifier):
        pass

    data = batches(3)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    net = Sam(
        Watched, optimizer=FusedSAM, optimizer__base_optimizer=torch.optim.SGD,
        optimizer__ascent=MSAM(), optimizer__rho=RHO, batch_size=5, max_epochs=2, verbose=0,
        train_split=predefined_split(TensorDataset(x[:5], y[:5])), iterator_train__shuffle=False,
        criterion=nn.CrossEntropyLoss, callbacks=[Checkpoint(monitor=None, dirname="saved")],
        **{f"optimizer__{k}": v for k, v in SGD.items()},
    ).initialize()  # fmt: skip
    before = copy.deepcopy(net.module_)
    net.partial_fit(x, y)
    history = check(before, net.module_, grouped(data * 2, 1), [3, 6])
    saved = torch.load("saved/params.pt")
    assert_weights([saved[name] for name, _ in before.named_parameters()], history[6])


# ----------------------------------------------------------------------------------------- fastai


class Looking(FastCallback):
    """Notes the weights after each epoch's training, and after the fit."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def before_validate(self):
        self.weights.append(weights_of(self.learn.model))

    after_fit = before_validate


def test_fastai_validates_and_saves_w():
    """The last group of each epoch is not full, and goes on in the next."""
    # fastai's Recorder takes no float64: two right computations agree to some roundings.
    data, looking = batches(3, dtype=torch.float32), Looking()
    rows = [(x[i], y[i]) for x, y in data for i in range(len(y))]
    loaders = DataLoaders(*[FastDataLoader(rows, bs=5, device="cpu") for _ in range(2)])
    opt_func = functools.partial(
        OptimWrapper, opt=FusedSAM, base_optimizer=torch.optim.SGD, ascent=MSAM(), rho=RHO,
        momentum=SGD["momentum"],
    )  # fmt: skip
    cbs = [SAMCallback(), GradientAccumulation(10), looking]
    learner = Learner(
        loaders, Watched(torch.float32), loss_func=nn.CrossEntropyLoss(), opt_func=opt_func,
        lr=SGD["lr"], cbs=cbs, train_bn=False,
    )  # fmt: skip
    before = copy.deepcopy(learner.model)
    with learner.no_bar(), learner.no_logging():
        learner.fit(2, wd=SGD["weight_decay"])
        learner.save("saved")
    history = check(before, learner.model, grouped(data * 2, 2), [1] * 3 + [3] * 3, 2e-6)
    for weights, steps in zip(looking.weights, [1, 3, 3], strict=True):
        assert_weights(weights, history[steps], 2e-6)
    saved = torch.load("models/saved.pth", weights_only=False)["model"]
    assert_weights([saved[name] for name, _ in before.named_parameters()], history[3], 2e-6)
