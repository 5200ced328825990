"""Evaluation: Reliability, Generality and Locality, each by generation and by teacher forcing.

    Reliability   the edited query is answered with the new answer
    Generality    so are its paraphrases
    Locality      other queries are answered exactly as the base model answers them
    AG            autoregressive generation: the greedy answer, up to its full stop
    TF            teacher forcing: the mean share of answer tokens that the argmax hits
    Score         the harmonic mean of the six

TF shows the model the answer's beginning and its length, and so overstates what users get: AG is
the figure to look at. Every report carries the protocol by which it was made.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from meg_kernels.conversation import opened
from meg_kernels.editing.general_ability import Perplexity
from meg_kernels.editing.prompting import IGNORED, PromptedModel, answers_match
from meg_kernels.facts import Fact
from meg_kernels.pretrained import tokenized
from meg_kernels.progress import progress_bar
from meg_kernels.routing.neuron_cache import Served
from meg_kernels.storage import WorkFolder, fingerprint, read_kept_json, write_kept_json

METRICS = (
    "reliability_ag",
    "reliability_tf",
    "generality_ag",
    "generality_tf",
    "locality_ag",
    "locality_tf",
)

Mounting = Callable[[Sequence[str], Sequence[int]], AbstractContextManager]
"""Mounts the neurons for these queries, which belong to these facts."""

Prompting = Callable[[str, int], str]
"""The prompt in which an edited model gets this query, which belongs to this fact."""


@dataclass(frozen=True)
class Question:
    """One question and what it is asked for.

    Args:
        kind: reliability, generality or locality.
        fact: the number of the fact that it belongs to.
        query: what is asked.
        prompt: the same in the template.
    """

    kind: str
    fact: int
    query: str
    prompt: str = field(compare=False)  # an edit may word it otherwise


@dataclass(frozen=True)
class Verdict:
    """How a model answered a question.

    Args:
        question: that was asked.
        right: whether the greedy answer was the wanted one, as `answers_match` says.
        hits: the share of the wanted answer's tokens that the argmax hit.
    """

    question: Question
    right: bool
    hits: float


@dataclass(frozen=True)
class Metrics:
    """Shares from 0 to 1; None where the facts have nothing to measure them on."""

    reliability_ag: float | None = None
    reliability_tf: float | None = None
    generality_ag: float | None = None
    generality_tf: float | None = None
    locality_ag: float | None = None
    locality_tf: float | None = None

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> Metrics:
        """The means over the questions of each kind."""
        shares: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for verdict in verdicts:
            shares[f"{verdict.question.kind}_ag"].append(float(verdict.right))
            shares[f"{verdict.question.kind}_tf"].append(verdict.hits)
        return cls(**{name: fmean(values) if values else None for name, values in shares.items()})

    @property
    def score(self) -> float | None:
        """The harmonic mean of the six; None if one of them is."""
        values = [getattr(self, name) for name in METRICS]
        if None in values:
            return None
        return 0.0 if 0 in values else len(values) / sum(1 / value for value in values)

    def to_dict(self) -> dict[str, float | None]:
        """The six shares and the Score, JSON-able."""
        return asdict(self) | {"score": self.score}


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found, and how it was made.

    Args:
        n: facts evaluated.
        metrics: of the edited model.
        base: of the model as it was.
        collected: of each fact's own collected neuron, given to its query and paraphrases without
            gate or generator: the ceiling of what a generator can reach. None if not asked for.
        protocol: everything needed to repeat the measurement.
        seconds: of each stage.
        served: what the edited model was asked, and how many neurons that took; of an evaluation
            that resumed, since then.
        perplexity: on text that has nothing to do with the facts. None if not asked for.
    """

    n: int
    metrics: Metrics
    base: Metrics
    collected: Metrics | None
    protocol: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    served: Served = field(default_factory=Served)
    perplexity: Perplexity | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "n": self.n,
            "metrics": self.metrics.to_dict(),
            "base": self.base.to_dict(),
            "collected": None if self.collected is None else self.collected.to_dict(),
            "protocol": self.protocol,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "served": asdict(self.served),
            "perplexity": None if self.perplexity is None else asdict(self.perplexity),
        }


