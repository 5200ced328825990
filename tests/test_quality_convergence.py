"""The study of convergence: neurons in other coordinates are the same neurons."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIG, EDITED, GENERATORS, edit, make_editor

from benchmarks.quality.convergence import WANTED, Choice, build, measure


@pytest.fixture(scope="module")
def editor():
    editor = make_editor(CONFIG)
    edit(editor)
    return editor


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("rank", [2, 20])
def test_coordinates_lead_back_to_the_neurons_as_far_as_the_rank_reaches(editor, rank, whitened):
    config = GENERATORS["dit"]
    layout, neurons = editor.attached.layout, editor.edits.neurons
    generator = build(Choice(config, rank, whitened), layout, editor.encoder.dim)
    generator.standardize(editor.edits.conditions, neurons)
    coordinates = generator.scaled_weights(neurons)
    assert coordinates.shape == (len(EDITED), rank)
    used = min(rank, len(EDITED) - 1)
    if whitened:
        assert coordinates[:, :used].std(0, False).tolist() == pytest.approx([1] * used, rel=1e-3)
    generator._generate = lambda conditions: coordinates
    back = layout.pack(generator.generate(editor.edits.conditions))
    exact = layout.pack(neurons)
    centred = (exact - exact.mean(0)) / generator.whole.weight_std
    sizes = torch.linalg.svdvals(centred)
    left = ((back - exact) / generator.whole.weight_std).square().sum()
    assert left.item() == pytest.approx(sizes[used:].square().sum().item(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("choice", [{}, {"rank": 4}])
def test_a_row_says_when_enough_was_answered(editor, choice):
    config = GENERATORS["dit"].with_training(enough=WANTED, close=float("inf"), max_steps=400)
    row = measure(editor, 3, Choice(config, **choice))
    assert row["n"] == 3 and row["steps"] == row["history"][-1]["step"] < 400
    assert row["answered"] == 1 and row["seconds"] > 0
    brief = config.with_training(max_steps=1)
    assert measure(editor, 3, Choice(brief, **choice))["steps"] is None
