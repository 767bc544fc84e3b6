"""The benchmarks' parts: what they measure is what they say, and their verdicts are right."""

import json
import os
import signal
import subprocess
import tarfile
import time

import pytest
import torch

from bench import __main__ as bench_main
from bench import (
    compare,
    family,
    gpu_table,
    losses,
    machine,
    models,
    peers,
    report,
    results,
    stats,
    workloads,
)
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


def test_the_family_is_compared_with_sgd_round_by_round():
    images, labels = torch.randn(2, 3, 8, 8), torch.arange(2)
    rows = family.measure(lambda: models.small_image_resnet((4,), 1), images, labels, rounds=1)
    assert [row["name"] for row in rows] == [member.name for member in family.MEMBERS]
    assert all(len(row["wall"]) == 1 for row in rows)

    def found(batch, sgd, sam):
        members = [("SGD", 1, sgd), ("SAM", 2, sam)]
        rows = [dict(zip(("name", "passes", "wall"), row, strict=True)) for row in members]
        return {"batch": batch, "members": rows}

    small, large = found(8, [1.0, 2.0, 4.0], [2.0, 4.0, 12.0]), found(32, [2.0], [5.0])
    lines = family.table([small, large])
    assert lines[0] == "| times SGD's step | passes | 8 images | 32 images |"
    assert lines[2:] == ["| SAM | 2 | 2.00 (2.00–2.60) | 2.50 (2.50–2.50) |"]


# ------------------------------------------------------------------------------------ bench/gpu.sh

PARTS = """#!/bin/bash
RUN=run RESULTS={results} DEADLINE={deadline} PARTS="{parts}" NAMED={named}
table() {{ cat "$work/parts.tsv"; }}
. {root}/bench/parts.sh
reserve=0
part first 1 9 echo said by the first
part failing 1 9 bash -c 'echo words; exit 7'
slow() {{ echo begun; [ -z "{json}" ] || echo "{{}}" > "$work/slow.json"; sleep 30; }}
export -f slow
export work
part slow 1 {slow} bash -c slow
part greedy 60 90 echo never
part last 1 9 echo said by the last
"""


def _script(tmp_path, parts, *, named="", deadline=100, slow=1, json=""):
    script = tmp_path / "script.sh"
    places = {"results": tmp_path / "results", "root": results.ROOT}
    script.write_text(
        PARTS.format(parts=parts, named=named, deadline=deadline, slow=slow, json=json, **places)
    )
    return ["bash", str(script)]


def _outcomes(tmp_path):
    """What the archive says of each part, after a look at what else must be in it."""
    with tarfile.open(tmp_path / "results" / "run.tar.gz") as archive:
        files = {
            os.path.basename(member.name): archive.extractfile(member).read().decode()
            for member in archive
            if member.isfile()
        }
    assert files["run.md"] == (tmp_path / "results" / "run.md").read_text() == files["parts.tsv"]
    outcomes = {}
    for line in files["parts.tsv"].splitlines():
        name, _, outcomes[name] = line.split("\t")
        assert outcomes[name].startswith("left out") or f"{name}.log" in files
    return outcomes


@pytest.mark.parametrize("named", ["", "yes"])
def test_a_part_that_fails_or_does_not_fit_stops_no_other(tmp_path, named):
    """Guards the exit status: what was not asked for by name may be left out."""
    command = _script(tmp_path, "first greedy last", named=named, deadline=30)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (named == "yes")
    found = _outcomes(tmp_path)
    assert list(found) == ["first", "greedy", "last"]
    assert found["first"] == found["last"] == "succeeded" and "left out" in found["greedy"]
    assert "said by the first" in done.stdout and "said by the last" in done.stdout

    done = subprocess.run(_script(tmp_path, "failing last"), capture_output=True, text=True)
    assert done.returncode == 1 and "FAILED failing: exit status 7" in done.stdout
    assert _outcomes(tmp_path)["last"] == "succeeded"


