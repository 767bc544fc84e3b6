"""A FusedSAM in frameworks that know nothing of it: right, or an error that names the adapter."""

import copy
import functools
import warnings

import fastai.callback.progress  # noqa: F401  (gives Learner its no_bar)
import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from fastai.basics import Learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastDataLoader
from fastai.optimizer import OptimWrapper
from ignite.engine import create_supervised_trainer
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins import MixedPrecision
from textbook import RHO, Net, assert_same_model, batches, grouped, once_in_two, textbook
from timm.utils import NativeScaler
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from fused_sam import FusedSAM

SGD = {"lr": 0.1, "momentum": 0.9}


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def a_sam(model, **options):
    return FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD, **options)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return loss_fn(self.net, batch)

    def configure_optimizers(self):
        return a_sam(self)


class Manual(Module):
    """The usual three lines of manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        loss = loss_fn(self.net, batch)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()


def fit_lightning(module, **options):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(4), batch_size=None))


def lightning_manual():
    fit_lightning(Manual())


def lightning_automatic():
    fit_lightning(Module())


def lightning_accumulating():
    fit_lightning(Module(), accumulate_grad_batches=2)


def lightning_sixteen_bit():
    scaler = torch.amp.GradScaler("cpu")
    fit_lightning(Module(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


def the_hugging_face_trainer():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, labels=None):
            return {"loss": cross_entropy(self.net(x), labels)}

    model = Model()
    args = TrainingArguments("out", use_cpu=True, report_to=[], save_strategy="no")
    rows = [{"x": x[i], "labels": y[i]} for x, y in batches(4) for i in range(len(y))]
    Trainer(model, args, train_dataset=rows, optimizers=(a_sam(model), None)).train()


def the_accelerate_loop():
    accelerator = Accelerator(cpu=True)
    net = Net()
    model, opt = accelerator.prepare(net, a_sam(net))
    accelerator.backward(loss_fn(model, batches(1)[0]))
    opt.step()


def accelerate_accumulating_closures():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    model, opt = accelerator.prepare(net, a_sam(net))
    for batch in batches(2):
        with accelerator.accumulate(model):
            accelerator.backward(loss_fn(model, batch))
            opt.step(functools.partial(_closure, accelerator, model, batch))


def _closure(accelerator, model, batch):
    loss = loss_fn(model, batch)
    accelerator.backward(loss)
    return loss


def a_fastai_learner():
    rows = [(x[i], y[i]) for x, y in batches(2, dtype=torch.float32) for i in range(len(y))]
    loaders = DataLoaders(*[FastDataLoader(rows, bs=5, device="cpu") for _ in range(2)])
    opt_func = functools.partial(OptimWrapper, opt=FusedSAM, base_optimizer=torch.optim.SGD)
    learner = Learner(
        loaders, Net(torch.float32), loss_func=torch.nn.CrossEntropyLoss(), opt_func=opt_func
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, wd=0.0)


def ignites_trainer():
    model = Net()
    create_supervised_trainer(model, a_sam(model), cross_entropy).run(batches(2))


def timms_scaler():
    model = Net(torch.float32)
    NativeScaler(device="cpu")(loss_fn(model, batches(1, dtype=torch.float32)[0]), a_sam(model))


@pytest.mark.parametrize(
    "train",
    [
        lightning_manual, lightning_automatic, lightning_accumulating, lightning_sixteen_bit,
        the_hugging_face_trainer, the_accelerate_loop, accelerate_accumulating_closures,
        a_fastai_learner, ignites_trainer, timms_scaler,
    ],
)  # fmt: skip
def test_the_error_names_the_adapter(train):
    with pytest.raises(RuntimeError, match=r"fused_sam\.integrations"):
        train()


def test_accelerate_with_closures_that_do_all_is_the_textbook():
    accelerator = Accelerator(cpu=True)
    net = Net()
    expected = copy.deepcopy(net)
    model, opt = accelerator.prepare(net, a_sam(net))
    opt.optimizer.attach(model)
    data = batches(3)
    for batch in data:
        opt.step(functools.partial(_closure, accelerator, model, batch))
        opt.zero_grad()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    groups = grouped(data, 1)
    textbook(expected, base, groups, loss_fn, once_in_two(net.drawn, groups))
    assert_same_model(net, expected)


@pytest.mark.parametrize("finish", ["step", "second_step"])
@pytest.mark.parametrize("half", [False, True])
def test_the_two_steps_in_fabric_are_the_textbooks(half, finish):
    dtype = torch.float32 if half else torch.float64
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [FabricMixedPrecision("16-mixed", "cpu", scaler)] if half else []
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    net = Net(dtype)
    expected = copy.deepcopy(net)
    sam = a_sam(net)
    model, opt = fabric.setup(net, sam)
    sam.attach(model)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.7)
    data = batches(4, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of")
        for batch in data:
            fabric.backward(loss_fn(model, batch))
            opt.first_step(zero_grad=True)
            fabric.backward(loss_fn(model, batch))
            getattr(opt, finish)()
            opt.zero_grad()
            scheduler.step()

    base = torch.optim.SGD(expected.parameters(), **SGD)
    groups = grouped(data, 1)
    autocast = functools.partial(torch.autocast, "cpu", torch.float16)
    textbook(
        expected,
        base,
        groups,
        loss_fn,
        once_in_two(net.drawn, groups),
        after_step=torch.optim.lr_scheduler.StepLR(base, 1, 0.7).step,
        **({"autocast": autocast, "scale": 1024.0} if half else {}),
    )
    assert_same_model(net, expected, atol=5e-4 if half else 1e-12)
