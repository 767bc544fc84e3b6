"""The textbook SAM step in float64, around the real torch.optim class, and how far one may be off.

``step`` drives an optimizer through one step with injected gradients and compares everything that
it may write: the weights after the climb, the weights after the step, every state. Each call starts
from the weights and the state that the optimizer has now, in its own precision, so that errors
cannot compound from step to step and the bounds below stay those of a single step.

Tolerance. Let u = eps / 2 be the unit roundoff. An expression of n operations, each rounded to the
compute dtype, is off by at most n * u * (the same expression with every term replaced by its
magnitude), to first order (Higham 2002, section 3.1); ``_magnitudes`` computes that last factor.
The longest chain, centered RMSprop with momentum, has 15 operations and 5 rounded hyperparameters,
and the global norm adds log2(n) + 3 in any sensible order of summation. OPERATIONS = 32 covers
them: the bound is 32 u = 16 eps. Storing in a lower precision adds one rounding: half a unit in the
last place there.
"""

from dataclasses import dataclass

import torch

OPERATIONS = 32
ASCENT = ("rho", "adaptive", "eta")


@dataclass
class Expected:
    """The exact value and the magnitude of the terms that it was summed from; 0: bit for bit."""

    value: torch.Tensor
    magnitude: torch.Tensor | float


