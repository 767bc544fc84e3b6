"""Both passes of a step see the same random numbers, statistics and batches."""

import copy
import gc
import io
import pickle
import random
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from oracle import assert_same_bits
from torch import nn

from fused_sam import FusedSAM
from fused_sam.batchnorm import frozen_running_stats
from fused_sam.randomness import Randomness

LR, RHO = 0.1, 0.5


class Noisy(nn.Module):
    """Draws from torch, Python and NumPy, keeps running statistics, and tells what it drew."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.drawn = []

    def forward(self, x):
        if self.training:
            self.drawn.append((torch.rand(3), random.random(), np.random.rand()))
        x = nn.functional.dropout(self.norm(self.first(x)), 0.5, self.training)
        return self.last(x)


def setup(attach=True, rule=torch.optim.SGD, **options):
    torch.manual_seed(3)
    model = Noisy()
    options = {"lr": LR, "rho": RHO, **options}
    opt = FusedSAM(model.parameters(), rule, model=model if attach else None, **options)
    return model, opt


def batches(n=1, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator) for _ in range(n)]


def backward(model, x, parts=1):
    loss = model(x).square().mean() / parts
    loss.backward()
    return loss.detach()


def textbook_step(model, xs, local=False, lr=LR, rho=RHO):
    """One step in plain torch: both passes of a micro-batch from the same random states."""
    params = list(model.parameters())
    states = {}
    reseed(100)

    def gradients(part):
        for p in params:
            p.grad = None
        for i in part:
            if i in states:
                torch.set_rng_state(states[i])
            states[i] = torch.get_rng_state()
            backward(model, xs[i], len(xs))
        return [p.grad for p in params]

    def climb(grads):
        norm = torch.stack([g.norm() for g in grads]).norm()
        return [p.detach() + rho / norm * g for p, g in zip(params, grads, strict=True)]

    def put(values):
        for p, v in zip(params, values, strict=True):
            p.data.copy_(v)

    w = [p.detach().clone() for p in params]
    total = [torch.zeros_like(p) for p in params]
    for part in [[i] for i in range(len(xs))] if local else [range(len(xs))]:
        put(climb(gradients(part)))
        with frozen_running_stats(model):
            grads = gradients(part)
        total = [t + g for t, g in zip(total, grads, strict=True)]
        put(w)
    put([v - lr * g for v, g in zip(w, total, strict=True)])


def reseed(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def assert_close(model, twin):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_draws(first, second):
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]


def two_steps(model, opt, x):
    reseed(100)
    backward(model, x)
    opt.first_step(zero_grad=True)
    backward(model, x)
    opt.second_step(zero_grad=True)


def closure(model, opt, x):
    reseed(100)
    opt.step(lambda: backward(model, x))
    opt.zero_grad()


def closure_once(model, opt, x):
    reseed(100)
    backward(model, x)
    opt.step(lambda: backward(model, x))
    opt.zero_grad()


def blocks(model, opt, x):
    reseed(100)
    with opt.first_pass():
        backward(model, x)
    opt.first_step(zero_grad=True)
    with opt.second_pass(model):
        backward(model, x)
    opt.second_step(zero_grad=True)


def accumulate(model, opt, x):
    reseed(100)
    opt.accumulate([x], lambda x: backward(model, x))
    opt.zero_grad()


STYLES = [two_steps, closure, closure_once, blocks, accumulate]


@pytest.mark.parametrize("style", STYLES)
def test_an_attached_model_sees_the_same_in_both_passes(style, backend):
    """Dropout masks, what Python and NumPy draw, and BatchNorm: equal to the textbook."""
    model, opt = setup(backend=backend)
    twin = copy.deepcopy(model)
    for x in batches(3):
        style(model, opt, x)
        textbook_step(twin, [x])
        assert_close(model, twin)
        assert_same_draws(*model.drawn[-2:])
    assert not model.norm.training or model.norm.track_running_stats
    assert model.norm.num_batches_tracked == 3


def test_random_numbers_go_on_as_after_one_pass():
    """A run with SAM draws the stream of a run without."""
    model, opt = setup()
    (x,) = batches()
    for style in STYLES:
        style(model, opt, x)
        after = torch.rand(2), random.random(), np.random.rand()
        reseed(100)
        backward(model, x)
        opt.zero_grad()
        assert_same_draws(after, (torch.rand(2), random.random(), np.random.rand()))
        opt.restore()


def test_blocks_without_an_attached_model(backend):
    model, opt = setup(attach=False, backend=backend)
    twin = copy.deepcopy(model)
    for x in batches(2):
        blocks(model, opt, x)
        textbook_step(twin, [x])
        assert_close(model, twin)


def test_without_anything_nothing_is_replayed():
    model, opt = setup(attach=False)
    (x,) = batches()
    two_steps(model, opt, x)
    assert not torch.equal(model.drawn[-1][0], model.drawn[-2][0])
    assert model.norm.num_batches_tracked == 2


def test_a_closures_own_random_numbers_are_the_same_too():
    """Augmentation in the closure, before the forward."""
    model, opt = setup()
    (x,) = batches()
    drawn = []

    def closure():
        drawn.append(torch.rand(3))
        return backward(model, x)

    opt.step(closure)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("style", ["hooks", "blocks"])
def test_a_pass_of_several_forwards(style, backend):
    model, opt = setup(backend=backend)
    twin = copy.deepcopy(model)
    xs = batches(3)
    reseed(100)
    for half, finish in (opt.first_pass, opt.first_step), (opt.second_pass, opt.second_step):
        for x in xs:
            if style == "blocks":
                with half():
                    backward(model, x, 3)
            else:
                backward(model, x, 3)
        finish(zero_grad=True)
    textbook_step(twin, xs)
    assert_close(model, twin)


# ---------------------------------------------------------------------- what cannot be had raises


def test_forwards_that_the_other_pass_lacks():
    model, opt = setup()
    (x,) = batches()
    backward(model, x)
    backward(model, x)
    opt.first_step(zero_grad=True)
    backward(model, x)
    with pytest.raises(RuntimeError, match=r"2 times in the first pass and 1 times.*first_pass"):
        opt.second_step()
    opt.restore()
    opt.zero_grad()
    backward(model, x)
    opt.first_step(zero_grad=True)
    backward(model, x)
    with pytest.raises(RuntimeError, match=r"for the second time.*ran it 1 times.*first_pass"):
        backward(model, x)
    opt.restore()
    two_steps(model, opt, x)


def test_a_forward_of_the_model_may_begin_around_a_block():
    """As in Lightning, whose DistributedDataParallel calls the module, and that training_step."""
    model, opt = setup()
    inner = model.forward

    def training_step(x):
        with opt.first_pass():
            return inner(x).square().mean() / 2

    model.forward = training_step
    for x in batches(2):
        model(x).backward()
    model.forward = inner
    opt.first_step(zero_grad=True)
    for x in batches(2):
        with opt.second_pass():
            backward(model, x, 2)
    opt.second_step()
    for first, second in zip(model.drawn[:2], model.drawn[2:], strict=True):
        assert torch.equal(first[0], second[0])
        assert first[1:] == second[1:]


def test_a_first_pass_that_was_not_seen():
    model, opt = setup()
    (x,) = batches()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"ran it 0 times with gradients enabled"):
        backward(model, x)
    opt.restore()


def test_evaluation_between_is_no_part_of_a_pass():
    model, opt = setup()
    twin = copy.deepcopy(model)
    (x,) = batches()
    reseed(100)
    for half in opt.first_step, opt.second_step:
        with torch.no_grad():
            model(x + 1) if half == opt.first_step else None
        if half == opt.first_step:
            twin(x + 1)
            reseed(100)
        model.eval()
        model(x)
        model.train()
        backward(model, x)
        half(zero_grad=True)
    textbook_step(twin, [x])
    assert_close(model, twin)


def test_a_model_that_is_trained_in_evaluation_mode():
    model, opt = setup()
    model.eval()
    (x,) = batches()
    two_steps(model, opt, x)
    assert model.norm.num_batches_tracked == 0


def test_a_batch_that_is_given_up():
    model, opt = setup()
    (x,) = batches()
    backward(model, x)
    opt.restore()
    opt.zero_grad()
    two_steps(model, opt, x)


def test_blocks_begin_a_pass_anew():
    """The generator of a GAN also runs for the other network's step."""
    model, opt = setup()
    (x,) = batches()
    model(x).detach()
    blocks(model, opt, x)
    assert_same_draws(*model.drawn[-2:])


