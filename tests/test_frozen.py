"""Only what trains is taken in: frozen parameters keep their memory, and cost none."""

import copy
import io
import pickle

import pytest
import torch
from oracle import Textbook, assert_same_bits, params_of
from torch import nn

from fused_sam import FusedSAM

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


class LoRA(nn.Module):
    """A frozen layer with a trained product of two thin matrices besides it."""

    def __init__(self, size, rank):
        super().__init__()
        self.base = nn.Linear(size, size)
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return x + self.base(x) + self.up(self.down(x))


def buckets(opt):
    return opt._facts.engine.buckets


def saved_elements(opt):
    return sum(bucket.saved.numel() for bucket in buckets(opt))


def step(opt, params):
    for half in (opt.first_step, opt.second_step):
        for p in params:
            p.grad = torch.randn_like(p)
        half(zero_grad=True)


def follow(textbook, params, n=2):
    """Steps of these parameters; the others have no gradient."""
    trained = {id(p) for p in params}
    for _ in range(n):
        grads = [
            {p: torch.randn_like(p) if id(p) in trained else None for p in params_of(textbook.opt)}
            for _ in range(2)
        ]
        textbook.step(*grads)


def pair(backend, cls=SGD, **options):
    trained, frozen = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(70))
    frozen.requires_grad_(False)
    options = {"momentum": 0.9, **options} if cls is SGD else options
    opt = FusedSAM([frozen, trained], cls, rho=0.3, backend=backend, lr=0.1, **options)
    return opt, trained, frozen


@pytest.mark.parametrize("cls", [SGD, ADAMW, torch.optim.Adamax])
def test_an_adapter_costs_its_own_size_and_no_more(backend, cls):
    """Guards the memory of a LoRA run: saved elements and states are those that train."""
    model = nn.Sequential(*[LoRA(64, 2) for _ in range(3)])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    storages = [p.untyped_storage().data_ptr() for p in frozen]
    before = [p.clone() for p in frozen]
    opt = FusedSAM(model.parameters(), cls, rho=0.05, backend=backend, lr=0.1)
    for _ in range(2):
        for half in (opt.first_step, opt.second_step):
            model(torch.randn(8, 64)).square().mean().backward()
            half(zero_grad=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert saved_elements(opt) == trainable
    assert sum(len(bucket.slots) for bucket in buckets(opt)) == 6
    assert storages == [p.untyped_storage().data_ptr() for p in frozen]
    assert not any(p in opt.state for p in frozen)
    for p, value in zip(frozen, before, strict=True):
        assert_same_bits(p, value)


@pytest.mark.parametrize("thaw", ["requires_grad", "grad"])
@pytest.mark.parametrize("between", [False, True])
def test_what_thaws_is_taken_in_at_the_next_step(backend, thaw, between):
    """Guards the first gradient of a thawed layer, also where it comes between the two steps."""
    opt, trained, frozen = pair(backend)
    textbook = Textbook(opt)
    follow(textbook, [trained])
    assert saved_elements(opt) == 64
    address = frozen.data_ptr()
    if thaw == "requires_grad":
        frozen.requires_grad_()
    both = [trained, frozen]
    first = {p: torch.randn_like(p) if p is trained or not between else None for p in both}
    textbook.step(first, {p: torch.randn_like(p) for p in both})
    assert saved_elements(opt) == 64 + 128
    assert frozen.data_ptr() != address
    follow(textbook, both)


def test_what_is_frozen_later_stays_and_keeps_its_momentum(backend):
    """Guards state: frozen for a while, through a checkpoint and through copies."""
    opt, trained, frozen = pair(backend)
    frozen.requires_grad_()
    textbook = Textbook(opt)
    follow(textbook, [trained, frozen])
    frozen.requires_grad_(False)
    follow(textbook, [trained])
    opt.add_param_group({"params": [nn.Parameter(torch.randn(4))]})
    follow(textbook, [trained])
    assert saved_elements(opt) == 64 + 128 + 64
    twin = copy.deepcopy(opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))
    follow(textbook, [trained])
    for p in (params_of(twin)[0], frozen):
        p.requires_grad_()
    follow(textbook, [trained, frozen])
    assert len(pickle.dumps(twin)) > 0
    buffer = twin.state[params_of(twin)[0]]["momentum_buffer"]
    step(twin, params_of(twin))
    assert not torch.equal(buffer, twin.state[params_of(twin)[0]]["momentum_buffer"])


