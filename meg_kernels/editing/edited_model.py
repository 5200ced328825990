"""`EditedModel`: a language model and the router that gives its queries their neurons.

query -> `Router` -> neuron -> the model's forward pass -> answer
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.checks import instance_of
from meg_kernels.conversation import (
    ChatPrompt,
    Message,
    Prompt,
    Prompts,
    as_messages,
    as_prompts,
    opened,
)
from meg_kernels.editing.by_context import MAX_NEW_TOKENS, ByContext, ContextReport
from meg_kernels.editing.contexts import MEASURED, Context
from meg_kernels.editing.evaluate import Evaluation, EvaluationReport, unknown_facts
from meg_kernels.editing.general_ability import Perplexity, perplexity
from meg_kernels.editing.prompting import PromptedModel, checked_generation
from meg_kernels.editing.several import OneStream, asked_apart, joined
from meg_kernels.facts import Fact, FactsLike, as_facts
from meg_kernels.gradients import with_gradients
from meg_kernels.nn import Attached
from meg_kernels.nn.changed import Shared
from meg_kernels.nn.identity import compare, identity
from meg_kernels.nn.packing import frozen_products
from meg_kernels.pretrained import load_language_model, tokenized
from meg_kernels.routing.edits import Edits
from meg_kernels.routing.router import Router, Routing
from meg_kernels.routing.saving import BaseModel, Saved
from meg_kernels.scoped import OwnLock
from meg_kernels.shipped import shipped_passages
from meg_kernels.text_encoder import TextEncoder
from meg_kernels.texts import as_texts

log = logging.getLogger(__name__)

ENDING = 8  # tokens that an answer may take beside those of its text

P = ParamSpec("P")
R = TypeVar("R")


def load_base(
    saved: Saved,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **model_options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model that was edited, loaded again by its name, and its tokenizer.

    Args:
        saved: what its edited folder holds.
        dtype: of its weights; default: as it was.
        device: of the model; default: an accelerator if there is one.
        model_options: further keyword arguments of transformers' `from_pretrained`.

    Raises:
        ValueError: it had no name.
        OSError: no such model can be loaded.
    """
    name = saved.base.name
    if not name:
        raise ValueError(
            f"the model that was edited in {saved.folder} had no name to load it by; pass it, and "
            "its tokenizer: MeGEditor.from_pretrained(folder, model=..., tokenizer=...)"
        )
    dtype = dtype or getattr(torch, saved.base.dtype)
    return load_language_model(name, dtype, device, **model_options)


