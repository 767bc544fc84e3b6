"""Whole steps in a CUDA graph, without a GPU: each must be the eager one, bit for bit.

The graph is emulated: see graph_emulator.py. test_gpu.py replays real ones.
"""

import copy
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_emulator import EmulatedGraph, HostRecording
from oracle import same_bits
from torch import nn

from fused_sam import FusedSAM, graphs, schedule
from fused_sam.ascents import MSAM, USAM, PNorm, VaSSO
from fused_sam.backends import capture as captures
from fused_sam.backends import native
from fused_sam.blends import GSAM, WSAM, CoupledWSAM, LookSAM
from fused_sam.graphs import captured, conditions

pytestmark = pytest.mark.skipif(
    native.missing("cpu") is not None, reason=f"native: {native.missing('cpu')}"
)
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
BATCHES = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(6)]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    class Graph(EmulatedGraph):
        def record(self, run):
            with monkeypatch.context() as patch:
                patch.setattr(captures, "is_capturing", lambda device: True)
                super().record(run)

    monkeypatch.setattr(captured, "DeviceGraph", Graph)
    monkeypatch.setattr(captured, "Recording", HostRecording)
    monkeypatch.setattr(conditions, "check_device", lambda device: None)


def loss_fn(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x).float(), y)


def make(base=SGD, dtype=torch.float32, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.4), nn.Linear(7, 3)).to(
        dtype
    )
    options = {"lr": 0.1, "rho": 0.3, "backend": "native", "model": model, **options}
    groups = [{"params": model[:2].parameters()}, {"params": model[3].parameters(), "rho": 0.7}]
    return model, FusedSAM(groups, base, **options)


def eager(model, opt, batch, scaler=None):
    opt.zero_grad()
    loss = loss_fn(model, batch)
    if opt._follows() is not None:
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()
    scale = (lambda x: x) if scaler is None else scaler.scale
    scale(loss).backward()
    if opt.first_step(zero_grad=True):
        scale(loss_fn(model, batch)).backward()
    if scaler is None:
        opt.second_step(zero_grad=True)
    else:
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return loss.detach()


def everything(model, opt):
    tensors = list(model.state_dict().values())
    for entry in opt.state.values():
        tensors += [entry[name] for name in sorted(entry)]
    return [x.detach().clone() for x in tensors]


def cast(batch, dtype):
    return batch[0].to(dtype), batch[1]


