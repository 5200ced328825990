"""How long it takes to edit facts, and what is edited then: by way, generator and number of facts.

    python -m benchmarks.quality.editing --data ../shared/data --facts 1000 [--prepared FOLDER]
        [--edited FOLDER] [--generators dit,bank]

The first CounterFact facts are edited with a hypernetwork as their generator, from the start or
with what `meg prepare` saved, and the result is saved; or it is loaded, if `meg edit` saved it.
Then the generator is replaced, on the same collected neurons. Each time a sample of the facts is
evaluated, with snapping and without. At last 64 facts that are not among them are added.

Adds a row to benchmarks/results/editing.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.kept import kept
from meg_kernels import EditorConfig, Fact, GeneratorConfig, MeGEditor
from meg_kernels.facts import read_facts
from meg_kernels.pretrained import SMOLLM2
from meg_kernels.storage import write_json

RESULT = Path(__file__).parents[1] / "results" / "editing.json"
ASKED = 200  # facts that are evaluated
ADDED = 64
GENERATORS: dict[str, Callable[[], GeneratorConfig]] = {
    "dit": GeneratorConfig.dit,
    "dit-with-answers": lambda: dataclasses.replace(GeneratorConfig.dit(), with_answers=True),
    "mlp-with-answers": lambda: dataclasses.replace(GeneratorConfig.mlp(), with_answers=True),
    "bank": GeneratorConfig.bank,
}


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def saved_bytes(folder: Path) -> int:
    """What an edited model takes on the disk, but for its text encoder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def quality(editor: MeGEditor, asked: Sequence[Fact]) -> dict[str, Any]:
    """Shares of the questions that are answered as they should, with snapping and without."""
    found = {}
    for snap in (True, False):
        editor.router.config = dataclasses.replace(editor.router.config, snap=snap)
        found["snapped" if snap else "not snapped"] = editor.evaluate(asked).metrics.to_dict()
    editor.router.config = dataclasses.replace(editor.router.config, snap=True)
    return found


def described(editor: MeGEditor, asked: Sequence[Fact]) -> dict[str, Any]:
    """The editor's generator: what it answers, and what it takes on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        editor.save_pretrained(Path(folder) / "edited")
        size = saved_bytes(Path(folder) / "edited")
    edits = editor.edits
    config = edits.generator.config
    answers = " with answers" if config.knows_answers and config.kind != "hypernetwork" else ""
    return {
        "generator": config.kind + answers,
        "seconds": edits.report.seconds.get("generator", 0.0),
        "generated": int(edits.generated.sum()),
        "bytes": size,
        **quality(editor, asked),
    }


def run(
    facts: Sequence[Fact],
    others: Sequence[Fact],
    generators: Sequence[str],
    prepared: Path | None = None,
    edited: Path | None = None,
    tuning: Sequence[Fact] | None = None,
) -> dict[str, Any]:
    """Edit facts, and describe what came of it.

    Args:
        facts: that are edited.
        others: some that are added afterwards.
        generators: kinds that take the hypernetwork's place.
        prepared: what to edit with; None: the start.
        edited: what was edited before; None: nothing.
        tuning: facts to tune with; None: the package's.
    """
    started = time.perf_counter()
    if edited is not None:
        editor, report = MeGEditor.from_pretrained(edited), None
    elif prepared is not None:
        editor = MeGEditor.from_pretrained(prepared)
        report = editor.add(facts, progress=True)
    else:
        config = EditorConfig(generator=GeneratorConfig.hypernetwork())
        editor = MeGEditor.for_model(SMOLLM2, config)
        report = editor.edit(facts, tuning_facts=tuning, progress=True)
    with tempfile.TemporaryDirectory() as folder:
        editor.save_pretrained(Path(folder) / "edited")
    seconds = time.perf_counter() - started
    row: dict[str, Any] = {
        "facts": len(facts),
        "way": "loaded" if edited else "prepared" if prepared else "from the start",
        "seconds": seconds,
        "stages": editor.edits.report.seconds if report is None else report.seconds,
        "learnt": int(editor.edits.learnt.sum()),
        "predicted": None if report is None else report.num_predicted,
        "peak_mib": peak_mib(),
    }
    print(json.dumps(row), flush=True)
    asked = random.Random(0).sample(list(facts), min(ASKED, len(facts)))
    row["generators"] = [described(editor, asked)]
    started = time.perf_counter()
    added = editor.add(others)
    row["added"] = {
        "facts": len(others),
        "seconds": time.perf_counter() - started,
        "predicted": added.num_predicted,
    }
    print(json.dumps(row["added"]), flush=True)
    editor.remove(others)
    for kind in generators:
        editor.replace_generator(GENERATORS[kind](), progress=True)
        row["generators"].append(described(editor, asked))
        print(json.dumps(row["generators"][-1]), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--facts", type=int, default=1000, help="that are edited")
    parser.add_argument("--prepared", type=Path, help="edit with what `meg prepare` saved here")
    parser.add_argument("--edited", type=Path, help="take what `meg edit` saved here")
    parser.add_argument("--generators", default="bank", help="that are compared, such as dit,bank")
    options = parser.parse_args()
    every = read_facts(options.data / "counterfact_10k.json", on_conflict="first")
    facts = every[: options.facts]
    names = {fact.normalized_query for fact in facts}
    zsre = read_facts(options.data / "zsre_1000.json", on_conflict="first")
    others = every[options.facts : options.facts + ADDED] or zsre[:ADDED]
    others = [fact for fact in others if fact.normalized_query not in names]
    generators = [kind for kind in options.generators.split(",") if kind]
    row = run(facts, others, generators, options.prepared, options.edited)
    content = kept(RESULT, "editing")
    same = [r for r in content["rows"] if (r["facts"], r["way"]) != (row["facts"], row["way"])]
    content["rows"] = sorted([*same, row], key=lambda r: (r["facts"], r["way"]))
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
