"""The study of other languages: its facts are what it says, and it counts what the editor does."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import BANK, EDITED, OTHER_FACTS, UNRELATED, make_editor

from benchmarks.quality import languages as study
from benchmarks.quality.report import languages as table
from meg_kernels.facts import read_facts
from meg_kernels.texts import normalized_query

CHAT = "{% for m in messages %}{{ 'Q: ' + m['content'] + '\nA:' }}{% endfor %}"


@pytest.fixture(scope="module")
def facts():
    return read_facts(study.FACTS)


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    editor = make_editor(BANK)
    editor.prompted.tokenizer.chat_template = CHAT
    edit = editor.edit

    def edit_with_tiny_tuning(facts, **options):
        return edit(facts, tuning_facts=OTHER_FACTS, unrelated_queries=UNRELATED, **options)

    editor.edit = edit_with_tiny_tuning
    chosen = [
        dataclasses.replace(f, id=f"{'de' if i < 2 else 'zh'}-{i}") for i, f in enumerate(EDITED)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.MeGEditor, "for_model", lambda name, encoder: editor)
        return study.measure("tiny", chosen, tmp_path_factory.mktemp("work")), editor


def test_there_are_twenty_facts_of_each_language(facts):
    places = study.by_language(facts)
    assert {language: len(found) for language, found in places.items()} == dict.fromkeys(
        study.LANGUAGES.values(), 20
    )
    assert len({fact.normalized_query for fact in facts}) == 100


def test_every_query_names_its_subject_and_no_look_alike_does(facts):
    queries = {fact.normalized_query for fact in facts}
    for fact in facts:
        assert fact.named_subject is not None and len(fact.locality) == 1
        assert all(fact.is_named_in(text) for text in fact.paraphrases) and fact.paraphrases
        (other,) = fact.locality
        assert not fact.is_named_in(other.query) and normalized_query(other.query) not in queries


def test_the_row_holds_what_the_editor_does_in_each_language(row):
    found, editor = row
    assert found["languages"].keys() == {"German", "Chinese"} and found["warned"] == []
    for shares in found["languages"].values():
        assert shares["gate"]["own"] == 1.0 == shares["metrics"]["reliability_ag"]
        assert shares["without_names"]["paraphrases"] >= shares["gate"]["paraphrases"]
        assert 0 <= shares["chat"]["locality"] <= 1
    assert editor.router.requires_subject and 0 < found["nearest_is_own"] <= 1


def test_the_table_has_a_line_for_each_language_and_one_for_all(row):
    text = table({"languages": [{"rows": [row[0]]}]}, None)
    assert text.count("| tiny |") == 2 + 2
    assert "| tiny | all | 1.000 |" in text and "| tiny | German | 1.000 |" in text
    assert table({"languages": []}, None) == ""
