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
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


def normalized(text: str) -> str:
    """What makes two texts the same: case and white space do not count."""
    return " ".join(text.split()).casefold()


class FactsError(ValueError):
    """A file of facts cannot be used as it stands; the message says which lines and why."""


@dataclass(frozen=True)
class LocalityQuery:
    """A query whose answer must not change, and, where known, the subject it asks about."""

    query: str
    subject: str | None = None


@dataclass(frozen=True)
class Fact:
    """One edit: `query` shall be answered with `answer`.

    Args:
        query: a question, or the beginning of a sentence which the answer completes.
        answer: the new answer, without a full stop.
        id: unique among the facts of an editor; default: made of query and answer.
        subject, relation: what the fact is about, where known.
        paraphrases: other ways to ask the same; used for measuring Generality, never for fitting.
        locality: queries that must keep their answers; used for measuring Locality.
    """

    query: str
    answer: str
    id: str = ""
    subject: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[LocalityQuery, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("query", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {value!r}; it must be text that is not blank")
        if not self.id:
            object.__setattr__(self, "id", f"{self.query.strip()} -> {self.answer.strip()}")

    @property
    def normalized_query(self) -> str:
        """What makes two queries the same: case and white space do not count."""
        return normalized(self.query)

    def is_named_in(self, query: str) -> bool:
        """Whether the query names the fact's subject as the fact's own query does.

        Of a fact without a subject, or whose query does not spell it, any query does.

        >>> Fact("Who wrote Emma?", "Me", subject="Emma").is_named_in("the author of EMMA")
        True
        """
        subject = normalized(self.subject or "")
        return subject in normalized(query) or subject not in self.normalized_query

    @property
    def normalized_answer(self) -> str:
        return normalized(self.answer)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Record:
    """One record of a file and where it stands."""

    number: int
    line: int
    content: dict[str, Any]

    def place(self) -> str:
        return f"line {self.line} (record {self.number})"

    def get(self, name: str, kind: type[Any], required: bool = True) -> Any:
        value: Any = self.content
        for step in name.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if value is None and not required:
            return None
        if value is None:
            raise FactsError(f"field {name!r} is missing")
        if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
            raise FactsError(f"field {name!r} is {value!r}; it must be {_KIND_NAMES[kind]}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; absent counts as empty, one text as a list of one."""
        if isinstance(self.content.get(name), str):
            return (self.get(name, str),)
        values = self.get(name, list, required=False) or []
        for i, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise FactsError(f"field '{name}[{i}]' is {value!r}; it must be a text")
        return tuple(values)


_LOCALITY = ("query", "subject")
_KIND_NAMES: dict[type[Any], str] = {
    str: "a text that is not blank",
    list: "a list",
    dict: "an object",
}


def _read_counterfact(record: _Record) -> Fact:
    prompt = record.get("requested_rewrite.prompt", str)
    subject = record.get("requested_rewrite.subject", str)
    if prompt.count("{}") != 1:
        raise FactsError(f"field 'requested_rewrite.prompt' is {prompt!r}; it must hold one {{}}")
    case = record.content.get("case_id")
    return Fact(
        query=prompt.replace("{}", subject),
        answer=record.get("requested_rewrite.target_new.str", str),
        id=f"counterfact-{case}" if case is not None else "",
        subject=subject,
        relation=record.get("requested_rewrite.relation_id", str, required=False),
        paraphrases=record.texts("paraphrase_prompts"),
        locality=tuple(LocalityQuery(q) for q in record.texts("neighborhood_prompts")),
    )


def _read_zsre(record: _Record, target: Literal["answers", "alt"]) -> Fact:
    if target == "alt":
        answer = record.get("alt", str)
    else:
        answers = record.texts("answers")
        if not answers:
            raise FactsError("field 'answers' is empty; it must hold the new answer")
        answer = answers[0]
    locality = record.texts("loc")
    number = record.content.get("id")
    return Fact(
        query=record.get("src", str),
        answer=answer,
        id=f"zsre-{number}" if number is not None else "",
        subject=record.get("subject", str, required=False),
        paraphrases=record.texts("rephrase"),
        locality=tuple(LocalityQuery(_as_question(text)) for text in locality),
    )


def _as_question(text: str) -> str:
    """MEND's locality queries from Natural Questions read 'nq question: who sang it'."""
    prefix = "nq question: "
    return text[len(prefix) :].rstrip("?") + "?" if text.startswith(prefix) else text


def _read_own(record: _Record) -> Fact:
    known = {f.name for f in dataclasses.fields(Fact)}
    if unknown := set(record.content) - known:
        raise FactsError(f"field {min(unknown)!r} is unknown; known: {', '.join(sorted(known))}")
    locality = []
    for i, entry in enumerate(record.get("locality", list, required=False) or []):
        entry = {"query": entry} if isinstance(entry, str) else entry
        query, subject = map(entry.get, _LOCALITY) if isinstance(entry, dict) else (None, None)
        if not isinstance(query, str) or not query.strip() or not isinstance(subject, str | None):
            raise FactsError(f"field 'locality[{i}]' is {entry!r}; it must be {{'query': text}}")
        if unknown := set(entry) - set(_LOCALITY):
            raise FactsError(f"field 'locality[{i}].{min(unknown)}' is unknown")
        locality.append(LocalityQuery(query, subject))
    return Fact(
        query=record.get("query", str),
        answer=record.get("answer", str),
        id=record.get("id", str, required=False) or "",
        subject=record.get("subject", str, required=False),
        relation=record.get("relation", str, required=False),
        paraphrases=record.texts("paraphrases"),
        locality=tuple(locality),
    )


def _reader_for(record: _Record, zsre_target: Literal["answers", "alt"]) -> Callable[[], Fact]:
    if "requested_rewrite" in record.content:
        return lambda: _read_counterfact(record)
    if "src" in record.content:
        return lambda: _read_zsre(record, zsre_target)
    return lambda: _read_own(record)


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
    """The facts in a CounterFact, ZsRE or own JSON or JSONL file.

    Args:
        path: the file; its format is recognised record by record, by its fields.
        limit: read only this many records.
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
            placed.append((_reader_for(record, zsre_target)(), record.place()))
        except ValueError as error:
            problems.append(f"{record.place()}: {error}")
    if problems:
        raise FactsError(_listing(f"{path} has {len(problems)} bad records", problems))
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
        text = _listing(f"{path} has {len(duplicates)} repeated facts, each kept once", duplicates)
        warnings.warn(text, stacklevel=2)
    if not facts:
        raise FactsError(f"{path} holds no facts")
    return facts


def check_facts(facts: Iterable[Fact]) -> None:
    """Raise FactsError if two facts share a query or an id."""
    placed = [(fact, f"fact {i + 1}") for i, fact in enumerate(facts)]
    _, duplicates, conflicts = _merge(placed)
    if duplicates or conflicts:
        raise FactsError(_listing("the facts do not fit together", conflicts + duplicates))


def several_answers(facts: Iterable[Fact]) -> list[str]:
    """Facts about one subject and relation, where both are known, that have different answers.

    That is right of some relations (twin towns); of others the facts contradict each other. Either
    way a paraphrase of one may be taken for another of them.

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
    """Warn of `several_answers` that facts bring along, beside those that are edited already."""
    if lines := several_answers([*kept, *added])[len(several_answers(kept)) :]:
        text = _listing(f"subjects with several answers for one relation ({len(lines)})", lines, 5)
        warnings.warn(f"{text}\na paraphrase of one may be taken for the other", stacklevel=3)


def unrelated_to(others: Iterable[Fact], edited: Iterable[Fact]) -> list[Fact]:
    """What of `others` has nothing to do with what is edited, or measured on.

    Those that share a subject with one of `edited`, or whose query or paraphrase is asked of one as
    query, paraphrase or locality query, are left out, and so are locality queries that are.
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
    """Write facts as our JSON lines, atomically; `read_facts` reads them back."""
    from meg_kernels.storage import write_text

    lines = [json.dumps(fact.to_dict(), ensure_ascii=False) + "\n" for fact in facts]
    write_text(path, "".join(lines))
