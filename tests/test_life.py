"""The life of an edited model, its verbs in any order, beside a dictionary of what it must say."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import tiny
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.trust.faults import KILLED, Disk, forked

ROWS = st.integers(0, len(tiny.FACTS) - 2)
COLORS = st.sampled_from(tiny.COLORS)


class Life(RuleBasedStateMachine):
    """An editor, its folder, and for both what each edited query is answered with."""

    @initialize()
    def edit(self):
        self.folder = Path(tempfile.mkdtemp()).resolve() / "edited"
        self.editor = tiny.make_editor(tiny.BANK)
        facts = tiny.FACTS[:2]
        tiny.edit(self.editor, facts)
        self.answers = {fact.query: fact.answer for fact in facts}
        self.saved = None

    def teardown(self):
        self.editor.detach()
        shutil.rmtree(self.folder.parent)

    @rule(row=ROWS, color=COLORS)
    def add_or_replace(self, row, color):
        fact = dataclasses.replace(tiny.FACTS[row], answer=color)
        self.editor.add([fact], replace=fact.query in self.answers)
        self.answers.pop(fact.query, None)
        self.answers[fact.query] = color

    @precondition(lambda self: len(self.answers) > 1)
    @rule(row=ROWS)
    def remove(self, row):
        query = [*self.answers][row % len(self.answers)]
        self.editor.remove(query)
        del self.answers[query]

    @rule()
    def train(self):
        self.editor.train()

    @rule()
    def save(self):
        self.editor.save_pretrained(self.folder)
        self.saved = dict(self.answers)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        self.editor.detach()
        self.editor = tiny.load(self.folder)
        self.answers = dict(self.saved)

    @precondition(lambda self: self.saved is not None)
    @rule(step=st.integers(0, 60))
    def crash_in_save(self, step):
        def save() -> int:
            self.editor.save_pretrained(self.folder)
            return 0

        ended = forked(save, Disk(self.folder, step))
        assert ended.status in (0, KILLED), ended.said
        now, before = dict(self.answers), self.saved
        self.editor.detach()
        self.editor = tiny.load(self.folder)
        found = {fact.query: fact.answer for fact in self.editor.facts}
        assert found == now or (ended.status == KILLED and found == before)
        self.answers, self.saved = found, dict(found)

    @invariant()
    def says_what_the_dictionary_says(self):
        if not hasattr(self, "editor"):
            return
        editor, wanted = self.editor, self.answers
        assert {fact.query: fact.answer for fact in editor.facts} == wanted
        assert [fact.query for fact in editor.facts] == [*wanted]
        learnt = [fact.query for fact in editor.facts if fact not in editor.edits.report.unlearnt]
        said = editor.generate(learnt, tiny.MOST) if learnt else []
        assert said == [wanted[query] for query in learnt]


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=4, stateful_step_count=10, deadline=None)
