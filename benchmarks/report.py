"""The tables and plots of docs/results/, from the JSON that the benchmarks wrote.

    python -m benchmarks.report [JSON ...]

The races' tables go into speed.md, between the markers `<!-- benchmarks:begin -->` and
`<!-- benchmarks:end -->`, those of a study of quality into quality.md, between markers of the
study's name, those of trust.json into trust.md; to the screen where a page has no such markers.
Plots go to docs/results/plots/.
Nothing is written that was not measured: what a file does not hold is a row that the table does not
have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import in_units
from benchmarks.quality.report import STUDIES, figure, image, markdown
from benchmarks.trust import report as trust

FOLDER = Path(__file__).parent
PAGES = FOLDER.parent / "docs" / "results"
# The markers of the races' tables, and of trust.json's; studies have their own names.
RACES, TRUST = "benchmarks", "trust"
PAGE_OF = {RACES: "speed.md", "serving": "speed.md", TRUST: "trust.md"}
NOTHING = "no neurons"  # the baseline that does less than we do: there a speed-up is a cost

Record = Mapping[str, Any]  # the extra_info of a race: benchmarks.measure.Race


@dataclass(frozen=True)
class Run:
    """One JSON file: a machine, its ceilings and the races that were held on it."""

    name: str
    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    date: str
    ceilings: Mapping[str, Any]
    records: list[Record]
    checks: Mapping[str, Any]  # of benchmarks.on_gpu; empty for other runs

    @property
    def device(self) -> str:
        if "gpu" in self.machine:
            return str(self.machine["gpu"]["name"])
        threads = self.machine["threads"]
        return f"{self.machine['cpu']['brand_raw']}, {threads} thread{'s' * (threads > 1)}"

    def of(self, what: str) -> list[Record]:
        return [record for record in self.records if record["what"] == what]


def read(path: Path) -> Run | None:
    """The run in `path`, or None if it holds no races."""
    content = json.loads(path.read_text(encoding="utf-8"))
    benchmarks = content.get("benchmarks", [])
    records = [bench.get("extra_info", {}) for bench in benchmarks]
    records = [record for record in records if "against" in record]
    if not records:
        return None
    return Run(
        path.stem,
        content["machine_info"],
        content["commit_info"],
        content["datetime"][:10],
        content["ceilings"],
        records,
        content.get("checks", {}),
    )


# ---- tables -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table of speed.md: which races, and what their sizes are called there."""

    what: str
    title: str
    keep: Callable[[Record], bool] = lambda record: True


def _readable(record: Record) -> bool:
    """Few enough for one page: one batch size, and on a GPU the dtype that people use there."""
    return record["shape"]["batch"] == 64 and (
        record["device"] == "cpu" or record["dtype"] == "bfloat16"
    )


def _of_one_width(record: Record) -> bool:
    """Phi-2's neurons."""
    return record["shape"]["neuron"] == 5121


TABLES = [
    Table("answer a query", "Answering queries, each with its own edit; seconds a query"),
    Table("decode step, eager", "A decode step"),
    Table("decode step, CUDA graph", "A decode step as a CUDA graph"),
    Table("prefill", "A prefill"),
    Table("dynamic_neuron forward", "The op alone", _readable),
    Table("dynamic_neuron backward", "Its backward pass", _readable),
    Table("gated FFN", "A whole gated FFN: where the neurons are best added"),
    Table("softmax entropy", "The entropy that the familiarity gate goes by"),
    Table("collection", "Collecting neurons; seconds a fact"),
    Table("generate neurons", "Generating neurons; seconds a neuron"),
    Table("each saving", "What each saving is worth: the same DiT-B, 10 steps on 64 neurons"),
    Table("training step", "A step of training the generator"),
    Table("denoising step", "A denoising step", _of_one_width),
    Table("gated residual and LayerNorm", "Gated residual, LayerNorm and modulation", _readable),
    Table("short attention", "Attention from the packed qkv", _readable),
    Table("linear and GELU", "Linear and GELU", _readable),
    Table("solver step", "A solver's step", _readable),
]


def table(spec: Table, records: Iterable[Record]) -> str:
    """A Markdown table of these races, or nothing if there are none.

    A baseline's cell is its time and how many times as fast ours is; the baseline without
    neurons' is what ours adds to it.
    """
    rows = [_cells(record) for record in records if spec.keep(record)]
    if not rows:
        return ""
    return markdown(spec.title, rows)


