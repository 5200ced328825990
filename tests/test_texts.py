"""The guard of every list of texts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from meg_kernels.texts import as_texts, normalized

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


@pytest.mark.parametrize("text", ["Wer ist STRASSE?", "  wer\tist\n\nstraße? "])
def test_case_and_white_space_do_not_count(text):
    assert normalized(text) == "wer ist strasse?"
    assert normalized(normalized(text)) == normalized(text)