def test_a_copy_that_was_made_frozen_goes_on_with_its_momentum(backend):
    opt, trained, frozen = pair(backend)
    frozen.requires_grad_()
    textbook = Textbook(opt)
    follow(textbook, [trained, frozen])
    frozen.requires_grad_(False)
    twin = pickle.loads(pickle.dumps(opt))
    textbook.follow(twin)
    frozen, trained, *_ = params_of(twin)
    follow(textbook, [trained])
    assert saved_elements(twin) == 64
    frozen.requires_grad_()
    follow(textbook, [trained, frozen])


def test_what_freezes_between_the_two_steps_returns(backend):
    opt, trained, frozen = pair(backend)
    frozen.requires_grad_()
    before = frozen.detach().clone()
    for p in (trained, frozen):
        p.grad = torch.randn_like(p)
    opt.first_step(zero_grad=True)
    assert not torch.equal(frozen, before)
    frozen.requires_grad_(False)
    trained.grad = torch.randn_like(trained)
    opt.second_step()
    assert_same_bits(frozen, before)


def test_a_frozen_parameter_that_is_replaced_leaves(backend):
    """Guards quantizing what has been frozen after a while: its new memory may be anything."""
    opt, trained, frozen = pair(backend)
    frozen.requires_grad_()
    step(opt, [trained, frozen])
    frozen.requires_grad_(False)
    frozen.data = frozen.data.to(torch.int8)
    step(opt, [trained])
    assert saved_elements(opt) == 64


UNUSABLE = {
    "int64": lambda: torch.arange(5),
    "int8": lambda: torch.arange(5, dtype=torch.int8),
    "float8": lambda: torch.zeros(5, dtype=torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(5, device="meta"),
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_optimized_is_accepted_while_it_is_frozen(kind, backend):
    value = UNUSABLE[kind]()
    frozen, trained = nn.Parameter(value, requires_grad=False), nn.Parameter(torch.randn(3))
    opt = FusedSAM([frozen, trained], SGD, rho=0.3, adaptive=True, backend=backend, lr=0.1)
    step(opt, [trained])
    opt.add_param_group({"params": [nn.Parameter(torch.arange(4), requires_grad=False)]})
    step(opt, [trained])
    opt.load_state_dict(opt.state_dict())
    assert saved_elements(opt) == 64


@pytest.mark.parametrize("kind", ["int64", "float8"])
def test_what_cannot_be_optimized_is_an_error_when_it_thaws(kind, backend):
    frozen = nn.Parameter(UNUSABLE[kind](), requires_grad=False)
    trained = nn.Parameter(torch.randn(3))
    opt = FusedSAM([frozen, trained], SGD, rho=0.3, backend=backend, lr=0.1)
    step(opt, [trained])
    before = trained.detach().clone()
    if kind == "float8":
        frozen.requires_grad_()
    else:
        frozen.grad = torch.ones_like(frozen)
    trained.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"has dtype torch\.(int64|float8)"):
        opt.first_step()
    assert_same_bits(trained, before)
    frozen.requires_grad_(False)
    frozen.grad = None
    step(opt, [trained])


def test_all_may_be_frozen(backend):
    layers = [nn.Parameter(torch.randn(4), requires_grad=False) for _ in range(2)]
    opt = FusedSAM(layers, SGD, rho=0.3, backend=backend, lr=0.1)
    opt.first_step()
    opt.second_step()
    assert opt.grad_norm == 0
    layers[1].requires_grad_()
    step(opt, layers[1:])
    assert saved_elements(opt) == 64


def test_frozen_views_of_what_trains_are_accepted(backend):
    """Guards weights of which a frozen parameter shows a part: nothing writes to it."""
    whole = torch.randn(8)
    trained, view = nn.Parameter(whole), nn.Parameter(whole[2:4], requires_grad=False)
    opt = FusedSAM([trained, view], SGD, rho=0.3, backend=backend, lr=0.1)
    step(opt, [trained])
    assert_same_bits(view, trained.detach()[2:4])
    view.requires_grad_()
    trained.grad = torch.ones(8)
    with pytest.raises(ValueError, match="overlap in memory"):
        opt.first_step()
