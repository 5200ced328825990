"""The study of quality: what it puts together is what an evaluation of a tiny model finds."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch
from tiny import CONFIG, EDITED, GENERATORS, UNRELATED, edit, make_editor

from benchmarks.quality import study
from benchmarks.quality.study import (
    Decisions,
    Edited,
    about_others,
    compare_gates,
    curve,
    gated,
    taken_for,
    train_with_zero_pairs,
    without_names,
)
from meg_kernels.editing.evaluate import Evaluation, Question, has_own_neuron
from meg_kernels.facts import Fact


@pytest.fixture(scope="module", params=[True, False], ids=["snapped", "not snapped"])
def edited(request):
    editor = make_editor(dataclasses.replace(CONFIG, snap=request.param))
    edit(editor)
    return Edited(editor, Evaluation(editor.prompted, EDITED))


@pytest.mark.parametrize("quantile", [0.0, 0.4, 0.8, 1.0])
def test_a_gates_decision_puts_the_evaluation_together(edited, quantile):
    editor = edited.editor
    base = edited.base()
    ungated = edited.ungated(snap=editor.config.snap)
    routing = edited.routing([*base])
    # Beside a score, not on it: in another batch it may round otherwise.
    threshold = float(routing.score.quantile(quantile)) + (1e-3 if quantile else -1)
    above = routing.named & (routing.score > threshold)
    accepted = dict(zip(base, above.tolist(), strict=True))
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


def test_locality_queries_that_name_an_edited_subject_are_told_from_others():
    facts = [Fact("Where is Rome?", "Paris", subject="Rome"), Fact("Who?", "me")]
    questions = [
        Question("locality", 0, "Is ROME old?", ""),
        Question("locality", 0, "Is Oslo old?", ""),
        Question("generality", 0, "Where is Oslo?", ""),
    ]
    assert about_others(questions, facts) == {questions[1]}


def test_a_curve_goes_from_a_neuron_for_every_question_to_none(edited):
    base, ungated = edited.base(), edited.ungated(snap=True)
    points = curve(edited.routing([*base]).score, ungated, base)
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
    assert torch.equal(
        edited.routing([*edited.base()]).score, edited.routing([*edited.base()]).score
    )


def test_questions_of_facts_that_are_not_edited_are_not_asked(edited):
    editor, some = edited.editor, EDITED[1:]
    evaluation = edited.evaluation
    whole = edited.base()
    before = editor.router.edits
    try:
        editor.remove([EDITED[0].id])
        fewer = Edited(editor, evaluation)
        assert {q.fact for q in fewer.base()} == {*range(1, len(EDITED))}
        assert fewer.base().items() < whole.items()
        for asked in (fewer.ungated(snap=True), fewer.ungated(snap=False)):
            assert asked.keys() == fewer.base().keys()
        ceiling = fewer.ceiling()
    finally:
        editor.router.edits = before
    own = Evaluation(editor.prompted, some)
    assert ceiling == Edited(editor, own).ceiling()


def test_gates_are_compared_on_the_same_answers_and_ours_is_left_in_place(edited):
    editor, base = edited.editor, edited.base()
    ungated = edited.ungated(snap=True)
    own = Decisions.of(edited, edited.routing([*base]))
    gates = compare_gates(edited, own, ungated, base)
    assert editor.config.gate == "similarity" and editor.edits.gate.threshold == own.threshold
    editor.set_gate("familiarity")
    try:
        other = Decisions.of(edited, edited.routing([*base]))
    finally:
        editor.set_gate("similarity")
    assert gates["familiarity"]["metrics"] == gated(ungated, base, other.accepted(base)).to_dict()
    ours, theirs = own.accepted(base), other.accepted(base)
    accepted = {question: ours[question] and theirs[question] for question in base}
    assert gates["both"]["metrics"] == gated(ungated, base, accepted).to_dict()


def test_a_question_that_does_not_name_the_subject_is_rejected_by_every_threshold(edited):
    editor, base = edited.editor, edited.base()
    ungated, questions = edited.ungated(snap=True), [*base]
    routing = edited.routing(questions)
    assert routing.named.any() and not routing.named.all()
    accepted = Decisions.of(edited, routing).accepted(base)
    assert [*accepted.values()] == routing.accepted.tolist()
    if editor.config.snap:
        assert gated(ungated, base, accepted) == editor.evaluate().metrics
    found = without_names(edited, questions)
    assert editor.router.requires_subject
    editor.router.config = dataclasses.replace(editor.router.config, require_subject=False)
    assert torch.equal(found.scores, edited.routing(questions).score)
    editor.router.config = dataclasses.replace(editor.router.config, require_subject=True)


def test_what_paraphrases_are_taken_for_is_counted(edited):
    editor, count = edited.editor, sum(len(fact.paraphrases) for fact in EDITED)
    questions = [
        Question("generality", number, query, "")
        for number, fact in enumerate(EDITED)
        for query in fact.paraphrases
    ]
    questions.append(Question("locality", 0, UNRELATED[0], ""))
    routing = edited.routing(questions)
    nearest = torch.tensor([edited.rows[question.fact] for question in questions])
    right = dataclasses.replace(routing, fact=nearest, accepted=torch.ones_like(routing.accepted))
    expected = {"asked": count, "own": count, "same_subject": 0, "another": 0, "none": 0}
    assert taken_for(edited, questions, right) == expected

    # Of the first four one is taken for a fact about its subject, two for others, one for none.
    whole, other = editor.edits, dataclasses.replace(EDITED[0], id="x", query="Abo is made of")
    wrong = dataclasses.replace(right, fact=nearest.clone(), accepted=right.accepted.clone())
    wrong.fact[0], wrong.fact[1], wrong.accepted[2], wrong.fact[3] = len(EDITED), 4, False, 4
    editor.router.edits = dataclasses.replace(whole, facts=[*EDITED, other])
    try:
        expected = {"own": count - 4, "same_subject": 1, "another": 2, "none": 1}
        assert taken_for(edited, questions, wrong) == expected | {"asked": count}
    finally:
        editor.router.edits = whole


def test_generators_are_measured_one_after_the_other(tmp_path, monkeypatch):
    """A distilled one is distilled, and the next is trained anew."""
    config = GENERATORS["dit"]
    generators = {"dit": config, study.DISTILLED: config, "dit again": config}
    monkeypatch.setattr(study, "GENERATORS", generators)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr("meg_kernels.editing.edited_model.shipped_passages", lambda: UNRELATED)
    editor = make_editor(dataclasses.replace(CONFIG, generator=config))
    edit(editor)
    distilled = []
    distill = type(editor).distill

    def noting(*args, **more):
        distilled.append(distill(*args, **more))
        return distilled[-1]

    monkeypatch.setattr(type(editor), "distill", noting)
    arguments = argparse.Namespace(
        name="toy",
        facts=[len(EDITED)],
        generators=[*generators],
        nested=False,
        zero_pairs=False,
        gates=False,
        work=tmp_path,
    )
    made = study.Study(arguments)
    made.measure(editor, EDITED, len(EDITED), seed=0)
    rows = {row["generator"]: row for row in made.content["rows"]}
    assert [*rows] == [*generators]
    first, student, again = rows.values()
    (distillation,) = distilled
    assert student["training_steps"] == first["training_steps"] + distillation.steps
    assert student["training_seconds"] > first["training_seconds"]
    assert editor.edits.generator.config.sampler == config.sampler
    for name in ("training_steps", "metrics", "without_snapping"):
        assert again[name] == first[name]
    assert all(row["metrics"]["reliability_ag"] == 1 for row in rows.values())
    paraphrases = sum(len(fact.paraphrases) for fact in EDITED)
    assert all(row["paraphrases"]["asked"] == paraphrases for row in rows.values())


def test_with_zero_pairs_what_the_gate_should_reject_gets_almost_no_neuron():
    editor = make_editor(dataclasses.replace(CONFIG, snap=False))
    edit(editor)
    config = editor.config.generator.with_training(max_steps=600, close=0.05)
    train_with_zero_pairs(editor, config)
    edits = editor.edits
    rng = torch.Generator().manual_seed(config.training.seed)
    away = edits.held_out.negative(edits.conditions, rng)
    sizes = [
        editor.attached.layout.pack(edits.generator.generate(z)).norm(dim=1).mean()
        for z in (away, edits.conditions)
    ]
    assert sizes[0] < 0.5 * sizes[1]
    said = editor.generate([fact.query for fact in EDITED], 16)
    assert said == [fact.answer for fact in EDITED]
