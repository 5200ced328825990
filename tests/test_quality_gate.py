"""The study of the gate: what it counts is what a router says, one text at a time."""

from __future__ import annotations

import csv
import dataclasses
import random

import pytest
import torch
from tiny import (
    CONFIG,
    EDITED,
    LOCALITY,
    OTHER_FACTS,
    PARAPHRASES,
    QUERIES,
    UNRELATED,
    make_encoder,
    make_language_model,
    make_tokenizer,
)

from benchmarks.quality import gate as study
from benchmarks.quality.report import gate as table
from meg_kernels import EditorConfig


@pytest.fixture(scope="module")
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "shipped_unrelated_queries", lambda: UNRELATED)
        patch.setattr(study, "shipped_tuning_facts", lambda: OTHER_FACTS)
        patch.setattr(study, "shipped_passages", lambda: ["Red blue gold. Gray pink is"])
        patch.setattr(study, "LENGTHS", (5, 20))
        config = dataclasses.replace(EditorConfig(), encoder_tuning=CONFIG.encoder_tuning)
        patch.setattr(study, "EditorConfig", lambda: config)
        found = study.measure(EDITED, PARAPHRASES[:2], make_encoder())
        router, calibration, _ = study.routed_by(EDITED, config, make_encoder())
    return found, router, calibration


def test_the_shares_are_those_of_single_questions(row):
    found, router, calibration = row
    owners = [i for i, fact in enumerate(EDITED) for _ in fact.paraphrases]
    right = 0
    for text, owner in zip(PARAPHRASES, owners, strict=True):
        routing = router.route([text])
        right += bool(routing.accepted) and int(routing.fact) == owner
    assert found["paraphrases"] == pytest.approx(right / len(owners)) and right
    left = sum(not bool(router.route([text]).accepted) for text in LOCALITY)
    assert found["locality"] == pytest.approx(left / len(LOCALITY))
    assert found["own"] == 1.0 and found["conversations"] == 0.0
    assert found["calibration"] == dataclasses.asdict(calibration)
    taken = sum(bool(router.route([text]).accepted) for text in PARAPHRASES[:2])
    assert found["yes_no"] == taken / 2
    assert found["documents"].keys() == {
        f"{n} {place}" for n in (5, 20) for place in ("start", "middle", "end")
    }
    assert all(0 < share <= 1 for share in found["misspelt"].values())


def test_a_question_stands_where_it_is_said_to(row, monkeypatch):
    monkeypatch.setattr(study, "shipped_passages", lambda: ["Red blue gold. Gray pink is"])
    for tokens in (1, 30):
        for place in ("start", "middle", "end"):
            text = study.around(QUERIES[0], tokens, place, row[1], random.Random(0))
            before, found, behind = text.partition(QUERIES[0])
            assert (
                found
                and (bool(before), bool(behind))
                == {
                    "start": (False, True),
                    "middle": (True, True),
                    "end": (True, False),
                }[place]
            )


@pytest.mark.parametrize("kind", study.MISSPELT)
def test_one_letter_is_changed_and_no_more(kind):
    query, draw = "Who wrote Emma, then?", random.Random(0)
    for _ in range(20):
        text = study.misspelt(kind, query, draw)
        assert text != query or kind == "swapped"  # two like letters
        lengths = {"missing": -1, "doubled": 1, "swapped": 0, "lower": 0, "bare": -2}
        assert len(text) == len(query) + lengths[kind]
        assert text[0] == ("w" if kind == "lower" else "W")
    assert study.misspelt(kind, "a b", draw) == "a b"


def test_facts_of_a_table_are_read_with_their_yes_and_no_questions(tmp_path):
    names = "subject relation object question paraphrased_question yes_question no_question"
    columns = [*names.split(), "locality_question"]
    with (tmp_path / "h.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(4):
            writer.writerow([f"{name} {i % 3}" for name in columns])  # one question twice
    facts, yes_no = study.halluedit(tmp_path / "h.csv", 2)
    assert len(facts) == 2 and len({fact.query for fact in facts}) == 2
    numbers = [fact.subject[-1] for fact in facts]
    assert sorted(yes_no) == sorted(
        f"{kind}_question {i}" for i in numbers for kind in ("yes", "no")
    )


def test_the_tables_show_every_row(row):
    found = {"encoder": "default", **row[0]}
    rows = [{"data": "one", **found}, {"data": "two", **found, "yes_no": None, "documents": {}}]
    text = table({"gate": [{"rows": rows}]}, None)
    assert text.count("| one |") == 3 and text.count("| two |") == 2
    assert table({"gate": []}, None) == ""


def test_the_models_own_hidden_states_can_be_the_encoder(monkeypatch):
    model = make_language_model(tokenizer := make_tokenizer())
    monkeypatch.setattr(study, "load_language_model", lambda name: (model, tokenizer))
    inputs = tokenizer(QUERIES[0], return_tensors="pt")
    with torch.no_grad():
        layers = model.model(**inputs, output_hidden_states=True).hidden_states
    encoder = study.hidden_states()
    assert len(encoder.model.layers) == 1  # of three
    wanted = model.model.norm(layers[1]).mean(1)  # over the tokens
    torch.testing.assert_close(
        encoder.encode(QUERIES[:1]), torch.nn.functional.normalize(wanted, dim=1)
    )