def test_blocks_out_of_order():
    model, opt = setup()
    (x,) = batches()
    with pytest.raises(RuntimeError, match="after first_step"), opt.second_pass():
        pass
    backward(model, x)
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"first_pass\(\) was there 0 times"), opt.second_pass():
        pass
    with pytest.raises(RuntimeError, match=r"first_pass\(\) between"), opt.first_pass():
        pass
    opt.restore()
    with (
        pytest.raises(RuntimeError, match="do not nest"),
        opt.first_pass(),
        opt.first_pass(),
    ):
        pass
    opt.zero_grad()
    for half in opt.first_pass, opt.first_pass:
        with half():
            backward(model, x)
    opt.first_step(zero_grad=True)
    with opt.second_pass():
        backward(model, x)
    with pytest.raises(RuntimeError, match=r"there 2 times in the first pass and 1 times"):
        opt.second_step()
    opt.restore()


def test_second_pass_needs_a_model():
    model, opt = setup(attach=False)
    (x,) = batches()
    with opt.first_pass():
        backward(model, x)
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"second_pass\(model\)"), opt.second_pass():
        pass
    opt.restore()
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        opt.accumulate([x], lambda x: backward(model, x))


def test_an_exception_in_a_block_makes_it_no_part():
    model, opt = setup()
    (x,) = batches()
    with pytest.raises(KeyError), opt.first_pass():
        raise KeyError
    blocks(model, opt, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_the_whole_model(reentrant):
    model, opt = setup()
    twin = copy.deepcopy(model)
    (x,) = batches()
    x.requires_grad_()

    def run():
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        out.square().mean().backward()

    reseed(100)
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            run()
        return
    run()
    opt.first_step(zero_grad=True)
    run()
    opt.second_step(zero_grad=True)
    textbook_step(twin, [x])
    # BatchNorm averages twice in the first pass: torch recomputes it.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert model.norm.num_batches_tracked == 2


# --------------------------------------------------------------------------------- the attachment


def test_attach_twice_and_to_another_model():
    model, opt = setup()
    hooks = len(model._forward_pre_hooks), len(model._state_dict_pre_hooks)
    assert opt.attach(model) is None
    assert (len(model._forward_pre_hooks), len(model._state_dict_pre_hooks)) == hooks
    outer = nn.Sequential(model)
    opt.attach(outer)
    assert not model._forward_pre_hooks and len(outer._forward_pre_hooks) == 1
    (x,) = batches()
    two_steps(outer, opt, x)
    assert_same_draws(*model.drawn[-2:])


def test_attach_refuses():
    model, opt = setup()
    with pytest.raises(TypeError, match=r"nn\.Module.*function"):
        opt.attach(two_steps)
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        opt.attach(nn.Linear(2, 2))
    (x,) = batches()
    backward(model, x)
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"attach\(\) between"):
        opt.attach(model)


