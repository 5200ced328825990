"""Evaluation by context: whether edits hold in conversations, too, and not in the template alone.

In each context every fact's own query, its paraphrases and its locality queries are asked, and the
model stops by itself. Base and edited model see the same batches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
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

Wording = Callable[[str, Context], Context]
"""The context in which an edit that stands in the prompt puts this query of that context."""


@dataclass(frozen=True)
class InContext:
    """Shares from 0 to 1 in one context; None where the facts have nothing to measure them on.

    Args:
        reliability, generality: the answer was the new one, and nothing but it.
        reliability_contained, generality_contained: the answer contained the new one.
        locality: other queries were answered word for word as the base model answers them.
        runs_on: of the answers to edited queries that contain the new one, the share that says
            more than it.
        base_reliability: of the base model, `reliability_contained`; None if it was not asked.
        prompt_tokens: of the edited model's prompts to edited queries, in the mean.
    """

    reliability: float | None
    reliability_contained: float | None
    generality: float | None
    generality_contained: float | None
    locality: float | None
    runs_on: float | None
    base_reliability: float | None
    prompt_tokens: float


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
    query: str
    asked: Any
    prompt: str

    @property
    def is_compared(self) -> bool:
        """Whether the base model's answer counts as well."""
        return self.kind != "generality"


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
                query,
                context.asked(query),
                asked_of(self.facts[i], kind, self.prompted.prompt(query, context)),
            )
            for kind, i, query in queries(self.facts)
        ]
        found.sort(key=lambda question: len(question.prompt))  # less padding
        compared = [question for question in found if question.is_compared]
        others = [question for question in found if not question.is_compared]
        return [
            part[i : i + self.batch_size]
            for part in (compared, others)
            for i in range(0, len(part), self.batch_size)
        ]

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
        wording: Wording | None = None,
        against_base: bool = True,
        protocol: dict[str, Any] | None = None,
        progress: bool = False,
    ) -> ContextReport:
        """The edited model beside the base model, in each context.

        Args:
            edited: mounts the neurons that the edited model gives to prompts.
            wording: of an edit that stands in the prompt.
            against_base: whether the base model is asked as well; there is no Locality without.
            protocol: what else the report's protocol has to say.
            progress: show a progress bar.

        Raises:
            ValueError: what `wording` makes of a question is longer than the model reads.
        """
        found, worded = {}, self._batches
        if wording is not None:
            worded = {context.name: self._worded(context, wording) for context in self.contexts}
            prompts = [q.prompt for batches in worded.values() for batch in batches for q in batch]
            self.prompted.check_prompts(prompts, self.max_new_tokens)
        asked = [q for batches in self._batches.values() for batch in batches for q in batch]
        total = len(asked) + against_base * sum(question.is_compared for question in asked)
        with progress_bar(total=total, desc="asking in contexts", unit="", shown=progress) as bar:
            for context in self.contexts:
                bar.set_postfix_str(context.name)
                compared = [b for b in self._batches[context.name] if b[0].is_compared]
                base = self._answers(context, compared, None, bar.update) if against_base else []
                batches = worded[context.name]
                answers = self._answers(context, batches, edited, bar.update)
                found[context.name] = self._shares(batches, base, answers)
        return ContextReport(len(self.facts), found, self.protocol() | (protocol or {}))

    def _worded(self, context: Context, wording: Wording) -> list[list[_Question]]:
        def worded(question: _Question) -> _Question:
            prompt = self.prompted.prompt(question.query, wording(question.query, context))
            prompt = asked_of(self.facts[question.fact], question.kind, prompt)
            return replace(question, prompt=prompt)

        return [[worded(question) for question in batch] for batch in self._batches[context.name]]

    def _answers(
        self,
        context: Context,
        batches: list[list[_Question]],
        edited: Asking | None,
        done: Callable[[int], Any],
    ) -> list[list[int]]:
        kept = WorkFolder()
        if self._identity:
            identity = () if edited is None else self._identity
            prompts = [[type(q.prompt).__name__, q.prompt] for batch in batches for q in batch]
            about = [context.name, self.protocol(), prompts, self._weights]
            kept = self._work / f"context-{fingerprint(about, edited is None, *identity)}"
        found = []
        for number, batch in enumerate(batches):
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
        self, batches: list[list[_Question]], base: list[list[int]], edited: list[list[int]]
    ) -> InContext:
        questions = [question for batch in batches for question in batch]
        own = [question.prompt for question in questions if question.kind != "locality"]
        tokens = [len(prompt_tokens(self.prompted.tokenizer, prompt)) for prompt in own]
        exact: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        contained: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        runs_on, base_right = [], []
        # Those that are compared with the base model come first.
        for question, before, after in zip_longest(questions, base, edited):
            if question.kind == "locality":
                if before is not None:
                    exact["locality"].append(before == after)
                continue
            answer = self.facts[question.fact].answer
            text = self.prompted.text(after, question.prompt)
            right, there = answers_match(text, answer), contains(text, answer)
            exact[question.kind].append(right)
            contained[question.kind].append(there)
            if question.kind == "reliability":
                if before is not None:
                    said = self.prompted.text(before, question.prompt)
                    base_right.append(contains(said, answer))
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
            fmean(tokens),
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
