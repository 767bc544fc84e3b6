"""One rank of test_distributed: trains with each framework under DDP and saves what came out.

Run as ``python ranks.py OUT`` with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
"""

import os
import sys

import torch
from textbook import RHO, batches
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy

from fused_sam import FusedSAM

SGD = {"lr": 0.1, "momentum": 0.9}
WORLD, STEPS, ACCUMULATE = 2, 3, 2


class Small(nn.Module):
    """No BatchNorm and no dropout: what each rank computes by itself is another matter."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Linear(6, 8, dtype=torch.float64)
        self.last = nn.Linear(8, 3, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)

    def forward(self, x, labels=None):
        logits = self.last(torch.tanh(self.first(x)))
        return logits if labels is None else {"loss": cross_entropy(logits, labels)}


def all_batches():
    """In the order of the steps: micro-batch 0 of rank 0, of rank 1, micro-batch 1 of rank 0 ..."""
    return batches(STEPS * ACCUMULATE * WORLD)


def a_sam(model):
    return FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, **SGD)


def with_accelerate(rank):
    from accelerate import Accelerator

    from fused_sam.integrations.accelerate import SAM

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    net = Small()
    model, opt = accelerator.prepare(net, a_sam(net))
    reduced = []

    def count(state, bucket):
        reduced.append(bucket.is_last())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, count)
    sam = SAM(accelerator, model, opt)
    for batch in all_batches()[rank::WORLD]:
        with accelerator.accumulate(model):
            sam.backward(lambda model, x, y: cross_entropy(model(x), y), model, *batch)
            opt.step()
            opt.zero_grad()
    assert sum(reduced) == 2 * STEPS, f"gradients were reduced {sum(reduced)} times"
    return net


def with_the_trainer(rank):
    from transformers import TrainingArguments

    from fused_sam.integrations.transformers import SAMTrainer

    args = TrainingArguments(
        "out", use_cpu=True, report_to=[], save_strategy="no", per_device_train_batch_size=5,
        gradient_accumulation_steps=ACCUMULATE, num_train_epochs=1, max_grad_norm=0.0,
        remove_unused_columns=False, train_sampling_strategy="sequential", disable_tqdm=True,
        lr_scheduler_type="constant", ddp_backend="gloo", logging_steps=1,
    )  # fmt: skip
    rows = [{"x": x[i], "labels": y[i]} for x, y in all_batches() for i in range(len(y))]
    net = Small()
    opt = torch.optim.SGD(net.parameters(), **SGD)
    SAMTrainer(net, args, train_dataset=rows, optimizers=(opt, None), sam_rho=RHO).train()
    return net


def with_lightning(rank):
    import lightning.pytorch as pl

    from fused_sam.integrations.lightning import SAMMixin

    class Module(SAMMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Small()

        def training_step(self, batch, batch_idx):
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, sync_dist=True)
            return loss

        def configure_optimizers(self):
            return a_sam(self)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=WORLD, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=ACCUMULATE, use_distributed_sampler=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(all_batches()[rank::WORLD], batch_size=None)
    trainer.fit(module, loader)
    assert trainer.global_step == STEPS
    return module.net


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    trained = {}
    # Lightning takes its leave of the process group: last.
    for train in (with_accelerate, with_the_trainer, with_lightning):
        trained[train.__name__] = train(rank).state_dict()
    torch.save(trained, sys.argv[1])
