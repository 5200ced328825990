"""What arguments must be: checked where they are given, and told in one form of words.

    learning_rate is -1; it must be a number, positive and finite

`check_fields` does that for a frozen dataclass, when it is made:

    check_fields(self, epochs=integer(1), learning_rate=number(above=0), reword=FLAG.or_none())
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_args

from meg_kernels.texts import as_texts, is_unicode

T = TypeVar("T")

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Check:
    """What one argument must be; a call with its name and its value checks it.

    Args:
        wanted: what it must be, in words that follow "it must be".
        read: gives the value as it is kept, with numpy's numbers as Python's; raises TypeError,
            ValueError or OverflowError for values that are not wanted.
        error: what is raised for those.
    """

    wanted: str
    read: Callable[[Any], Any]
    error: type[Exception] = ValueError

    def __call__(self, name: str, value: Any) -> Any:
        """The value as it is kept; `error` if it is not what is wanted."""
        try:
            return self.read(value)
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"{name} is {shown(value)}; it must be {self.wanted}") from None

    def or_none(self) -> Check:
        """The check of an argument that may also be None."""
        read = self.read
        return Check(
            f"{self.wanted}, or None",
            lambda value: None if value is None else read(value),
            self.error,
        )


def check_fields(instance: Any, **checks: Check) -> None:
    """Check fields of a dataclass, frozen or not, and keep their values as the checks give them."""
    for name, check in checks.items():
        object.__setattr__(instance, name, check(name, getattr(instance, name)))


def from_fields(
    kind: Callable[..., T], values: Any, name: str, **nested: Callable[[Any, str], Any]
) -> T:
    """A dataclass from its fields, as they stand in a file.

    Args:
        kind: the dataclass.
        values: fields by their names; one that is absent has its default.
        name: what the messages call it.
        nested: by its name, what makes a field that is itself a dataclass of its value and a name.

    Raises:
        ValueError: there are no fields, a field is unknown, or a value is out of range.
        TypeError: a field is missing that has no default.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is {shown(values)}; it must be an object with its fields")
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    for field in values:
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}; its fields are {', '.join(known)}")
    made = {
        field: nested[field](value, f"{field} of {name}")
        if field in nested and value is not None
        else value
        for field, value in values.items()
    }
    return kind(**made)


def shown(value: Any, most: int = 200) -> str:
    """The value as messages show it, cut short if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer, or a nesting, that Python does not print
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= most else f"{text[:most]}…"


def _wanted(fits: bool) -> None:
    if not fits:
        raise ValueError


def as_integer(value: Any) -> int:
    """A whole number, Python's or numpy's, as Python's; TypeError for others, and for a bool."""
    # PyTorch gives its booleans an index too, and so do older versions of numpy.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError
    return operator.index(value)


def integer(least: int, most: int | None = None) -> Check:
    """An integer, Python's or numpy's, in least to most; no bool."""

    def read(value: Any) -> int:
        number = as_integer(value)
        _wanted(number >= least and (most is None or number <= most))
        return number

    if most is None:
        return Check(f"an integer of at least {least}", read)
    return Check(f"an integer in {least} to {'2**63 - 1' if most == LARGEST_SEED else most}", read)


def number(
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Check:
    """A number in a range, Python's or numpy's; infinite only if `most` is, and no bool."""

    def read(value: Any) -> float:
        _wanted(isinstance(value, Real) and not isinstance(value, bool))
        kept = value if type(value) in (int, float) else float(value)
        _wanted(math.isfinite(kept) or kept == most)
        _wanted((above is None or kept > above) and (least is None or kept >= least))
        _wanted((below is None or kept < below) and (most is None or kept <= most))
        return kept

    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    if below is None and most is None:
        words = ["positive" if word == "above 0" else word for word in words] + ["finite"]
    return Check(f"a number, {' and '.join(words)}", read)


def _flag(value: Any) -> bool:
    _wanted(isinstance(value, bool))
    return value


def _text(value: Any) -> str:
    _wanted(isinstance(value, str) and is_unicode(value))
    return value


FLAG = Check("True or False", _flag)
TEXT = Check("text without halves of surrogate pairs, which no file takes", _text)
SEED = integer(0, LARGEST_SEED)


def one_of(choices: Any) -> Check:
    """One of the strings of a `Literal`."""
    strings = get_args(choices)

    def read(value: Any) -> str:
        _wanted(isinstance(value, str) and value in strings)
        return value

    return Check(f"one of {', '.join(map(repr, strings))}", read)


def instance_of(kind: type) -> Check:
    """An instance of this class; TypeError for others."""

    def read(value: Any) -> Any:
        _wanted(isinstance(value, kind))
        return value

    return Check(f"an instance of {kind.__name__}", read, TypeError)


def as_path(name: str, value: Any) -> Path:
    """A path that a caller gave as text or as an object of its own.

    Raises:
        TypeError: it is neither.
        ValueError: it names nothing: it is empty, or holds a NUL.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(path := os.fspath(value), bytes):
        raise TypeError(f"{name} is {shown(value)}; it must be a path: a text, or a pathlib.Path")
    if not path or "\0" in path:
        raise ValueError(
            f"{name} is {path!r}, which names nothing; it must be a path, such as 'edited' ('.' is "
            "the current folder)"
        )
    return Path(path)


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(as_texts("", value))
    _wanted(bool(texts))
    return texts


TEXTS = Check("a list of texts, at least one", _texts)
