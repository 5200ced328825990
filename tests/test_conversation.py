"""Conversations: messages and the prompts they make, contexts, and spans of what was said."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import tiny
import torch
from tiny import EDITED, FACTS, OTHER_FACTS, QUERIES, UNRELATED
from tokenizers import AddedToken

from meg_kernels import CollectionConfig, EditorConfig, Fact, MeGEditor
from meg_kernels.conversation import (
    ChatPrompt,
    as_messages,
    as_prompts,
    chat_format,
    chat_prompt,
    prompt_tokens,
)
from meg_kernels.editing.by_context import ByContext, contains
from meg_kernels.editing.contexts import FITTED, MEASURED, Context, usable
from meg_kernels.editing.prompting import PromptedModel, target_tokens
from meg_kernels.editing.several import OneStream, asked_apart
from meg_kernels.routing.spans import MOST_SPANS, sentences, spans

TEMPLATES = {
    # as SmolLM2's and Qwen's
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # as Llama 2's and Mistral's: a space before what the model says, the end of text behind it
    "inst": "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
    # as Zephyr's: a line break before what the model says
    "zephyr": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # as Gemma's: no system, and an end of the turn that is no named special token
    "gemma": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}".replace(
        "{{ m['role'] }}", "{{ 'model' if m['role'] == 'assistant' else m['role'] }}"
    ),
    # as Qwen3's: it thinks, unless it is asked not to
    "qwen": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
}
NAMED = ("<s>", "<|im_start|>", "<|im_end|>")
ENDS = {"inst": "</s>", "zephyr": "</s>", "gemma": "<end_of_turn>"}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def chatty(name="chatml", words=()):
    """The tiny tokenizer with a chat template, the special tokens that it has, and more words."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([*words])
    written = [token for token in NAMED if token in TEMPLATES[name]]
    tokenizer.add_special_tokens({"additional_special_tokens": written})
    if name == "gemma":
        unnamed = ("<start_of_turn>", "<end_of_turn>")
        tokenizer.add_tokens([AddedToken(token, special=True) for token in unnamed])
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def chat_model(tokenizer):
    return tiny.make_language_model(tokenizer)


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages, error, text",
    [
        ("Who?", TypeError, "must be a list of messages"),
        ({"role": "user", "content": "Who?"}, TypeError, "must be a list of messages"),
        (["Who?"], TypeError, r"messages\[0\] is 'Who\?'; it must be a dict with role and content"),
        ([{"role": "user"}], TypeError, "role and content"),
        ([{"role": "user", "content": ["Who?"]}], TypeError, "both texts"),
        ([{"role": "User", "content": "Who?"}], ValueError, "has role 'User'; it must be one of"),
        ([], ValueError, "must end with what the user says"),
        ([user("Who?"), said("Me")], ValueError, "must end with what the user says"),
        ([user("  ")], ValueError, "must end with what the user says"),
        ([user("\ud800")], ValueError, "halves of surrogate pairs"),
    ],
)
def test_bad_messages_are_refused(messages, error, text):
    with pytest.raises(error, match=text):
        as_messages("messages", messages)


