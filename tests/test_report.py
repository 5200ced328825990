"""The benchmarks' own machinery: nothing is timed that is wrong or reported that was not timed."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import on_gpu, report
from benchmarks.measure import Case, Ceilings, Passed, Race, Spread, Way, name_of, summary
from benchmarks.trust import report as trust
from meg_kernels.editing.evaluate import METRICS
from meg_kernels.editing.layers import LayerQuality

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def race(what: str, baseline: str, speed_up: float, **shape) -> dict:
    """What benchmarks.measure.Race records."""
    factors = {"median": speed_up, "q1": speed_up, "q3": speed_up}
    return {
        "what": what,
        "way": "ours",
        "device": "cpu",
        "shape": shape,
        "dtype": "float32",
        "seconds": {"median": 0.002, "q1": 0.002, "q3": 0.002},
        "against": {baseline: {"seconds": {"median": 0.002 * speed_up}, "speed_up": factors}},
    }


@pytest.fixture
def write(tmp_path):
    """Writes a pytest-benchmark JSON with these races."""

    def write(*races: dict):
        path = tmp_path / "machine.json"
        content = {
            "machine_info": {
                "cpu": {"brand_raw": "A CPU"},
                "threads": 2,
                "versions": {"torch": "2.13", "transformers": "5.23"},
            },
            "commit_info": {"id": "0123456789abcdef", "dirty": True},
            "datetime": "2026-01-02T03:04:05",
            "ceilings": {"copy": 2e10, "matmul": {"float32": 1e11}},
            "benchmarks": [{"extra_info": extra} for extra in races],
        }
        path.write_text(json.dumps(content))
        return path

    return write


def test_a_file_without_races_is_no_run(write, tmp_path):
    assert report.read(write({"seconds_a_fact": 1.0})) is None
    (tmp_path / "other.json").write_text('{"metrics": {}}')
    assert report.read(tmp_path / "other.json") is None


def test_a_section_names_machine_revision_versions_and_ceilings(write):
    run = report.read(write(race("prefill", "no neurons", 0.99, batch=64)))
    text = report.section(run)
    for fact in ("A CPU", "0123456789ab with changes", "torch 2.13", "2026-01-02", "20 GB/s"):
        assert fact in text


def test_a_table_has_a_row_for_each_race_and_a_column_for_each_baseline(write):
    run = report.read(
        write(
            race("answer a query", "one at a time", 12.3, queries=64),
            race("answer a query", "PEFT", 1.5, queries=64),
        )
    )
    lines = report.table(report.TABLES[0], run.records).splitlines()
    assert lines[2] == "| queries | dtype | ours | against one at a time | against PEFT |"
    assert lines[4] == "| 64 | float32 | ours: 2 ms | 24.6 ms, 12 × |  |"
    assert lines[5] == "| 64 | float32 | ours: 2 ms |  | 3 ms, 1.5 × |"
    assert len(lines) == 6


def test_what_was_not_measured_is_in_no_table(write):
    text = report.section(report.read(write(race("prefill", "no neurons", 0.99, batch=64))))
    assert "A prefill" in text
    assert "decode" not in text and "!" not in text


def test_the_baseline_without_neurons_shows_what_they_add():
    slower = {"speed_up": {"median": 0.5, "q1": 0.4, "q3": 0.8}}
    assert report.gain("no neurons", slower) == "+100.0% (+25.0% to +150.0%)"


def test_tables_go_between_the_markers_and_nothing_else_changes():
    text = f"before {BEGIN} old {END} after"
    once = report.between_markers(text, report.RACES, "new")
    assert once.startswith("before ") and once.endswith(" after") and "old" not in once
    assert report.between_markers(once, report.RACES, "new") == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END} {BEGIN}"])
def test_a_text_without_both_markers_is_left_alone(text):
    assert report.between_markers(text, report.RACES, "new") is None


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder that stands for docs/results/."""
    monkeypatch.setattr(report, "PAGES", tmp_path / "pages")
    (tmp_path / "pages").mkdir()
    return tmp_path / "pages"


def test_main_prints_the_tables_where_the_page_has_no_markers(write, pages, monkeypatch, capsys):
    page = pages / "speed.md"
    page.write_text("no markers")
    monkeypatch.setattr(report, "draw", lambda run, folder: [])
    assert report.main([str(write(race("prefill", "no neurons", 0.99, batch=64)))]) == 0
    assert "A prefill" in capsys.readouterr().out
    assert page.read_text() == "no markers"


