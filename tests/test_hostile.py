"""Whatever is done to parameters, gradients, state, groups: w returns, and no number is wrong."""

from dataclasses import replace

import pytest
import torch
from oracle import Textbook, assert_same_bits, inject, params_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_sam import FusedSAM
from fused_sam.memory.gradients import _usable
from fused_sam.memory.window import is_shared

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
UNFUSED = type("Unfused", (SGD,), {})


def make(base=SGD, backend="reference", shapes=((4, 4), (5,), (3, 2)), dtype=None, **options):
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    opt = FusedSAM(params, base, backend=backend, **{"rho": 0.5, "lr": 0.1, **options})
    return params, opt


def grads_like(params):
    return {p: torch.randn_like(p) for p in params}


def step(opt):
    for half in opt.first_step, opt.second_step:
        inject(grads_like(params_of(opt)))
        half()


def weights(params):
    return [p.detach().clone() for p in params]


def assert_bits(params, expected):
    for i, (p, w) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(p, w, f"parameter {i}")


# ------------------------------------------------------------------------------------ the way back


def other_shape(params, opt):
    params[0].data = params[0].data[:2]


def at_the_same_address(params, opt):
    params[0].data = params[0].data.as_strided((2, 4), (4, 1))


def integers(params, opt):
    params[0].requires_grad_(False)
    params[0].grad = None
    params[0].data = params[0].data.to(torch.int32)


def swapped(params, opt):
    params[0].grad = None
    torch.utils.swap_tensors(params[0], nn.Parameter(torch.randn(7)))


def freed(params, opt):
    params[0].data = params[0].data.clone()
    params[0].untyped_storage().resize_(0)


def left_its_group(params, opt):
    opt.param_groups[0]["params"].pop(0)


def bad_rho(params, opt):
    opt.param_groups[0]["rho"] = -1.0


def no_lr(params, opt):
    del opt.param_groups[0]["lr"]


def bad_state(params, opt):
    opt.state[params[0]]["momentum_buffer"] = torch.ones(17)


def moved(params, opt):
    params[0].data = params[0].data.clone() + 1


def converted(params, opt):
    params[0].grad = None
    params[0].data = params[0].data.double()


def swapped_for_its_like(params, opt):
    params[0].grad = None
    torch.utils.swap_tensors(params[0], nn.Parameter(torch.randn(4, 4)))


def duplicated(params, opt):
    opt.param_groups[0]["params"] *= 2


MISFITS = [other_shape, at_the_same_address, integers, swapped, freed]
FITS = [
    left_its_group,
    bad_rho,
    no_lr,
    bad_state,
    moved,
    converted,
    swapped_for_its_like,
    duplicated,
]