def test_wrap_attaches():
    model = Noisy()
    opt = FusedSAM.wrap(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    twin = copy.deepcopy(model)
    (x,) = batches()
    two_steps(model, opt, x)
    textbook_step(twin, [x])
    assert_close(model, twin)


def test_neither_holds_the_other():
    """The hooks go with the optimizer; the model goes although the optimizer stays."""
    model, opt = setup()
    (x,) = batches()
    two_steps(model, opt, x)
    seen = weakref.ref(opt)
    del opt
    gc.collect()
    assert seen() is None
    assert not model._forward_pre_hooks and not model.first._state_dict_pre_hooks
    model, opt = setup()
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    opt.zero_grad()


SAVERS = {
    "state_dict": lambda model: model.state_dict(),
    "of a part": lambda model: model.first.state_dict(),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_a_perturbed_model_is_not_saved(save):
    model, opt = setup()
    (x,) = batches()
    save(model)
    backward(model, x)
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"w \+ epsilon.*second_step\(\) or.*restore\(\)"):
        save(model)
    backward(model, x)
    opt.second_step()
    save(model)


def test_copies_made_together_are_attached_to_each_other(backend):
    model, opt = setup(backend=backend)
    (x,) = batches()
    two_steps(model, opt, x)
    model2, opt2 = copy.deepcopy((model, opt))
    two_steps(model2, opt2, x)
    two_steps(model, opt, x)
    assert_same_draws(*model2.drawn[-2:])
    for a, b in zip(model.state_dict().values(), model2.state_dict().values(), strict=True):
        assert_same_bits(a, b)
    backward(model2, x)
    opt2.first_step()
    model.state_dict()
    with pytest.raises(RuntimeError, match="w \\+ epsilon"):
        model2.state_dict()


def test_a_copy_alone_is_attached_to_nothing():
    model, opt = setup()
    (x,) = batches()
    other = copy.deepcopy(model)
    backward(other, x)
    two_steps(model, opt, x)  # the other's forward was no part of it
    for opt2 in copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)):
        for half in opt2.first_step, opt2.second_step:
            for p in opt2.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            half()


def test_a_pickled_model_does_not_need_this_package():
    model, _ = setup()
    model = nn.Sequential(model.first)
    opt = FusedSAM(model.parameters(), lr=0.1, model=model)
    data = pickle.dumps(model)
    assert b"fused_sam" not in data
    loaded = pickle.loads(data)
    (x,) = batches()
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    opt.restore()
    file = io.BytesIO()
    torch.save((model, opt), file)
    file.seek(0)
    model, opt = torch.load(file, weights_only=False)
    opt.attach(model)
    backward(model, x)
    opt.first_step()


