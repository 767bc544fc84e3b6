"""The study (examples/family): its runs are what the page says, and none is done twice."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples.family import __main__ as study
from examples.family import data, report, summary
from examples.family.methods import LOOK, METHODS, make_optimizer
from examples.family.plan import Cell, missing
from examples.family.rows import PATH, Rows
from examples.family.tasks import TASKS, TUNING_SEED, Task
from examples.family.training import train
from fused_sam.demo.data import load_digits
from fused_sam.demo.threads import one_thread
from fused_sam.demo.training import make_model

CPU = torch.device("cpu")
TINY = Task("tiny", 100, lambda: make_model(0), 2, (0.01, 0.03, 0.1), (0.0, 1e-3, 1e-2), 2, 2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def parts():
    return data.digits()


# -------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_method_has_as_many_trials_and_its_settings_meet_all_others(task):
    for method in METHODS:
        trials = list(task.trials(method))
        pairs = {(t["lr"], t["weight_decay"]) for t in trials}
        assert len(trials) == len(pairs) == len(task.lrs) * len(task.decays)
        names = ["lr", "weight_decay", *method.tuned]
        assert all(list(t) == names for t in trials)
        for one, other in itertools.combinations(names, 2):
            assert len({(t[one], t[other]) for t in trials}) == len(trials), (one, other)


def test_tuning_takes_the_best_of_both_rounds_and_nothing_before_all_are_there(tmp_path):
    rows, cell = Rows(tmp_path / "rows.jsonl"), Cell(TINY, 0.4, METHODS[0])

    def add(run, accuracy, loss=1.0):
        last = {"accuracy": accuracy, "loss": loss}
        rows.add({**run.facts(), "validation": {"last": last}})

    first = [0.5, 0.9, 0.1, 0.8, 0.1, 0.8, 0.1, 0.1, 0.1]
    runs = missing(cell, rows)
    for accuracy, index in zip(first, range(9), strict=True):
        # Of the two with 0.8, the second has the lower loss; one that is not finite is the worst.
        add(next(runs), accuracy, {3: None, 5: 2.0}.get(index, 1.0))
    assert cell.best(rows) is None
    finals = [next(runs)]
    add(finals[0], 0.5)
    assert cell.best(rows) is None
    finals.append(next(runs))
    add(finals[1], 0.9)
    trials = [run.setting for run in cell.trials()]
    assert [run.setting for run in finals] == [trials[1], trials[5]]
    assert [run.seed for run in finals] == [TUNING_SEED + 1] * 2
    assert cell.best(rows) == trials[5]  # 0.8 + 0.9 is more than 0.9 + 0.5
    reported = list(runs)
    assert [(run.seed, run.test, run.setting) for run in reported] == [
        (0, True, trials[5]),
        (1, True, trials[5]),
    ]
    assert not any(run.test for run in [*cell.trials(), *finals])


def test_rows_outlive_the_process_and_a_torn_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    run = Cell(TINY, 0.4, METHODS[1]).trials()[0]
    Rows(path).add({**run.facts(), "passes": 3})
    assert Rows(path)[run.facts()]["passes"] == 3
    other = dataclasses.replace(run, setting={**run.setting, "rho": 7.0})
    assert other.facts() not in Rows(path)
    path.write_text(path.read_text() + '{"task": "ti')
    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl is no row.*remove the line"):
        Rows(path)


def test_the_command_does_what_is_missing_and_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TASKS", (TINY,))
    monkeypatch.setattr("examples.family.plan.METHODS", METHODS[:1])
    monkeypatch.setattr("examples.family.tasks.BATCH_SIZE", 50)
    path = tmp_path / "rows.jsonl"
    command = ["--rows", str(path), "run", "--noise", "0.4"]
    study.main([*command, "--hours", "0"])
    assert not path.exists()
    study.main(command)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 9 + 2 + 2 == capsys.readouterr().out.count("\n")
    assert ["test" in row for row in rows] == [False] * 11 + [True] * 2
    for row in rows:
        assert row["versions"]["torch"] == torch.__version__
        assert {"commit", "cpu", "device", "cpu_seconds", "wall_seconds"} <= row.keys()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    study.main(command)
    again = json.loads(path.read_text().splitlines()[-1])
    assert {**again, "cpu_seconds": 0, "wall_seconds": 0} == {
        **rows[-1],
        "cpu_seconds": 0,
        "wall_seconds": 0,
    }


def test_cifar_asked_for_by_name_needs_its_files(capsys):
    with pytest.raises(SystemExit):
        study.main(["run", "--tasks", "cifar-1000"])
    assert "cifar-1000 needs the files of CIFAR-10: --cifar FOLDER" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_trains_with_its_passes_and_reports_at_w(method, parts):
    cell = Cell(TINY, 0.4, method)
    setting = cell.trials()[4].setting
    row = train(cell.runs(setting)[0], parts, CPU)
    steps = 2 * TINY.epochs * method.epochs
    two = {"SAM": 1.0, "ASAM": 1.0, "GSAM": 1.0, "late-phase SAM": 0.25}
    two["LookSAM"] = math.ceil(steps / LOOK) / steps
    assert row["passes"] == steps * (1 + two.get(method.name, 0.0))
    assert row["best_epoch"] in range(1, TINY.epochs * method.epochs + 1)
    for share in (
        row["test"]["last"],
        row["test"]["best"],
        row["train"],
        row["validation"]["last"],
    ):
        assert 0 <= share["accuracy"] <= 1 and share["loss"] > 0
    assert math.isfinite(row["sharpness"]) and math.isfinite(row["rise"])
    # Tuning sees no test image.
    blind = dataclasses.replace(parts, test=None)
    assert "test" not in train(cell.trials()[0], blind, CPU)


def test_optimizers_have_the_setting():
    model = make_model(0)
    for method in METHODS:
        setting = {"lr": 0.03, "weight_decay": 1e-3, **{k: v[0] for k, v in method.tuned.items()}}
        group = make_optimizer(method, setting, model, 100).param_groups[0]
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.03, 1e-3, 0.9)
        assert group.get("rho") == setting.get("rho")


# ------------------------------------------------------------------------------------------ data


def test_digits_have_the_demos_validation_images_and_none_twice(parts):
    demo = load_digits()
    assert [len(part.labels) for part in (parts.train, parts.validation, parts.test)] == [
        1000,
        300,
        497,
    ]
    assert torch.equal(parts.validation.images, demo.validation.images)
    assert torch.equal(parts.test.images, demo.test.images[103:])
    assert torch.equal(parts.train.images[:897], demo.train.images)
    assert torch.equal(parts.train.images[897:], demo.test.images[:103])


def _write_cifar(folder):
    """Batch i has the images (i, i, ..., i) whose first byte is the image's number modulo 256."""
    for i in range(1, 6):
        records = torch.full((10_000, 3073), 10 * i, dtype=torch.uint8)
        records[:, 0] = torch.arange(10_000) % 10
        records[:, 1] = torch.arange(10_000) % 256
        Path(folder, f"data_batch_{i}.bin").write_bytes(records.numpy().tobytes())