def test_texts_and_conversations_make_a_batch_in_their_order():
    talk = [user("Who?"), said("Me"), user("And who?")]
    assert as_prompts("prompts", talk) == [talk]
    assert as_prompts("prompts", ["A", talk, "B"]) == ["A", talk, "B"]
    assert as_prompts("prompts", iter(["A"])) == ["A"]
    with pytest.raises(TypeError, match="is the text 'A'"):
        as_prompts("prompts", "A")
    with pytest.raises(TypeError, match="must be a list of texts"):
        as_prompts("prompts", {"A", "B"})
    with pytest.raises(ValueError, match=r"prompts\[1\] must end with"):
        as_prompts("prompts", ["A", [said("B")]])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_target_is_what_the_template_itself_writes_behind_the_prompt(name):
    tokenizer = chatty(name, ["red"])  # without a space before it, too
    prompt = chat_prompt(tokenizer, [user("The color of Abo is")])
    ids, target = target_tokens(tokenizer, prompt, "red")
    whole = tokenizer.apply_chat_template(
        [user("The color of Abo is"), said("red.")], tokenize=False
    )
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    assert [*ids, *target] == expected[: len(ids) + len(target)]
    assert target[-1] == chat_format(tokenizer).end
    assert tokenizer.unk_token_id not in target
    assert tokenizer.convert_ids_to_tokens(target[-1]) == ENDS.get(name, "<|im_end|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_facts_can_be_taught_and_asked_with_any_template(name):
    tokenizer = chatty(name, ["red"])
    prompted = PromptedModel.of(chat_model(tokenizer), tokenizer)
    fact = dataclasses.replace(FACTS[0], answer="red")
    ((*pairs,),) = prompted.targets([fact], FITTED)
    assert len(pairs) == len(FITTED)
    for context in (*FITTED, *MEASURED):
        assert "Abo" in prompted.prompt(fact.query, context)
    told = chat_prompt(tokenizer, Context("c", "chat", system="Be brief.").messages("Who?"))
    assert told.count("Be brief.") == 1 and "Who?" in told
    assert "<think>" not in told or "</think>" in told


def test_another_chat_template_has_another_form():
    tokenizer = chatty()
    before = chat_format(tokenizer)
    tokenizer.chat_template = TEMPLATES["zephyr"]
    assert chat_format(tokenizer) != before
    refusing = "{% if messages|length > 1 %}{{ raise_exception('alone') }}{% endif %}"
    tokenizer.chat_template = refusing
    with pytest.raises(ValueError, match="refuses these messages: alone"):
        chat_format(tokenizer)


def test_special_tokens_of_a_template_are_not_added_twice():
    tokenizer = chatty("inst")
    processor = pytest.importorskip("tokenizers.processors")
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processor.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    prompt = chat_prompt(tokenizer, [user("Which color has Abo?")])
    assert prompt_tokens(tokenizer, prompt).count(begin) == 1
    assert prompt_tokens(tokenizer, "Which color has Abo?").count(begin) == 1
    assert target_tokens(tokenizer, prompt, "red")[0] == prompt_tokens(tokenizer, prompt)
    streamer = Streamed()
    prompted = PromptedModel.of(chat_model(tokenizer), tokenizer)
    prompted.answers([prompt], 1, streamer=streamer)
    assert streamer.tokens[:-1] == prompt_tokens(tokenizer, prompt)


def test_a_model_without_a_chat_template_has_no_conversations():
    tokenizer = tiny.make_tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompt(tokenizer, [user("Who?")])
    assert all(context.form != "chat" for context in usable(FITTED, False))
    chats = CollectionConfig(contexts=(Context("c", "chat"),))
    with pytest.raises(ValueError, match="all contexts to fit in are chats"):
        chats.contexts_of(tokenizer)


def test_a_template_that_refuses_is_said_so():
    tokenizer = chatty()
    tokenizer.chat_template = "{{ raise_exception('no system message here') }}"
    with pytest.raises(ValueError, match="refuses these messages: no system message here"):
        chat_prompt(tokenizer, [user("Who?")])


# ---- contexts ------------------------------------------------------------------------------------


def test_contexts_that_are_measured_are_not_those_that_are_fitted():
    def around(context):
        return (context.form, context.question, context.system, context.before)

    alike = {around(c) for c in FITTED} & {around(c) for c in MEASURED}
    bare = {("template", "{}", None, ()), ("raw", "{}", None, ()), ("chat", "{}", None, ())}
    assert alike <= bare  # the forms themselves, with nothing around the query
    assert len({c.name for c in FITTED}) == len(FITTED)
    assert len(MEASURED) >= 8 and len({c.name for c in MEASURED}) == len(MEASURED)


def test_a_context_says_what_the_model_reads():
    context = Context(
        "c", "chat", "Well, {} Hm.", "So: {}", "Be brief.", (("Hello!", "Hello to you."),)
    )
    assert context.messages(" Who is {Bo}? ") == [
        {"role": "system", "content": "Be brief."},
        user("Hello!"),
        said("Hello to you."),
        user("Well, Who is {Bo}? Hm."),
    ]
    assert context.wording("The name of {Bo} is") == "So: The name of {Bo} is"
    for changes in ({"system": "Hm."}, {"before": [("a", "b")]}):
        with pytest.raises(ValueError, match="has messages, but its form is raw"):
            Context("c", "raw", **changes)


def test_configurations_of_earlier_versions_keep_their_framings():
    old = EditorConfig().to_dict()
    del old["collection"]["contexts"]
    old["collection"] |= {
        "question_framings": ["{}", "Well: {}"],
        "cloze_framings": ["{}", "{} what?", "So {}"],
    }
    assert EditorConfig.from_dict(EditorConfig().to_dict()) == EditorConfig()
    contexts = EditorConfig.from_dict(old).collection.contexts
    wordings = [context.wording("Who?") for context in contexts]
    assert wordings == ["Who?", "Well: Who?", "Who?"]
    assert [c.wording("It is") for c in contexts] == ["It is", "It is what?", "So It is"]


# ---- spans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, parts",
    [
        ("Who wrote Emma?", ["Who wrote Emma?"]),
        ("Hello. Who wrote Emma? Thanks!", ["Hello.", "Who wrote Emma?", "Thanks!"]),
        ("It costs 3.50 euros, e.g. in Rome. Why?", ["It costs 3.50 euros, e.g. in Rome.", "Why?"]),
        ('He said "No." Who did?', ['He said "No."', "Who did?"]),
        ("你好。谁写了《红楼梦》？谢谢", ["你好。", "谁写了《红楼梦》？", "谢谢"]),
        ("first line\n\nWho wrote Emma", ["first line", "Who wrote Emma"]),
        ("Who is J. K. Rowling? I ask Dr. No.", ["Who is J. K. Rowling?", "I ask Dr. No."]),
        ("who wrote emma? thanks", ["who wrote emma?", "thanks"]),
        ("a" + " " * 300_000 + "b", ["a" + " " * 300_000 + "b"]),
        ("  ", []),
    ],
)
def test_sentences_are_where_they_stand(text, parts):
    found = sentences(text)
    assert [span.text for span in found] == parts
    assert all(text[span.start :].startswith(span.text) for span in found)


