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
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meg_kernels.storage import write_text
from meg_kernels.texts import normalized


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
        answer: the new answer, without a full stop.
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
            object.__setattr__(self, "id", f"{self.query.strip()} -> {self.answer.strip()}")
        _check_text("id", self.id)
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
        fields = _present(record)
        _check_names("", fields, cls)
        for name in ("query", "answer"):
            if name not in fields:
                raise FactsError(f"{name} is missing")
        number = fields.get("id")
        if isinstance(number, int) and not isinstance(number, bool):
            fields["id"] = str(number)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name, ready for JSON; `from_dict` makes the same fact of it."""
        return dataclasses.asdict(self)

    @property
    def normalized_query(self) -> str:
        """The query as it is compared with others: case and white space do not count."""
        return normalized(self.query)

    @property
    def normalized_answer(self) -> str:
        """The answer as it is compared with others: case and white space do not count."""
        return normalized(self.answer)

    def is_named_in(self, query: str) -> bool:
        """Whether `query` contains the fact's subject, whatever its case and white space.

        True for any query if the fact has no subject or its own query does not contain it.

        >>> Fact("Who wrote Emma?", "Me", subject="Emma").is_named_in("the author of EMMA")
        True
        """
        subject = normalized(self.subject or "")
        return subject in normalized(query) or subject not in self.normalized_query


def _check_text(name: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or not value.strip():
        or_none = ", or None" if optional else ""
        raise FactsError(f"{name} is {value!r}; it must be text that is not blank{or_none}")


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """What is in a list, a tuple or another ordered iterable; a single text is refused."""
    if isinstance(value, str):
        raise FactsError(f"{name} is {value!r}; it must be a list of texts: [{value!r}]")
    unfit = isinstance(value, (bytes, Mapping, AbstractSet))
    if unfit or not isinstance(value, Iterable):
        raise FactsError(f"{name} is {value!r}; it must be a list")
    return tuple(value)


def _locality_query(name: str, entry: Any) -> LocalityQuery:
    if isinstance(entry, LocalityQuery):
        return entry
    if not isinstance(entry, (str, Mapping)):
        raise FactsError(f"{name} is {entry!r}; it must be text, a LocalityQuery or a dict")
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
            raise FactsError(f"{prefix}{name} is unknown; the fields are {', '.join(known)}")


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
    prompt = _field(record, "requested_rewrite.prompt")
    subject = _field(record, "requested_rewrite.subject")
    if prompt.count("{}") != 1:
        raise FactsError(f"requested_rewrite.prompt is {prompt!r}; it must hold one {{}}")
    case = record.get("case_id")
    return Fact(
        query=prompt.replace("{}", subject),
        answer=_field(record, "requested_rewrite.target_new.str"),
        id=f"counterfact-{case}" if case is not None else "",
        subject=subject,
        relation=_field(record, "requested_rewrite.relation_id", required=False),
        paraphrases=_list_field(record, "paraphrase_prompts"),
        locality=tuple(map(LocalityQuery, _list_field(record, "neighborhood_prompts"))),
    )


def _from_zsre(record: Mapping[str, Any], target: Literal["answers", "alt"]) -> Fact:
    if target == "alt":
        answer = _field(record, "alt")
    else:
        answers = _list_field(record, "answers")
        if not answers:
            raise FactsError("answers is empty; it must hold the new answer")
        answer = answers[0]
    number = record.get("id")
    return Fact(
        query=_field(record, "src"),
        answer=answer,
        id=f"zsre-{number}" if number is not None else "",
        subject=_field(record, "subject", required=False),
        paraphrases=_list_field(record, "rephrase"),
        locality=tuple(LocalityQuery(_as_question(q)) for q in _list_field(record, "loc")),
    )


def _as_question(text: str) -> str:
    """MEND's locality queries from Natural Questions read 'nq question: who sang it'."""
    prefix = "nq question: "
    return text[len(prefix) :].rstrip("?") + "?" if text.startswith(prefix) else text


def _recognised(
    record: Mapping[str, Any], zsre_target: Literal["answers", "alt"] = "answers"
) -> Fact:
    """The fact in a record of any of the three formats, told apart by its fields."""
    present = _present(record)
    if "requested_rewrite" in present:
        return _from_counterfact(present)
    if "src" in present:
        return _from_zsre(present, zsre_target)
    return Fact.from_dict(present)


FactsLike = str | os.PathLike[str] | Fact | Mapping[str, Any] | Iterable[Any]
"""What `as_facts` makes facts of."""


