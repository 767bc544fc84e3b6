"""The members of the SAM family in float64, each written from its formula, around torch.optim.

A ``Member`` holds weights and state of its own over the steps and shares no code with the package.
Where a paper and the code that its authors ran differ, it follows the code; the comments say where.
Gradients come from a function of the weights, so that a wrong climb shows in all that follows.
"""

import math

import torch

ASCENT = ("rho", "adaptive", "eta", "ascent", "sigma", "lam", "theta")


def parameters(shapes, dtype=torch.float64):
    """Where all runs begin."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator).to(dtype))
        for s in shapes
    ]


def give(params, grads, scale=1.0):
    """Put new tensors of these gradients, scaled, into ``p.grad``."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g * scale


class Surface:
    """A loss with curvature and quartic walls, the same for every run: ``gradient(weights, i)``.

    Args:
        shapes: of the parameters.
        missing: {(step, half): indices} of parameters that lack a gradient; half is 0 or 1.
        broken: {(step, half)}: the passes whose first gradient is infinite.
    """

    def __init__(self, shapes, missing=None, broken=()):
        generator = torch.Generator().manual_seed(3)

        def random(shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        self.curvature = [random(s).abs() + 0.1 for s in shapes]
        self.center = [random(s) for s in shapes]
        self.noise = {i: [0.3 * random(s) for s in shapes] for i in range(16)}
        self.missing, self.broken = missing or {}, set(broken)

    def gradient(self, weights, step, half):
        """A list of gradients in the weights' dtype, None where one is missing."""
        grads = []
        for i, w in enumerate(weights):
            if i in self.missing.get((step, half), ()):
                grads.append(None)
                continue
            x = w.detach().double() - self.center[i]
            g = self.curvature[i] * x + 0.05 * x**3 + self.noise[step][i]
            if (step, half) in self.broken and i == 0:
                g = g.clone()
                g.view(-1)[0] = torch.inf
            grads.append(g.to(w.dtype))
        return grads


def dot(a, b):
    """The inner product over all parameters; a missing one counts nothing."""
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True) if None not in (x, y))


def norm(a):
    return math.sqrt(dot(a, a))


def each(f, *lists):
    """``f`` of the parameters' tensors one by one; None where the first one is missing."""
    return [None if row[0] is None else f(*row) for row in zip(*lists, strict=True)]


class Member:
    """SAM in float64; the others override ``direction``, ``epsilon`` or ``blend``.

    Args:
        weights: where it begins: a list of tensors.
        groups: [{"params": indices, options...}], with rho, adaptive, eta and the base's options.
        base: the class of torch.optim.
        climbs: whether step i climbs.
        clip: ``max_grad_norm``.
    """

    def __init__(self, weights, groups, base, climbs=lambda i: True, clip=None):
        self.weights = [w.detach().double().clone().requires_grad_() for w in weights]
        self.row = {i: group for group in groups for i in group["params"]}
        own = [
            {
                **{k: v for k, v in group.items() if k not in ASCENT},
                "params": [self.weights[i] for i in group["params"]],
            }
            for group in groups
        ]
        self.base = base(own)
        self.climbs, self.clip, self.number = climbs, clip, 0

    # ---- what the members differ in

    def direction(self, g):
        """What the climb follows, out of the gradient at w: called in climbing steps only."""
        return g

    def epsilon(self, d):
        """rho * T**2 d / ||T d||, over the parameters that take part."""
        t = self.transform()
        length = norm(each(torch.mul, d, t))
        if not 0 < length < math.inf:
            return [None if x is None else torch.zeros_like(x) for x in d]
        return [
            None if x is None else self.row[i]["rho"] / length * t[i] ** 2 * x
            for i, x in enumerate(d)
        ]

    def transform(self):
        """ASAM's T: |w| + eta in groups that are adaptive, else 1."""
        return [
            self.weights[i].detach().abs() + self.row[i].get("eta", 0.0)
            if self.row[i].get("adaptive")
            else torch.ones_like(w)
            for i, w in enumerate(self.weights)
        ]

    def blend(self, g, g2):
        """What the base optimizer sees after a climb."""
        return g2

    def plain(self, g):
        """What it sees in a step that does not climb."""
        return g

    # ---- a step

    def climb(self, g):
        """w + epsilon for the gradients at w."""
        eps = self.epsilon(self.direction(self.inside(g)))
        return [
            w.detach() if e is None else w.detach() + e
            for w, e in zip(self.weights, eps, strict=True)
        ]

    def step(self, surface, skip=False):
        """One step; ``skip`` is what a GradScaler asks for where gradients are not finite."""
        i = self.number
        self.number += 1
        g = surface.gradient(self.weights, i, 0)
        climbs = self.climbs(i)
        if climbs:
            g2 = surface.gradient(self.climb(g), i, 1)
            v = self.outside(g2, self.blend(self.inside(g), self.inside(g2)))
        else:
            v = self.outside(g, self.plain(self.inside(g)))
        if not skip:
            self.descend(v)
            if climbs:
                self.after()

    def after(self):
        """What follows the base optimizer's step after a climb."""

    def inside(self, g):
        """The gradients of the groups that climb; the others count as missing."""
        climbs = [self.row[i].get("ascent", "sam") is not None for i in range(len(g))]
        return [x if climbs[i] else None for i, x in enumerate(g)]

    def outside(self, g, v):
        """What the base optimizer sees: ``v`` in the groups that climb, ``g`` in the others."""
        return [
            x if self.row[i].get("ascent", "sam") is None else y
            for i, (x, y) in enumerate(zip(g, v, strict=True))
        ]

    def descend(self, v):
        for w, x in zip(self.weights, v, strict=True):
            w.grad = None if x is None else x.clone()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, self.clip, foreach=False)
        self.base.step()


