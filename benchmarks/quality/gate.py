"""What the gate makes of people's questions, with nothing to tune on but what the package ships.

    python -m benchmarks.quality.gate --data ../shared/data [--facts 64 500] [--encoder hidden]

A user has a file of facts and no others like them. The encoder is tuned and the gate calibrated as
`meg edit` does it; then the facts' paraphrases and locality queries are asked: plain, misspelt, in
lower case, without punctuation, and at the start, in the middle and at the end of other text. A
query that is not taken for its fact has the base model's answer, and so has one that is taken for
none: Generality and Locality are bounded by these shares. No language model is asked.

Of HalluEditBench, yes and no questions about the edited facts are asked, too.

With `--encoder hidden`, conditions are the language model's own hidden states, a mean over the
tokens behind its middle layer, tuned in the same way.

Writes benchmarks/results/gate.json; rows that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.kept import kept
from meg_kernels import EditorConfig, Fact, GeneratorConfig, TextEncoder
from meg_kernels.editing.tuning import calibrated_gate, tuned_router, usable_for_tuning
from meg_kernels.facts import read_facts
from meg_kernels.familiarity import Calibration
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.pretrained import SMOLLM2, load_language_model
from meg_kernels.routing.edits import EditReport, Edits
from meg_kernels.routing.generators import build_generator
from meg_kernels.routing.router import Router, RoutingConfig
from meg_kernels.shipped import (
    demo_facts,
    shipped_passages,
    shipped_tuning_facts,
    shipped_unrelated_queries,
)
from meg_kernels.storage import write_json

RESULT = Path(__file__).parents[1] / "results" / "gate.json"
LENGTHS = (150, 500, 1500)  # tokens of other text around a question
IN_DOCUMENTS = 64  # questions at each place of each length
CONVERSATIONS = 200


def hidden_states() -> TextEncoder:
    """An encoder of the lower half of the language model."""
    model, tokenizer = load_language_model(SMOLLM2)
    lower: Any = model.base_model
    lower.layers = lower.layers[: len(lower.layers) // 2]
    lower.config.num_hidden_layers = len(lower.layers)
    return TextEncoder(lower, tokenizer)


ENCODERS = {"default": TextEncoder.from_pretrained, "hidden": hidden_states}


def misspelt(kind: str, query: str, draw: random.Random) -> str:
    """The query with a letter within a word missing, doubled or swapped with the next one.

    >>> misspelt("lower", "Who wrote Emma?", random.Random(0))
    'who wrote emma?'
    """
    if kind == "lower":
        return query.lower()
    if kind == "bare":
        return query.rstrip("?.! ").replace(",", "").replace("'", "")
    inner = [i for i in range(1, len(query) - 1) if query[i - 1 : i + 2].isalpha()]
    if not inner:
        return query
    i = draw.choice(inner)
    before, one, rest = query[:i], query[i], query[i + 1 :]
    changed = {"missing": "", "doubled": one + one, "swapped": rest[0] + one}[kind]
    return before + changed + (rest[1:] if kind == "swapped" else rest)


MISSPELT = ("missing", "doubled", "swapped", "lower", "bare")


def halluedit(path: Path, count: int) -> tuple[list[Fact], list[str]]:
    """Facts of HalluEditBench, drawn with a seed, and the yes and no questions about them."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    facts = [
        Fact(
            row["question"],
            row["object"].rstrip("."),  # one has four of them behind it
            f"row-{i}",
            row["subject"],
            row["relation"],
            (row["paraphrased_question"],),
            (row["locality_question"],),
        )
        for i, row in enumerate(rows)
    ]
    by_query: dict[str, Fact] = {}
    for fact in facts:
        by_query.setdefault(fact.normalized_query, fact)
    first = [*by_query.values()][:count]
    asked = {fact.id for fact in first}
    chosen = [row for i, row in enumerate(rows) if f"row-{i}" in asked]
    return first, [row[name] for row in chosen for name in ("yes_question", "no_question")]


def data_sets(folder: Path, count: int) -> dict[str, Callable[[], tuple[list[Fact], list[str]]]]:
    """How each data set is read: its facts, and yes and no questions about them."""
    return {
        "demo": lambda: (demo_facts()[:count], []),
        "CounterFact": lambda: (
            read_facts(folder / "counterfact_500.json", on_conflict="first")[:count],
            [],
        ),
        "ZsRE": lambda: (read_facts(folder / "zsre_1000.json", zsre_target="answers")[:count], []),
        "HalluEditBench": lambda: halluedit(folder / "hallueditbench.csv", count),
    }