def exact(tensor):
    """A copy in double precision; every lower precision fits in it."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def real(tensor):
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def bits(tensor):
    """The bytes of a tensor, element by element: tells -0.0 from 0.0 and NaN from NaN."""
    return real(tensor.detach()).contiguous().reshape(-1).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_bits(actual, expected, what=""):
    assert same_bits(actual, expected), f"{what}: {actual} is not bitwise {expected}"


def assert_close(actual, expected, what):
    """Within the bound that the module derives, element by element, NaN where NaN is exact."""
    assert actual.shape == expected.value.shape, what
    if actual.numel() == 0:
        return
    dtype = actual.dtype.to_real()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    value, got = real(expected.value), real(exact(actual))
    if isinstance(expected.magnitude, float) and expected.magnitude == 0.0:
        bound = torch.zeros_like(value)
    else:
        bound = OPERATIONS * torch.finfo(compute).eps / 2 * expected.magnitude
        # The smallest result of a compute-precision operation that is not flushed to zero.
        bound = bound + torch.finfo(compute).tiny
        if dtype != compute:
            info = torch.finfo(dtype)
            # The value that is rounded may be off by the bound already.
            bound = bound + info.eps / 2 * (value.abs() + bound) + info.tiny * info.eps / 2
    unequal = (got != value) & ~(got.isnan() & value.isnan())
    bad = unequal & ~((got - value).abs() <= bound)
    # No bound where a variance cancels to nothing: torch gives NaN where it rounds below zero.
    bad = bad & ~(bound.isinf() & got.isfinite())
    if bad.any():
        ratio = ((got - value).abs() / bound)[bad].max().item()
        raise AssertionError(
            f"{what} ({actual.dtype}): {int(bad.sum())} of {bad.numel()} are off, the worst by "
            f"{ratio:.3g} times the bound; got {got[bad][:4].tolist()}, "
            f"exact {value[bad][:4].tolist()}"
        )


# ------------------------------------------------------------------------------------ the textbook


def climb(groups, weights, grads):
    """``w + epsilon`` for every parameter: {param: Expected}, and the global norm, Expected."""
    scaled = {}
    for group in groups:
        for p in group["params"]:
            if grads.get(p) is not None:
                g = exact(grads[p])
                scaled[p] = (weights[p].abs() + group["eta"]) * g if group["adaptive"] else g
    # sum() of an empty list would be an int
    norm = torch.stack([torch.zeros((), dtype=torch.float64)] + [s.norm() for s in scaled.values()])
    norm = norm.norm()
    # A global norm is as good as the lowest precision in it: eps of float32 in units of float64's.
    mixed = 2.0**29 if any(p.dtype.to_real() != torch.float64 for p in scaled) else 1.0
    expected = {}
    for group in groups:
        sign = -1 if group.get("maximize") else 1
        for p in group["params"]:
            w = weights[p]
            if p not in scaled or not norm.isfinite() or norm == 0 or group["rho"] == 0:
                expected[p] = Expected(w, 0.0)
                continue
            epsilon = group["rho"] / norm * exact(grads[p])
            if group["adaptive"]:
                epsilon = epsilon * (w.abs() + group["eta"]) ** 2
            coarse = mixed if p.dtype == torch.float64 else 1.0
            terms = real(w).abs() + real(epsilon).abs() * coarse
            expected[p] = Expected(w + sign * epsilon, terms)
    coarse = mixed if any(p.dtype == torch.float64 for p in weights) else 1.0
    return expected, Expected(norm, norm * coarse)


def descend(
    cls, groups, weights, state, grads, *, grad_scale=1.0, found_inf=False, max_grad_norm=None
):
    """One step of the torch.optim class ``cls`` in float64 from ``weights`` with ``grads``.

    Returns {param: Expected} and {param: {name: Expected}}.
    """
    twins = {}
    for p, w in weights.items():
        twins[p] = w.clone().requires_grad_()
        if grads.get(p) is not None:
            twins[p].grad = exact(grads[p]) / grad_scale
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(twins.values()), max_grad_norm, foreach=False)
    base = cls(
        [{**_options(group), "params": [twins[p] for p in group["params"]]} for group in groups]
    )
    for p, entry in state.items():
        base.state[twins[p]] = {
            # In the parameter's dtype, which may have changed since the state was written.
            k: v.clone() if k == "step" else exact(v.to(p.dtype))
            for k, v in entry.items()
            if v is not None
        }
    old = {p: {k: v.clone() for k, v in base.state.get(twins[p], {}).items()} for p in weights}
    if not found_inf:
        base.step()
    new_weights, new_state = {}, {}
    for group in groups:
        for p in group["params"]:
            new = base.state.get(twins[p], {})
            stepped = grads.get(p) is not None and not found_inf
            weight, terms = 0.0, {}
            if stepped:
                g = twins[p].grad
                weight, terms = _magnitudes(cls, group, weights[p], g, old[p], new)
            if not stepped or group["lr"] == 0:
                new_weights[p] = Expected(weights[p], 0.0)
            else:
                new_weights[p] = Expected(twins[p].detach(), weight)
            new_state[p] = {name: Expected(new[name], terms.get(name, 0.0)) for name in new}
    return new_weights, new_state


def _options(group):
    options = {k: v for k, v in group.items() if k not in (*ASCENT, "params", "param_names")}
    # The plainest of torch's implementations, and no tensors among the hyperparameters.
    options.update({k: v.item() for k, v in options.items() if isinstance(v, torch.Tensor)})
    if "betas" in options:
        options["betas"] = tuple(map(float, options["betas"]))
    options.update({k: False for k in ("foreach", "fused", "capturable") if k in options})
    return options


def _magnitudes(cls, group, w, g, old, new):
    """The magnitude of the terms of the new weights, and of each state: see the module."""
    group = _options(group)
    w, g = real(w).abs(), real(g).abs()
    old = {k: real(v).abs() for k, v in old.items()}
    new = {k: real(v) for k, v in new.items()}
    lr, weight_decay = group["lr"], group["weight_decay"]
    terms = {}
    if not group.get("decoupled_weight_decay"):
        g = g + weight_decay * w
    if cls is torch.optim.SGD:
        update = g
        if group["momentum"]:
            terms["momentum_buffer"] = group["momentum"] * old.get("momentum_buffer", 0) + g
            update = terms["momentum_buffer"]
            if group["nesterov"]:
                update = g + group["momentum"] * update
    elif cls in (torch.optim.Adam, torch.optim.AdamW):
        beta1, beta2 = group["betas"]
        terms["step"] = 0.0
        terms["exp_avg"] = old.get("exp_avg", 0) + (1 - beta1) * g
        terms["exp_avg_sq"] = beta2 * old.get("exp_avg_sq", 0) + (1 - beta2) * g**2
        variance = new["exp_avg_sq"]
        if group["amsgrad"]:
            terms["max_exp_avg_sq"] = terms["exp_avg_sq"] + old.get("max_exp_avg_sq", 0)
            variance = new["max_exp_avg_sq"]
        step = new["step"].item()
        denom = (variance / (1 - beta2**step)).sqrt() + group["eps"]
        update = terms["exp_avg"] / (1 - beta1**step) / denom
        update = update * _amplification(terms["exp_avg_sq"], variance)
    elif cls is torch.optim.RMSprop:
        alpha = group["alpha"]
        terms["step"] = 0.0
        terms["square_avg"] = alpha * old.get("square_avg", 0) + (1 - alpha) * g**2
        variance, squares = new["square_avg"], terms["square_avg"]
        if group["centered"]:
            terms["grad_avg"] = old.get("grad_avg", 0) + (1 - alpha) * g
            variance = (variance - new["grad_avg"] ** 2).clamp_min(0)
            squares = squares + terms["grad_avg"] ** 2
        update = g / (variance.sqrt() + group["eps"]) * _amplification(squares, variance)
        if group["momentum"]:
            update = group["momentum"] * old.get("momentum_buffer", 0) + update
            terms["momentum_buffer"] = update
    else:
        raise TypeError(f"no textbook of {cls.__name__} is written here")
    return w + lr * update, terms


def _amplification(terms, variance):
    """How much larger a variance's relative error is than u, where its terms cancel."""
    return 1 + torch.where(variance > 0, terms / variance, torch.where(terms > 0, torch.inf, 0))


