"""Whether an edited question is answered within other text, beside what the base model does there.

    python -m benchmarks.quality.documents

The demo's facts are edited as `meg edit` does it, and asked in chat at the start, in the middle and
at the end of so many tokens of other text. A small model overlooks questions in long texts whether
they are edited or not: so the base model is asked, in the same texts, questions of the package that
it answers rightly when they stand alone.

And they are asked as people type: with a letter missing, doubled or swapped, in lower case, and
without punctuation; beside them as they are.

Writes benchmarks/results/documents.json.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.gate import LENGTHS, MISSPELT, around, misspelt
from benchmarks.quality.kept import CHAT, kept, work_option
from meg_kernels import Fact, MeGEditor
from meg_kernels.editing.by_context import contains
from meg_kernels.pretrained import SMOLLM2
from meg_kernels.shipped import demo_facts, shipped_tuning_facts
from meg_kernels.storage import write_json
from meg_kernels.texts import is_question

RESULT = Path(__file__).parents[1] / "results" / "documents.json"
ASKED = 32  # questions of each kind, at each place of each length
ANSWER = 48  # tokens, at most
AT_ONCE = 8


def answered(editor: MeGEditor, facts: Sequence[Fact], texts: Sequence[str], base: bool) -> float:
    """Share of messages whose answer contains the fact's."""
    ask = editor.generate_base if base else editor.generate
    talks = [CHAT.messages(text) for text in texts]
    said = [
        answer
        for i in range(0, len(talks), AT_ONCE)
        for answer in ask(talks[i : i + AT_ONCE], ANSWER)
    ]
    return fmean(contains(text, fact.answer) for text, fact in zip(said, facts, strict=True))


def known_to(editor: MeGEditor, count: int) -> list[Fact]:
    """Questions of the package that the base model answers rightly when they stand alone."""
    asked = [fact for fact in shipped_tuning_facts() if is_question(fact.query)]
    known: list[Fact] = []
    for i in range(0, len(asked), 64):
        some = asked[i : i + 64]
        said = editor.generate_base([CHAT.messages(fact.query) for fact in some], ANSWER)
        known += [f for f, text in zip(some, said, strict=True) if contains(text, f.answer)]
        if len(known) >= count:
            break
    return known[:count]


def measure(editor: MeGEditor, edited: Sequence[Fact], known: Sequence[Fact]) -> list[dict]:
    """A row for each length and place."""
    draw, rows = random.Random(0), []
    for length in LENGTHS:
        for place in ("start", "middle", "end"):

            def within(facts: Sequence[Fact], length: int = length, place: str = place):
                return [around(fact.query, length, place, editor.router, draw) for fact in facts]

            texts = within(edited)
            routing = editor.route([CHAT.messages(text) for text in texts])
            found = zip(routing.answers(), edited, strict=True)
            rows.append(
                {
                    "tokens": length,
                    "place": place,
                    "found": fmean(answer == fact.answer for answer, fact in found),
                    "answered": answered(editor, edited, texts, base=False),
                    "base": answered(editor, known, within(known), base=True),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def as_typed(editor: MeGEditor, facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """A row for each way to type the facts' questions: what is found, and what is answered."""
    draw, rows = random.Random(0), []
    for kind in ("plain", *MISSPELT):
        texts = [f.query if kind == "plain" else misspelt(kind, f.query, draw) for f in facts]
        found = zip(editor.route(texts).answers(), facts, strict=True)
        said = zip(editor.generate(texts, ANSWER), facts, strict=True)
        rows.append(
            {
                "typed": kind,
                "found": fmean(answer == fact.answer for answer, fact in found),
                "template": fmean(contains(text, fact.answer) for text, fact in said),
                "chat": answered(editor, facts, texts, base=False),
            }
        )
    return rows


def main() -> None:
    work = work_option(__doc__)
    editor = MeGEditor.for_model(SMOLLM2)
    facts = demo_facts()
    editor.edit(facts, work_folder=work, progress=True)
    edited = [fact for fact in facts if is_question(fact.query)][:ASKED]
    with editor.serving():
        content: dict[str, Any] = kept(RESULT, "documents")
        if not content["rows"]:
            known = known_to(editor, ASKED)
            content |= {
                "edited": len(edited),
                "known": len(known),
                "alone": answered(editor, edited, [fact.query for fact in edited], base=False),
                "rows": measure(editor, edited, known),
            }
        content["typed"] = as_typed(editor, facts)
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