@pytest.mark.parametrize(("left", "named", "status"), [("", "", 1), ("1", "", 0), ("1", "yes", 1)])
def test_a_part_that_is_too_slow_is_stopped(tmp_path, left, named, status):
    """Guards what was measured until then: with results it is cut short, without it has failed."""
    command = _script(tmp_path, "slow last", named=named, json=left)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    found = _outcomes(tmp_path)
    assert found["slow"].startswith("cut short" if left else "FAILED, stopped at its limit")
    assert found["last"] == "succeeded" and "begun" in done.stdout


def test_no_part_passes_the_deadline(tmp_path):
    """Guards the end of all: a part gets what is left, and later ones are left out."""
    start = time.monotonic()
    command = _script(tmp_path, "slow greedy last", deadline=2, slow=25, json="1")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert time.monotonic() - start < 20  # far less than the 25 s that the part may have
    assert [words.split()[0] for words in _outcomes(tmp_path).values()] == ["cut", "left", "left"]


def test_an_interrupted_run_leaves_its_archive(tmp_path):
    command = _script(tmp_path, "first slow last", slow=60)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while "begun" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert "FAILED stopped by a signal" in process.stdout.read()
    assert process.returncode == 1
    assert _outcomes(tmp_path) == {"first": "succeeded"}


def test_gpu_script_names_the_parts_that_there_are():
    for arguments in ([], ["truths"], ["kernels", "nothing"]):
        command = ["bash", "bench/gpu.sh", *arguments]
        done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "kernels memcheck" in done.stderr