def has_own_neuron(question: Question) -> bool:
    """Whether a neuron was collected for it: none was for locality queries."""
    return question.kind != "locality"


class Evaluation:
    """Asks a model, plain or edited, everything that its facts are measured on.

    Args:
        prompted: the base model.
        facts: what it was edited with.
        max_new_tokens: the longest answer; must hold the longest of the facts' answers. Default:
            16, or as many as that.
        batch_size: prompts at once. Base and edited model see the same batches, so that they
            differ by the neurons alone.
        work_folder: keeps what was answered, so that an interrupted evaluation of the same facts
            and model resumes. Default: nothing is kept.
        identity: JSON-able values and tensors that tell the neurons which `edited` and `collected`
            mount from others. Without any, only the base model's answers are kept.

    Raises:
        FactsError: facts whose answers the model can never give.
        ValueError: no facts, an answer that is longer than max_new_tokens, or a question that is
            longer than the model reads.
    """

    def __init__(
        self,
        prompted: PromptedModel,
        facts: Sequence[Fact],
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        work_folder: str | Path | None = None,
        identity: Sequence[Any] = (),
    ):
        if not facts:
            raise ValueError("there are no facts to evaluate")
        self.prompted, self.facts, self.batch_size = prompted, facts, batch_size
        longest = max(len(target) for ((_, target),) in prompted.targets(facts))
        self.max_new_tokens = max(16, longest) if max_new_tokens is None else max_new_tokens
        if longest > self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, but the longest answer has {longest} tokens"
            )
        questions = [
            Question(kind, i, query, asked_of(facts[i], kind, prompted.prompt(query)))
            for kind, i, query in queries(facts)
        ]
        prompted.check_prompts([question.prompt for question in questions], self.max_new_tokens)
        questions.sort(key=lambda question: len(question.prompt))  # less padding
        self._batches = [
            questions[i : i + batch_size] for i in range(0, len(questions), batch_size)
        ]
        self.seconds_before = 0.0  # that an interrupted evaluation spent on what was found
        self._work, self._identity = WorkFolder.of(work_folder), identity
        self._base_answers: dict[Question, list[int]] | None = None
        self._base_verdicts: list[Verdict] = []

    def protocol(self) -> dict[str, Any]:
        """How this evaluation measures."""
        questions = [question.kind for batch in self._batches for question in batch]
        return {
            "prompt_template": self.prompted.template.text,
            "decoding": f"greedy, at most {self.max_new_tokens} tokens, up to a line break",
            "ag": "whole answer; case, its full stop and any sentence after that are ignored "
            "(locality: the same tokens)",
            "tf": "mean share of the answer's tokens that are the argmax given those before",
            "locality": "against the base model's own greedy answers, in the same batches",
            "score": "harmonic mean of the six",
            "generality": "the paraphrases that the facts bring along",
            "queries": {
                kind: questions.count(kind) for kind in ("reliability", "generality", "locality")
            },
            "batch_size": self.batch_size,
            "dtype": str(self.prompted.model.dtype).removeprefix("torch."),
            "device": self.prompted.model.device.type,
        }

    def base(self, progress: bool = False) -> Metrics:
        """The metrics of the model as it is: its Locality is 1 by definition."""
        return Metrics.of(self.base_verdicts(progress))

    def base_verdicts(self, progress: bool = False) -> list[Verdict]:
        """How the base model, which is asked once, answered each question."""
        if self._base_answers is None:
            answers: dict[Question, list[int]] = {}
            self._base_verdicts = self._ask(
                _nothing_mounted, "base model", progress, answers=answers, kept=self._kept("base")
            )
            self._base_answers = answers
        return self._base_verdicts

    def verdicts(
        self,
        mounting: Mounting,
        progress: bool = False,
        among: Callable[[Question], bool] | None = None,
        prompting: Prompting | None = None,
    ) -> list[Verdict]:
        """How the model answers each question, or some of them, with what `mounting` mounts.

        Args:
            mounting: of neurons, or of any other edit.
            progress: show a progress bar.
            among: the questions that are asked; default: all.
            prompting: makes the prompts of an edit that stands in the prompt. The base model gets
                the template's.
        """
        self.base_verdicts(progress)
        return self._ask(mounting, "edited model", progress, among, prompting=prompting)

    def edited(self, mounting: Mounting, progress: bool = False) -> Metrics:
        """The metrics with the neurons that `mounting` mounts; asks the base model first."""
        self.base_verdicts(progress)
        kept = self._kept("edited", *self._identity) if self._identity else None
        return Metrics.of(self._ask(mounting, "edited model", progress, kept=kept))

    def collected(self, mounting: Mounting, progress: bool = False) -> Metrics:
        """The metrics with each fact's own neuron, without those of Locality: it has no neuron."""
        kept = self._kept("collected", *self._identity) if self._identity else None
        name = "collected neurons"
        return Metrics.of(self._ask(mounting, name, progress, has_own_neuron, kept=kept))

    def report(
        self,
        edited: Mounting,
        collected: Mounting | None = None,
        *,
        protocol: dict[str, Any] | None = None,
        seconds: dict[str, float] | None = None,
        progress: bool = False,
    ) -> EvaluationReport:
        """The edited model beside the base model.

        Args:
            edited: mounts the neurons that the edited model gives to queries.
            collected: mounts each fact's own collected neuron; None leaves that ceiling out.
            protocol: what else the report's protocol has to say.
            seconds: of the stages before the evaluation.
            progress: show progress bars.
        """
        started = time.perf_counter()
        base, metrics = self.base(progress), self.edited(edited, progress)
        ceiling = None if collected is None else self.collected(collected, progress)
        took = time.perf_counter() - started + self.seconds_before
        return EvaluationReport(
            len(self.facts),
            metrics,
            base,
            ceiling,
            self.protocol() | (protocol or {}),
            (seconds or {}) | {"evaluate": took},
        )

    def _kept(self, name: str, *identity: Any) -> WorkFolder:
        """The folder for the answers of this model, so edited, to these questions."""
        return self._work / f"{name}-{fingerprint(self._model_and_questions, *identity)}"

    @functools.cached_property
    def _model_and_questions(self) -> str:
        """What tells this model and these questions from others."""
        facts = [fact.to_dict() for fact in self.facts]
        return fingerprint(self.protocol(), facts, weight_sums(self.prompted.model))

    @torch.no_grad()
    def _ask(
        self,
        mounting: Mounting,
        name: str,
        progress: bool,
        among: Callable[[Question], bool] | None = None,
        answers: dict[Question, list[int]] | None = None,
        prompting: Prompting | None = None,
        kept: WorkFolder | None = None,
    ) -> list[Verdict]:
        kept = kept or WorkFolder()
        answers = {} if answers is None else answers
        verdicts = []
        bar = progress_bar(self._batches, desc=f"evaluating {name}", shown=progress, leave=False)
        for number, asked in enumerate(bar):
            batch = [question for question in asked if among is None or among(question)]
            if not batch:
                continue
            if prompting is not None:
                batch = [
                    replace(
                        q, prompt=asked_of(self.facts[q.fact], q.kind, prompting(q.query, q.fact))
                    )
                    for q in batch
                ]
            answer = functools.partial(self._answer, batch, mounting)
            (said, hits, seconds), found = kept.once(
                f"batch-{number:05d}.json", answer, write_kept_json, read_kept_json
            )
            self.seconds_before += seconds if found else 0.0
            answers.update(zip(batch, said, strict=True))
            for question, tokens, hit in zip(batch, said, hits, strict=True):
                if question.kind == "locality":
                    right = self._base_answers is None or tokens == self._base_answers[question]
                else:
                    text = self.prompted.text(tokens, question.prompt)
                    right = answers_match(text, self.facts[question.fact].answer)
                verdicts.append(Verdict(question, right, hit))
        return verdicts

    def _answer(
        self, batch: list[Question], mounting: Mounting
    ) -> tuple[list[list[int]], list[float], float]:
        """The tokens of each answer, the share of the wanted ones that it hits, and seconds."""
        started = time.perf_counter()
        with mounting([q.query for q in batch], [q.fact for q in batch]):
            said = self.prompted.answers([q.prompt for q in batch], self.max_new_tokens)
        hits = self._hits(batch, said, self._wanted(batch, said), mounting)
        return said, hits, time.perf_counter() - started

    def _wanted(self, batch: list[Question], said: list[list[int]]) -> list[list[int]]:
        """The tokens each answer is compared with; an edited answer's come without their end."""
        base = self._base_answers or dict(zip(batch, said, strict=True))
        return [
            base[question] if question.kind == "locality" else self._answer_tokens(question)
            for question in batch
        ]

    def _answer_tokens(self, question: Question) -> list[int]:
        """The target without its end; a full stop that shares a token with the answer stays."""
        answer = self.facts[question.fact].answer
        target = self.prompted.target(question.prompt, answer)[1][:-1]
        last = str(self.prompted.tokenizer.decode(target[-1:])).strip()
        return target[:-1] if last == "." else target

    def _hits(
        self,
        batch: list[Question],
        said: list[list[int]],
        wanted: list[list[int]],
        mounting: Mounting,
    ) -> list[float]:
        """For each question, the share of wanted tokens that the argmax hits."""
        # An answer that greedy decoding gave token by token has all its tokens hit: only for the
        # others does the model have to be asked again.
        missed = [i for i, tokens in enumerate(wanted) if said[i][: len(tokens)] != tokens]
        hits = [1.0] * len(batch)
        if not missed:
            return hits
        questions = [batch[i] for i in missed]
        tokenizer = self.prompted.tokenizer
        pairs = [(tokenized(tokenizer, batch[i].prompt).input_ids, wanted[i]) for i in missed]
        targets = self.prompted.batch(pairs)
        counted = targets.labels != IGNORED
        with mounting([q.query for q in questions], [q.fact for q in questions]):
            shares = (self.prompted.score(targets).hits & counted).sum(1) / counted.sum(1)
        for i, share in zip(missed, shares.tolist(), strict=True):
            hits[i] = share
        return hits


