"""The textbook SAM step in float64, around the real torch.optim class, and how far one may be off.

A ``Textbook`` follows an optimizer from its beginning. It drives each step with injected gradients,
predicts what the step may write (the weights after the climb, the weights after the step, every
state) and compares. Its predictions start from weights and state of its own, never from what the
optimizer holds: before each half of a step the optimizer's must still be the textbook's, bit for
bit. So state that is lost, moved, written outside of a step or read from elsewhere than it was
written is an error of the optimizer, and not taken for the truth.

Tolerance. Let u = eps / 2 be the unit roundoff. An expression of n operations, each rounded to the
compute dtype, is off by at most n * u * (the same expression with every term replaced by its
magnitude), to first order (Higham 2002, section 3.1); ``_magnitudes`` computes that last factor.
The longest chain, centered RMSprop with momentum, has 15 operations and 5 rounded hyperparameters,
and the global norm adds log2(n) + 3 in any sensible order of summation. OPERATIONS = 32 covers
them: the bound is 32 u = 16 eps. Storing in a lower precision adds one rounding: half a unit in the
last place there, and a whole one for a climb in half precision, which goes to either neighbour
(tests/test_rounding.py tells to which).

Many steps. A value that has passed its comparison is right to within the bound of one step, and
which of the permitted bits it has is the optimizer's choice. The textbook keeps a clone of these
bits as its own and goes on from them. By induction the optimizer's n-th value is then within the
sum of n bounds, each carried on by the later steps, of a trajectory in float64: what a bound
propagated along it allows, and no more. But no bound grows, and a bfloat16 that was rounded the
other way does not widen all that comes after it. That nothing drifts within these bounds, and that
the keeping itself is right, is tested apart, against a float64 loop that is never synchronised:
``test_table.test_many_float64_steps_end_where_a_loop_of_its_own_ends``.
"""

import math
from types import SimpleNamespace

import formulas
import torch
from formulas import Expected, exact, real

import fused_sam
from fused_sam.options import OPTIONS

OPERATIONS = 32
HALVES = (torch.bfloat16, torch.float16)
ASCENT = tuple(OPTIONS)


def computed_in(p):
    dtype = torch.float64 if p.dtype.to_real() == torch.float64 else torch.float32
    return dtype.to_complex() if p.is_complex() else dtype


def params_of(opt):
    return [p for group in groups_of(opt) for p in group["params"]]


def groups_of(opt):
    """The groups; a parameter that stands there several times belongs where it stands first."""
    groups, seen = [], set()
    for group in opt.param_groups:
        params = list({id(p): p for p in group["params"] if id(p) not in seen}.values())
        seen.update(map(id, params))
        groups.append({**group, "params": params})
    return groups


def kept_dtype(cls, name, p):
    """The dtype of a state: SGD's is made out of the gradient, all others out of the parameter."""
    if cls is torch.optim.SGD and name == "momentum_buffer":
        return p.grad_dtype or (p.dtype if p.dtype == torch.float64 else torch.float32)
    return p.dtype