def test_the_whole_comes_first_and_a_follow_up_is_read_with_what_it_follows():
    talk = [user("Tell me about France."), said("It is large."), user("And its capital?")]
    assert [span.text for span in spans(talk)] == [
        "And its capital?",
        "Tell me about France. And its capital?",
    ]
    assert spans(talk)[-1].follows == "Tell me about France."
    for short, longer in (("word " * 12, "word " * 13), ("a" * 80, "a" * 81)):
        assert len(spans([*talk[:2], user(short)])) == 2
        assert len(spans([*talk[:2], user(longer)])) == 1
    further = [user("I know Spain. It is warm."), said("It is."), talk[2]]
    assert spans([*talk[:2], *further])[-1].text == "It is warm. And its capital?"
    assert [span.text for span in spans("A b. C d.")] == ["A b. C d.", "A b.", "C d."]
    assert [span.text for span in spans(" one ")] == ["one"]
    assert [span.text for span in spans("a" * 10_000)] == ["a" * 10_000]
    long = " ".join(f"Sentence number {i} is here." for i in range(2 * MOST_SPANS))
    parts = spans(long)
    assert len(parts) == MOST_SPANS
    assert parts[-1].text == f"Sentence number {2 * MOST_SPANS - 1} is here."
    assert parts[0].text == "Sentence number 0 is here."