def assert_alike(options, change=lambda opt, i: None, *, dtype=torch.float32, steps=4):
    """Captured and eager steps, one after the other: same losses, weights, statistics, state."""
    results = []
    for graph in (True, False):
        model, opt = make(dtype=dtype, **options)
        if opt._follows() is not None:  # whose first step has no momentum, and no climb to count
            eager(model, opt, cast(BATCHES[-2], dtype))
        torch.manual_seed(5)
        if graph:
            step = graphs.capture(model, loss_fn, opt, cast(BATCHES[-1], dtype))
            assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())
        else:

            def step(batch, model=model, opt=opt):
                return eager(model, opt, batch)

        seen = []
        for i in range(steps):
            change(opt, i)
            seen += [step(cast(BATCHES[i], dtype)), *everything(model, opt)]
            seen.append(opt.grad_norm if opt._facts.total is not None else torch.zeros(()))
        seen.append(torch.rand(3))
        results.append((seen, opt.state_dict()["param_groups"]))
    (ours, own_groups), (theirs, groups) = results
    assert len(ours) == len(theirs)
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    assert own_groups == groups
    assert any(not same_bits(a, b) for a, b in zip(ours, ours[len(ours) // steps :], strict=False))


CASES = {
    "sgd": {"momentum": 0.9},
    "plain": {},
    "adamw": {"base": ADAMW, "weight_decay": 0.1},
    "asam": {"adaptive": True, "eta": 0.01, "momentum": 0.9},
    "clipped": {"max_grad_norm": 0.5, "momentum": 0.9},
    "gsam": {"blend": GSAM(0.4), "momentum": 0.9},
    "gsam-clipped": {"blend": GSAM(0.4), "max_grad_norm": 0.2},
    "wsam": {"blend": WSAM(0.8, max_norm=0.3), "momentum": 0.9},
    "wsam-clipped": {"blend": CoupledWSAM(0.8), "max_grad_norm": 0.2},
    "looksam": {"blend": LookSAM(2), "momentum": 0.9},
    "looksam-clipped": {"blend": LookSAM(3), "max_grad_norm": 0.2, "base": ADAMW},
    "p-norm": {"ascent": PNorm(4.0)},
    "usam": {"ascent": USAM()},
    "msam": {"ascent": MSAM(), "momentum": 0.9, "weight_decay": 0.1},
    "msam-adamw": {"ascent": MSAM(), "base": ADAMW, "max_grad_norm": 0.5},
    "every": {"when": schedule.Every(2), "momentum": 0.9},
    "from": {"when": schedule.From(2), "base": ADAMW},
}


@pytest.mark.parametrize("case", CASES)
def test_captured_steps_are_the_eager_ones(case):
    assert_alike(CASES[case])


def test_half_precision_rounds_anew_in_each_replay():
    """Guards the number of the climb, which a launch takes as an argument."""
    assert_alike({"momentum": 0.9}, dtype=torch.bfloat16)
    assert_alike({"momentum": 0.9, "master_weights": True}, dtype=torch.bfloat16)


def test_hyperparameters_are_those_of_the_call():
    def change(opt, i):
        for row, group in enumerate(opt.param_groups):
            group["lr"] = 0.1 * (row + 1) / (i + 1)
            group["rho"], group["momentum"] = 0.1 + i, 0.5 + 0.1 * i
            group["weight_decay"], group["blend_alpha"] = 0.01 * i, 0.1 * i
        opt.max_grad_norm = 0.1 + 0.2 * i

    assert_alike({"momentum": 0.9, "blend": GSAM(0.2), "max_grad_norm": 1.0}, change)


def test_a_scheduler_and_a_loaded_checkpoint_are_followed():
    """Guards the groups, which load_state_dict replaces: a graph asks those that it knows.

    The checkpoint knows nothing of a scheduler, and JSON has made a list of its betas.
    """
    results = []
    for graph in (True, False):
        model, opt = make(base=ADAMW)
        eager(model, opt, BATCHES[0])
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        saved[1]["param_groups"][0]["betas"] = [0.8, 0.9]
        opt.param_groups[1]["lr"] = np.float32(0.02)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        step = (
            graphs.capture(model, loss_fn, opt, BATCHES[0])
            if graph
            else (lambda batch, model=model, opt=opt: eager(model, opt, batch))
        )
        for batch in BATCHES[:3]:
            step(batch)
            scheduler.step()
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        opt.param_groups[0]["lr"] = 0.03
        step(BATCHES[4])
        results.append(everything(model, opt))
    assert all(map(same_bits, *results))


def test_the_example_of_the_docs_runs():
    page = (Path(__file__).parents[1] / "docs" / "graphs.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    scope = {}
    exec(code.replace(".cuda()", "").replace("rho=0.05", "rho=0.05, backend='native'"), scope)
    assert scope["loss"].item() < 0.5


def test_capturing_changes_nothing():
    model, opt = make(momentum=0.9)
    eager(model, opt, BATCHES[0])
    before, groups = everything(model, opt), copy.deepcopy(opt.state_dict()["param_groups"])
    graphs.capture(model, loss_fn, opt, BATCHES[0])
    assert all(map(same_bits, before, everything(model, opt)))
    assert opt.state_dict()["param_groups"] == groups
    assert not opt.is_perturbed and all(p.grad is None for p in model.parameters())


def test_eager_steps_and_other_captures_may_come_between():
    results = []
    for mixed in (True, False):
        model, opt = make(momentum=0.9, base=SGD)
        torch.manual_seed(3)
        plain = lambda batch, model=model, opt=opt: eager(model, opt, batch)  # noqa: E731
        steps = [plain] * 5
        if mixed:
            small = tuple(x[:4] for x in BATCHES[0])
            first = graphs.capture(model, loss_fn, opt, BATCHES[0])
            second = graphs.capture(model, loss_fn, opt, small)
            steps = [first, plain, second, first, plain]
        for i, step in enumerate(steps):
            step(BATCHES[i] if i != 2 else tuple(x[:4] for x in BATCHES[2]))
        results.append(everything(model, opt))
    assert all(map(same_bits, *results))


def test_a_scaler_scales_skips_and_grows_inside():
    results = []
    for graph in (True, False):
        model, opt = make(momentum=0.9, max_grad_norm=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        step = lambda batch, m=model, o=opt, s=scaler: eager(m, o, batch, s)  # noqa: E731
        if graph:
            step = graphs.capture(model, loss_fn, opt, BATCHES[0], scaler=scaler)
            assert scaler.get_scale() == 256.0
        torch.manual_seed(2)
        seen = []
        for i, (x, y) in enumerate(BATCHES):
            step((x * torch.inf if i == 3 else x, y))
            seen += [torch.tensor(scaler.get_scale()), *everything(model, opt)[:1]]
        results.append(seen + everything(model, opt)[:1])
    assert all(map(same_bits, *results))
    assert list(map(float, results[0][0:-1:2])) == [256, 512, 512, 256, 256, 512]


def test_gradients_do_not_outlive_their_step():
    """Guards a table of theirs, which kept them: a copy of the weights in the second pass."""
    model, opt = make()
    loss_fn(model, BATCHES[0]).backward()
    grad = weakref.ref(model[0].weight.grad)
    opt.first_step(zero_grad=True)
    assert grad() is None


def test_nothing_is_sent_where_nothing_changed():
    model, opt = make(when=schedule.From(100))
    step = graphs.capture(model, loss_fn, opt, BATCHES[0])
    for batch in BATCHES:
        step(batch)
    assert step._graphs[False].recording.sent == 1


def add_group(model, opt):
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def set_option(**options):
    return lambda model, opt: opt.param_groups[0].update(options)


CHANGES = {
    "add_param_group": (add_group, "added, removed"),
    "moved": (lambda m, o: setattr(m[0].weight, "data", m[0].weight.data.clone()), "moved"),
    "frozen": (lambda m, o: m[0].weight.requires_grad_(False), "requires_grad"),
    "eval": (lambda m, o: m[2].eval(), "training mode"),
    "buffer": (lambda m, o: setattr(m[1], "running_mean", torch.ones(7)), "buffer"),
    "layer": (lambda m, o: m.__setitem__(2, nn.Dropout(0.1)), "layer"),
    "nesterov": (set_option(nesterov=True), "'nesterov' of group 0 was False and is True"),
    "adaptive": (set_option(adaptive=True), "what group 0 keeps and reads"),
    "momentum": (set_option(momentum=0.0), "what group 0 keeps"),
    "maximize": (set_option(maximize=1), "what group 0 keeps and reads"),
    "ascent": (set_option(ascent=None), "'ascent' of group 0"),
    "state": (lambda m, o: o.state[m[0].weight].clear(), "state"),
    "groups": (lambda m, o: setattr(o, "param_groups", [dict(g) for g in o.param_groups]), "group"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_has_baked_in_is_an_error_when_it_changes(change):
    model, opt = make(momentum=0.9, maximize=0)
    step = graphs.capture(model, loss_fn, opt, BATCHES[0])
    step(BATCHES[1])
    act, words = CHANGES[change]
    act(model, opt)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{words}.*capture it again"):
            step(BATCHES[2])
    assert all(map(same_bits, before, model.parameters()))


def test_hooks_half_steps_and_gradients_are_errors():
    model, opt = make(momentum=0.9)
    step = graphs.capture(model, loss_fn, opt, BATCHES[0])
    handle = opt.register_step_post_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="step hooks"):
        step(BATCHES[0])
    handle.remove()
    loss_fn(model, BATCHES[0]).backward()
    with pytest.raises(RuntimeError, match="no step has used"):
        step(BATCHES[0])
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="captured step between first_step"):
        step(BATCHES[0])
    opt.restore()
    step(BATCHES[0])


@pytest.mark.parametrize(
    "batch, error",
    [
        (BATCHES[0][0], ValueError),
        ([*BATCHES[0]], ValueError),
        ((BATCHES[0][0][:3], BATCHES[0][1][:3]), ValueError),
        ((BATCHES[0][0].double(), BATCHES[0][1]), ValueError),
        ((BATCHES[0][0].to("meta"), BATCHES[0][1]), ValueError),
        ((BATCHES[0][0], 1), TypeError),
        ((BATCHES[0][0].to_sparse(), BATCHES[0][1]), TypeError),
    ],
)
def test_another_batch_is_an_error(batch, error):
    model, opt = make()
    step = graphs.capture(model, loss_fn, opt, BATCHES[0])
    before = everything(model, opt)
    with pytest.raises(error, match="batch"):
        step(batch)
    assert all(map(same_bits, before, everything(model, opt)))
    assert "sam_climbs" not in opt.param_groups[0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "reference"}, "backend='reference'"),
        ({"base": torch.optim.NAdam}, "NAdam steps by itself"),
        ({"when": schedule.AESAM(10)}, "reads the gradient's norm"),
        ({"ascent": VaSSO()}, "operations of torch's"),
    ],
)
def test_what_cannot_be_captured_is_refused(options, words):
    model, opt = make(**options)
    with pytest.raises(RuntimeError, match=words):
        graphs.capture(model, loss_fn, opt, BATCHES[0])


def test_without_a_gpu_there_is_no_graph(monkeypatch):
    monkeypatch.undo()
    model, opt = make()
    with pytest.raises(RuntimeError, match="parameters are on cpu"):
        graphs.capture(model, loss_fn, opt, BATCHES[0])


def test_a_step_that_waits_for_the_device_is_refused_and_nothing_has_changed():
    model, opt = make(momentum=0.9)
    eager(model, opt, BATCHES[0])
    before = everything(model, opt)

    def waits(model, batch):
        loss = loss_fn(model, batch)
        loss.item()
        return loss

    with pytest.raises(RuntimeError, match=r"could not be captured.*\.item\(\)"):
        graphs.capture(model, waits, opt, BATCHES[0])
    assert all(map(same_bits, before, everything(model, opt)))
    eager(model, opt, BATCHES[0])


def test_a_loss_that_raises_leaves_everything_as_it_was():
    """In a warm-up, between the passes: the way back is real there."""
    model, opt = make(momentum=0.9)
    calls = []

    def raises(model, batch):
        calls.append(0)
        if len(calls) == 2:
            raise KeyError("of the loss")
        return loss_fn(model, batch)

    before = everything(model, opt)
    with pytest.raises(KeyError, match="of the loss"):
        graphs.capture(model, raises, opt, BATCHES[0])
    assert all(map(same_bits, before, everything(model, opt)))
    assert not opt.is_perturbed


def test_dampening_needs_a_step_before():
    """Guards the first gradient, which enters undampened: every replay would be a first step."""
    model, opt = make(momentum=0.9, dampening=0.5)
    with pytest.raises(RuntimeError, match="one step before"):
        graphs.capture(model, loss_fn, opt, BATCHES[0])
    eager(model, opt, BATCHES[0])
    graphs.capture(model, loss_fn, opt, BATCHES[0])


def test_a_parameter_that_is_not_the_optimizers_is_refused():
    model, _ = make()
    opt = FusedSAM(model[3].parameters(), lr=0.1, backend="native")
    with pytest.raises(RuntimeError, match=r"0\.weight gets a gradient"):
        graphs.capture(model, loss_fn, opt, BATCHES[0])
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_parameters_that_are_not_the_optimizers_stay():
    """Of two that are refused, and one that another backward has left."""
    model, _ = make()
    model[0].weight.grad = left = torch.ones(7, 5)
    opt = FusedSAM(model[3].parameters(), lr=0.1, backend="native")
    with pytest.raises(RuntimeError, match="is not the optimizer's"):
        graphs.capture(model, loss_fn, opt, BATCHES[0])
    assert model[0].weight.grad is left and torch.equal(left, torch.ones(7, 5))


@pytest.mark.parametrize("attached", [True, False])
def test_momentum_sam_may_be_ahead_when_a_captured_step_begins(attached):
    """Guards w: a graph begins there, and would take w + epsilon for it."""
    results = []
    for mixed in (True, False):
        model, opt = make(ascent=MSAM(), momentum=0.9)
        if not attached:
            model, opt = make(ascent=MSAM(), momentum=0.9, model=None)

        def plain(batch, model=model, opt=opt):
            opt.train()
            loss_fn(model, batch).backward()
            opt.step()
            opt.zero_grad()

        torch.manual_seed(3)
        plain(BATCHES[0])
        plain(BATCHES[1])
        step = graphs.capture(model, loss_fn, opt, BATCHES[0]) if mixed else plain
        for each, batch in zip((step, plain, step), BATCHES[2:], strict=False):
            opt.train()
            each(batch)
        opt.eval()
        results.append(everything(model, opt))
        if mixed:
            opt.train()
            model[0].weight.detach().mul_(2)
            with pytest.raises(RuntimeError, match="written to while they were ahead"):
                step(BATCHES[0])
    assert all(map(same_bits, *results))


def test_momentum_sam_with_a_half_done_step_is_refused():
    model, opt = make(ascent=MSAM(), momentum=0.9)
    loss_fn(model, BATCHES[0]).backward()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"capture\(\) between"):
        graphs.capture(model, loss_fn, opt, BATCHES[0])
    assert opt._facts.between


def test_momentum_sam_after_a_step_with_other_gradients():
    """Guards the parameters that the climb leaves out, which a graph has baked in."""
    model, opt = make(ascent=MSAM(), momentum=0.9)
    eager(model, opt, BATCHES[0])
    step = graphs.capture(model, loss_fn, opt, BATCHES[0])
    loss_fn(model, BATCHES[0]).backward()
    model[3].bias.grad = None
    opt.step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"had no gradient for changed\..*capture it again"):
        step(BATCHES[1])


