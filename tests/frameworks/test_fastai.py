"""fastai: a Learner with ``SAMCallback`` against the textbook."""

import copy
import functools

import fastai.callback.progress  # noqa: F401  (gives Learner its no_bar)
import pytest
import torch
from fastai.basics import Learner
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler, SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from textbook import RHO, Net, assert_same_model, grouped, once_in_two, textbook
from textbook import batches as _batches
from torch.nn.functional import cross_entropy

from fused_sam import FusedSAM
from fused_sam.ascents import PNorm
from fused_sam.blends import GSAM
from fused_sam.integrations.fastai import SAMCallback
from fused_sam.schedule import Every

SGD = functools.partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)
LR = 0.1


# fastai's Recorder takes no float64. Two right computations in float32 agree to about 20 roundings.
batches = functools.partial(_batches, dtype=torch.float32)
ATOL = 2e-6


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def a_learner(data, cbs=(), opt_func=SGD):
    rows = [(x[i], y[i]) for x, y in data for i in range(len(y))]
    loaders = DataLoaders(*[DataLoader(rows, bs=5, device="cpu") for _ in range(2)])
    return Learner(
        loaders, Net(torch.float32), loss_func=torch.nn.CrossEntropyLoss(), opt_func=opt_func,
        lr=LR, cbs=[*cbs], train_bn=False,
    )  # fmt: skip


def fit(learner, epochs=1, **options):
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs, wd=0.0, **options)


class Losses(Callback):
    """The loss of each batch, as fastai's Recorder sees it."""

    order, run_valid = 60, False

    def __init__(self):
        self.seen = []

    def after_batch(self):
        self.seen.append(self.learn.loss.item())


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_is_the_textbook(accumulate, clip):
    data, losses = batches(6), Losses()
    cbs = [SAMCallback(rho=RHO), losses]
    cbs += [GradientAccumulation(5 * accumulate)] if accumulate > 1 else []
    cbs += [GradientClip(clip)] if clip else []
    learner = a_learner(data, cbs)
    expected = copy.deepcopy(learner.model)
    fit(learner, 2)

    groups = grouped(data, accumulate) * 2
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    states = once_in_two(learner.model.drawn, groups)
    right = textbook(expected, base, groups, loss_fn, states, clip_norm=clip)
    assert_same_model(learner.model, expected, ATOL)
    assert losses.seen == pytest.approx(right, abs=ATOL)


class OnCpu(MixedPrecision):
    """fastai's callback for half precision, which is for CUDA only, on the CPU."""

    init_scale = 1024.0

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast("cpu", torch.float16)
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sixteen_bit_is_the_textbook(accumulate):
    data = batches(6)
    cbs = [SAMCallback(rho=RHO), OnCpu()]
    cbs += [GradientAccumulation(5 * accumulate)] if accumulate > 1 else []
    learner = a_learner(data, [*cbs, GradientClip(0.05)])
    expected = copy.deepcopy(learner.model)
    fit(learner)
    groups = grouped(data, accumulate)
    textbook(
        expected,
        torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9),
        groups,
        loss_fn,
        once_in_two(learner.model.drawn, groups),
        clip_norm=0.05,
        autocast=functools.partial(torch.autocast, "cpu", torch.float16),
        scale=1024.0,
    )
    assert_same_model(learner.model, expected, atol=5e-4)