def name(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("base", [SGD, UNFUSED], ids=name)
@pytest.mark.parametrize("act", MISFITS, ids=name)
def test_what_fits_returns_and_the_rest_is_named_once(act, base, backend):
    params, opt = make(base, backend, momentum=0.9)
    step(opt)
    before = weights(params)
    inject(grads_like(params))
    opt.first_step()
    act(params, opt)
    with pytest.raises(RuntimeError, match=r"back at w, except.*shape \(4, 4\)"):
        opt.restore()
    assert not opt.is_perturbed
    assert_bits(params[1:], before[1:])
    opt.restore()
    opt.state_dict()
    del opt.param_groups[0]["params"][0]
    step(opt)


@pytest.mark.parametrize("act", MISFITS, ids=name)
def test_a_step_with_a_misfit_raises_and_changes_nothing(act, backend):
    params, opt = make(SGD, backend, momentum=0.9)
    step(opt)
    before = weights(params)
    inject(grads_like(params))
    opt.first_step()
    act(params, opt)
    for p in params[1:]:
        p.grad = torch.randn_like(p)
    perturbed = weights(params[1:])
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        opt.second_step()
    assert opt.is_perturbed
    assert_bits(params[1:], perturbed)
    with pytest.raises(RuntimeError, match="back at w"):
        opt.restore()
    assert_bits(params[1:], before[1:])


@pytest.mark.parametrize("base", [SGD, UNFUSED], ids=name)
@pytest.mark.parametrize("act", FITS, ids=name)
def test_nothing_else_keeps_anything_away_from_w(act, base, backend):
    params, opt = make(base, backend, momentum=0.9)
    step(opt)
    before = weights(params)
    inject(grads_like(params))
    opt.first_step()
    act(params, opt)
    opt.restore()
    assert_bits([p.float() for p in params], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_parameter_that_was_restrided_between_the_steps_gets_its_w(dtype, backend):
    params, opt = make(SGD, backend, dtype=dtype)
    before = weights(params)
    for change in (torch.Tensor.t, torch.Tensor.conj, torch._neg_view):
        inject(grads_like(params))
        opt.first_step()
        params[0].data = change(params[0].data)
        opt.restore()
        assert_bits(params, before)
        inject(grads_like(params))
        opt.first_step()
        params[0].data = change(params[0].data)
        inject({p: torch.zeros_like(p) for p in params})
        opt.second_step()
        assert_bits(params, before)


# -------------------------------------------------------------------------- listed more than once


@pytest.mark.parametrize("base", [SGD, ADAM, UNFUSED], ids=name)
@pytest.mark.parametrize("pin", [False, True])
def test_a_parameter_listed_twice_is_one(base, pin, backend):
    """torch warns and steps twice; the climb saved w + epsilon as w."""
    tied = nn.Parameter(torch.randn(5))
    if pin:
        tied.data.share_memory_()
    params = [tied, nn.Parameter(torch.randn(3)), tied]
    opt = FusedSAM(params, base, rho=0.5, backend=backend, lr=0.1)
    assert list(map(id, params_of(opt))) == list(map(id, params[:2]))
    if base is not UNFUSED:
        Textbook(opt).step(grads_like(params[:2]), grads_like(params[:2]))
    before = weights(params[:2])
    inject(grads_like(params[:2]))
    opt.first_step()
    norm = torch.cat([p.grad for p in params[:2]]).norm()
    torch.testing.assert_close(opt.grad_norm, norm)
    opt.param_groups[0]["params"] += params
    opt.add_param_group({"params": [new := nn.Parameter(torch.ones(2)), new]})
    opt.restore()
    assert_bits(params[:2], before)
    step(opt)
    assert len(params_of(opt)) == 3


def test_a_parameter_added_by_hand_to_a_second_group_stays_in_the_first(backend):
    params, opt = make(SGD, backend)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5})
    opt.param_groups[1]["params"].append(params[0])
    step(opt)
    assert [len(group["params"]) for group in opt.param_groups] == [3, 1]


def test_names_stay_with_their_parameters(backend):
    tied = nn.Parameter(torch.randn(5))
    named = [("encoder", tied), ("decoder", tied), ("head", nn.Parameter(torch.randn(2)))]
    opt = FusedSAM(named, lr=0.1, backend=backend)
    assert opt.param_groups[0]["param_names"] == ["encoder", "head"]


# ------------------------------------------------------------------------------------ torch's modes


def test_nothing_happens_under_a_fake_tensor_mode(backend):
    """Operations compute nothing there: weights became fake, and w was saved nowhere."""
    params = [nn.Parameter(torch.randn(5))]
    before = weights(params)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, pytest.raises(RuntimeError, match="nothing is computed"):
        FusedSAM(params, lr=0.1, backend=backend)
    assert type(params[0].data) is torch.Tensor
    opt = FusedSAM(params, rho=0.5, lr=0.1, backend=backend)
    inject(grads_like(params))
    for _ in range(2):
        for act in (opt.restore, opt.second_step) if opt.is_perturbed else (opt.first_step,):
            now = weights(params)
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with mode, pytest.raises(RuntimeError, match="nothing is computed"):
                act()
            assert_bits(params, now)
        if not opt.is_perturbed:
            opt.first_step()
    opt.restore()
    assert_bits(params, before)


@pytest.mark.parametrize("base", [SGD, ADAM], ids=name)
def test_made_and_stepped_under_inference_mode(base, backend):
    """What was allocated there could not be written to afterwards, the weights among it."""
    params = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 3))]
    with torch.inference_mode():
        opt = FusedSAM(params, base, rho=0.5, lr=0.1, backend=backend)
    grads = [grads_like(params) for _ in range(4)]
    textbook = Textbook(opt)
    with torch.inference_mode():
        textbook.step(*grads[:2])
    params[0].data = params[0].data.clone()
    with torch.inference_mode():
        textbook.step(*grads[2:])
    state = [value for p in params for value in opt.state[p].values()]
    assert not any(tensor.is_inference() for tensor in [*params, *state])
    with torch.no_grad():
        params[1].add_(1)
        textbook.reread(params[1])
    textbook.step(*grads[:2])


# ---------------------------------------------------------------------------------------- gradients


def test_gradients_of_another_shape_are_refused(backend):
    """They were read as if they fitted, shifted by what was pruned."""
    params, opt = make(SGD, backend, shapes=((8, 4), (3,)))
    step(opt)
    params[0].data = params[0].data[3:]
    before = weights(params)
    with pytest.raises(RuntimeError, match=r"\(5, 4\).*gradient of shape \(8, 4\).*backward again"):
        opt.first_step()
    assert_bits(params, before)
    step(opt)