@pytest.fixture(scope="module")
def editor() -> MeGEditor:
    tokenizer = chatty("inst")  # with a space before an answer, as this language has it
    contexts = (*tiny.CONTEXTS, Context("chat", "chat"))
    collection = dataclasses.replace(
        tiny.BANK.collection, contexts=contexts, max_steps=600, learning_rate=0.05
    )
    config = dataclasses.replace(tiny.BANK, collection=collection)
    made = MeGEditor(chat_model(tokenizer), tokenizer, tiny.make_encoder(), config)
    report = made.edit(EDITED, tuning_facts=OTHER_FACTS, unrelated_queries=UNRELATED)
    assert report.unlearnt == ()
    return made


def test_a_question_is_found_in_what_stands_around_it(editor):
    fact = EDITED[1]
    alone = editor.route([fact.query])
    assert bool(alone.accepted) and alone.spans[0].text == fact.query
    around = f"Good day to you. {fact.query} Sing a song."
    found = editor.route([around, [user(around)], [user(UNRELATED[2]), said("la"), user(around)]])
    assert found.accepted.all() and (found.fact == alone.fact).all()
    assert {span.text for span in found.spans} == {fact.query}
    torch.testing.assert_close(found.score, alone.score.expand(3))
    nothing = editor.route([". ".join(UNRELATED)])
    assert not nothing.accepted.any() and len(nothing) == 1


def test_what_is_said_after_an_edited_question_is_not_taken_for_it(editor):
    fact = EDITED[1]
    asked = [user(fact.query), said(fact.answer)]
    assert not editor.route([*asked, user(UNRELATED[2])]).accepted.any()
    again = editor.route([*asked, user(fact.query)])
    assert again.accepted.all() and again.spans[0].text == fact.query
    # What completes a question is taken for it.
    start, end = fact.query[:-1].rsplit(" ", 1)
    found = editor.route([[user(start), said("Hm?"), user(f"{end}?")]])
    assert found.spans[0].text == fact.query and found.accepted.all()


def test_an_evaluation_by_context_resumes_and_knows_the_model(editor, tmp_path, monkeypatch):
    contexts = [Context("plain"), Context("chat", "chat")]

    def report(facts=EDITED[:2], **more):
        how = {"max_new_tokens": 5, "work_folder": tmp_path, "identity": ["edits"], **more}
        evaluation = ByContext(editor.prompted, facts, contexts, **how)
        return evaluation.report(lambda asked, facts: editor.routed(asked))

    first = report()
    with monkeypatch.context() as patch:
        patch.setattr(PromptedModel, "answers", tiny.interrupt)
        assert report() == first
        others = {"identity": ["others"]}, {"max_new_tokens": 4}, {"facts": EDITED[2:4]}
        for other in others:
            with pytest.raises(KeyboardInterrupt):
                report(**other)
    weight = editor.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight += 1
        try:
            assert report() != first
        finally:
            weight -= 1


def test_the_best_span_decides_whatever_else_is_in_the_batch(editor):
    mixed = [UNRELATED[0], f"{UNRELATED[1]}. {QUERIES[1]}", QUERIES[2], " ".join(UNRELATED)]
    together = editor.route(mixed)
    for row, prompt in enumerate(mixed):
        alone = editor.route([prompt])
        assert (alone.accepted[0], alone.fact[0]) == (together.accepted[row], together.fact[row])
        assert alone.spans[0] == together.spans[row]


# ---- asking in conversations ---------------------------------------------------------------------


def test_conversations_are_answered_with_their_neurons(editor):
    fact = EDITED[0]
    talk = [user(fact.query)]
    prompt = chat_prompt(editor.tokenizer, talk)
    ids = torch.tensor([prompt_tokens(editor.tokenizer, prompt)])
    with editor.routed(talk):  # around any call of the model
        output = editor.model.generate(ids, max_new_tokens=5, do_sample=False)
    expected = editor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert editor.chat(talk, 5) == expected == f"{fact.answer}."
    with editor.disabled():
        assert editor.chat(talk, 5) != f"{fact.answer}."