def test_an_overflow_skips_the_step():
    class Large(OnCpu):
        init_scale = 2.0**40

    learner = a_learner(
        batches(1),
        [SAMCallback(rho=RHO), Large()],
    )
    before = copy.deepcopy(learner.model)
    fit(learner)
    for actual, expected in zip(learner.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert not learner.opt.opt.is_perturbed


def test_mixup_mixes_each_batch_of_a_step_as_in_the_first_pass():
    """Both passes at rho = 0 have the same loss, so the step is that of the base optimizer."""
    data, results = batches(4), []
    for rho in (None, 0.0):
        torch.manual_seed(0)
        cbs = [MixUp(0.4), GradientAccumulation(10)]
        cbs += [] if rho is None else [SAMCallback(rho=rho)]
        learner = a_learner(data, cbs)
        learner.loss_func = CrossEntropyLossFlat()
        learner.model.drop.p = 0.0
        fit(learner)
        results.append(learner.model)
    assert_same_model(*results, ATOL)


def test_a_step_that_a_callback_cancels_leaves_the_weights():
    class Cancelling(Callback):
        order = 20

        def before_step(self):
            raise CancelStepException

    learner = a_learner(batches(2), [SAMCallback(rho=RHO), Cancelling()])
    before = copy.deepcopy(learner.model)
    fit(learner)
    for actual, expected in zip(learner.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_schedules_reach_rho_and_the_learning_rate():
    schedule = ParamScheduler({"lr": SchedLin(0.1, 0.01), "rho": SchedLin(0.2, 0.05)})
    learner = a_learner(batches(4), [SAMCallback(rho=RHO)])
    fit(learner, cbs=[schedule])
    # fastai sets them before each batch, at the share of the training that is done.
    assert learner.opt.opt.param_groups[0]["rho"] == pytest.approx(0.2 - 0.15 * 0.75)
    assert learner.opt.opt.param_groups[0]["lr"] == pytest.approx(0.1 - 0.09 * 0.75)


def test_a_learner_that_was_saved_goes_on_with_the_same_bits():
    data = batches(4)
    straight = a_learner(data, [SAMCallback(rho=RHO)])
    straight.model.drop.p = 0.0
    fit(straight)
    straight.save("half")
    fit(straight)
    resumed = a_learner(data, [SAMCallback(rho=RHO)])
    resumed.model.drop.p = 0.0
    resumed.create_opt()
    resumed.load("half")
    fit(resumed)
    assert_same_model(resumed.model, straight.model, atol=0)


def test_a_fused_sam_of_the_users_stays():
    made = functools.partial(
        OptimWrapper, opt=FusedSAM, base_optimizer=torch.optim.SGD, rho=RHO, momentum=0.9
    )
    results = []
    for opt_func, rho in ((made, 7.0), (SGD, RHO)):
        torch.manual_seed(0)
        learner = a_learner(batches(4), [SAMCallback(rho=rho)], opt_func)
        fit(learner)
        results.append(learner.model)
    assert_same_model(*results, atol=0)


def test_fastais_own_optimizers_are_refused():
    learner = a_learner(batches(1), [SAMCallback(rho=RHO)], Adam)
    with pytest.raises(TypeError, match=r"partial\(OptimWrapper, opt=torch\.optim\.AdamW\)"):
        fit(learner)


def test_an_unfinished_group_is_not_carried_into_the_next_fit():
    data = batches(3)
    learner = a_learner(data, [SAMCallback(rho=RHO), GradientAccumulation(10)])
    fit(learner)
    before, drawn = copy.deepcopy(learner.model), learner.model.drawn
    state = copy.deepcopy(learner.opt.opt.base_optimizer.state_dict())
    del drawn[:]
    fit(learner)
    base = torch.optim.SGD(before.parameters(), lr=LR, momentum=0.9)
    base.load_state_dict(state)
    groups = [data[:2]]
    textbook(before, base, groups, loss_fn, once_in_two(drawn[:4], groups))
    for actual, expected in zip(learner.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


def test_the_callback_takes_the_family():
    """Guards options that are lost on the way, and their values within groups."""
    callback = SAMCallback(
        RHO, ascent=PNorm(3), blend=GSAM(0.3), when=Every(2), backend="reference"
    )
    learner = a_learner(batches(4), [callback])
    fit(learner)
    sam = learner.opt.opt
    assert sam.when == Every(2) and sam.backend == "reference"
    (group,) = {(g["rho"], g["ascent"], g["p"], g["blend_alpha"]) for g in sam.param_groups}
    assert group == (RHO, "p-norm", 3, 0.3)
    assert sam.param_groups[0]["sam_step"] == 4 and sam.param_groups[0]["sam_climbs"] == 2
    with pytest.raises(TypeError, match=r"SAMCallback has no option 'lr'; .*: rho, adaptive"):
        SAMCallback(lr=0.1)
