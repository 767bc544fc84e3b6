"""The lines of code in docs/which_sam.md run, and what they make trains."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_sam import FusedSAM

PAGE = Path(__file__).parents[1] / "docs" / "which_sam.md"
BLOCKS = [
    (section.split("\n", 1)[0], code)
    for section in PAGE.read_text().split("\n## ")
    for code in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
]
IMPORTS, *LINES = BLOCKS


def test_every_situation_ends_with_a_line():
    situations = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(situations) >= 7
    assert [s for s in situations if s not in dict(LINES)] == []
    assert "fused_sam.ascents" in IMPORTS[1]


@pytest.mark.parametrize("title, code", LINES, ids=lambda text: text[:60])
def test_the_line_makes_an_optimizer_that_trains(title, code):
    assert code.count("\n") == 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    if "bfloat16" in title:
        model = nn.Linear(4, 3).bfloat16()
    scope = {"model": model, "steps": 16}
    exec(IMPORTS[1], scope)
    optimizer = eval(code, scope)
    assert isinstance(optimizer, FusedSAM)
    x = torch.randn(16, 4, dtype=next(model.parameters()).dtype)
    y = torch.arange(16) % 3

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        assert torch.isfinite(optimizer.step(closure))
    optimizer.eval()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.isfinite(p).all()
        if p.dtype == torch.bfloat16:  # a step is smaller than the weights' grid
            assert optimizer.state[p]["exp_avg"].count_nonzero()
        elif name != "0.bias":  # before BatchNorm it has no gradient
            assert not torch.equal(old, p)