def test_the_pages_of_the_documentation_have_all_markers():
    for name in (report.RACES, *report.STUDIES):
        page = report.PAGES / report.PAGE_OF.get(name, "quality.md")
        assert report.between_markers(page.read_text(encoding="utf-8"), name, "") is not None


def test_a_study_says_where_it_was_measured():
    content = {"machine": "A CPU", "threads": 1, "versions": {"torch": "2.13"}}
    assert report.sources({"x.json": content}) == "*From `x.json`: A CPU, 1 thread; torch 2.13.*"
    assert "names no machine" in report.sources({"x.json": {}})


def steps_study(**changes) -> dict:
    """What benchmarks.quality.steps writes."""
    row = {"solver": "ddim", "seed": 0, "distance": 0.25, "reliability": 1.0, "generality": 0.9}
    rows = [
        {**row, "steps": 50, "snap": True},
        {**row, "steps": 2, "snap": True, "distance": 0.5},
        {**row, "steps": 2, "snap": True, "distance": 0.7, "generality": 0.8, "seed": 1},
        {**row, "steps": 50, "snap": False, "generality": 0.8},
        {**row, "steps": 2, "snap": False, "generality": 0.7},
        {**row, "steps": 2, "snap": False, "generality": 0.8, "seed": 1},
    ]
    collected = {"reliability": 1.0, "generality": 0.95}
    return {"study": "steps", "data": "demo", "facts": 64, "rows": rows, "collected": collected}


def test_a_study_of_steps_is_a_table_and_a_plot(tmp_path, pages):
    path, page = tmp_path / "steps.json", pages / "quality.md"
    path.write_text(json.dumps(steps_study()))
    page.write_text("before <!-- steps:begin --><!-- steps:end --> after")
    pytest.importorskip("matplotlib")
    assert report.main([str(path)]) == 0
    text = page.read_text()
    assert text.startswith("before ") and text.endswith(" after")
    lines = [line for line in text.splitlines() if line.startswith("| ddim")]
    assert lines == [
        "| ddim | 2 | 2 | 0.600 | 1.000 | 0.850 | 0.750 |",
        "| ddim | 50 | 1 | 0.250 | 1.000 | 0.900 | 0.800 |",
    ]
    assert "| collected neurons |  |  | 0 | 1.000 | 0.950 |  |" in text
    assert "![steps](plots/steps.png)" in text
    assert "*From `steps.json`: the file names no machine.*" in text
    assert (pages / "plots" / "steps.png").stat().st_size > 1000


PERPLEXITY = {"base": 30.5, "edited": 30.25, "passages": 24, "accepted": 1, "tokens": 2000}


TAKEN = {"asked": 9, "own": 5, "same_subject": 2, "another": 1, "none": 1}


def quality_study() -> dict:
    """What benchmarks.quality.study writes."""

    def row(generality: float, **more) -> dict:
        shares = {"reliability_ag": 1.0, "generality_ag": generality, "locality_ag": 0.98}
        return {
            "n": 1000,
            "facts": 997,
            "asked": 500,
            "seed": 0,
            "generator": "dit",
            "metrics": shares | {"score": 0.9},
            "collected": {"generality_ag": 0.99},
            "locality_about_others": {"ag": 0.99, "asked": 7},
            "without_snapping": {"generality_ag": None},
            "seconds": {"collect": 100.0, "encoder": 20.0, "gate": 1.0, "generator": 7.0},
            "training_seconds": 9.0,
            **more,
        }

    points = [{"locality_ag": 0.5, "generality_ag": 1.0}, {"locality_ag": 1.0, "generality_ag": 0}]
    shares = dict.fromkeys(METRICS, 0.5) | {"score": 0.25, "locality_ag": 0.75}
    gate = {"metrics": shares, "curve": points, "calibration": {"auroc": 0.875}}
    gates = {"similarity": gate, "familiarity": gate, "both": gate}
    rows = [
        row(0.9, gates=gates, perplexity=PERPLEXITY, paraphrases=TAKEN),
        row(0.8, seed=1, perplexity=PERPLEXITY),
        row(0.7, generator="bank", training_seconds=0.0, perplexity=PERPLEXITY, gates=gates),
    ]
    return {"study": "quality", "data": "zsre", "rows": rows}


