"""The guard of every list of texts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from properties import given, st

from meg_kernels.texts import as_texts, names, normalized, normalized_answer, normalized_query

ORDERED = {
    "list": ["a", "b"],
    "tuple": ("a", "b"),
    "iterator": iter(["a", "b"]),
    "generator": (text for text in "ab"),
    "array": np.array(["a", "b"]),
    "values of a dict": {1: "a", 2: "b"}.values(),
}


@pytest.mark.parametrize("kind", ORDERED)
def test_texts_in_any_ordered_iterable_become_a_list(kind):
    texts = as_texts("prompts", ORDERED[kind])
    assert type(texts) is list and texts == ["a", "b"]


@pytest.mark.parametrize("empty", [[], (), iter([])])
def test_there_may_be_no_texts(empty):
    assert as_texts("prompts", empty) == []


def test_the_callers_list_is_not_handed_on():
    given = ["a"]
    assert as_texts("prompts", given) is not given


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc?", "is the text 'abc?'; it must be a list of texts: ['abc?']"),
        ("", "is the text ''; it must be a list of texts: ['']"),
        (b"abc", "is a bytes; it must be a list of texts"),
        ({"a": 1}, "is a dict; it must be a list of texts"),
        ({"a"}, "is a set; it must be a list of texts"),
        (None, "is a NoneType; it must be a list of texts"),
        (3, "is a int; it must be a list of texts"),
        (["a", 3], "[1] is 3; it must be text"),
        ([None], "[0] is None; it must be text"),
        ([["a"]], "[0] is ['a']; it must be text"),
        (["a", b"b"], "[1] is b'b'; it must be text"),
    ],
)
def test_everything_else_is_refused_by_the_arguments_name(value, message):
    with pytest.raises(TypeError, match=f"^prompts ?{re.escape(message)}$"):
        as_texts("prompts", value)


ASK_THE_SAME = [
    ("Who wrote Emma?", "who wrote EMMA"),
    ("Who wrote Emma?", "Who wrote Emma ?!"),
    ("Who wrote Emma?", "Ｗｈｏ　ｗｒｏｔｅ　Ｅｍｍａ？"),
    ("Who wrote Emma?", "Who\u00a0wrote\u202fEmma?"),
    ("Who wrote Emma?", "\ufeffWho wr\u200bote Em\u00adma\u2060?"),
    ("Who wrote Emma?", "Who wrote “Emma”?"),
    ("Who wrote Emma?", "Who wrote 'Emma'?"),
    ("Who wrote It’s me?", "Who wrote “It's me”?"),
    ("Who is Ana's son?", "Who is Ana’s son?"),
    ("Who is Ana's son?", "Who is Ana`s son?"),
    ("Who ruled 1914-18?", "Who ruled 1914–18?"),
    ("Who ruled 1914-18?", "Who ruled 1914−18?"),
    ("The author of Emma is", "The author of Emma is…"),
    ("The author of Emma is", "The author of Emma is ...:"),
    ("Where is Br\u00fcn?", "Where is Bru\u0308n?"),
    ("Wo ist die Straße?", "WO IST DIE STRASSE?"),
    ("¿Quién es Ana?", "quién es Ana"),
    ("誰ですか。", "誰ですか"),
    ("من هي آنا؟", "من هي آنا"),
    ("أين وُلِدَ محمّد؟", "اين ولد محمد"),
    ("أين تقع مصر؟", "أيـن تقع مصـر؟"),
    ("מי כתב אֶת הספר?", "מי כתב את הספר"),
    ("Где живёт Пётр?", "где живет Петр"),
    ("谁发明了飞机？", "谁发明了飞机"),
    ("पेरिस कहाँ है।", "पेरिस कहाँ है"),
    ("پیرس کہاں ہے۔", "پیرس کہاں ہے"),
    ("ガーナの首都は", "ｶﾞｰﾅの首都は"),
]
SAY_THE_SAME = [
    ("Ana Vee", "Ana Vee."),
    ("Ana Vee", "ana  vee"),
    ("Emma", "“Emma.”"),
    ("Washington, D.C.", "Washington, D.C"),
    ("-5", "−5"),
    ("O'Neil", "O’Neil"),
]
APART = [
    ("C", "C++"),
    ("C", "C#"),
    ("Who wrote 1984?", "Who wrote 1985?"),
    ("What is 10²?", "What is 102?"),
    ("Where is Århus?", "Where is Arhus?"),
    ("5", "-5"),
    ("1.5", "15"),
    ("What is .NET?", "What is NET?"),
    ("""How long is a 5" nail?""", """How long is a 5' nail?"""),
    ("""How long is a 5" nail?""", """How long is a 5 nail?"""),
    ("What is called ‘?’", "What is called ‘!’"),
    ("?", "!"),
    ("What is 👩\u200d🚀?", "What is 👩🚀?"),
    ("What does print('a') print?", "What does print(a) print?"),
    ("½", "12"),
    ("x", "χ"),
    ("Где чай?", "Где чаи?"),
    ("が", "か"),
    ("한국", "한글"),
    ("हिन्दी", "हिन्द"),
]
NAMED = [
    ("Wie heißt Österreichs Hauptstadt?", "Österreich"),
    ("Hauptstadt der Vereinigten Staaten", "Vereinigte Staaten"),
    ("Столица Франции", "Франция"),
    ("О Москве", "Москва"),
    ("Рассказы Чеховым написаны", "Чехов"),
    ("Романы Льва Толстого", "Толстой"),
    ("Столица Новой Зеландии", "Новая Зеландия"),
    ("Кто создал «Войну и мир»?", "Война и мир"),
    ("Территория Египта", "Египет"),
    ("Пёс", "Пес"),
    ("عاصمة لفرنسا", "فرنسا"),
    ("عاصمة للمغرب", "المغرب"),
    ("وبالمغرب", "المغرب"),
    ("مدينة البتراء", "بتراء"),
    ("لمحمد(ص)", "محمد(ص)"),
    ("《红楼梦》的作者是谁", "红楼梦"),
    ("who wrote红楼梦?", "红楼梦"),
    ("フランスの首都", "フランス"),
    ("เมืองหลวงของไทยคือ", "ไทย"),
    ("프랑스의 수도", "프랑스"),
]
NOT_NAMED = [
    ("Wie heißt Frankreichs Hauptstadt?", "Österreich"),
    ("столица австралии", "Австрия"),
    ("столица Ирака", "Иран"),
    ("столица Мальты", "Мали"),
    ("столица Персии", "Перу"),
    ("столица Персии", "Пермь (Российская империя)"),
    ("столица Новой Гвинеи", "Новая Зеландия"),
    ("президент", "Резиден"),
    ("عاصمة تونس", "المغرب"),
    ("عاصمة تونس", "تونس(1"),
    ("مدرسة", "درس"),
    ("谁发明了电话", "飞机"),
    ("the vereinigten", "Vereinigte Staaten"),
    ("Who was Johnson Smith?", "John Smith"),
    ("Who wrote the CC primer?", "C++ Primer"),
    ("مدينة كبيرة", "الم"),
]
OTHER_ANSWERS = [("gold", "gold.."), ("gold", "gold!"), ("gold", "gold. It is"), ("no", "no.1")]


