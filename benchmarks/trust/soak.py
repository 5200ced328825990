"""Edit, ask, add, change, remove and train, for hours: does memory grow, and is every answer right?

    python -m benchmarks.trust.soak [--minutes 120] [--model smollm2] [--generator mlp]

A round adds some of the package's facts to an editor, changes answers, asks, evaluates a few,
removes, trains, saves and loads; what is edited is kept in a dictionary beside the editor, and
each answer that the editor gives is compared with it. After each round the resident memory, the
open files and the threads of the process are noted; the slope of the memory is fitted over all
rounds but the first tenth, in which caches fill.

Writes its part of benchmarks/results/trust.json if the run was an hour or longer; `--minutes 2` is
what CI runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.trust import record
from meg_kernels import EditorConfig, Fact, GeneratorConfig, MeGEditor
from meg_kernels.shipped import demo_facts

SHORTEST_RECORDED = 60  # minutes
FEWEST_ROUNDS = 2
AT_ONCE = 6
GENERATORS = {"mlp": GeneratorConfig.mlp, "bank": GeneratorConfig.bank}  # a bank learns nothing


def resident_bytes() -> int:
    """What the process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(minutes: list[float], values: list[float]) -> float:
    """The least-squares slope of values over minutes.

    >>> round(slope([0.0, 1.0, 2.0], [5.0, 7.0, 9.0]), 6)
    2.0
    """
    x, y = torch.tensor(minutes).double(), torch.tensor(values).double()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


class Life:
    """An editor, and a dictionary that says what it must answer."""

    def __init__(self, folder: Path, model: str, generator: GeneratorConfig, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.pool = demo_facts()
        config = EditorConfig(generator=generator)
        self.editor = MeGEditor.for_model(model, config, device="cpu")
        self.edited: dict[str, Fact] = {}
        self.asked = self.wrong = 0
        self.editor.edit(self.pool[:AT_ONCE])
        self.edited = {fact.query: fact for fact in self.pool[:AT_ONCE]}

    def round(self) -> None:
        """One of each verb."""
        editor, draw = self.editor, self.draw
        free = [fact for fact in self.pool if fact.query not in self.edited]
        added = draw.sample(free, min(AT_ONCE, len(free)))
        if added:
            editor.add(added)
            self.edited |= {fact.query: fact for fact in added}
        changed = draw.choice([*self.edited.values()])
        other = draw.choice([f for f in self.pool if f.answer != changed.answer])
        changed = dataclasses.replace(changed, answer=other.answer, id="")
        editor.add([changed], replace=True)
        self.edited[changed.query] = changed
        self.ask()
        gone = draw.sample([*self.edited], min(AT_ONCE, len(self.edited) - 2))
        editor.remove(gone)
        for query in gone:
            del self.edited[query]
        editor.train()
        editor.save_pretrained(self.folder)
        editor.detach()
        self.editor = MeGEditor.from_pretrained(self.folder, editor.model, editor.tokenizer)
        self.ask()

    def ask(self) -> None:
        """Every edited fact that could be learnt is answered as the dictionary says."""
        unlearnt = {fact.query for fact in self.editor.edits.report.unlearnt}
        queries = [query for query in self.edited if query not in unlearnt]
        said = self.editor.generate(queries, 16)
        self.asked += len(queries)
        self.wrong += sum(
            answer != self.edited[query].answer for query, answer in zip(queries, said, strict=True)
        )
        assert {fact.query for fact in self.editor.facts} == set(self.edited)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--generator", choices=GENERATORS, default="mlp")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    minutes: list[float] = []
    resident: list[float] = []
    handles: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        generator = GENERATORS[arguments.generator]()
        life = Life(Path(folder) / "edited", arguments.model, generator, arguments.seed)
        now = 0.0
        while now < arguments.minutes or len(minutes) < FEWEST_ROUNDS:  # on a slow machine, too
            life.round()
            gc.collect()
            now = (time.perf_counter() - started) / 60
            minutes.append(now)
            resident.append(resident_bytes() / 2**20)
            handles.append(len(os.listdir("/proc/self/fd")))
            print(
                f"{now:6.1f} min, round {len(minutes)}: {resident[-1]:.0f} MiB, {handles[-1]} open "
                f"files, {threading.active_count()} threads; {life.wrong} of {life.asked} answers "
                "are wrong",
                flush=True,
            )
    warm = len(minutes) // 10
    grows = slope(minutes[warm:], resident[warm:]) if len(minutes) > warm + 1 else float("nan")
    print(f"memory grows by {grows * 60:.1f} MiB an hour over {len(minutes)} rounds")
    if arguments.minutes >= SHORTEST_RECORDED:
        record(
            "soak",
            {
                "model": arguments.model,
                "generator": arguments.generator,
                "hours": round(minutes[-1] / 60, 2),
                "rounds": len(minutes),
                "answers": life.asked,
                "wrong": life.wrong,
                "mib_per_hour": round(grows * 60, 2),
                "resident_mib": [round(resident[warm]), round(resident[-1])],
                "open_files": [handles[warm], handles[-1]],
            },
        )
    if life.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
