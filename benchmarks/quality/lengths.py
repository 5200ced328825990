"""How long an answer may be: facts whose answers have 1 to 60 tokens, in the template and in chat.

    python -m benchmarks.quality.lengths

The demo's facts get the beginnings of the package's passages as their answers. They are edited as
`meg edit` does it; each is asked through gate and generator.

Writes benchmarks/results/lengths.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.kept import CHAT, kept, work_option
from meg_kernels import Fact, MeGEditor
from meg_kernels.editing.prompting import answers_match
from meg_kernels.pretrained import SMOLLM2, tokenized
from meg_kernels.shipped import demo_facts, shipped_passages
from meg_kernels.storage import write_json

RESULT = Path(__file__).parents[1] / "results" / "lengths.json"
LONGEST = 60  # tokens
IN_A_ROW = 10  # lengths


def of_lengths(facts: Sequence[Fact], passages: Sequence[str], tokenizer: Any) -> list[Fact]:
    """The facts with answers of 1 to `LONGEST` tokens: the beginnings of passages."""
    made = []
    for i, fact in enumerate(facts):
        tokens = 1 + i * (LONGEST - 1) // max(len(facts) - 1, 1)
        ids = tokenized(tokenizer, passages[i % len(passages)], add_special_tokens=False).input_ids
        answer = str(tokenizer.decode(ids[:tokens])).strip().rstrip(" .,;:-")
        made.append(replace(fact, answer=answer))
    return made


def measure(editor: MeGEditor, facts: Sequence[Fact], work: Path | None) -> list[dict[str, Any]]:
    """Rows of facts whose answers have about as many tokens."""
    report = editor.edit(facts, work_folder=work, progress=True)
    unlearnt = {fact.query for fact in report.unlearnt}
    said = editor.generate([fact.query for fact in facts])
    talked = editor.generate([CHAT.messages(fact.query) for fact in facts])
    rows: dict[int, list[dict[str, Any]]] = {}
    for fact, plain, spoken in zip(facts, said, talked, strict=True):
        ids = tokenized(editor.tokenizer, fact.answer, add_special_tokens=False).input_ids
        rows.setdefault((len(ids) - 1) // IN_A_ROW, []).append(
            {
                "learnt": fact.query not in unlearnt,
                "template": answers_match(plain, fact.answer),
                "chat": answers_match(spoken, fact.answer),
            }
        )
    return [
        {
            "tokens": f"{number * IN_A_ROW + 1} to {(number + 1) * IN_A_ROW}",
            "facts": len(row),
            **{kind: sum(each[kind] for each in row) for kind in ("learnt", "template", "chat")},
        }
        for number, row in sorted(rows.items())
    ]


def main() -> None:
    work = work_option(__doc__)
    editor = MeGEditor.for_model(SMOLLM2)
    facts = of_lengths(demo_facts(), shipped_passages(), editor.tokenizer)
    content = kept(RESULT, "lengths") | {
        "facts": len(facts),
        "rows": measure(editor, facts, work),
    }
    write_json(RESULT, content)
    print(json.dumps(content))


if __name__ == "__main__":
    main()
