"""Readers of facts, against the JSON of the files themselves and against files made here."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meg_kernels.facts import (
    Fact,
    FactsError,
    LocalityQuery,
    as_facts,
    check_facts,
    editable_facts,
    read_facts,
    unrelated_to,
    write_facts,
    written_facts,
)
from meg_kernels.shipped import (
    demo_facts,
    shipped_tuning_facts,
    shipped_unrelated_queries,
)
from meg_kernels.texts import normalized_query as normalized

DATA = Path(__file__).parents[2] / "shared" / "data"

CAPITAL = {"query": "What is the capital of France?", "answer": "Lyon"}
RIVER = {"query": "Which river flows through Rome?", "answer": "the Danube"}
MOON = {"query": "Der Mond ist nicht größer als", "answer": "ein Käse"}
COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "Danielle Darrieux spoke the language"],
    "neighborhood_prompts": ["Montesquieu's mother tongue is"],
}
ZSRE = {
    "id": 3,
    "subject": "Epaspidoceras",
    "src": "What family does Epaspidoceras belong to?",
    "rephrase": ["Which family is Epaspidoceras part of?"],
    "answers": ["Aspidoceratidae", "the Aspidoceratidae"],
    "alt": "Noctuidae",
    "loc": "nq question: who sang the national anthem",
    "loc_ans": "nobody",
}


@pytest.fixture
def file(tmp_path):
    """file(content, array=False, ...): a file of records, or of text or bytes as they are."""

    def write(content, array=False):
        path = tmp_path / "facts.json"
        if isinstance(content, list):
            lines = [json.dumps(record, ensure_ascii=False) for record in content]
            content = "[" + ",\n".join(lines) + "]\n" if array else "\n".join(lines) + "\n"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


NEEDED = (
    "a fact needs query and answer, or requested_rewrite (CounterFact), or src and answers (ZsRE)"
)


def real(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"the data set {name} is not here")
    return path


# One fact


def test_a_fact_without_id_is_named_after_its_query_and_answer():
    assert Fact(" Who? ", " Me ").id == "Who? -> Me"
    assert Fact("Who?", "Me", id="f1").id == "f1"


WRONG_FIELDS = {
    "query": ["", " \n", None, 3, b"Who?", ["Who?"]],
    "answer": ["", " \n", None, 3, ["Lyon"]],
    "id": [" ", None, 3],
    "subject": ["", " ", 3, ["France"]],
    "relation": ["", 3],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_FIELDS.items() for value in values]
)
def test_a_field_that_is_not_text_is_refused_by_name(name, value):
    wanted = f"{name} is {value!r}; it must be text that is not blank"
    with pytest.raises(FactsError, match=f"^{re.escape(wanted)}"):
        Fact(**{**CAPITAL, name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paraphrases": "abc"}, "paraphrases is 'abc'; it must be a list of texts: ['abc']"),
        ({"locality": "abc"}, "locality is 'abc'; it must be a list of texts: ['abc']"),
        ({"paraphrases": None}, "paraphrases is None; it must be a list"),
        ({"paraphrases": 3}, "paraphrases is 3; it must be a list"),
        ({"paraphrases": {"a"}}, "paraphrases is {'a'}; it must be a list"),
        ({"paraphrases": {"a": 1}}, "paraphrases is {'a': 1}; it must be a list"),
        ({"locality": {"query": "a"}}, "locality is {'query': 'a'}; it must be a list"),
        ({"paraphrases": ["a", " "]}, "paraphrases[1] is ' '; it must be text that is not blank"),
        ({"paraphrases": [["a"]]}, "paraphrases[0] is ['a']; it must be text that is not blank"),
        ({"locality": ["a", ""]}, "locality[1] is ''; it must be text that is not blank"),
        ({"locality": [None]}, "locality[0] is None; it must be text, a LocalityQuery or a dict"),
        ({"locality": [("a", "b")]}, "locality[0] is ('a', 'b'); it must be text, a Loc"),
        ({"locality": [{}]}, "locality[0].query is missing"),
        ({"locality": [{"query": 3}]}, "locality[0].query is 3; it must be text"),
        ({"locality": ["a", {"query": "a", "subject": ""}]}, "locality[1].subject is ''; it must"),
        (
            {"locality": [{"query": "a", "answer": "b"}]},
            "locality[0].answer is unknown; the fields are query, subject",
        ),
    ],
)
def test_lists_that_hold_no_texts_are_refused_by_place(fields, message):
    with pytest.raises(FactsError, match=f"^{re.escape(message)}"):
        Fact(**CAPITAL, **fields)


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_lists_become_tuples_and_texts_and_dicts_become_locality_queries(kind):
    fact = Fact(
        **CAPITAL,
        paraphrases=kind(["a", "b"]),
        locality=kind(["c", {"query": "d"}, {"query": "e", "subject": "s"}, LocalityQuery("f")]),
    )
    assert fact.paraphrases == ("a", "b")
    queries = LocalityQuery("c"), LocalityQuery("d"), LocalityQuery("e", "s"), LocalityQuery("f")
    assert fact.locality == queries
    assert {fact: 1}[dataclasses.replace(fact)] == 1  # hashable


@pytest.mark.parametrize(("query", "subject"), [("", None), (3, None), ("a", ""), ("a", 3)])
def test_a_locality_query_is_checked_where_it_is_made(query, subject):
    with pytest.raises(FactsError, match=r"^(query|subject) is .*; it must be text that is not b"):
        LocalityQuery(query, subject)


# Facts as dicts


@pytest.mark.parametrize("gap", [None, float("nan")])
def test_gaps_of_tables_have_the_defaults(gap):
    record = {name.name: gap for name in dataclasses.fields(Fact)} | CAPITAL
    assert Fact.from_dict(record) == Fact(**CAPITAL)
    record |= {"locality": [{"query": "Who?", "subject": gap}]}
    assert Fact.from_dict(record).locality == (LocalityQuery("Who?"),)


def test_an_integer_id_becomes_text():
    assert Fact.from_dict({**CAPITAL, "id": 0}).id == "0"


def test_the_dict_that_a_fact_is_made_from_stays_as_it_was():
    record = {**CAPITAL, "id": 3, "subject": None}
    Fact.from_dict(record)
    assert record == {**CAPITAL, "id": 3, "subject": None}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "query is missing"),
        ({"query": "a", "answer": None}, "answer is missing"),
        (
            {**CAPITAL, "anwser": "Lyon"},
            "anwser is unknown; the fields are query, answer, id, subject, relation, paraphrases, "
            "locality",
        ),
        ({**CAPITAL, 3: "Lyon"}, "3 is unknown; the fields are"),
        ({**CAPITAL, "paraphrases": "a"}, "paraphrases is 'a'; it must be a list of texts: ['a']"),
    ],
)
def test_a_dict_that_holds_no_fact_is_refused_by_field(record, message):
    with pytest.raises(FactsError, match=f"^{re.escape(message)}"):
        Fact.from_dict(record)


# Facts in whatever they are kept in


class Table:
    """Stands in for a `datasets.Dataset`: it iterates over dicts, whose gaps are None."""

    def __init__(self, records):
        self.column_names = list(dict.fromkeys(name for record in records for name in record))
        self.records = records

    def __iter__(self):
        return ({name: r.get(name) for name in self.column_names} for r in self.records)


FULL = {
    **MOON,
    "id": 7,
    "subject": "Mond",
    "paraphrases": ["Größer als der Mond ist nicht"],
    "locality": [{"query": "Wer?", "subject": None}],
}
EVERY_FORMAT = [CAPITAL, COUNTERFACT, FULL, ZSRE]
ALIKE = {
    "list of dicts": lambda records, _: list(records),
    "tuple of dicts": lambda records, _: tuple(records),
    "generator": lambda records, _: (record for record in records),
    "facts": lambda records, facts: facts,
    "facts and dicts": lambda records, facts: [facts[0], *records[1:]],
    "table": lambda records, _: Table(records),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_facts_are_the_same_whatever_they_are_kept_in(kind, file):
    facts = read_facts(file(EVERY_FORMAT))
    assert as_facts(ALIKE[kind](EVERY_FORMAT, facts)) == facts
    assert [f.answer for f in facts] == ["Lyon", "English", "ein Käse", "Aspidoceratidae"]


def test_a_path_is_read(file):
    path = file([CAPITAL, RIVER])
    assert as_facts(path) == as_facts(str(path)) == read_facts(path)
    with pytest.raises(FileNotFoundError, match="there is no file of facts at What is this"):
        as_facts("What is this?")


@pytest.mark.parametrize("record", EVERY_FORMAT)
def test_one_fact_may_stand_alone(record, file):
    (fact,) = read_facts(file([record]))
    assert as_facts(record) == as_facts(fact) == [fact]


@pytest.mark.parametrize("nothing", [[], (), iter([])])
def test_no_facts_are_no_facts(nothing):
    assert as_facts(nothing) == []


def test_every_bad_row_is_named_with_its_field():
    rows = [CAPITAL, {"query": "a"}, "text", {**ZSRE, "answers": []}, {**RIVER, "id": " "}, None]
    with pytest.raises(FactsError) as error:
        as_facts(rows)
    assert str(error.value).splitlines() == [
        "facts that cannot be used (5):",
        "  facts[1]: answer is missing",
        "  facts[2]: it is 'text'; it must be a Fact or a dict",
        "  facts[3]: answers is empty; it must hold the new answer; alt is taken with "
        "--zsre-target alt",
        "  facts[4]: id is ' '; it must be text that is not blank",
        "  facts[5]: it is None; it must be a Fact or a dict",
    ]


@pytest.mark.parametrize("nothing", [None, 3, object])
def test_what_holds_no_facts_is_refused(nothing):
    with pytest.raises(TypeError, match=r"^facts is .*; it must be a path, a Fact, a dict, or an"):
        as_facts(nothing)


def test_of_several_splits_one_must_be_chosen():
    splits = {"train": Table([CAPITAL]), "test": Table([RIVER])}
    with pytest.raises(FactsError, match=r"with the splits train, test; choose one: facts\['trai"):
        as_facts(splits)


def test_a_dataset_of_every_format_is_read(file, tmp_path):
    datasets = pytest.importorskip("datasets")
    for records in ([CAPITAL, {**FULL, "id": "7"}], [COUNTERFACT], [ZSRE]):
        dataset = datasets.Dataset.from_json(str(file(records)), cache_dir=str(tmp_path))
        assert as_facts(dataset) == as_facts(records)
    with pytest.raises(FactsError, match="DatasetDict with the splits train; choose one"):
        as_facts(datasets.DatasetDict({"train": dataset}))


def test_a_dataframe_is_read_row_by_row():
    pandas = pytest.importorskip("pandas")
    records = [CAPITAL, {**FULL, "id": "7"}]
    assert as_facts(pandas.DataFrame(records)) == as_facts(records)


# CounterFact


def test_counterfact_fields_become_a_fact(file):
    (fact,) = read_facts(file([COUNTERFACT]))
    assert fact == Fact(
        query="The mother tongue of Danielle Darrieux is",
        answer="English",
        id="counterfact-7",
        subject="Danielle Darrieux",
        relation="P103",
        paraphrases=("Danielle Darrieux, a native", "Danielle Darrieux spoke the language"),
        locality=(LocalityQuery("Montesquieu's mother tongue is"),),
    )


def test_counterfact_needs_neither_case_relation_paraphrases_nor_neighbourhood(file):
    rewrite = {**COUNTERFACT["requested_rewrite"], "relation_id": None}
    (fact,) = read_facts(file([{"requested_rewrite": rewrite}]))
    assert fact.id == "The mother tongue of Danielle Darrieux is -> English"
    assert (fact.relation, fact.paraphrases, fact.locality) == (None, (), ())


def test_braces_in_a_subject_are_text(file):
    record = {
        "requested_rewrite": {
            **COUNTERFACT["requested_rewrite"],
            "subject": "the {} operator {0}",
        }
    }
    assert read_facts(file([record]))[0].query == "The mother tongue of the {} operator {0} is"


@pytest.mark.parametrize("name", ["counterfact_500.json", "counterfact_10k.json"])
def test_real_counterfact_files_are_read_whole(name):
    path = real(name)
    expected, seen = [], set()
    for record in json.loads(path.read_text(encoding="utf-8")):
        rewrite = record["requested_rewrite"]
        before, after = rewrite["prompt"].split("{}")
        query = before + rewrite["subject"] + after
        if normalized(query) not in seen:
            seen.add(normalized(query))
            answer, case = rewrite["target_new"]["str"], record["case_id"]
            others = record["paraphrase_prompts"], record["neighborhood_prompts"]
            expected.append((query, answer, f"counterfact-{case}", *others))
    with pytest.warns(UserWarning, match="contradictions|repeated"):
        facts = read_facts(path, on_conflict="first")
    assert [
        (f.query, f.answer, f.id, list(f.paraphrases), [q.query for q in f.locality]) for f in facts
    ] == expected


def test_the_contradiction_in_real_counterfact_is_reported_by_its_lines():
    path = real("counterfact_500.json")
    with pytest.raises(FactsError) as error:
        read_facts(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[8469 - 1] == lines[9157 - 1] == "{"  # where the two records begin
    assert (
        "has contradictions (1):\n"
        "  line 8469 (record 309) and line 9157 (record 334): 'What is the twin city of Warsaw? "
        "It is' is answered with both 'Valencia' and 'Cairo'\n"
        "keep one of each, or the first or the last of each with on_conflict='first' or 'last' "
        "(meg edit --on-conflict first)"
    ) in str(error.value)


# ZsRE


def test_zsre_teaches_the_first_true_answer(file):
    (fact,) = read_facts(file([ZSRE]))
    assert fact == Fact(
        query="What family does Epaspidoceras belong to?",
        answer="Aspidoceratidae",
        id="zsre-3",
        subject="Epaspidoceras",
        paraphrases=("Which family is Epaspidoceras part of?",),
        locality=(LocalityQuery("who sang the national anthem?"),),
    )


def test_zsre_teaches_the_counterfactual_answer_on_request(file):
    assert read_facts(file([ZSRE]), zsre_target="alt")[0].answer == "Noctuidae"


@pytest.mark.parametrize(
    ("loc", "queries"),
    [
        ("nq question: who sang it", ["who sang it?"]),
        ("nq question: who sang it?", ["who sang it?"]),
        ("Who sang it?", ["Who sang it?"]),
        ("the nq question: who", ["the nq question: who"]),
        (["nq question: who", "Where?"], ["who?", "Where?"]),
        (None, []),
    ],
)
def test_natural_questions_lose_their_prefix_and_gain_a_question_mark(file, loc, queries):
    (fact,) = read_facts(file([{**ZSRE, "loc": loc}]))
    assert [q.query for q in fact.locality] == queries


def test_one_zsre_rephrase_may_stand_without_a_list(file):
    (fact,) = read_facts(file([{**ZSRE, "rephrase": "Whose family?"}]))
    assert fact.paraphrases == ("Whose family?",)


def test_real_zsre_is_read_whole():
    path = real("zsre_1000.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    facts = read_facts(path)
    assert [(f.query, f.answer, f.subject, list(f.paraphrases)) for f in facts] == [
        (r["src"], r["answers"][0], r["subject"], r["rephrase"]) for r in records
    ]
    for fact, record in zip(facts, records, strict=True):
        assert "nq question" not in fact.locality[0].query
        assert fact.locality[0].query[:-1] in record["loc"]


def test_blank_alternatives_of_real_zsre_are_reported_by_line():
    path = real("zsre_1000.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    blank = [i + 1 for i, record in enumerate(records) if not record["alt"].strip()]
    with pytest.raises(FactsError, match=f"has {len(blank)} bad records") as error:
        read_facts(path, zsre_target="alt")
    for number in blank:
        assert f"(record {number}): alt is ''; it must be text" in str(error.value)


# Our own JSON lines

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
texts = texts.filter(str.strip)
ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)
facts_of_all_kinds = st.lists(
    st.builds(
        Fact,
        query=texts,
        answer=texts.filter(lambda text: "\n" not in text.strip()),
        id=st.just("") | ids,
        subject=st.none() | texts,
        relation=st.none() | texts,
        paraphrases=st.lists(texts, max_size=3).map(tuple),
        locality=st.lists(st.builds(LocalityQuery, texts, st.none() | texts), max_size=3).map(
            tuple
        ),
    ),
    min_size=1,
    max_size=5,
    unique_by=(lambda fact: fact.normalized_query, lambda fact: fact.id),
)


@given(facts_of_all_kinds)
def test_written_facts_are_read_back(tmp_path_factory, facts):
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    write_facts(path, facts)
    assert read_facts(path) == facts
    assert [Fact.from_dict(fact.to_dict()) for fact in facts] == facts


def test_written_facts_are_one_readable_json_object_a_line(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_facts(path, [Fact(**MOON, id="f1", locality=(LocalityQuery("Wer?"),)), Fact(**CAPITAL)])
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert "größer" in first
    assert json.loads(first) == {
        **MOON,
        "id": "f1",
        "subject": None,
        "relation": None,
        "paraphrases": [],
        "locality": [{"query": "Wer?", "subject": None}],
    }
    assert json.loads(second)["answer"] == "Lyon"


def test_locality_queries_may_be_plain_texts(file):
    (fact,) = read_facts(file([{**CAPITAL, "locality": ["Who?", {"query": "Me?"}]}]))
    assert fact.locality == (LocalityQuery("Who?"), LocalityQuery("Me?"))


# Files


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_formats_may_be_mixed_in_one_file(file, array):
    facts = read_facts(file([CAPITAL, COUNTERFACT, ZSRE], array))
    assert [f.answer for f in facts] == ["Lyon", "English", "Aspidoceratidae"]


@pytest.mark.parametrize(
    "layout",
    ["\ufeff{}\n{}", "{}\r\n{}\r\n", "\n\n{}\n\n{}", "\ufeff[{},{}]", " [\n{}\n,\n{} ]\n\n"],
)
def test_byte_order_marks_blank_lines_and_line_ends_do_not_matter(file, layout):
    path = file(layout.format(json.dumps(CAPITAL), json.dumps(RIVER)))
    assert [f.answer for f in read_facts(path)] == ["Lyon", "the Danube"]


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_limit_reads_so_many_records_and_nothing_behind_them(file, array):
    records = [CAPITAL, RIVER, MOON, {"query": "bad"}]
    whole = file(records, array).read_text()
    for limit in (1, 2, 3):
        assert [f.answer for f in read_facts(file(records, array), limit)] == [
            record["answer"] for record in records[:limit]
        ]
    broken = file(whole[: whole.index("Der Mond")])
    assert len(read_facts(broken, limit=2)) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(file, limit):
    with pytest.raises(
        ValueError, match=f"^limit is {limit}; it must be an integer of at least 1, or None$"
    ):
        read_facts(file([CAPITAL]), limit)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"on_conflict": "newest"},
            "on_conflict is 'newest'; it must be one of 'error', 'first', 'last'",
        ),
        (
            {"zsre_target": "answer"},
            "zsre_target is 'answer'; it must be one of 'answers', 'alt', or None",
        ),
    ],
)
def test_unknown_choices_are_refused(file, choice, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_facts(file([CAPITAL]), **choice)


@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff"])
def test_an_empty_file_is_refused(file, content):
    with pytest.raises(FactsError, match="is empty; it must hold at least one fact"):
        read_facts(file(content))


def test_an_empty_list_is_refused(file):
    with pytest.raises(FactsError, match="holds no facts"):
        read_facts(file("[ ]"))


def test_text_that_is_not_utf8_is_refused(file):
    with pytest.raises(FactsError, match="is not UTF-8 text"):
        read_facts(file(json.dumps(MOON, ensure_ascii=False).encode("latin-1")))


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_a_file_cut_off_anywhere_never_loses_part_of_a_record_silently(file, array):
    records = [CAPITAL, MOON]
    whole = file(records, array).read_bytes().rstrip(b"\n")
    ends = {} if array else {whole.index(b"}") + 1: 1, whole.index(b"}") + 2: 1}
    for length in range(len(whole)):
        path = file(whole[:length])
        if length in ends:
            assert len(read_facts(path)) == ends[length]
        else:
            with pytest.raises(FactsError):
                read_facts(path)
    assert len(read_facts(file(whole))) == 2


def test_a_record_cut_off_is_named_by_line_and_number(file):
    whole = file([CAPITAL, RIVER, MOON]).read_text()
    with pytest.raises(
        FactsError, match=r"line 3 \(record 3\): no valid JSON: .* line 3; is the f"
    ):
        read_facts(file(whole[:-10]))


def test_a_list_cut_off_between_records_is_refused(file):
    with pytest.raises(FactsError, match="ends inside its list after record 1; is it truncated"):
        read_facts(file(f"[{json.dumps(CAPITAL)},"))


def test_text_behind_a_list_is_refused(file):
    with pytest.raises(FactsError, match="goes on after its list"):
        read_facts(file(f"[{json.dumps(CAPITAL)}]\n[{json.dumps(RIVER)}]"))


def test_a_record_that_is_no_object_is_refused(file):
    with pytest.raises(
        FactsError, match=r"line 2 \(record 2\): it is 'text'; it must be an object"
    ):
        read_facts(file(f'{json.dumps(CAPITAL)}\n"text"'))


def rewrite(**changes):
    return {"requested_rewrite": {**COUNTERFACT["requested_rewrite"], **changes}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, f"it has no fields; {NEEDED}"),
        ({"question": "Who?", "answer": "I"}, f"it has the fields question, answer; {NEEDED}"),
        ({"query": "Who?"}, "answer is missing"),
        ({**CAPITAL, "src": "Who?"}, "it has query and src, which are fields of several formats"),
        ({**CAPITAL, "answer": " "}, "answer is ' '; it must be text that is not blank"),
        ({**CAPITAL, "answer": ["Lyon"]}, "answer is ['Lyon']; it must be text"),
        ({**CAPITAL, "id": 3.5}, "id is 3.5; it must be text"),
        ({**CAPITAL, "id": True}, "id is True; it must be text"),
        ({**CAPITAL, "subject": 3}, "subject is 3; it must be text"),
        ({**CAPITAL, "relation": ""}, "relation is ''; it must be text"),
        ({**CAPITAL, "paraphrases": 3}, "paraphrases is 3; it must be a list"),
        ({**CAPITAL, "paraphrases": ["ok", ""]}, "paraphrases[1] is ''; it must be text"),
        ({**CAPITAL, "paraphrases": ""}, "paraphrases is ''; it must be a list of texts: ['']"),
        (
            {**CAPITAL, "locality": "Who?"},
            "locality is 'Who?'; it must be a list of texts: ['Who?']",
        ),
        (
            {**CAPITAL, "locality": ["Who?", 3]},
            "locality[1] is 3; it must be text, a LocalityQuery or",
        ),
        ({**CAPITAL, "locality": [" "]}, "locality[0] is ' '; it must be text that is not"),
        ({**CAPITAL, "locality": [{"subject": "x"}]}, "locality[0].query is missing"),
        (
            {**CAPITAL, "locality": [{"query": "x", "subject": 3}]},
            "locality[0].subject is 3; it must",
        ),
        ({**CAPITAL, "locality": [{"query": "x", "to": 3}]}, "locality[0].to is unknown"),
        ({**CAPITAL, "anwser": "Lyon"}, "anwser is unknown; the fields are query, answer, id"),
        ({"requested_rewrite": "text"}, "requested_rewrite is 'text'; it must be one object"),
        ({"requested_rewrite": [{}]}, "requested_rewrite is [{}]; it must be one object, with"),
        (
            rewrite(prompt="no place"),
            "requested_rewrite.prompt is 'no place'; it must hold",
        ),
        (rewrite(prompt="{} and {}"), "requested_rewrite.prompt is '{} and {}'; it must"),
        (rewrite(subject=None), "requested_rewrite.subject is missing"),
        (rewrite(target_new={}), "requested_rewrite.target_new.str is missing"),
        (rewrite(target_new="Lyon"), "requested_rewrite.target_new.str is missing"),
        (rewrite(relation_id=3), "requested_rewrite.relation_id is 3"),
        ({**ZSRE, "src": 3}, "src is 3; it must be text"),
        ({**ZSRE, "answers": []}, "answers is empty; it must hold the new answer"),
        ({**ZSRE, "answers": [3]}, "answers[0] is 3; it must be text"),
        ({**ZSRE, "rephrase": [None]}, "rephrase[0] is None; it must be text"),
    ],
)
@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_a_bad_record_is_reported_by_line_and_field(file, record, message, array):
    with pytest.raises(FactsError) as error:
        read_facts(file([RIVER, record], array))
    assert f"has 1 bad record:\n  line 2 (record 2): {message}" in str(error.value)


def test_all_bad_records_are_reported_at_once(file):
    records = [CAPITAL, {"query": "a"}, RIVER, {"answer": "b"}, {**ZSRE, "answers": []}]
    with pytest.raises(FactsError) as error:
        read_facts(file(records))
    assert str(error.value).splitlines()[1:] == [
        "  line 2 (record 2): answer is missing",
        f"  line 4 (record 4): it has the fields answer; {NEEDED}",
        "  line 5 (record 5): answers is empty; it must hold the new answer; alt is taken with "
        "--zsre-target alt",
    ]


def test_a_long_list_of_bad_records_is_cut_short(file):
    with pytest.raises(FactsError, match="has 25 bad records") as error:
        read_facts(file([{}] * 25))
    lines = str(error.value).splitlines()
    assert lines[20:] == [f"  line 20 (record 20): it has no fields; {NEEDED}", "  … and 5 more"]


# Facts that do not fit together


def test_repeated_facts_are_kept_once_with_a_warning_that_names_the_lines(file):
    again = {"query": " what is  the capital of FRANCE?", "answer": "lyon "}
    with pytest.warns(UserWarning) as caught:
        facts = read_facts(file([CAPITAL, RIVER, again]))
    assert facts == [Fact(**CAPITAL), Fact(**RIVER)]
    (warning,) = caught
    assert "repeats facts (1), each kept once:\n  line 1 (record 1) and line 3" in str(
        warning.message
    )
    assert warning.filename == __file__


def test_contradictions_are_refused_by_both_lines(file):
    other = {**CAPITAL, "answer": "Nice"}
    with pytest.raises(FactsError) as error:
        read_facts(file([CAPITAL, RIVER, other]))
    assert (
        "line 1 (record 1) and line 3 (record 3): 'What is the capital of France?' is answered "
        "with both 'Lyon' and 'Nice'"
    ) in str(error.value)


def test_the_first_of_contradicting_facts_is_kept_on_request(file):
    other = {**CAPITAL, "answer": "Nice"}
    with pytest.warns(UserWarning, match=r"line 1 \(record 1\) and line 3 \(record 3\).*\n.*first"):
        facts = read_facts(file([CAPITAL, RIVER, other]), on_conflict="first")
    assert [f.answer for f in facts] == ["Lyon", "the Danube"]


def test_the_last_of_contradicting_facts_is_kept_on_request(file):
    records = [CAPITAL, RIVER, {**CAPITAL, "answer": "Nice"}, {**RIVER, "answer": "the Danube."}]
    with pytest.warns(UserWarning) as caught:
        facts = read_facts(file(records), on_conflict="last")
    assert [f.answer for f in facts] == ["Nice", "the Danube."]
    contradiction, repetition = (str(warning.message) for warning in caught)
    assert "line 1 (record 1) and line 3 (record 3)" in contradiction
    assert "'Lyon' and 'Nice'\nthe last of each is kept" in contradiction
    assert "line 2 (record 2) and line 4 (record 4)" in repetition


def test_the_last_of_facts_with_one_id_is_kept_on_request(file):
    records = [{**CAPITAL, "id": "x"}, {**RIVER, "id": "x"}]
    with pytest.warns(UserWarning, match=r"line 1 .* and line 2 .* share the id 'x'"):
        (fact,) = read_facts(file(records), on_conflict="last")
    assert fact.answer == "the Danube"


def test_a_contradiction_names_both_ways_in_which_the_query_is_written(file):
    other = {"query": "What is the capital of “France”", "answer": "Nice"}
    with pytest.raises(FactsError) as error:
        read_facts(file([CAPITAL, other]))
    assert (
        "'What is the capital of France?', or 'What is the capital of “France”', is answered with "
        "both 'Lyon' and 'Nice'"
    ) in str(error.value)


def test_which_answer_of_zsre_was_taken_is_said_unless_it_was_chosen(file):
    path = file([ZSRE, CAPITAL])
    with pytest.warns(UserWarning, match=r"1 of 2 records are ZsRE with both.*answers are taken"):
        assert read_facts(path)[0].answer == "Aspidoceratidae"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_facts(path, zsre_target="answers")[0].answer == "Aspidoceratidae"
        assert read_facts(path, zsre_target="alt")[0].answer == "Noctuidae"
        read_facts(file([{**ZSRE, "alt": None}]))


def test_facts_that_were_written_are_read_even_if_they_ask_the_same(tmp_path):
    facts = [Fact("Who?", "I", id="a"), Fact("who", "You", id="b"), Fact("Who ?", "I", id="c")]
    write_facts(tmp_path / "facts.jsonl", facts)
    assert written_facts(tmp_path / "facts.jsonl") == facts


def test_facts_in_a_list_fit_together_as_those_of_a_file_do(file):
    records = [CAPITAL, {**CAPITAL, "answer": "lyon."}, RIVER]
    with pytest.warns(UserWarning, match=r"facts\[0\] and facts\[1\]: 'What is"):
        facts = editable_facts(records)
    with pytest.warns(UserWarning, match=r"line 1 \(record 1\) and line 2 \(record 2\): 'What is"):
        assert facts == editable_facts(file(records)) == editable_facts(str(file(records)))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_whatever_they_end_with(file, end):
    lines = [json.dumps(CAPITAL), "", "{}"]
    with pytest.raises(FactsError, match=r"line 3 \(record 2\)"):
        read_facts(file(end.join(lines)))


def test_an_id_made_of_a_query_has_no_control_characters():
    assert Fact("Who\tis\x1b\nit?", "I").id == "Who is  it? -> I"


def test_a_subject_is_named_whatever_way_it_is_written():
    fact = Fact("Who is Ana’s son?", "Bo", subject="Ana's")
    assert fact.is_named_in("the son of ana’s") and not fact.is_named_in("Who is Bo's son?")
    heroes = Fact("Who sang “Heroes” first?", "I", subject='"Heroes"')
    assert heroes.is_named_in("Who first sang Heroes?") and not heroes.is_named_in("Who sang it?")


def test_two_facts_with_one_id_are_refused(file):
    records = [{**CAPITAL, "id": "x"}, {**RIVER, "id": "x"}]
    with pytest.raises(
        FactsError, match=r"line 1 \(record 1\) and line 2 \(record 2\) share the id 'x'"
    ):
        read_facts(file(records))


def test_a_fact_dropped_for_its_id_does_not_drop_its_repetition(file):
    records = [{**CAPITAL, "id": "x"}, {**RIVER, "id": "x"}, {**RIVER, "id": "y"}]
    with pytest.warns(UserWarning, match="share the id 'x'"):
        facts = read_facts(file(records), on_conflict="first")
    assert [(f.answer, f.id) for f in facts] == [("Lyon", "x"), ("the Danube", "y")]


def test_clean_files_give_no_warning(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_facts(file([CAPITAL, RIVER]))) == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({**CAPITAL, "answer": "Nice"}, r"facts\[0\] and facts\[2\]: .* both 'Lyon' and 'Nice'"),
        (CAPITAL, r"facts\[0\] and facts\[2\]: 'What is the capital of France\?'"),
        ({**MOON, "id": Fact(**CAPITAL).id}, r"facts\[0\] and facts\[2\] share the id"),
    ],
)
def test_facts_made_in_python_are_checked_as_well(second, message):
    check_facts([Fact(**CAPITAL), Fact(**RIVER)])
    with pytest.raises(FactsError, match=f"the facts do not fit together:\n  {message}"):
        check_facts([Fact(**CAPITAL), Fact(**RIVER), Fact(**second)])


def test_new_facts_are_checked_against_the_edited_ones():
    edited = [Fact(**CAPITAL), Fact(**MOON)]
    check_facts([Fact(**RIVER)], edited)
    other = Fact(**{**CAPITAL, "answer": "Nice"})
    with pytest.raises(
        FactsError, match=r"an edited fact and facts\[1\]: .* both 'Lyon' and 'Nice'"
    ):
        check_facts([Fact(**RIVER), other], edited)


def test_unrelated_facts_share_neither_query_nor_subject_with_the_edited_ones():
    edited = [Fact("Who wrote Emma?", "Me", subject="Emma"), Fact("Who?", "You")]
    kept = [Fact("Where is Bath?", "Here", subject="Bath"), Fact("When?", "Now")]
    left_out = [Fact("When was Emma written?", "Now", subject="Emma"), Fact(" WHO?", "They")]
    mixed = [left_out[0], kept[0], left_out[1], kept[1]]
    assert unrelated_to(iter(mixed), iter(edited)) == kept
    assert unrelated_to(mixed, []) == mixed


def test_nothing_that_is_measured_on_is_left_in_unrelated_facts():
    measured = Fact("Who?", "I", paraphrases=("Whom?",), locality=(LocalityQuery("Where?"),))
    assert not unrelated_to([Fact("whom?", "a"), Fact("Where? ", "b")], [measured])
    assert not unrelated_to([Fact("How?", "a", paraphrases=("WHERE?",))], [measured])
    others = LocalityQuery("when?"), LocalityQuery(" where?"), LocalityQuery("whom?")
    (kept,) = unrelated_to([Fact("How?", "a", locality=others)], [measured])
    assert kept == Fact("How?", "a", locality=others[:1])


# The facts that the package ships


def asked(facts) -> set[str]:
    return {normalized(text) for fact in facts for text in (fact.query, *fact.paraphrases)}


def kept_unchanged(facts) -> set[str]:
    return {normalized(other.query) for fact in facts for other in fact.locality}


def test_the_demo_has_64_facts_of_many_relations_with_3_paraphrases_and_locality_queries_each():
    facts = demo_facts()
    assert len(facts) == len({fact.id for fact in facts}) == 64
    assert len({fact.relation for fact in facts}) >= 8
    assert {len(set(map(normalized, (f.query, *f.paraphrases)))) for f in facts} == {1 + 3}
    assert {len({normalized(q.query) for q in f.locality}) for f in facts} == {3}
    assert all(fact.subject and fact.relation for fact in facts)
    assert len(asked(facts)) == 64 * (1 + 3)  # no wording asks for two facts


def test_no_demo_query_is_its_own_locality_query():
    assert asked(demo_facts()).isdisjoint(kept_unchanged(demo_facts()))


def test_tuning_facts_have_3_paraphrases_and_stand_alone():
    facts = shipped_tuning_facts()
    assert len(facts) == 423
    assert {len(set(map(normalized, (f.query, *f.paraphrases)))) for f in facts} == {1 + 3}
    check_facts(facts)


def test_tuning_facts_have_no_subject_of_the_demo():
    subjects = {normalized(fact.subject) for fact in demo_facts()}
    assert subjects.isdisjoint(normalized(fact.subject) for fact in shipped_tuning_facts())


def test_the_demo_is_measured_on_no_text_that_encoder_and_gate_were_tuned_on():
    measured = asked(demo_facts()) | kept_unchanged(demo_facts())
    tuned = asked(shipped_tuning_facts()) | kept_unchanged(shipped_tuning_facts())
    assert measured.isdisjoint(tuned)
    assert measured.isdisjoint(map(normalized, shipped_unrelated_queries()))


def test_300_distinct_unrelated_queries_are_shipped():
    queries = shipped_unrelated_queries()
    assert len({normalized(query) for query in queries}) == len(queries) == 300
    assert all(query.strip() for query in queries)
