"""Triton and, where it was built, native on a real GPU. bench/gpu.sh runs these.

FUSED_SAM_TEST_DEVICE=cpu runs what can run there, to find mistakes in the tests themselves.
"""

import copy
import functools
import os

import pytest
import torch
from oracle import Textbook, same_bits

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM
from fused_sam.backends import native
from fused_sam.blends import GSAM, LookSAM
from fused_sam.graphs import capture
from fused_sam.schedule import Every

DEVICE = torch.device(os.environ.get("FUSED_SAM_TEST_DEVICE", "cuda"))
GPU = torch.cuda.is_available() and DEVICE.type == "cuda"
no_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA or ROCm GPU")
pytestmark = [pytest.mark.gpu, *([no_gpu] if DEVICE.type == "cuda" else [])]

SGD, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
RULES = {
    "sgd": (SGD, {}),
    "sgd-nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "sgd-dampening": (SGD, {"momentum": 0.8, "dampening": 0.3, "maximize": True}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adamw": (ADAMW, {"weight_decay": 0.1, "betas": (0.85, 0.97)}),
    "rmsprop-all": (RMSPROP, {"centered": True, "momentum": 0.5, "weight_decay": 0.05}),
}
SIZES = [1, 0, 63, 4095, 4096, 4097, 100_003 if GPU else 5001]


@pytest.fixture(
    params=[
        "triton",
        pytest.param(
            "native",
            marks=pytest.mark.skipif(
                native.missing(DEVICE.type) is not None,
                reason=f"native: {native.missing(DEVICE.type)}",
            ),
        ),
    ]
)
def gpu_backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _on_the_device():
    torch.manual_seed(0)
    with DEVICE:
        yield


def make_params(sizes=SIZES, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]


def make(sizes=SIZES, base=SGD, dtype=torch.float32, backend="triton", **options):
    params = make_params(sizes, dtype)
    return params, FusedSAM(params, base, backend=backend, **{"lr": 0.05, **options})


def random_grads(params, missing=()):
    return {p: None if i in missing else torch.randn_like(p) for i, p in enumerate(params)}


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("rule", RULES)
def test_steps_as_the_textbook(rule, dtype, adaptive, gpu_backend):
    """Guards every rule on the real compiler, with gradients missing in either pass."""
    base, options = RULES[rule]
    params, opt = make(
        SIZES, base, dtype, gpu_backend, rho=0.3, adaptive=adaptive, eta=0.01, **options
    )
    textbook = Textbook(opt)
    for first, second in (((), ()), ((3,), (2, 6)), ((), ())):
        textbook.step(random_grads(params, first), random_grads(params, second))


@pytest.mark.parametrize("rule", RULES)
def test_groups_keep_their_own_options(rule, gpu_backend):
    base, options = RULES[rule]
    params = make_params()
    groups = [
        {"params": params[:3], "rho": 0.5},
        {"params": params[3:5], "adaptive": True, "eta": 0.1, "weight_decay": 0.2, "lr": 0.01},
        {"params": params[5:], "lr": torch.tensor(0.02)},
    ]
    opt = FusedSAM(groups, base, backend=gpu_backend, lr=0.05, **options)
    textbook = Textbook(opt)
    for _ in range(3):
        textbook.step(random_grads(params), random_grads(params))
        opt.param_groups[2]["lr"].mul_(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_gradients(dtype, gpu_backend):
    params, opt = make([4099, 17, 100_001], dtype=dtype, backend=gpu_backend, momentum=0.9)
    textbook = Textbook(opt)
    for _ in range(2):
        passes = []
        for _ in range(2):
            flat = torch.randn(1 + sum(p.numel() for p in params)).to(dtype)
            views = flat[1:].split([p.numel() for p in params])
            passes.append(dict(zip(params, views, strict=True)))
        textbook.step(*passes)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 3], ids=["pinned", "pinned-misaligned"])