def test_a_study_of_quality_is_a_table_and_a_plot(tmp_path, pages):
    pytest.importorskip("matplotlib")
    path, page = tmp_path / "quality.json", pages / "quality.md"
    path.write_text(json.dumps(quality_study()))
    (tmp_path / "empty.json").write_text(json.dumps({"study": "quality", "data": "x", "rows": []}))
    page.write_text("<!-- quality:begin --><!-- quality:end -->")
    assert report.main([str(path), str(tmp_path / "empty.json")]) == 0
    lines = [line for line in page.read_text().splitlines() if line.startswith("| 997")]
    assert page.read_text().count("| zsre | 997 | 24 | 1 | 30.500 | 30.250 |") == 1
    generality = "0.850 (0.800 to 0.900)"
    rest = "0.980 | 0.990 | 0.900 | 0.990 | –"
    assert lines == [
        f"| 997 | 500 | dit | 2 | 1.000 | {generality} | {rest} | 130 s |",
        f"| 997 | 500 | bank | 1 | 1.000 | 0.700 | {rest} | 121 s |",
    ]
    assert "**x**" not in page.read_text()
    cells = "0.500 / 0.500 | 0.500 / 0.500 | 0.750 / 0.500 | 0.250"
    assert page.read_text().count(f"| zsre | 997 | familiarity | 0.875 | {cells} |") == 1
    assert f"| zsre | 997 | both | – | {cells} |" in page.read_text()
    assert "| zsre | 997 | 9 | 5 | 2 | 1 | 1 |" in page.read_text()
    assert (pages / "plots" / "trade-off.png").stat().st_size > 1000


def other_studies() -> dict[str, dict]:
    """What the other studies of quality write."""
    shares = dict.fromkeys(METRICS, 0.5) | {"score": 0.25}
    steps = {"step": 25, "seconds": 2.0, "answered": 0.5, "distance": 0.9}
    trained = {"choice": "default", "parameters": 2_500_000, "answered": 0.5, "history": [steps]}
    tuned = {"tuning_facts": 384, "seconds": 30.4, "retrieved": 0.875, "accepted": 0.75}
    changed = {"facts": 16, "seconds": 4.0, "of_first_edit": 0.125}
    same = {"asked": 100, "changed": 3, "lost": 1, "gained": 2}
    layer = LayerQuality(4, 1.0, 1.0, 0.75, 12.5, 0.25, 8.0)
    scores = [
        {"task": "nq", "metric": "acc", "base": 0.5, "edited": 0.25, "stderr": 0.0125},
        {"task": "nq", "metric": "bleu", "base": 0.75, "edited": 0.75, "stderr": None},
    ]
    seen = {"questions": 500, "contexts": 499, "accepted": 2}
    return {
        "ability": {"data": "zsre", "facts": 997, "scores": scores, **seen},
        "quality-baselines": {
            "data": "zsre",
            "facts": 997,
            "asked": 500,
            "base": shares,
            "rows": [{"baseline": "fine_tuning", "metrics": shares, "seconds": 61.0}],
        },
        "convergence": {
            "data": "zsre",
            "wanted": 0.97,
            "threads": 1,
            "rows": [
                {**trained, "n": 64, "steps": None, "seconds": None},
                {**trained, "n": 256, "steps": 50, "seconds": 4.0},
                {**trained, "n": 1000, "steps": 75, "seconds": 8.0},
            ],
        },
        "encoder": {
            "data": "zsre",
            "facts": 997,
            "rows": [{"choice": "default", **tuned, "rejected": 0.5, "auroc": 0.625}],
        },
        "layers": {"layers": [dataclasses.asdict(layer)], "default": 4, "n": 64, "protocol": {}},
        "life": {
            "facts": 256,
            "first_edit_seconds": 32.0,
            "added_right": 1.0,
            "changed_right": 0.9375,
            "removed_as_base": 1.0,
            "trained_right": 0.75,
            "rows": [{"what": "change 16", **changed, "other facts": same, "locality": same}],
        },
    }