def bits(tensor):
    """The bits of a tensor's numbers as integers: tells -0.0 from 0.0 and NaN from NaN."""
    numbers = real(tensor.detach()).resolve_neg()
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return numbers.view(integer[numbers.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_bits(actual, expected, what=""):
    assert same_bits(actual, expected), f"{what}: {actual} is not bitwise {expected}"


def assert_close(actual, expected, what, weights=torch.float64):
    """Within the bound that the module derives, element by element, NaN where NaN is exact.

    ``weights``: their dtype, which is computed in float32 unless it is a double precision.
    """
    assert actual.shape == expected.value.shape, what
    if actual.numel() == 0:
        return
    dtype = actual.dtype.to_real()
    double = dtype == weights.to_real() == torch.float64
    compute = torch.float64 if double else torch.float32
    value, got = real(expected.value), real(exact(actual))
    if isinstance(expected.magnitude, float) and expected.magnitude == 0.0:
        bound = torch.zeros_like(value)
    else:
        bound = OPERATIONS * torch.finfo(compute).eps / 2 * expected.magnitude
        # The smallest result of a compute-precision operation that is not flushed to zero.
        bound = bound + torch.finfo(compute).tiny
        if dtype != compute:
            info = torch.finfo(dtype)
            step = info.eps if expected.neighbour else info.eps / 2
            # The value that is rounded may be off by the bound already.
            bound = bound + step * (value.abs() + bound) + info.tiny * step
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


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, as it stands there; what it steps with is float64."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -real(p.grad) if group["maximize"] else real(p.grad)
                m = real(self.state[p].setdefault("exp_avg", torch.zeros_like(p)))
                update = torch.sign(beta1 * m + (1 - beta1) * g)
                real(p).sub_(group["lr"] * (update + group["weight_decay"] * real(p)))
                m.copy_(beta2 * m + (1 - beta2) * g)


TEXTBOOKS = {fused_sam.Lion: Lion}
"""For classes that are not torch's."""


def climb(groups, weights, along, unscale=1.0, shown=None):
    """``w + epsilon`` for every parameter: {param: Expected}, and the global norm, Expected.

    Args:
        groups: the optimizer's.
        weights: {param: w}, exact.
        along: what the climb follows, {param: Expected}: the gradients, or what is made of them.
        unscale: the inverse of the gradients' loss scale, which USAM's climb depends on.
        shown: {param: weight}, exact: what the norm reads of them; masters are not looked at.
    """
    scaled, lengths, sizes = {}, [], []
    for group in groups:
        for p in group["params"] if group["ascent"] else ():
            if p in along:
                t = weights[p].abs() + group["eta"] if group["adaptive"] else 1.0
                scaled[p] = t * along[p].value
                if group["adaptive"]:
                    lengths.append(((shown or weights)[p].abs() + group["eta"]) * along[p].value)
                else:
                    lengths.append(scaled[p])
                sizes.append((real(t * torch.ones_like(weights[p])) * along[p].magnitude).norm())
    climbing = [group for group in groups if group["ascent"]]
    p_norm = climbing[0]["p"] if climbing and climbing[0]["ascent"] == "p-norm" else 2.0
    q_norm = 1.0 if p_norm == math.inf else p_norm / (p_norm - 1)
    # sum() of an empty list would be an int
    norm = [torch.zeros((), dtype=torch.float64)]
    norm = torch.stack(norm + [s.abs().norm(q_norm) for s in lengths]).norm(q_norm)
    # A global norm is as good as the lowest precision in it: eps of float32 in units of float64's.
    mixed = 2.0**29 if any(p.dtype.to_real() != torch.float64 for p in scaled) else 1.0
    # Where a direction is the small difference of large terms, so is its length.
    averages = climbing and climbing[0]["ascent"] in formulas.AVERAGED
    cancels = torch.stack(sizes).norm() / norm if sizes and averages else 1.0
    expected = {}
    for group in groups:
        sign = -1 if group.get("maximize") else 1
        for p in group["params"]:
            w = weights[p]
            unmoved = norm == 0 and group["ascent"] != "usam"
            if p not in scaled or not norm.isfinite() or unmoved or group["rho"] == 0:
                expected[p] = Expected(w, 0.0)
                continue
            if group["ascent"] != "p-norm":
                length = 1 / unscale if group["ascent"] == "usam" else norm
                factor = group["rho"] / length
                if group["adaptive"]:
                    factor = factor * (w.abs() + group["eta"]) ** 2
                epsilon = factor * along[p].value
                sized = real(factor * torch.ones_like(w)) * along[p].magnitude
            else:  # Foret et al. 2021, equation 2, with the q-norm in place of the sum
                g = scaled[p]
                epsilon = group["rho"] * g.sign() * (g.abs() / norm) ** (q_norm - 1)
                if group["adaptive"]:
                    epsilon = epsilon * (w.abs() + group["eta"])
                sized = real(epsilon).abs()
            # A power makes a relative error larger.
            coarse = (mixed if p.dtype == torch.float64 else 1.0) * max(1.0, q_norm)
            size = real(epsilon).abs()
            terms = real(w).abs() + (sized - size).clamp_min(0) + size * coarse * cancels
            expected[p] = Expected(w + sign * epsilon, terms, neighbour=True)
    coarse = (mixed if any(p.dtype == torch.float64 for p in weights) else 1.0) * max(1.0, q_norm)
    return expected, Expected(norm, norm * coarse * cancels)


def blend(groups, first, second, scale=1.0):
    """The gradients that the base optimizer sees, {param: Expected or None}.

    Args:
        groups: the optimizer's.
        first, second: {param: gradient or None} of both passes; {} where there was no first.
        scale: the loss scale of both.
    """
    exactly = {
        p: Expected(exact(g), real(exact(g)).abs()) for p, g in second.items() if g is not None
    }
    climbing = [p for group in groups if group["ascent"] for p in group["params"]]
    if first and any(g["ascent"] and g["blend"] in ("wsam", "coupled-wsam") for g in groups):
        seen = {p: one for p, (one, _) in formulas.wsam(groups, first, second, scale).items()}
        return {**exactly, **seen}
    alpha = next((g["blend_alpha"] for g in groups if g["ascent"] and g["blend"] == "gsam"), None)
    if alpha is None or not first:
        return exactly
    # Zhuang et al. 2022: g = parallel + orthogonal to g', by scalar products over all parameters.
    both = [
        (real(exact(first[p])), real(exactly[p].value))
        for p in climbing
        if p in exactly and first.get(p) is not None
    ]
    squares = sum(real(exactly[p].value).square().sum() for p in climbing if p in exactly)
    share = sum((g * h).sum() for g, h in both) / squares if both else torch.zeros(())
    if not share.isfinite():
        return exactly
    for p in climbing:
        if p in exactly:
            h = exactly[p].value
            g = torch.zeros_like(h) if first.get(p) is None else exact(first[p])
            orthogonal = g - share * h
            terms = real(h).abs() * (1 + (alpha * share).abs()) + alpha * real(g).abs()
            exactly[p] = Expected(h - alpha * orthogonal, terms)
    return exactly


def afterwards(groups, first, second, scale=1.0):
    """What is subtracted after the step, times the learning rate: {param: Expected}.

    Arguments as for ``blend``.
    """
    if not first or not any(g["ascent"] and g["blend"] == "wsam" for g in groups):
        return {}
    return {p: one for p, (_, one) in formulas.wsam(groups, first, second, scale).items()}


def across(groups, first, second):
    """LookSAM's direction, {param: Expected}, and its norm, Expected: Liu et al. 2022, algorithm 1.

    Args:
        first, second: as for ``blend``.
    """
    both = {
        p: (torch.zeros_like(real(exact(second[p]))), real(exact(second[p])))
        for group in groups
        for p in (group["params"] if group["ascent"] else ())
        if second.get(p) is not None
    }
    was = {p: g for p, g in first.items() if g is not None}
    both |= {p: (real(exact(was[p])), h) for p, (_, h) in both.items() if p in was}
    square = sum(g.square().sum().item() for g, _ in both.values()) or math.inf
    share = sum((g * h).sum().item() for g, h in both.values()) / square
    terms = sum((g * h).abs().sum().item() for g, h in both.values()) / square
    found = {}
    for p, (g, h) in both.items():
        value = h - share * g
        shaped = torch.view_as_complex(value) if p.is_complex() else value
        found[p] = Expected(shaped, h.abs() + terms * g.abs())
    norm = math.sqrt(sum(real(d.value).square().sum().item() for d in found.values()))
    if not math.isfinite(norm):
        nothing = {p: Expected(torch.zeros_like(d.value), 0.0) for p, d in found.items()}
        return nothing, Expected(torch.zeros(()), 0.0)
    # Of two that are parallel only rounding is left: the square is a difference of numbers as
    # large as this one.
    whole = sum(h.square().sum().item() for _, h in both.values())
    norm = torch.tensor(norm if norm**2 > 1e-13 * whole else 0.0, dtype=torch.float64)
    return found, Expected(norm, whole / norm if norm else 0.0)


def reuse(groups, direction, norm, grads):
    """The gradients that LookSAM's base optimizer sees in a step that does not climb.

    Args:
        direction: {param: value}; what is not there is zero.
        norm: that of the direction.
        grads: {param: gradient or None}.
    """
    seen = {p: Expected(exact(g), real(exact(g)).abs()) for p, g in grads.items() if g is not None}
    climbing = [g for g in groups if g["ascent"]]
    params = [p for group in climbing for p in group["params"] if p in seen]
    length = math.sqrt(sum(seen[p].magnitude.square().sum().item() for p in params))
    factor = climbing[0]["blend_alpha"] * length / norm if norm else 0.0
    for p in params if math.isfinite(factor) else ():
        if p in direction:
            d = factor * exact(direction[p])
            seen[p] = Expected(seen[p].value + d, seen[p].magnitude + real(d).abs())
    return seen


def descend(
    cls,
    groups,
    weights,
    state,
    grads,
    *,
    grad_scale=1.0,
    found_inf=False,
    max_grad_norm=None,
    after=(),
):
    """One step of the torch.optim class ``cls`` in float64 from ``weights`` with ``grads``.

    The gradients are as ``blend`` gives them, ``after`` as ``afterwards`` does. Returns
    {param: Expected} and {param: {name: Expected}}.
    """
    twins, terms_of = {}, {}
    for p, w in weights.items():
        twins[p] = w.clone().requires_grad_()
        if grads.get(p) is not None:
            twins[p].grad = grads[p].value / grad_scale
            terms_of[p] = grads[p].magnitude / grad_scale
    if max_grad_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(list(twins.values()), max_grad_norm, foreach=False)
        clip = (max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        terms_of = {p: terms * clip for p, terms in terms_of.items()}
    base = TEXTBOOKS.get(cls, cls)(
        [{**_options(group), "params": [twins[p] for p in group["params"]]} for group in groups]
    )
    for p, entry in state.items():
        base.state[twins[p]] = {
            k: v.clone() if k == "step" else exact(v) for k, v in entry.items() if v is not None
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
                compute = torch.float64 if p.dtype == torch.float64 else torch.float32
                bound = OPERATIONS * torch.finfo(compute).eps / 2
                magnitudes = _magnitudes(cls, group, weights[p], g, terms_of[p], old[p], new, bound)
                weight, terms = magnitudes
            if not stepped or group["lr"] == 0:
                new_weights[p] = Expected(weights[p], 0.0)
            else:
                new_weights[p] = Expected(twins[p].detach(), weight)
                if p in after:
                    lr = -group["lr"] if group["maximize"] else group["lr"]
                    value = twins[p].detach() - lr * after[p].value
                    new_weights[p] = Expected(value, weight + group["lr"] * after[p].magnitude)
            new_state[p] = {name: Expected(new[name], terms.get(name, 0.0)) for name in new}
    return new_weights, new_state


def _options(group):
    options = {
        k: v for k, v in group.items() if k not in (*ASCENT, "sam_climbs", "params", "param_names")
    }
    # The plainest of torch's implementations, and no tensors among the hyperparameters.
    options.update({k: v.item() for k, v in options.items() if isinstance(v, torch.Tensor)})
    if "betas" in options:
        options["betas"] = tuple(map(float, options["betas"]))
    options.update({k: False for k in ("foreach", "fused", "capturable") if k in options})
    return options


def _magnitudes(cls, group, w, g, g_terms, old, new, bound):
    """The magnitude of the terms of the new weights, and of each state: see the module."""
    group = _options(group)
    signed = real(g) * (-1 if group["maximize"] else 1), {k: real(v) for k, v in old.items()}
    w, g = real(w).abs(), g_terms
    old = {k: real(v).abs() for k, v in old.items()}
    new = {k: real(v) for k, v in new.items()}
    lr, weight_decay = group["lr"], group["weight_decay"]
    terms = {}
    decoupled = group.get("decoupled_weight_decay") or cls is fused_sam.Lion
    if weight_decay and not decoupled:  # 0 * inf is NaN
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
    elif cls is fused_sam.Lion:
        beta1, beta2 = group["betas"]
        terms["exp_avg"] = beta2 * old.get("exp_avg", 0) + (1 - beta2) * g
        direction = beta1 * signed[1].get("exp_avg", 0) + (1 - beta1) * signed[0]
        unsure = direction.abs() < bound * (beta1 * old.get("exp_avg", 0) + (1 - beta1) * g)
        # Where rounding may turn the sign there is no bound.
        update = torch.where(unsure, torch.inf, 1 + weight_decay * w)
    elif cls is torch.optim.Adagrad:
        terms["step"] = 0.0
        terms["sum"] = old["sum"] + g**2
        update = g / (new["sum"].sqrt() + group["eps"])
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


class Textbook:
    """What an optimizer must do, from weights and state that it never reads back: see the module.

    What a test does itself to the weights or the state between steps, it must do to these too.

    Attributes:
        weights: {param: its w}, the bits that the optimizer must have, or must return to.
        state: {param: {name: value}}, likewise.
        masters: {param: its master}, of weights of half precision that have one. A weight that is
            not its master, rounded, is what counts.
        averages: {param: average of its gradients}, if the ascent keeps one.
        climbed: the parameters that hold w + epsilon.
        climbs: which steps climb: a function of their number.
        number: how many were finished that a first_step() had begun.
        between: whether one is half done.
        direction, length: LookSAM's {param: direction}, and the norm of all of it.
    """

    def __init__(self, opt, climbs=lambda number: True):
        self.opt, self.climbs, self.number = opt, climbs, 0
        self.weights, self.state, self.climbed, self.first = {}, {}, set(), {}
        self.masters, self.averages = {}, {}
        self.aside = None  # the gradients of a half-done step that did not climb
        self.between = False
        self.direction, self.length = {}, 0.0
        self._skipped = set()  # parameters whose first step was skipped: they have no state yet
        self.check()

    def check(self):
        """The optimizer's weights and state are the textbook's; new parameters are taken in.

        A parameter whose dtype has changed took its weights along, and takes its state along, at
        the latest in the next step.
        """
        for i, p in enumerate(params_of(self.opt)):
            shown = self.opt.state.get(p, {})
            if p not in self.weights:
                self.weights[p] = p.detach().clone()
                self.state[p] = {
                    k: v.clone() for k, v in shown.items() if isinstance(v, torch.Tensor)
                }
                if self.opt._master_weights and p.dtype in HALVES:
                    self.masters[p] = p.detach().float()
                continue
            self.weights[p] = self.weights[p].to(p.dtype)
            if p not in self.climbed:
                assert_same_bits(p, self.weights[p], f"weights {i}, which no step has changed")
            mine = self.state[p]
            for name in mine:
                if name != "step":
                    mine[name] = mine[name].to(self.kept_dtype(name, p))
                kept = shown[name].to(mine[name].dtype)
                assert_same_bits(kept, mine[name], f"{name} {i}, which no step has changed")
            if p in self.masters and "master_weight" in shown:
                assert_same_bits(shown["master_weight"], self.masters[p], f"master {i}")
            self._check_names(i, p, shown, mine)
        for name, values in (("average", self.averages), ("direction", self.direction)):
            kept = self.opt._facts.engine.layout.members.values() if values else {}
            for i, p in enumerate(params_of(self.opt)):
                if p in values:
                    mine = values[p] = values[p].to(computed_in(p))
                    assert_same_bits(kept[p][f"sam_{name}"].to(mine.dtype), mine, f"{name} {i}")

    def kept_dtype(self, name, p):
        """The dtype of a state of this parameter."""
        if p in self.masters:
            return torch.float32
        return kept_dtype(type(self.opt.base_optimizer), name, p)

    def home(self, p):
        """W, exact: the weight, or its master where the weight is the master, rounded."""
        if p not in self.masters:
            return exact(self.weights[p])
        weight, master = self.weights[p], self.masters[p]
        same = bits(weight) == bits(master.to(weight.dtype))
        return exact(torch.where(same, master, weight.float()))

    def _check_names(self, i, p, shown, mine):
        """``shown`` has all states and no others; of a skipped first step it may have zeros."""
        more = {name for name, value in shown.items() if value is not None} - set(mine)
        more -= {"master_weight"} if p in self.masters else set()
        if p in self._skipped:
            assert not any(shown[name].any() for name in more), f"state {i} of a skipped step"
        else:
            assert not more, f"state {i} has {more}"

    def reread(self, *params):
        """Take the weights of these as they are: the test has written to them itself."""
        for p in params:
            self.weights[p] = p.detach().clone()

    def follow(self, opt):
        """Go on with a copy of the optimizer."""
        self.check()
        names = dict(zip(params_of(self.opt), params_of(opt), strict=True))
        self.opt, self._skipped = opt, {names[p] for p in self._skipped if p in names}
        for kind in ("weights", "state", "masters", "averages", "direction"):
            mine = getattr(self, kind)
            setattr(self, kind, {new: mine[old] for old, new in names.items() if old in mine})
        self.check()

    def restore(self):
        """``opt.restore()``, checked."""
        self.opt.restore()
        assert not self.opt.is_perturbed
        self.arrive()
        self.check()

    def arrive(self):
        """No step is half done."""
        self.climbed.clear()
        self.first, self.aside, self.between = {}, None, False

    def first_step(self, grads, scale=1.0):
        """``opt.first_step()`` with these gradients, {param: gradient or None}, and no others.

        ``scale``: the loss scale that they have.
        """
        self.check()
        opt, params = self.opt, params_of(self.opt)
        grads = {p: grads.get(p) for p in params}
        inject(grads)
        groups, before = self._groups(), opt.is_perturbed
        along, averages = formulas.directions(groups, grads, self.averages, 1 / scale)
        climbs = self.climbs(self.number)
        assert opt.first_step(scaler=SimpleNamespace(get_scale=lambda: scale)) == climbs
        assert opt.is_perturbed == (climbs or before)
        self.between = True
        if not climbs:
            self.aside = grads
            self.check()
            return
        norm = self._check_climb(along, 1 / scale)
        assert_close(opt.grad_norm, norm, "grad_norm")
        climbing = {p for group in groups if group["ascent"] for p in group["params"]}
        self.climbed = {p for p in climbing if grads[p] is not None}
        self.first = {p: grads[p] for p in climbing}
        if norm.value.isfinite():
            kept = opt._facts.engine.layout.members.values()
            for p, average in averages.items():
                shown = kept[p]["sam_average"]
                assert shown.dtype == computed_in(p)
                assert_close(shown, average, "average", p.dtype)
                self.averages[p] = shown.clone()

    def _groups(self):
        """The groups; one that was added to the base optimizer takes the defaults."""
        defaults = {k: self.opt.defaults[k] for k in ASCENT}
        return [{**defaults, **group} for group in groups_of(self.opt)]

    def _check_climb(self, along, unscale=1.0):
        """The optimizer has climbed along this, {param: Expected}, from w.

        Returns:
            The norm that it has gone by, Expected.
        """
        params = params_of(self.opt)
        homes = {p: self.home(p) for p in params}
        shown = {p: exact(self.weights[p]) for p in params}
        expected, norm = climb(self._groups(), homes, along, unscale, shown)
        for i, p in enumerate(params):
            if isinstance(expected[p].magnitude, float):
                assert_same_bits(p, self.weights[p], f"weights {i}, which must not have moved")
            else:
                assert_close(p, expected[p], f"perturbed weights {i}")
        for p in along.keys() & self.masters.keys():
            self.masters[p] = homes[p].float()
        return norm

    def plain_step(self, grads, **options):
        """A step that does not climb, with these gradients and no others, checked."""
        self.check()
        inject({p: grads.get(p) for p in params_of(self.opt)})
        assert not self.opt.first_step()
        assert not self.opt.is_perturbed
        self.second_step(grads, plain=True, **options)

    def _check_direction(self, found, norm):
        """The optimizer keeps this; from here on it is the textbook's own."""
        members = self.opt._facts.engine.layout.members
        kept = members.values()
        assert_close(members.numbers["sam_direction_norm"], norm, "norm of the direction")
        self.length = members.numbers["sam_direction_norm"].item()
        for p in params_of(self.opt):
            shown = kept.get(p, {}).get("sam_direction")
            if p in found:
                assert_close(shown, found[p], "direction", p.dtype)
                self.direction[p] = shown.clone()
            else:
                assert shown is None or not shown.any()
                self.direction.pop(p, None)

    # What a member of one pass does otherwise: tests/ahead.py.

    def seen(self, groups, first, second, scale, plain):
        """What the base optimizer sees: see ``blend``; ``plain``: in a step that does not climb."""
        if plain:
            return reuse(groups, self.direction, self.length, second)
        return blend(groups, first, second, scale)

    def goes_ahead(self):
        """Whether the weights leave w after a step."""
        return False

    def w(self, p):
        """The optimizer's w of a parameter."""
        return p.detach()

    def second_step(self, grads, run=None, *, grad_scale=1.0, found_inf=False, plain=False):
        """``opt.second_step()``, or ``run()``, with these gradients and no others, checked."""
        self.check()
        opt, params = self.opt, params_of(self.opt)
        grads = {p: grads.get(p) for p in params}
        inject(grads)
        plain = plain or self.aside is not None
        if self.aside is not None and all(g is None for g in grads.values()):
            grads = {p: self.aside.get(p) for p in params}
        both = groups_of(opt), self.first, grads, grad_scale
        seen = self.seen(*both, plain)
        looks = bool(self.first) and any(g["blend"] == "looksam" for g in opt.param_groups)
        found = across(groups_of(opt), self.first, grads) if looks else None
        expected, expected_state = descend(
            type(opt.base_optimizer),
            groups_of(opt),
            {p: self.home(p) for p in params},
            {p: self.state[p] for p in params},
            seen,
            grad_scale=grad_scale,
            found_inf=found_inf,
            max_grad_norm=opt.max_grad_norm,
            after=afterwards(*both),
        )
        (run or opt.second_step)()
        assert opt.is_perturbed == self.goes_ahead()
        self.number += self.between
        self.arrive()
        if found is not None and not found_inf:
            self._check_direction(*found)
        self.stepped = stepped = {p for p in params if grads[p] is not None}
        if found_inf:
            self._skipped |= {p for p in stepped if not self.state[p]}
        else:
            self._skipped -= stepped
        for i, p in enumerate(params):
            w = self.w(p)
            if isinstance(expected[p].magnitude, float):
                assert_same_bits(w, self.weights[p], f"weights {i}, which must not have moved")
            elif p not in self.masters:
                assert_close(w, expected[p], f"weights {i}")
                self.weights[p] = w.clone()
            shown = opt.state.get(p, {})
            if p in self.masters and p in stepped and found_inf:
                # Backends look at weights that somebody has written now, or when they take them.
                kept = shown.get("master_weight")
                if kept is None or not same_bits(kept, self.masters[p]):
                    self.masters[p] = self.home(p).float()
            elif p in self.masters and p in stepped:
                master = shown["master_weight"]
                assert master.dtype == torch.float32
                assert_close(master, expected[p], f"master {i}", p.dtype)
                assert_same_bits(w, master.to(p.dtype), f"weights {i}")
                self.masters[p], self.weights[p] = master.clone(), w.clone()
            for name, value in expected_state[p].items():
                assert_close(shown[name], value, f"{name} {i}", p.dtype)
                if name != "step" and p.requires_grad:  # of what is frozen it is as it was
                    assert shown[name].dtype == self.kept_dtype(name, p)
                self.state[p][name] = shown[name].detach().clone()
            self._check_names(i, p, shown, expected_state[p])

    def step(self, first, second, **options):
        """A whole SAM step with these gradients, {param: gradient or None}, checked throughout."""
        self.first_step(first)
        self.second_step(second, **options)
