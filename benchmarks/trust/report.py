"""The tables of docs/results/trust.md, from results/trust.json: see benchmarks/report.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.quality.report import markdown

Part = Mapping[str, Any]


def page(content: Mapping[str, Part]) -> str:
    """A section for each part that was measured, in the order of `SECTIONS`."""
    texts = []
    for name, (title, write) in SECTIONS.items():
        if name in content:
            part = content[name]
            when = f"*{part['date']}, {part['cpu']}.*"
            texts.append(f"## {title}\n\n{write(part)}\n\n{when}")
    return "\n\n".join(texts)


def _faults(part: Part) -> str:
    every = "every" if part["every"] == 1 else f"every {part['every']}th"
    row = {
        "file-system steps": str(part["steps"]),
        "kills": str(part["kills"]),
        "full disks": str(part["full_disks"]),
        "second writers, read-only and deleted folders": str(part["others"]),
        "gone wrong": str(len(part["failures"])),
    }
    said = (
        "`python -m benchmarks.trust.faults` runs each writing command of `meg` and kills it "
        f"before {every} step that it takes in the file system, and in the midst of writing; "
        "it fills the disk, takes the right to write, deletes the folder, and starts a second "
        "writer. After each, the folder must load as it was or as it became, and the same "
        "command, started "
        "again, must end as if nothing had happened or say what to do."
    )
    return f"{said}\n\n{markdown('Faults', [row])}"


def _inputs(part: Part) -> str:
    kinds = {kind: counts for kind, counts in part.items() if isinstance(counts, Mapping)}
    rows = [
        {"kind": kind, **{name: str(count) for name, count in counts.items()}}
        for kind, counts in kinds.items()
    ]
    totals: dict[str, int] = {}
    for counts in kinds.values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    rows.append({"kind": "**all**", **{name: f"**{count}**" for name, count in totals.items()}})
    said = (
        "`python -m benchmarks.trust.inputs` gives the library what is in `tests/bad_inputs/`. "
        "*Refused*: with an error that says what is wrong and what to do, before the work. "
        "*Silent*: taken without a word. *Another error*: any other end."
    )
    return f"{said}\n\n{markdown('Bad inputs', rows)}"


def _fuzz(part: Part) -> str:
    rows = [
        {
            "target": target,
            "inputs": str(found["executions"]),
            "seconds": str(found["seconds"]),
            "findings": str(len(found["findings"])),
        }
        for target, found in part.items()
        if isinstance(found, Mapping)
    ]
    said = (
        "`python -m benchmarks.trust.fuzz` changes files of facts, manifests and checkpoints, "
        "guided by what code they reach (atheris). A finding is an end other than success or an "
        "error of ours. What was ever found is kept in `tests/fuzz_seeds/` and replayed by the "
        "tests."
    )
    return f"{said}\n\n{markdown('Fuzzing', rows)}"


def _threads(part: Part) -> str:
    rows = [
        {"call": kind, "calls": str(count), "answered in another way": str(part["wrong"][kind])}
        for kind, count in part["calls"].items()
    ]
    said = (
        f"`python -m benchmarks.trust.threads` asks one editor of {part['model']} with "
        f"{part['edited_facts']} edited facts from {part['threads']} threads and {part['tasks']} "
        f"asyncio tasks at once, {sum(part['calls'].values())} calls in {part['seconds']} s, and "
        "compares each answer with the one that the same call gave alone. "
        f"The model's modules were {'NOT ' if part['modules_changed'] else ''}as before in the end."
    )
    return f"{said}\n\n{markdown('Threads and tasks', rows)}"


def _numerics(part: Part) -> str:
    rows: dict[str, dict[str, str]] = {}
    for run in part["runs"]:
        row = rows.setdefault(f"{run['op']}, {run['backend']}", {"op": f"`{run['op']}`"})
        row |= {"backend": run["backend"], run["dtype"]: f"{run['worst']:.2f}"}
    said = (
        "`python -m benchmarks.trust.numerics` compares each op with its definition in float64, at "
        "ordinary and at extreme magnitudes. The bound of each op's rounding is derived in its "
        "docstring; the table has the worst error over its bound. Triton runs in its interpreter "
        "here, and the CUDA kernels (*csrc*) as a C++ compiler makes them for the CPU."
    )
    return f"{said}\n\n{markdown('Worst error over its bound', [*rows.values()])}"


def _soak(part: Part) -> str:
    row = {
        "hours": str(part["hours"]),
        "rounds": str(part["rounds"]),
        "answers": str(part["answers"]),
        "wrong": str(part["wrong"]),
        "memory, MiB": " → ".join(map(str, part["resident_mib"])),
        "its slope, MiB an hour": str(part["mib_per_hour"]),
        "open files": " → ".join(map(str, part["open_files"])),
    }
    said = (
        "`python -m benchmarks.trust.soak` adds, changes, asks, removes, trains, saves and loads, "
        f"round after round, in {part['model']} with the generator "
        f"`{part.get('generator', 'bank')}`."
    )
    return f"{said}\n\n{markdown('Hours of it', [row])}"


SECTIONS: dict[str, tuple[str, Callable[[Part], str]]] = {
    "faults": ("Kills, full disks, second writers", _faults),
    "inputs": ("Bad inputs", _inputs),
    "fuzz": ("Fuzzing", _fuzz),
    "threads": ("One editor, many threads", _threads),
    "numerics": ("Rounding", _numerics),
    "soak": ("Hours of editing", _soak),
}
