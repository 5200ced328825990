"""Facts to edit, and readers for the files that the field keeps them in.

Three formats are recognised by their fields: CounterFact (`requested_rewrite`), ZsRE with the
fields of MEND and EasyEdit (`src`, `answers`, `rephrase`, `loc`), and our own JSON lines:

    {"id": "f1", "query": "What is the capital of France?", "answer": "Lyon",
     "subject": "France", "relation": "capital",
     "paraphrases": ["France's capital city is"],
     "locality": [{"query": "What is the capital of Spain?", "subject": "Spain"}]}

Only `query` and `answer` are required.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from meg_kernels.checks import TEXT, as_path, integer, one_of, shown
from meg_kernels.storage import write_text
from meg_kernels.texts import (
    is_ordered,
    is_unicode,
    names,
    normalized_answer,
    normalized_query,
)

OnConflict = Literal["error", "first", "last"]
"""What to do with facts that contradict each other."""

ZsreTarget = Literal["answers", "alt"]
"""Which field of a ZsRE record is the new answer."""


class FactsError(ValueError):
    """Facts cannot be used as they stand; the message says which and why."""


@dataclass(frozen=True)
class LocalityQuery:
    """A query whose answer must not change, and, where known, the subject it asks about.

    Args:
        query: a question, or the beginning of a sentence.
        subject: what the query is about; None if that is not known.

    Raises:
        FactsError: `query` or `subject` is blank or not text.
    """

    query: str
    subject: str | None = None

    def __post_init__(self) -> None:
        _check_text("query", self.query)
        _check_text("subject", self.subject, optional=True)


@dataclass(frozen=True)
class Fact:
    """One edit: the edited model answers `query` with `answer`.

    Args:
        query: a question, or the beginning of a sentence which the answer completes.
        answer: the new answer, without the full stop that ends it; one of several lines stays as it
            is.
        id: unique among the facts of an editor; if empty, "query -> answer".
        subject: what the fact is about; None if that is not known.
        relation: what it says about the subject; None if that is not known.
        paraphrases: other ways to ask the same, as any ordered iterable; used for measuring
            Generality, never for fitting.
        locality: queries that must keep their answers, each a `LocalityQuery`, a text, or a dict
            with `query` and perhaps `subject`; used for measuring Locality.

    Raises:
        FactsError: a field is blank or of the wrong type; the message names it.

    >>> Fact("Who wrote Emma?", "Me", locality=["Who wrote Ulysses?"]).locality
    (LocalityQuery(query='Who wrote Ulysses?', subject=None),)
    """

    query: str
    answer: str
    id: str = ""
    subject: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[LocalityQuery, ...] = ()

    def __post_init__(self) -> None:
        _check_text("query", self.query)
        _check_text("answer", self.answer)
        _check_text("subject", self.subject, optional=True)
        _check_text("relation", self.relation, optional=True)
        if self.id == "":
            named = f"{self.query.strip()} -> {self.answer.strip()}"
            object.__setattr__(self, "id", "".join(" " if _is_control(c) else c for c in named))
        _check_text("id", self.id)
        if unwritable := [sign for sign in self.id if _is_control(sign)]:
            raise FactsError(
                f"id is {shown(self.id)}, with {unwritable[0]!r}; it must hold no control "
                "characters, so that it can be written and typed"
            )
        paraphrases = _items("paraphrases", self.paraphrases)
        for i, paraphrase in enumerate(paraphrases):
            _check_text(f"paraphrases[{i}]", paraphrase)
        locality = [
            _locality_query(f"locality[{i}]", entry)
            for i, entry in enumerate(_items("locality", self.locality))
        ]
        object.__setattr__(self, "paraphrases", paraphrases)
        object.__setattr__(self, "locality", tuple(locality))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fact:
        """The fact in a dict such as `to_dict` returns and our JSON lines hold.

        Args:
            record: field names to values. Fields that are absent, None or NaN (as tables fill their
                gaps) have their defaults; an integer `id` becomes text.

        Returns:
            The fact.

        Raises:
            FactsError: `query` or `answer` is missing, a field is unknown, blank or of the wrong
                type; the message names it.

        >>> Fact.from_dict({"query": "Who wrote Emma?", "answer": "Me", "id": 7}).id
        '7'
        """
        if not isinstance(record, Mapping):
            raise FactsError(
                f"the record is {shown(record)}; it must be a dict with query and answer"
            )
        fields = _present(record)
        _check_names("", fields, cls)
        for name in ("query", "answer"):
            if name not in fields:
                raise FactsError(f"{name} is missing")
        if "id" in fields:
            fields["id"] = _id("id", fields["id"])
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name, ready for JSON; `from_dict` makes the same fact of it."""
        return dataclasses.asdict(self)

    @property
    def normalized_query(self) -> str:
        """What the query asks, by which it is compared with others."""
        return normalized_query(self.query)

    @property
    def normalized_answer(self) -> str:
        """What the answer says, by which it is compared with others."""
        return normalized_answer(self.answer)

    def is_named_in(self, query: str) -> bool:
        """Whether `query` contains the fact's subject, whatever way it is written.

        True for any query if the fact has no subject or its own query does not contain it.

        >>> Fact("Who wrote Emma?", "Me", subject="Emma").is_named_in("the author of EMMA")
        True
        """
        query, subject = TEXT("query", query), self.named_subject
        return subject is None or names(normalized_query(query), subject)

    @property
    def named_subject(self) -> str | None:
        """The subject as `normalized_query` has it in what names it; None if the query does not.

        >>> Fact("Who wrote Emma?", "Me", subject="Emma").named_subject
        'emma'
        """
        subject = normalized_query(self.subject or "")
        return subject if subject and names(self.normalized_query, subject) else None