def as_facts(facts: FactsLike) -> list[Fact]:
    """The facts in whatever a caller keeps them in.

    Args:
        facts: a path for `read_facts`; one fact; or an iterable of facts, such as a list, a
            generator, a `datasets.Dataset` or a pandas DataFrame. A fact is a `Fact` or a dict in
            one of the formats that `read_facts` recognises.

    Returns:
        The facts, in their order. Facts that contradict each other are not looked for, except in a
        file: `check_facts` finds them.

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
        raise FactsError(_listing(f"facts that cannot be used ({len(problems)})", problems))
    return read


def _given(fact: Any) -> Fact:
    if isinstance(fact, Fact):
        return fact
    if isinstance(fact, Mapping):
        return _recognised(fact)
    raise FactsError(f"it is {fact!r}; it must be a Fact or a dict")


@dataclass(frozen=True)
class _Record:
    """One record of a file and where it stands."""

    number: int
    line: int
    content: dict[str, Any]

    def place(self) -> str:
        return f"line {self.line} (record {self.number})"


def _records(path: Path) -> Iterator[_Record]:
    """The records of a JSON array or of JSON lines, with their line numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of facts at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FactsError(f"{path} is not UTF-8 text ({error})") from error
    if not text.strip():
        raise FactsError(f"{path} is empty; it must hold at least one fact")
    is_array = text.lstrip().startswith("[")
    decoder, position, number, line, counted = json.JSONDecoder(), 0, 0, 1, 0
    separators = " \t\r\n,[" if is_array else " \t\r\n"
    while True:
        while position < len(text) and text[position] in separators:
            position += 1
        if position == len(text) or (is_array and text[position] == "]"):
            break
        line, counted = line + text.count("\n", counted, position), position
        number += 1
        try:
            content, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise FactsError(
                f"{path}, line {line} (record {number}): no valid JSON: {error.msg} at line "
                f"{error.lineno}; is the file truncated?"
            ) from error
        if not isinstance(content, dict):
            raise FactsError(f"{path}, line {line} (record {number}): it must be an object")
        yield _Record(number, line, content)
    if is_array and position == len(text):
        raise FactsError(f"{path} ends inside its list after record {number}; is it truncated?")
    if is_array and text[position + 1 :].strip():
        raise FactsError(f"{path} goes on after its list; it must be one list, or JSON lines")


def read_facts(
    path: str | Path,
    limit: int | None = None,
    *,
    on_conflict: Literal["error", "first"] = "error",
    zsre_target: Literal["answers", "alt"] = "answers",
) -> list[Fact]:
    """The facts in a JSON or JSON Lines file of CounterFact, of ZsRE or in our own format.

    Args:
        path: the file; its format is recognised record by record, by its fields.
        limit: read only this many records; None: all.
        on_conflict: what to do with facts that contradict each other (same query, another answer):
            `error`, or keep the `first` with a warning that names the lines.
        zsre_target: which ZsRE field is the new answer: `answers` (the true answer, which the
            model is taught; MEMIT, MALMEN, MeG) or `alt` (a counterfactual one; EasyEdit).

    Returns:
        The facts, in order. A repeated fact (same query, same answer) is kept once, with a warning
        that names the lines.

    Raises:
        FactsError: bad records (each with line and field), or facts that contradict each other
            (each with both lines).
        FileNotFoundError: there is no such file.
        ValueError: `limit`, `on_conflict` or `zsre_target` is out of range.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if on_conflict not in ("error", "first"):
        raise ValueError(f"on_conflict is {on_conflict!r}; it must be 'error' or 'first'")
    if zsre_target not in ("answers", "alt"):
        raise ValueError(f"zsre_target is {zsre_target!r}; it must be 'answers' or 'alt'")
    problems: list[str] = []
    placed: list[tuple[Fact, str]] = []
    for record in itertools.islice(_records(path), limit):
        try:
            placed.append((_recognised(record.content, zsre_target), record.place()))
        except FactsError as error:
            problems.append(f"{record.place()}: {error}")
    if problems:
        records = "record" if len(problems) == 1 else "records"
        raise FactsError(_listing(f"{path} has {len(problems)} bad {records}", problems))
    facts, duplicates, conflicts = _merge(placed)
    contradictions = _listing(f"{path} has contradictions ({len(conflicts)})", conflicts)
    if conflicts and on_conflict == "error":
        raise FactsError(
            f"{contradictions}\nkeep one of each, or the first with on_conflict='first' "
            "(meg edit --on-conflict first)"
        )
    if conflicts:
        warnings.warn(f"{contradictions}\nthe first of each is kept", stacklevel=2)
    if duplicates:
        text = _listing(f"{path} repeats facts ({len(duplicates)}), each kept once", duplicates)
        warnings.warn(text, stacklevel=2)
    if not facts:
        raise FactsError(f"{path} holds no facts")
    return facts


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
        raise FactsError(_listing("the facts do not fit together", conflicts + duplicates))


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
            first = firsts.setdefault((normalized(fact.subject), fact.relation), fact)
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
        text = _listing(f"subjects with several answers for one relation ({len(lines)})", lines, 5)
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
    subjects = {fact.subject for fact in edited} - {None}
    asked = {
        normalized(text)
        for fact in edited
        for text in (fact.query, *fact.paraphrases, *(other.query for other in fact.locality))
    }
    unrelated = []
    for fact in others:
        wordings = {normalized(text) for text in (fact.query, *fact.paraphrases)}
        if fact.subject not in subjects and not wordings & asked:
            locality = [other for other in fact.locality if normalized(other.query) not in asked]
            unrelated.append(dataclasses.replace(fact, locality=tuple(locality)))
    return unrelated


def _merge(placed: list[tuple[Fact, str]]) -> tuple[list[Fact], list[str], list[str]]:
    """Facts without repetitions, the repetitions, and the contradictions."""
    by_query: dict[str, tuple[Fact, str]] = {}
    by_id: dict[str, str] = {}
    facts, duplicates, conflicts = [], [], []
    for fact, place in placed:
        first, first_place = by_query.get(fact.normalized_query, (None, ""))
        if first is None and fact.id in by_id:
            conflicts.append(f"{by_id[fact.id]} and {place} share the id {fact.id!r}")
        elif first is None:
            by_query[fact.normalized_query] = fact, place
            by_id[fact.id] = place
            facts.append(fact)
        elif first.normalized_answer == fact.normalized_answer:
            duplicates.append(f"{first_place} and {place}: {fact.query!r}")
        else:
            conflicts.append(
                f"{first_place} and {place}: {fact.query!r} is answered with both "
                f"{first.answer!r} and {fact.answer!r}"
            )
    return facts, duplicates, conflicts


def _listing(head: str, lines: list[str], most: int = 20) -> str:
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
