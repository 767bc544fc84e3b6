"""CUDA graphs without a GPU: what the host does when it is told that a capture is going on.

The capture is pretended, so that its launches run: as a graph's first replay would. test_gpu.py
replays real graphs.
"""

import contextlib
import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from fused_sam import FusedSAM
from fused_sam.ascents import FriendlySAM
from fused_sam.backends import capture

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}


@pytest.fixture
def capturing(monkeypatch):
    """A context in which a CUDA graph is being captured, as far as the package can tell."""

    @contextlib.contextmanager
    def context(version="2.11.0"):
        with monkeypatch.context() as patch:
            patch.setattr(capture, "is_capturing", lambda device: True)
            patch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
            yield

    return context


def make(backend, base=SGD, sizes=(70, 9), **options):
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    return params, FusedSAM(params, base, backend=backend, **options)


def run(opt):
    for method in (opt.first_step, opt.second_step):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        method()


def weights(params):
    return [p.detach().clone() for p in params]


def add_group(params, opt):
    params.append(torch.nn.Parameter(torch.randn(5)))
    opt.add_param_group({"params": params[-1:]})


def move(params, opt):
    params[0].data = params[0].data.clone()


def restride(params, opt):
    params[0].data = params[0].data.as_strided((10, 7), (1, 10))


REBUILDS = {"add_param_group": add_group, "model.to": move, "strides": restride}


@pytest.mark.parametrize("rebuild", REBUILDS)
def test_memory_that_a_graph_has_seen_stays_and_the_next_step_says_so(rebuild, backend, capturing):
    """Guards replays after the layout was built anew: they wrote into freed memory, silently."""
    params, opt = make(backend, ADAMW, sizes=((10, 7), 9), lr=0.1)
    run(opt)
    with capturing():
        run(opt)
    (bucket,) = opt._facts.engine.buckets
    flat = [*bucket.weights, bucket.saved, *[state.flat for state in bucket.states.values()]]
    seen = [weakref.ref(x) for x in (*flat, *bucket.cache.values()) if not isinstance(x, dict)]
    del bucket, flat
    REBUILDS[rebuild](params, opt)
    before = weights(params)
    with pytest.raises(RuntimeError, match=r"captured, and since then .* capture it again"):
        run(opt)
    gc.collect()
    assert all(reference() is not None for reference in seen)
    assert all(map(torch.equal, before, params)) and not opt.is_perturbed
    run(opt)
    with capturing():
        run(opt)
    run(opt)
    assert not any(map(torch.equal, before, params))


def test_memory_of_pinned_parameters_stays_as_well(backend, capturing):
    """Guards what is not the optimizer's: a user may give the parameter other memory."""
    array = np.ones(8, dtype=np.float32)
    param = torch.nn.Parameter(torch.from_numpy(array))
    opt = FusedSAM([param], backend=backend, lr=0.1)
    run(opt)
    with capturing():
        run(opt)
    alive = weakref.ref(array)
    del array
    param.data = torch.ones(8)
    with pytest.raises(RuntimeError, match="capture it again"):
        run(opt)
    gc.collect()
    assert alive() is not None


def test_without_a_capture_nothing_is_kept(backend):
    """Guards the memory of everybody else: an old layout goes when the new one is there."""
    params, opt = make(backend, **MOMENTUM)
    run(opt)
    old = weakref.ref(opt._facts.engine.buckets[0].saved)
    add_group(params, opt)
    run(opt)
    gc.collect()
    assert old() is None


def test_the_way_back_comes_before_the_complaint(backend, capturing):
    params, opt = make(backend, **MOMENTUM)
    run(opt)
    with capturing():
        run(opt)
    before = weights(params)
    opt.first_step()
    move(params, opt)
    opt.restore()
    assert all(map(torch.equal, before, params)) and not opt.is_perturbed
    with pytest.raises(RuntimeError, match="capture it again"):
        run(opt)
    assert all(map(torch.equal, before, params)) and not opt.is_perturbed


@pytest.mark.parametrize("base, options", [(SGD, MOMENTUM), (ADAMW, {"lr": 0.1})])
def test_a_first_step_is_not_captured(base, options, backend, capturing):
    """Guards the flag of a fresh state: baked in, every replay would forget the momentum."""
    params, opt = make(backend, base, **options)
    before = weights(params)
    with capturing(), pytest.raises(RuntimeError, match=r"'.*' yet.*run one step before"):
        run(opt)
    assert all(map(torch.equal, before, params)) and not opt.is_perturbed
    run(opt)
    with capturing():
        run(opt)


