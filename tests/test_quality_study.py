"""The study of quality: what it puts together is what an evaluation of a tiny model finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_editor import CONFIG, EDITED, edit, make_editor

from benchmarks.quality.study import Edited, curve, gated
from meg_kernels.editing.evaluate import has_own_neuron


@pytest.fixture(scope="module", autouse=True)
def float32():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meg_kernels.precision.multiplies_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="module", params=[True, False], ids=["snapped", "not snapped"])
def edited(request):
    editor = make_editor(dataclasses.replace(CONFIG, snap=request.param))
    edit(editor)
    return Edited(editor, EDITED)


@pytest.mark.parametrize("quantile", [0.0, 0.4, 0.8, 1.0])
def test_a_gates_decision_puts_the_evaluation_together(edited, quantile):
    editor = edited.editor
    base = edited.base()
    ungated = edited.ungated(snap=editor.config.snap)
    scores = edited.scores([*base])
    threshold = float(scores.quantile(quantile)) - (quantile == 0)
    accepted = dict(zip(base, (scores > threshold).tolist(), strict=True))
    before = editor.edits.gate.threshold
    try:
        editor.edits.gate.threshold = threshold
        report = editor.evaluate()
    finally:
        editor.edits.gate.threshold = before
    assert gated(ungated, base, accepted) == report.metrics
    assert edited.evaluation.base() == report.base and edited.ceiling() == report.collected
    # Questions that a gate rejects need no neuron.
    some = edited.ungated(snap=editor.config.snap, among=lambda question: accepted[question])
    assert gated(some, base, accepted) == report.metrics


def test_a_curve_goes_from_a_neuron_for_every_question_to_none(edited):
    base, ungated = edited.base(), edited.ungated(snap=True)
    points = curve(edited.scores([*base]), ungated, base)
    everything = gated(ungated, base, dict.fromkeys(base, True))
    nothing = gated(ungated, base, dict.fromkeys(base, False))
    assert everything != nothing and nothing == edited.evaluation.base()
    thresholds = [point.pop("threshold") for point in points]
    assert thresholds == sorted(thresholds)
    assert points[0] == everything.to_dict() and points[-1] == nothing.to_dict()
    locality = [point["locality_ag"] for point in points]
    assert locality == sorted(locality) and locality[0] < 1


def test_the_editor_is_as_before_when_it_was_asked(edited):
    config = edited.editor.config
    edited.ungated(snap=not config.snap, among=has_own_neuron)
    assert edited.editor.config == config
    assert torch.equal(edited.scores([*edited.base()]), edited.scores([*edited.base()]))
