"""Facts in five languages: what the gate makes of them, and how the edited model answers.

    python -m benchmarks.quality.languages --work FOLDER

`languages.jsonl` holds twenty counterfactual facts in each of German, Spanish, Russian, Chinese and
Arabic, each with one other wording and one question that looks like it: the same about another
subject. SmolLM2 is edited with all of them at once, as `meg edit` does it, with the default encoder
and with the multilingual one. Collected neurons are kept in --work, and serve both.

Writes benchmarks/results/languages.json; encoders that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.gate import found, taken
from benchmarks.quality.kept import CHAT, kept
from meg_kernels import Fact, MeGEditor
from meg_kernels.facts import read_facts
from meg_kernels.pretrained import DEFAULT_ENCODER, MULTILINGUAL_ENCODER
from meg_kernels.routing.router import Router
from meg_kernels.storage import write_json

FACTS = Path(__file__).with_name("languages.jsonl")
RESULT = Path(__file__).parents[1] / "results" / "languages.json"
LANGUAGES = {
    "de": "German",
    "es": "Spanish",
    "ru": "Russian",
    "zh": "Chinese",
    "ar": "Arabic",
}
CHAT_TOKENS = 32  # of an answer in a conversation


def language_of(fact: Fact) -> str:
    """The language of one of the study's facts.

    >>> language_of(Fact("谁发明了飞机？", "爱迪生", "zh-03"))
    'Chinese'
    """
    return LANGUAGES[fact.id.partition("-")[0]]


def by_language(facts: Sequence[Fact]) -> dict[str, list[int]]:
    """The places of the facts of each language."""
    places: dict[str, list[int]] = {}
    for place, fact in enumerate(facts):
        places.setdefault(language_of(fact), []).append(place)
    return places


@contextmanager
def without_names(router: Router) -> Iterator[None]:
    """Inside, a query need not name its fact's subject."""
    config = router.config
    router.config = dataclasses.replace(config, require_subject=False)
    try:
        yield
    finally:
        router.config = config


def gate_shares(router: Router, facts: Sequence[Fact], places: Sequence[int]) -> dict[str, float]:
    """Queries and other wordings that are taken for their fact, and look-alikes for none."""
    own = [facts[i].query for i in places]
    others = [(text, i) for i in places for text in facts[i].paraphrases]
    local = [other.query for i in places for other in facts[i].locality]
    return {
        "own": found(router, own, places),
        "paraphrases": found(router, [text for text, _ in others], [i for _, i in others]),
        "locality": 1 - (taken(router, local) or 0.0),
    }


def nearest_is_own(router: Router, facts: Sequence[Fact]) -> float:
    """Share of the other wordings to whose conditions their own fact's is the nearest."""
    asked = [(text, i) for i, fact in enumerate(facts) for text in fact.paraphrases]
    conditions = router.encode([fact.query for fact in facts])
    nearest = (router.encode([text for text, _ in asked]) @ conditions.T).argmax(1)
    return float((nearest.cpu() == torch.tensor([i for _, i in asked])).double().mean())


def seconds_a_query(router: Router, facts: Sequence[Fact]) -> float:
    """Mean seconds of one condition, one query at a time."""
    router.encode([facts[0].query])
    started = time.perf_counter()
    for fact in facts:
        router.encode([fact.query])
    return (time.perf_counter() - started) / len(facts)


def measure(encoder: str, facts: Sequence[Fact], work: Path) -> dict[str, Any]:
    """One row: the model edited with this encoder, its gate and its answers in each language."""
    editor = MeGEditor.for_model("smollm2", encoder=encoder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = editor.edit(facts, work_folder=work, progress=True)
    warned = [str(w.message) for w in said if "hardly tells" in str(w.message)]
    router = editor.router
    row: dict[str, Any] = {
        "encoder": encoder,
        "facts": len(facts),
        "seconds": report.seconds,
        "unlearnt": [fact.id for fact in report.unlearnt],
        "warned": warned,
        "calibration": dataclasses.asdict(editor.edits.calibration),
        "nearest_is_own": nearest_is_own(router, facts),
        "seconds_a_query": seconds_a_query(router, facts),
        "languages": {},
    }
    for language, places in by_language(facts).items():
        chosen = [facts[i] for i in places]
        answers = editor.evaluate(chosen, work_folder=work, progress=True)
        own = [dataclasses.replace(fact, paraphrases=()) for fact in chosen]
        talked = editor.evaluate_by_context(
            own, [CHAT], max_new_tokens=CHAT_TOKENS, work_folder=work, progress=True
        )
        row["languages"][language] = {
            "gate": gate_shares(router, facts, places),
            "metrics": answers.metrics.to_dict(),
            "base": answers.base.to_dict(),
            "collected": answers.collected.to_dict() if answers.collected else None,
            "chat": dataclasses.asdict(talked.contexts["chat"]),
        }
        with without_names(router):
            row["languages"][language]["without_names"] = gate_shares(router, facts, places)
    row["protocol"] = answers.protocol
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="keeps finished work")
    parser.add_argument("--encoders", nargs="+", default=[DEFAULT_ENCODER, MULTILINGUAL_ENCODER])
    options = parser.parse_args()
    content = kept(RESULT, "languages")
    facts = read_facts(FACTS)
    for encoder in options.encoders:
        if any(row["encoder"] == encoder for row in content["rows"]):
            continue
        content["rows"].append(measure(encoder, facts, options.work))
        write_json(RESULT, content)


if __name__ == "__main__":
    main()