def test_each_study_of_quality_has_its_tables(tmp_path, pages):
    pytest.importorskip("matplotlib")
    page, studies = pages / "quality.md", other_studies()
    page.write_text("\n".join(f"<!-- {name}:begin --><!-- {name}:end -->" for name in studies))
    paths = [tmp_path / f"{name}.json" for name in studies]
    for path, (name, content) in zip(paths, studies.items(), strict=True):
        path.write_text(json.dumps(content if name == "layers" else {"study": name, **content}))
    (tmp_path / "quality.json").write_text(json.dumps(full_quality_study()))
    assert report.main([*map(str, paths), str(tmp_path / "quality.json")]) == 0
    text = page.read_text()
    halves = "0.500 / 0.500 | 0.500 / 0.500 | 0.500 / 0.500"
    for line in (
        "**500 questions, 997 facts of zsre edited**",
        "| nq | acc | 0.500 ± 0.013 | 0.250 | 2 of 499 |",
        "| nq | bleu | 0.750 | 0.750 | 2 of 499 |",
        "**zsre, 997 facts**",
        f"| base model | 500 | {halves} | 0.250 |  |",
        f"| fine tuning | 500 | {halves} | 0.250 | 61 s |",
        f"| MeG, ours (dit) | 500 | {halves} | 0.750 | 130 s |",
        "| default | 2.5 M | not in 25 steps (50%) | 4 s, 50 steps | 8 s, 75 steps |",
        "| default | 384 facts | 30 | 0.875 | 0.750 | 0.500 | 0.625 |",
        "| 4 (default) | 1.000 | 1.000 | 0.750 | 12.5 | 8.0 |",
        "as the base model answers: 1.000; added and changed ones after the training: 0.750.",
        "| change 16 | 4.0 | 12.5% | 3 of 100 | 3 of 100 | 1 | 2 |",
    ):
        assert line in text, line
    names = [path.stem for path in (pages / "plots").glob("*.png")]
    assert {"convergence-zsre", "layers"} <= {*names}


def full_quality_study() -> dict:
    """One row with all six metrics."""
    study = quality_study()
    (row, *_) = study["rows"]
    row["metrics"] = dict.fromkeys(METRICS, 0.5) | {"score": 0.75}
    return study | {"rows": [row]}


def test_a_load_that_was_served_has_a_row_for_each_way_to_serve_it(tmp_path):
    took = {"seconds": 2.0, "tokens": 64, "tokens_per_second": 32.0}
    server = took | {"worker_cpu": 3.0, "all_cpu": 4.0, "first_p50": 0.5, "first_p95": 1.5}
    row = {"facts": 9913, "requests": 64, "edited_requests": 32, "turns": 9, "most_tokens": 32}
    row |= {"with": server, "without": server, "editor": took}
    row |= {"memory_mib": {"with": 1500.0, "without": 1400.0}}
    row |= {"ratio_worker_cpu": 0.991, "ratio_all_cpu": 0.95, "ratio_seconds": 0.96}
    text = report.STUDIES["serving"]({"serving": [{"rows": [row]}]}, tmp_path)
    assert "| vLLM, the edited model | 32.0 | 2.0 | 0.50 s | 1.50 s | 3.0 s | 4.0 s |" in text
    assert "| 1,500 MiB |" in text and "0.991 by the worker's processor time" in text
    assert "64 chats at once, 32 of them edited; 9,913 facts" in text
    assert report.STUDIES["serving"]({"serving": []}, tmp_path) == ""


def test_main_fails_where_nothing_was_measured(write, capsys):
    assert report.main([str(write())]) == 1
    assert "--benchmark-json" in capsys.readouterr().err


def test_plots_are_drawn_only_of_what_was_measured(write, tmp_path):
    pytest.importorskip("matplotlib")
    run = report.read(write(race("answer a query", "PEFT", 1.5, queries=64)))
    names = [path.name for path in report.draw(run, tmp_path)]
    assert names == ["machine-speed-up.png", "machine-scaling.png"]


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}
        self.stats = self
        self.data = []

    def pedantic(self, run, setup, rounds):
        for _ in range(rounds):
            setup()
            run()
            self.data.append(0.5)
        self.stats = type("Metadata", (), {"stats": self})


