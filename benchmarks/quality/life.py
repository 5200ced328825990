"""The life of an edited model: facts are added, taken back and changed; what does the rest do?

    meg edit ../shared/data/counterfact_500.json --limit 256 --out build/edited
    python -m benchmarks.quality.life build/edited ../shared/data/counterfact_500.json

Adds 64 facts of the file, the first that are not edited, removes 32 edited ones, and changes the
answers of 16 others, each to the answer of the next; then trains the generator further on all of
that. The queries and paraphrases of the other facts and the locality queries of all are asked
before and after each. Answers that are not the same, word for word, are counted, and of those to
the other facts the ones that were right and are wrong now or the other way about. Seconds are
beside those that the model's first edit took.

Writes benchmarks/results/life.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.auto import trange

from meg_kernels import Fact, MeGEditor
from meg_kernels.editing.prompting import answers_match
from meg_kernels.facts import read_facts
from meg_kernels.storage import write_json

RESULT = Path(__file__).parents[1] / "results" / "life.json"
ADDED, REMOVED, CHANGED = 64, 32, 16
AT_ONCE = 64


def asked(facts: Sequence[Fact]) -> list[str]:
    """The queries and paraphrases of facts."""
    return [query for fact in facts for query in (fact.query, *fact.paraphrases)]


def answers(editor: MeGEditor, queries: Sequence[str]) -> dict[str, str]:
    queries = sorted(dict.fromkeys(queries), key=len)
    said: list[str] = []
    starts = trange(0, len(queries), AT_ONCE, desc="asking", leave=False)
    with editor.serving():
        for start in starts:
            said += editor.generate(queries[start : start + AT_ONCE], 16)
    return dict(zip(queries, said, strict=True))


def right(facts: Sequence[Fact], said: Mapping[str, str]) -> set[str]:
    """The queries and paraphrases of facts that are answered with the facts' answers."""
    return {
        query
        for fact in facts
        for query in asked([fact])
        if answers_match(said[query], fact.answer)
    }


@dataclass
class Life:
    """An edited model, asked everything after each change of its edits.

    Args:
        editor: as it was saved.
        facts: that are asked about, edited or not.
        first_edit: seconds that it took.
    """

    editor: MeGEditor
    facts: Sequence[Fact]
    first_edit: float

    def __post_init__(self) -> None:
        local = [query.query for fact in self.facts for query in fact.locality]
        self.queries = [*asked(self.facts), *local]
        self.said = answers(self.editor, self.queries)

    def change(
        self, what: str, run: Callable[[], Any], touched: Sequence[Fact] = ()
    ) -> dict[str, Any]:
        """Run one change of the edits, and tell what it took and what else it changed.

        Args:
            what: the change's name, in the table.
            run: makes it.
            touched: facts that are meant to be answered otherwise afterwards.
        """
        queries = {fact.normalized_query for fact in self.facts}
        queries -= {fact.normalized_query for fact in touched}
        others = [fact for fact in self.editor.facts if fact.normalized_query in queries]
        local = [query.query for fact in self.facts for query in fact.locality]
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        before, self.said = self.said, answers(self.editor, self.queries)
        row = {
            "what": what,
            "seconds": seconds,
            "of_first_edit": seconds / self.first_edit,
        }
        for kind, texts in (("other facts", {*asked(others)}), ("locality", {*local})):
            changed = sum(before[query] != self.said[query] for query in texts)
            row[kind] = {"asked": len(texts), "changed": changed}
        was, now = right(others, before), right(others, self.said)
        row["other facts"] |= {"lost": len(was - now), "gained": len(now - was)}
        print(json.dumps(row), flush=True)
        return row

    def right(self, facts: Sequence[Fact]) -> float:
        """The share of these facts' queries that are answered with their answer now."""
        return fmean(answers_match(self.said[fact.query], fact.answer) for fact in facts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `meg edit` saved")
    parser.add_argument("data", type=Path, help="a file of facts, to add some that are not edited")
    parser.add_argument("--asked", type=int, help="ask about so many of the other facts only")
    arguments = parser.parse_args()
    editor = MeGEditor.from_pretrained(arguments.folder)
    known = {fact.normalized_query for fact in editor.facts}
    facts = read_facts(arguments.data, on_conflict="first")
    added = [fact for fact in facts if fact.normalized_query not in known][:ADDED]
    removed, changing = editor.facts[:REMOVED], editor.facts[REMOVED : REMOVED + CHANGED]
    next_answers = [fact.answer for fact in (*changing[1:], changing[0])]
    changed = [
        dataclasses.replace(fact, answer=answer)
        for fact, answer in zip(changing, next_answers, strict=True)
    ]
    base = editor.generate_base([fact.query for fact in removed], 16)
    others = editor.facts[REMOVED + CHANGED :][: arguments.asked]
    every = [*removed, *changing, *others, *added]
    first_edit = sum(editor.edits.report.seconds.values())
    life = Life(editor, every, first_edit)
    rows = [life.change(f"add {len(added)}", lambda: editor.add(added), added)]
    added_right = life.right(added)
    ids = [fact.id for fact in removed]
    rows.append(life.change(f"remove {REMOVED}", lambda: editor.remove(ids), removed))
    same = [life.said[fact.query] == said for fact, said in zip(removed, base, strict=True)]
    change = functools.partial(editor.add, changed, replace=True)
    rows.append(life.change(f"change {CHANGED}", change, changed))
    changed_right = life.right(changed)
    rows.append(life.change("train the generator further", editor.train))
    content = {
        "study": "life",
        "facts": len(known),
        "first_edit_seconds": first_edit,
        "rows": rows,
        "added_right": added_right,
        "removed_as_base": fmean(same),
        "changed_right": changed_right,
        "trained_right": life.right([*added, *changed]),
    }
    write_json(RESULT, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
