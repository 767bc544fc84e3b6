"""Random sequences of everything that users do to an optimizer, checked against the textbook.

The textbook has weights and state of its own, which it never reads back: whatever the layout does
between steps must stay invisible, and only the rules here that write to a parameter themselves tell
it so.
"""

import copy
import io

import pytest
import torch
from ahead import Ahead, Model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from oracle import Textbook, assert_same_bits, exact, groups_of, inject, params_of

from fused_sam import FusedSAM
from fused_sam.ascents import MSAM, USAM, FriendlySAM, PNorm, VaSSO
from fused_sam.blends import GSAM, WSAM, CoupledWSAM, LookSAM
from fused_sam.schedule import Always, Every, Probability

SETTINGS = settings(
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.2}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True, "eps": 1e-2}),
}
MEMBERS = {
    "sam": {},
    "asam": {"adaptive": True},
    "p-norm": {"ascent": PNorm(3)},
    "usam": {"ascent": USAM(), "adaptive": True},
    "friendly": {"ascent": FriendlySAM(0.5, 0.6)},
    "vasso": {"ascent": VaSSO(0.3), "adaptive": True},
    "gsam": {"blend": GSAM(0.3)},
    "wsam": {"blend": WSAM(0.6, max_norm=0.5)},
    "coupled-wsam": {"blend": CoupledWSAM(0.6), "ascent": VaSSO(0.3)},
    "looksam": {"blend": LookSAM(2, 0.6)},
    "msam": {"ascent": MSAM()},
    "msam-attached": {"ascent": MSAM()},
}
WHENS = [Always(), Every(2), Probability(0.7, seed=3)]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# Dtypes of weights and gradients, and whether there are masters.
KINDS = [
    *[(dtype, dtype, False) for dtype in (F32, F64, BF16)],
    *[(F32, BF16, False), (BF16, BF16, True), (BF16, F32, True)],
]
SHAPES = [(), (1,), (0,), (5, 3), (64,), (65,), (2, 3, 2, 2)]
perturbed = precondition(lambda self: self.opt.is_perturbed)
between = precondition(lambda self: self.textbook.between)
before = precondition(lambda self: not self.textbook.between)
at_w = precondition(lambda self: not self.textbook.between and not self.opt.is_perturbed)
one_pass = precondition(lambda self: isinstance(self.textbook, Ahead))
# One pass keeps in mind which parameters had no gradient.
none_missed = precondition(lambda self: not self.opt._facts.missed)
# A direction of LookSAM, or of one pass, stays with what is frozen until it is laid out anew.
stays_itself = precondition(lambda self: self.member not in ("looksam", "msam", "msam-attached"))
SEEDS = st.integers(0, 2**16)


