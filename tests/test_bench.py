"""The benchmarks' parts: what they measure is what they say, and their verdicts are right."""

import json

import pytest
import torch

from bench import __main__ as bench_main
from bench import compare, losses, models, peers, report, results, stats, workloads
from bench.costs import costs
from bench.measure import Arena

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", workloads.MODELS)
def test_workloads_have_the_published_parameter_counts(name):
    assert workloads.model(name).numel > 0  # model() asserts the counts


@pytest.mark.parametrize("name", models.MODULES)
def test_trained_networks_have_the_workloads_shapes(name):
    with torch.device("meta"):
        network = models.MODULES[name]()
    shapes = sorted(tuple(p.shape) for p in network.parameters())
    assert shapes == sorted(workloads.model(name).shapes)


@pytest.mark.parametrize("tensors", [1, 3, 10])
def test_split_keeps_the_total(tensors):
    workload = workloads.split(1000, tensors)
    assert (workload.numel, len(workload.shapes)) == (1000, tensors)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_all_peers_walk_the_same_trajectory(base, groups):
    workload = workloads.Workload("small", ((3, 5), (7,), (1,), (64, 33), (2, 2, 3)))
    competitors = peers.peers(CPU)
    arena = Arena(workload, base, competitors, CPU, groups=groups)
    assert not arena.skipped
    assert len(arena.runners) == len(competitors)


def test_a_peer_that_walks_elsewhere_is_refused():
    def shorter(groups, base, options):
        return peers.TextbookSAM(groups, base, rho=0.9 * peers.RHO, **options)

    cheat = peers.Peer("cheat", "textbook SAM", shorter)
    with pytest.raises(AssertionError, match="cheat walks elsewhere"):
        Arena(workloads.flat(100), "SGD", [peers.peers(CPU)[0], cheat], CPU)


def test_gradients_are_left_alone_by_every_peer():
    workload = workloads.Workload("small", ((3, 5), (7,)))
    arena = Arena(workload, "SGD", peers.peers(CPU), CPU)
    before = [g.clone() for half in arena.runners[0].gradients for g in half]
    for runner in arena.runners:
        runner.step()
        after = [g for half in arena.runners[0].gradients for g in half]
        assert all(map(torch.equal, before, after)), runner.peer.name


def test_extra_memory_of_saving_the_weights_is_one_copy_of_them():
    workload = workloads.flat(100_000)
    textbook = next(p for p in peers.peers(CPU) if p.name == "textbook SAM, fused")
    found = costs(textbook, workload, "SGD", CPU)
    # The clone, and the scaled gradient on its way; the rest is scalars.
    assert 2 * 400_000 <= found["extra_bytes"] < 2 * 400_000 + 4096
    assert found["calls"] < 30


def _results(times, **info):
    seconds = {"FusedSAM reference": times, compare.YARDSTICK: [1.0] * len(times)}
    record = {
        "seconds": seconds,
        "families": {"FusedSAM reference": "FusedSAM", compare.YARDSTICK: "textbook SAM"},
        "numel": 100,
        "tensors": 2,
        "workload": "small",
        "base": "SGD",
        "cache": "warm",
        "groups": 1,
        "threads": 1,
    }
    machine = {"cpu": "c", "threads": 1, "versions": {}, **info}
    return {
        "machine_info": machine,
        "benchmarks": [{"name": "case", "extra_info": {"record": record}, "stats": {"data": []}}],
    }


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ([1.0, 1.01, 0.99, 1.0, 1.0], [1.2, 1.21, 1.19, 1.2, 1.2], "SLOWER"),
        ([1.0, 1.01, 0.99, 1.0, 1.0], [0.8, 0.81, 0.79, 0.8, 0.8], "faster"),
        ([1.0, 1.01, 0.99, 1.0, 1.0], [1.03, 1.04, 1.02, 1.03, 1.03], "same"),  # below threshold
        ([0.5, 1.0, 1.0, 1.5, 2.0], [0.5, 1.2, 1.2, 1.5, 2.0], "same"),  # spreads overlap
    ],
)
def test_compare_calls_slower_what_is_beyond_noise(tmp_path, capsys, old, new, word):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, times in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(_results(times)))
        results.tidy(path)
    assert compare.main([str(path) for path in paths]) == (1 if word == "SLOWER" else 0)
    assert word in capsys.readouterr().out