def test_a_parameter_whose_first_gradient_is_captured_is_found(backend, capturing):
    """Guards the look at every slot: the buffers are there, for another parameter's sake."""
    params, opt = make(backend, **MOMENTUM)
    for method in (opt.first_step, opt.second_step):
        params[0].grad = torch.ones_like(params[0])
        method()
    with (
        capturing(),
        pytest.raises(RuntimeError, match=r"shape \(9,\) has no 'momentum_buffer' yet"),
    ):
        run(opt)


def test_an_average_is_not_begun_in_a_capture(backend, capturing):
    """Guards the buffer's NaN, which every replay would write anew: d = m = g for ever.

    Once it is there, the device knows which parameter's average has yet to begin.
    """
    params, opt = make(backend, lr=0.1, ascent=FriendlySAM())
    before = weights(params)
    with capturing(), pytest.raises(RuntimeError, match=r"'friendly' .*run one step before"):
        run(opt)
    assert all(map(torch.equal, before, params)) and not opt.is_perturbed
    params[0].grad = torch.ones_like(params[0])
    opt.first_step()
    opt.second_step()
    with capturing():
        run(opt)
        run(opt)
    for entry in opt.state_dict()["state"].values():
        assert entry["sam_average"].isfinite().all()


def test_a_parameter_that_never_had_a_gradient_does_not_hinder_a_capture(backend, capturing):
    params, opt = make(backend, **MOMENTUM)
    for pretend in (contextlib.nullcontext, capturing):
        with pretend():
            for method in (opt.first_step, opt.second_step):
                params[0].grad = torch.ones_like(params[0])
                method()
    assert not opt.state[params[1]]


def test_tables_are_not_made_in_a_capture(backend, capturing):
    """Guards plain SGD, which keeps no state: its first step makes tables all the same."""
    if backend == "reference":
        pytest.skip("it has no tables")
    _, opt = make(backend, lr=0.1)
    with capturing(), pytest.raises(RuntimeError, match=r"tables .*run one step before"):
        run(opt)


def test_nothing_is_laid_out_in_a_capture(backend, capturing):
    """Guards the copy into new buffers: a capture records it, and does not do it."""
    params, opt = make(backend, **MOMENTUM)
    run(opt)
    address = params[1].data_ptr()
    move(params, opt)
    with capturing(), pytest.raises(RuntimeError, match="run one step before"):
        run(opt)
    assert params[1].data_ptr() == address
    with capturing(), pytest.raises(RuntimeError, match="run one step before"):
        make(backend, **MOMENTUM)


def test_torch_without_pinned_memory_for_captures_is_refused(backend, capturing):
    params, opt = make(backend, **MOMENTUM)
    run(opt)
    before = weights(params)
    with capturing("2.10.0+cu128"), pytest.raises(RuntimeError, match=r"2\.10\.0.*torch 2\.11"):
        run(opt)
    assert all(map(torch.equal, before, params))


def test_loaded_state_is_where_a_replay_finds_it(backend, capturing):
    """Guards load_state_dict before a replay: no step comes between that would bring state in."""
    lr = torch.tensor(0.1)
    _, opt = make(backend, SGD, lr=lr, momentum=0.9)
    run(opt)
    checkpoint = copy.deepcopy(opt.state_dict())
    with capturing():
        run(opt)
    buffer = opt._facts.engine.buckets[0].states["momentum_buffer"]
    lr.fill_(0.5)
    opt.load_state_dict(checkpoint)
    for i, slot in enumerate(opt._facts.engine.buckets[0].slots):
        expected = checkpoint["state"][i]["momentum_buffer"]
        assert torch.equal(slot.of(buffer.flat), expected)
        assert opt.state[slot.param]["momentum_buffer"] is buffer.windows[i]
    assert opt.param_groups[0]["lr"] is lr and lr == 0.1
    run(opt)
    with capturing():
        run(opt)


def test_state_that_a_replay_needs_and_that_is_gone_is_an_error(backend, capturing):
    _, opt = make(backend, **MOMENTUM)
    start = copy.deepcopy(opt.state_dict())
    run(opt)
    with capturing():
        run(opt)
    opt.load_state_dict(start)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) took away.*capture it again"):
        run(opt)
    run(opt)


def test_state_replaced_before_a_capture_is_an_error(backend, capturing):
    """Guards the copy into the flat buffers: captured, every replay would start from it again."""
    _, opt = make(backend, **MOMENTUM)
    run(opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    with capturing(), pytest.raises(RuntimeError, match=r"replaced.*run one step before"):
        run(opt)


def test_copies_have_no_graphs(backend, capturing):
    _, opt = make(backend, **MOMENTUM)
    run(opt)
    with capturing():
        run(opt)
    twin = copy.deepcopy(opt)
    for group in twin.param_groups:
        group["params"][0].data = group["params"][0].data.clone()
    run(twin)