@pytest.mark.parametrize(("one", "other"), ASK_THE_SAME)
def test_queries_that_differ_in_how_they_are_written_ask_the_same(one, other):
    assert normalized_query(one) == normalized_query(other)


@pytest.mark.parametrize(("one", "other"), SAY_THE_SAME)
def test_answers_that_differ_in_how_they_are_written_are_the_same(one, other):
    assert normalized_answer(one) == normalized_answer(other)


@pytest.mark.parametrize(("one", "other"), OTHER_ANSWERS)
def test_of_an_answer_only_the_full_stop_behind_it_does_not_count(one, other):
    assert normalized_answer(one) != normalized_answer(other)


@pytest.mark.parametrize(("one", "other"), APART)
def test_signs_that_mean_something_keep_texts_apart(one, other):
    for rule in (normalized, normalized_query, normalized_answer):
        assert rule(one) != rule(other)


@pytest.mark.parametrize("rule", [normalized, normalized_query, normalized_answer])
@pytest.mark.parametrize("text", ["", "?", "...", "''", '"', "¿?", "\u200b", "\u200d"])
def test_texts_of_signs_alone_are_compared_too(rule, text):
    assert rule(rule(text)) == rule(text)


@pytest.mark.parametrize(("text", "name"), NAMED)
def test_a_name_is_found_with_its_languages_endings_and_prefixes(text, name):
    assert names(normalized(text), normalized(name))


@pytest.mark.parametrize(("text", "name"), NOT_NAMED)
def test_another_name_with_the_same_beginning_or_end_is_not_taken_for_it(text, name):
    assert not names(normalized(text), normalized(name))


@given(st.text(), st.text(min_size=1))
def test_a_name_is_found_as_it_is_written(text, name):
    assert names(f"{text} {name}", name)


@given(st.text())
def test_the_rules_build_on_each_other(text):
    for rule in (normalized_query, normalized_answer):
        assert rule(normalized(text)) == rule(text)
    assert normalized(normalized(text)) == normalized(text)


def test_a_long_run_of_signs_is_compared_in_no_time():
    for sign in ("?", '"', "'", " ' ", ". ", "a'"):
        assert len(normalized_query(f"{sign * 100_000}a")) > 0


@pytest.mark.parametrize("text", ["Wer ist STRASSE?", "  wer\tist\n\nstraße? "])
def test_case_and_white_space_do_not_count(text):
    assert normalized(text) == "wer ist strasse?"
    assert normalized(normalized(text)) == normalized(text)
