"""The studies of edits where people talk: what they count is what the systems say."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
from test_conversation import chat_model, chatty
from tiny import EDITED, OTHER_FACTS, UNRELATED

from benchmarks.quality import documents, lengths, talk
from benchmarks.quality.report import documents as documents_table
from benchmarks.quality.report import lengths as lengths_table
from benchmarks.quality.report import talk as table
from meg_kernels import MeGEditor
from meg_kernels.editing.contexts import Context

CHAT = Context("chat", "chat")
CONTEXTS = (Context("template"), CHAT)


@pytest.fixture(scope="module")
def edit():
    """A stand-in for the default editor, whose tuning facts are of its own language."""
    tokenizer = chatty("inst")
    contexts = (*tiny.CONTEXTS, CHAT)
    collection = dataclasses.replace(
        tiny.BANK.collection, contexts=contexts, max_steps=600, learning_rate=0.05
    )
    config = dataclasses.replace(tiny.BANK, collection=collection)
    model = chat_model(tokenizer)
    model.config.max_position_embeddings = 512
    editor = MeGEditor(model, tokenizer, tiny.make_encoder(), config)
    own = editor.edit

    def edit(facts, **options):
        return own(facts, tuning_facts=OTHER_FACTS, unrelated_queries=UNRELATED, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editor, "edit", edit)
        patch.setattr(talk, "shipped_tuning_facts", lambda: OTHER_FACTS)
        patch.setattr(talk, "ANSWER", 5)
        patch.setattr(talk, "shipped_passages", lambda: UNRELATED)
        yield editor


@pytest.fixture(scope="module")
def found(edit, tmp_path_factory):
    chosen = talk.DataSet(len(EDITED), CONTEXTS[1:], CONTEXTS, 2, CONTEXTS)
    yes_no = [EDITED[1].query, UNRELATED[0]]
    return talk.measure(edit, chosen, [*EDITED], yes_no, tmp_path_factory.mktemp("talk"))


def test_three_systems_are_asked_in_each_context(found):
    rows = {(row["system"], row["context"]): row for row in found["rows"]}
    assert len(rows) == 6
    for context in ("template", "chat"):
        assert rows["neuron", context]["reliability"] == 1.0
        assert rows["stored", context]["reliability"] == 1.0
        prompt, neuron = rows["prompt", context], rows["neuron", context]
        assert prompt["prompt_tokens"] > neuron["prompt_tokens"] + 4
        assert prompt["reliability"] < 1.0  # this model has not learnt to read
    assert rows["neuron", "chat"]["locality"] is not None
    assert rows["neuron", "template"]["locality"] is None
    assert found["yes_no"]["taken"] == 0.5
    long = found["long_talks"]
    assert long["asked"] == 5 and long["as_the_base_model"] >= 1 - long["taken"]
    assert found["next_turn"].keys() == {"neuron", "prompt", "stored"}
    assert all(took > 0 for took in found["first_token_ms"].values())


def test_the_stored_answer_is_right_where_the_gate_is(edit, found):
    rivals = talk.Rivals(edit, talk.TOLD[0])
    moved = [dataclasses.replace(fact, answer=f"not {fact.answer}") for fact in EDITED]
    assert rivals.stored(moved, CHAT)["reliability"] == 0.0
    assert rivals.found(EDITED[1].query, CHAT).answer == EDITED[1].answer
    assert rivals.found(UNRELATED[0], CHAT) is None
    assert rivals.wording(UNRELATED[0], CHAT) is CHAT


@pytest.mark.parametrize("told", talk.TOLD)
def test_a_fact_is_told_before_the_question(told):
    fact = EDITED[1]
    context = talk.told_in(CHAT, fact, told)
    said = [message["content"] for message in context.messages("Who wrote Emma?")]
    assert any(talk.sentence(fact) in text for text in said)
    assert said[-1].endswith("Who wrote Emma?") and (len(said) == 2) is told.is_system
    raw = talk.told_in(Context("raw", "raw"), fact, told).wording("Who wrote Emma?")
    assert talk.sentence(fact) in raw and raw.endswith("\nWho wrote Emma?")


def test_the_table_says_what_was_found(found, tmp_path):
    study = {"sets": [{"data": "tiny", **found}]}
    text = table({"talk": [json.loads(json.dumps(study))]}, tmp_path)
    assert "tiny, 5 facts, 0 not learnt" in text
    assert text.count("| in the prompt |") == 3 and "of 2 yes and no" in text.lower()
    assert table({"talk": []}, tmp_path) == ""


def test_answers_have_the_lengths_that_are_asked(edit, tmp_path):
    passages = [" red blue gold gray" * 20]
    facts = lengths.of_lengths(EDITED, passages, edit.tokenizer)
    tokens = [
        len(edit.tokenizer(fact.answer, add_special_tokens=False).input_ids) for fact in facts
    ]
    assert tokens[0] == 1 and tokens == sorted(tokens) and tokens[-1] >= lengths.LONGEST - 2
    short = [dataclasses.replace(fact, answer=fact.answer.split()[0]) for fact in facts]
    rows = lengths.measure(edit, short, None)
    assert sum(row["facts"] for row in rows) == 5 and rows[0]["learnt"] == 5
    assert rows[0]["template"] == rows[0]["chat"] == 5
    assert "| 1 to 10 | 5 | 5 | 5 | 5 |" in lengths_table({"lengths": [{"rows": rows}]}, tmp_path)


def test_within_other_text_the_edited_model_is_asked_beside_the_base_model(
    edit, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "LENGTHS", (10,))
    monkeypatch.setattr(documents, "ANSWER", 5)
    monkeypatch.setattr("benchmarks.quality.gate.shipped_passages", lambda: [UNRELATED[0] + "."])
    edit.edit(EDITED)
    questions = [fact for fact in EDITED if fact.query.endswith("?")]
    said = edit.generate_base([CHAT.messages(fact.query) for fact in questions], 5)
    known = [
        dataclasses.replace(fact, answer=text) for fact, text in zip(questions, said, strict=True)
    ]
    unknown = [dataclasses.replace(fact, answer="nothing of it") for fact in questions]
    monkeypatch.setattr(documents, "shipped_tuning_facts", lambda: [*unknown, *known])
    assert documents.known_to(edit, 1) == known[:1]
    rows = documents.measure(edit, questions, known)
    assert [row["place"] for row in rows] == ["start", "middle", "end"]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("found", "answered", "base"))
    assert documents.answered(edit, questions, [f.query for f in questions], base=False) == 1.0
    assert documents.answered(edit, known, [f.query for f in questions], base=True) == 1.0
    typed = documents.as_typed(edit, EDITED)
    assert typed[0] == {"typed": "plain", "found": 1.0, "template": 1.0, "chat": 1.0}
    assert all(row["found"] >= max(row["template"], row["chat"]) - 0.2 for row in typed)
    table = documents_table({"documents": [{"rows": rows, "typed": typed}]}, tmp_path)
    assert "| a letter missing |" in table and "| in lower case |" in table
    assert "| 10 | in the middle |" in table and documents_table({"documents": []}, tmp_path) == ""