def test_compare_says_so_when_conditions_differ_or_nothing_is_common(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    empty = {"machine_info": {"cpu": "other", "threads": 1, "versions": {}}, "benchmarks": []}
    for path, content in zip(paths, (_results([1.0]), empty), strict=True):
        path.write_text(json.dumps(content))
    assert compare.main([str(path) for path in paths]) == 2
    assert "cpu differs" in capsys.readouterr().out


def test_tidy_changes_the_layout_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    content = _results([1.0, 2.0, 3.5e-7])
    path.write_text(json.dumps(content))
    results.tidy(path)
    del content["benchmarks"][0]["stats"]["data"]
    assert results.load(path) == content


def test_losses_are_found_and_explained():
    for times, certain in (([1.2, 1.3, 1.25] * 3, True), ([1.2, 1.3, 1.25], False)):
        record = results.entries(_results(times), "record")["case"]
        (loss,) = losses.losses({"case": record})
        assert loss.peer == compare.YARDSTICK and loss.factor.median == 1 / 1.25
        assert loss.certain == certain  # three rounds of three are chance
        assert "no explanation" not in loss.reason
    assert not list(losses.losses(results.entries(_results([0.5, 0.6, 0.7]), "record")))


@pytest.mark.parametrize("content", [None, "no JSON", "[]", "{}", '{"benchmarks": [{}]}'])
def test_compare_refuses_what_is_no_file_of_results(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert compare.main([str(path), str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_published_pages_are_those_of_the_published_results():
    path = results.RESULTS / "cpu.json"
    found = results.load(path)
    assert (report.DOCS / "benchmarks.md").read_text() == report.page(found, "", path)
    assert report.section(found) in (results.ROOT / "README.md").read_text()


def test_section_is_written_between_markers_and_replaced(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\ntext\n\n## Limitations\n\nsome\n")
    report.write_section(readme, "## Performance\n\nold\n")
    report.write_section(readme, "## Performance\n\nnew\n")
    block = f"{report.BEGIN}\n## Performance\n\nnew\n{report.END}\n"
    assert readme.read_text() == f"# Title\n\ntext\n\n{block}\n## Limitations\n\nsome\n"


def test_sure_is_what_chance_does_in_one_of_a_hundred_at_most():
    assert stats.surely_less([1.0] * 7, [2.0] * 7)
    assert not stats.surely_less([1.0] * 6, [2.0] * 6)
    assert not stats.surely_less([1.0] * 9 + [3.0] * 3, [2.0] * 12)
    assert not stats.surely_less([2.0] * 9, [2.0] * 9)


@pytest.mark.parametrize("status", [0, 1])
def test_only_a_whole_run_that_succeeded_is_published(tmp_path, monkeypatch, status):
    published, report_written = tmp_path / "cpu.json", []
    published.write_text("old")
    monkeypatch.setattr(bench_main, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_main.report, "write", report_written.append)
    monkeypatch.setattr(bench_main.report, "write_quick", lambda path, target: None)

    def run(suites, device, quick, path):
        path.write_text(json.dumps(_results([1.0])))
        return status

    monkeypatch.setattr(bench_main, "_run_suites", run)
    assert bench_main.main(["--out", str(tmp_path)]) == status
    assert (published.read_text() == "old") == bool(status)
    assert report_written == ([] if status else [published])
    assert bench_main.main(["--out", str(tmp_path), "--suite", "suite_costs"]) == status
    assert len(report_written) == (not status)


def test_spread_of_ratios_is_taken_pair_by_pair():
    found = stats.ratio([2.0, 30.0, 400.0], [1.0, 10.0, 100.0])
    assert found.median == 3.0
    assert 2.0 < found.p20 < 3.0 < found.p80 < 4.0