def _cells(record: Record) -> dict[str, str]:
    cells = {name: f"{size}" for name, size in record["shape"].items()}
    cells["dtype"] = record["dtype"]
    cells["ours"] = f"{record['way']}: {in_units(record['seconds']['median'])}"
    for name, against in record["against"].items():
        cells[f"against {name}"] = (
            f"{in_units(against['seconds']['median'])}, {gain(name, against)}"
        )
    if "of_ceiling" in record:
        cells["of the machine's ceiling"] = f"{record['of_ceiling']:.0%} of {record['ceiling']}"
    if "neighbours" in record:
        off = record["neighbours"]
        cells["alone or among others"] = f"off by {off:.1e}" if off else "the same bits"
    return cells


def gain(baseline: str, against: Record) -> str:
    """What ours gains over a baseline, or what it adds to the one without neurons.

    >>> gain("eager", {"speed_up": {"median": 5.04, "q1": 4.9, "q3": 5.1}})
    '5.0 ×'
    >>> gain("no neurons", {"speed_up": {"median": 0.99, "q1": 0.98, "q3": 1.0}})
    '+1.0% (+0.0% to +2.0%)'
    """
    speed_up = against["speed_up"]
    if baseline != NOTHING:
        factor = speed_up["median"]
        return f"{factor:.0f} ×" if factor >= 9.95 else f"{factor:.1f} ×"
    added = {name: 1 / factor - 1 for name, factor in speed_up.items()}
    return f"{added['median']:+.1%} ({added['q3']:+.1%} to {added['q1']:+.1%})"


def section(run: Run, plots: Sequence[Path] = ()) -> str:
    """All tables of a run under the machine's name, with what it needs to be repeated."""
    versions = [f"{name} {run.machine['versions'][name]}" for name in ("torch", "transformers")]
    revision = run.commit["id"][:12] + (" with changes" if run.commit.get("dirty") else "")
    rates = [f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in run.ceilings["matmul"].items()]
    parts = [
        f"## {run.device}",
        f"{run.date}, revision {revision}, {', '.join(versions)}. Measured in the same run: copies "
        f"{run.ceilings['copy'] / 1e9:.3g} GB/s, matrix products {' and '.join(rates)}.",
        outcome(run.checks),
        *(table(spec, run.of(spec.what)) for spec in TABLES),
        *map(image, plots),
    ]
    return "\n\n".join(part for part in parts if part)


def outcome(checks: Mapping[str, Any]) -> str:
    """How the tests on a GPU machine went.

    >>> tests = {"passed": 9, "failed": []}
    >>> outcome({"build": {}, "tests": tests, "memcheck": {"errors": 0}})
    'GPU tests: 9 passed, 0 failed. compute-sanitizer: memcheck 0 errors.'
    """
    parts = []
    if tests := checks.get("tests"):
        parts.append(f"GPU tests: {tests['passed']} passed, {len(tests['failed'])} failed.")
    counts = {name: check["errors"] for name, check in checks.items() if "errors" in check}
    found = [f"{name} {errors} errors" for name, errors in counts.items() if errors is not None]
    if found:
        parts.append(f"compute-sanitizer: {', '.join(found)}.")
    return " ".join(parts)


