"""frozen_running_stats: batch statistics in SAM's second pass, running statistics left alone.

Comparisons are bitwise throughout: the block either touches a statistic or it does not.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules import batchnorm as torch_batchnorm
from torch.utils.checkpoint import checkpoint

from fused_sam.batchnorm import frozen_running_stats


class UntoldBatchNorm(nn.BatchNorm2d):
    """Hands its buffers on whether it tracks or not, as many layers outside torch do."""

    def forward(self, input):
        if self.training:
            self.num_batches_tracked.add_(1)
        return nn.functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum,
            self.eps,
        )


LAYERS = {
    "batchnorm1d": lambda: nn.BatchNorm1d(3),
    "batchnorm2d": lambda: nn.BatchNorm2d(3, momentum=0.3),
    "batchnorm3d": lambda: nn.BatchNorm3d(3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "not-affine": lambda: nn.BatchNorm2d(3, affine=False),
    "sync": lambda: nn.SyncBatchNorm(3),
    "sync-cumulative": lambda: nn.SyncBatchNorm(3, momentum=None),
    "instancenorm": lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True),
    "lazy": lambda: _built(nn.LazyBatchNorm2d()),
    "subclass": lambda: UntoldBatchNorm(3),
}
DIMS = {"batchnorm1d": (7,), "batchnorm3d": (2, 3, 2)}


def _built(lazy):
    lazy(torch.randn(2, 3, 4, 4))
    return lazy


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    layer = LAYERS[request.param]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.shape = (5, 3, *DIMS.get(request.param, (4, 6)))
    return layer


def batch(layer, scale=3.0):
    return scale * torch.randn(layer.shape) + 1


def snapshot(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def bitwise_equal(a, b):
    """True where every bit is the same: NaN equals itself, 0.0 does not equal -0.0."""
    assert a.keys() == b.keys()
    return all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


def test_statistics_stay_bitwise(layer):
    x, before, tensors = batch(layer), snapshot(layer), dict(layer.named_buffers())

    with frozen_running_stats(layer):
        layer(x).sum().backward() if layer.weight is not None else layer(x)

    assert bitwise_equal(snapshot(layer), before)
    assert all(buffer is tensors[name] for name, buffer in layer.named_buffers())
    layer(x)
    assert not bitwise_equal(snapshot(layer), before), "tracking must go on after the block"


def test_outputs_and_gradients_are_those_of_training_mode(layer):
    x, out_grad = batch(layer), torch.randn(layer.shape)

    def run(module):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        grads = torch.autograd.grad(out, [leaf, *module.parameters()], out_grad)
        return dict(enumerate((out.detach(), *grads)))

    plain = run(copy.deepcopy(layer))
    with frozen_running_stats(layer):
        frozen = run(layer)

    assert bitwise_equal(frozen, plain)


def test_averages_go_on_as_if_the_frozen_pass_had_not_been(layer):
    """A cumulative average weighs by num_batches_tracked: a batch counted in secret shows here."""
    first, second, third = (batch(layer, scale) for scale in (1.0, 50.0, 2.0))
    expected = copy.deepcopy(layer)
    expected(first), expected(third)

    layer(first)
    with frozen_running_stats(layer):
        layer(second)
    layer(third)

    assert bitwise_equal(snapshot(layer), snapshot(expected))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_bit_changes_when_activations_are_not_finite(layer, value):
    """The trick of setting momentum to 0 multiplies the batch's statistics by 0: 0 · inf is NaN."""
    x = batch(layer)
    x[0, 0] = value
    before = snapshot(layer)

    with frozen_running_stats(layer):
        layer(x)

    assert bitwise_equal(snapshot(layer), before)
    layer.momentum = 0.0
    layer(x)
    assert layer.running_mean.isnan().any()


def test_blocks_nest(layer):
    x, before = batch(layer), snapshot(layer)
    model = nn.Sequential(nn.Sequential(layer), nn.BatchNorm2d(3))

    with frozen_running_stats(model[0]):
        with frozen_running_stats(model):
            layer(x)
            assert model[1].track_running_stats is False
        layer(x)  # the inner block's end must not end the outer one
        assert model[1].track_running_stats is True

    assert bitwise_equal(snapshot(layer), before)
    layer(x)
    assert not bitwise_equal(snapshot(layer), before)


def test_an_exception_ends_the_block_properly(layer):
    x, before = batch(layer), snapshot(layer)

    with pytest.raises(RuntimeError, match="out of memory"), frozen_running_stats(layer):
        layer(x)
        raise RuntimeError("out of memory")

    assert bitwise_equal(snapshot(layer), before)
    layer(x)
    assert not bitwise_equal(snapshot(layer), before)


def test_evaluation_mode_goes_on_using_running_statistics(layer):
    """A frozen backbone in eval mode must not begin to normalise with the batch."""
    layer(batch(layer))
    layer.eval()
    x, before = batch(layer), snapshot(layer)
    expected = layer(x)

    with frozen_running_stats(layer):
        actual = layer(x)

    assert torch.equal(actual, expected)
    assert not layer.training
    assert bitwise_equal(snapshot(layer), before)


