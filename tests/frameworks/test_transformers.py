"""transformers: the Trainer against the textbook, on a tiny model made from a configuration."""

import copy
import functools
import json
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from textbook import RHO, Net, assert_same_model, batches, grouped, once_in_two, textbook
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fused_sam import FusedSAM
from fused_sam.ascents import FriendlySAM
from fused_sam.blends import GSAM
from fused_sam.integrations.transformers import SAMTrainer, SAMTrainerMixin
from fused_sam.schedule import From

# With a large eps Adam does not make much of gradients that are rounding.
ADAMW = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-2, "weight_decay": 1e-2}


class Classifier(nn.Module):
    """A model as the Trainer wants it: takes labels, returns the loss first."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def rows(data):
    return [{"x": x[i], "labels": y[i]} for x, y in data for i in range(len(y))]


def arguments(**options):
    settings = {
        "output_dir": "out", "per_device_train_batch_size": 5, "num_train_epochs": 1,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "remove_unused_columns": False, "seed": 3, "max_grad_norm": 0.0,
        "optim": "adamw_torch", "learning_rate": ADAMW["lr"], "adam_beta1": 0.8,
        "adam_beta2": 0.99, "adam_epsilon": 1e-2, "weight_decay": ADAMW["weight_decay"],
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**{**settings, **options})


def train(trainer, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of")
        return trainer.train(**options)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def reference(model, groups, states, scheduler=None, **options):
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "norm" not in n]
    rest = [p for n, p in model.named_parameters() if "bias" in n or "norm" in n]
    parts = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(parts, **ADAMW)
    after = torch.optim.lr_scheduler.LambdaLR(opt, scheduler).step if scheduler else lambda: None

    def loss_fn(model, batch):
        return model(batch[0], labels=batch[1])["loss"]

    return textbook(model, opt, groups, loss_fn, states, after_step=after, **options), opt


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_is_the_textbook(accumulate, clip):
    data = batches(8)  # the last group is incomplete
    model = Classifier()
    expected = copy.deepcopy(model)
    trainer = SAMTrainer(
        model=model,
        args=arguments(
            gradient_accumulation_steps=accumulate, max_grad_norm=clip, lr_scheduler_type="linear"
        ),
        train_dataset=rows(data),
        sam_rho=RHO,
    )
    train(trainer)

    groups = grouped(data, accumulate)
    steps = len(groups)
    losses, opt = reference(
        expected,
        groups,
        once_in_two(model.net.drawn, groups),
        scheduler=lambda step: (steps - step) / steps,
        **({"clip_norm": clip} if clip else {}),
    )
    assert_same_model(model, expected)
    assert trainer.state.global_step == steps
    means = [sum(losses[i : i + accumulate]) for i in range(0, 8, accumulate)]
    means = [m / len(g) for m, g in zip(means, groups, strict=True)]
    assert losses_of(trainer) == pytest.approx(means, abs=1e-4)  # the Trainer rounds
    assert trainer.optimizer.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_has_the_bits_of_one_without_a_stop(accumulate):
    data = rows(batches(8))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    def run(output, callbacks, **options):
        torch.manual_seed(0)
        trainer = SAMTrainer(
            model=Classifier(),
            args=arguments(
                output_dir=output,
                gradient_accumulation_steps=accumulate,
                save_strategy="steps",
                save_steps=1,
                max_grad_norm=1.0,
                num_train_epochs=2,
            ),
            train_dataset=data,
            sam_rho=RHO,
            callbacks=callbacks,
        )
        train(trainer, **options)
        return trainer

    straight = run("straight", [])
    run("stopped", [Stop()])
    resumed = run("stopped", [], resume_from_checkpoint="stopped/checkpoint-3")
    assert_same_model(resumed.model, straight.model, atol=0)
    one, two = straight.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert one["param_groups"] == two["param_groups"]
    for key, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(two["state"][key][name], value), name
    last = sorted(Path("straight").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-1]
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 16 // accumulate


def test_a_language_model_with_accumulation_counts_tokens_as_the_trainer_does():
    """transformers divides by the tokens of all micro-batches; so must the second pass."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=17, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).double()
    expected = copy.deepcopy(model)
    rows = []
    for i in range(8):
        ids = torch.randint(1, 17, (12,))
        labels = ids.clone()
        labels[: 3 + i % 4] = -100
        rows.append({"input_ids": ids, "labels": labels})
    trainer = SAMTrainer(
        model=model,
        args=arguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="constant",
            weight_decay=0.0,
        ),
        train_dataset=rows,
        sam_rho=RHO,
    )
    states = []
    model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    train(trainer)

    pairs = [
        {k: torch.stack([row[k] for row in pair]) for k in pair[0]} for pair in grouped(rows, 2)
    ]
    groups = grouped(pairs, 2)
    tokens = {
        id(batch): sum((b["labels"][:, 1:] != -100).sum() for b in group)
        for group in groups
        for batch in group
    }

    def loss_fn(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / tokens[id(batch)]

    opt = torch.optim.AdamW(expected.parameters(), **{**ADAMW, "weight_decay": 0.0})
    textbook(expected, opt, groups, loss_fn, once_in_two(states, groups), divide_by=1)
    # Its loss is computed in float32, whatever the model is in.
    assert_same_model(model, expected, atol=1e-5)


def test_lora_moves_and_keeps_the_adapters_weights_alone():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=17, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    base = GPT2LMHeadModel(config).double()
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # from zero, lora_A would have no gradient
    expected = copy.deepcopy(model)
    rows = []
    for ids in torch.randint(1, 17, (6, 12)):
        # The Trainer counts the first label, which no logit predicts, as an item.
        rows.append({"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])})
    trainer = SAMTrainer(
        model=model,
        args=arguments(per_device_train_batch_size=2, lr_scheduler_type="constant"),
        train_dataset=rows,
        sam_rho=RHO,
    )
    states = []
    model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    train(trainer)

    groups = grouped([torch.stack([r["input_ids"] for r in pair]) for pair in grouped(rows, 2)], 1)

    def loss_fn(model, ids):
        logits = model(input_ids=ids).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    trained = [p for p in expected.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, **ADAMW)
    textbook(expected, opt, groups, loss_fn, once_in_two(states, groups))
    assert_same_model(model, expected, atol=1e-5)  # its loss is computed in float32
    engine = trainer.optimizer.optimizer._facts.engine
    taken = [slot.param for bucket in engine.buckets for slot in bucket.slots]
    assert {id(p) for p in taken} <= {id(p) for p in model.parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, expected.get_parameter(name)), name


def test_sixteen_bit_with_a_scaler_is_the_textbook(monkeypatch):
    """accelerate refuses fp16 on a CPU; so it is told so behind its back."""
    data = batches(4, dtype=torch.float32)
    torch.manual_seed(0)
    model = Classifier().float()
    expected = copy.deepcopy(model)
    trainer = SAMTrainer(
        model=model,
        args=arguments(
            gradient_accumulation_steps=2, max_grad_norm=0.05, lr_scheduler_type="constant"
        ),
        train_dataset=rows(data),
        sam_rho=RHO,
    )
    half = functools.partial(torch.autocast, "cpu", torch.float16)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.native_amp = True
    train(trainer)

    groups = grouped(data, 2)
    states = once_in_two(model.net.drawn, groups)
    reference(expected, groups, states, clip_norm=0.05, autocast=half, scale=1024.0)
    assert_same_model(model, expected, atol=2e-3)


def test_own_losses_may_take_the_inputs_apart_and_own_trainers_keep_their_methods():
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            return cross_entropy(model(**inputs, labels=labels)["logits"], labels)

        def training_step(self, model, inputs, *args, **kwargs):
            labels = inputs.pop("labels")
            return super().training_step(model, {**inputs, "labels": labels}, *args, **kwargs)

    class Sam(SAMTrainerMixin, Mine):
        pass

    data, results = rows(batches(4)), []
    for cls in (SAMTrainer, Sam):
        torch.manual_seed(0)
        trainer = cls(model=Classifier(), args=arguments(), train_dataset=data, sam_rho=RHO)
        train(trainer)
        results.append(trainer.model)
    assert_same_model(*results, atol=0)


def test_an_optimizer_of_the_users_is_wrapped_and_a_fused_sam_stays():
    data = rows(batches(4))
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = Classifier()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrap:
            opt = FusedSAM.wrap(opt, rho=RHO)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        trainer = SAMTrainer(
            model=model,
            args=arguments(),
            train_dataset=data,
            optimizers=(opt, scheduler),
            **({} if wrap else {"sam_rho": RHO}),
        )
        train(trainer)
        assert trainer.optimizer.param_groups[0]["rho"] == RHO
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
        results.append(model)
    assert_same_model(*results, atol=0)


def test_training_again_goes_on():
    data = rows(batches(4))
    trainer = SAMTrainer(model=Classifier(), args=arguments(), train_dataset=data, sam_rho=RHO)
    train(trainer)
    train(trainer)
    assert not trainer.optimizer.optimizer.is_perturbed
    assert len(trainer.model.net.drawn) == 2 * 2 * 4


def test_deepspeed_is_refused(monkeypatch):
    postprocess = Trainer.create_accelerator_and_postprocess

    def with_deepspeed(self):
        postprocess(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(RuntimeError, match="DeepSpeed takes steps by itself"):
        SAMTrainer(model=Classifier(), args=arguments(), train_dataset=rows(batches(1)))


def test_the_trainer_takes_the_family():
    """Guards options that are lost on the way: a FusedSAM that is given steps the same."""
    options = {
        "ascent": FriendlySAM(sigma=0.5), "blend": GSAM(0.3), "when": From(1), "rho": RHO,
        "adaptive": True, "eta": 0.01, "max_grad_norm": 0.5, "backend": "reference",
    }  # fmt: skip
    ends = []
    for given in (False, True):
        torch.manual_seed(0)
        model = Classifier()
        more = {f"sam_{name}": value for name, value in options.items()}
        if given:
            plain = Trainer(model=model, args=arguments()).create_optimizer()
            more = {"optimizers": (FusedSAM.wrap(plain, **options), None)}
        trainer = SAMTrainer(model=model, args=arguments(), train_dataset=rows(batches(4)), **more)
        train(trainer)
        ends.append(model)
        sam = trainer.optimizer.optimizer
        assert sam.when == From(1) and sam.backend == "reference"
        assert sam.param_groups[0]["ascent"] == "friendly"
    assert_same_model(*ends, atol=0.0)
    with pytest.raises(TypeError, match=r"SAMTrainer has no option 'sam_model'; .*: sam_rho, sam_"):
        SAMTrainer(model=model, args=arguments(), sam_model=model)