def test_buffers_that_a_step_replaces_are_refused_and_as_before():
    """Guards what passes from step to step: each replay would begin with that of the capture."""
    model, opt = make()
    model[1].register_buffer("expanded", torch.ones(3).expand(2, 3))  # nothing can be put back here
    first = model[1].running_mean

    def replaces(model, batch):
        loss = loss_fn(model, batch)
        model[1].running_mean = model[1].running_mean * 0.5
        return loss

    with pytest.raises(RuntimeError, match=r"in the place of a buffer.*copy_\(\)"):
        graphs.capture(model, replaces, opt, BATCHES[0])
    assert model[1].running_mean is first and torch.equal(first, torch.zeros(7))
    graphs.capture(model, loss_fn, opt, BATCHES[0])


def test_averages_are_put_back(monkeypatch):
    """Each warm-up moves one in its climb; the capture itself fails here, where torch computes."""
    monkeypatch.setattr(native.NativeBackend, "bakes_in", lambda *args: None)
    model, opt = make(ascent=VaSSO())
    for there in (False, True):
        before = copy.deepcopy(opt.state_dict()["state"])
        with pytest.raises(RuntimeError, match="could not be captured"):
            graphs.capture(model, loss_fn, opt, BATCHES[0])
        average = opt.state_dict()["state"][0]["sam_average"]
        assert same_bits(average, before[0]["sam_average"] if there else average * torch.nan)
        eager(model, opt, BATCHES[0])


def test_what_a_scaler_knows_of_other_optimizers_stays():
    model, opt = make(momentum=0.9)
    other = nn.Linear(2, 1)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(other(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(others)
    graphs.capture(model, loss_fn, opt, BATCHES[0], scaler=scaler)
    scaler.step(others)
    assert torch.equal(other.weight.grad, torch.ones(1, 2))  # not unscaled once more
