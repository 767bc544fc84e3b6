"""An exception may come at every line of the package: Ctrl-C, memory that is not there, a signal.

Whatever was going on, w can be had afterwards, bit for bit, and the next step is the textbook's.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from oracle import Textbook, inject, params_of

import fused_sam
from fused_sam import FusedSAM
from fused_sam.ascents import MSAM

PACKAGE = str(Path(fused_sam.__file__).parent)
OPTIONS = {"rho": 0.5, "lr": 0.1}
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "one pass": (torch.optim.SGD, {"ascent": MSAM(), "momentum": 0.9, "weight_decay": 0.1}),
    "unfused": (type("Unfused", (torch.optim.SGD,), {}), {"momentum": 0.9}),
}
DTYPES = {"one bucket": (torch.float32,), "two buckets": (torch.float32, torch.float64)}


class Interrupt(BaseException):
    """As KeyboardInterrupt, which no handler for errors may catch."""


LOOKING = {"checks.py", "options.py", "capture.py", "tables.py", "slot.py", "devices.py"}
"""Files whose functions change nothing but their own tables."""


@contextlib.contextmanager
def interrupted(at):
    """Raise at one line event of the package, by its number; returns the events: (file, line)."""
    events = []

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            events.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if len(events) == at:
                sys.settrace(before)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield events
    except Interrupt:
        assert len(events) == at
    finally:
        sys.settrace(before)
        # Traced, a with statement can be left without its exit, where no signal would come.
        torch.set_grad_enabled(True)


def worth_it(events):
    """The first and the last time at which each line comes: in between it is a loop's.

    Once is enough for what looks at something and changes nothing.
    """
    first = {event: i for i, event in reversed(list(enumerate(events, 1)))}
    last = {event: i for i, event in enumerate(events, 1) if event[0] not in LOOKING}
    return sorted({*first.values(), *last.values()})


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

    def weights(self):
        return [p.detach().clone() for p in self.params]

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


def one_pass(case):
    """The weights are ahead of w before it and after it."""
    case.opt.eval()
    case.before = case.weights()
    case.opt.train()
    inject(case.grads())
    return case.opt.step


def restore(case):
    inject(case.grads())
    case.opt.first_step()
    return case.opt.restore


def add_param_group(case):
    case.params.append(torch.nn.Parameter(case.random((4,), case.dtypes[0])))
    case.before = case.weights()

    def run():
        case.opt.add_param_group({"params": case.params[-1:], "rho": 0.1})
        inject(case.grads())
        case.opt.first_step()

    return run


def load_state_dict(case):
    state = case.opt.state_dict()
    case.opt = case.make()
    case.step()
    case.before = case.weights()

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
LAYING_OUT = {construct, add_param_group, load_state_dict, rebuild}
STEPPING = {second_step, first_step_of_all, step_with_a_closure, rebuild, one_pass}


def prepare(act, *arguments):
    case = Case(*arguments)
    case.step()
    case.before = case.weights()
    return case, act(case)


def cases():
    for act in ACTS:
        yield act, "two buckets", "sgd"
    for act in first_step, second_step, step_with_a_closure, restore:
        yield act, "one bucket", "sgd"
    yield one_pass, "two buckets", "one pass"
    for base in "adam", "unfused":
        for act in second_step, first_step_of_all:
            yield act, "two buckets", base


def name(value):
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("act", "dtypes", "base"), [*cases()], ids=name)
def test_nothing_is_lost_at_any_line(act, dtypes, base, backend):
    if (act in LAYING_OUT or base == "adam") and backend != "reference":
        pytest.skip("it is the same for all backends, or less")
    case, run = prepare(act, backend, dtypes, base)
    with interrupted(0) as events:
        run()
    case.opt.restore()
    stepped, known = case.weights(), {}
    for event in worth_it(events):
        case, run = prepare(act, backend, dtypes, base)
        with interrupted(event) as seen:
            run()
        where = f"interrupted at {seen[-1]}"
        if act is first_step and not case.opt.is_perturbed:
            assert_all(case, case.before, where)
        case.opt.restore()
        assert not case.opt.is_perturbed
        assert_all(case, stepped if act in STEPPING else case.before, where)
        if act is step_with_a_closure:
            again(case, where)
        check_next_step(case, known, where)


def assert_all(case, after, where):
    """Each bucket's weights are those of before, or all of them those that a step makes."""
    before = case.before
    for dtype in case.dtypes:
        mine = [i for i, p in enumerate(case.params) if p.dtype == dtype]
        kept = all(same(case.params[i], before[i]) for i in mine)
        stepped = all(same(case.params[i], after[i]) for i in mine)
        assert kept or stepped, f"{where}: {dtype} is neither at w nor where the step leads"


def bits(tensor):
    return tensor.detach().numpy().tobytes()


def same(a, b):
    return bits(a) == bits(b)


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


def check_next_step(case, known, where):
    """From weights and state that were seen before the same bits follow: the textbook is slow."""
    case.opt.train()
    params = params_of(case.opt)
    state = [(k, bits(v)) for p in params for k, v in case.opt.state.get(p, {}).items()]
    start = (*map(bits, params), *state)
    case.generator.manual_seed(2)
    try:
        if start not in known and case.base not in (BASES["unfused"], BASES["one pass"]):
            Textbook(case.opt).step(case.grads(), case.grads())
            known[start] = [*map(bits, params)]
            return
        case.step()
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error
    assert known.setdefault(start, [*map(bits, params)]) == [*map(bits, params)], where