def test_a_complex_gradient_of_a_real_parameter_is_refused(backend):
    params, opt = make(SGD, backend)
    step(opt)
    params[1].grad.data = torch.randn(5, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="complex64"):
        opt.first_step()
    assert not opt.is_perturbed


def test_a_gradient_on_another_device_is_refused(backend):
    params, opt = make(SGD, backend)
    step(opt)

    class Elsewhere:
        """A parameter whose gradient torch would not take."""

        def __init__(self, param):
            self.shape, self.dtype, self.device = param.shape, param.dtype, torch.device("cuda")

    slot = replace(opt._facts.engine.buckets[0].slots[1], param=Elsewhere(params[1]))
    with pytest.raises(RuntimeError, match=r"on cuda has a gradient.*on cpu"):
        _usable(torch.ones(5), slot)


@pytest.mark.parametrize("size", [0, 12])
@pytest.mark.parametrize("when", ["first seen", "later"])
@pytest.mark.parametrize("offset", [0, 2])
def test_a_gradient_without_its_memory_is_refused(offset, when, size, backend):
    """FSDP frees storages so; torch reads on."""
    params, opt = make(SGD, backend)
    if when == "later":
        step(opt)
    inject(grads_like(params))
    params[1].grad = torch.randn(5 + offset)[offset:]
    if when == "later":
        opt.first_step()
        opt.restore()
    params[1].grad.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match=rf"gradient of shape \(5,\).*{size} bytes.*too small"):
        opt.first_step()
    assert not opt.is_perturbed


class Liar(torch.Tensor):
    """Says that it is at another place."""

    def data_ptr(self):
        return 8


def test_a_subclass_that_lies_about_its_address_is_not_believed(backend):
    params, opt = make(SGD, backend)
    textbook = Textbook(opt)
    grads = grads_like(params)
    textbook.step(grads, grads)
    inject(grads)
    for p in params:
        p.grad = torch.Tensor._make_subclass(Liar, p.grad)
    expected = opt.grad_norm
    opt.first_step()
    assert torch.equal(opt.grad_norm, expected)
    opt.restore()


@pytest.mark.parametrize("base", [SGD, ADAM, UNFUSED], ids=name)
def test_one_gradient_of_two_parameters_is_unscaled_once(base, backend):
    params, opt = make(base, backend, shapes=((5,), (5,), (3,)))
    before = weights(params)
    shared, own = torch.full((5,), 4.0), torch.full((3,), 4.0)
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    params[0].grad = params[1].grad = shared
    params[2].grad = own
    opt.second_step()
    moved_by = [(w - p).detach() for p, w in zip(params, before, strict=True)]
    for distance in moved_by:
        torch.testing.assert_close(distance, torch.full_like(distance, 0.1), atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------- parameters and their memory


def test_a_parameter_without_its_memory_is_refused(backend):
    p = nn.Parameter(torch.randn(5))
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"shape \(5,\).*storage of 0 bytes.*too small"):
        FusedSAM([p], lr=0.1, backend=backend)


def test_who_holds_the_storage_holds_the_memory(backend):
    p = nn.Parameter(torch.randn(5))
    storage, address = p.untyped_storage(), p.data_ptr()
    assert is_shared(p)
    opt = FusedSAM([p], lr=0.1, backend=backend)
    step(opt)
    assert p.data_ptr() == address == storage.data_ptr()
    free = nn.Parameter(torch.randn(5))
    address = free.data_ptr()
    assert not is_shared(free)
    FusedSAM([free], lr=0.1, backend=backend)
    assert free.data_ptr() != address


@pytest.mark.parametrize("change", [torch.Tensor.conj, torch._neg_view, torch.Tensor.t])
def test_what_is_read_differently_at_its_address_is_noticed(change, backend):
    """The sign of the update was wrong, or it was transposed."""
    params, opt = make(SGD, backend, dtype=torch.complex64, momentum=0.9)
    textbook = Textbook(opt)
    textbook.step(grads_like(params), grads_like(params))
    params[0].data = change(params[0].data)
    textbook.reread(params[0])
    grads = [{p: torch.randn(p.shape, dtype=p.dtype) for p in params} for _ in range(2)]
    textbook.step(*grads)


# -------------------------------------------------------------------------------- options and state