def test_queries_and_conversations_are_answered_in_one_call_and_in_order(editor):
    talks = [[user(fact.query)] for fact in EDITED[:2]]
    found = editor.generate([QUERIES[0], talks[0], UNRELATED[0], talks[1]], 5)
    assert found == [
        *editor.generate([QUERIES[0]], 5),
        editor.chat(talks[0], 5),
        *editor.generate([UNRELATED[0]], 5),
        editor.chat(talks[1], 5),
    ]
    several = editor.generate([QUERIES[0], talks[0]], 5, num_return_sequences=2, num_beams=2)
    assert len(several) == 4 and several[0] == EDITED[0].answer


def test_several_edited_questions_are_asked_one_by_one(editor):
    first, second = EDITED[1], EDITED[3]
    both = f"{first.query} Well. {second.query} {first.query.lower()}"
    told = f"{first.answer}\n{second.answer}"
    assert editor.generate([UNRELATED[0], both, QUERIES[2]], 5) == [
        *editor.generate([UNRELATED[0]], 5),
        told,
        *editor.generate([QUERIES[2]], 5),
    ]
    talk = [user(UNRELATED[1]), said("la"), user(both)]
    assert editor.chat(talk, 5) == f"{first.answer}.\n{second.answer}."
    twice = editor.generate([both], 5, num_beams=2, num_return_sequences=2)
    assert len(twice) == 2 and twice[0] == told
    routing = editor.route([UNRELATED[0], both])
    assert list(routing.several) == [1] and routing.of([1, 0]).several.keys() == {0}
    apart, owners = routing.each_question()
    assert owners == [0, 1, 1] and len(apart) == 3 and not apart.several
    assert [span.text for span in apart.spans[1:]] == [first.query, second.query]
    assert editor.generate([UNRELATED[0], both], 5, routing=routing)[1] == told
    # One question twice, one beside others, and a text that asks nothing are one prompt each.
    statement = both.replace("?", ".")
    for one in (f"{first.query} {first.query}", f"{first.query} {UNRELATED[0]}?", statement):
        assert not editor.route([one]).several
    with editor.disabled():
        assert "\n" not in editor.generate([both], 5)[0]


def test_what_asks_one_question_among_others_is_asked_whole(editor):
    both = f"{EDITED[1].query} {EDITED[3].query}"
    around = f"Good day to you. {EDITED[1].query} Sing a song."
    talk = [user(UNRELATED[1]), said("la"), user(around)]
    prompts = [around, both, talk]
    asked, _, owners = asked_apart(prompts, editor.route(prompts))
    assert asked == [around, EDITED[1].query, EDITED[3].query, talk] and owners == [0, 1, 1, 2]


class Streamed:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.tokens += value.reshape(-1).tolist()

    def end(self):
        self.ends += 1


def test_several_answers_are_one_stream(editor):
    both = [user(f"{EDITED[1].query} {EDITED[3].query}")]
    streamer = Streamed()
    told = editor.chat(both, 5, streamer=streamer)
    assert streamer.ends == 1 and told == editor.chat(both, 5)
    first = chat_prompt(editor.tokenizer, [user(EDITED[1].query)])
    ids = prompt_tokens(editor.tokenizer, first)
    assert streamer.tokens[: len(ids)] == ids
    text = editor.tokenizer.decode(streamer.tokens[len(ids) :], skip_special_tokens=True)
    assert text.split() == told.split()
    with pytest.raises(TypeError, match="a streamer"):
        editor.chat(both, 5, streamer="no streamer")


def test_between_two_streamed_answers_no_text_begins(editor):
    tokenizer = chatty("inst")
    processor = pytest.importorskip("tokenizers.processors")
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processor.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    streamer = Streamed()
    stream = OneStream(streamer, tokenizer)
    for prompt, answer in (([7, 8], 9), ([10, 11], 12)):
        stream.put(torch.tensor([prompt]))
        stream.put(torch.tensor([answer]))
        stream.end()
    stream.close()
    assert streamer.tokens == [7, 8, 9, tokenizer.convert_tokens_to_ids("\n"), 12]
    assert streamer.ends == 1