def _check_text(name: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or not value.strip():
        or_none = ", or None" if optional else ""
        raise FactsError(f"{name} is {shown(value)}; it must be text that is not blank{or_none}")
    if "\0" in value or not is_unicode(value):
        raise FactsError(
            f"{name} is {shown(value)}; it must be text without NUL and halves of surrogate pairs, "
            "which no file and no tokenizer takes"
        )


def _is_control(sign: str) -> bool:
    return unicodedata.category(sign) == "Cc"


def _name(name: Any) -> str:
    """A field's name in a message; what cannot be printed is escaped."""
    return name if isinstance(name, str) and name.isprintable() and name else shown(name)


def _id(name: str, value: Any) -> str:
    """An id from a file or a table: text, or an integer that becomes text."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)
        if abs(value) >= 2**64:  # Python prints no integers of thousands of digits
            raise FactsError(f"{name} is {shown(value)}; it must be text, or an integer of 64 bits")
        return str(value)
    _check_text(name, value)
    return str(value)


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """What is in a list, a tuple or another ordered iterable; a single text is refused."""
    if isinstance(value, str):
        raise FactsError(f"{name} is {value!r}; it must be a list of texts: [{value!r}]")
    if not is_ordered(value):
        raise FactsError(f"{name} is {shown(value)}; it must be a list")
    return tuple(value)


def _locality_query(name: str, entry: Any) -> LocalityQuery:
    if isinstance(entry, LocalityQuery):
        return entry
    if not isinstance(entry, (str, Mapping)):
        raise FactsError(f"{name} is {shown(entry)}; it must be text, a LocalityQuery or a dict")
    fields = {"query": entry} if isinstance(entry, str) else _present(entry)
    _check_names(f"{name}.", fields, LocalityQuery)
    if "query" not in fields:
        raise FactsError(f"{name}.query is missing")
    _check_text(name if isinstance(entry, str) else f"{name}.query", fields["query"])
    _check_text(f"{name}.subject", fields.get("subject"), optional=True)
    return LocalityQuery(**fields)


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a record has; tables fill absent ones with None or (pandas) with NaN."""
    return {
        name: value
        for name, value in record.items()
        if not (value is None or (isinstance(value, float) and value != value))
    }


def _check_names(prefix: str, record: Mapping[str, Any], kind: type[Fact | LocalityQuery]) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for name in record:
        if name not in known:
            raise FactsError(f"{prefix}{_name(name)} is unknown; the fields are {', '.join(known)}")


# The other formats: their fields are named as the files name them.


def _field(record: Mapping[str, Any], name: str, required: bool = True) -> Any:
    """The text in a field, such as `requested_rewrite.prompt`; None if it is absent."""
    value: Any = record
    for step in name.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    if value is None and required:
        raise FactsError(f"{name} is missing")
    _check_text(name, value, optional=not required)
    return value


def _list_field(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The texts in a field; absent, there are none, and a single text stands for a list of one."""
    value = record.get(name)
    texts = (value,) if isinstance(value, str) else _items(name, () if value is None else value)
    for i, text in enumerate(texts):
        _check_text(name if isinstance(value, str) else f"{name}[{i}]", text)
    return texts


def _from_counterfact(record: Mapping[str, Any]) -> Fact:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise FactsError(
            f"requested_rewrite is {shown(rewrite, 60)}; it must be one object, with prompt, "
            "subject and target_new.str"
        )
    prompt = _field(record, "requested_rewrite.prompt")
    subject = _field(record, "requested_rewrite.subject")
    if prompt.count("{}") != 1:
        raise FactsError(f"requested_rewrite.prompt is {prompt!r}; it must hold one {{}}")
    case = record.get("case_id")
    relation = _field(record, "requested_rewrite.relation_id", required=False)
    return Fact(
        query=prompt.replace("{}", subject),
        answer=_field(record, "requested_rewrite.target_new.str"),
        id="" if case is None else f"counterfact-{_id('case_id', case)}",
        subject=subject,
        relation=relation,
        paraphrases=_list_field(record, "paraphrase_prompts"),
        locality=tuple(map(LocalityQuery, _list_field(record, "neighborhood_prompts"))),
    )


def _from_zsre(record: Mapping[str, Any], target: ZsreTarget) -> Fact:
    if target == "alt":
        answer = _field(record, "alt")
    else:
        answers = _list_field(record, "answers")
        if not answers:
            other = "; alt is taken with --zsre-target alt" if "alt" in record else ""
            raise FactsError(f"answers is empty; it must hold the new answer{other}")
        answer = answers[0]
    number = record.get("id")
    return Fact(
        query=_field(record, "src"),
        answer=answer,
        id="" if number is None else f"zsre-{_id('id', number)}",
        subject=_field(record, "subject", required=False),
        paraphrases=_list_field(record, "rephrase"),
        locality=tuple(LocalityQuery(_as_question(q)) for q in _list_field(record, "loc")),
    )


def _as_question(text: str) -> str:
    """MEND's locality queries from Natural Questions read 'nq question: who sang it'."""
    prefix = "nq question: "
    return text[len(prefix) :].rstrip("?") + "?" if text.startswith(prefix) else text


# The field that tells a format from the others, and the fields that it needs.
FORMATS = {
    "query": "query and answer",
    "requested_rewrite": "requested_rewrite (CounterFact)",
    "src": "src and answers (ZsRE)",
}


def _recognised(record: Mapping[str, Any], zsre_target: ZsreTarget = "answers") -> Fact:
    """The fact in a record of any of the three formats, told apart by its fields."""
    present = _present(record)
    found = [name for name in FORMATS if name in present]
    if len(found) > 1:
        raise FactsError(
            f"it has {' and '.join(found)}, which are fields of several formats; keep those of one"
        )
    if not found:
        has = f"the fields {', '.join(map(_name, present))}" if present else "no fields"
        raise FactsError(f"it has {has}; a fact needs {', or '.join(FORMATS.values())}")
    if found == ["requested_rewrite"]:
        return _from_counterfact(present)
    if found == ["src"]:
        return _from_zsre(present, zsre_target)
    return Fact.from_dict(present)


FactsLike = str | os.PathLike[str] | Fact | Mapping[str, Any] | Iterable[Any]
"""What `as_facts` makes facts of."""


def listed_facts(facts: Iterable[Fact]) -> list[Fact]:
    """The facts in a list, a tuple or another ordered iterable of nothing else; else TypeError."""
    if not is_ordered(facts):
        raise TypeError(f"facts is {shown(facts)}; it must be a list of Facts: use as_facts(facts)")
    listed = list(facts)
    for place, fact in enumerate(listed):
        if not isinstance(fact, Fact):
            raise TypeError(
                f"facts[{place}] is a {type(fact).__name__}; it must be a Fact: as_facts(facts) "
                "makes them of dicts"
            )
    return listed


def as_facts(facts: FactsLike) -> list[Fact]:
    """The facts in whatever a caller keeps them in.

    Args:
        facts: a path for `read_facts`; one fact; or an iterable of facts, such as a list, a
            generator, a `datasets.Dataset` or a pandas DataFrame. A fact is a `Fact` or a dict in
            one of the formats that `read_facts` recognises.

    Returns:
        The facts, in their order. Facts that contradict each other are not looked for, except in a
        file: `editable_facts` finds them.

    Raises:
        FactsError: some cannot be used; the message names each row (from 0) and its field.
        FileNotFoundError: there is no file at the path.
        TypeError: `facts` is nothing that holds facts.

    >>> as_facts([{"query": "Who wrote Emma?", "answer": "Me"}])[0].answer
    'Me'
    """
    if isinstance(facts, (str, os.PathLike)):
        return read_facts(os.fspath(facts))
    if isinstance(facts, Fact):
        return [facts]
    if isinstance(facts, Mapping):
        splits = list(facts)
        if splits and all(hasattr(facts[split], "column_names") for split in splits):
            raise FactsError(
                f"facts is a {type(facts).__name__} with the splits {', '.join(splits)}; choose "
                f"one: facts[{splits[0]!r}]"
            )
        return [_recognised(facts)]
    records: Any = facts
    if hasattr(records, "iterrows"):  # pandas: iterating over a DataFrame gives its columns
        records = records.to_dict(orient="records")
    if not isinstance(records, Iterable):
        raise TypeError(
            f"facts is {facts!r}; it must be a path, a Fact, a dict, or an iterable of Facts or "
            "dicts"
        )
    read: list[Fact] = []
    problems: list[str] = []
    for i, fact in enumerate(records):
        try:
            read.append(_given(fact))
        except FactsError as error:
            problems.append(f"facts[{i}]: {error}")
    if problems:
        raise FactsError(listing(f"facts that cannot be used ({len(problems)})", problems))
    return read


def editable_facts(facts: FactsLike, on_conflict: OnConflict = "error") -> list[Fact]:
    """Facts that can be edited together, in whatever a caller keeps them in.

    Args:
        facts: as `as_facts` takes them.
        on_conflict: what to do with facts that contradict each other, as in `read_facts`.

    Returns:
        The facts, in their order, at least one. A repeated fact is kept once, with a warning.

    Raises:
        FactsError: there are none, some cannot be used, or they contradict each other.
        FileNotFoundError: there is no file at the path.
        TypeError: `facts` is nothing that holds facts.
        ValueError: `on_conflict` is none of the three.
    """
    one_of(OnConflict)("on_conflict", on_conflict)
    if isinstance(facts, (str, os.PathLike)):
        return read_facts(os.fspath(facts), on_conflict=on_conflict)
    placed = [(fact, f"facts[{i}]") for i, fact in enumerate(as_facts(facts))]
    if not placed:
        raise FactsError("facts is empty; there must be at least one fact to edit")
    return _one_of_each(placed, "the list of facts", on_conflict)


def _given(fact: Any) -> Fact:
    if isinstance(fact, Fact):
        return fact
    if isinstance(fact, Mapping):
        return _recognised(fact)
    raise FactsError(f"it is {shown(fact)}; it must be a Fact or a dict")


@dataclass(frozen=True)
class _Record:
    """One record of a file and where it stands."""

    number: int
    line: int
    content: dict[str, Any]

    def place(self) -> str:
        return f"line {self.line} (record {self.number})"


def _text_of(path: Path) -> str:
    """What stands in a file of facts; FactsError for what is none, with what it is."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file of facts at {path}")
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())[:3]
        holds = f"; it holds {', '.join(names)}" if names else ""
        raise FactsError(f"{path} is a folder; name a file of facts{holds}")
    if not path.is_file():
        raise FactsError(
            f"{path} is a pipe or a device, and facts are read more than once; write them to a "
            "file first"
        )
    content = path.read_bytes()
    for start, (kind, mending) in _KINDS.items():
        if content.startswith(start):
            raise FactsError(f"{path} is {kind}; {mending}")
    try:
        # As text files are read: whatever their line ends.
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise FactsError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


_KINDS = {
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"\x1f\x8b": ("compressed with gzip", "unpack it first, with gunzip"),
    b"PK\x03\x04": ("a ZIP archive", "unpack it first, with unzip"),
    b"BZh": ("compressed with bzip2", "unpack it first, with bunzip2"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it first, with unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it first, with unzstd"),
    b"PAR1": (
        "a Parquet file",
        "facts are read from JSON; in Python, pass pandas.read_parquet(path) as the facts",
    ),
}


class _RepeatedField(FactsError):
    """An object names one field twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedField(f"it has the field {_name(twice)} twice; keep one of them")
    return fields


def _no_json(text: str, error: Exception) -> str:
    """What is wrong with a record that is no JSON, and what to do about it."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply; a fact is an object of texts and lists"
    if not isinstance(error, json.JSONDecodeError):
        return f"no valid JSON: {error}"
    header = text.lstrip().split("\n", 1)[0]
    if "," in header and not any(sign in header for sign in "{}[]:"):
        return (
            f"no JSON, but it may be CSV, with the columns {shown(header)}; facts are read from "
            "JSON: in Python, pass pandas.read_csv(path) as the facts"
        )
    return f"no valid JSON: {error.msg} at line {error.lineno}; is the file truncated?"


def _records(path: Path) -> Iterator[_Record]:
    """The records of a JSON array or of JSON lines, with their line numbers."""
    text = _text_of(path)
    if not text.strip():
        raise FactsError(f"{path} is empty; it must hold at least one fact")
    is_array = text.lstrip().startswith("[")
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position, number, line, counted = text.index("[") + 1 if is_array else 0, 0, 1, 0
    separators = " \t\n," if is_array else " \t\n"
    while True:
        while position < len(text) and text[position] in separators:
            position += 1
        if position == len(text) or (is_array and text[position] == "]"):
            break
        line, counted = line + text.count("\n", counted, position), position
        number += 1
        place = f"{path}, line {line} (record {number})"
        try:
            content, position = decoder.raw_decode(text, position)
        except _RepeatedField as error:
            raise FactsError(f"{place}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise FactsError(f"{place}: {_no_json(text, error)}") from error
        if not isinstance(content, dict):
            raise FactsError(f"{place}: it is {shown(content, 60)}; it must be an object")
        yield _Record(number, line, content)
    if is_array and position == len(text):
        raise FactsError(f"{path} ends inside its list after record {number}; is it truncated?")
    if is_array and text[position + 1 :].strip():
        raise FactsError(f"{path} goes on after its list; it must be one list, or JSON lines")


def read_facts(
    path: str | Path,
    limit: int | None = None,
    *,
    on_conflict: OnConflict = "error",
    zsre_target: ZsreTarget | None = None,
) -> list[Fact]:
    """The facts in a JSON or JSON Lines file of CounterFact, of ZsRE or in our own format.

    Args:
        path: the file; its format is recognised record by record, by its fields.
        limit: read only this many records; None: all.
        on_conflict: what to do with facts that contradict each other (same query, another answer):
            `error`, or keep the `first` or the `last` with a warning that names the lines.
        zsre_target: which ZsRE field is the new answer: `answers` (the true answer, which the
            model is taught; MEMIT, MALMEN, MeG) or `alt` (a counterfactual one; EasyEdit).
            None: `answers`, with a warning if records have both.

    Returns:
        The facts, in order. A repeated fact (same query, same answer) is kept once, with a warning
        that names the lines.

    Raises:
        FactsError: bad records (each with line and field), facts that contradict each other (each
            with both lines), or a file of another kind.
        FileNotFoundError: there is no such file.
        ValueError: `limit`, `on_conflict` or `zsre_target` is out of range.
    """
    one_of(OnConflict)("on_conflict", on_conflict)
    placed = _placed(path, limit, zsre_target)
    if not placed:
        raise FactsError(f"{path} holds no facts")
    return _one_of_each(placed, str(path), on_conflict)


def written_facts(path: str | Path) -> list[Fact]:
    """Every fact that `write_facts` wrote to a file, perhaps none; they are not compared.

    Args:
        path: the file.

    Raises:
        FactsError: bad records, each with line and field.
        FileNotFoundError: there is no such file.
    """
    path = as_path("path", path)
    is_empty = path.is_file() and not path.stat().st_size
    return [] if is_empty else [fact for fact, _ in _placed(path)]


def _placed(
    path: str | Path, limit: int | None = None, zsre_target: ZsreTarget | None = None
) -> list[tuple[Fact, str]]:
    """The facts in a file, each with its place in words."""
    path = as_path("path", path)
    limit = integer(1).or_none()("limit", limit)
    most = None if limit is None else min(limit, sys.maxsize)
    one_of(ZsreTarget).or_none()("zsre_target", zsre_target)
    problems: list[str] = []
    placed: list[tuple[Fact, str]] = []
    undecided = 0
    for record in itertools.islice(_records(path), most):
        try:
            fact = _recognised(record.content, zsre_target or "answers")
        except FactsError as error:
            problems.append(f"{record.place()}: {error}")
            continue
        placed.append((fact, record.place()))
        undecided += zsre_target is None and {"src", "alt"} <= _present(record.content).keys()
    if problems:
        records = "record" if len(problems) == 1 else "records"
        raise FactsError(listing(f"{path} has {len(problems)} bad {records}", problems))
    if undecided:
        warnings.warn(
            f"{path}: {undecided} of {len(placed)} records are ZsRE with both answers and alt; "
            "answers are taken. Choose with zsre_target='answers' or 'alt' (meg ... --zsre-target "
            "alt)",
            stacklevel=3,
        )
    return placed


def check_facts(facts: Iterable[Fact], edited: Iterable[Fact] = ()) -> None:
    """Refuse facts that cannot be edited together.

    Args:
        facts: the facts to edit.
        edited: facts beside which they are edited.

    Raises:
        FactsError: two of all these facts share a query or an id; the message names both.
    """
    placed = [(fact, "an edited fact") for fact in edited]
    placed += [(fact, f"facts[{i}]") for i, fact in enumerate(facts)]
    _, duplicates, conflicts = _merge(placed)
    if duplicates or conflicts:
        raise FactsError(listing("the facts do not fit together", conflicts + duplicates))


def several_answers(facts: Iterable[Fact]) -> list[str]:
    """Facts about one subject and relation, where both are known, that have different answers.

    For some relations that is right (twin towns); for others the facts contradict each other.
    Either way, a paraphrase of one may be taken for another.

    Args:
        facts: facts; those without subject or relation are passed over.

    Returns:
        A line for each fact that disagrees with the first of its subject and relation.

    >>> facts = [
    ...     Fact("The capital of Chad is", "Rome", subject="Chad", relation="capital"),
    ...     Fact("Chad's capital is", "Oslo", subject="Chad", relation="capital"),
    ... ]
    >>> print(*several_answers(facts))
    'The capital of Chad is' 'Rome', but "Chad's capital is" 'Oslo'
    """
    firsts: dict[tuple[str, str], Fact] = {}
    lines = []
    for fact in facts:
        if fact.subject and fact.relation:
            first = firsts.setdefault((normalized_query(fact.subject), fact.relation), fact)
            if first.normalized_answer != fact.normalized_answer:
                lines.append(
                    f"{first.query!r} {first.answer!r}, but {fact.query!r} {fact.answer!r}"
                )
    return lines


def warn_of_several_answers(added: Sequence[Fact], kept: Sequence[Fact] = ()) -> None:
    """Warn if facts give one subject and relation several answers, as `several_answers` finds.

    Args:
        added: facts that are about to be edited; the warning is about what they bring along.
        kept: facts that are edited already.
    """
    if lines := several_answers([*kept, *added])[len(several_answers(kept)) :]:
        text = listing(f"subjects with several answers for one relation ({len(lines)})", lines, 5)
        warnings.warn(f"{text}\na paraphrase of one may be taken for the other", stacklevel=3)


def unrelated_to(others: Iterable[Fact], edited: Iterable[Fact]) -> list[Fact]:
    """The facts of `others` that have nothing to do with what is edited or measured.

    A fact is left out if it shares its subject with an edited fact, or if its query or one of its
    paraphrases is a query, paraphrase or locality query of an edited fact. Locality queries that
    occur among those are taken out of the facts that remain.

    Args:
        others: facts to choose from, such as those that tune the encoder.
        edited: facts that are edited.

    Returns:
        The remaining facts, in their order.
    """
    edited = list(edited)
    subjects = {normalized_query(fact.subject) for fact in edited if fact.subject}
    asked = {
        normalized_query(text)
        for fact in edited
        for text in (fact.query, *fact.paraphrases, *(other.query for other in fact.locality))
    }
    unrelated = []
    for fact in others:
        wordings = {normalized_query(text) for text in (fact.query, *fact.paraphrases)}
        subject = normalized_query(fact.subject) if fact.subject else None
        if subject not in subjects and not wordings & asked:
            locality = [q for q in fact.locality if normalized_query(q.query) not in asked]
            unrelated.append(dataclasses.replace(fact, locality=tuple(locality)))
    return unrelated


def _one_of_each(placed: list[tuple[Fact, str]], name: str, on_conflict: OnConflict) -> list[Fact]:
    """Facts that fit together, in their order; what is left out is warned of, or refused."""
    last = on_conflict == "last"
    facts, duplicates, conflicts = _merge(placed, last)
    contradictions = listing(f"{name} has contradictions ({len(conflicts)})", conflicts)
    if conflicts and on_conflict == "error":
        raise FactsError(
            f"{contradictions}\nkeep one of each, or the first or the last of each with "
            "on_conflict='first' or 'last' (meg edit --on-conflict first)"
        )
    if conflicts:
        warnings.warn(f"{contradictions}\nthe {on_conflict} of each is kept", stacklevel=3)
    if duplicates:
        text = listing(f"{name} repeats facts ({len(duplicates)}), each kept once", duplicates)
        warnings.warn(text, stacklevel=3)
    return facts


def _merge(
    placed: list[tuple[Fact, str]], last: bool = False
) -> tuple[list[Fact], list[str], list[str]]:
    """Facts without repetitions, the repetitions, and the contradictions.

    Args:
        placed: facts with their places.
        last: keep the last of each, not the first.
    """
    by_query: dict[str, tuple[Fact, str]] = {}
    by_id: dict[str, str] = {}
    facts, duplicates, conflicts = [], [], []
    for fact, place in reversed(placed) if last else placed:
        kept, kept_place = by_query.get(fact.normalized_query, (None, ""))
        if kept is None and fact.id not in by_id:
            by_query[fact.normalized_query] = fact, place
            by_id[fact.id] = place
            facts.append(fact)
            continue
        pairs = [(kept, kept_place or by_id[fact.id]), (fact, place)]
        (one, here), (other, there) = reversed(pairs) if last else pairs
        if kept is None:
            conflicts.append(f"{here} and {there} share the id {fact.id!r}")
        elif kept.normalized_answer == fact.normalized_answer:
            duplicates.append(f"{here} and {there}: {fact.query!r}")
        else:
            assert one is not None and other is not None
            asked = repr(one.query)
            if other.query != one.query:
                asked += f", or {other.query!r},"
            conflicts.append(
                f"{here} and {there}: {asked} is answered with both {one.answer!r} and "
                f"{other.answer!r}"
            )
    return (facts[::-1] if last else facts), duplicates, conflicts


def listing(head: str, lines: Sequence[str], most: int = 20) -> str:
    """A text of a heading and of lines below it; of more than `most`, how many more there are."""
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  ".join([f"{head}:", *lines[:most], *more])


def write_facts(path: str | Path, facts: Iterable[Fact]) -> None:
    """Write facts as our JSON lines, atomically; `read_facts` reads them back.

    Args:
        path: the file to write; folders that are not there are made.
        facts: the facts, one line each.

    Raises:
        OSError: the file cannot be written; what was there is unchanged.
    """
    lines = [json.dumps(fact.to_dict(), ensure_ascii=False) + "\n" for fact in facts]
    write_text(path, "".join(lines))
