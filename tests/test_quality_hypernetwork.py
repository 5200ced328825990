"""The study of facts that were never fitted counts what the model answers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch
from tiny import FACTS

from benchmarks.quality import hypernetwork
from benchmarks.quality.report import hypernetwork as table
from meg_kernels.editing.collect import collect


@pytest.fixture(scope="module")
def editor():
    collection = dataclasses.replace(tiny.BANK.collection, pilot=2, max_steps=200)
    return tiny.make_editor(dataclasses.replace(tiny.BANK, collection=collection))


def test_new_facts_are_asked_with_neurons_that_were_not_fitted_for_them(
    editor, tmp_path, monkeypatch
):
    monkeypatch.setattr(hypernetwork, "NEW", 3)
    monkeypatch.setattr(hypernetwork, "LOOKED_AT", [0, 1])
    monkeypatch.setattr(hypernetwork, "TURNS", 1)
    found = hypernetwork.by_pilot(editor, FACTS, [2, 7, 9], tmp_path)
    assert [row["pilot"] for row in found["by_pilot"]] == [2, 7]
    assert found["facts"] == 7 and found["learnt"] <= 7
    for row in (*found["by_pilot"], found["fitted"]):
        assert row["surely_in_all"] <= row["in_all"] <= min(row["answered"].values())
        assert row["answered"].keys() == {context.name for context in tiny.CONTEXTS}
    assert found["fitted"]["in_all"] == 1.0
    study = {"data": "tiny", "rows": found.pop("by_pilot"), **found}
    study["turns"] = hypernetwork.in_turns(editor, FACTS)
    text = table({"hypernetwork": [json.loads(json.dumps(study))]}, tmp_path)
    assert "| fitted themselves | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert "10 facts take" in text and (tmp_path / "hypernetwork.png").exists()
    assert table({"hypernetwork": []}, tmp_path) == ""


def test_margins_are_those_of_each_context(editor, monkeypatch):
    monkeypatch.setattr(hypernetwork, "LOOKED_AT", [0, 1])
    config = dataclasses.replace(editor.config.collection, pilot=None)
    found = collect(editor.prompted, editor.attached, FACTS[:4], config)
    asked = hypernetwork.New(editor, FACTS[:4])
    assert ((asked.margins(found.neurons) > 0).all(1) == found.learnt).all()
    shuffled = found.neurons[torch.tensor([1, 2, 3, 0])]  # all of other colors
    assert (asked.margins(shuffled) < 0).any(1).all()
    assert asked.shares(shuffled)["in_all"] == 0.0


def test_what_slips_through_is_taken_and_wrong_elsewhere():
    margins = torch.tensor([[2.0, 3.0], [0.5, 3.0], [2.0, 2.0]])
    right = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    found = hypernetwork.slips(margins, right, 1.0)
    assert found == {"least": 1.0, "taken": pytest.approx(2 / 3), "wrong": pytest.approx(1 / 3)}
