"""Every pair of options makes an optimizer that steps, or an error that says why, and a remedy.

Members are taken from the package's own lists. One that is not named here fails.
"""

import itertools
import math
import re

import pytest
import torch
from oracle import assert_same_bits

from fused_sam import FusedSAM, Lion
from fused_sam.ascents import ASCENTS, MSAM, SAM, USAM, FriendlySAM, PNorm, VaSSO
from fused_sam.blends import BLENDS, GSAM, WSAM, CoupledWSAM, LookSAM
from fused_sam.schedule import AESAM, Always, Every, From, Probability, Span


class NoRate(torch.optim.Optimizer):
    """A base optimizer that is not fused and has no learning rate."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)


# What two of a kind cannot be together is one kind: the first is taken where none is named.
KINDS = {
    "ascent": [SAM(), PNorm(3), PNorm(math.inf), USAM(), MSAM(), FriendlySAM(), VaSSO()],
    "blend": [None, GSAM(0.3), WSAM(), CoupledWSAM(), LookSAM(3)],
    "when": [Always(), Every(2), From(1), Span(0, 1), Probability(0.5), AESAM(10)],
    "base": ["SGD with momentum", "SGD", "AdamW", "RMSprop", "Adagrad", "Lion", "Adamax", "NoRate"],
    "weights": ["float32", "float64", "bfloat16", "masters", "complex64"],
    "adaptive": [False, True],
    "max_grad_norm": [None, 0.5],
    "second group": ["climbs", "stays"],
}
BASES = {
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "Lion": (Lion, {"lr": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "NoRate": (NoRate, {}),
}
HAVE_MOMENTUM = ("SGD with momentum", "AdamW")
CASES = [
    {kind: values[0] for kind, values in KINDS.items()} | {a: x, b: y}
    for a, b in itertools.combinations(KINDS, 2)
    for x in KINDS[a][1:]
    for y in KINDS[b][1:]
]


def refusals(case):
    """What the error must say; several where several pairs in it have no meaning."""
    ascent, blend, base = case["ascent"], case["blend"], case["base"]
    if ascent == MSAM():
        if blend is not None:
            yield r"blend='.*' needs a gradient at w.*choose another ascent, or blend=None"
        if case["when"] != Always():
            yield r"MSAM\(\) has one pass in every step, so when=.*leave it out"
        if base not in HAVE_MOMENTUM:
            yield r"MSAM\(\) climbs along the momentum, .* none here; use SGD with momentum > 0"
        if case["adaptive"]:
            yield r"MSAM\(\) is not defined with adaptive=True; leave it out"
    if case["weights"] == "complex64" and (case["adaptive"] or isinstance(ascent, PNorm)):
        yield r"not defined for complex parameters; put them into a group of their own"
    if case["weights"] == "masters" and base in ("Adamax", "NoRate"):
        yield r"master_weights=True needs a base optimizer that is fused .*leave it out"
    if blend == LookSAM(3) and case["when"] != Always():
        yield r"blend='looksam' with k=3 climbs in every k-th step.*leave when out, or give"
    if blend == WSAM() and base == "NoRate":
        yield r"blend='wsam' steps by the group's learning rate.*; give it one, or choose another"


def arguments(case):
    dtype = {"masters": "bfloat16"}.get(case["weights"], case["weights"])
    params = [torch.nn.Parameter(torch.ones(n, dtype=getattr(torch, dtype))) for n in (3, 5)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    if case["second group"] == "stays":
        groups[1]["ascent"] = None
    names = ("ascent", "blend", "when", "adaptive", "max_grad_norm")
    options = {name: case[name] for name in names}
    if case["weights"] == "masters":
        options["master_weights"] = True
    return params, groups, options


def step(opt, params):
    for half in (opt.first_step, opt.second_step):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        half()


def test_every_member_is_named_here():
    assert {choice.key for choice in KINDS["ascent"]} == set(ASCENTS)
    assert {choice.key for choice in KINDS["blend"] if choice} == set(BLENDS)


@pytest.mark.parametrize("kinds", [*itertools.combinations(KINDS, 2)], ids=" and ".join)
def test_a_pair_steps_or_says_why_not(kinds):
    """Guards pairs that are neither refused nor right, and words that do not help."""
    others = [kind for kind in KINDS if kind not in kinds]
    cases = [c for c in CASES if all(c[kind] == KINDS[kind][0] for kind in others)]
    assert len(cases) == (len(KINDS[kinds[0]]) - 1) * (len(KINDS[kinds[1]]) - 1)
    for case in cases:
        params, groups, options = arguments(case)
        cls, base_options = BASES[case["base"]]
        words = list(refusals(case))
        before = [p.detach().clone() for p in params]
        if not words:
            opt = FusedSAM(groups, cls, backend="reference", **base_options, **options)
            for _ in range(2):
                step(opt, params)
            opt.eval()
            for p, w in zip(params, before, strict=True):
                assert p.isfinite().all() and not torch.equal(p, w), case
            continue
        addresses = [p.data_ptr() for p in params]
        made = cls([{"params": group["params"]} for group in groups], **base_options)
        for build in (
            lambda c=cls, g=groups, b=base_options, o=options: FusedSAM(g, c, **b, **o),
            lambda m=made, o=options: FusedSAM.wrap(m, **o),
        ):
            with pytest.raises((ValueError, TypeError)) as error:
                build()
            said = str(error.value)
            assert any(re.search(word, said, re.DOTALL) for word in words), (case, said)
        for p, w, address in zip(params, before, addresses, strict=True):
            assert p.data_ptr() == address
            assert_same_bits(p, w)


@pytest.mark.parametrize("kind", ["ascent", "blend"])
def test_groups_that_climb_cannot_have_different_members(kind):
    """Guards the one norm, and the one pair of coefficients, that there is for all of them."""
    for one, other in itertools.permutations(KINDS[kind], 2):
        params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5)]
        groups = [{"params": params[:1], kind: one}, {"params": params[1:], kind: other}]
        with pytest.raises(ValueError, match=r"groups climb with .* and .*give all the same"):
            FusedSAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9)
        groups[1]["ascent"] = None
        opt = FusedSAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9)
        step(opt, params)
        opt = FusedSAM(groups[:1], torch.optim.SGD, lr=0.1, momentum=0.9)
        with pytest.raises(ValueError, match=r"groups climb with .* and .*give all the same"):
            opt.add_param_group({"params": params[1:], "ascent": "sam", kind: other})
        assert len(opt.param_groups) == 1


def test_each_micro_batch_climbs_by_itself_or_the_error_says_why_not():
    whole = (MSAM, FriendlySAM, VaSSO, GSAM, WSAM, CoupledWSAM, LookSAM, AESAM)
    for kind in ("ascent", "blend", "when"):
        for value in KINDS[kind]:
            model = torch.nn.Linear(3, 1)
            options = {"lr": 0.1, "momentum": 0.9, "model": model, kind: value}
            opt = FusedSAM(model.parameters(), torch.optim.SGD, **options)

            def run(x, model=model):
                model(x).square().sum().backward()

            batches = [torch.ones(2, 3), torch.zeros(2, 3)]
            if isinstance(value, whole):
                with pytest.raises(ValueError, match=r"ascent='local'.*use .*ascent='global'"):
                    opt.accumulate(batches, run, ascent="local")
            else:
                opt.accumulate(batches, run, ascent="local")
