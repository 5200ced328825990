"""The task that the study of general ability makes for lm-evaluation-harness."""

from __future__ import annotations

import json

import pytest
from tiny import BANK, UNRELATED, edit, make_editor

from benchmarks.quality.ability import CHOICES, TASK, with_choices, write_task

COLORS = ["red", "blue", "green", "gold", "pink", "red"]
RECORDS = [{"question": f"Question {i}?", "answer": color} for i, color in enumerate(COLORS)]


def test_every_question_has_its_answer_once_among_those_of_others():
    questions = with_choices(RECORDS, len(RECORDS), seed=1)
    assert {question["question"] for question in questions} == {r["question"] for r in RECORDS}
    answers = {record["question"]: record["answer"] for record in RECORDS}
    for question in questions:
        choices = question["choices"]
        assert len(choices) == len({*choices}) == CHOICES and {*choices} <= {*COLORS}
        assert choices[question["right"]] == answers[question["question"]]
    assert len({question["right"] for question in questions}) > 1
    assert questions == with_choices(RECORDS, len(RECORDS), seed=1)
    assert questions != with_choices(RECORDS, len(RECORDS), seed=2)


@pytest.mark.parametrize(
    ("count", "records"), [(7, RECORDS), (1, [*RECORDS[:3], {"question": "?", "answer": "RED"}])]
)
def test_too_few_questions_or_answers_are_refused(count, records):
    with pytest.raises(ValueError, match="questions and 4 different answers are needed; there are"):
        with_choices(records, count, seed=0)


def test_the_harness_runs_the_task(tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from meg_kernels.integrations.lm_eval import EditedLM, evaluate_tasks

    editor = make_editor(BANK)
    edit(editor)
    records = [{"question": q, "answer": a} for q, a in zip(UNRELATED, COLORS, strict=False)]
    questions = with_choices(records, 3, seed=0)
    write_task(tmp_path / "tasks", questions)
    result = evaluate_tasks(editor, [TASK], task_path=tmp_path / "tasks")
    assert [(score.task, score.metric) for score in result.scores] == [
        (TASK, "acc"),
        (TASK, "acc_norm"),
    ]
    harness = EditedLM(editor)
    evaluate = lm_eval.simple_evaluate(
        harness,
        tasks=[TASK],
        task_manager=lm_eval.tasks.TaskManager(
            include_path=str(tmp_path / "tasks"), include_defaults=False
        ),
    )
    assert evaluate and {*harness.seen} == {question["question"] for question in questions}
    assert result.contexts == 3 and all(score.base * 3 % 1 < 1e-9 for score in result.scores)
    lines = (tmp_path / "tasks" / f"{TASK}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == questions