def test_mode_may_change_in_the_block(layer):
    """The mode that counts is that of each forward, as everywhere in torch."""
    layer(batch(layer))
    x, before = batch(layer), snapshot(layer)
    expected = copy.deepcopy(layer).eval()(x)

    layer.eval()
    with frozen_running_stats(layer):
        layer.train()(x)
        assert not torch.equal(layer(x), expected)

    assert bitwise_equal(snapshot(layer), before)
    assert torch.equal(layer.eval()(x), expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_layers_that_never_track_are_left_alone(norm):
    layer = norm(3, track_running_stats=False)
    x = torch.randn(4, 3, 5, 5)
    expected = layer(x)

    with frozen_running_stats(layer):
        assert torch.equal(layer(x), expected)

    assert layer.track_running_stats is False
    assert layer.running_mean is None


def test_a_model_without_such_layers():
    model = nn.Linear(2, 2)
    with frozen_running_stats(model):
        model(torch.randn(1, 2))


def test_statistics_are_those_of_the_first_pass_of_a_sam_step():
    """The use it is made for: without the block, the perturbed weights' activations count too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(4, 3, 8, 8)

    def sam_step(model, second_pass):
        model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=0.5)
        second_pass(model)
        return snapshot(model)

    once = copy.deepcopy(model)
    once(x)

    def frozen(model):
        with frozen_running_stats(model):
            model(x).square().mean().backward()

    assert bitwise_equal(sam_step(copy.deepcopy(model), frozen), snapshot(once))
    naive = sam_step(copy.deepcopy(model), lambda m: m(x).square().mean().backward())
    assert not bitwise_equal(naive, snapshot(once))


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_synchronised_batchnorm_gets_buffers_to_throw_away(monkeypatch, process_group):
    """SyncBatchNorm synchronises on accelerators only, so the collective is replaced here.

    Its kernel must be given buffers: without them it refuses float16 input, whose batch statistics
    are float32, so ``track_running_stats = False`` would break mixed precision.
    """
    given = []

    class Synchronise:
        @staticmethod
        def apply(x, weight, bias, mean, var, eps, momentum, group, world_size):
            given.append((mean, var))
            return nn.functional.batch_norm(x, mean, var, weight, bias, True, momentum, eps)

    monkeypatch.setattr(torch_batchnorm, "sync_batch_norm", Synchronise)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
    layer = nn.SyncBatchNorm(3)
    x, before = 2 * torch.randn(4, 3, 5, 5), snapshot(layer)

    with frozen_running_stats(layer):
        layer(x)

    assert len(given) == 1, "the synchronised path did not run"
    assert None not in given[0]
    assert bitwise_equal(snapshot(layer), before)
    layer(x)
    assert given[1][0] is layer.running_mean
    assert not bitwise_equal(snapshot(layer), before)


@pytest.mark.parametrize(
    "lazy", [nn.LazyBatchNorm2d, lambda: nn.LazyInstanceNorm2d(track_running_stats=True)]
)
def test_lazy_layer_built_in_the_block(lazy):
    """Its buffers must be made as usual, and the batch that made them must not be counted."""
    layer = lazy()
    x = 3 * torch.randn(4, 3, 5, 5) + 1

    with frozen_running_stats(layer):
        layer(x)
        layer(x)

    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0
    layer(x)
    assert not torch.equal(layer.running_mean, torch.zeros(3))


def test_lazy_layer_not_used_in_the_block():
    """Nothing may linger on the layer and freeze it later."""
    layer = nn.LazyBatchNorm2d()

    with frozen_running_stats(layer):
        pass

    layer(3 * torch.randn(4, 3, 5, 5) + 1)
    assert layer.num_batches_tracked == 1


def test_state_dict_and_ema_see_the_statistics_in_the_block(layer):
    """Users put second_step, EMA updates and checkpoints under the same ``with``."""
    before = snapshot(layer)
    with frozen_running_stats(layer):
        ema = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
        ema.update_parameters(layer)
        assert bitwise_equal({k: v for k, v in layer.state_dict().items() if k in before}, before)
    assert bitwise_equal(snapshot(ema.module), before)


def test_recomputation_of_a_checkpointed_layer_is_covered(layer):
    x, before = batch(layer).requires_grad_(), snapshot(layer)

    with frozen_running_stats(layer):
        checkpoint(layer, x, use_reentrant=False).sum().backward()

    assert bitwise_equal(snapshot(layer), before)


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0
def test_compiled_model_compiles_two_variants_and_no_more():
    """The compiled second pass must not run the first pass's graph, nor compile every time anew."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3),
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
    )
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for step in range(4):
        x, before = torch.randn(2, 3, 8, 8), snapshot(model)
        compiled(x).sum().backward()
        first = snapshot(model)
        assert not bitwise_equal(first, before)
        with frozen_running_stats(compiled):
            compiled(x).sum().backward()
        assert bitwise_equal(snapshot(model), first)
        if step == 0:
            after_first_step = len(graphs)
    torch._dynamo.reset()

    assert len(graphs) == after_first_step == 2


def test_distributed_data_parallel(process_group):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    parallel = nn.parallel.DistributedDataParallel(model)
    x, before = torch.randn(2, 3, 8, 8), snapshot(model)

    with frozen_running_stats(parallel):
        parallel(x).sum().backward()

    assert bitwise_equal(snapshot(model), before)
    parallel(x).sum().backward()
    assert not bitwise_equal(snapshot(model), before)


def test_scripted_model():
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of TorchScript as a whole
            warnings.simplefilter("ignore", category)
        model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x, before = torch.randn(2, 3, 8, 8), snapshot(model)

    with frozen_running_stats(model):
        model(x)

    assert bitwise_equal(snapshot(model), before)
    model(x)
    assert not bitwise_equal(snapshot(model), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_stay_bitwise_with_cudnn(dtype):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.SyncBatchNorm(8)).cuda()
    x = torch.randn(4, 8, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    before = snapshot(model)

    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), frozen_running_stats(model):
        model(x.to(dtype)).sum().backward()

    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
