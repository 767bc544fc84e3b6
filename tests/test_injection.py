"""An exception may come at every line of the package: Ctrl-C, memory that is not there, a signal.

Whatever was going on, w can be had afterwards, bit for bit, and the next step is the textbook's.
"""

import contextlib
import signal
import sys
from pathlib import Path

import pytest
import torch
from oracle import Textbook, assert_same_bits, inject, params_of

import fused_sam
from fused_sam import FusedSAM

PACKAGE = str(Path(fused_sam.__file__).parent)
OPTIONS = {"rho": 0.5, "lr": 0.1}
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "unfused": (torch.optim.Adagrad, {}),
}
DTYPES = {"one bucket": (torch.float32,), "two buckets": (torch.float32, torch.float64)}


class Interrupt(BaseException):
    """As KeyboardInterrupt, which no handler for errors may catch."""


@contextlib.contextmanager
def interrupted(line):
    """Raise at one line event of the package, by its number; tells of it in what it returns."""
    events = []

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            events.append(frame.f_lineno)
            if len(events) == line:
                sys.settrace(before)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield events
    except Interrupt:
        assert len(events) == line
    finally:
        sys.settrace(before)


class Case:
    """A model of a few parameters, an optimizer that has made a step, and gradients."""

    def __init__(self, backend, dtypes, base):
        self.generator = torch.Generator().manual_seed(1)
        self.backend, self.dtypes, self.base = backend, DTYPES[dtypes], BASES[base]
        self.params = [
            torch.nn.Parameter(self.random(shape, dtype))
            for dtype in self.dtypes
            for shape in ((3, 2), (5,))
        ]
        self.opt = self.make()

    def random(self, shape, dtype):
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(dtype)

    def make(self):
        base, options = self.base
        groups = [{"params": self.params[::2]}, {"params": self.params[1::2], "lr": 0.02}]
        return FusedSAM(groups, base, backend=self.backend, **OPTIONS, **options)

    def grads(self):
        return {p: self.random(p.shape, p.dtype) for p in params_of(self.opt)}

    def step(self):
        for half in self.opt.first_step, self.opt.second_step:
            inject(self.grads())
            half()


# What each does before it may be interrupted, and what is interrupted then.


def construct(case):
    return case.make


def first_step(case):
    inject(case.grads())
    return case.opt.first_step


def second_step(case):
    inject(case.grads())
    case.opt.first_step()
    inject(case.grads())
    return case.opt.second_step


def first_step_of_all(case):
    """There is no state before it."""
    case.opt = case.make()
    return second_step(case)


def step_with_a_closure(case):
    first, second = case.grads(), case.grads()
    case.calls = []

    def closure():
        case.calls.append(1)
        inject(first if len(case.calls) == 1 else second)

    case.opt.zero_grad()
    return lambda: case.opt.step(closure)


def restore(case):
    inject(case.grads())
    case.opt.first_step()
    return case.opt.restore


def add_param_group(case):
    case.params.append(torch.nn.Parameter(self_made(case)))

    def run():
        case.opt.add_param_group({"params": case.params[-1:], "rho": 0.1})
        inject(case.grads())
        case.opt.first_step()

    return run


def self_made(case):
    return case.random((4,), case.dtypes[0])


def load_state_dict(case):
    state = case.opt.state_dict()
    case.opt = case.make()
    inject(case.grads())
    case.step()

    def run():
        case.opt.load_state_dict(state)
        inject(case.grads())
        case.opt.first_step()

    return run


def rebuild(case):
    """Between the two steps, which is where something can be lost."""
    inject(case.grads())
    case.opt.first_step()
    for p in case.params[:2]:
        p.data = p.data.clone()
    inject(case.grads())
    return case.opt.second_step


ACTS = [
    construct,
    first_step,
    second_step,
    first_step_of_all,
    step_with_a_closure,
    restore,
    add_param_group,
    load_state_dict,
    rebuild,
]
STEPPING = {"second_step", "first_step_of_all", "step_with_a_closure", "rebuild"}


def prepare(act, *arguments):
    case = Case(*arguments)
    case.step()
    before = [p.detach().clone() for p in case.params]
    return case, before, act(case)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_nothing_is_lost_at_any_line(act, dtypes, base, backend):
    case, _, run = prepare(act, backend, dtypes, base)
    with interrupted(0) as events:
        run()
    case.opt.restore()
    stepped = [p.detach().clone() for p in case.params]
    for line in range(1, len(events) + 1):
        case, before, run = prepare(act, backend, dtypes, base)
        before += [p.detach().clone() for p in case.params[len(before) :]]
        with interrupted(line) as seen:
            run()
        where = f"interrupted at line {seen[-1]}"
        at_w = not case.opt.is_perturbed
        if act is first_step and at_w:
            assert_all(case, before, before, where)
        case.opt.restore()
        assert not case.opt.is_perturbed
        assert_all(case, before, stepped if act.__name__ in STEPPING else before, where)
        if act is step_with_a_closure:
            again(case, where)
        check_next_step(case, where)


def assert_all(case, before, after, where):
    """Each bucket's weights are those of before, or all of them those that a step makes."""
    for dtype in case.dtypes:
        mine = [i for i, p in enumerate(case.params) if p.dtype == dtype]
        kept = all(same(case.params[i], before[i]) for i in mine)
        stepped = all(same(case.params[i], after[i]) for i in mine)
        assert kept or stepped, f"{where}: {dtype} is neither at w nor where the step leads"


def same(a, b):
    return a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


def again(case, where):
    """The next closure runs at w first, as if the interrupted one had left no gradients."""
    case.calls.clear()
    grads = case.grads()

    def closure():
        case.calls.append(1)
        inject(grads)

    if all(p.grad is None for p in case.params):
        case.opt.step(closure)
        assert len(case.calls) == 2, where


def check_next_step(case, where):
    try:
        textbook = Textbook(case.opt)
        textbook.step(case.grads(), case.grads())
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error
