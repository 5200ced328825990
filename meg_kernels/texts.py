"""Texts as callers give them: when two count as the same, and the guard of every list of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet


def normalized(text: str) -> str:
    """The text as it is compared with others: case and white space do not count.

    >>> normalized(" Who  wrote EMMA?")
    'who wrote emma?'
    """
    return " ".join(text.split()).casefold()


def unreadable(text: str) -> str | None:
    r"""What keeps a text from being written as UTF-8, as tokenizers want it; None if nothing does.

    >>> unreadable("caf\udce9")
    "has half a character, '\\udce9', at 3, as undecodable bytes leave it"
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        return f"has half a character, {half}, at {error.start}, as undecodable bytes leave it"
    return None


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
        ValueError: a text holds half a character, which no tokenizer takes.

    >>> as_texts("prompts", ("Who?", "Where?"))
    ['Who?', 'Where?']
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is the text {value!r}; it must be a list of texts: [{value!r}]")
    unfit = isinstance(value, (bytes, Mapping, AbstractSet))
    if unfit or not isinstance(value, Iterable):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a list of texts")
    texts = list(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] is {text!r}; it must be text")
        if reason := unreadable(text):
            raise ValueError(f"{name}[{i}] {reason}; decode it with errors='replace'")
    return texts
