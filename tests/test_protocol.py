"""What surrounds an optimizer: proxies, wrappers, scalers, caches. Right, or an error."""

import copy
import functools
import io
import warnings
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, inject, params_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fused_sam import FusedSAM
from fused_sam.ways import WAYS

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def make(rule=SGD, seed=0, backend="auto", **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, FusedSAM(model.parameters(), rule, **{"lr": 0.1, "rho": 0.3, **options})


def batch(i=0):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(100 + i))


def backward(model, x, scale=1.0):
    loss = model(x).square().mean()
    (loss * scale).backward()
    return loss.detach()


def two_steps(model, opt, x):
    opt.zero_grad()
    backward(model, x)
    opt.first_step(zero_grad=True)
    backward(model, x)
    opt.second_step(zero_grad=True)


def weights(opt):
    return [p.detach().clone() for p in params_of(opt)]


def assert_weights(opt, expected):
    for i, (p, w) in enumerate(zip(params_of(opt), expected, strict=True)):
        assert_same_bits(p, w, f"weights {i}")


def assert_same_run(model, opt, twin, twin_opt, steps=3, start=0):
    for i in range(start, start + steps):
        two_steps(model, opt, batch(i))
        two_steps(twin, twin_opt, batch(i))
    assert_weights(opt, weights(twin_opt))