# -------------------------------------------------------------------------- an optimizer against it


def inject(grads):
    """Put copies of gradients, in their strides, into ``p.grad``: a step may overwrite them."""
    for p, g in grads.items():
        if g is None:
            p.grad = None
        elif any(s == 0 and n > 1 for s, n in zip(g.stride(), g.shape, strict=True)):
            p.grad = g  # expanded, as autograd makes them
        else:
            p.grad = torch.empty_strided(g.shape, g.stride(), dtype=g.dtype).copy_(g)


def snapshot(opt):
    """The exact weights now."""
    return {p: exact(p) for p in params_of(opt)}


def first_step(opt, grads):
    """``opt.first_step()`` with these gradients, and no others, checked.

    Returns what ``second_step`` needs: the weights before, exactly and as bits, of the parameters
    that have a gradient; the others are neither perturbed nor saved.
    """
    weights = snapshot(opt)
    grads = {p: grads.get(p) for p in weights}
    before = {p: p.detach().clone() for p in weights}
    inject(grads)
    # A group added to the base optimizer takes the defaults.
    groups = [{**{k: opt.defaults[k] for k in ASCENT}, **group} for group in opt.param_groups]
    expected, norm = climb(groups, weights, grads)
    opt.first_step()
    for i, p in enumerate(weights):
        assert_close(p, expected[p], f"perturbed weights {i}")
    assert_close(opt.grad_norm, norm, "grad_norm")
    return {p: (weights[p], before[p]) for p in weights if grads[p] is not None}


def second_step(opt, grads, saved=None, *, step=None, grad_scale=1.0, found_inf=False):
    """``step()``, or ``opt.second_step()``, with these gradients and no others, checked.

    Args:
        saved: what ``first_step`` returned; parameters that it lacks are where they are.
    """
    cls, groups = type(opt.base_optimizer), opt.param_groups
    saved = saved or {}
    here = {p: (exact(p), p.detach().clone()) for p in params_of(opt)}
    here.update({p: saved[p] for p in here if p in saved})
    weights = {p: pair[0] for p, pair in here.items()}
    grads = {p: grads.get(p) for p in weights}
    state = {p: entry for p, entry in opt.state.items() if p in weights}
    expected, expected_state = descend(
        cls,
        groups,
        weights,
        state,
        grads,
        grad_scale=grad_scale,
        found_inf=found_inf,
        max_grad_norm=opt.max_grad_norm,
    )
    present = {p: set(entry) for p, entry in state.items()}
    inject(grads)
    (step or opt.second_step)()
    assert not opt.is_perturbed
    for i, p in enumerate(weights):
        if isinstance(expected[p].magnitude, float):
            assert_same_bits(p, here[p][1].to(p.dtype), f"weights {i}, which must not have moved")
        assert_close(p, expected[p], f"weights {i}")
        entry = opt.state.get(p, {})
        for name, value in expected_state[p].items():
            assert_close(entry[name], value, f"{name} {i}")
            if name != "step":
                assert entry[name].dtype == p.dtype and entry[name].shape == p.shape
        if found_inf and present.get(p) is None:
            # A skipped first step may show its state already, if it is as good as none.
            assert all(not value.any() for value in entry.values())
        else:
            assert set(entry) == set(expected_state[p]) | present.get(p, set()), f"state {i}"


def step(opt, first, second, **options):
    """A whole SAM step with these gradients, {param: gradient or None}, checked throughout."""
    saved = first_step(opt, first)
    second_step(opt, second, saved, **options)