class PNorm(Member):
    """Foret et al., equation 2, with Kwon et al.'s T."""

    p = 2.0

    def epsilon(self, d):
        t = self.transform()
        scaled = each(torch.mul, d, t)
        if self.p == math.inf:
            shape = each(torch.sign, scaled)
            length = 1.0 if dot(scaled, scaled) > 0 else math.inf
        else:
            q = self.p / (self.p - 1)
            shape = each(lambda x: x.sign() * x.abs() ** (q - 1), scaled)
            total = sum((x.abs() ** q).sum().item() for x in scaled if x is not None)
            length = total ** (1 / self.p)
        return [
            None if x is None else self.row[i]["rho"] / length * t[i] * x
            for i, x in enumerate(shape)
        ]


class Averaging(Member):
    """A climb along something made of the gradient and a running average, one for each parameter.

    Only finite gradients are taken in: one that is not leaves all averages as they were.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.average = [None] * len(self.weights)

    def option(self, i, name):
        """A group's own, or the member's."""
        return self.row[i].get(name, getattr(self, name))

    def direction(self, g):
        if not all(x is None or x.isfinite().all() for x in g):
            return g
        d = list(g)
        for i, x in enumerate(g):
            if x is not None:
                m = self.average[i]
                d[i], self.average[i] = (x, x) if m is None else self.follow(i, x, m)
        return d


class Friendly(Averaging):
    """Li et al. 2024; the old average, as in their code (the paper has the new one)."""

    sigma, lam = 1.0, 0.95

    def follow(self, i, g, m):
        sigma, lam = self.option(i, "sigma"), self.option(i, "lam")
        return g - sigma * m, lam * m + (1 - lam) * g


class VaSSO(Averaging):
    """Li & Giannakis 2023."""

    theta = 0.9

    def follow(self, i, g, m):
        theta = self.option(i, "theta")
        m = (1 - theta) * m + theta * g
        return m, m


class USAM(Member):
    """Not normalised: epsilon = rho * g."""

    def epsilon(self, d):
        if not math.isfinite(norm(d)):
            return [None if x is None else torch.zeros_like(x) for x in d]
        t = self.transform()
        return [None if x is None else self.row[i]["rho"] * t[i] ** 2 * x for i, x in enumerate(d)]


class GSAM(Member):
    """Zhuang et al. 2022: g loses its part along ĝ, and alpha of the rest is taken from ĝ.

    A gradient that is missing at w is zero there.
    """

    alpha = 0.3

    def blend(self, g, g2):
        square = dot(g2, g2)
        c = dot(g, g2) / square if square > 0 else 0.0
        return [
            None if x is None else x - self.alpha * ((0 if y is None else y) - c * x)
            for x, y in zip(g2, g, strict=True)
        ]


class LookSAM(Member):
    """Liu et al. 2022: between SAM steps the part of ĝ across g is used again.

    It is that of the last SAM step that was not skipped, with the parameters that had a ĝ then.
    """

    k, alpha = 10, 0.7

    def __init__(self, *args, climbs=None, **options):
        super().__init__(*args, climbs=climbs or (lambda i: i % self.k == 0), **options)
        self.across = None

    def blend(self, g, g2):
        # Of those that are missing at w + epsilon nothing is known: g is looked at where ĝ is.
        both = [None if x is None else y for x, y in zip(g2, g, strict=True)]
        square = dot(both, both)
        c = dot(both, g2) / square if square > 0 else 0.0
        self.found = [
            None if x is None else x - c * (0 if y is None else y)
            for x, y in zip(g2, g, strict=True)
        ]
        return g2

    def after(self):
        self.across = self.found if math.isfinite(norm(self.found)) else None

    def plain(self, g):
        length = norm(self.across) if self.across is not None else 0.0
        if length == 0:
            return g
        factor = self.alpha * norm(g) / length
        return [
            x if x is None or y is None else x + factor * y
            for x, y in zip(g, self.across, strict=True)
        ]


class CoupledWSAM(Member):
    """Yue et al. 2023: a ĝ + (1 - a) g, a = gamma / (1 - gamma), each clipped before.

    A gradient that is missing at w is zero there. Of those that are missing at w + epsilon the
    norm of g knows nothing.
    """

    gamma, max_norm = 0.88, math.inf

    @property
    def a(self):
        return self.gamma / (1 - self.gamma)

    def both(self, g, g2):
        """g and ĝ of the parameters that have a ĝ, clipped."""
        g = [None if x is None else 0 * x if y is None else y for x, y in zip(g2, g, strict=True)]
        factors = [min(1.0, self.max_norm / (norm(x) + 1e-6)) for x in (g, g2)]
        return [each(lambda x, c=c: c * x, h) for c, h in zip(factors, (g, g2), strict=True)]

    def blend(self, g, g2):
        return each(lambda y, x: self.a * x + (1 - self.a) * y, *self.both(g, g2))


class DecoupledWSAM(CoupledWSAM):
    """The base optimizer sees g; then w -= lr * a * (ĝ - g)."""

    def blend(self, g, g2):
        first, second = self.both(g, g2)
        self.sharpness = each(torch.sub, second, first)
        return first

    def after(self):
        with torch.no_grad():
            for i, (w, x) in enumerate(zip(self.weights, self.sharpness, strict=True)):
                if x is not None:
                    sign = -1 if self.row[i].get("maximize") else 1
                    w -= sign * self.row[i]["lr"] * self.a * x


class MSAM(Member):
    """Becker et al. 2024, one pass: the weights live at w - rho * v / ||v||, v the momentum.

    ``self.weights`` are those at which the gradient is taken. A step returns to w by the rho of
    the way out, updates there with that gradient, and goes out along the new momentum. SGD decays
    the weights away from w, as the authors' code does; AdamW decays w, as torch has it.
    """

    state = "momentum_buffer"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.out = [torch.zeros_like(w) for w in self.weights]

    def step(self, surface, skip=False):
        i = self.number
        self.number += 1
        g = surface.gradient(self.weights, i, 0)
        if skip:
            return
        with torch.no_grad():
            for j, (w, out) in enumerate(zip(self.weights, self.out, strict=True)):
                decay = self.row[j].get("weight_decay", 0.0)
                if self.state == "momentum_buffer" and g[j] is not None:
                    g[j] = g[j] + decay * w  # at the weights that the gradient belongs to
                w -= out
        decays = [group["weight_decay"] for group in self.base.param_groups]
        if self.state == "momentum_buffer":
            for group in self.base.param_groups:
                group["weight_decay"] = 0.0
        self.descend(g)
        for group, decay in zip(self.base.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        v = [
            self.base.state[w].get(self.state) if x is not None else None
            for w, x in zip(self.weights, g, strict=True)
        ]
        length = norm(v)
        with torch.no_grad():
            for j, w in enumerate(self.weights):
                self.out[j] = torch.zeros_like(w)
                if v[j] is not None and 0 < length < math.inf:
                    self.out[j] = -self.row[j]["rho"] / length * v[j]
                w += self.out[j]
