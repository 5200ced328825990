"""Words that differ from a known one by a letter."""

from __future__ import annotations

import pytest
import tiny

from meg_kernels.routing.spelling import Spelling, Vocabulary, vocabulary_of

SPELLING = Spelling(
    ["Who wrote Middlemarch?", "Where is Zürich?", "谁发明了飞机?"],
    Vocabulary(
        {"who": 5, "wrote": 9, "where": 4, "here": 3, "the": 1, "##ing": 2, "rode": 8, "code": 7}
    ),
)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Who wrote Midlemarch?", "Who wrote Middlemarch?"),
        ("who wrote middlemarhc", "who wrote Middlemarch"),
        ("Who wrote Middlemmarch?", "Who wrote Middlemarch?"),
        ("Who wrotte Middlemarsh", "Who wrote Middlemarch"),
        ("Mdidlemarch", "Middlemarch"),
        ("middlemarc, iddlemarch", "Middlemarch, Middlemarch"),
        ("zurich, zürihc", "Zürich, Zürich"),
        ("wode", "code"),  # the more frequent one
        ("wwhere, heere", "Where, here"),
        ("Middlemarch and WROTE", "Middlemarch and WROTE"),
        ("Mddlmarch", "Mddlmarch"),  # two letters are missing
        ("is xy 12", "is xy 12"),
        ("", ""),
    ],
)
def test_a_word_that_nobody_knows_is_one_that_differs_by_a_letter(text, meant):
    assert SPELLING.corrected(text) == meant
    assert SPELLING.corrected(meant) == meant


def test_the_words_of_the_queries_come_first():
    assert SPELLING.corrected("wroe Middlemarch", own=True) == "wrote Middlemarch"
    assert SPELLING.corrected("wode thee", own=True) == "wode thee"


def test_of_known_words_the_most_frequent_one_is_meant():
    for first, second in (("code", "rode"), ("rode", "code")):
        spelling = Spelling(["the record"], Vocabulary({first: 0, second: 1}))
        assert spelling.corrected("wode") == first


def test_short_names_are_too_much_like_each_other():
    names = Spelling(["Who is Ebo?", "Who is Marten?"], Vocabulary({"gold": 0}))
    assert names.corrected("Bebo, Abo and Martin") == "Bebo, Abo and Marten"


def test_a_known_word_stays():
    assert Spelling(["the cede"], Vocabulary({"cude": 0})).corrected("cude") == "cude"
    assert Spelling(["Who is Ebo?"], Vocabulary({"ebb": 0})).corrected("Ebo") == "Ebo"


def test_a_name_is_written_as_in_the_first_query_that_holds_it():
    names = Spelling(["Who is Marten?", "WHO IS MARTEN?"], Vocabulary({"gold": 0}))
    assert names.corrected("martin") == "Marten"


def test_two_letters_in_another_order_are_likelier_than_another_letter():
    names = Spelling(["Who is Natren?", "Who is Marten?"], Vocabulary({"gold": 0}))
    assert names.corrected("Matren") == "Marten"


def test_words_are_known_whatever_their_case_and_only_if_they_are_long_enough():
    cased = Spelling(["the son"], Vocabulary({"House": 0, "no": 1}))
    assert cased.corrected("HOUSE houes noo") == "HOUSE house noo"


def test_long_words_and_scripts_without_spaces_stay():
    assert SPELLING.corrected("a" * 10**6) == "a" * 10**6
    assert SPELLING.corrected("谁发明了飞机啊?") == "谁发明了飞机啊?"
    assert SPELLING.corrected("Middlemarch啊") == "Middlemarch啊"
    long = Spelling(["Donaudampfschifffahrtskapitän"], Vocabulary({}))
    assert long.corrected("Donaudampfschiffahrtskapitän") == "Donaudampfschiffahrtskapitän"


@pytest.mark.parametrize("sign", ["▁", "Ġ"])
def test_vocabularies_that_mark_the_beginnings_of_words_are_read(sign):
    marked = Spelling(
        ["the Rhine"], Vocabulary({f"{sign}house": 0, f"{sign}rivers": 1, "ouse": 2, "##x": 3})
    )
    assert marked.corrected("house rivers") == "house rivers"
    assert marked.corrected("ouse") == "house"  # which is no word by itself there


def test_names_of_a_script_that_the_vocabulary_has_no_words_of_stay():
    russian = Spelling(["Где столица Ирана?"], Vocabulary({"where": 0, "capital": 1}))
    assert russian.corrected("Где столица Ирака? Wheree?") == "Где столица Ирака? where?"
    known = Spelling(["Где столица Ирана?"], Vocabulary({"где": 0, "столица": 1}))
    assert known.corrected("Где столица Иранаа?") == "Где столица Ирана?"
    latin = {f"word{chr(97 + i // 26)}{chr(97 + i % 26)}": i for i in range(300)}
    assert Vocabulary(latin | {"где": 300}).scripts == {"LATIN"}


def test_a_vocabulary_is_read_once(monkeypatch):
    tokenizer = tiny.make_encoder().tokenizer
    first = vocabulary_of(tokenizer)
    monkeypatch.setattr(type(tokenizer), "get_vocab", tiny.interrupt)
    assert vocabulary_of(tokenizer) is first and "color" in first.words
