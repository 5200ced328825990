"""Texts as callers give them: when two count as the same, and the guard of every list of them.

Three rules, each on top of the one before:

    normalized          how a text is written does not count: case, white space, and signs that
                        keyboards and programs write in several ways (`plain`: all that but case)
    normalized_query    nor do the signs around a question: 'Who wrote "Emma"?', 'who wrote Emma'
    normalized_answer   nor the full stop behind an answer: 'Ana Vee.', 'Ana Vee'

Signs inside a text count, so that C and C++, 5 and -5, 10² and 102, Århus and Arhus stay apart.
Marks that a script may as well leave out do not: vowels of Arabic and Hebrew, the dots of ё.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeGuard

_ALIKE = {
    "'": "‘’‚‛ʻʼ`´′",
    '"': "“”„‟«»″〝〞〟",
    "-": "‐‑‒–—―−﹣",
    "...": "…",
    ".": "。۔",
    ",": "،、",
    ";": "؛",
    "?": "؟",
    # Zero width: they say how a line breaks or which way it is written.
    "": "\u00ad\u061c\u200b\u200c\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
}
# Of the joiner, only that between emoji counts: it makes one of several.
_JOINER = re.compile(r"\u200d(?=[\w\s\x00-\x7f]|$)")
_QUOTED = re.compile(r"""(?<!\S)(["'])((?:(?!\1).)+)\1(?=[?!.:;,]*(?:\s|$))""")
_BEFORE_QUERY, _BEHIND_QUERY = "¿¡ ", "?!.:;,। "
# A letter or digit of a script that puts spaces between words. Thai, Lao, Tibetan, Burmese, Khmer,
# Japanese and Chinese put none.
SPACED = re.compile(
    r"[^\W_\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)
# Of decomposed text: vowels and lengthening signs of Arabic and Hebrew; what alif carries, ё's dots
_VOWELS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c7\u0640\u064b-\u0652\u0670]")
_CARRIED = re.compile("(?<=\u0627)[\u0653-\u0655]+|(?<=[\u0415\u0435])\u0308+")
# The ending by which a Russian word is declined, what may stand in its place, and a vowel before
# the last consonant, which may drop out.
_DECLINED = re.compile(r"(?<=[а-я]{3})(?:[иоы]й|[ая]я|[еоы]е|[аеийоуыьэюя])$")
_ENDING = "[аеийоуыьэюягмхв]{0,3}(?!\\w)"
_FLEETING = re.compile(r"(?<=[а-я]{2})[ео](?=[бвгджзклмнпрстфхцчшщ]$)")
# What Arabic writes in one word with a name: and, so; by, like, for; the.
_ARTICLE = re.compile(r"(?:\u0627\u0644)?(?=[\u0621-\u064a]{2})")
_ATTACHED = "[\u0648\u0641]?[\u0628\u0643\u0644]?(?:\u0627\u0644|\u0644)?"
_FULL_STOP = re.compile(r"(?<!\.)\.$")


def _table() -> dict[int, str]:
    """Every character that is another way to write others, with those."""
    table = {ord(other): sign for sign, others in _ALIKE.items() for other in others}
    for code in (0x3000, *range(0xFF00, 0xFFF0)):  # of full and of half width
        kind, *codes = unicodedata.decomposition(chr(code)).split() or [""]
        if kind in ("<wide>", "<narrow>"):
            table[code] = table.get(plain := int(codes[0], 16), chr(plain))
    return table


_TABLE = _table()


def normalized(text: str) -> str:
    """The text as it is compared with others, whatever way it is written.

    Case and white space do not count, nor the form of quotes and dashes, the width of characters,
    how accents are composed, marks that may be left out, and characters of no width.

    >>> normalized(" Who  wrote ‘EMMA’?")
    "who wrote 'emma'?"
    """
    text = text.casefold()
    return plain(text if text.isascii() else unicodedata.normalize("NFD", text).casefold())


def plain(text: str) -> str:
    """The text with its signs written in one of the ways in which they can be; its case stays.

    >>> plain("Ｗho  wrote ‘Emma’？")
    "Who wrote 'Emma'?"
    """
    if text.isascii():
        return " ".join(text.replace("`", "'").split())
    text = _VOWELS.sub("", unicodedata.normalize("NFD", text).translate(_TABLE))
    text = _CARRIED.sub("", _JOINER.sub("", text))
    return " ".join(unicodedata.normalize("NFC", text).split())


def is_question(text: str) -> bool:
    """Whether the text ends with a question mark, Latin, CJK or Arabic; else it begins a sentence.

    >>> [is_question(text) for text in ("Who wrote Emma? ", "谁写了《红楼梦》？", "Emma is by")]
    [True, True, False]
    """
    return normalized(text).endswith("?")


def normalized_query(text: str) -> str:
    """What a query asks: two with the same one ask the same.

    >>> normalized_query("Who wrote “Emma”?") == normalized_query("who wrote Emma")
    True
    """
    text = _unquoted(normalized(text))
    return text.lstrip(_BEFORE_QUERY).rstrip(_BEHIND_QUERY) or text


def normalized_answer(text: str) -> str:
    """What an answer says: two with the same one are the same answer.

    >>> normalized_answer("Ana Vee.") == normalized_answer("“Ana Vee”")
    True
    """
    text = _unquoted(normalized(text))
    return _FULL_STOP.sub("", text) or text


def _unquoted(text: str) -> str:
    """The text without the quotation marks around its words."""
    return _QUOTED.sub(lambda quoted: quoted[2] if re.search(r"\w", quoted[2]) else quoted[0], text)


def names(text: str, name: str) -> bool:
    """Whether a text holds a name, and not just as the end of another word; both normalized.

    What follows it may belong to the same word, as an ending does, and so may two letters behind
    each of its other words. Russian words may be declined, and Arabic ones have an article and
    prepositions before them.

    >>> [names(text, "emma") for text in ("who wrote emma?", "emmas author", "lemma 3", "写emma")]
    [True, True, False, True]
    >>> [names(text, "австрия") for text in ("столица австрии", "столица австралии")]
    [True, False]
    """
    place = text.find(name)
    while place > 0 and SPACED.match(text[place - 1]) and SPACED.match(name):
        place = text.find(name, place + 1)
    has_forms = " " in name or not name.isascii()
    return place >= 0 or (has_forms and _in_any_form(name).search(text) is not None)


@functools.lru_cache(maxsize=1 << 16)
def _in_any_form(name: str) -> re.Pattern[str]:
    """A name's words with whatever endings and prefixes they may have."""
    return re.compile(r"\b" + " ".join(map(_any_form, name.split())))


def _any_form(word: str) -> str:
    if article := _ARTICLE.match(word):
        return _ATTACHED + re.escape(word[article.end() :]) + r"\w*"
    if stem := _DECLINED.split(word)[:-1]:
        return re.escape(stem[0]) + _ENDING
    return _FLEETING.sub(r"\g<0>?", re.escape(word)) + r"\w{0,2}"


def is_ordered(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether `value` is an iterable that has an order, and no text itself."""
    unfit = isinstance(value, (str, bytes, bytearray, Mapping, AbstractSet))
    return isinstance(value, Iterable) and not unfit


def is_unicode(text: str) -> bool:
    """Whether a text can be written: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_texts(name: str, value: Iterable[str]) -> list[str]:
    """The texts in a list, a tuple or any other iterable that has an order.

    Args:
        name: what the caller calls the argument; error messages begin with it.
        value: the texts. An iterator is read to its end. There may be none.

    Returns:
        The texts, in their order.

    Raises:
        TypeError: `value` is a single text, has no order or is no iterable, or one of its items is
            not text.
        ValueError: a text holds half of a surrogate pair.

    >>> as_texts("prompts", ("Who?", "Where?"))
    ['Who?', 'Where?']
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is the text {value!r}; it must be a list of texts: [{value!r}]")
    if not is_ordered(value):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a list of texts")
    texts = list(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] is {text!r}; it must be text")
        if not is_unicode(text):
            raise ValueError(
                f"{name}[{i}] is {text!r}; it must be text without halves of surrogate pairs, "
                "which no tokenizer takes"
            )
    return texts