def test_an_answer_takes_what_room_is_left(editor):
    most = editor.prompted.positions
    fact = EDITED[1]
    talk = [user(UNRELATED[0]), said("la " * (most - 40)), user(fact.query)]
    left = most - len(prompt_tokens(editor.tokenizer, chat_prompt(editor.tokenizer, talk)))
    assert 3 < left < 256
    told = editor.chat(talk)
    assert told == editor.chat(talk, left) and told.startswith(fact.answer)
    prompt = chat_prompt(editor.tokenizer, talk)
    assert [editor.prompted.room(["Q: Who?", prompt], n) for n in (2, 10**6)] == [2, left]
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        editor.chat(talk, left + 1)
    talk[1] = said("la " * most)
    with pytest.raises(ValueError, match=r"more than the 64 that the model reads: shorten it$"):
        editor.chat(talk)


def test_an_answer_is_as_long_as_it_is_alone_beside_one_that_needs_more(editor):
    asked = [query for fact in OTHER_FACTS for query in (fact.query, *fact.paraphrases)]
    said = zip(asked, editor.generate_base(asked, 48), strict=True)
    query = next(q for q, text in said if len(editor.tokenizer(text).input_ids) > 40)
    before = editor.edits
    long = dataclasses.replace(before.facts[0], answer=" ".join(["red"] * 40))
    try:
        editor.router.put(dataclasses.replace(before, facts=(long, *before.facts[1:])))
        assert editor.generate([QUERIES[0], query])[1:] == editor.generate([query])
    finally:
        editor.router.put(before)


def test_one_batch_holds_conversations_or_others(editor):
    prompts = [editor.prompted.prompt("Who?"), ChatPrompt("Who?")]
    with pytest.raises(ValueError, match="make two batches"):
        editor.prompted.answers(prompts, 3)


def test_an_evaluation_by_context_says_what_asking_says(editor):
    contexts = [Context("plain"), Context("chat", "chat"), Context("raw", "raw")]
    evaluation = ByContext(editor.prompted, EDITED, contexts, max_new_tokens=5)
    found = evaluation.report(lambda asked, facts: editor.routed(asked))
    assert found.n == len(EDITED)
    found = found.contexts
    assert [*found] == ["plain", "chat", "raw"]
    assert found["plain"].reliability == found["chat"].reliability == 1.0
    assert found["plain"].runs_on == found["chat"].runs_on == 0.0  # a full stop is no more
    own = [user(query) for fact in EDITED for query in (fact.query, *fact.paraphrases)]
    tokens = [
        len(prompt_tokens(editor.tokenizer, chat_prompt(editor.tokenizer, [message])))
        for message in own
    ]
    assert found["chat"].prompt_tokens == pytest.approx(sum(tokens) / len(tokens))
    said = editor.generate([[user(query)] for f in EDITED for query in f.paraphrases], 5)
    answers = [f.answer for f in EDITED for _ in f.paraphrases]
    exact = [text.rstrip(".") == answer for text, answer in zip(said, answers, strict=True)]
    assert found["chat"].generality == pytest.approx(sum(exact) / len(exact))
    nothing = evaluation.report(lambda asked, facts: editor.disabled()).contexts
    assert all(shares.locality == 1.0 for shares in nothing.values())
    assert nothing["plain"].reliability_contained == nothing["plain"].base_reliability


def test_locality_is_of_whole_answers(editor, monkeypatch):
    last = []

    @contextlib.contextmanager
    def edited(asked, facts):
        last.append(8)
        yield
        last.clear()

    monkeypatch.setattr(
        PromptedModel, "answers", lambda self, prompts, most: [[5, 6, *last] for _ in prompts]
    )
    evaluation = ByContext(editor.prompted, EDITED[:2], [Context("plain")], max_new_tokens=5)
    assert evaluation.report(edited).contexts["plain"].locality == 0.0