def through_a_file(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------- base optimizers with checkpoints of their own


class Lookahead(torch.optim.Optimizer):
    """As timm's: the state is the inner optimizer's, and so are the groups and the checkpoint."""

    def __init__(self, inner, alpha=0.5, k=2):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = (
            OrderedDict(),
            OrderedDict(),
        )
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, inner.defaults
        options = {"lookahead_alpha": alpha, "lookahead_k": k, "lookahead_step": 0}
        self.defaults.update(options)
        self.state = defaultdict(dict)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        for group in self.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["lookahead_k"] == 0:
                for p in group["params"]:
                    state = self.inner.state[p]
                    if "slow" not in state:
                        state["slow"] = p.clone()
                    state["slow"].add_(p - state["slow"], alpha=group["lookahead_alpha"])
                    p.copy_(state["slow"])
        return loss

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


class Nested(Lookahead):
    """As pytorch_optimizer's: a checkpoint of another form."""

    def state_dict(self):
        return {"slow_steps": 1, "base_optimizer": self.inner.state_dict()}

    def load_state_dict(self, state_dict):
        assert state_dict["slow_steps"] == 1
        super().load_state_dict(state_dict["base_optimizer"])


class Compressed(torch.optim.Optimizer):
    """As 8-bit optimizers: state of another dtype, which torch's load_state_dict would cast."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    old = state.get("sign", torch.zeros_like(p, dtype=torch.int8))
                    state["sign"] = (p.grad + 0.1 * old).sign().to(torch.int8)
                    p.sub_(state["sign"], alpha=group["lr"])

    def load_state_dict(self, state_dict):
        types = {k: v["sign"].dtype for k, v in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        for k, p in enumerate(params_of(self)):
            if k in types:
                self.state[p]["sign"] = self.state[p]["sign"].to(types[k])


BASES = {
    "lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1)),
    "nested": lambda params: Nested(torch.optim.AdamW(params, lr=0.1)),
    "compressed": Compressed,
}


def wrapped(base, seed=0, rho=0.3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, FusedSAM.wrap(BASES[base](list(model.parameters())), rho=rho)


@pytest.mark.parametrize("base", BASES)
def test_a_base_optimizers_own_checkpoint_resumes(base):
    """Four steps, save, load, three steps: the bits of seven. It was off by 1e-2."""
    model, opt = wrapped(base)
    for i in range(4):
        two_steps(model, opt, batch(i))
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    model2, opt2 = wrapped(base, seed=5, rho=0.9)
    model2.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    assert opt2.param_groups[0]["rho"] == 0.3
    assert opt2.param_groups is opt2.base_optimizer.param_groups
    assert_same_run(model, opt, model2, opt2, start=4)


@pytest.mark.parametrize("base", BASES)
def test_the_learning_rate_of_a_wrapper_holds_after_loading(base):
    model, opt = wrapped(base)
    two_steps(model, opt, batch())
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"] = 0.0
    before = weights(opt)
    if base != "compressed":  # its average with the slow weights is no business of the rate's
        opt.param_groups[0]["lookahead_k"] = 100
    two_steps(model, opt, batch())
    assert_weights(opt, before)


@pytest.mark.parametrize("rule", ["sgd", "own"])
def test_checkpoint_hooks_of_either_optimizer_run_once(rule):
    _, opt = make(SGD if rule == "sgd" else Compressed)
    seen = []
    for name, o in ("sam", opt), ("base", opt.base_optimizer):
        o.register_state_dict_pre_hook(lambda o, n=name: seen.append(f"{n} before saving"))
        o.register_state_dict_post_hook(lambda o, s, n=name: seen.append(f"{n} saved"))
        o.register_load_state_dict_pre_hook(lambda o, s, n=name: seen.append(f"{n} before loading"))
        o.register_load_state_dict_post_hook(lambda o, n=name: seen.append(f"{n} loaded"))
    state = opt.state_dict()
    assert seen == ["sam before saving", "base before saving", "base saved", "sam saved"]
    seen.clear()
    opt.load_state_dict(state)
    assert seen == ["sam before loading", "base before loading", "base loaded", "sam loaded"]


def test_checkpoint_hooks_may_change_what_passes():
    _, opt = make(momentum=0.9)
    opt.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    opt.register_load_state_dict_pre_hook(
        lambda o, state: {k: v for k, v in state.items() if k != "more"}
    )
    state = opt.state_dict()
    assert state["more"] == 1
    opt.load_state_dict(state)
    assert state["more"] == 1


# -------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.parametrize("rule", [SGD, ADAM, torch.optim.RMSprop, torch.optim.RAdam])
def test_distributed_checkpoint_of_a_fresh_optimizer(rule):
    """It steps with zero gradients and learning rate 0, so that there is state to load into."""
    options = {"momentum": 0.9} if rule is SGD else {}
    model, opt = make(rule, **options)
    for p in model.parameters():
        p.data[..., 0] = -0.0
    before = weights(opt)
    get_state_dict(model, opt)
    assert_weights(opt, before)
    assert opt.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None for p in model.parameters())
    for i in range(3):
        two_steps(model, opt, batch(i))
    saved_model, saved = copy.deepcopy(get_state_dict(model, opt))
    model2, opt2 = make(rule, seed=5, rho=0.9, **options)
    set_state_dict(model2, opt2, model_state_dict=saved_model, optim_state_dict=saved)
    assert opt2.param_groups[0]["rho"] == 0.3
    assert_same_run(model, opt, model2, opt2, start=3)


def test_distributed_checkpoint_with_tensor_rates():
    model, opt = make(ADAM, lr=torch.tensor(0.1))
    before = weights(opt)
    get_state_dict(model, opt)
    assert_weights(opt, before)


def test_a_step_with_learning_rate_zero_later_is_the_usual_error():
    model, opt = make(momentum=0.9)
    two_steps(model, opt, batch())
    opt.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="without first_step"):
        opt.step()


# ---------------------------------------------------------------------- state and gradients touched


def data_clone(state, name):
    state[name].data = state[name].data.clone()


def set_clone(state, name):
    state[name].set_(state[name].clone())


def double(state, name):
    state[name].data = state[name].data.double()


def replace(state, name):
    state[name] = state[name].clone()


@pytest.mark.parametrize("touch", [data_clone, set_clone, double, replace])
@pytest.mark.parametrize("rule", [SGD, ADAM, torch.optim.RMSprop])
def test_state_given_other_memory_is_noticed(rule, touch, backend):
    """The windows were written to no more: after three more steps the checkpoint's step was 3."""
    options = {"momentum": 0.9} if rule is SGD else {}
    model, opt = make(rule, backend=backend, **options)
    twin, twin_opt = make(rule, backend=backend, **options)
    for start in 0, 3, 6:
        assert_same_run(model, opt, twin, twin_opt, start=start)
        for p, q in zip(params_of(opt), params_of(twin_opt), strict=True):
            for name, value in opt.state[p].items():
                assert_same_bits(value, twin_opt.state[q][name], name)
            for name in opt.state[p]:
                touch(opt.state[p], name)


def test_state_of_some_parameters_given_other_memory(backend):
    model, opt = make(ADAM, backend=backend)
    twin, twin_opt = make(ADAM, backend=backend)
    assert_same_run(model, opt, twin, twin_opt)
    first = params_of(opt)[0]
    opt.state[first]["exp_avg"].data = torch.ones_like(first)
    twin_opt.state[params_of(twin_opt)[0]]["exp_avg"].fill_(1)
    assert_same_run(model, opt, twin, twin_opt, start=3)


TOUCHES = {
    "module.zero_grad": lambda model: model.zero_grad(set_to_none=False),
    "grad.zero_": lambda model: [p.grad.zero_() for p in model.parameters()],
    "clip_grad_norm_": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.01),
    "foreach": lambda model: torch._foreach_mul_([p.grad for p in model.parameters()], 2.0),
    "detach_": lambda model: [p.grad.detach_() for p in model.parameters()],
    "backward": lambda model: backward(model, batch(9)),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_gradients_touched_after_a_step_are_not_fresh(touch, backend):
    """The closure then ran once, and SAM was the base optimizer, or worse."""
    model, opt = make(backend=backend)
    twin, twin_opt = make(backend=backend)
    for i in range(3):
        calls = []

        def closure(i=i, calls=calls):
            calls.append(1)
            opt.zero_grad()
            return backward(model, batch(i))

        assert opt.step(closure) is not None and len(calls) == 2
        two_steps(twin, twin_opt, batch(i))
        assert_weights(opt, weights(twin_opt))
        touch(model)


# ------------------------------------------------------------------------------------------ proxies


class Lightning:
    """As LightningOptimizer: another class, a dict of its own, its own step()."""

    def __init__(self, optimizer, scaler=None):
        self._optimizer, self._scaler, self.steps = optimizer, scaler, 0
        self.__class__ = type(
            "Lightning" + type(optimizer).__name__, (Lightning, type(optimizer)), {}
        )

    def step(self, closure=None, **kwargs):
        closure = closure if closure is not None else lambda: None
        if self._scaler is None:
            self._optimizer.step(closure=closure)
        else:
            self._scaler.step(self._optimizer, closure)
            self._scaler.update()
        self.steps += 1

    def __getattr__(self, item):
        return getattr(self.__dict__["_optimizer"], item)


class Fabric:
    """As Fabric's, and Lightning's of old: the dict is a copy."""

    def __init__(self, optimizer, scaler=None):
        skip = ("step", "state_dict", "zero_grad")
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in skip}
        self.__class__ = type("Fabric" + type(optimizer).__name__, (Fabric, type(optimizer)), {})
        self._optimizer, self._scaler, self.steps = optimizer, scaler, 0

    def state_dict(self):
        return self._optimizer.state_dict()

    def step(self, closure=None):
        kwargs = {} if closure is None else {"closure": closure}
        if self._scaler is None:
            self._optimizer.step(**kwargs)
        else:
            self._scaler.step(self._optimizer, **kwargs)
            self._scaler.update()
        self.steps += 1

    def zero_grad(self, **kwargs):
        self._optimizer.zero_grad(**kwargs)


