"""The study of facts that were never fitted counts what the model answers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch
from tiny import FACTS

from benchmarks.quality import editing, hypernetwork
from benchmarks.quality.report import editing as table_of_editing
from benchmarks.quality.report import hypernetwork as table
from meg_kernels.editing.collect import collect
from meg_kernels.editing.contexts import Context


@pytest.fixture(scope="module")
def editor():
    collection = dataclasses.replace(tiny.BANK.collection, pilot=2, max_steps=200)
    return tiny.make_editor(dataclasses.replace(tiny.BANK, collection=collection))


def test_new_facts_are_asked_with_neurons_that_were_not_fitted_for_them(
    editor, tmp_path, monkeypatch
):
    monkeypatch.setattr(hypernetwork, "NEW", 3)
    monkeypatch.setattr(hypernetwork, "TURNS", 1)
    networks = {kind: (lambda kind=kind: tiny.GENERATORS[kind]) for kind in ("mlp", "dit")}
    monkeypatch.setattr(hypernetwork, "NETWORKS", networks)
    found = hypernetwork.by_pilot(editor, FACTS, [2, 7, 9], [7], tmp_path)
    assert [row["pilot"] for row in found["by_pilot"]] == [2, 7]
    assert found["facts"] == 7 and found["learnt"] <= 7
    for row in (*found["by_pilot"], found["fitted"]):
        assert row["surely_in_all"] <= row["in_all"] <= min(row["answered"].values())
        assert row["answered"].keys() == {context.name for context in tiny.CONTEXTS}
    assert found["fitted"]["in_all"] == 1.0
    small, large = (row["others"] for row in found["by_pilot"])
    assert [*small] == ["hypernetwork with gradients"] and {*large} == {*small, "mlp", "dit"}
    for told in (*small.values(), *large.values()):
        assert told["surely_in_all"] <= told["in_all"] <= min(told["answered"].values())
        assert sorted(told["margins"].values()) == [*told["margins"].values()]
    study = {"data": "tiny", "rows": found.pop("by_pilot"), **found}
    study["turns"] = hypernetwork.in_turns(editor, FACTS)
    sets = {"one": FACTS, "other": FACTS[::-1]}
    study["across"] = hypernetwork.across(editor, sets, tmp_path)
    assert [(row["from"], row["to"], row["pilot"]) for row in study["across"]] == [
        (one, other, 7) for one in sets for other in sets
    ]
    assert found["gradient_seconds"] > 0
    text = table({"hypernetwork": [json.loads(json.dumps(study))]}, tmp_path)
    assert "| fitted themselves | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert "| one, 7 facts | other |" in text and "ahead by 1 nats" in text
    assert "| 7 | dit |" in text and "| 2 | hypernetwork with gradients |" in text
    assert "10 facts take" in text and (tmp_path / "hypernetwork.png").exists()
    assert table({"hypernetwork": []}, tmp_path) == ""


def test_margins_are_those_of_each_context(editor):
    config = dataclasses.replace(editor.config.collection, pilot=None)
    found = collect(editor.prompted, editor.attached, FACTS[:4], config)
    asked = hypernetwork.New(editor, FACTS[:4])
    assert ((asked.margins(found.neurons) > 0).all(1) == found.learnt).all()
    shuffled = found.neurons[torch.tensor([1, 2, 3, 0])]  # all of other colors
    assert (asked.margins(shuffled) < 0).any(1).all()
    assert asked.shares(shuffled)["in_all"] == 0.0


def test_one_context_of_each_form_is_the_first():
    contexts = [Context("a"), Context("b"), Context("c", "raw")]
    assert hypernetwork.one_of_each_form(contexts) == [0, 2]


def test_what_slips_through_is_taken_and_wrong_elsewhere():
    margins = torch.tensor([[2.0, 3.0], [0.5, 3.0], [2.0, 2.0]])
    right = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    found = hypernetwork.slips(margins, right, 1.0)
    assert found == {"least": 1.0, "taken": pytest.approx(2 / 3), "wrong": pytest.approx(1 / 3)}


def test_editing_is_timed_and_its_generators_compared(monkeypatch):
    monkeypatch.setattr(editing, "GENERATORS", {"bank": lambda: tiny.GENERATORS["bank"]})
    monkeypatch.setattr(editing, "EditorConfig", lambda generator: tiny_config(generator))
    monkeypatch.setattr(
        editing.MeGEditor, "for_model", lambda name, config: tiny.make_editor(config)
    )
    monkeypatch.setattr(
        "meg_kernels.editing.tuning.shipped_unrelated_queries", lambda: tiny.UNRELATED
    )
    alone = [dataclasses.replace(fact, locality=()) for fact in FACTS]
    row = editing.run(alone[:7], alone[7:9], ["bank"], tuning=tiny.OTHER_FACTS)
    assert row["facts"] == 7 and row["way"] == "from the start" and row["learnt"] == 7
    assert row["seconds"] > sum(row["stages"].values()) * 0.99 and row["peak_mib"] > 100
    assert [made["generator"] for made in row["generators"]] == ["hypernetwork", "bank"]
    for made in row["generators"]:
        assert made["snapped"]["reliability_ag"] == 1.0 and made["bytes"] > 7 * 64
    assert row["added"]["facts"] == 2
    text = table_of_editing({"editing": [{"rows": [row], "threads": 2}]}, None)
    assert "| 7 | from the start |" in text and "| 7 | bank |" in text


def tiny_config(generator):
    collection = dataclasses.replace(tiny.BANK.collection, pilot=2, max_steps=200)
    return dataclasses.replace(tiny.BANK, collection=collection, generator=generator)