def test_statistics_are_tracked_again_whatever_ends_the_step():
    model, opt = setup()
    (x,) = batches()
    backward(model, x)
    opt.first_step()
    assert not model.norm.track_running_stats
    opt.restore()
    assert model.norm.track_running_stats
    opt.zero_grad()

    def closure():
        backward(model, x)
        if opt.is_perturbed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert model.norm.track_running_stats
    opt.zero_grad()
    # A block of the user's own around the end of the step.
    backward(model, x)
    opt.first_step(zero_grad=True)
    with frozen_running_stats(model):
        backward(model, x)
        opt.second_step()
        assert not model.norm.track_running_stats
    assert model.norm.track_running_stats


class Device:
    """A device's module in torch, of another machine."""

    def __init__(self):
        self.state = torch.arange(3)

    def get_rng_state(self, device):
        assert device == torch.device("xpu:1")
        return self.state.clone()

    def set_rng_state(self, state, device):
        assert device == torch.device("xpu:1")
        self.state = state


def test_random_states_of_devices(monkeypatch):
    module = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    here = torch.device("xpu:1")
    now = Randomness.now([torch.device("cpu"), here, here])
    assert len(now.devices) == 1
    module.state += 1
    now.replay()
    assert torch.equal(module.state, torch.arange(3))
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    with pytest.raises(RuntimeError, match=r"torch\.xpu has no get_rng_state\(\)"):
        Randomness.now([here])


# ------------------------------------------------------------------------------------- accumulate


@pytest.mark.parametrize("ascent", ["global", "local"])
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adagrad])
def test_accumulate_equals_the_textbook(ascent, rule, backend):
    model, opt = setup(backend=backend, rule=rule)
    if rule is not torch.optim.SGD:  # an own optimizer steps by itself: the climb is the test
        opt.param_groups[0]["lr"] = 0.0
    twin = copy.deepcopy(model)
    for i in range(2):
        xs = batches(3, seed=i)
        seen = []

        def run(pair, seen=seen):
            seen.append(opt.is_perturbed)
            return backward(model, pair[1], 3), pair[0]

        reseed(100)
        returned = opt.accumulate(enumerate(xs), run, ascent=ascent)
        assert [number for _, number in returned] == [0, 1, 2]
        order = [False] * 3 + [True] * 3 if ascent == "global" else [False, True] * 3
        assert seen == order
        textbook_step(twin, xs, local=ascent == "local", lr=opt.param_groups[0]["lr"])
        assert_close(model, twin)


def test_accumulate_keeps_the_ranks_quiet_but_at_the_end():
    model, opt = setup()
    log = []

    @contextmanager
    def no_sync():
        log.append("quiet")
        yield
        log.append("loud")

    def run(x):
        log.append("2" if opt.is_perturbed else "1")
        backward(model, x)

    opt.accumulate(batches(2), run, no_sync=no_sync)
    assert log == ["quiet", "1", "loud", "1", "quiet", "2", "loud", "2"]
    log.clear()
    opt.accumulate(batches(2), run, no_sync=no_sync, ascent="local")
    quiet = ["quiet", "1", "loud"]
    assert log == [*quiet, "quiet", "2", "loud", *quiet, "2"]


@pytest.mark.parametrize("ascent", ["global", "local"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_accumulate_that_is_interrupted_leaves_w(ascent, call):
    model, opt = setup()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def run(x):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        backward(model, x)

    with pytest.raises(KeyboardInterrupt):
        opt.accumulate(batches(2), run, ascent=ascent)
    assert not opt.is_perturbed and model.norm.track_running_stats
    for p, w in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, w)
    opt.zero_grad()
    two_steps(model, opt, batches()[0])


def test_accumulate_refuses():
    model, opt = setup()
    (x,) = batches()

    def run(x):
        return backward(model, x)

    with pytest.raises(ValueError, match="no micro-batch"):
        opt.accumulate([], run)
    with pytest.raises(ValueError, match="ascent='each'"):
        opt.accumulate([x], run, ascent="each")
    backward(model, x)
    with pytest.raises(RuntimeError, match=r"no step has used.*zero_grad\(\)"):
        opt.accumulate([x], run)
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) between"):
        opt.accumulate([x], run)
    opt.restore()
    opt.zero_grad()
    assert len(opt.accumulate([x], run)) == 1
    assert len(opt.accumulate([x], run)) == 1  # those that are left over are used


def test_accumulate_runs_hooks_and_schedulers():
    model, opt = setup()
    seen = []
    opt.register_step_post_hook(lambda *args: seen.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    opt.accumulate(batches(2), lambda x: backward(model, x))
    scheduler.step()
    assert seen == [1] and opt.param_groups[0]["lr"] == LR / 2