def asked_of(fact: Fact, kind: str, prompt: str) -> str:
    """The prompt of one of a fact's questions; its own answer may have several lines."""
    return prompt if kind == "locality" else opened(prompt, fact.answer)


def queries(facts: Sequence[Fact]) -> Iterator[tuple[str, int, str]]:
    """All that facts are measured on: its kind, the number of its fact, and the query."""
    for i, fact in enumerate(facts):
        yield "reliability", i, fact.query
        yield from (("generality", i, query) for query in fact.paraphrases)
        yield from (("locality", i, other.query) for other in fact.locality)


def weight_sums(model: PreTrainedModel) -> list[float]:
    """The sum of each weight: what tells models apart, and is cheap beside a batch of answers."""
    return [float(part.detach().sum(dtype=torch.float64)) for part in model.parameters()]


def _nothing_mounted(queries: Sequence[str], facts: Sequence[int]) -> AbstractContextManager:
    return nullcontext()


def unknown_facts(
    prompted: PromptedModel, facts: Sequence[Fact], progress: bool = False
) -> list[Fact]:
    """The facts that the model does not answer: greedily, as a whole, to the query itself."""
    bare = [replace(fact, paraphrases=(), locality=()) for fact in facts]
    verdicts = Evaluation(prompted, bare).base_verdicts(progress)
    known = {verdict.question.fact for verdict in verdicts if verdict.right}
    return [fact for place, fact in enumerate(facts) if place not in known]
