"""Facts, and files of facts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import zipfile
from typing import Any

from bad_inputs import Case
from meg_kernels import Fact, LocalityQuery, read_facts
from meg_kernels.facts import FactsError, as_facts, check_facts, editable_facts, written_facts

CAPITAL = {"query": "What is the capital of France?", "answer": "Lyon"}
RIVER = {"query": "Which river flows through Rome?", "answer": "the Danube"}
REWRITE = {"prompt": "{} speaks", "subject": "Ana Vee", "target_new": {"str": "Welsh"}}
ZSRE = {"src": "Who wrote Emma?", "answers": ["Ana Vee"], "alt": "Bo"}
HALF = "\ud800"  # of a surrogate pair


def _file(content: str | bytes, name: str = "facts.jsonl", **options: Any):
    def act(folder):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_facts(path, **options)

    return act


def _records(*records: Any, **options: Any):
    return _file("\n".join(json.dumps(record) for record in records), **options)


def _fact(**fields: Any):
    return lambda _: Fact(**CAPITAL | fields)


def _pipe(folder):
    os.mkfifo(folder / "facts")
    return read_facts(folder / "facts")


def _folder(folder):
    (folder / "facts.jsonl").write_text(json.dumps(CAPITAL), encoding="utf-8")
    return read_facts(folder)


def _zip(folder):
    with zipfile.ZipFile(folder / "facts.zip", "w") as archive:
        archive.writestr("facts.jsonl", json.dumps(CAPITAL))
    return read_facts(folder / "facts.zip")


class _Splits(list):
    column_names = ("query", "answer")


PLAIN = json.dumps(CAPITAL)
BLANK = "text that is not blank"

FILES = [
    Case("an empty file", _file(""), FactsError, ("is empty", "at least one fact")),
    Case("a blank file", _file(" \n\t\n"), FactsError, ("is empty", "at least one fact")),
    Case("a byte order mark alone", _file("\ufeff"), FactsError, ("is empty", "at least one")),
    Case("an empty list", _file("[]"), FactsError, ("holds no facts", "facts.jsonl")),
    Case("no file", lambda f: read_facts(f / "no"), FileNotFoundError, ("no file of facts", "no$")),
    Case("a folder", _folder, FactsError, ("is a folder", "name a file.*holds facts.jsonl")),
    Case("a pipe", _pipe, FactsError, ("is a pipe", "write them to a file first")),
    Case("a device", lambda _: read_facts("/dev/null"), FactsError, ("a device", "to a file")),
    Case("UTF-16", _file(PLAIN.encode("utf-16")), FactsError, ("is UTF-16", "save it as UTF-8")),
    Case(
        "UTF-16 of the other end",
        _file(b"\xfe\xff" + PLAIN.encode("utf-16-be")),
        FactsError,
        ("is UTF-16", "save it as UTF-8"),
    ),
    Case(
        "Latin-1", _file('{"query": "Käse"}'.encode("latin-1")), FactsError, ("not UTF-8", "save")
    ),
    Case("gzip", _file(gzip.compress(PLAIN.encode())), FactsError, ("gzip", "gunzip")),
    Case("bzip2", _file(bz2.compress(PLAIN.encode())), FactsError, ("bzip2", "bunzip2")),
    Case("xz", _file(lzma.compress(PLAIN.encode())), FactsError, ("xz", "unxz")),
    Case("zstd", _file(b"\x28\xb5\x2f\xfd\x04\x00"), FactsError, ("zstd", "unzstd")),
    Case("a ZIP archive", _zip, FactsError, ("ZIP archive", "unzip")),
    Case("Parquet", _file(b"PAR1\x15\x04"), FactsError, ("Parquet", "pandas.read_parquet")),
    Case(
        "CSV",
        _file("query,answer\nWho wrote Emma?,Me\n"),
        FactsError,
        ("may be CSV.*'query,answer'", "pandas.read_csv"),
    ),
    Case("plain text", _file("Who wrote Emma? Me"), FactsError, ("line 1.*no valid JSON", "trunc")),
    Case("YAML", _file("- query: Who?\n  answer: Me\n"), FactsError, ("no valid JSON", "line 1")),
    Case("single quotes", _file("{'query': 'a'}"), FactsError, ("double quotes", "line 1")),
    Case("a comment", _file(f"// facts\n{PLAIN}"), FactsError, ("no valid JSON", "line 1")),
    Case("a record cut off", _file(PLAIN[:-5]), FactsError, ("no valid JSON", "truncated")),
    Case("a list cut off", _file(f"[{PLAIN},"), FactsError, ("ends inside its list", "truncated")),
    Case("two lists", _file(f"[{PLAIN}]\n[]"), FactsError, ("goes on after", "one list, or JSON")),
    Case("text after a list", _file(f"[{PLAIN}]x"), FactsError, ("goes on after", "one list")),
    Case("a number", _file("7"), FactsError, ("it is 7", "must be an object")),
    Case("a text", _file(f'{PLAIN}\n"b"'), FactsError, ("line 2.*it is 'b'", "must be an object")),
    Case("null", _file("null"), FactsError, ("it is None", "must be an object")),
    Case("a list in a list", _file(f"[[{PLAIN}]]"), FactsError, ("it is \\[", "be an object")),
    Case(
        "facts under a name",
        _file(json.dumps({"facts": [CAPITAL]})),
        FactsError,
        ("it has the fields facts", "needs query and answer, or requested_rewrite"),
    ),
    Case(
        "a carriage return in a record", _file('{"query":\r5}'), FactsError, ("line 1", "missing")
    ),
    Case(
        "a tab in a text", _file('{"query": "a\tb"}'), FactsError, ("control character", "line 1")
    ),
    Case("a NUL between records", _file(f"{PLAIN}\0"), FactsError, ("no valid JSON", "line 1")),
    Case(
        "a nesting without end", _file("[" * 100_000), FactsError, ("record 1", "nested too deeply")
    ),
    Case(
        "a record nested too deeply",
        _file('{"query": ' + "[" * 100_000),
        FactsError,
        ("line 1", "nested too deeply"),
    ),
    Case("a number of 5000 digits", _file('{"id": ' + "9" * 5000), FactsError, ("JSON", "digits")),
    Case("a huge exponent", _file('{"query": 1e999, "answer": "a"}'), FactsError, ("inf", BLANK)),
    Case("Infinity", _file('{"query": -Infinity, "answer": "a"}'), FactsError, ("-inf", BLANK)),
    Case(
        "NaN", _file('{"query": NaN, "answer": "a"}'), FactsError, ("fields answer", "needs query")
    ),
    Case(
        "a field given twice",
        _file('{"query": "a", "answer": "b", "query": "c"}'),
        FactsError,
        ("has the field query twice", "keep one"),
    ),
    Case(
        "a field given twice within",
        _file('{"requested_rewrite": {"prompt": "{}", "prompt": "{} is"}}'),
        FactsError,
        ("line 1.*field prompt twice", "keep one"),
    ),
    Case("no limit", _records(CAPITAL, limit=0), ValueError, ("limit is 0", "at least 1, or None")),
    Case(
        "a negative limit", _records(CAPITAL, limit=-1), ValueError, ("limit is -1", "at least 1")
    ),
    Case("half a limit", _records(CAPITAL, limit=1.5), ValueError, ("limit is 1.5", "an integer")),
    Case("a limit in words", _records(CAPITAL, limit="all"), ValueError, ("is 'all'", "or None")),
    Case(
        "no such way out",
        _records(CAPITAL, on_conflict="both"),
        ValueError,
        ("on_conflict is 'both'", "'error', 'first', 'last'"),
    ),
    Case(
        "no such target",
        _records(ZSRE, zsre_target="pred"),
        ValueError,
        ("zsre_target is 'pred'", "'answers', 'alt', or None"),
    ),
]

RECORDS = [
    Case("no fields", _records({}), FactsError, ("has no fields", "needs query and answer")),
    Case("no answer", _records({"query": "Who?"}), FactsError, ("line 1", "answer is missing")),
    Case(
        "fields of another format",
        _records({"question": "Who?", "answer": "I"}),
        FactsError,
        ("the fields question, answer", "needs query and answer.*ZsRE"),
    ),
    Case(
        "a prompt and a target",
        _records({"prompt": "Ana is", "target_new": "here", "subject": "Ana"}),
        FactsError,
        ("the fields prompt, target_new, subject", "needs query"),
    ),
    Case(
        "a slip in a name",
        _records(CAPITAL | {"paraphrase": ["a"]}),
        FactsError,
        ("paraphrase is unknown", "the fields are query"),
    ),
    Case(
        "a name that cannot be printed",
        _records(CAPITAL | {"a\ud800\x1b": 1}),
        FactsError,
        (r"'a\\ud800\\x1b' is unknown", "the fields are"),
    ),
    Case(
        "two formats at once",
        _records(CAPITAL | {"src": "Who?"}),
        FactsError,
        ("has query and src", "keep those of one"),
    ),
    Case("a number as answer", _records(CAPITAL | {"answer": 7}), FactsError, ("is 7", BLANK)),
    Case("a bool as answer", _records(CAPITAL | {"answer": True}), FactsError, ("True", BLANK)),
    Case("answers as answer", _records(CAPITAL | {"answer": ["a"]}), FactsError, ("'a'", BLANK)),
    Case("half an id", _records(CAPITAL | {"id": 3.5}), FactsError, ("id is 3.5", BLANK)),
    Case("a bool as id", _records(CAPITAL | {"id": False}), FactsError, ("id is False", BLANK)),
    Case("a huge id", _records(CAPITAL | {"id": 2**64}), FactsError, ("id is 1844", "64 bits")),
    Case(
        "half a character in an id",
        _records(CAPITAL | {"id": HALF}),
        FactsError,
        (r"id is '\\ud800'", "halves of surrogate pairs"),
    ),
    Case(
        "an escape in an id", _records(CAPITAL | {"id": "a\x1b[2J"}), FactsError, ("x1b", "typed")
    ),
    Case("a line break in an id", _records(CAPITAL | {"id": "a\nb"}), FactsError, ("id", "typed")),
    Case(
        "a NUL in a query", _records({"query": "a\0", "answer": "b"}), FactsError, ("query", "NUL")
    ),
    Case(
        "half a character in an answer",
        _records(CAPITAL | {"answer": f"a{HALF}"}),
        FactsError,
        ("line 1.*answer is", "halves of surrogate pairs"),
    ),
    Case(
        "half a character in a paraphrase",
        _records(CAPITAL | {"paraphrases": ["a", HALF]}),
        FactsError,
        (r"paraphrases\[1\] is", "halves of surrogate pairs"),
    ),
    Case(
        "half a character in a locality query",
        _records(CAPITAL | {"locality": [{"query": "a", "subject": HALF}]}),
        FactsError,
        (r"locality\[0\].subject is", "halves of surrogate pairs"),
    ),
    Case(
        "a text as paraphrases", _records(CAPITAL | {"paraphrases": "a"}), FactsError, ("a", "list")
    ),
    Case(
        "an object as locality", _records(CAPITAL | {"locality": {}}), FactsError, ("{}", "a list")
    ),
    Case(
        "a blank subject", _records(CAPITAL | {"subject": ""}), FactsError, ("subject", "or None")
    ),
    Case(
        "a number as relation", _records(CAPITAL | {"relation": 3}), FactsError, ("is 3", "or None")
    ),
    Case(
        "many bad records",
        _records(*[{}] * 25),
        FactsError,
        ("has 25 bad records", "and 5 more"),
    ),
    Case(
        "several edits in a record",
        _records({"requested_rewrite": [REWRITE, REWRITE]}),
        FactsError,
        ("requested_rewrite is \\[", "one object, with prompt, subject and target_new"),
    ),
    Case(
        "a prompt without a place",
        _records({"requested_rewrite": REWRITE | {"prompt": "Ana"}}),
        FactsError,
        ("requested_rewrite.prompt is 'Ana'", "must hold one {}"),
    ),
    Case(
        "CounterFact without a subject",
        _records({"requested_rewrite": {"prompt": "{} is"}}),
        FactsError,
        ("line 1", "requested_rewrite.subject is missing"),
    ),
    Case(
        "CounterFact without a target",
        _records({"requested_rewrite": REWRITE | {"target_new": "Welsh"}}),
        FactsError,
        ("line 1", "requested_rewrite.target_new.str is missing"),
    ),
    Case(
        "an object as case_id",
        _records({"requested_rewrite": REWRITE, "case_id": {}}),
        FactsError,
        ("case_id is {}", BLANK),
    ),
    Case("ZsRE without answers", _records({"src": "a"}), FactsError, ("answers is empty", "hold")),
    Case(
        "ZsRE with the alternative alone",
        _records({"src": "a", "answers": [], "alt": "b"}),
        FactsError,
        ("answers is empty", "--zsre-target alt"),
    ),
    Case(
        "ZsRE without the alternative",
        _records({"src": "a", "answers": ["b"]}, zsre_target="alt"),
        FactsError,
        ("line 1", "alt is missing"),
    ),
    Case("a list as ZsRE's id", _records(ZSRE | {"id": []}), FactsError, (r"id is \[\]", BLANK)),
    Case(
        "numbers as rephrase", _records(ZSRE | {"rephrase": [1]}), FactsError, ("rephrase", BLANK)
    ),
]

ASKED_TWICE = {
    "case": ("Who wrote Emma?", "WHO WROTE EMMA?"),
    "spaces": ("Who wrote Emma?", "Who  wrote\u00a0Emma ?"),
    "the question mark": ("Who wrote Emma?", "Who wrote Emma"),
    "quotes": ("Who wrote Emma?", "Who wrote “Emma”?"),
    "the form of quotes": ("Who wrote 'Emma'?", "Who wrote «Emma»?"),
    "the apostrophe": ("Who is Ana's son?", "Who is Ana’s son?"),
    "the dash": ("Who ruled 1914–18?", "Who ruled 1914-18?"),
    "the ellipsis": ("The author of Emma is", "The author of Emma is …"),
    "the width of letters": ("Who wrote Emma?", "Ｗｈｏ wrote Emma？"),
    "characters of no width": ("Who wrote Emma?", "Who wrote\u200b Em\u00adma?"),
    "how an accent is composed": ("Where is Bru\u0308n?", "Where is Br\u00fcn?"),
    "the mark that opens a question": ("¿Quién es Ana?", "Quién es Ana"),
}

TOGETHER = [
    *(
        Case(
            f"two answers to a question, but for {sign}",
            _records({"query": one, "answer": "Bo"}, {"query": other, "answer": "Co"}),
            FactsError,
            (r"line 1 .* and line 2 .*'Bo' and 'Co'", "keep one of each.*--on-conflict"),
        )
        for sign, (one, other) in ASKED_TWICE.items()
    ),
    Case(
        "two answers in two formats",
        _records(ZSRE | {"alt": None}, {"query": "Who wrote Emma?", "answer": "Bo"}),
        FactsError,
        ("'Ana Vee' and 'Bo'", "--on-conflict"),
    ),
    Case(
        "one id for two",
        _records(CAPITAL | {"id": "x"}, RIVER | {"id": "x"}),
        FactsError,
        (r"line 1 .* and line 2 .*share the id 'x'", "keep one of each"),
    ),
    Case(
        "two answers in a list",
        lambda _: editable_facts([CAPITAL, RIVER, CAPITAL | {"answer": "Nice"}]),
        FactsError,
        (r"facts\[0\] and facts\[2\].*'Lyon' and 'Nice'", "keep one of each"),
    ),
    Case(
        "a fact that is edited",
        lambda _: check_facts([Fact(**CAPITAL)], [Fact(**CAPITAL)]),
        FactsError,
        ("do not fit together", r"an edited fact and facts\[0\]"),
    ),
]

PYTHON = [
    Case("a blank query", lambda _: Fact(" ", "Me"), FactsError, ("query is ' '", "not blank")),
    Case("bytes as query", lambda _: Fact(b"Who?", "Me"), FactsError, ("b'Who", BLANK)),  # type: ignore[arg-type]
    Case("no answer at all", _fact(answer=None), FactsError, ("answer is None", BLANK)),
    Case("paraphrases in one text", _fact(paraphrases="abc"), FactsError, ("'abc'", r"\['abc'\]")),
    Case("paraphrases without order", _fact(paraphrases={"a"}), FactsError, ("{'a'}", "a list")),
    Case("bytes as paraphrases", _fact(paraphrases=b"ab"), FactsError, ("b'ab'", "must be a list")),
    Case("a blank paraphrase", _fact(paraphrases=["a", ""]), FactsError, (r"\[1\] is ''", BLANK)),
    Case("locality in one text", _fact(locality="Who?"), FactsError, ("'Who", "list of texts")),
    Case("pairs as locality", _fact(locality=[("a", "b")]), FactsError, ("'a', 'b'", "LocalityQ")),
    Case(
        "locality without query", _fact(locality=[{}]), FactsError, (r"\[0\]", "query is missing")
    ),
    Case(
        "locality with an answer",
        _fact(locality=[{"query": "a", "answer": "b"}]),
        FactsError,
        ("answer is unknown", "the fields are query, subject"),
    ),
    Case("a blank locality query", lambda _: LocalityQuery(""), FactsError, ("query is ''", BLANK)),
    Case("NaN as subject", _fact(subject=math.nan), FactsError, ("subject is nan", "or None")),
    Case(
        "a dict without an answer",
        lambda _: as_facts([CAPITAL, {"query": "a"}]),
        FactsError,
        (r"facts\[1\]", "answer is missing"),
    ),
    Case(
        "texts as facts", lambda _: as_facts(["a"]), FactsError, (r"\[0\]: it is 'a'", "a Fact or")
    ),
    Case("nothing as facts", lambda _: as_facts(None), TypeError, ("facts is None", "a path, a F")),  # type: ignore[arg-type]
    Case(
        "a number as facts", lambda _: as_facts(3), TypeError, ("facts is 3", "iterable of Facts")
    ),  # type: ignore[arg-type]
    Case(
        "a question as a path",
        lambda _: as_facts("Who wrote Emma?"),
        FileNotFoundError,
        ("no file of facts", "Who wrote Emma"),
    ),
    Case(
        "all splits",
        lambda _: as_facts({"train": _Splits(), "test": _Splits()}),
        FactsError,
        ("splits train, test", r"choose one: facts\['train'\]"),
    ),
    Case(
        "a saved file that is gone",
        lambda folder: written_facts(folder / "facts.jsonl"),
        FileNotFoundError,
        ("no file of facts", "facts.jsonl"),
    ),
    Case(
        "an id of 5000 digits",
        lambda _: Fact.from_dict(CAPITAL | {"id": 10**5000}),
        FactsError,
        ("id is a int too large", "64 bits"),
    ),
]

CASES = FILES + RECORDS + TOGETHER + PYTHON
