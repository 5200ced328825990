"""The facts and queries that the package ships, all written for it.

`demo_facts.jsonl` are edited by `meg demo`; `tuning_facts.jsonl`, of other subjects, tune encoder
and gate; `unrelated_queries.jsonl` are queries of all sorts, for the gate; `passages.jsonl` is
prose of all sorts, for perplexity.
"""

from __future__ import annotations

import json
from pathlib import Path

from meg_kernels.facts import Fact, read_facts

_FOLDER = Path(__file__).parent / "data"


def demo_facts() -> list[Fact]:
    """64 counterfactual facts with 3 paraphrases and 3 locality queries each."""
    return read_facts(_FOLDER / "demo_facts.jsonl")


def shipped_tuning_facts() -> list[Fact]:
    """423 facts with 3 paraphrases each, of other subjects than the demo's."""
    return read_facts(_FOLDER / "tuning_facts.jsonl")


def shipped_unrelated_queries() -> list[str]:
    """300 queries of all sorts."""
    lines = (_FOLDER / "unrelated_queries.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["query"] for line in lines]


def shipped_passages() -> list[str]:
    """24 passages of prose, 2,715 words, each on another topic."""
    lines = (_FOLDER / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
