"""Every block of code in docs/frameworks runs, in the order of its page."""

import re
from pathlib import Path

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastDataLoader
from textbook import Net, batches
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

PAGES = sorted((Path(__file__).parents[2] / "docs" / "frameworks").glob("*.md"))


class TakesLabels(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(torch.float32)

    def forward(self, x, labels):
        return {"loss": cross_entropy(self.net(x), labels)}


def names(page):
    """What a page supposes to be there already."""
    data = batches(4, dtype=torch.float32)
    rows = [(x[i], y[i]) for x, y in data for i in range(len(y))]

    def make_model():
        return Net(torch.float32)

    return {
        "torch": torch,
        "make_model": make_model,
        "model": TakesLabels() if page == "transformers" else make_model(),
        "loss_fn": nn.CrossEntropyLoss(),
        "loader": torch.utils.data.DataLoader(data, batch_size=None),
        "dataset": [{"x": x, "labels": y} for x, y in rows],
        "args": TrainingArguments("out", use_cpu=True, report_to=[], save_strategy="no"),
        "dls": DataLoaders(*[FastDataLoader(rows, bs=5, device="cpu") for _ in range(2)]),
        "device": "cpu",
        "accum_steps": 2,
        "X": torch.cat([x for x, _ in data]),
        "y": torch.cat([y for _, y in data]),
    }


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page):
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    assert re.search(r"Tested with .* \d+\.\d+", text)
    assert "## What happens inside" in text and "## What is refused" in text
    scope = {"__name__": page.stem, **names(page.stem)}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)


def test_there_is_a_page_for_each_adapter():
    package = Path(__file__).parents[2] / "fused_sam" / "integrations"
    adapters = {path.stem for path in package.glob("*.py")} - {"__init__", "passes"}
    assert {page.stem for page in PAGES} == adapters
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name in adapters:
        assert f"docs/frameworks/{name}.md" in readme
