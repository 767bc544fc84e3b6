"""The textbook of Momentum-SAM, whose weights live ahead of w: Becker et al. 2024.

Between two steps they are at w - rho * v / ||v||, v the momentum of what had a gradient in the last
step. A step returns to w, and there updates with the gradient and the weight decay of where the
weights were. A model that is attached goes ahead when it runs, and a step ends at w.
"""

import torch
from formulas import Expected, exact, real
from oracle import (
    OPERATIONS,
    Textbook,
    assert_close,
    assert_same_bits,
    blend,
    computed_in,
    groups_of,
    params_of,
)


class Model(torch.nn.Module):
    """Runs, and no more."""

    def __init__(self, params):
        super().__init__()
        self.params = torch.nn.ParameterList(params)

    def forward(self):
        pass


class Ahead(Textbook):
    """A textbook of one pass.

    Args:
        opt: its ascent is MSAM.
        model: the one that is attached, if one is.

    Attributes:
        away: {param: the bits of its weights} of ``climbed``.
        stepped: the parameters that had a gradient in the last step.
        training: whether the weights belong ahead of w.
    """

    def __init__(self, opt, model=None):
        self.model, self.training, self.away, self.stepped = model, True, {}, set()
        self.momentum = "momentum_buffer" if "momentum" in opt.param_groups[0] else "exp_avg"
        super().__init__(opt, lambda number: False)

    def check(self):
        """As it is there, and the weights are still where they went."""
        super().check()
        for p in self.climbed.intersection(params_of(self.opt)):
            assert_same_bits(p, self.away[p], "weights ahead of w, which no step has changed")

    def follow(self, opt):
        """Go on with a copy of the optimizer: it trains."""
        names = dict(zip(params_of(self.opt), params_of(opt), strict=True))
        self.stepped = {names[p] for p in self.stepped if p in names}
        self.training = True
        super().follow(opt)

    # ---- from w and back

    def eval(self):
        """``opt.eval()``, checked."""
        self.opt.eval()
        assert not self.opt.is_perturbed
        self.arrive()
        self.check()
        self.training = False

    def train(self):
        """``opt.train()``, checked: it goes ahead, or stays there."""
        self.opt.train()
        self.training = True
        self.leave()

    def get_ready(self):
        """What training does before a backward."""
        if (self.model is None or not self.training) and not self.climbed:
            self.train()
        if self.model is not None:
            self.model()
            self.leave()

    def leave(self):
        """The optimizer has gone ahead: along the momentum, if the weights were at w."""
        if self.climbed:
            self.check()
            return
        along = {
            p: Expected(-exact(v), real(exact(v)).abs())
            for group in groups_of(self.opt)
            for p in (group["params"] if group["ascent"] else ())
            if p in self.stepped and (v := self.state[p].get(self.momentum)) is not None
        }
        norm = self._check_climb(along)
        if along:
            assert_close(self.opt.grad_norm, norm, "grad_norm")
        self.climbed = set(along)
        self.away = {p: p.detach().clone() for p in along}

    # ---- a step

    def first_step(self, grads, scale=1.0):
        """As it is there: it does not climb."""
        self.get_ready()
        super().first_step(grads, scale)

    def second_step(self, grads, run=None, **options):
        """As it is there, and the way ahead along the new momentum."""
        if not self.between:
            self.get_ready()
        super().second_step(grads, run, **options)
        if self.goes_ahead():
            self.leave()

    def seen(self, groups, first, second, scale, plain):
        """The gradients, and the decay of the way from w: the rule decays w itself."""
        found = blend(groups, {}, second, scale)
        for group in groups:
            decay = 0 if group.get("decoupled_weight_decay") else scale * group["weight_decay"]
            for p in self.climbed.intersection(group["params"]) if decay else ():
                if p in found:
                    ahead, w = exact(self.away[p]), self.home(p)
                    value = found[p].value + decay * (ahead - w)
                    terms = found[p].magnitude + decay * (ahead.abs() + w.abs())
                    # It may be rounded to the gradient's dtype: by half a unit, in those of terms.
                    units = torch.finfo(second[p].dtype).eps / torch.finfo(computed_in(p)).eps
                    found[p] = Expected(value, terms + value.abs() * units / OPERATIONS)
        return found

    def goes_ahead(self):
        """Whether the weights leave w after a step: if there is a momentum to go along."""
        return self.model is None and any(self.momentum in e for e in self.opt.state.values())

    def w(self, p):
        """W, which the optimizer keeps while the weights are ahead of it."""
        for bucket in self.opt._facts.engine.buckets:
            for slot, away in zip(bucket.slots, bucket.perturbed, strict=True):
                if away and slot.param is p:
                    return slot.shaped(slot.of(bucket.saved)).to(p.dtype)
        return p.detach()