def routed_by(
    facts: Sequence[Fact], config: EditorConfig, encoder: TextEncoder | None = None
) -> tuple[Router, Calibration, float]:
    """A router over facts whose neurons nobody collected, its calibration and tuning's seconds."""
    router = Router(TextEncoder.from_pretrained() if encoder is None else encoder)
    wordings = usable_for_tuning(shipped_tuning_facts(), facts, config)
    started = time.perf_counter()
    router, held_out, _ = tuned_router(
        router, wordings, shipped_unrelated_queries(), config, None, progress=True
    )
    seconds = time.perf_counter() - started
    conditions = router.encode([fact.query for fact in facts])
    gate, calibration = calibrated_gate(facts, conditions, held_out, config, progress=False)
    layout = NeuronLayout(1, 1, False, "identity")
    neurons = layout.unpack(torch.zeros(len(facts), layout.dim))
    generator = build_generator(GeneratorConfig.bank(), layout, conditions.shape[1])
    router.put(
        Edits(
            tuple(facts),
            conditions,
            neurons,
            Neurons.cat([neurons[:1]]),
            held_out,
            gate,
            generator,
            torch.ones(len(facts), dtype=torch.bool),
            EditReport((), calibration, None, {}),
        ),
        config=config.routing,
    )
    return router, calibration, seconds


def found(router: Router, asked: Sequence[str], owners: Sequence[int]) -> float:
    """Share of the texts that are taken for their own fact."""
    routing = router.route(asked)
    return float((routing.accepted & (routing.fact == torch.tensor(owners))).double().mean())


def taken(router: Router, asked: Iterable[Any]) -> float | None:
    """Share of the prompts that are taken for any fact; None if there are none."""
    prompts = [*asked]
    return float(router.route(prompts).accepted.double().mean()) if prompts else None


def around(query: str, tokens: int, place: str, router: Router, draw: random.Random) -> str:
    """The query at the start, in the middle or at the end of so many tokens of other text."""
    passages, sentences, count = shipped_passages(), [], 0
    while count < tokens:
        passage = draw.choice(passages)
        sentences.append(passage)
        count += len(router.encoder.tokenizer(passage, verbose=False).input_ids)
    at = {"start": 0, "middle": len(sentences) // 2, "end": len(sentences)}[place]
    if place == "middle" and len(sentences) < 2:  # within the one passage
        half = sentences[0].find(". ", len(sentences[0]) // 2) + 2
        sentences = [sentences[0][:half], sentences[0][half:]]
        at = 1
    return " ".join([*sentences[:at], query, *sentences[at:]])


def conversations(draw: random.Random) -> list[list[dict[str, str]]]:
    """Conversations of several turns about other things."""
    queries, passages = shipped_unrelated_queries(), shipped_passages()
    made = []
    for _ in range(CONVERSATIONS):
        messages = []
        for query in draw.sample(queries, 3):
            messages += [
                {"role": "user", "content": query},
                {"role": "assistant", "content": draw.choice(passages)},
            ]
        made.append([*messages, {"role": "user", "content": draw.choice(queries)}])
    return made


def measure(
    facts: Sequence[Fact], yes_no: Sequence[str], encoder: TextEncoder | None = None
) -> dict[str, Any]:
    """One row: what the gate over these facts makes of what is asked about them."""
    config = EditorConfig()
    router, calibration, seconds = routed_by(facts, config, encoder)
    draw = random.Random(1)
    own = [(fact.query, i) for i, fact in enumerate(facts)]
    others = [(text, i) for i, fact in enumerate(facts) for text in fact.paraphrases]
    local = [other.query for fact in facts for other in fact.locality]

    def share(pairs: Sequence[tuple[str, int]]) -> float:
        return found(router, [text for text, _ in pairs], [i for _, i in pairs])

    def changed(kind: str) -> float:
        return share([(misspelt(kind, text, draw), i) for text, i in [*own, *others]])

    clean = share([*own, *others])
    questions = [pair for pair in own if pair[0].rstrip().endswith("?")]
    asked = draw.sample(questions, min(IN_DOCUMENTS, len(questions)))
    row: dict[str, Any] = {
        "facts": len(facts),
        "seconds": seconds,
        "calibration": dataclasses.asdict(calibration),
        "own": share(own),
        "paraphrases": share(others),
        "locality": 1 - (taken(router, local) or 0.0),
        "yes_no": taken(router, yes_no),
        "misspelt": {kind: changed(kind) / clean for kind in MISSPELT},
        "documents": {
            f"{length} {place}": share(
                [(around(text, length, place, router, draw), i) for text, i in asked]
            )
            for length in LENGTHS
            for place in ("start", "middle", "end")
        }
        if asked
        else {},
        "conversations": taken(router, conversations(draw)),
    }
    router.config = RoutingConfig(require_subject=False)
    row["without_names"] = {
        "paraphrases": share(others),
        "locality": 1 - (taken(router, local) or 0.0),
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--facts", type=int, nargs="+", default=[64, 500])
    parser.add_argument("--sets", nargs="+", help="of the data sets; default: all")
    parser.add_argument("--encoder", choices=[*ENCODERS], default="default")
    options = parser.parse_args()
    content = kept(RESULT, "gate")
    for count in options.facts:
        for name, facts_of in data_sets(options.data, count).items():
            if name not in (options.sets or [name]):
                continue
            facts, yes_no = facts_of()
            about = {"data": name, "encoder": options.encoder, "facts": len(facts)}
            if any(about.items() <= row.items() for row in content["rows"]):
                continue
            row = about | measure(facts, yes_no, ENCODERS[options.encoder]())
            content = kept(RESULT, "gate")
            content["rows"].append(row)
            write_json(RESULT, content)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
