"""Lightning: automatic and manual optimization against the textbook."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from textbook import RHO, Net, assert_same_model, batches, grouped, once_in_two, textbook
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_sam import FusedSAM
from fused_sam.integrations.lightning import SAMMixin
from fused_sam.rho import ProportionalRho
from fused_sam.schedule import AESAM, Every

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


class Plain(pl.LightningModule):
    """What a user has before SAM."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.net = Net(dtype)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.logged, self.returned, self.steps = [], [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        loss = cross_entropy(out, y)
        self.accuracy(out, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logged.append(self.trainer.callback_metrics["loss_step"].item())
        self.steps.append(self.trainer.global_step)

    def configure_optimizers(self):
        opt = FusedSAM(self.parameters(), torch.optim.SGD, rho=RHO, **SGD)
        return {
            "optimizer": opt,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.StepLR(opt, 1, 0.7),
                "interval": "step",
            },
        }


class Sam(SAMMixin, Plain):
    pass


def fit(module, data, **options):
    """Train one epoch; warnings about the order of schedulers are errors."""
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = pl.Trainer(**{**settings, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return trainer


def loss_of(net, batch):
    return cross_entropy(net(batch[0]), batch[1])


def reference(net, groups, states, **options):
    opt = torch.optim.SGD(net.parameters(), **SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.7)
    losses = textbook(net, opt, groups, loss_of, states, after_step=scheduler.step, **options)
    return losses, opt


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_automatic_optimization_is_the_textbooks(accumulate, clip):
    data = batches(7)  # the last group is incomplete
    module = Sam()
    expected = copy.deepcopy(module.net)
    clipping = {} if clip is None else {"gradient_clip_val": 0.02, "gradient_clip_algorithm": clip}
    trainer = fit(module, data, accumulate_grad_batches=accumulate, **clipping)

    groups = grouped(data, accumulate)
    states = once_in_two(module.net.drawn, groups)
    losses, opt = reference(
        expected, groups, states, divide_by=accumulate, **({f"clip_{clip}": 0.02} if clip else {})
    )
    assert_same_model(module.net, expected)
    assert module.logged == pytest.approx(losses, abs=1e-12)
    assert trainer.global_step == len(groups)
    assert module.steps == [(i + 1) // accumulate for i in range(6)] + [len(groups)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(opt.param_groups[0]["lr"])
    epoch = trainer.callback_metrics
    assert epoch["loss_epoch"].item() == pytest.approx(sum(losses) / 7, abs=1e-12)
    assert 0 <= epoch["accuracy"].item() <= 1
    # Not a batch was counted twice.
    assert module.accuracy._update_count in (0, 7)


def test_steps_that_do_not_climb_have_one_pass_and_are_clipped():
    class Sometimes(Sam):
        def configure_optimizers(self):
            when = Every(2)
            return FusedSAM(self.parameters(), torch.optim.SGD, rho=RHO, when=when, **SGD)

    data, module = batches(8), Sometimes()
    expected = copy.deepcopy(module.net)
    fit(module, data, accumulate_grad_batches=2, gradient_clip_val=0.02)
    drawn = module.net.drawn  # 0, 1 and again; 2, 3; 4, 5 and again; 6, 7
    assert len(drawn) == 12
    textbook(
        expected,
        torch.optim.SGD(expected.parameters(), **SGD),
        grouped(data, 2),
        loss_of,
        drawn[:2] + drawn[4:8] + drawn[10:],
        rho=[RHO, 0.0, RHO, 0.0],
        clip_norm=0.02,
    )
    assert_same_model(module.net, expected)


HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def mixed(precision, **scaler):
    """The Trainer does not take 16-mixed on a CPU; its plugin does."""
    if precision == "bf16-mixed":
        return MixedPrecision(precision, "cpu")
    return MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", **scaler))


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", HALF)
def test_mixed_precision_is_the_textbooks(precision, accumulate, clip):
    data = batches(6, dtype=torch.float32)
    module = Sam(torch.float32)
    expected, start = copy.deepcopy(module.net), copy.deepcopy(module.net)
    clipping = {} if clip is None else {"gradient_clip_val": 0.02, "gradient_clip_algorithm": clip}
    plugin = mixed(precision, init_scale=1024.0)
    fit(module, data, accumulate_grad_batches=accumulate, plugins=[plugin], **clipping)

    groups = grouped(data, accumulate)
    reference(
        expected,
        groups,
        once_in_two(module.net.drawn, groups),
        autocast=lambda: torch.autocast("cpu", HALF[precision]),
        scale=1.0 if precision == "bf16-mixed" else 1024.0,
        **({f"clip_{clip}": 0.02} if clip else {}),
    )
    # A rounding in float32 may decide how an activation is rounded to half precision: one such
    # decision moves a weight by about 2e-3 (bfloat16: 4e-3) of what the training moves it.
    moved = max(
        (a - b).abs().max().item()
        for a, b in zip(expected.parameters(), start.parameters(), strict=True)
    )
    assert_same_model(module.net, expected, atol=0.02 * moved)


def test_an_overflow_in_16_mixed_skips_the_step_and_halves_the_scale():
    plugin = mixed("16-mixed", init_scale=2.0**40)
    module = Sam(torch.float32)
    before = copy.deepcopy(module.net)
    fit(module, batches(1, dtype=torch.float32), plugins=[plugin])
    for actual, expected in zip(module.net.parameters(), before.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert plugin.scaler.get_scale() == 2.0**39


class Manual(SAMMixin, Plain):
    """Manual optimization: the style is ``"halves"`` or ``"closure"``."""

    def __init__(self, style, dtype=torch.float64, clip=False):
        super().__init__(dtype)
        self.clip = clip
        self.automatic_optimization = False
        self.style = style

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()

        def closure():
            opt.zero_grad()
            loss = Plain.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        if self.style == "closure":
            loss = opt.step(closure)
        else:
            loss = closure()
            opt.first_step(zero_grad=True)
            self.manual_backward(loss_of(self, batch))
            if self.clip:
                self.clip_gradients(opt, 0.02, "norm")
            opt.step()
        self.lr_schedulers().step()
        return loss


@pytest.mark.parametrize("precision", ["64-true", "16-mixed"])
@pytest.mark.parametrize("style", ["halves", "clipped halves", "closure"])
def test_manual_optimization_is_the_textbooks(style, precision):
    clip = style.startswith("clipped")
    half = precision == "16-mixed"
    dtype = torch.float32 if half else torch.float64
    data, module = batches(5, dtype=dtype), Manual(style, dtype, clip)
    expected = copy.deepcopy(module.net)
    options = {"plugins": [mixed(precision, init_scale=1024.0)]} if half else {}
    trainer = fit(module, data, **options)

    groups = grouped(data, 1)
    autocast = {"autocast": lambda: torch.autocast("cpu", torch.float16), "scale": 1024.0}
    losses, _ = reference(
        expected,
        groups,
        once_in_two(module.net.drawn, groups),
        **(autocast if half else {}),
        clip_norm=0.02 if clip else None,
    )
    assert_same_model(module.net, expected, atol=5e-4 if half else 1e-12)
    assert module.logged == pytest.approx(losses, abs=5e-3 if half else 1e-12)
    assert trainer.global_step == 5


def test_one_backward_in_manual_optimization_is_an_error():
    class One(Manual):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss_of(self, batch))
            opt.step()

    with pytest.raises(RuntimeError, match=r"opt\.step\(closure\) with a closure"):
        fit(One("closure"), batches(1))


def test_what_judges_the_size_of_gradients_is_told_their_scale():
    class Judging(Sam):
        def configure_optimizers(self):
            when = AESAM(total_steps=4)
            return FusedSAM(self.parameters(), torch.optim.SGD, rho=RHO, when=when, **SGD)

    norms = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        module = Judging(torch.float32)
        data = batches(4, dtype=torch.float32)
        trainer = fit(module, data, plugins=[mixed("16-mixed", init_scale=scale)])
        group = trainer.optimizers[0].param_groups[0]
        norms.append([group[key] for key in trainer.optimizers[0].when.memory])
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_a_resumed_run_has_the_bits_of_one_without_a_stop():
    data = batches(8)

    def run(stops):
        torch.manual_seed(3)
        module = Sam()
        path = None
        for epochs in stops:
            trainer = pl.Trainer(
                max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=3,
            )  # fmt: skip
            torch.manual_seed(epochs)  # Lightning keeps no random states
            module.net.drop.p = 0.0
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=path)
            trainer.save_checkpoint(path := "last.ckpt")
            state = trainer.optimizers[0].state_dict()
            module = module if epochs == stops[-1] else Sam()
        return module, state

    (straight, state), (resumed, resumed_state) = run([2]), run([1, 2])
    assert_same_model(resumed.net, straight.net, atol=0)
    for key, value in state["state"].items():
        assert torch.equal(resumed_state["state"][key]["momentum_buffer"], value["momentum_buffer"])


def test_weights_that_are_averaged_are_those_at_w():
    """A callback that copies the module, hooks and all, and averages after each step."""
    data, module = batches(4), Sam()
    expected = copy.deepcopy(module.net)
    fit(module, data, callbacks=[EMAWeightAveraging(decay=0.5)])
    ema = get_ema_multi_avg_fn(0.5)
    average = AveragedModel(expected, multi_avg_fn=ema, use_buffers=True)
    groups = grouped(data, 1)
    opt = torch.optim.SGD(expected.parameters(), **SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.7)

    def after_step():
        scheduler.step()
        average.update_parameters(expected)

    states = once_in_two(module.net.drawn, groups)
    textbook(expected, opt, groups, loss_of, states, after_step=after_step)
    assert_same_model(module.net, average.module)


class Looking(Callback):
    """Notes the gradients that Lightning shows before a step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append([p.grad.clone() for p in module.parameters()])


def test_hooks_see_the_second_gradients_unscaled_and_once():
    looks = {}
    for scale in (1.0, 1024.0):
        looks[scale] = Looking()
        torch.manual_seed(0)
        module = Sam(torch.float32)
        fit(
            module,
            batches(3, dtype=torch.float32),
            plugins=[mixed("16-mixed", init_scale=scale)],
            callbacks=[looks[scale]],
        )
    assert len(looks[1.0].seen) == 3
    for small, large in zip(looks[1.0].seen, looks[1024.0].seen, strict=True):
        for a, b in zip(small, large, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=2e-3)


def test_an_optimizer_step_that_leaves_out_the_mixins_is_an_error():
    class Own(Sam):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)

    with pytest.raises(RuntimeError, match=r"super\(\).optimizer_step"):
        fit(Own(), batches(2))


def test_a_batch_that_training_step_skips_has_no_part():
    class Skipping(Sam):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 4, 5) else loss

    data, module = batches(6), Skipping()
    module.net.norm.momentum = 0.0  # BatchNorm sees the skipped batches, too
    expected = copy.deepcopy(module.net)
    trainer = fit(module, data, accumulate_grad_batches=2)
    drawn = module.net.drawn  # forwards: 0, 1, 0 again; 2, 3, 2 and 3 again; 4, 5
    assert len(drawn) == 9
    textbook(
        expected,
        opt := torch.optim.SGD(expected.parameters(), **SGD),
        [[data[0]], [data[2], data[3]]],
        loss_of,
        [drawn[0], drawn[3], drawn[4]],
        divide_by=2,
        after_step=torch.optim.lr_scheduler.StepLR(opt, 1, 0.7).step,
    )
    for actual, value in zip(module.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-12)
    assert torch.equal(drawn[2], drawn[0]) and torch.equal(drawn[5], drawn[3])
    assert not trainer.optimizers[0].is_perturbed


def test_a_step_that_was_begun_in_another_fit_is_forgotten():
    class Failing(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                raise KeyError("in the middle of a step")

    data, module = batches(4), Sam()
    module.net.norm.momentum = 0.0
    expected = copy.deepcopy(module.net)
    with pytest.raises(KeyError):
        fit(module, data, accumulate_grad_batches=2, callbacks=[Failing()])
    drawn = module.net.drawn = []
    fit(module, data, accumulate_grad_batches=2)
    groups = grouped(data, 2)
    reference(expected, groups, once_in_two(drawn, groups))
    for actual, value in zip(module.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-12)


def test_a_strategy_that_takes_the_steps_itself_is_refused():
    class LikeDeepSpeed(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(RuntimeError, match="LikeDeepSpeed accumulates and steps by itself"):
        fit(Sam(), batches(1), strategy=LikeDeepSpeed("cpu"))


def test_another_optimizer_is_left_alone():
    class Other(Sam):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), **SGD)

    class Without(Plain):
        configure_optimizers = Other.configure_optimizers

    torch.manual_seed(0)
    one = Other()
    two = Without()
    two.load_state_dict(one.state_dict())
    for module in (one, two):
        torch.manual_seed(5)
        fit(module, batches(4), accumulate_grad_batches=2)
    assert_same_model(one.net, two.net, atol=0)


def test_rho_follows_the_learning_rate():
    """Guards Lightning's check of what it takes for a scheduler, and the order of the two."""
    seen = []

    class Following(Sam):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            scheduler = made["lr_scheduler"]["scheduler"]
            made["lr_scheduler"]["scheduler"] = ProportionalRho(
                scheduler, rho_max=0.5, rho_min=0.1, lr_max=0.1, lr_min=0.02
            )
            return made

        def on_before_optimizer_step(self, optimizer):
            group = optimizer.param_groups[0]
            seen.append((group["lr"], group["rho"]))

    fit(Following(), batches(4))
    assert [lr for lr, _ in seen] == pytest.approx([0.1 * 0.7**i for i in range(4)])
    assert [rho for _, rho in seen] == pytest.approx([5 * lr for lr, _ in seen])