def between_markers(text: str, name: str, content: str) -> str | None:
    """`text` with `content` between its markers of that name, or None if it has no such markers.

    >>> between_markers("a <!-- it:begin -->old<!-- it:end --> b", "it", "new")
    'a <!-- it:begin -->\\n\\nnew\\n\\n<!-- it:end --> b'
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        return None
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


# ---- plots ------------------------------------------------------------------------------------


def plot_roofline(run: Run, axes: Any) -> bool:
    """Achieved rate against arithmetic intensity, under what the machine can do at most."""
    import matplotlib
    import numpy as np

    points = [record for record in run.records if "of_ceiling" in record]
    if not points:
        return False
    intensities = [record["flops"] / record["bytes"] for record in points]
    reach = np.geomspace(min(intensities) / 4, max(*intensities, 100) * 4, 200)
    for dtype, rate in run.ceilings["matmul"].items():
        roof = np.minimum(run.ceilings["copy"] * reach, rate)
        axes.plot(reach, roof, color="black", linewidth=1)
        axes.annotate(dtype, (reach[-1], roof[-1]), ha="right", va="bottom")
    achieved: dict[str, list[tuple[float, float]]] = {}
    for record in points:
        ways = {record["way"]: record, **record["against"]}
        for name, way in ways.items():
            if name != NOTHING:
                rate = record["flops"] / way["seconds"]["median"]
                series = achieved.setdefault(f"{record['what']}: {name}", [])
                series.append((record["flops"] / record["bytes"], rate))
    axes.set_prop_cycle("color", matplotlib.colormaps["tab20"].colors)  # there are many series
    for label, series in achieved.items():
        axes.scatter(*zip(*series, strict=True), label=label, s=14)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="FLOP / s")
    axes.legend(fontsize=7)
    return True


def plot_speed_up(run: Run, axes: Any) -> bool:
    """How many times as fast ours is, race by race and baseline by baseline."""
    bars: list[tuple[str, float, float, float]] = []
    for spec in TABLES:
        for record in filter(spec.keep, run.of(spec.what)):
            sizes = " × ".join(str(size) for size in record["shape"].values())
            for name, against in record["against"].items():
                if name != NOTHING:
                    label = f"{spec.what}, {sizes}, {record['dtype']}: {record['way']} / {name}"
                    speed_up = against["speed_up"]
                    bars.append((label, speed_up["median"], speed_up["q1"], speed_up["q3"]))
    if not bars:
        return False
    bars.reverse()  # the first at the top
    labels, medians, low, high = zip(*bars, strict=True)
    errors = [
        [median - q1 for median, q1 in zip(medians, low, strict=True)],
        [q3 - median for median, q3 in zip(medians, high, strict=True)],
    ]
    axes.figure.set_size_inches(9, 1.2 + 0.22 * len(bars))
    axes.barh(range(len(bars)), medians, xerr=errors, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as the baseline (median and quartiles)")
    return True


def plot_scaling(run: Run, axes: Any) -> bool:
    """Queries answered in a second against how many are asked at once, way by way."""
    from matplotlib import ticker

    series: dict[str, dict[int, float]] = {}
    for record in run.of("answer a query"):
        ways = {record["way"]: record, **record["against"]}
        for name, way in ways.items():
            rate = 1 / way["seconds"]["median"]
            series.setdefault(name, {})[record["shape"]["queries"]] = rate
    if not series:
        return False
    for name, points in series.items():
        batches = sorted(points)
        axes.plot(batches, [points[batch] for batch in batches], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="queries at once", ylabel="queries / s")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return True


PLOTS = {"roofline": plot_roofline, "speed-up": plot_speed_up, "scaling": plot_scaling}


def draw(run: Run, folder: Path) -> list[Path]:
    """The plots for which the run has data, as PNG files in `folder`."""
    paths = []
    for name, plot in PLOTS.items():
        with figure(folder / f"{run.name}-{name}.png", run.device) as axes:
            if plot(run, axes):
                paths.append(folder / f"{run.name}-{name}.png")
    return paths


def study_of(content: Mapping[str, Any]) -> str | None:
    """Which study wrote a file; `meg layers --json` does not say so."""
    return "layers" if "layers" in content else content.get("study")


def sources(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Which files a study's tables were made from, and on what they were measured.

    Args:
        files: the files' contents by name.

    >>> one = {"versions": {"torch": "2.13.0"}, "machine": "A CPU", "threads": 2}
    >>> print(sources({"a.json": one, "b.json": one, "c.json": {}}))
    *From `a.json`, `b.json`: A CPU, 2 threads; torch 2.13.0.*
    *From `c.json`: the file names no machine.*
    """
    where: dict[str, list[str]] = {}
    for name, content in files.items():
        threads = content.get("threads")
        machine = content.get("machine", "the file names no machine")
        parts = [
            machine if threads is None else f"{machine}, {threads} thread{'s' * (threads > 1)}"
        ]
        if versions := content.get("versions"):
            parts.append(", ".join(f"{package} {version}" for package, version in versions.items()))
        where.setdefault("; ".join(parts), []).append(f"`{name}`")
    return "\n".join(f"*From {', '.join(names)}: {text}.*" for text, names in where.items())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="*", help="default: all of benchmarks/results/")
    paths = parser.parse_args(arguments).json or sorted((FOLDER / "results").glob("*.json"))
    plots = PAGES / "plots"
    runs = [run for run in map(read, paths) if run is not None]
    contents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    sections = {}
    if runs:
        sections[RACES] = "\n\n".join(section(run, draw(run, plots)) for run in runs)
    files = {
        study: {name: c for name, c in contents.items() if study_of(c) == study}
        for study in STUDIES
    }
    studies = {study: [*found.values()] for study, found in files.items()}
    for study, write in STUDIES.items():
        if text := write(studies, plots):
            sections[study] = f"{text}\n\n{sources(files[study])}"
    if text := trust.page(contents.get("trust.json", {})):
        sections[TRUST] = text
    if not sections:
        print("no races in these files; pytest writes them with --benchmark-json", file=sys.stderr)
        return 1
    for name, content in sections.items():
        page = PAGES / PAGE_OF.get(name, "quality.md")
        updated = between_markers(page.read_text(encoding="utf-8"), name, content)
        if updated is None:
            print(content)
        else:
            page.write_text(updated, encoding="utf-8")
            print(f"{page.name}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
