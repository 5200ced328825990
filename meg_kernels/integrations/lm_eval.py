"""The edited model in EleutherAI's lm-evaluation-harness (`pip install 'meg-kernels[lm-eval]'`).

    from meg_kernels.integrations.lm_eval import EditedLM, evaluate_tasks

    evaluate_tasks(editor, ["arc_easy", "piqa"])                    # base and edited model
    lm_eval.simple_evaluate(EditedLM(editor), tasks=["arc_easy"])   # with the harness's options

Each request's context goes through the gate, and each row of a batch has the neuron of its own
context. What the gate does not accept, the base model answers, in the batches that the harness
makes for it: there both models' results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meg_kernels.checks import integer
from meg_kernels.editing.editor import MeGEditor
from meg_kernels.editing.general_ability import first_sentence
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.texts import as_texts

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"tasks are run by lm-evaluation-harness ({error}); run: pip install 'meg-kernels[lm-eval]'"
    ) from error

BATCH_SIZE = 16


def query_of(context: str, template: PromptTemplate) -> str:
    r"""What the gate sees of a context.

    That is the last query that stands in the editor's own template, or else the whole context.

    >>> query_of("Q: Who wrote Emma?\nA: Jane Austen\n\nQ: Who wrote Dracula?\nA:",
    ...          PromptTemplate())
    'Who wrote Dracula?'
    >>> query_of("Question: Who wrote Dracula?\nAnswer:", PromptTemplate())
    'Question: Who wrote Dracula?\nAnswer:'
    """
    context = context.strip()
    beginning, end = template.text.split("{}")
    body = context.removesuffix(end.rstrip())
    if body != context or not end:
        # At the beginning of a line only.
        _, found, query = f"\n{body}".rpartition(f"\n{beginning}")
        if found:
            return query.strip()
    return context


class EditedLM(HFLM):
    """An editor's model as edited, for `lm_eval.simple_evaluate`.

    Texts whose likelihood is asked for as a whole (`loglikelihood_rolling`) meet the gate with
    their first sentence, and have its neuron, if any, from beginning to end.

    Args:
        editor: an editor with edits.
        batch_size: requests at once.
        options: of lm_eval's HFLM.
    """

    def __init__(self, editor: MeGEditor, batch_size: int = BATCH_SIZE, **options: Any):
        super().__init__(
            pretrained=editor.model, tokenizer=editor.tokenizer, batch_size=batch_size, **options
        )
        self.editor = editor
        self.seen: dict[str, bool] = {}  # by the gate, and whether it accepted that
        self._contexts: list[str] = []  # of the batch that is about to be generated for
        self._text: str | None = None  # whose neuron every row has

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The base model's answers; where the gate accepts the context, the edited model's."""
        answers = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if not requests or requests[0][0] is None:  # windows of texts, which have no context
            return answers
        queries = [self._query(context) for (context, _), *_ in requests]
        accepted = self._accepted(queries)
        # Of like length, since they are padded.
        rows = [row for row, query in enumerate(queries) if accepted[query]]
        rows.sort(key=lambda row: len(requests[row][1]) + len(requests[row][2]))
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            with self.editor.routed([queries[row] for row in some]):
                edited = self._score([requests[row][1:] for row in some])
            for row, answer in zip(some, edited, strict=True):
                answers[row] = answer
                self.cache_hook.add_partial("loglikelihood", requests[row][0], answer)
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, with its first sentence's neuron if it has one."""
        answers = super().loglikelihood_rolling(requests, disable_tqdm)
        beginnings = [first_sentence(request.args[0]) for request in requests]
        accepted = self._accepted(beginnings)
        for row, beginning in enumerate(beginnings):
            if accepted[beginning]:
                self._text = beginning
                try:
                    answers[row : row + 1] = super().loglikelihood_rolling([requests[row]], True)
                finally:
                    self._text = None
        return answers

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **more: Any) -> tuple:
        """Tokenise a batch, and note the texts whose neurons it needs."""
        self._contexts = list(strings)
        return super().tok_batch_encode(strings, *args, **more)

    def _model_generate(self, context: Tensor, *args: Any, **more: Any) -> Tensor:
        queries = [self._query(text) for text in self._contexts]
        with self.editor.routed(queries) as routing:
            self.seen |= dict(zip(queries, routing.accepted.tolist(), strict=True))
            return super()._model_generate(context, *args, **more)

    def _model_call(self, inps: Tensor, *args: Any, **more: Any) -> Tensor:
        if self._text is None:
            return super()._model_call(inps, *args, **more)
        with self.editor.routed([self._text] * len(inps)):
            return super()._model_call(inps, *args, **more)

    def _query(self, context: str) -> str:
        return query_of(context, self.editor.template)

    def _accepted(self, queries: Sequence[str]) -> dict[str, bool]:
        """Whether the gate takes these for edited queries; each is asked about once."""
        new = [query for query in dict.fromkeys(queries) if query and query not in self.seen]
        self.seen |= dict(zip(new, self.editor.route(new).accepted.tolist(), strict=True))
        return {query: self.seen.get(query, False) for query in queries}  # nothing asks nothing

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding gives."""
        longest = self.max_length + 1
        cut = [((context + target)[-longest : -len(target)], target) for context, target in pairs]
        scores = self.editor.prompted.score(self.editor.prompted.batch(cut))
        lengths = [len(target) for _, target in cut]
        return [
            (-loss * length, right)
            for loss, length, right in zip(
                scores.losses.tolist(), lengths, scores.right.tolist(), strict=True
            )
        ]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Args:
        task, metric: as the harness names them.
        base, edited: of the two models.
        stderr: of the base model's, where the harness gives one.
    """

    task: str
    metric: str
    base: float
    edited: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScores:
    """Base and edited model on tasks of the harness.

    Args:
        scores: task by task, metric by metric.
        contexts: how many different ones the gate saw.
        accepted: of them, those that it took for edited queries.
        version: of lm_eval.
    """

    scores: list[TaskScore]
    contexts: int
    accepted: int
    version: str


