"""Evaluation by context: whether edits hold in conversations, too, and not in the template alone.

In each context every fact's own query, its paraphrases and its locality queries are asked, and the
model stops by itself. Base and edited model see the same batches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from meg_kernels.conversation import Prompt, has_chat, prompt_tokens
from meg_kernels.editing.contexts import MEASURED, Context, usable
from meg_kernels.editing.evaluate import asked_of, queries, weight_sums
from meg_kernels.editing.prompting import PromptedModel, answers_match
from meg_kernels.facts import Fact
from meg_kernels.progress import progress_bar
from meg_kernels.storage import WorkFolder, fingerprint, read_kept_json, write_kept_json
from meg_kernels.texts import SPACED, normalized

KINDS = ("reliability", "generality", "locality")
MAX_NEW_TOKENS = 64

Asking = Callable[[Sequence[Prompt], Sequence[int]], AbstractContextManager]
"""Mounts the neurons for these prompts, which belong to these facts."""


@dataclass(frozen=True)
class InContext:
    """Shares from 0 to 1 in one context; None where the facts have nothing to measure them on.

    Args:
        reliability, generality: the answer was the new one, and nothing but it.
        reliability_contained, generality_contained: the answer contained the new one.
        locality: other queries were answered word for word as the base model answers them.
        runs_on: of the answers to edited queries that contain the new one, the share that says
            more than it.
        base_reliability: of the base model, `reliability_contained`.
    """

    reliability: float | None
    reliability_contained: float | None
    generality: float | None
    generality_contained: float | None
    locality: float | None
    runs_on: float | None
    base_reliability: float | None


@dataclass(frozen=True)
class ContextReport:
    """What an evaluation by context found, and how it was made.

    Args:
        n: facts evaluated.
        contexts: the shares in each context, by its name.
        protocol: everything needed to repeat the measurement.
    """

    n: int
    contexts: dict[str, InContext]
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        shares = {name: asdict(shares) for name, shares in self.contexts.items()}
        return {"n": self.n, "contexts": shares, "protocol": self.protocol}


@dataclass(frozen=True)
class _Question:
    kind: str
    fact: int
    asked: Any
    prompt: str


def _mean(values: Iterable[bool]) -> float | None:
    kept = [float(value) for value in values]
    return fmean(kept) if kept else None


class ByContext:
    """Asks base and edited model the same questions in each context.

    Args:
        prompted: the language model.
        facts: what it was edited with.
        contexts: in which it is asked; those of a chat are left out where it has no chat template.
        max_new_tokens: after which an answer is cut; fewer where the model reads no more.
        batch_size: prompts at once.
        work_folder: keeps what was answered, so that an interrupted evaluation resumes.
        identity: JSON-able values and tensors that tell the model and its edits from others.

    Raises:
        ValueError: no facts, or a question that is longer than the model reads.
    """

    def __init__(
        self,
        prompted: PromptedModel,
        facts: Sequence[Fact],
        contexts: Sequence[Context] = MEASURED,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int = 32,
        work_folder: str | Path | None = None,
        identity: Sequence[Any] = (),
    ):
        if not facts:
            raise ValueError("there are no facts to evaluate")
        self.prompted, self.facts, self.batch_size = prompted, facts, batch_size
        self.max_new_tokens = max_new_tokens
        self.contexts = usable(contexts, has_chat(prompted.tokenizer))
        self._work, self._identity = WorkFolder.of(work_folder), identity
        self._weights = weight_sums(prompted.model) if identity else []
        self._batches = {context.name: self._questions(context) for context in self.contexts}
        prompts = [
            question.prompt
            for batches in self._batches.values()
            for batch in batches
            for question in batch
        ]
        prompted.check_prompts(prompts, 1)
        if (most := prompted.positions) is not None:
            longest = max(len(prompt_tokens(prompted.tokenizer, prompt)) for prompt in prompts)
            self.max_new_tokens = min(max_new_tokens, most - longest)

    def _questions(self, context: Context) -> list[list[_Question]]:
        found = [
            _Question(
                kind,
                i,
                context.asked(query),
                asked_of(self.facts[i], kind, self.prompted.prompt(query, context)),
            )
            for kind, i, query in queries(self.facts)
        ]
        found.sort(key=lambda question: len(question.prompt))  # less padding
        return [found[i : i + self.batch_size] for i in range(0, len(found), self.batch_size)]

    def protocol(self) -> dict[str, Any]:
        """How this evaluation measures."""
        return {
            "contexts": [asdict(context) for context in self.contexts],
            "prompt_template": self.prompted.template.text,
            "chat_template": getattr(self.prompted.tokenizer, "chat_template", None),
            "decoding": f"greedy, until the model ends by itself, at most {self.max_new_tokens} "
            "tokens; outside of conversations a line break ends an answer, too",
            "exact": "the whole answer, but for case and its full stop; a sentence after that full "
            "stop is said by runs_on",
            "contained": "the answer's words, one after the other, somewhere in what was said",
            "locality": "the same tokens as the base model's own greedy answer, in the same batch",
            "batch_size": self.batch_size,
            "dtype": str(self.prompted.model.dtype).removeprefix("torch."),
            "device": self.prompted.model.device.type,
        }

    def report(
        self,
        edited: Asking,
        *,
        protocol: dict[str, Any] | None = None,
        progress: bool = False,
    ) -> ContextReport:
        """The edited model beside the base model, in each context.

        Args:
            edited: mounts the neurons that the edited model gives to prompts.
            protocol: what else the report's protocol has to say.
            progress: show a progress bar.
        """
        found = {}
        total = 2 * sum(len(batch) for batches in self._batches.values() for batch in batches)
        with progress_bar(total=total, desc="asking in contexts", unit="", shown=progress) as bar:
            for context in self.contexts:
                bar.set_postfix_str(context.name)
                base = self._answers(context, None, bar.update)
                answers = self._answers(context, edited, bar.update)
                found[context.name] = self._shares(context, base, answers)
        return ContextReport(len(self.facts), found, self.protocol() | (protocol or {}))

    def _answers(
        self, context: Context, edited: Asking | None, done: Callable[[int], Any]
    ) -> list[list[int]]:
        kept = WorkFolder()
        if self._identity:
            identity = () if edited is None else self._identity
            facts = [fact.to_dict() for fact in self.facts]
            about = [context.name, self.protocol(), facts, self._weights]
            kept = self._work / f"context-{fingerprint(about, edited is None, *identity)}"
        found = []
        for number, batch in enumerate(self._batches[context.name]):
            ask = functools.partial(self._ask, batch, edited)
            said, _ = kept.once(f"batch-{number:05d}.json", ask, write_kept_json, read_kept_json)
            found += said
            done(len(batch))
        return found

    @torch.no_grad()
    def _ask(self, batch: list[_Question], edited: Asking | None) -> list[list[int]]:
        prompts = [question.prompt for question in batch]
        if edited is None:
            return self.prompted.answers(prompts, self.max_new_tokens)
        with edited([q.asked for q in batch], [q.fact for q in batch]):
            return self.prompted.answers(prompts, self.max_new_tokens)

    def _shares(
        self, context: Context, base: list[list[int]], edited: list[list[int]]
    ) -> InContext:
        questions = [question for batch in self._batches[context.name] for question in batch]
        exact: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        contained: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        runs_on, base_right = [], []
        for question, before, after in zip(questions, base, edited, strict=True):
            if question.kind == "locality":
                exact["locality"].append(before == after)
                continue
            answer = self.facts[question.fact].answer
            text = self.prompted.text(after, question.prompt)
            right, there = answers_match(text, answer), contains(text, answer)
            exact[question.kind].append(right)
            contained[question.kind].append(there)
            if question.kind == "reliability":
                base_right.append(contains(self.prompted.text(before, question.prompt), answer))
                if there:
                    runs_on.append(normalized(text).rstrip(".") != normalized(answer).rstrip("."))
        return InContext(
            _mean(exact["reliability"]),
            _mean(contained["reliability"]),
            _mean(exact["generality"]),
            _mean(contained["generality"]),
            _mean(exact["locality"]),
            _mean(runs_on),
            _mean(base_right),
        )


def contains(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, one after the other.

    >>> contains("It is Paris, in France.", "Paris"), contains("Parisian", "Paris")
    (True, False)
    """
    wanted = normalized(answer).removesuffix(".")
    word = SPACED.pattern
    before = rf"(?<!{word})" if SPACED.match(wanted[:1]) else ""
    behind = rf"(?!{word}|[+#])" if SPACED.match(wanted[-1:]) else ""
    return re.search(before + re.escape(wanted) + behind, normalized(text)) is not None