PROXIES = [Lightning, Fabric]


@pytest.mark.parametrize("finish", ["step", "second_step", "closure", "the other's step"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_does_the_second_half_on_the_same_facts(proxy, finish, backend):
    model, opt = make(momentum=0.9, backend=backend)
    twin, twin_opt = make(momentum=0.9, backend=backend)
    outer = proxy(opt)
    for i in range(3):
        x = batch(i)
        outer.zero_grad()
        backward(model, x)
        outer.first_step(zero_grad=True)
        assert outer.is_perturbed and opt.is_perturbed
        if finish == "closure":
            outer.step(lambda x=x: backward(model, x))
        else:
            backward(model, x)
            {"step": outer.step, "second_step": outer.second_step}.get(finish, opt.step)()
        assert not outer.is_perturbed and not opt.is_perturbed
        two_steps(twin, twin_opt, x)
        assert_weights(opt, weights(twin_opt))
    assert outer.steps == (0 if finish == "the other's step" else 3)
    assert torch.equal(outer.grad_norm, opt.grad_norm)


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_steps_with_a_closure_and_without_a_climb(proxy):
    model, opt = make()
    twin, twin_opt = make()
    outer = proxy(opt)
    for i in range(2):
        outer.step(lambda i=i: backward(model, batch(i)))
        two_steps(twin, twin_opt, batch(i))
    assert_weights(opt, weights(twin_opt))
    for o, m in (outer, model), (twin_opt, twin):
        o.zero_grad()
        backward(m, batch(3))
        o.second_step(zero_grad=True)
    assert_weights(opt, weights(twin_opt))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_refuses_to_save_what_is_perturbed(proxy):
    model, opt = make()
    outer = proxy(opt)
    backward(model, batch())
    outer.first_step()
    for o in outer, opt:
        with pytest.raises(RuntimeError, match=r"perturbed.*second_step\(\) or restore\(\)"):
            o.state_dict()
    outer.restore()
    assert not opt.is_perturbed
    outer.state_dict()


@pytest.mark.parametrize("finish", ["step", "second_step"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_and_a_scheduler_give_no_false_warning(proxy, finish):
    model, opt = make()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    outer = proxy(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model, batch())
        outer.first_step(zero_grad=True)
        backward(model, batch())
        getattr(outer, finish)()
        scheduler.step()


@pytest.mark.parametrize("proxy", PROXIES)
def test_manual_optimization_as_without_sam_names_the_ways(proxy):
    """zero_grad; backward; step(): it never moved the weights and never said so."""
    model, opt = make()
    outer, before = proxy(opt), weights(opt)
    outer.zero_grad()
    backward(model, batch())
    with pytest.raises(RuntimeError, match=r"fused_sam\.integrations: \.lightning"):
        outer.step()
    assert_weights(opt, before)
    assert not opt.is_perturbed


def test_the_ways_name_every_framework():
    for name in "Lightning", "Trainer", "Accelerate", "timm", "fastai", "Ignite", "skorch":
        assert name in WAYS


@pytest.mark.parametrize("finish", ["step", "second_step"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_of_a_framework_with_a_scaler(proxy, finish):
    """second_step() stepped with scaled gradients: NaN."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model, opt = make()
    twin, twin_opt = make()
    outer = proxy(opt, scaler)
    for i in range(3):
        outer.zero_grad()
        scaler.scale(model(batch(i)).square().mean()).backward()
        outer.first_step(zero_grad=True)
        scaler.scale(model(batch(i)).square().mean()).backward()
        getattr(outer, finish)()
        two_steps(twin, twin_opt, batch(i))
        for p, q in zip(params_of(opt), params_of(twin_opt), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_scaler_that_steps_a_proxy(proxy):
    """It sets its scale on the proxy, and the optimizer must see it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model, opt = make()
    twin, twin_opt = make()
    outer = proxy(opt)
    scaler.scale(model(batch()).square().mean()).backward()
    outer.first_step(zero_grad=True)
    scaler.scale(model(batch()).square().mean()).backward()
    scaler.step(outer)
    scaler.update()
    assert not hasattr(opt, "grad_scale") and not hasattr(outer, "found_inf")
    two_steps(twin, twin_opt, batch())
    for p, q in zip(params_of(opt), params_of(twin_opt), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ scaler, autocast


@pytest.mark.parametrize("finish", ["scaler.step", "second_step"])
@pytest.mark.parametrize("clip", [False, True])
def test_unscaling_before_the_climb_is_never_a_step_with_scaled_gradients(clip, finish, backend):
    model, opt = make(backend=backend)
    before = weights(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(model(batch()).square().mean()).backward()
    scaler.unscale_(opt)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.first_step(zero_grad=True)
    scaler.scale(model(batch()).square().mean()).backward()
    with pytest.raises(RuntimeError, match=r"unscale_.*before first_step.*max_grad_norm"):
        scaler.step(opt) if finish == "scaler.step" else opt.second_step()
    opt.restore()
    assert_weights(opt, before)


def test_unscaling_a_batch_that_is_given_up_spoils_nothing():
    model, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(model(batch()).square().mean()).backward()
    scaler.unscale_(opt)
    scaler.update()
    opt.zero_grad()
    for half in opt.first_step, lambda: scaler.step(opt):
        scaler.scale(model(batch()).square().mean()).backward()
        half()
    scaler.update()


def test_unscaling_through_the_base_optimizer_is_refused_all_the_same():
    """Its groups are read elsewhere: nothing says that the second gradients are unscaled."""
    model, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for half in opt.first_step, None:
        scaler.scale(model(batch()).square().mean()).backward()
        if half:
            scaler.unscale_(opt)
            half(zero_grad=True)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(opt)
    opt.restore()


@pytest.mark.parametrize("style", ["two steps", "closure", "base of its own", "restore"])
def test_both_passes_in_one_autocast_block(style, backend):
    """Autocast kept the casts of w, and rho had no effect at all."""
    rule = Compressed if style == "base of its own" else SGD
    models, optimizers = zip(*[make(rule, backend=backend) for _ in range(2)], strict=True)

    def step(model, opt, x, inner):
        def passed():
            with inner():
                loss = model(x).float().square().mean()
            loss.backward()
            return loss

        if style == "closure":
            opt.step(passed)
        else:
            passed()
            opt.first_step(zero_grad=True)
            if style == "restore":
                passed()
                opt.zero_grad()
                opt.restore()
                passed()
                opt.first_step(zero_grad=True)
            passed()
            opt.second_step(zero_grad=True)
        opt.zero_grad()

    def block():
        return torch.autocast("cpu", torch.bfloat16)

    with block():
        for i in range(3):
            step(models[0], optimizers[0], batch(i), torch.enable_grad)
    for i in range(3):
        step(models[1], optimizers[1], batch(i), block)
    assert_weights(optimizers[0], weights(optimizers[1]))


def test_both_passes_in_one_block_of_cached_parametrizations():
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 1))
        models.append(model)
        optimizers.append(FusedSAM(model.parameters(), lr=0.1, rho=0.3))
    with nn.utils.parametrize.cached():
        for i in range(2):
            two_steps(models[0], optimizers[0], batch(i))
    for i in range(2):
        two_steps(models[1], optimizers[1], batch(i))
    assert_weights(optimizers[0], weights(optimizers[1]))


# --------------------------------------------------------------------------- the base optimizer


@pytest.mark.parametrize("rule", [SGD, Compressed])
def test_the_base_optimizer_does_not_step_while_perturbed(rule, backend):
    _, opt = make(rule, backend=backend)
    opt = copy.deepcopy(opt)
    base = opt.base_optimizer
    inject({p: torch.ones_like(p) for p in params_of(opt)})
    opt.first_step()
    before = weights(opt)
    with pytest.raises(RuntimeError, match=r"base_optimizer\.step\(\).*w \+ epsilon"):
        base.step()
    assert_weights(opt, before)
    opt.second_step()
    before = weights(opt)
    base.step()
    assert not torch.equal(params_of(opt)[0], before[0])


def test_an_instance_in_place_of_parameters_names_wrap():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"AdamW.*FusedSAM\.wrap\(optimizer, rho=\.\.\.\)"):
        FusedSAM(torch.optim.AdamW(model.parameters()), rho=0.1)


def test_a_module_in_place_of_parameters():
    with pytest.raises(TypeError, match=r"Linear.*\.parameters\(\)"):
        FusedSAM(nn.Linear(2, 2), lr=0.1)


def test_partial_as_base():
    params = [nn.Parameter(torch.randn(3))]
    base = functools.partial(functools.partial(SGD, lr=0.5, momentum=0.9), momentum=0.8)
    opt = FusedSAM(params, base, rho=0.2, weight_decay=0.1)
    assert type(opt.base_optimizer) is SGD
    group = opt.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.8, 0.1)
    assert FusedSAM(params, base, lr=0.3).param_groups[0]["lr"] == 0.3
    with pytest.raises(TypeError, match=r"partial.*keywords"):
        FusedSAM(params, functools.partial(SGD, params), lr=0.1)
    with pytest.raises(TypeError, match="LBFGS"):
        FusedSAM(params, functools.partial(torch.optim.LBFGS), lr=0.1)


def test_rng_alone_names_attach():
    with pytest.raises(TypeError, match=r"rng.*model=model"):
        FusedSAM([nn.Parameter(torch.randn(3))], lr=0.1, rng=True)


# ------------------------------------------------------------------------------------ the options

SCALARS = {
    "numpy": (np.float32(0.5), np.bool_(True), np.int64(2)),
    "numpy 0-dim": (np.array(0.5), np.array(True), np.array(2)),
    "torch": (torch.tensor(0.5), torch.tensor(True), torch.tensor(2)),
}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_of_numpy_and_torch_are_taken(kind, backend):
    """And kept as plain numbers: a checkpoint must load with weights_only."""
    number, flag, whole = SCALARS[kind]
    params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    lr = number if kind == "torch" else np.float64(0.5)
    opt = FusedSAM(
        [{"params": params[:1], "rho": whole}, {"params": params[1:]}],
        rho=number,
        adaptive=flag,
        eta=number,
        max_grad_norm=whole,
        lr=lr,
        backend=backend,
    )
    plain = FusedSAM(
        [
            {"params": [nn.Parameter(p.detach().clone())], "rho": r}
            for p, r in zip(params, (2, 0.5), strict=True)
        ],
        rho=0.5,
        adaptive=True,
        eta=0.5,
        max_grad_norm=2,
        lr=0.5,
        backend=backend,
    )
    for o in opt, plain:
        for half in o.first_step, o.second_step:
            inject({p: torch.full_like(p, 3.0) for p in params_of(o)})
            half()
    assert_weights(opt, weights(plain))
    for group in opt.param_groups:
        for name in "rho", "adaptive", "eta", "max_grad_norm":
            assert type(group[name]) in (int, float, bool)
    if kind != "torch":
        assert type(opt.param_groups[0]["lr"]) is float
    through_a_file(opt.state_dict())
    opt.param_groups[0]["rho"] = number
    inject({p: torch.ones_like(p) for p in params})
    opt.first_step()
    opt.restore()
    with pytest.raises(TypeError, match=r"rho.*number"):
        FusedSAM(params, rho=np.ones(2), lr=0.1)


def test_max_grad_norm_is_an_option_of_the_groups(backend):
    """As skorch's set_params(optimizer__max_grad_norm=...) sets it."""
    model, opt = make(backend=backend)
    twin, twin_opt = make(backend=backend, max_grad_norm=0.01)
    for group in opt.param_groups:
        group["max_grad_norm"] = 0.01
    assert opt.max_grad_norm == 0.01
    assert_same_run(model, opt, twin, twin_opt)
    opt.max_grad_norm = None
    assert opt.param_groups[0]["max_grad_norm"] is None
    twin_opt.load_state_dict(opt.state_dict())
    assert twin_opt.max_grad_norm is None
    before = weights(opt)
    opt.param_groups[0]["max_grad_norm"] = 0
    inject({p: torch.ones_like(p) for p in params_of(opt)})
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        opt.first_step()
    assert_weights(opt, before)
    with pytest.raises(ValueError, match="max_grad_norm"):
        opt.max_grad_norm = -1


def test_groups_that_disagree_about_the_global_clip():
    params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    groups = [{"params": params[:1], "max_grad_norm": 2.0}, {"params": params[1:]}]
    with pytest.raises(ValueError, match=r"max_grad_norm.*2\.0.*1\.0.*one norm"):
        FusedSAM(groups, max_grad_norm=1.0, lr=0.1)
    opt = FusedSAM([{"params": [p]} for p in params], max_grad_norm=1.0, lr=0.1)
    before = weights(opt)
    opt.param_groups[1]["max_grad_norm"] = 3.0
    inject({p: torch.ones_like(p) for p in params})
    with pytest.raises(ValueError, match="max_grad_norm"):
        opt.first_step()
    assert_weights(opt, before)
    with pytest.raises(ValueError, match="max_grad_norm"):
        opt.add_param_group({"params": [nn.Parameter(torch.randn(1))], "max_grad_norm": 7.0})


class Clips(SGD):
    """As timm's Lamb: it has an option of that name."""

    def __init__(self, params, lr=0.1, max_grad_norm=5.0):
        super().__init__(params, lr)
        self.defaults["max_grad_norm"] = max_grad_norm
        for group in self.param_groups:
            group["max_grad_norm"] = max_grad_norm


def test_a_base_optimizers_own_max_grad_norm_stays_its_own():
    params = [nn.Parameter(torch.randn(3))]
    opt = FusedSAM.wrap(Clips(params))
    assert opt.max_grad_norm is None and opt.param_groups[0]["max_grad_norm"] == 5.0
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["max_grad_norm"] == 5.0
    with pytest.raises(ValueError, match="Clips has an option max_grad_norm of its own"):
        FusedSAM.wrap(Clips(params), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="Clips has an option max_grad_norm of its own"):
        opt.max_grad_norm = 1.0


# ------------------------------------------------------------------------------- torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own
@pytest.mark.parametrize("style", ["two steps", "closure"])
def test_torch_compile_around_the_step(style, backend):
    """The step is opaque to it: a graph break, and the same bits."""
    torch._dynamo.reset()
    model, opt = make(momentum=0.9, backend=backend)
    twin, twin_opt = make(momentum=0.9, backend=backend)

    @torch.compile(backend="eager")
    def train(x):
        if style == "closure":
            opt.step(lambda: backward(model, x))
            opt.zero_grad()
        else:
            two_steps(model, opt, x)

    for i in range(3):
        train(batch(i))
        two_steps(twin, twin_opt, batch(i))
    assert_weights(opt, weights(twin_opt))


@pytest.mark.parametrize("name", ["first_step", "step", "second_step", "restore"])
def test_one_graph_is_an_error_that_says_why(name):
    torch._dynamo.reset()
    model, opt = make()
    inject({p: torch.ones_like(p) for p in model.parameters()})
    if name != "first_step":
        opt.first_step()

    @torch.compile(backend="eager", fullgraph=True)
    def train():
        getattr(opt, name)()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="writes the parameters"):
        train()


def test_compiled_models_see_the_replay():
    torch._dynamo.reset()
    models, outer = [], []
    for compiled in False, True:
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
        outer.append(torch.compile(models[-1], backend="eager") if compiled else models[-1])
    optimizers = [
        FusedSAM(m.parameters(), lr=0.1, model=o) for m, o in zip(models, outer, strict=True)
    ]
    for i in range(2):
        for o, opt in zip(outer, optimizers, strict=True):
            torch.manual_seed(i)
            two_steps(o, opt, batch(i))
    assert_weights(optimizers[0], weights(optimizers[1]))


def test_a_model_compiled_after_it_was_attached():
    torch._dynamo.reset()
    models, optimizers = [], []
    for compiled in False, True:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizers.append(FusedSAM(model.parameters(), lr=0.1, model=model))
        models.append(torch.compile(model, backend="eager") if compiled else model)
    for i in range(2):
        for model, opt in zip(models, optimizers, strict=True):
            torch.manual_seed(i)
            two_steps(model, opt, batch(i))
    assert_weights(optimizers[0], weights(optimizers[1]))


# ------------------------------------------------------------------------------------- profiling


@pytest.mark.parametrize("style", ["second_step", "step", "closure"])
def test_the_profiler_sees_one_step(style):
    model, opt = make()
    seen = []
    opt._optimizer_step_code = lambda: seen.append(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if style == "closure":
            opt.step(lambda: backward(model, batch()))
        else:
            backward(model, batch())
            opt.first_step()
            getattr(opt, style)()
    names = [event.name for event in profile.events()]
    assert names.count("Optimizer.step#FusedSAM.step") == 1 and seen == [1]