def a_race() -> tuple[Race, Benchmark]:
    benchmark = Benchmark()
    ceilings = Ceilings(1e10, {"float32": 1e11})
    return Race(benchmark, torch.device("cpu"), ceilings, seconds=0.0, rounds=3), benchmark


CASE = Case("work", {"batch": 2}, torch.float32, bytes=2**30, flops=2**20)


def test_a_race_takes_turns_and_records_speed_ups_and_the_share_of_the_ceiling():
    held, benchmark = a_race()
    turns = []
    held(
        CASE,
        Way("ours", lambda: turns.append("ours"), items=2),
        Way("slow", lambda: turns.append("slow")),
        gate=lambda results: Passed("nothing", 0.0, 0.0),
    )
    assert turns == ["slow", "ours"] * 5  # for the gate, for the rounds' length, and three rounds
    record = benchmark.extra_info
    assert record["seconds"]["median"] == 0.25 and record["rounds"] == 3
    assert set(record["against"]) == {"slow"}
    assert record["ceiling"] == "copy bandwidth"
    assert record["of_ceiling"] == pytest.approx(2**30 / 0.25 / 1e10)
    assert "ours 250 ms" in summary(record)


def test_nothing_is_timed_behind_a_gate_that_does_not_hold():
    held, benchmark = a_race()
    with pytest.raises(AssertionError, match="ours: off by"):
        held(
            CASE,
            Way("ours", lambda: torch.ones(3)),
            gate=lambda results: Passed.close(results, torch.zeros(3) + 2, "two"),
        )
    assert not benchmark.data and not benchmark.extra_info


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.001])
def test_a_gate_lets_no_wrong_result_pass(wrong):
    expected = torch.ones(4)
    result = expected.clone()
    result[2] = wrong
    Passed.close({"right": expected}, expected, "itself")
    with pytest.raises(AssertionError, match="wrong"):
        Passed.close({"right": expected, "wrong": result}, expected, "itself")
    with pytest.raises(AssertionError, match="wrong"):
        Passed.identical({"wrong": [1]}, [2], "itself")


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(median=3.0, q1=2.0, q3=4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert name_of(torch.bfloat16) == "bfloat16"


def test_a_stage_that_takes_too_long_is_interrupted_and_its_output_kept(tmp_path):
    program = "import time; print('begun', flush=True); time.sleep(60)"
    outcome, output = on_gpu.Stage("slow", [sys.executable, "-c", program], 2).run(tmp_path)
    assert outcome["timed_out"] and outcome["exit"] != 0 and outcome["seconds"] < 30
    assert "begun" in output and "KeyboardInterrupt" in output
    assert output in (tmp_path / "log.txt").read_text()


def test_the_outcome_of_tests_counts_what_ran_and_names_what_failed(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.test_a" name="test_right" />
        <testcase classname="tests.test_a" name="test_wrong"><failure /></testcase>
        <testcase classname="" name="tests.test_b"><error /></testcase>
        <testcase classname="tests.test_a" name="test_elsewhere"><skipped /></testcase>
        </testsuite></testsuites>"""
    )
    failed = ["tests.test_a::test_wrong", "::tests.test_b"]
    assert on_gpu.junit_outcome(path) == {"passed": 1, "skipped": 1, "failed": failed}
    assert on_gpu.junit_outcome(path)["failed"] == ["nothing ran"]


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main([str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_what_was_measured_of_trust_is_told_part_by_part():
    about = {"date": "2026-01-02", "cpu": "A CPU"}
    counts = {"refused": 5, "silent": 1, "another error": 0}
    found = {"executions": 10, "seconds": 3, "findings": {}}
    content = {
        "fuzz": about | {"facts": found},
        "inputs": about | {"facts": counts, "models": counts},
        "threads": about
        | {"model": "m", "edited_facts": 3, "threads": 8, "tasks": 8, "seconds": 2}
        | {"calls": {"edited": 4}, "wrong": {"edited": 1}, "modules_changed": False},
    }
    text = trust.page(content)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Bad inputs", "## Fuzzing", "## One editor, many threads"]
    assert "| **all** | **10** | **2** | **0** |" in text
    assert "| edited | 4 | 1 |" in text and "| facts | 10 | 3 | 0 |" in text
    assert text.count("*2026-01-02, A CPU.*") == 3
    assert trust.page({}) == ""