def evaluate_tasks(
    editor: MeGEditor,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> TaskScores:
    """Base and edited model on tasks of lm-evaluation-harness.

    Args:
        editor: an editor with edits.
        tasks: names of tasks or groups of tasks.
        task_path: a folder with further tasks, as YAML.
        limit: examples of each task; default: all.
        batch_size: requests at once.

    Raises:
        ValueError: a task of that name does not exist.
        FileNotFoundError: there is no such folder.
        RuntimeError: nothing is edited.
    """
    _ = editor.edits  # raises where nothing is edited
    tasks = as_texts("tasks", tasks)
    limit = integer(1).or_none()("limit", limit)
    manager = _task_manager(tasks, task_path)
    options: dict[str, Any] = {"batch_size": batch_size, "softmax_dtype": "float32"}
    base = HFLM(pretrained=editor.model, tokenizer=editor.tokenizer, **options)
    edited = EditedLM(editor, **options)
    with editor.serving():
        results = [
            lm_eval.simple_evaluate(
                model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                log_samples=False,
            )["results"]
            for model in (base, edited)
        ]
    scores = _side_by_side(*results)
    return TaskScores(scores, len(edited.seen), sum(edited.seen.values()), lm_eval.__version__)


def _task_manager(tasks: Sequence[str], task_path: str | Path | None) -> TaskManager:
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise FileNotFoundError(f"task_path is {task_path}, where there is no folder")
        own = TaskManager(include_path=str(task_path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):  # looking through the harness's own takes a while
            return own
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(
            f"tasks names {unknown[0]!r}, which is none of the harness's {len(manager.all_tasks)}; "
            "list them with: lm-eval ls tasks"
        )
    return manager


def _side_by_side(base: dict[str, Any], edited: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, measured in base.items():
        for key, value in measured.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            stderr = measured.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            stderr = stderr if isinstance(stderr, float) else None
            scores.append(TaskScore(task, name, float(value), float(edited[task][key]), stderr))
    return scores
