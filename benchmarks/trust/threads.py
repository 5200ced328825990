"""One editor, many threads and asyncio tasks: is each answered as it is alone?

    meg demo --out build/demo
    python -m benchmarks.trust.threads build/demo [--calls 10000]

Half of the calls come from 8 threads, half from 8 asyncio tasks that call by `asyncio.to_thread`.
Each is one of five kinds, drawn at random: an edited answer, the base model's answer, the base
model's inside a `routed` block, a plain call of the model's own `generate` beside all that, and
edited answers to two queries. Every one is compared, word for word, with what the same call gave
alone. Afterwards the model's modules must be as they were.

Writes its part of benchmarks/results/trust.json.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.trust import record
from meg_kernels import MeGEditor

WORKERS = 8
TOKENS = 4


@dataclass(frozen=True)
class Call:
    """One call of an editor."""

    kind: str
    queries: tuple[str, ...]


def kinds(editor: MeGEditor) -> dict[str, Callable[[tuple[str, ...]], list[str]]]:
    """How each kind of call is made."""

    def inside(queries: tuple[str, ...]) -> list[str]:
        with editor.routed(queries):
            return editor.generate_base(queries, TOKENS)

    def plain(queries: tuple[str, ...]) -> list[str]:
        prompted = editor.prompted
        answers = prompted.answers([prompted.prompt(query) for query in queries], TOKENS)
        return [prompted.text(answer) for answer in answers]

    return {
        "edited": lambda queries: editor.generate(queries, TOKENS),
        "base": lambda queries: editor.generate_base(queries, TOKENS),
        "base inside routed": inside,
        "plain model": plain,
        "two edited": lambda queries: editor.generate(queries, TOKENS),
    }


def some_calls(editor: MeGEditor, count: int, seed: int) -> Iterator[Call]:
    """Calls drawn at random, of edited queries, their paraphrases and queries beside them."""
    facts = editor.facts[:12]
    asked = [q for f in facts for q in (f.query, *f.paraphrases[:1])]
    asked += [other.query for fact in facts for other in fact.locality[:1]]
    draw = random.Random(seed)
    pairs = [tuple(draw.sample(asked, 2)) for _ in range(len(asked))]
    names = list(kinds(editor))
    for _ in range(count):
        kind = draw.choice(names)
        queries = draw.choice(pairs) if kind == "two edited" else (draw.choice(asked),)
        yield Call(kind, queries)


def ask(
    editor: MeGEditor, calls: Iterable[Call], alone: dict[Call, list[str]], bar: tqdm
) -> Counter[str]:
    """Make these calls one after the other; counts those that were answered in another way."""
    make, wrong = kinds(editor), Counter[str]()
    for call in calls:
        wrong[call.kind] += make[call.kind](call.queries) != alone[call]
        bar.update()
    return wrong


async def ask_as_task(
    editor: MeGEditor, calls: Iterable[Call], alone: dict[Call, list[str]], bar: tqdm
) -> Counter[str]:
    """`ask`, of an asyncio task."""
    make, wrong = kinds(editor), Counter[str]()
    for call in calls:
        said = await asyncio.to_thread(make[call.kind], call.queries)
        wrong[call.kind] += said != alone[call]
        bar.update()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an edited model")
    parser.add_argument("--calls", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the threads share the cores
    editor = MeGEditor.from_pretrained(arguments.folder, device="cpu")
    each = arguments.calls // (2 * WORKERS)
    shares = [list(some_calls(editor, each, seed)) for seed in range(2 * WORKERS)]
    make = kinds(editor)
    distinct = dict.fromkeys(call for share in shares for call in share)
    modules = [(id(module), sorted(vars(module))) for module in editor.model.modules()]
    with editor.serving():
        alone = {
            call: make[call.kind](call.queries) for call in tqdm(distinct, desc="each call alone")
        }
        started = time.perf_counter()
        with tqdm(total=2 * WORKERS * each, desc="all at once") as bar:

            async def tasks() -> list[Counter[str]]:
                given = [ask_as_task(editor, share, alone, bar) for share in shares[WORKERS:]]
                return await asyncio.gather(*given)

            with ThreadPoolExecutor(WORKERS) as pool:
                waiting = [
                    pool.submit(ask, editor, share, alone, bar) for share in shares[:WORKERS]
                ]
                wrong = sum(asyncio.run(tasks()), Counter[str]())
                wrong = sum((future.result() for future in waiting), wrong)
        seconds = time.perf_counter() - started
    made = Counter(call.kind for share in shares for call in share)
    left = modules != [(id(module), sorted(vars(module))) for module in editor.model.modules()]
    for kind, count in made.items():
        print(f"{kind:20} {count:6} calls, {wrong[kind]} answered in another way")
    print(f"{seconds:.0f} s; the model's modules are {'NOT ' if left else ''}as they were")
    record(
        "threads",
        {
            "model": editor.name,
            "edited_facts": len(editor.facts),
            "threads": WORKERS,
            "tasks": WORKERS,
            "calls": dict(made),
            "wrong": {kind: wrong[kind] for kind in made},
            "modules_changed": left,
            "seconds": round(seconds),
        },
    )
    if left or any(wrong.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