def test_cifar_is_read_from_its_binary_files(tmp_path):
    _write_cifar(tmp_path)
    parts = data.cifar10(tmp_path)
    assert parts.train.images.shape == (40_000, 3, 32, 32)
    assert [len(part.labels) for part in (parts.validation, parts.test)] == [2000, 8000]
    assert parts.test.labels[:3].tolist() == [0, 1, 2]
    for part in (parts.train, parts.validation):
        assert part.labels[:12].tolist() == [*range(10), 0, 1]
    # The mean over 4e7 float32 numbers is right to 2e-4 here, and they are 0.04 apart.
    images = parts.train.images.double()
    assert images.mean((0, 2, 3)).abs().max() < 5e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 5e-3
    # The first pixel of the red plane counts up, the rest of the batch is one colour.
    image = parts.validation.images[7]
    assert image[0, 0, 0] < image[0, 0, 1] and image[1:].std() < 1e-6 + image[0].std()


def test_cifar_files_that_are_not_there_or_cut_short_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data_batch_1.bin cannot be read .*--cifar takes"):
        data.cifar10(tmp_path)
    _write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 30729999 bytes"):
        data.cifar10(tmp_path)


# ---------------------------------------------------------------------------------------- report


def _reported(seed, accuracy):
    shares = {"accuracy": accuracy, "loss": 1.0}
    return {
        "seed": seed,
        "test": {"last": shares, "best": shares},
        "train": shares,
        "sharpness": 0.1,
        "rise": 0.2,
        "passes": 10,
        "cpu_seconds": 1.0,
    }


def test_differences_are_paired_and_their_interval_is_students():
    cell = Cell(TINY, 0.4, METHODS[1])
    theirs, gaps = [0.5, 0.7, 0.3], [0.01, 0.02, 0.06]
    sgd = [_reported(i, a) for i, a in enumerate(theirs)]
    sam = [_reported(i, a + gap) for i, (a, gap) in enumerate(zip(theirs, gaps, strict=True))]
    found = summary.Result(cell, {}, sam, sgd).difference(report.last)
    # mean 3, standard deviation sqrt(7), t(0.975, 2) = 4.30265
    assert found.mean == pytest.approx(3)
    assert found.high == pytest.approx(3 + 4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert found.low == pytest.approx(3 - 4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert found.sign == 0
    assert summary.Interval(3.0, 0.1, 6.0).sign == 1
    assert summary.Interval(-3.0, -6.0, -0.1).sign == -1
    assert summary.interval([2.0]) == summary.Interval(2.0, None, None)


def test_the_page_is_that_of_the_rows():
    """Who adds rows or changes the study writes the page again: python -m examples.family report"""
    page = report.page(summary.blocks(Rows(PATH)))
    assert (report.DOCS / "study.md").read_text() == page