def one_at_a_time(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb that changes what is edited: threads wait for each other, and no neurons are mounted.

    Asking goes on meanwhile. Gradients are computed even where the caller has turned them off.
    """
    trained = with_gradients(verb)

    @functools.wraps(verb)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        editor: Any = args[0]
        with editor.editing:
            editor._check_nothing_mounted()
            return trained(*args, **kwargs)

    return alone


class EditedModel:
    """A language model that answers edited queries with their neurons, and others as before.

    Threads and asyncio tasks may ask it at the same time; each gets what it would get alone.

    Args:
        prompted: the model with its tokenizer and template.
        attached: where in it the neurons sit.
        router: finds the neurons of queries; `router.served` counts them.
        name: under which the model can be loaded again.
    """

    def __init__(self, prompted: PromptedModel, attached: Attached, router: Router, name: str):
        self.prompted, self.attached, self.router, self.name = prompted, attached, router, name
        self.model, self.tokenizer = prompted.model, prompted.tokenizer
        self.template, self.layer = prompted.template, attached.layer
        self._packed = Shared(functools.partial(_packed, self.model))
        self.editing = OwnLock()

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder."""
        return self.router.encoder

    @property
    def edits(self) -> Edits:
        """What was edited; RuntimeError if nothing was."""
        if self.router.edits is None:
            raise RuntimeError("nothing is edited yet; call edit(facts) first")
        return self.router.edits

    @property
    def facts(self) -> list[Fact]:
        """The edited facts."""
        return [] if self.router.edits is None else [*self.router.edits.facts]

    @property
    def base(self) -> BaseModel:
        """The language model as it is known outside: its name, dtype, shape and weights."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return BaseModel(self.name, dtype, identity(self.model, self.layer))

    def check_base(self, noted: BaseModel) -> None:
        """Refuse to answer for another language model than the noted one.

        Raises:
            TypeError: it is no `BaseModel`.
            ValueError: its shape or its weights are others; the model is as it was before.
        """
        instance_of(BaseModel)("noted", noted)
        found = self.base
        compared = compare(noted.identity, noted.dtype, found.identity, found.dtype)
        if compared.different:
            self.attached.detach()
            raise ValueError(
                f"these edits are for another model than the given one, {self.name!r}: "
                f"{'; '.join(compared.different)}; pass the base model that was edited, or edit "
                "this one"
            )
        if compared.unknown:
            warnings.warn(
                f"whether {self.name!r} is the model that was edited cannot be told from the "
                f"weights of its {' and '.join(compared.unknown)}, which are not noted or stored "
                "in another way; if it is another one, its answers are not those of the edits",
                stacklevel=3,
            )

    def route(self, prompts: Prompts) -> Routing:
        """Which prompts ask an edited query in some wording, and the edited fact nearest to each.

        Args:
            prompts: queries, texts with a query in them, and conversations; one conversation alone
                is a batch of one.
        """
        return self.router.route(prompts)

    @contextmanager
    def routed(self, prompts: Prompts, routing: Routing | None = None) -> Iterator[Routing]:
        """Inside, this thread's or task's calls of the model answer this batch as edited.

        Args:
            prompts: row b of the model's batch is prompts[b], as `route` takes them.
            routing: of these prompts; default: what `route` says.

        Raises:
            TypeError: prompts that are neither texts nor conversations, or a routing that is none.
            ValueError: the routing is of another number of prompts.
        """
        prompts = as_prompts("prompts", prompts)
        routing = self._routing_of(prompts, routing)
        disabled = self.attached.is_disabled
        neurons, index = (None, None) if disabled else self.router.neurons(routing)
        if neurons is None:
            yield routing
            return
        with self.attached.neurons(neurons, index):
            yield routing

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model answers this thread or task as it did before it was edited."""
        with self.attached.disabled():
            yield

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, answers come faster, in all threads, if there are more than a few to give.

        On a CPU the model's weights are packed once for its matrix products, where that is faster
        there; it takes some seconds and up to as much memory as the model again. Elsewhere, and
        where the model is more than a quarter of the machine's memory, nothing changes. The weights
        must stay as they are meanwhile.
        """
        with torch.no_grad(), self._packed.in_use():
            yield

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        routing: Routing | None = None,
        **generation: Any,
    ) -> list[str]:
        """Answers to prompts, edited and unrelated ones in one batch.

        Args:
            prompts: queries, without the template, and conversations, which get the tokenizer's
                chat template: lists of messages, dicts with role and content.
            max_new_tokens: the longest answer; default: 32, and 256 in a conversation, or what an
                edited answer needs, as far as the model has room for it behind the longest prompt.
            routing: of these prompts; default: what `route` says.
            generation: keyword arguments of `model.generate`; greedy without. Those that contradict
                answers in texts raise a TypeError that names them.

        Returns:
            For each prompt, or num_return_sequences times for each: to a query one line, without
            the full stop that ends it, or an edited answer of several lines; in a conversation
            what the model says. A prompt that asks several edited questions, a sentence each, is
            answered line by line: each of them is asked by itself.

        Raises:
            TypeError: a prompt that is neither, or a keyword that contradicts answering them.
            ValueError: a prompt is longer than the model reads, or no valid text; or it is a
                conversation, and the tokenizer has no chat template.
        """
        asked = as_prompts("prompts", prompts)
        routing = self._routing_of(asked, routing)
        owners = [*range(len(asked))]
        if not self.attached.is_disabled and routing.several:
            asked, routing, owners = asked_apart(asked, routing)
        if generation.get("streamer") is None or len(asked) == 1 or owners[-1]:
            said = self._said(asked, routing, max_new_tokens, generation)
        else:  # the questions of one prompt, one after the other
            checked_generation(1, generation)
            said, stream = [], OneStream(generation["streamer"], self.tokenizer)
            generation["streamer"] = stream
            for row, question in enumerate(asked):
                said += self._said([question], routing.of([row]), max_new_tokens, generation)
            stream.close()
        return [text for several in joined(said, owners) for text in several]

    def _said(
        self,
        asked: Sequence[Prompt],
        routing: Routing,
        max_new_tokens: int | None,
        generation: dict[str, Any],
    ) -> list[list[str]]:
        """The answers to each prompt, one or num_return_sequences of them."""
        texts = [self.prompted.prompt_of(prompt) for prompt in asked]
        answers = [""] * len(asked) if self.attached.is_disabled else routing.answers()
        texts = [opened(text, answer) for text, answer in zip(texts, answers, strict=True)]
        limits = [
            self._enough(text, answer) if max_new_tokens is None else max_new_tokens
            for text, answer in zip(texts, answers, strict=True)
        ]
        kinds = []
        for in_chat in (False, True):
            rows = [
                row for row, text in enumerate(texts) if isinstance(text, ChatPrompt) is in_chat
            ]
            most = max((limits[row] for row in rows), default=1)
            if max_new_tokens is None:
                most = self.prompted.room([texts[row] for row in rows], most)
            kinds.append((rows, most))
        for rows, most in kinds:
            self.prompted.check_prompts([texts[row] for row in rows], most, **generation)
        found: list[list[str]] = [[] for _ in asked]
        for rows, most in kinds:
            if not rows:
                continue
            with self.routed([asked[row] for row in rows], routing.of(rows)):
                said = self.prompted.answers([texts[row] for row in rows], most, **generation)
            each = len(said) // len(rows)
            for place, row in enumerate(rows):
                several = said[place * each : (place + 1) * each]
                found[row] = [self.prompted.text(one[: limits[row]], texts[row]) for one in several]
        return found

    def _enough(self, prompt: str, answer: str) -> int:
        """Tokens that answer a prompt by default: more for a long answer that the edits give."""
        tokens = len(tokenized(self.tokenizer, answer).input_ids) if answer else 0
        return max(256 if isinstance(prompt, ChatPrompt) else 32, tokens + ENDING)

    def _routing_of(self, prompts: Sequence[Prompt], routing: Routing | None) -> Routing:
        """The given routing, if it can be of these prompts; None: what `route` says of them."""
        routing = self.router.route(prompts) if routing is None else routing
        if len(instance_of(Routing)("routing", routing)) != len(prompts):
            raise ValueError(
                f"routing is of {len(routing)} prompts, and {len(prompts)} are given; give those "
                "that it was made of, route(prompts)"
            )
        return routing

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        routing: Routing | None = None,
        **generation: Any,
    ) -> str:
        """What the model says next in a conversation.

        Args:
            messages: dicts with role and content, of which the last one is the user's.
            max_new_tokens: the most tokens that it says; default: as `generate` has it.
            routing: of this conversation; default: what `route` says.
            generation: keyword arguments of `model.generate`, such as a `streamer`.

        Raises:
            TypeError: messages that are none, or a keyword that contradicts answering them.
            ValueError: the tokenizer has no chat template, or the conversation is longer than the
                model reads.
        """
        messages = as_messages("messages", messages)
        (said, *_) = self.generate([messages], max_new_tokens, routing=routing, **generation)
        return said

    def generate_base(
        self, prompts: Prompts, max_new_tokens: int | None = None, **generation: Any
    ) -> list[str]:
        """The base model's answers to prompts; arguments as `generate` takes them."""
        with self.disabled():
            return self.generate(prompts, max_new_tokens, **generation)

    def unknown(self, facts: FactsLike, *, progress: bool = False) -> list[Fact]:
        """The facts, given as `edit` takes them, which the base model does not answer already."""
        self._check_nothing_mounted()
        with self.serving():
            return unknown_facts(self.prompted, as_facts(facts), progress)

    def evaluate(
        self,
        facts: FactsLike | None = None,
        *,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> EvaluationReport:
        """Reliability, Generality and Locality of the edited model beside the base model's.

        What changes the edits waits until they are measured.

        Args:
            facts: edited facts with the paraphrases and locality queries to ask; default: those
                that were edited, as they were read.
            work_folder: keeps what was answered, so that an interrupted evaluation resumes.
            progress: show progress bars.

        Raises:
            RuntimeError: nothing is edited.
        """
        self._check_nothing_mounted()
        facts = None if facts is None else as_facts(facts)
        with self.editing:
            return self._evaluated(facts, work_folder, progress)

    def _evaluated(
        self, facts: list[Fact] | None, work_folder: str | Path | None, progress: bool
    ) -> EvaluationReport:
        edits = self.edits
        facts = self.facts if facts is None else facts
        identity, about = self._measured()
        evaluation = Evaluation(self.prompted, facts, work_folder=work_folder, identity=identity)
        rows = edits.rows_of(facts)

        def mount_own(queries: Sequence[str], owners: Sequence[int]):
            return self.attached.neurons(edits.neurons, torch.tensor([rows[i] for i in owners]))

        before = self.router.served
        with self.serving():
            report = evaluation.report(
                lambda queries, owners: self.routed(queries),
                mount_own,
                protocol=about,
                seconds=edits.report.seconds,
                progress=progress,
            )
        return dataclasses.replace(report, served=self.router.served.since(before))

    def evaluate_by_context(
        self,
        facts: FactsLike | None = None,
        contexts: Sequence[Context] = MEASURED,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> ContextReport:
        """Reliability, Generality and Locality in conversations and elsewhere, by generation.

        What changes the edits waits until they are measured.

        Args:
            facts: edited facts with the paraphrases and locality queries to ask; default: those
                that were edited, as they were read.
            contexts: in which they are asked; default: nine, none of which but the bare ones are
                among those that neurons are fitted in.
            max_new_tokens: after which an answer is cut.
            work_folder: keeps what was answered, so that an interrupted evaluation resumes.
            progress: show a progress bar.

        Returns:
            Shares of all questions of a kind, in each context.

        Raises:
            RuntimeError: nothing is edited.
            ValueError: a question is longer than the model reads, or its chat template refuses it.
        """
        self._check_nothing_mounted()
        given = None if facts is None else as_facts(facts)
        with self.editing:
            identity, about = self._measured()
            evaluation = ByContext(
                self.prompted,
                self.facts if given is None else given,
                contexts,
                max_new_tokens,
                work_folder=work_folder,
                identity=identity,
            )
            with self.serving():
                return evaluation.report(
                    lambda asked, _: self.routed(asked), protocol=about, progress=progress
                )

    def perplexity(
        self, texts: Iterable[str] | None = None, *, progress: bool = False
    ) -> Perplexity:
        """How well base and edited model predict text that has nothing to do with the edits.

        Args:
            texts: passages; the gate sees each one's first sentence, and its neuron, if any, stays
                mounted for the whole passage. Default: the package's.
            progress: show a progress bar.

        Raises:
            ValueError: no texts, or one of a single token.
        """

        @contextmanager
        def mount_edited(query: str) -> Iterator[bool]:
            with self.routed([query]) as routing:
                yield bool(routing.accepted)

        self._check_nothing_mounted()
        passages = shipped_passages() if texts is None else as_texts("texts", texts)
        with self.editing, self.serving():
            return perplexity(self.prompted, passages, mount_edited, progress)

    def _measured(self) -> tuple[list[Any], dict[str, Any]]:
        """What tells these edits from others, and what a report must say of them."""
        identity = [dataclasses.asdict(self.router.config), self.layer, *self.edits.identity()]
        return identity, {"model": self.name, "layer": self.layer} | self.router.protocol()

    def _check_nothing_mounted(self) -> None:
        """Raise RuntimeError where neurons would count as part of the base model."""
        if self.attached.has_neurons:
            raise RuntimeError("neurons are mounted; leave that `with` block first")


def _packed(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, the weights of a model are packed in all threads, where that is faster."""
    if model.device.type == "cpu" and _fits_twice(model):
        return frozen_products([model], model.dtype, everywhere=True)
    return nullcontext()


def _fits_twice(model: PreTrainedModel) -> bool:
    """Whether a copy of the weights leaves half of the machine's memory to others."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = 4 * model.get_memory_footprint() <= memory
    if not fits:
        log.info("the model takes more than a quarter of the memory: its weights are not packed")
    return fits