def test_commit_comes_from_a_variable_where_git_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc123")
    assert machine.commit() == "abc123"


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","reduce_kernel","Command line metrics","dram__bytes_read.sum","byte","1,024"
"0","7","reduce_kernel","Command line metrics","dram__bytes_write.sum","byte","64"
"1","7","void up<float, 2>(A, B)","Command line metrics","dram__bytes_read.sum","byte","4000"
"1","7","void up<float, 2>(A, B)","Command line metrics","dram__bytes_write.sum","byte","32"
==PROF== Disconnected from process 7
"""


def test_traffic_is_read_from_the_profiler():
    traffic = pytest.importorskip("bench.traffic")
    launched = [{"kernel": "reduce"}, {"kernel": "update_"}]
    first, second = traffic.beside(launched, NCU)
    assert (first["kernel"], first["read"], first["written"]) == ("reduce", 1024, 64)
    assert (second["function"], second["read"]) == ("void up<float, 2>(A, B)", 4000)
    with pytest.raises(ValueError, match=r"saw 0 kernels where 2 ran: ==ERROR== no permission"):
        traffic.beside(launched, "==ERROR== no permission")


@pytest.mark.parametrize("base", peers.BASES)
def test_every_kernel_of_the_budget_is_launched(base):
    launches = pytest.importorskip("bench.launches")
    kernels = {k for k in launches.ACCESSES if base in k or (base == "SGD" and "update" not in k)}
    for name in launches.available():
        found = launches.launches(100, base, name, copies=2)
        assert set(found) == kernels
        for works in found.values():
            assert len(works) == 2
            for work in works:
                work()


@pytest.mark.parametrize(("broken", "status"), [("FusedSAM", 1), ("foreach SAM", 0)])
def test_a_failure_of_ours_fails_the_part_and_hides_nothing(tmp_path, monkeypatch, broken, status):
    gpu = pytest.importorskip("bench.gpu")

    def part():
        yield {"peer": f"{broken} native", "failed": "words"}
        yield {"peer": "another", "median": 1.0}

    monkeypatch.setitem(gpu.PARTS, "steps", part)
    assert gpu.main("steps", str(tmp_path)) == status
    assert len(json.loads((tmp_path / "steps.json").read_text())["rows"]) == 2


def test_a_backend_that_cannot_launch_leaves_the_figures_of_the_next(monkeypatch):
    gpu = pytest.importorskip("bench.gpu")

    def launches(numel, base, backend, copies):
        if backend == "first":
            raise RuntimeError("no kernel image")
        return {"restore_": [lambda: None]}

    monkeypatch.setattr(gpu, "SIZES", [1000])
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(gpu, "measure", lambda works, rounds: {name: [1.0] for name in works})
    monkeypatch.setattr(gpu, "launches", launches)
    monkeypatch.setattr(gpu, "captured", lambda works: works[0])
    monkeypatch.setattr(gpu, "available", lambda: ["first", "second"])
    _, *rows = gpu.kernels()
    assert [row.get("failed") for row in rows] == ["RuntimeError: no kernel image"] * 2 + [None] * 2
    assert rows[-1]["kernel"] == "restore_"


def test_a_step_that_cannot_be_captured_leaves_the_figures_of_the_others(monkeypatch):
    """There is no GPU here, so that of each backend is refused; of the reference it must be."""
    gpu = pytest.importorskip("bench.gpu")
    ours = [
        peer for peer in peers.fused_sam_peers(torch.device("cpu")) if "triton" not in peer.name
    ]
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu, "DRY", False)
    monkeypatch.setattr(gpu, "fused_sam_peers", lambda device: ours)
    monkeypatch.setattr(gpu, "peers", lambda device, compiled: [peers.peers(device)[-1]])
    monkeypatch.setattr(gpu, "captured", lambda works: works[0])
    monkeypatch.setattr(gpu, "measure", lambda works: {name: [1.0] for name in works})
    rows = list(gpu.training_graphs())
    refused = {row["peer"]: row for row in rows if "median" not in row}
    assert list(refused) == [f"{peer.name}, captured" for peer in ours]
    for name, row in refused.items():
        assert "parameters are on cpu" in row["left_out" if "reference" in name else "failed"]
    assert len(rows) == 2 * len(ours) + 2


def test_gpu_table_says_which_aims_are_met(tmp_path):
    """Guards the verdicts, and that figures of other sizes and peers do not enter them."""
    time_ = {"median": 1e-3, "p20": 9e-4, "p80": 2e-3}
    kernel = {"backend": "triton", "copies": 1, **time_, "bytes_per_second": 3e12}
    kernels = [{"kernel": "copy", "numel": 9, "bytes_per_second": 3.1e12}]
    for name, numel, share in (("reduce", 10**6, 0.5), ("ascend_", 10**8, 0.951)):
        kernels.append({**kernel, "kernel": name, "numel": numel, "share_of_copy": share})
    step = {"model": "ResNet-50", "base": "SGD"}
    steps = [
        {**step, "peer": peer, **time_, "median": ratio, "times_ours": {**time_, "median": ratio}}
        for peer, ratio in (("FusedSAM triton", 1.0), ("slow", 3.0), ("best", 1.4), ("mid", 2.0))
    ]
    steps.append({"peer": "absent", "left_out": "it is not installed"})
    replays = [{**row, "median": row["median"] / 2} for row in steps[:1]]
    host = [{"model": "ResNet-50", "tensors": 161, "base": "SGD", "backend": "triton", **time_}]
    rows = {"kernels": kernels, "steps": steps, "graphs": replays, "host": host}
    for name, content in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": content}))
    text = gpu_table.page(tmp_path)
    aims = [line for line in text.splitlines() if line.endswith(("| met |", "| MISSED |"))]
    assert ["met" in aim.split("|")[-2] for aim in aims] == [True, False, False]
    assert "95.1%: ascend_" in aims[0] and "1.40: ResNet-50 SGD, best" in aims[1]
    assert "1000 us" in aims[2]
    assert "absent, left_out it is not installed" in text
    assert "1000.000 host, 1.00" in text and "3.100 TB/s" in text