@pytest.mark.parametrize(
    ("base", "option", "value", "error", "words"),
    [
        (SGD, "lr", None, KeyError, "'lr', which SGD needs"),
        (SGD, "weight_decay", None, KeyError, "'weight_decay', which SGD needs"),
        (ADAM, "eps", None, KeyError, "'eps', which Adam needs"),
        (ADAM, "betas", (0.9, 1.0), ValueError, r"betas=\(0.9, 1.0\).*0 <= betas < 1"),
        (ADAM, "betas", (-0.1, 0.9), ValueError, "0 <= betas < 1"),
        (ADAM, "eps", float("nan"), ValueError, "eps=nan"),
        (SGD, "momentum", -0.5, ValueError, "momentum=-0.5"),
        (SGD, "weight_decay", 10**400, ValueError, "SGD is too large for a float"),
        (torch.optim.RMSprop, "alpha", -1, ValueError, "alpha=-1"),
    ],
)
def test_options_that_cannot_be_used(base, option, value, error, words, backend):
    params, opt = make(base, backend)
    step(opt)
    before = weights(params)
    if value is None:
        del opt.param_groups[0][option]
    else:
        opt.param_groups[0][option] = value
    inject(grads_like(params))
    opt.first_step()
    with pytest.raises(error, match=words):
        opt.second_step()
    opt.restore()
    assert_bits(params, before)


def test_a_bad_max_grad_norm_set_later(backend):
    params, opt = make(SGD, backend, max_grad_norm=1.0)
    step(opt)
    with pytest.raises(ValueError, match=r"max_grad_norm.*-1"):
        opt.max_grad_norm = -1
    step(opt)
    before = weights(params)
    inject(grads_like(params))
    opt.first_step()
    opt.param_groups[0]["max_grad_norm"] = -1
    with pytest.raises(ValueError, match=r"max_grad_norm.*-1"):
        opt.second_step()
    opt.restore()
    assert_bits(params, before)


@pytest.mark.parametrize("option", ["rho", "eta", "max_grad_norm"])
def test_numbers_beyond_all_floats(option):
    with pytest.raises(ValueError, match=f"{option}.*finite.*beyond all floats"):
        make(**{option: 10**5000})


@pytest.mark.parametrize("pair", [(SGD, ADAM), (ADAM, SGD)], ids=["sgd to adam", "adam to sgd"])
def test_a_checkpoint_of_another_class_is_refused(pair, backend):
    theirs, ours = pair
    _, other = make(theirs, backend, **({"momentum": 0.9} if theirs is SGD else {}))
    step(other)
    _, opt = make(ours, backend)
    step(opt)
    state, groups = opt.state, opt.param_groups
    with pytest.raises(ValueError, match=f"checkpoint is not one of {ours.__name__}"):
        opt.load_state_dict(other.state_dict())
    assert opt.state is state and opt.param_groups is groups
    step(opt)


BAD_STATES = {
    "of another shape": (lambda: torch.ones(5, 1), r"shape \(5, 1\)"),
    "that would be broadcast": (lambda: torch.ones(1), r"shape \(1,\)"),
    "complex": (lambda: torch.ones(5, dtype=torch.complex64), "complex"),
    "without memory": (lambda: freed_tensor(5), "memory"),
    "text": (lambda: "zero", "str"),
}


def freed_tensor(n):
    tensor = torch.ones(n)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_named(case, backend):
    bad, words = BAD_STATES[case]
    params, opt = make(SGD, backend, momentum=0.9)
    step(opt)
    before = weights(params)
    inject(grads_like(params))
    opt.first_step()
    good = opt.state[params[1]]["momentum_buffer"]
    opt.state[params[1]]["momentum_buffer"] = bad()
    with pytest.raises(ValueError, match=rf"'momentum_buffer' of parameter 1 of group 0.*{words}"):
        opt.second_step()
    opt.restore()
    assert_bits(params, before)
    opt.state[params[1]]["momentum_buffer"] = good
    step(opt)


def test_a_checkpoint_with_a_state_of_a_wrong_shape_is_refused(backend):
    _, opt = make(SGD, backend, momentum=0.9)
    step(opt)
    state = opt.state_dict()
    state["state"][1] = {"momentum_buffer": torch.ones(1)}
    kept = opt.state
    with pytest.raises(ValueError, match="parameter 1 of group 0"):
        opt.load_state_dict(state)
    assert opt.state is kept
    step(opt)


def test_states_that_change_places(backend):
    """Each is the window of the other: both are read before one is written."""
    params, opt = make(SGD, backend, shapes=((5,), (5,)), momentum=0.9)
    textbook = Textbook(opt)
    textbook.step(grads_like(params), grads_like(params))
    a, b = (opt.state[p] for p in params)
    a["momentum_buffer"], b["momentum_buffer"] = b["momentum_buffer"], a["momentum_buffer"]
    mine = textbook.state
    mine[params[0]], mine[params[1]] = mine[params[1]], mine[params[0]]
    textbook.step(grads_like(params), grads_like(params))
