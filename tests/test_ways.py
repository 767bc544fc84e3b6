"""Frameworks whose closures are not the whole step are told so."""

import subprocess
import sys

import pytest
import torch
from torch.amp import GradScaler

from fused_sam import FusedSAM
from fused_sam.schedule import AESAM, Always

CALL = "def call(optimizer, closure): return optimizer.step(closure)"


def call_from(module):
    scope = {"__name__": module}
    exec(CALL, scope)
    return scope["call"]


def setup():
    weight = torch.nn.Parameter(torch.ones(3))
    opt = FusedSAM([weight], lr=0.1, rho=0.05)

    def closure():
        opt.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    return weight, opt, closure


@pytest.mark.parametrize("module", ["lightning.pytorch.plugins.precision", "pytorch_lightning.x"])
@pytest.mark.parametrize("fresh", [False, True])
def test_lightning_without_the_mixin(module, fresh):
    weight, opt, closure = setup()
    if fresh:
        closure()
    with pytest.raises(RuntimeError, match=r"SAMMixin of fused_sam\.integrations\.lightning"):
        call_from(module)(opt, closure)
    assert torch.equal(weight, torch.ones(3)) and not opt.is_perturbed


def test_lightning_with_the_mixin_which_has_begun_the_step():
    weight, opt, closure = setup()
    closure()
    opt.first_step()
    call_from("lightning.pytorch.plugins.precision")(opt, closure)
    assert not torch.equal(weight, torch.ones(3))


def test_accelerate_with_gradients_that_may_be_of_several_batches():
    weight, opt, closure = setup()
    torch.optim.lr_scheduler.StepLR(opt, 1)  # wraps step() once more
    step = call_from("accelerate.optimizer")
    step(opt, closure)
    before = weight.detach().clone()
    opt.zero_grad()
    closure()
    with pytest.raises(RuntimeError, match=r"use fused_sam\.integrations\.accelerate"):
        step(opt, closure)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("module", ["train", "lightning_of_ones_own", "lightning.fabric.x"])
def test_others_may_hand_over_a_closure_with_gradients_there(module):
    weight, opt, closure = setup()
    closure()
    call_from(module)(opt, closure)
    assert not torch.equal(weight, torch.ones(3))


def test_a_scaler_between_is_looked_through():
    _, opt, closure = setup()
    scope = {"__name__": "accelerate.optimizer", "scaler": GradScaler("cpu")}
    exec("def call(optimizer, closure): return scaler.step(optimizer, closure)", scope)
    scope["scaler"].scale(torch.ones(()))
    closure()
    with pytest.raises(RuntimeError, match="several batches"):
        scope["call"](opt, closure)


def test_nothing_of_a_framework_is_imported_unless_it_is_used():
    code = (
        "import sys, fused_sam\n"
        "assert not [m for m in sys.modules if m.startswith('fused_sam.integrations')]\n"
        "import fused_sam.integrations, fused_sam.integrations.lightning\n"
        "names = ('lightning', 'pytorch_lightning', 'transformers', 'accelerate', 'timm')\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in names]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Asked(GradScaler):
    """Counts who asks for the scale, which waits for a GPU."""

    count = 0

    def get_scale(self):
        self.count += 1
        return super().get_scale()


@pytest.mark.parametrize(("when", "count"), [(Always(), 0), (AESAM(total_steps=9), 1)])
def test_a_scaler_is_asked_for_its_scale_only_where_it_matters(when, count):
    weight = torch.nn.Parameter(torch.ones(3))
    opt, scaler = FusedSAM([weight], lr=0.1, rho=0.05, when=when), Asked("cpu")
    scaler.scale(weight.square().sum()).backward()
    opt.first_step(scaler=scaler)
    assert scaler.count == count
