"""The study of an edited model's life, on a tiny model."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import BANK, EDITED, FACTS, edit, make_editor

from benchmarks.quality.life import Life, right


@pytest.fixture(scope="module")
def editor():
    editor = make_editor(BANK)
    edit(editor)
    return editor


def test_each_change_counts_the_answers_that_it_did_not_mean_to_change(editor):
    added, removed = FACTS[5], EDITED[0]
    changed = dataclasses.replace(EDITED[1], answer=EDITED[2].answer)
    life = Life(editor, [*EDITED, added], first_edit=10.0)
    assert life.right(EDITED) == 1
    row = life.change("add", lambda: editor.add([added]), [added])
    assert life.right([added]) == 1 and row["what"] == "add"
    assert row["of_first_edit"] == row["seconds"] / 10
    every = {query for fact in EDITED for query in (fact.query, *fact.paraphrases)}
    assert row["other facts"] == {"asked": len(every), "changed": 0, "lost": 0, "gained": 0}
    life.change("remove", lambda: editor.remove([removed.id]), [removed])
    assert life.said[removed.query] == editor.generate_base([removed.query], 16)[0]
    life.change("change", lambda: editor.add([changed], replace=True), [changed])
    assert life.right([changed]) == 1 and life.right([EDITED[1]]) == 0
    # Whatever else is changed is counted.
    others = [fact for fact in editor.facts if fact.id != added.id]
    held = sum(len(right([fact], life.said)) for fact in others)
    everything = [fact.id for fact in others]
    row = life.change("remove", lambda: editor.remove(everything))
    assert row["other facts"]["changed"] >= row["other facts"]["lost"] == held >= len(everything)
    back = life.change("add", lambda: editor.add(others), others)
    assert back["other facts"]["asked"] == len({added.query, *added.paraphrases})
