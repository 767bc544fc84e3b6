"""Memory: the model must not notice that its parameters live in flat buffers."""

import copy
import gc
import io
import itertools
import tracemalloc
import weakref

import pytest
import torch
from oracle import Textbook, assert_same_bits, inject, params_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fused_sam import FusedSAM
from fused_sam.memory import bucket as memory

SGD, ADAM, ADAMW, RMSPROP = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)
FUSED = {
    "sgd": (SGD, {"momentum": 0.8, "weight_decay": 0.05}),
    "adam": (ADAM, {"amsgrad": True}),
    "adamw": (ADAMW, {}),
    "rmsprop": (RMSPROP, {"momentum": 0.5, "centered": True, "eps": 1e-2}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
ALIGNMENT = 64


def make(params, rule="sgd", **options):
    cls, base_options = FUSED[rule]
    return FusedSAM(params, cls, **{"rho": 0.3, "lr": 0.05, **base_options, **options})


def make_params(shapes=((5, 7), (3,), (65,), ()), dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def grads_like(params):
    return {p: torch.randn_like(p) for p in params}


def steps(textbook, n=1):
    for _ in range(n):
        params = params_of(textbook.opt)
        textbook.step(grads_like(params), grads_like(params))


def saved_bytes(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    return len(file.getvalue())


def padding_of(bucket, flat):
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    for slot in bucket.slots:
        mask[slot.start : slot.start + slot.numel] = False
    return flat[mask]


# --------------------------------------------------------------------------- storages of their own


def test_saving_one_layer_writes_one_layer(backend):
    """A parameter that is a plain view of the flat buffer would drag all of it into the file."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(300, 300))
    opt = make(model.parameters(), backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    assert saved_bytes(model[0].state_dict()) < 4 * 20 + 4096
    assert saved_bytes(opt.state[model[0].weight]) < 4 * 16 + 4096
    for p in model.parameters():
        for tensor in (p, opt.state[p]["momentum_buffer"]):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
            assert tensor.storage_offset() == 0


def test_safetensors_saves_and_loads_in_place(tmp_path, backend):
    """It refuses models whose tensors share storage."""
    from safetensors.torch import load_model, save_model

    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 3, 3))
    opt = make(model.parameters(), backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    save_model(model, str(tmp_path / "model.safetensors"))
    kept = copy.deepcopy(model.state_dict())
    addresses = [p.data_ptr() for p in params_of(opt)]
    steps(textbook)
    load_model(model, str(tmp_path / "model.safetensors"))
    for name, value in model.state_dict().items():
        assert_same_bits(value, kept[name], name)
    assert [p.data_ptr() for p in params_of(opt)] == addresses
    textbook.reread(*params_of(opt))
    steps(textbook)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_keep_values_strides_and_identity(dtype, backend):
    params = make_params(((2, 3, 4, 5), (4, 6), (0,), (1,), ()), dtype)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    params.append(nn.Parameter(torch.randn(6, 4, dtype=dtype).t()))
    params.append(nn.Parameter(torch.randn(3, 5, 2, dtype=dtype).permute(2, 0, 1)))
    before = [(p.detach().clone(), p.stride(), p.requires_grad) for p in params]
    opt = make(params, backend=backend)
    textbook = Textbook(opt)
    for p, q, (w, stride, requires_grad) in zip(params, params_of(opt), before, strict=True):
        assert p is q and type(p) is nn.Parameter and p.is_leaf
        assert_same_bits(p, w)
        assert (p.stride(), p.requires_grad, p.dtype) == (stride, requires_grad, dtype)
    steps(textbook, 2)
    for p, (_, stride, _) in zip(params, before, strict=True):
        assert p.stride() == stride
        if p.numel():
            assert opt.state[p]["momentum_buffer"].stride() == stride


def test_parameters_with_gaps_become_dense(backend):
    """Every second column, with nobody holding the rest; and one number seen four times."""
    gaps = nn.Parameter(torch.randn(4, 6)[:, ::2])
    expanded = nn.Parameter(torch.randn(1).expand(4))
    before = [gaps.detach().clone(), expanded.detach().clone()]
    try:
        opt = make([gaps, expanded], backend=backend)
        textbook = Textbook(opt)
    except ValueError as error:
        # Only while something else holds the memory.
        pytest.fail(str(error))
    assert gaps.is_contiguous() and expanded.is_contiguous()
    assert_same_bits(gaps, before[0])
    assert_same_bits(expanded, before[1])
    steps(textbook, 2)


def test_parameters_are_aligned_to_64_elements(backend):
    params = make_params(((1,), (63,), (64,), (65,), (3, 43)))
    opt = make(params, backend=backend)
    (bucket,) = opt._facts.engine.buckets
    assert [slot.start for slot in bucket.slots] == [0, 64, 128, 192, 320]
    (weights,) = bucket.weights
    assert all(p.data_ptr() % (ALIGNMENT * 2) == weights.data_ptr() % 128 for p in params)
    starts = {p.data_ptr() - weights.data_ptr() for p in params}
    assert starts == {4 * slot.start for slot in bucket.slots}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("rule", FUSED)
def test_padding_stays_zero(rule, eps, dtype, backend):
    """Also where the rule divides 0 by 0, and where a gradient or the clip coefficient is NaN."""
    if rule != "sgd":
        options = {"eps": eps}
    elif eps:
        pytest.skip("SGD has no eps")
    else:
        options = {}
    params = make_params(dtype=dtype)
    opt = make(params, rule, max_grad_norm=0.1, backend=backend, **options)
    for i in range(4):
        for half in opt.first_step, opt.second_step:
            grads = grads_like(params)
            if i == 2:
                grads[params[0]].fill_(torch.nan)
            inject(grads)
            half()
    for bucket in opt._facts.engine.buckets:
        buffers = [torch.cat(bucket.weights), bucket.saved]
        buffers += [state.flat for name, state in bucket.states.items() if name != "step"]
        for flat in buffers:
            assert not padding_of(bucket, flat).any()


# ---------------------------------------------------------------------------------- steady state


@pytest.mark.parametrize("rule", FUSED)
def test_addresses_stay_from_step_to_step(rule, backend):
    params = make_params()
    opt = make(params, rule, backend=backend)
    textbook = Textbook(opt)
    steps(textbook)

    def addresses():
        tensors = list(params)
        for p in params:
            tensors += [v for v in opt.state[p].values()]
        for bucket in opt._facts.engine.buckets:
            tensors += [*bucket.weights, bucket.saved, *(s.flat for s in bucket.states.values())]
        return [t.data_ptr() for t in tensors]

    before = addresses()
    windows = [opt.state[p] for p in params]
    for missing in (), (0,), (1, 2), ():
        grads = grads_like(params)
        grads.update({params[i]: None for i in missing})
        textbook.step(grads, grads_like(params))
    assert addresses() == before
    assert all(opt.state[p] is w for p, w in zip(params, windows, strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_steady_state_allocates_nothing_of_a_parameters_size(rule, adaptive, backend):
    """No clone of the weights, no temporary for each parameter: counted by torch's profiler."""
    # One parameter is larger than all that a step may allocate for itself.
    params = make_params([(1 << 19,), (3,)])
    opt = make(params, rule, adaptive=adaptive, backend=backend)
    inject(grads_like(params))
    for _ in range(2):
        opt.first_step()
        opt.second_step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        opt.first_step()
        opt.second_step()
    largest = max((event.self_cpu_memory_usage for event in profile.events()), default=0)
    assert largest < params[0].numel() * 4, "a buffer as large as the parameter"


def test_changing_patterns_of_missing_gradients_do_not_pile_up(backend):
    """Mixtures of experts and stochastic depth never repeat one: nothing may be kept for each."""
    params = make_params([(2,)] * 24)
    opt = make(params, "adamw", backend=backend)
    generator = torch.Generator().manual_seed(0)

    def some(n):
        for _ in range(n):
            for half in opt.first_step, opt.second_step:
                missing = torch.rand(24, generator=generator) < 0.5
                for p, none in zip(params, missing.tolist(), strict=True):
                    p.grad = None if none else torch.ones(2)
                half()
        gc.collect()

    def held():
        """Bytes that the package's own lines have allocated: test runners allocate as well."""
        ours = tracemalloc.Filter(True, "*fused_sam*")
        traces = tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename")
        return sum(trace.size for trace in traces)

    some(40)
    tracemalloc.start()
    try:
        some(60)  # fills the caches that are bounded
        before = held()
        some(40)
        grown = held() - before
    finally:
        tracemalloc.stop()
    # Forty steps with 24 parameters: a pattern kept costs 400 bytes at least, a plan 10 kB.
    assert grown < 40 * 2 * 400, f"{grown} bytes in 40 steps"


def allocations(run):
    """What torch has allocated during a call, in bytes, one after the other; freed: negative."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
        gc.collect()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.self_cpu_memory_usage for event in events]


@pytest.mark.parametrize("left", [0, 9, 10, 15, 17])
def test_what_is_left_of_a_model_keeps_little_of_it(left, backend, monkeypatch):
    """Guards a head of a few bytes, in use elsewhere, that kept the weights of the whole model."""
    monkeypatch.setattr(memory, "PART_ELEMENTS", 1 << 12)
    shapes = [(3,), *[(1 << 10,)] * 9, (5 << 11,), *[(1 << 10,)] * 6, (7,)]
    held = {}

    def train():
        held["params"] = make_params(shapes)
        held["opt"] = make(held["params"], backend=backend)
        inject(grads_like(held["params"]))
        held["opt"].first_step()
        held["opt"].second_step()

    def drop():
        held["left"] = held["params"][left]
        for key in "params", "opt":
            del held[key]
        held["left"].grad = None

    kept = sum(allocations(train)) + sum(allocations(drop))
    # A part is that large at most, or one larger parameter.
    assert 0 < kept <= 4 * max(1 << 12, held["left"].numel())


def test_construction_needs_no_second_copy_of_all_weights(backend, monkeypatch):
    """The memory where the weights were goes part by part: the peak was one copy more."""
    monkeypatch.setattr(memory, "PART_ELEMENTS", 1 << 12)
    params = []

    def build():
        params.extend(make_params([(1 << 10,)] * 64))
        make(params, backend=backend)

    peak = max(itertools.accumulate(allocations(build)))
    size = 4 * 64 << 10
    assert peak < 2.2 * size, f"{peak / size:.1f} times the weights: w, saved, and a part of w"


def test_dropped_optimizer_frees_its_memory(backend):
    """No cycle keeps the flat buffers alive once optimizer and model are gone."""
    params = make_params()
    opt = make(params, backend=backend)
    steps(Textbook(opt))
    buffers = [weakref.ref(b.saved) for b in opt._facts.engine.buckets]
    del opt
    gc.collect()
    assert all(ref() is None for ref in buffers)
    for p in params:
        p.data.add_(1)  # the windows keep the weights alive


# ------------------------------------------------------------------- parameters that move or change


def convert_double(model):
    model.double()


def convert_half(model):
    model.to(torch.bfloat16)


def channels_last(model):
    model.to(memory_format=torch.channels_last)


def replace_data(model):
    for p in model.parameters():
        p.data = p.data.clone() + 0.5


def replace_one(model):
    model[0].weight.data = torch.randn_like(model[0].weight)


def strided_data(model):
    weight = model[1].weight
    weight.data = torch.randn(weight.shape[::-1]).t()


def share(model):
    model.share_memory()


def empty_and_load(model):
    state = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(state)


MOVES = [
    convert_double,
    convert_half,
    channels_last,
    replace_data,
    replace_one,
    strided_data,
    share,
    empty_and_load,
]


@pytest.mark.parametrize("when", ["between steps", "while perturbed"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("rule", FUSED)
def test_layout_follows_parameters_that_move(rule, move, when, backend):
    """Noticed at the next step, with the state kept, in the dtype that the parameter has now."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 7))
    opt = make(model.parameters(), rule, backend=backend)
    textbook = Textbook(opt)
    params = list(model.parameters())
    steps(textbook, 2)
    state = {p: {k: v.clone() for k, v in opt.state[p].items()} for p in params}
    if when == "between steps":
        move(model)
        textbook.reread(*params)
    else:
        textbook.first_step({**grads_like(params), params[1]: None})
        opt.zero_grad()
        move(model)
        # What was saved is what the step returns to; what had not been climbed is where it is now.
        textbook.reread(params[1])
        textbook.second_step({**grads_like(params), params[2]: None})
        state = {p: {k: v.clone() for k, v in opt.state[p].items()} for p in params}
    weights = [(p.detach().clone(), p.stride()) for p in params]
    opt.zero_grad()
    opt.first_step()
    opt.restore()
    for p, (w, stride) in zip(params, weights, strict=True):
        assert_same_bits(p, w)
        assert p.stride() == stride
        for name, value in state[p].items():
            kept = opt.state[p][name]
            expected = value if name == "step" else value.to(p.dtype)
            assert_same_bits(kept, expected, name)
    steps(textbook, 2)


@pytest.mark.parametrize("rule", FUSED)
def test_layout_follows_parameters_that_are_swapped(rule, backend):
    """model.to() swaps tensors instead of p.data if told so, which weak references would forbid."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 7))
    opt = make(model.parameters(), rule, backend=backend)
    textbook = Textbook(opt)
    steps(textbook, 2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()  # with the gradients of the last step in place
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p.dtype == torch.float64 == p.grad.dtype for p in params_of(opt))
    steps(textbook, 2)


@pytest.mark.parametrize("rule", FUSED)
def test_default_device_does_not_matter(rule, backend):
    """Whoever sets torch's default device may still have a model elsewhere."""
    params = make_params()
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = make(twins, rule, max_grad_norm=1.0, backend=backend)
    with torch.device("meta"):
        opt = make(params, rule, max_grad_norm=1.0, backend=backend)
    for i in range(4):
        for o in opt, twin:
            for p, g in zip(params_of(o), grads[i], strict=True):
                p.grad = g.clone()
        with torch.device("meta"):
            opt.first_step() if i % 2 == 0 else opt.second_step()
        twin.first_step() if i % 2 == 0 else twin.second_step()
    for p, t in zip(params, twins, strict=True):
        assert_same_bits(p, t)


@pytest.mark.parametrize("rule", FUSED)
def test_transposed_in_place(rule, backend):
    """The address stays, the strides do not: a gradient must still meet its own element."""
    params = make_params([(4, 4), (3,)])
    opt = make(params, rule, backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    params[0].data = params[0].data.t()
    textbook.reread(params[0])
    grads = {p: torch.randn(p.shape) for p in params}  # contiguous
    textbook.step(grads, {p: torch.randn(p.shape) for p in params})


@pytest.mark.parametrize("rule", FUSED)
def test_pruned_in_place(rule, backend):
    """The address stays and there are fewer elements: nothing may be read beyond the gradient."""
    params = make_params([(8, 4), (3,)])
    opt = make(params, rule, backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    params[0].data = params[0].data[:3]
    for p in params:
        opt.state[p].clear()
        textbook.state[p].clear()
    textbook.reread(params[0])
    steps(textbook, 2)
    assert params[0].shape == (3, 4)


def test_moves_again_and_again(backend):
    """A window of an earlier layout is the optimizer's to move: it must not count as shared."""
    params = make_params()
    opt = make(params, backend=backend)
    textbook = Textbook(opt)
    for _ in range(3):
        opt.add_param_group({"params": make_params()})
        steps(textbook)
    (bucket,) = opt._facts.engine.buckets
    assert bucket.weights[0].numel() == bucket.size == 64 * (1 + 1 + 2 + 1) * 4


def test_group_added_while_perturbed(backend):
    """What has climbed returns; what came later takes a plain step."""
    params, new = make_params(), make_params([(4, 3), (70,)])
    opt = make(params, backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    textbook.first_step(grads_like(params))
    opt.add_param_group({"params": new, "lr": 0.2})
    textbook.second_step(grads_like([*params, *new]))
    steps(textbook)


def test_loading_state_keeps_addresses(backend):
    params = make_params()
    opt = make(params, "adam", backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    addresses = [p.data_ptr() for p in params]
    saved = copy.deepcopy(opt.state_dict())
    state = {p: {k: v.clone() for k, v in textbook.state[p].items()} for p in params}
    steps(textbook)
    opt.load_state_dict(saved)
    textbook.state = state
    steps(textbook)
    assert [p.data_ptr() for p in params] == addresses


def test_state_that_the_user_replaces_is_used(backend):
    """As with torch.optim: assigned tensors, deleted entries, cleared state."""
    params = make_params()
    opt = make(params, backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    state = textbook.state
    state[params[0]]["momentum_buffer"] = torch.randn(5, 7)
    opt.state[params[0]]["momentum_buffer"] = state[params[0]]["momentum_buffer"].clone()
    steps(textbook)
    state[params[1]].clear()
    del opt.state[params[1]]
    steps(textbook)
    state[params[2]] = {"momentum_buffer": torch.randn(65)}
    opt.state[params[2]] = {k: v.clone() for k, v in state[params[2]].items()}
    steps(textbook)
    state.update({p: {} for p in params})
    opt.state.clear()
    steps(textbook)


# -------------------------------------------------------------------- parameters that must not move


def flat_views():
    """As nn.LSTM keeps its weights on a GPU: windows of one storage."""
    flat = torch.randn(200)
    params = [nn.Parameter(flat[:70].view(7, 10)), nn.Parameter(flat[70:135]), flat[150:151]]
    params[2].requires_grad_()
    return params, flat


def numpy_backed():
    array = torch.randn(3, 5).numpy()
    return [nn.Parameter(torch.from_numpy(array))], array


def shared_memory():
    params = make_params([(3, 5), (70,)])
    for p in params:
        p.share_memory_()
    return params, None


def aliased():
    params = make_params([(3, 5), (70,)])
    return params, [p.detach() for p in params]


def offset_view():
    base = torch.randn(12, 10)
    return [nn.Parameter(base[3:7].t())], base


@pytest.mark.parametrize("build", [flat_views, numpy_backed, shared_memory, aliased, offset_view])
@pytest.mark.parametrize("rule", FUSED)
@pytest.mark.parametrize("adaptive", [False, True])
def test_shared_memory_stays_where_it_is_and_steps(adaptive, rule, build, backend):
    """Whoever else looks at the memory sees the steps; the rest of it is not written."""
    params, holder = build()
    others = make_params()
    addresses = [p.data_ptr() for p in params]
    opt = make([*others[:2], *params, *others[2:]], rule, adaptive=adaptive, backend=backend)
    textbook = Textbook(opt)
    assert [p.data_ptr() for p in params] == addresses
    if isinstance(holder, torch.Tensor):
        outside = torch.ones(holder.shape, dtype=torch.bool)
        for p in params:
            outside.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
        kept = holder[outside].clone()
    steps(textbook, 2)
    textbook.first_step(grads_like(others))
    textbook.restore()
    assert [p.data_ptr() for p in params] == addresses
    if build is numpy_backed:
        assert torch.equal(torch.from_numpy(holder), params[0].detach())
    if isinstance(holder, torch.Tensor):
        assert torch.equal(holder[outside], kept)
    if build is aliased:
        for p, alias in zip(params, holder, strict=True):
            assert_same_bits(p, alias)


def test_shared_memory_is_shared_after_construction(backend):
    """share_memory_() moves a window into shared memory, where it must then stay."""
    params = make_params()
    opt = make(params, backend=backend)
    textbook = Textbook(opt)
    steps(textbook)
    for p in params:
        p.share_memory_()
    addresses = [p.data_ptr() for p in params]
    steps(textbook, 2)
    assert [p.data_ptr() for p in params] == addresses
    assert all(p.is_shared() for p in params)


def test_tied_weights_stay_tied(backend):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied()
    opt = make(model.parameters(), backend=backend)
    assert len(params_of(opt)) == 1
    for _ in range(2):
        opt.zero_grad()
        opt.step(lambda: model(torch.arange(6)).square().sum().backward())
        assert model.head.weight is model.embed.weight
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.embed.weight


def test_lstm_trains(backend):
    model = nn.LSTM(3, 4, num_layers=2)
    opt = make(model.parameters(), "adamw", backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(lambda: model(torch.randn(5, 2, 3))[0].square().sum().backward())
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    steps(Textbook(opt))


# ------------------------------------------------------------------------------------- copies, EMA


def test_averaged_model_and_deepcopy_are_independent(backend):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    model.to(memory_format=torch.channels_last)
    opt = make(model.parameters(), backend=backend)
    textbook = Textbook(opt)
    average = AveragedModel(model)
    copied = copy.deepcopy(model)
    kept = [p.detach().clone() for p in model.parameters()]
    steps(textbook)
    average.update_parameters(model)
    for p, c, w in zip(model.parameters(), copied.parameters(), kept, strict=True):
        assert_same_bits(c, w)
        assert not torch.equal(p, w) and p.stride() == c.stride()
        assert c.untyped_storage().nbytes() == c.numel() * 4
    for a, p in zip(average.module.parameters(), model.parameters(), strict=True):
        assert_same_bits(a, p)
    opt2 = make(copied.parameters(), backend=backend)
    steps(Textbook(opt2))
    steps(textbook)


def test_two_optimizers_over_the_same_parameters(backend):
    """One after the other, as in fine-tuning phases, and in turn."""
    params = make_params()
    first = Textbook(make(params, "sgd", backend=backend))
    steps(first, 2)
    second = Textbook(make(params, "adamw", backend=backend))
    steps(second, 2)
    for _ in range(2):
        for one in first, second:
            one.reread(*params)  # the other has stepped
            steps(one)
    del first, one
    gc.collect()
    steps(second)


def test_graph_alive_at_construction_still_backpropagates(backend):
    """Parameters are moved, not changed: what autograd has saved of them stays right."""
    weight = nn.Parameter(torch.randn(3, 4))
    x = torch.randn(2, 3, requires_grad=True)
    loss = (x @ weight).square().sum()
    expected = torch.autograd.grad(loss, [x, weight], retain_graph=True)
    opt = make([weight], backend=backend)
    textbook = Textbook(opt)
    grads = torch.autograd.grad(loss, [x, weight])
    for g, e in zip(grads, expected, strict=True):
        assert_same_bits(g, e)
    steps(textbook)


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("rule", FUSED)
def test_gradients_of_any_strides(rule, dtype, backend):
    """Transposed, expanded, gaps, conjugated, negated: matched by element, not by memory."""
    params = make_params([(4, 4), (4, 4), (3, 1, 5), (2, 3, 2, 2)], dtype)
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    opt = make(params, rule, backend=backend)
    textbook = Textbook(opt)

    def grads():
        return {
            params[0]: torch.randn(4, 4, dtype=dtype).t(),
            params[1]: torch.randn(1, 4, dtype=dtype).expand(4, 4),
            params[2]: torch.randn(3, 4, 10, dtype=dtype)[:, 1:2, ::2],
            params[3]: torch.randn(2, 3, 2, 2, dtype=dtype),
        }

    for _ in range(2):
        textbook.step(grads(), grads())


@pytest.mark.parametrize("part", ["conj", "imag of conj"])
def test_lazy_conjugates_and_negatives(part, backend):
    """Gradients whose conjugation or negation is only a flag on the tensor."""
    base = torch.randn(4, 5, dtype=torch.complex64)
    grad = base.conj() if part == "conj" else base.conj().imag
    assert grad.is_conj() or grad.is_neg()
    p = nn.Parameter(torch.randn(4, 5, dtype=grad.dtype))
    twin = nn.Parameter(p.detach().clone())
    opts = [make([w], backend=backend) for w in (p, twin)]
    for _ in range(2):
        for half in "first_step", "second_step":
            p.grad = grad
            twin.grad = grad.resolve_conj().resolve_neg().clone()
            for opt in opts:
                getattr(opt, half)()
    assert_same_bits(p, twin)


def test_misaligned_gradients(backend):
    """A gradient that starts at an odd element of somebody's buffer, as DDP's buckets have them."""
    for dtype in torch.float32, torch.bfloat16:
        params = make_params([(65,), (64,), (7,)], dtype)
        opt = make(params, backend=backend)
        textbook = Textbook(opt)
        for _ in range(2):
            for half in textbook.first_step, textbook.second_step:
                flat = torch.randn(200).to(dtype)
                views = [flat[1:66], flat[67:131], flat[133:140]]
                grads = dict(zip(params, views, strict=True))
                half(grads)


def test_weights_return_from_a_climb_that_was_interrupted_while_they_moved(backend, monkeypatch):
    """Guards a layout that is built anew between an exception and the look at how far it came."""
    params = [nn.Parameter(torch.randn(70)), nn.Parameter(torch.randn(9))]
    opt = FusedSAM(params, backend=backend, rho=0.5, lr=0.1)
    before = [p.detach().clone() for p in params]
    runs = opt._facts.engine.backends[0]
    ascend = runs.ascend_

    def interrupted(*args):
        ascend(*args)
        params[1].data = params[1].data.clone()
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "ascend_", interrupted)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt):
        opt.first_step()
    assert not opt.is_perturbed
    for p, w in zip(params, before, strict=True):
        assert_same_bits(p.detach(), w)