def test_a_model_without_a_chat_template_is_evaluated_in_the_other_contexts():
    tokenizer = tiny.make_tokenizer()
    prompted = PromptedModel.of(chat_model(tokenizer), tokenizer)
    evaluation = ByContext(prompted, EDITED[:1], [Context("chat", "chat"), Context("raw", "raw")])
    assert [context.name for context in evaluation.contexts] == ["raw"]


def test_the_base_models_answer_counts_if_it_contains_the_new_one(editor):
    asked = [query for fact in FACTS + OTHER_FACTS for query in (fact.query, *fact.paraphrases)]
    said = zip(asked, map(str.split, editor.generate_base(asked, 5)), strict=True)
    query, words = next((q, words) for q, words in said if len(words) > 1 and words[-1].isalpha())
    evaluation = ByContext(
        editor.prompted, [Fact(query, words[-1])], [Context("plain")], max_new_tokens=5
    )
    found = evaluation.report(lambda asked, facts: editor.disabled()).contexts["plain"]
    assert found.base_reliability == found.reliability_contained == 1.0
    assert found.reliability == 0.0 and found.runs_on == 1.0


def test_an_evaluation_by_context_asks_for_no_more_than_the_model_has_room_for(editor):
    fact, contexts = EDITED[0], [Context("plain"), Context("chat", "chat")]
    evaluation = ByContext(editor.prompted, [fact], contexts, max_new_tokens=10**6)
    queries = [fact.query, *fact.paraphrases, *(other.query for other in fact.locality)]
    longest = max(
        len(prompt_tokens(editor.tokenizer, editor.prompted.prompt(query, context)))
        for query in queries
        for context in contexts
    )
    assert evaluation.max_new_tokens == editor.prompted.positions - longest
    evaluation.report(lambda asked, facts: editor.routed(asked))
    long = dataclasses.replace(fact, query="red " * editor.prompted.positions)
    with pytest.raises(ValueError, match="shorten it"):
        ByContext(editor.prompted, [long], contexts)


def test_an_edit_in_the_prompt_is_worded_by_query_and_context(editor, monkeypatch):
    read, real = [], PromptedModel.answers
    monkeypatch.setattr(
        PromptedModel, "answers", lambda self, p, n: read.extend(p) or real(self, p, n)
    )
    contexts = [Context("plain"), Context("chat", "chat")]
    evaluation = ByContext(editor.prompted, EDITED[:2], contexts, max_new_tokens=3)
    evaluation.report(
        lambda asked, facts: editor.disabled(),
        wording=lambda query, context: Context("told", context.form, f"{query.upper()} {{}}"),
    )
    query = EDITED[1].query
    for context in contexts:
        plain = editor.prompted.prompt(query, context)
        worded = plain.replace(query, f"{query.upper()} {query}")
        assert read.count(plain) == read.count(worded) == 1
    read.clear()
    with pytest.raises(ValueError, match="shorten it"):
        evaluation.report(
            lambda asked, facts: editor.disabled(),
            wording=lambda query, context: Context("long", context.form, "red " * 64 + "{}"),
        )
    assert not read  # it is said before the work


@pytest.mark.parametrize(
    "text, answer, there",
    [
        ("It is Paris, in France.", "Paris", True),
        ("Parisian", "Paris", False),
        ("a Parisian in paris", "Paris.", True),
        ("C++ and C", "C", True),
        ("", "Paris", False),
        ("法国的首都是马赛。", "马赛", True),
        ("It is C++.", "C", False),
        ("It is C++.", "C++", True),
    ],
)
def test_an_answer_is_contained_as_words(text, answer, there):
    assert contains(text, answer) is there


def test_a_fact_of_a_model_for_chat_is_fitted_in_chats(editor):
    tokenizer = editor.tokenizer
    prompted = PromptedModel.of(editor.model, tokenizer)
    contexts = CollectionConfig().contexts_of(tokenizer)
    assert {context.form for context in contexts} == {"template", "raw", "chat"}
    ((*pairs,),) = prompted.targets(FACTS[:1], contexts)
    assert len(pairs) == len(FITTED)
