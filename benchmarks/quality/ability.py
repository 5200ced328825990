"""General ability in lm-evaluation-harness: questions that people ask, before and after the edits.

    pip install -e '.[lm-eval]'
    python -m benchmarks.quality.ability build/quality/counterfact-10k-10000-0 \\
        ../shared/data/nq_locality.json

The harness's own tasks fetch their data. This one makes a task of a file of questions and answers,
a list of {"question": ..., "answer": ...}: each question has four choices, its own answer and those
of three others, and the harness counts how often the right one is the likeliest, of the base model
and of the edited one. `meg evaluate --tasks nq --task-path build/tasks` asks the same again.

Writes benchmarks/results/ability-NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conftest import version_of
from meg_kernels import MeGEditor
from meg_kernels.storage import write_json

RESULTS = Path(__file__).parents[1] / "results"
TASK = "nq"
CHOICES = 4


def with_choices(
    records: Sequence[Mapping[str, str]], count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` of the questions, each with its own answer among those of others.

    >>> records = [{"question": f"{i}?", "answer": str(i)} for i in range(9)]
    >>> [one] = with_choices(records, 1, seed=0)
    >>> len(set(one["choices"])), one["choices"][one["right"]] + "?" == one["question"]
    (4, True)
    """
    draw = random.Random(seed)
    answers = [*{record["answer"].casefold(): record["answer"] for record in records}.values()]
    if count > len(records) or len(answers) < CHOICES:
        raise ValueError(
            f"{count} questions and {CHOICES} different answers are needed; there are "
            f"{len(records)} and {len(answers)}"
        )
    questions = []
    for record in draw.sample(records, count):
        own = record["answer"]
        others = draw.sample([a for a in answers if a.casefold() != own.casefold()], CHOICES - 1)
        choices = draw.sample([own, *others], CHOICES)
        asked = {"question": record["question"], "choices": choices, "right": choices.index(own)}
        questions.append(asked)
    return questions


def write_task(folder: Path, questions: Sequence[Mapping[str, Any]]) -> None:
    """The harness's description of the task, in YAML, and its questions, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / f"{TASK}.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / f"{TASK}.yaml").write_text(
        f"task: {TASK}\n"
        "output_type: multiple_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}, "
        f"cache_dir: {json.dumps(str(data.parent / 'cache'))}}}\n"
        "test_split: test\n"
        'doc_to_text: "Q: {{question}}\\nA:"\n'
        "doc_to_choice: choices\n"
        "doc_to_target: right\n"
        'target_delimiter: " "\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `meg edit` saved")
    parser.add_argument("questions", type=Path, help="JSON: questions and answers")
    parser.add_argument("--name", default="counterfact-10k", help="of the data that was edited")
    parser.add_argument("--count", type=int, default=1000, help="of questions")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and choices")
    parser.add_argument("--tasks", type=Path, default=Path("build/tasks"), help="folder for it")
    arguments = parser.parse_args()
    from meg_kernels.integrations.lm_eval import evaluate_tasks

    records = json.loads(arguments.questions.read_text(encoding="utf-8"))
    write_task(arguments.tasks, with_choices(records, arguments.count, arguments.seed))
    editor = MeGEditor.from_pretrained(arguments.folder)
    scores = evaluate_tasks(editor, [TASK], task_path=arguments.tasks)
    content = {
        "study": "ability",
        "data": arguments.name,
        "facts": len(editor.facts),
        "generator": editor.config.generator.kind,
        "questions": arguments.count,
        "seed": arguments.seed,
        **dataclasses.asdict(scores),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "lm_eval")},
    }
    write_json(RESULTS / f"ability-{arguments.name}.json", content)
    print(json.dumps(content["scores"], indent=1))


if __name__ == "__main__":
    main()