class Training(RuleBasedStateMachine):
    backend = "reference"

    @initialize(
        base=st.sampled_from(sorted(BASES)),
        member=st.sampled_from(sorted(MEMBERS)),
        kind=st.sampled_from(KINDS),
        when=st.sampled_from(WHENS),
        seed=SEEDS,
    )
    def start(self, base, member, kind, when, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.grad_dtype, masters = kind
        self.plain = self.dtype == self.grad_dtype and not masters
        self.averages = member in ("friendly", "vasso", "coupled-wsam")
        self.member, one_pass = member, member.startswith("msam")
        if one_pass and base == "rmsprop":
            base = "adam"  # the other has no momentum to go along
        if one_pass or member == "looksam":
            when = Always()  # LookSAM has a schedule of its own
        self.base, options = BASES[base]
        self.options = dict(rho=0.3, backend=self.backend, lr=0.05, when=when)
        self.options |= dict(master_weights=masters, **options, **MEMBERS[member])
        groups = [{"params": self.make_params(2)}, {"params": self.make_params(2), "lr": 0.02}]
        self.opt = FusedSAM(groups, self.base, **self.options)
        if one_pass:
            self.textbook = Ahead(self.opt)
            if member == "msam-attached":
                self.attach()
        else:
            when = self.opt.when
            climbs = (lambda i: True) if when == Always() else when.climbs
            self.textbook = Textbook(self.opt, climbs)

    # ---- helpers

    def random(self, shape):
        values = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return values.to(self.dtype)

    def pick(self, n):
        return int(torch.randint(n, (), generator=self.generator))

    def make_params(self, n):
        return [self.make_param(SHAPES[self.pick(len(SHAPES))]) for _ in range(n)]

    def make_param(self, shape):
        param = torch.nn.Parameter(self.random(shape))
        if not self.plain:
            param.grad_dtype = self.grad_dtype
        return param

    def grads(self):
        """For trainable parameters, most of the time; sometimes transposed."""
        grads = {}
        for p in params_of(self.opt):
            if p.requires_grad and self.pick(5):
                grads[p] = self.random(p.shape).to(p.grad_dtype)
                if p.dim() == 2 and not self.pick(3):
                    grads[p] = grads[p].t().contiguous().t()
        return grads

    def attach(self):
        self.textbook.model = Model(params_of(self.opt))
        self.opt.attach(self.textbook.model)

    # ---- the steps

    @before
    @rule()
    def first_step(self):
        self.textbook.first_step(self.grads())

    @rule()
    def second_step(self):
        self.textbook.second_step(self.grads())

    @between
    @rule()
    def step(self):
        self.textbook.second_step(self.grads(), self.opt.step)

    @rule()
    def skip(self):
        """As a GradScaler does where a gradient is not finite."""

        def run():
            self.opt.grad_scale, self.opt.found_inf = torch.ones(()), torch.ones(())
            self.opt.second_step()
            del self.opt.grad_scale, self.opt.found_inf

        self.textbook.second_step(self.grads(), run, found_inf=True)

    @before
    @rule(n=st.integers(1, 3))
    def whole_steps(self, n):
        for _ in range(n):
            self.first_step()
            self.second_step()

    @rule()
    def restore(self):
        self.textbook.restore()

    @before
    @rule()
    @precondition(lambda self: not self.averages)
    @precondition(lambda self: any(p.requires_grad for p in params_of(self.opt)))
    def step_with_closure(self):
        """Zero gradients: no perturbation, and no more than momentum and decay."""
        climbs = self.textbook.climbs(self.textbook.number)
        params = [p for p in params_of(self.opt) if p.requires_grad]
        zeros = {p: torch.zeros_like(p, dtype=p.grad_dtype) for p in params}
        calls = []

        def closure():
            calls.append(1)
            inject(zeros)
            return len(calls)

        def run():
            self.opt.zero_grad()
            assert self.opt.step(closure) == 1
            assert len(calls) == 1 + climbs

        if climbs:
            self.textbook.first = zeros
        self.textbook.second_step(zeros, run)
        self.textbook.number += 1

    # ---- one pass: the weights are ahead of w

    @before
    @one_pass
    @rule(times=st.integers(1, 2))
    def eval(self, times):
        for _ in range(times):
            self.textbook.eval()

    @before
    @one_pass
    @rule(times=st.integers(1, 2))
    def train(self, times):
        for _ in range(times):
            self.textbook.train()

    @perturbed
    @rule()
    def save_away_from_w(self):
        """Refused; with an attached model one pass goes to w, if its step is not half done."""
        if getattr(self.textbook, "model", None) is not None and not self.textbook.between:
            self.opt.state_dict()
            self.textbook.arrive()
        else:
            with pytest.raises(RuntimeError, match=r"call second_step\(\).*optimizer\.eval\(\)"):
                self.opt.state_dict()
        self.textbook.check()

    # ---- what happens in between

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.opt.zero_grad(set_to_none=set_to_none)
        for p in params_of(self.opt):
            assert p.grad is None or (not set_to_none and not p.grad.any())

    @rule(key=st.sampled_from(["lr", "rho", "eta"]), value=st.sampled_from([0.0, 0.01, 0.2]))
    def set_option(self, key, value):
        self.opt.param_groups[self.pick(len(self.opt.param_groups))][key] = value

    @rule(n=st.integers(1, 2), option=st.sampled_from([{}, {"rho": 0.1}, {"ascent": None}]))
    @precondition(lambda self: len(params_of(self.opt)) < 12)
    def add_group(self, n, option):
        self.opt.add_param_group({"params": self.make_params(n), **option})
        self.textbook.check()

    @none_missed
    @rule()
    def move_between_groups(self):
        groups = self.opt.param_groups
        source, target = groups[self.pick(len(groups))], groups[self.pick(len(groups))]
        if len(source["params"]) > 1 and source["ascent"] == target["ascent"]:
            target["params"].append(source["params"].pop())

    @stays_itself
    @rule()
    def freeze_or_thaw(self):
        p = self.some_param()
        p.requires_grad_(not p.requires_grad)
        p.grad = None

    def some_param(self):
        params = params_of(self.opt)
        return params[self.pick(len(params))]

    @at_w
    @rule(strided=st.booleans())
    def replace_data(self, strided):
        p = self.some_param()
        value = self.random(p.shape)
        p.data = value.t().contiguous().t() if strided and p.dim() == 2 else value
        self.textbook.weights[p] = value.clone()

    @perturbed
    @rule()
    def move_data_while_perturbed(self):
        p = self.some_param()
        p.data = p.data.clone()

    @rule()
    def write_in_place(self):
        """As weight clipping does; while perturbed it is undone by the return to w."""
        p = self.some_param()
        with torch.no_grad():
            p.clamp_(-1, 1)
        if p not in self.textbook.climbed:
            self.textbook.weights[p].clamp_(-1, 1)
        elif isinstance(self.textbook, Ahead):
            with pytest.raises(RuntimeError, match=r"written to.*optimizer\.eval\(\)"):
                self.opt.second_step()
        if isinstance(self.textbook, Ahead):
            self.textbook.restore()

    # ---- what nobody should do

    @none_missed
    @rule()
    def list_again(self):
        """In its group or in another, by hand: it is one parameter, where it stands first."""
        groups = self.opt.param_groups
        group, p = groups[self.pick(len(groups))], self.some_param()
        if all(g["ascent"] == group["ascent"] for g in groups if any(p is q for q in g["params"])):
            group["params"].append(p)

    @none_missed
    @rule()
    @precondition(lambda self: len(params_of(self.opt)) > 3)
    def lose(self):
        p = self.some_param()
        for group in self.opt.param_groups:
            group["params"][:] = [q for q in group["params"] if q is not p]
        p.grad = None
        self.opt.state.pop(p, None)  # or torch's state_dict() ends in a KeyError
        self.textbook.restore()
        assert_same_bits(p, self.textbook.weights[p])

    @rule()
    def swap(self):
        p = self.some_param()
        p.grad = None
        other = torch.nn.Parameter(self.random(p.shape).to(p.dtype), p.requires_grad)
        if not self.plain:
            other.grad_dtype = p.grad_dtype  # a copy has lost what it was
        torch.utils.swap_tensors(p, other)
        if p not in self.textbook.climbed:
            self.textbook.reread(p)
        if isinstance(self.textbook, Ahead):
            self.textbook.restore()

    @rule(change=st.sampled_from(["shape", "integers", "storage"]))
    def misfit(self, change):
        """It cannot hold its w: all others return, and it is named; then it is put right."""
        p = self.some_param()
        was = p.requires_grad
        p.grad = None
        if change == "shape":
            p.data = torch.ones(7, 3).to(p.dtype)
        elif change == "integers":
            p.requires_grad_(False)
            p.data = p.data.to(torch.int32)
        elif p.numel():
            p.data = p.data.clone()
            p.untyped_storage().resize_(0)
        climbed = p in self.textbook.climbed
        try:
            self.opt.restore()
        except RuntimeError as error:
            assert climbed and "back at w, except" in str(error)
        else:
            assert not climbed or (change == "storage" and not p.numel())
        assert not self.opt.is_perturbed
        p.data = self.textbook.weights[p].clone()
        p.requires_grad_(was)
        self.textbook.arrive()
        self.textbook.check()

    @before
    @rule()
    def gradient_of_another_shape(self):
        p = self.some_param()
        grads = self.grads()
        if grads.get(p) is None:
            return
        inject({q: grads.get(q) for q in params_of(self.opt)})
        p.grad.data = torch.ones(7, 3, dtype=p.grad.dtype)
        with pytest.raises(RuntimeError, match=r"gradient of shape \(7, 3\)"):
            self.opt.first_step()
        self.opt.zero_grad()
        self.textbook.check()

    @at_w
    @rule()
    def replace_state(self):
        p = self.some_param()
        for name, value in self.textbook.state[p].items():
            if name != "step":
                self.opt.state[p][name] = value * 0.5
                self.textbook.state[p][name] = value * 0.5

    @rule()
    def state_that_does_not_fit(self):
        p = self.some_param()
        state = self.opt.state.get(p, {})
        names = [name for name, value in state.items() if name != "step" and value is not None]
        if not names or not p.requires_grad:
            return
        one_pass = isinstance(self.textbook, Ahead)
        if one_pass and not self.textbook.between:
            self.textbook.get_ready()
        good, state[names[0]] = state[names[0]], torch.ones(7, 3)
        with pytest.raises(ValueError, match=r"has shape \(7, 3\)"):
            self.opt.second_step()
        state[names[0]] = good
        if one_pass:
            self.textbook.restore()  # the failed step may have done so, or not
        self.textbook.check()

    @rule()
    def hold_the_memory(self):
        self.held = self.some_param().untyped_storage()

    @at_w
    @rule(dtype=st.sampled_from([F32, F64, BF16]))
    @precondition(lambda self: self.plain)
    def convert(self, dtype):
        self.dtype = dtype
        for p in params_of(self.opt):
            p.data = p.data.to(dtype)
            p.grad = None
            for name, value in self.opt.state.get(p, {}).items():
                if name != "step":
                    self.opt.state[p][name] = value.to(dtype)
        self.textbook.check()

    def through_a_file(self):
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        return torch.load(file)

    @at_w
    @rule(through_file=st.booleans())
    def round_trip_state(self, through_file):
        state = self.through_a_file() if through_file else self.opt.state_dict()
        self.opt.load_state_dict(state)

    @at_w
    @rule()
    @precondition(lambda self: all(p.requires_grad for p in params_of(self.opt)))
    def resume(self):
        """In another process, which has the weights: all else is in the file.

        Of what is frozen the state has torch's dtype, that of the parameter, until it trains.
        """
        groups = groups_of(self.opt)
        for group, own in zip(self.opt.param_groups, groups, strict=True):
            group["params"][:] = own["params"]
        state = self.through_a_file()
        climbs = [{} if group["ascent"] else {"ascent": None} for group in groups]
        params = [[self.like(p) for p in group["params"]] for group in groups]
        opt = FusedSAM(
            [{"params": ps, **own} for ps, own in zip(params, climbs, strict=True)],
            self.base,
            **self.options,
        )
        opt.load_state_dict(state)
        self.go_on(opt)

    def like(self, p):
        twin = torch.nn.Parameter(p.detach().clone(), p.requires_grad)
        if not self.plain:
            twin.grad_dtype = p.grad_dtype
        return twin

    @at_w
    @rule()
    def go_on_with_a_copy(self):
        frozen = [p.requires_grad for p in params_of(self.opt)]
        old = [p.detach().clone() for p in params_of(self.opt)]
        self.go_on(copy.deepcopy(self.opt))
        for p, w, flag in zip(params_of(self.opt), old, frozen, strict=True):
            assert_same_bits(p, w)
            assert p.requires_grad == flag

    def go_on(self, opt):
        self.opt = opt
        self.textbook.follow(opt)
        if getattr(self.textbook, "model", None) is not None:
            self.attach()

    # ---- what always holds

    @invariant()
    def one_truth(self):
        if not hasattr(self, "opt"):
            return
        base = self.opt.base_optimizer
        assert self.opt.param_groups is base.param_groups and self.opt.state is base.state

    @invariant()
    def weights_are_finite_and_state_fits(self):
        for p in params_of(self.opt) if hasattr(self, "opt") else ():
            assert exact(p).isfinite().all()
            for name, value in self.opt.state.get(p, {}).items():
                assert name == "step" or value.shape == p.shape


@pytest.mark.parametrize("examples", [45, pytest.param(400, marks=pytest.mark.long)])
def test_any_sequence(backend, examples):
    """Guards what no single test thinks of: see the module's docstring."""
    from hypothesis.stateful import run_state_machine_as_test

    machine = type(f"Training{examples}", (Training,), {"backend": backend})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=examples))