def test_parameters_that_must_stay_where_they_are(offset, dtype, adaptive, gpu_backend):
    """Guards the way by address: parameters that are views of a storage with other owners.

    They lie among others that move, so that a wrong slot's address would be noticed; with an offset
    no access of 16 bytes fits. What surrounds them in their storage must not be touched.
    """
    shared = torch.randn(3 * 4096 + 100).to(dtype)
    before = shared.clone()
    sizes = {0: 4097, 4992: 31, 8192: 4096}
    places = [slice(at + offset, at + offset + n) for at, n in sizes.items()]
    params = make_params([17, 4099, 63], dtype)
    for i, place in zip((0, 2, 4), places, strict=True):
        params.insert(i, torch.nn.Parameter(shared[place]))
    addresses = [params[i].data_ptr() for i in (0, 2, 4)]
    opt = FusedSAM(
        params, ADAMW, backend=gpu_backend, lr=0.05, rho=0.3, adaptive=adaptive, weight_decay=0.1
    )
    textbook = Textbook(opt)
    for first, second in (((), ()), ((2,), (0,)), ((), ())):
        textbook.step(random_grads(params, first), random_grads(params, second))
    for p in params:
        p.grad = torch.randn_like(p)
    opt.first_step()
    opt.restore()
    assert [params[i].data_ptr() for i in (0, 2, 4)] == addresses
    outside = torch.ones_like(shared, dtype=torch.bool)
    for i, place in zip((0, 2, 4), places, strict=True):
        assert same_bits(params[i].detach(), shared[place])
        assert not same_bits(shared[place], before[place])
        outside[place] = False
    assert same_bits(shared[outside], before[outside])


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_found_inf_restores_exactly(max_grad_norm, gpu_backend):
    params, opt = make(base=ADAMW, backend=gpu_backend, max_grad_norm=max_grad_norm)
    textbook = Textbook(opt)
    for found_inf in (0.0, 1.0, 0.0):
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        textbook.step(
            random_grads(params),
            random_grads(params, (2,)),
            grad_scale=4.0,
            found_inf=found_inf != 0,
        )


def test_looksam_steps_as_the_reference(gpu_backend):
    """Guards the direction that a SAM step leaves, which the textbook here does not know."""
    options = {"rho": 0.3, "momentum": 0.9, "blend": LookSAM(k=2)}
    params, opt = make(backend=gpu_backend, **options)
    twins, twin = make(backend="reference", **options)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
    for step in range(4):
        missing = ((2,), (4,)) if step == 2 else ((), ())
        for half, absent in zip(("first_step", "second_step"), missing, strict=True):
            for p, q in zip(params, twins, strict=True):
                p.grad = q.grad = torch.randn_like(p)
            for i in absent:
                params[i].grad = twins[i].grad = None
            for one in (opt, twin):
                getattr(one, half)(zero_grad=True)
    # Some 10 roundings in each of 4 steps, on numbers no larger than 8.
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=40 * 8 * 2**-24)


def test_lr_zero_returns_the_same_bits(gpu_backend):
    params, opt = make(lr=0.0, backend=gpu_backend, momentum=0.9)
    before = [p.detach().clone() for p in params]
    for value in (1.0, torch.inf, torch.nan):
        for method in (opt.first_step, opt.second_step):
            for p in params:
                p.grad = torch.full_like(p, value)
            method()
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))


def test_runs_give_the_same_bits(gpu_backend):
    """Guards the two-stage reduction: no order depends on who comes first."""
    results = []
    for _ in range(3):
        torch.manual_seed(3)
        params, opt = make(
            [3_000_001 if GPU else 9001, 77], ADAMW, backend=gpu_backend, adaptive=True, rho=0.5
        )
        for _ in range(3):
            for method in (opt.first_step, opt.second_step):
                for p in params:
                    p.grad = torch.randn_like(p)
                method()
        results.append(torch.cat([p.detach() for p in params]))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_denormal_second_moments_are_no_zero(gpu_backend):
    """Guards square roots of denormal numbers: g**2 = 1e-40 under a small eps."""
    params, opt = make([1000], RMSPROP, backend=gpu_backend, lr=1e-3, eps=1e-30)
    params[0].data.zero_()
    params[0].grad = torch.full_like(params[0], 1e-20)
    opt.second_step()
    # alpha = 0.99: sqrt(0.01 * 1e-40) = 1e-21, and a denormal has few digits.
    assert (params[0] / -1e-2 - 1).abs().max() < 1e-2


@no_gpu
def test_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    n = 2**31 + 5
    if free < 4.5 * 2 * n:
        pytest.skip(f"needs {9 * n / 1e9:.0f} GB of free GPU memory, there are {free / 1e9:.0f}")
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    opt = FusedSAM([p], backend="triton", rho=1.0, lr=1.0)
    p.grad = torch.zeros_like(p)
    for i in (0, 2**31 - 1, 2**31, n - 1):
        p.grad[i] = 2.0
    opt.first_step()
    assert p[[0, 2**31 - 1, 2**31, n - 1]].tolist() == [0.5] * 4
    assert opt.grad_norm.item() == 4.0
    opt.second_step()
    assert p[[0, 1, 2**31 - 1, 2**31, n - 1]].tolist() == [-2.0, 0.0, -2.0, -2.0, -2.0]


def make_model():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 64, 10),
    )


@no_gpu
@pytest.mark.parametrize("base, options", [(SGD, {"momentum": 0.9}), (ADAMW, {})])
def test_graph_replay_is_eager(base, options, gpu_backend):
    """Guards capture of a whole step; later eager steps must not disturb what a graph reads."""
    torch.backends.cudnn.deterministic = True
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))) for _ in range(8)]
    model = make_model()
    twin = copy.deepcopy(model)
    opts = [
        FusedSAM(m.parameters(), base, backend=gpu_backend, lr=0.01, **options)
        for m in (model, twin)
    ]

    def whole_step(net, opt, x, y):
        for method in (opt.first_step, opt.second_step):
            torch.nn.functional.cross_entropy(net(x), y).backward()
            method(zero_grad=True)

    x, y = (t.clone() for t in batches[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:3]:
            x.copy_(batch[0])
            y.copy_(batch[1])
            whole_step(model, opts[0], x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole_step(model, opts[0], x, y)
    for batch in batches[3:6]:
        x.copy_(batch[0])
        y.copy_(batch[1])
        graph.replay()
    opts[0].param_groups[0]["lr"] = 0.02  # for the eager step; the graph keeps its own
    whole_step(model, opts[0], *batches[6])
    x.copy_(batches[7][0])
    y.copy_(batches[7][1])
    graph.replay()
    for i, batch in enumerate(batches):
        opts[1].param_groups[0]["lr"] = 0.02 if i == 6 else 0.01
        whole_step(twin, opts[1], *batch)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def noisy_model():
    return torch.nn.Sequential(make_model(), torch.nn.Dropout(0.3), torch.nn.Linear(10, 10))


def loss_of(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def plain_step(model, opt, batch, scaler=None):
    scale = (lambda loss: loss) if scaler is None else scaler.scale
    opt.zero_grad()
    loss = loss_of(model, batch)
    scale(loss).backward()
    if opt._follows() is None and opt.first_step(zero_grad=True):
        scale(loss_of(model, batch)).backward()
    if scaler is None:
        opt.step() if opt._follows() is not None else opt.second_step()
    else:
        scaler.step(opt)
        scaler.update()
    opt.zero_grad()
    return loss.detach()


CAPTURED = {
    "sgd": {"momentum": 0.9},
    "adamw": {"base_optimizer": ADAMW, "weight_decay": 0.1},
    "clipped": {"momentum": 0.9, "max_grad_norm": 0.5},
    "gsam": {"momentum": 0.9, "blend": GSAM(0.3)},
    "every": {"momentum": 0.9, "when": Every(2)},
    "msam": {"momentum": 0.9, "ascent": MSAM()},
    "scaled": {"momentum": 0.9},
    "compiled": {"momentum": 0.9},
}


@no_gpu
@pytest.mark.parametrize("case", CAPTURED)
def test_a_captured_step_is_the_eager_one(case, gpu_backend):
    """Guards random numbers, running statistics, and numbers that change between replays."""
    torch.backends.cudnn.deterministic = True
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))) for _ in range(6)]
    # The compiler's dropout draws other numbers.
    first = make_model() if case == "compiled" else noisy_model()
    results = []
    for graph in (True, False):
        model = copy.deepcopy(first)
        options = {"lr": 0.01, "rho": 0.2, "backend": gpu_backend, **CAPTURED[case]}
        opt = FusedSAM(model.parameters(), model=model, **options)
        scaler = torch.amp.GradScaler("cuda", growth_interval=2) if case == "scaled" else None
        net = torch.compile(model) if case == "compiled" and graph else model
        plain_step(model, opt, batches[0], scaler)
        if graph:
            step = capture(net, loss_of, opt, batches[0], scaler=scaler)
        else:
            step = functools.partial(plain_step, model, opt, scaler=scaler)
        torch.manual_seed(3)
        losses = []
        for i, batch in enumerate(batches[1:]):
            opt.param_groups[0]["lr"], opt.param_groups[0]["rho"] = 0.01 / (i + 1), 0.1 * (i + 1)
            losses.append(step(batch))
        results.append([*losses, *model.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@no_gpu
def test_a_replay_does_not_wait(gpu_backend):
    model = noisy_model()
    opt = FusedSAM(model.parameters(), lr=0.01, backend=gpu_backend)
    batch = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    step = capture(model, loss_of, opt, batch)
    step(batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        opt.param_groups[0]["lr"] = 0.02
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@no_gpu
def test_two_streams(gpu_backend):
    """Guards launches on the current stream: the second step on another, ordered by an event."""
    params, opt = make([1_000_003], backend=gpu_backend, momentum=0.9)
    twins, twin = make([1_000_003], backend=gpu_backend, momentum=0.9)
    twins[0].data.copy_(params[0].data)
    side = torch.cuda.Stream()
    for _ in range(5):
        grads = torch.randn_like(params[0]), torch.randn_like(params[0])
        params[0].grad, twins[0].grad = grads[0], grads[0].clone()
        opt.first_step()
        twin.first_step()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            params[0].grad = grads[1]
            opt.second_step()
        torch.cuda.current_stream().wait_stream(side)
        twins[0].grad = grads[1].clone()
        twin.second_step()
        assert same_bits(params[0], twins[0])


@no_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_nothing_waits_for_the_gpu(max_grad_norm, gpu_backend):
    params, opt = make(base=ADAMW, backend=gpu_backend, max_grad_norm=max_grad_norm)
    opt.param_groups[0]["lr"] = torch.tensor(0.01)
    grads = [random_grads(params) for _ in range(2)]
    try:
        for i in range(4):
            torch.cuda.set_sync_debug_mode("error" if i else "default")
            for method, own in zip((opt.first_step, opt.second_step), grads, strict=True):
                for p in params:
                    p.grad = own[p]
                method()
            opt.param_groups[0]["rho"] *= 2
    finally:
        torch.cuda.set_sync_debug_mode("default")


@no_gpu
def test_steady_state_allocates_nothing(gpu_backend):
    params, opt = make(base=ADAMW, backend=gpu_backend)
    for p in params:
        p.grad = torch.randn_like(p)
    counts = []
    for _ in range(4):
        opt.first_step()
        opt.second_step()
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
    assert counts[2] == counts[3]


@pytest.mark.parametrize("style", ["closure", "steps"])
def test_grad_scaler_on_a_small_convnet(style, gpu_backend):
    """Guards AMP: the loss falls, a step whose gradients overflow changes no weight."""
    model = make_model()
    opt = FusedSAM(model.parameters(), backend=gpu_backend, lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    x, y = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    losses = []

    def backward(factor=1.0):
        opt.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = torch.nn.functional.cross_entropy(model(x), y) * factor
        scaler.scale(loss).backward()
        return loss.detach()

    for i in range(12):
        factor = torch.inf if i == 6 else 1.0
        before = [p.detach().clone() for p in model.parameters()]
        losses.append(backward().item())
        if style == "closure":
            scaler.step(opt, lambda: backward(factor))  # noqa: B023
        else:
            opt.first_step(zero_grad=True)
            backward(factor)
            scaler.step(opt)
        scaler.update()
        moved = [not same_bits(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert not any(moved) if i == 6 else any(moved)
    assert losses[-1] < losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_norm_over_two_devices():
    params = [torch.nn.Parameter(torch.randn(5000, device=f"cuda:{i}")) for i in range(2)]
    opt = FusedSAM(params, ADAMW, backend="triton", rho=1.0, lr=0.1)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    norm = sum(p.grad.double().square().sum().item() for p in params) ** 0.5
    opt.first_step()
    for p, w in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), w + p.grad / norm)
    opt.second_step()
