"""From queries to model inputs: templates, targets for teacher forcing, greedy answers."""

from __future__ import annotations

import functools
import inspect
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from meg_kernels.checks import (
    FLAG,
    TEXT,
    TEXTS,
    Check,
    as_integer,
    instance_of,
    integer,
    number,
    shown,
)
from meg_kernels.conversation import (
    ChatFormat,
    ChatPrompt,
    OpenPrompt,
    Prompt,
    chat_format,
    chat_prompt,
    opened,
    prompt_tokens,
)
from meg_kernels.editing.contexts import Context
from meg_kernels.facts import Fact, FactsError, listed_facts
from meg_kernels.nn import input_device, last_feed_forward_sees
from meg_kernels.nn.changed import hooked
from meg_kernels.nn.families import language_model
from meg_kernels.pretrained import (
    check_tokenizer,
    check_tokens,
    embedded_tokens,
    ready_to_pad,
    tokenized,
)
from meg_kernels.texts import as_texts, is_unicode, normalized, normalized_answer

IGNORED = -100


@dataclass(frozen=True)
class PromptTemplate:
    r"""How a query, a question or the beginning of a sentence, becomes a prompt.

    One template for both kinds, as in the paper: a neuron fitted on one wording then works for the
    others as well, since all prompts end alike.

    >>> PromptTemplate().format("Who wrote Emma?")
    'Q: Who wrote Emma?\nA:'
    """

    text: str = "Q: {}\nA:"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or self.text.count("{}") != 1:
            raise ValueError(f"the template is {self.text!r}; it must hold one {{}}")
        if not is_unicode(self.text):
            raise ValueError(
                f"the template is {self.text!r}; it must be text without halves of surrogate pairs"
            )

    def format(self, query: str) -> str:
        """The prompt of a query."""
        if not isinstance(query, str):
            raise TypeError(f"query is {shown(query)}; it must be text")
        return self.text.replace("{}", query.strip())

    def query(self, prompt: str) -> str | None:
        r"""The query of which `format` makes this prompt; None if there is none.

        >>> PromptTemplate().query("Q: Who wrote Emma?\nA:")
        'Who wrote Emma?'
        """
        before, _, behind = self.text.partition("{}")
        query = prompt.removeprefix(before).removesuffix(behind)
        return query if query.strip() and self.format(query) == prompt else None

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> PromptTemplate:
        """The paper's template for the paper's models, by model_type; the default for others."""
        model = language_model(model)
        return cls(PAPER_TEMPLATES.get(model.config.model_type, cls.text))


PAPER_TEMPLATES = {
    "phi": "Instruct:Answer the following question in less than 5 words. {}\nOutput:",
    "gptj": "Q: Answer the following question in less than 5 words. {}\nA:",
}


@dataclass(frozen=True)
class TargetBatch:
    """Prompts with their target answers, ended at the same column.

    Args:
        inputs: `input_ids`, `attention_mask` and, where the model takes them, `position_ids`,
            each [B, T], padded on the left; a row is its prompt and its target but for the last
            token.
        labels: [B, K]: the target tokens, as many as the longest target has, IGNORED before.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> TargetBatch:
        """These rows, without the columns that only the others needed."""
        mask = self.inputs["attention_mask"][rows]
        first = int(mask.any(0).to(torch.int8).argmax())
        labels = self.labels[rows]
        first_label = int((labels != IGNORED).any(0).to(torch.int8).argmax())
        inputs = {name: tensor[rows, first:] for name, tensor in self.inputs.items()}
        return TargetBatch(inputs, labels[:, first_label:])


def target_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of `prompt` and of its target.

    The target is a space, the answer, a full stop and the end of the text; in a conversation,
    what its chat template writes in place of the space and of the end. Answers of several lines,
    and those that end with another sign than a letter, a digit, a quote or a bracket, get no full
    stop.
    """
    in_chat = isinstance(prompt, ChatPrompt)
    form = chat_format(tokenizer) if in_chat else ChatFormat(" ", tokenizer.eos_token_id)
    prompt_ids = prompt_tokens(tokenizer, prompt)
    said = f"{form.lead}{answer}{_full_stop(answer)}"
    whole = prompt_tokens(tokenizer, ChatPrompt(prompt + said) if in_chat else prompt + said)
    if whole[: len(prompt_ids)] == prompt_ids:
        target = whole[len(prompt_ids) :]
    else:
        target = tokenized(tokenizer, said, add_special_tokens=False).input_ids
    return prompt_ids, [*target, form.end]


def _full_stop(answer: str) -> str:
    last = unicodedata.normalize("NFC", answer.rstrip())[-1:]
    is_letter = last.isalnum() or unicodedata.category(last)[0] == "M"  # or a vowel sign
    ends = "\n" not in answer.strip() and (is_letter or last in "\"'”’»)]%°+#")
    return "." if ends else ""


@dataclass(frozen=True)
class TargetScores:
    """How well a model predicts the targets of a batch.

    Args:
        losses: [B] mean cross-entropy of each row's target tokens, in nats.
        hits: [B, K] bool: the target tokens that the argmax gets right; True where ignored.
        margins: [B] by how much more, in nats, each row's target tokens are expected than any
            other, at the token where it is least; negative where another is the argmax. None
            unless they were asked for.
        largest: [B] the largest of the logits that the margins compare, in size; None as well.
    """

    losses: Tensor
    hits: Tensor
    margins: Tensor | None = None
    largest: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """[B] bool: every target token is the argmax: greedy decoding gives the answer."""
        return self.hits.all(1)


def score_targets(
    model: PreTrainedModel, batch: TargetBatch, with_margins: bool = False
) -> TargetScores:
    """One forward pass of `model` over `batch`; differentiable where the model is."""
    counted = batch.labels != IGNORED  # [B, K]

    # The output layer costs as much as many decoder layers: it sees the targets' positions alone.
    def keep_targets(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][:, -counted.shape[1] :][counted],)

    head = model.get_output_embeddings()
    with (
        hooked(head.register_forward_pre_hook, keep_targets),
        last_feed_forward_sees(model, columns=counted.shape[1]),
    ):
        logits = model(**batch.inputs, use_cache=False).logits  # [targets, vocabulary]
    logits = logits.float()
    labels = batch.labels[counted]
    rows = counted.nonzero()[:, 0]
    token_losses = F.cross_entropy(logits, labels, reduction="none")
    losses = token_losses.new_zeros(len(batch)).index_add(0, rows, token_losses)
    is_first = logits.argmax(-1) == labels
    hits = torch.ones_like(counted).masked_scatter(counted, is_first)
    margins = largest = None
    if with_margins:
        two = logits.detach().topk(2).values
        own = logits.detach().gather(1, labels.unsqueeze(1))[:, 0]
        other = torch.where(is_first, two[:, 1], two[:, 0])
        token_margins, size = own - other, own.abs().maximum(other.abs())
        largest = losses.detach().scatter_reduce(0, rows, size, "amax", include_self=False)
        margins = losses.detach().scatter_reduce(0, rows, token_margins, "amin", include_self=False)
    return TargetScores(losses / counted.sum(1), hits, margins, largest)


@functools.lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: end of text, and every token with a line break in it."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    line_breaks = [i for i, text in enumerate(texts) if "\n" in text]
    return sorted({tokenizer.eos_token_id, *line_breaks})


def _pairs(tokens: int | None) -> Check:
    """The check of (prompt, target) token ids, of a model with this number of tokens."""
    most = None if tokens is None else tokens - 1
    token = integer(0, most).read

    def read(value: Any) -> list[tuple[list[int], list[int]]]:
        pairs = [([*map(token, prompt)], [*map(token, target)]) for prompt, target in value]
        if not pairs or not all(target and len(prompt + target) > 1 for prompt, target in pairs):
            raise ValueError
        return pairs

    ids = "token ids" if most is None else f"token ids from 0 to {most}"
    return Check(f"a list of pairs of a prompt's and its target's {ids}, at least one", read)


def _early_stopping(value: Any) -> bool | str:
    return value if value == "never" else FLAG("early_stopping", value)


def _streamer(value: Any) -> Any:
    if not (hasattr(value, "put") and hasattr(value, "end")):
        raise TypeError
    return value


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


# What `PromptedModel.answers` sets itself, and what gives its model other prompts or other results
# than texts.
OWN_KEYWORDS = {
    "inputs": "pass prompts",
    "input_ids": "pass prompts",
    "inputs_embeds": "pass prompts",
    "attention_mask": "pass prompts",
    "position_ids": "pass prompts",
    "tokenizer": "the model's own is used",
    "max_length": "use max_new_tokens",
    "return_dict_in_generate": "answers are texts",
    "output_scores": "answers are texts",
    "output_logits": "answers are texts",
    "output_attentions": "answers are texts",
    "output_hidden_states": "answers are texts",
}


TOKEN = Check(
    "a token's number, such as tokenizer.convert_tokens_to_ids('</s>')", as_integer, TypeError
)
TOKENS = Check("a list of token ids", lambda value: [*map(integer(0).read, value)])
# Of `model.generate`, which takes any value, and fails on some in the midst of its work.
CHECKED_KEYWORDS = {
    "do_sample": FLAG,
    "early_stopping": Check("True, False or 'never'", _early_stopping),
    "generation_config": instance_of(GenerationConfig),
    "length_penalty": number(),
    "max_time": number(above=0),
    "min_new_tokens": integer(0),
    "no_repeat_ngram_size": integer(0),
    "num_beams": integer(1),
    "num_return_sequences": integer(1),
    "repetition_penalty": number(above=0),
    "streamer": Check("a streamer, with put and end", _streamer, TypeError),
    "temperature": number(least=0),
    "top_k": integer(0),
    "top_p": number(least=0, most=1),
    "use_cache": FLAG,
    "logits_processor": Check("a list of logits processors", _listed, TypeError),
    "stopping_criteria": Check("a list of stopping criteria", _listed, TypeError),
}


def checked_generation(max_new_tokens: int, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what contradicts answering prompts.

    Args:
        max_new_tokens: the longest answer.
        keywords: of `model.generate`.

    Returns:
        The keywords, with numpy's numbers as Python's: `model.generate` takes no others.

    Raises:
        TypeError: a keyword of the wrong kind, or one that gives other prompts or results.
        ValueError: max_new_tokens is below 1, or another keyword out of its range.
    """
    if Check("an integer from 1", as_integer, TypeError)("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be an integer from 1")
    checked = {
        name: CHECKED_KEYWORDS[name].or_none()(name, value) if name in CHECKED_KEYWORDS else value
        for name, value in keywords.items()
    }
    for name in ("eos_token_id", "pad_token_id"):
        for token in _as_list(keywords.get(name)):
            TOKEN(name, token)
    for name in keywords.keys() & OWN_KEYWORDS.keys():
        if keywords[name] is None or keywords[name] is False:
            continue
        raise TypeError(
            f"{name} cannot be given here ({OWN_KEYWORDS[name]}); for full control, call "
            "model.generate inside `with editor.routed(prompts):`"
        )
    return checked


@dataclass(frozen=True)
class PromptedModel:
    """A language model that is asked queries in a template.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, with a padding token, padding on the left.
        template: how queries become prompts.

    Raises:
        ValueError: the tokenizer cannot pad so, has no token that ends a text, or is not of this
            model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate

    def __post_init__(self) -> None:
        instance_of(PromptTemplate)("template", self.template)
        if self.tokenizer.pad_token_id is None or self.tokenizer.padding_side != "left":
            raise ValueError(
                "the tokenizer must have a padding token and pad on the left; use "
                "PromptedModel.of(model, tokenizer), which takes any"
            )
        check_tokenizer(self.tokenizer, self.model)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token, with which answers end; set "
                "tokenizer.eos_token"
            )

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None = None,
    ) -> PromptedModel:
        """`model` with a tokenizer that can pad and, by default, its own template.

        The given tokenizer stays as it is.
        """
        template = PromptTemplate.for_model(model) if template is None else template
        return cls(model, ready_to_pad(tokenizer), template)

    def prompt(self, query: str, context: Context | None = None) -> str:
        """The query as the model gets it: in the template, or in another context."""
        if context is None:
            return self.template.format(query)
        if context.form == "chat":
            return chat_prompt(self.tokenizer, context.messages(query))
        wording = context.wording(query)
        return wording if context.form == "raw" else self.template.format(wording)

    def prompt_of(self, asked: Prompt) -> str:
        """A query in the template, or a conversation in the tokenizer's chat template."""
        if isinstance(asked, str):
            return self.prompt(asked)
        return chat_prompt(self.tokenizer, asked)

    @property
    def positions(self) -> int | None:
        """The most tokens that the model reads and writes at once; None if any number."""
        return positions(self.model)

    def targets(
        self, facts: Sequence[Fact], contexts: Sequence[Context | None] = (None,)
    ) -> list[list[tuple[list[int], list[int]]]]:
        """Token ids of each fact's prompts and of their targets, as `target_tokens` has them.

        Args:
            facts: with the new answers.
            contexts: in which each query is asked; None: in the template.

        Raises:
            FactsError: the model cannot be taught them: an answer that it can never give, since
                its tokens spell another one or end in the midst of it, or more tokens than the
                model has positions. The message names every such fact.
        """
        unfit, found, ends = [], [], functools.cache(self._ends_of)
        for place, fact in enumerate(facts := listed_facts(facts)):
            long = self._surely_too_long(fact.query) or self._surely_too_long(fact.answer)
            reason, pairs = long and f"it {long}", []
            if reason is None:
                prompts = [self.prompt(fact.query, context) for context in contexts]
                pairs = [self.target(prompt, fact.answer) for prompt in prompts]
                reason = self._unteachable(fact.answer, prompts, pairs, ends)
            if reason is not None:
                unfit.append(f"facts[{place}], {_shortened(fact.query)}: {reason}")
            found.append(pairs)
        if unfit:
            raise FactsError(
                f"the model cannot be taught {len(unfit)} of {len(facts)} facts; reword them or "
                "leave them out:\n" + "\n".join(unfit)
            )
        return found

    def _unteachable(
        self,
        answer: str,
        prompts: list[str],
        pairs: list[tuple[list[int], list[int]]],
        ends: Callable[[type[str]], set[int]],
    ) -> str | None:
        """Why greedy decoding could never give a target and be right; None if it could each."""
        length, most = max(len(prompt) + len(target) for prompt, target in pairs), self.positions
        if most is not None and length > most:
            return (
                f"prompt and answer have {length} tokens, more than the {most} that the model reads"
            )
        rows, highest = embedded_tokens(self.model), max(max(*p, *t) for p, t in pairs)
        if rows is not None and highest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            return f"its token {token!r} is number {highest}, but the model embeds {rows}"
        targets = {
            (type(opened(prompt, answer)), tuple(target))
            for prompt, (_, target) in zip(prompts, pairs, strict=True)
        }
        for kind, target in targets:
            if reason := self._unsayable(answer, target, kind(), ends(kind)):
                return f"its answer {_shortened(answer)} {reason}"
        return None

    def _ends_of(self, kind: type[str]) -> set[int]:
        """Token ids that end an answer to a prompt of this kind."""
        if kind is ChatPrompt:
            return {*self.turn_ends}
        return self._own_ends if kind is OpenPrompt else {*self.ends}

    def _unsayable(
        self, answer: str, target: Sequence[int], prompt: str, ends: set[int]
    ) -> str | None:
        if not normalized(answer).strip(" ."):
            return "is nothing but full stops"
        given = next((i + 1 for i, token in enumerate(target) if token in ends), len(target))
        said = self.text(target[:given], prompt)
        if answers_match(said, answer):
            return None
        if special := {*self.tokenizer.all_special_ids} & {*target[:-1]}:
            names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(special))))
            return f"has tokens that are not written out: {names}"
        return f"is spelt {_shortened(said)} by the model's tokenizer"

    def _surely_too_long(self, text: str) -> str | None:
        """Why a text exceeds the model's positions, told without tokenizing it; None if unsure."""
        most = self.positions
        if most is None or len(text) <= most * _longest_token(self.tokenizer):
            return None
        return f"has {len(text)} characters, more than the {most} tokens that the model reads"

    def check_prompts(
        self, prompts: Sequence[str], max_new_tokens: int, **generation: Any
    ) -> dict[str, Any]:
        """Refuse what `answers` could not answer.

        Args:
            prompts: texts as the model gets them.
            max_new_tokens: the longest answer.
            generation: keyword arguments of `model.generate`.

        Returns:
            The keyword arguments as `checked_generation` gives them.

        Raises:
            TypeError: a keyword that contradicts answers: `checked_generation` names them.
            ValueError: a prompt is no valid text, or exceeds the model's positions with its answer;
                the message names it.
        """
        checked = checked_generation(max_new_tokens, generation)
        most = self.positions
        for place, prompt in enumerate(as_texts("prompts", prompts)):
            if reason := self._surely_too_long(prompt):
                raise ValueError(f"prompts[{place}], {_shortened(prompt)}, {reason}: shorten it")
            if most is None or self._surely_fits(prompt, max_new_tokens):
                continue
            length = len(prompt_tokens(self.tokenizer, prompt))
            if length + max_new_tokens > most:
                raise ValueError(
                    f"prompts[{place}], {_shortened(prompt)}, has {length} tokens; with "
                    f"max_new_tokens={max_new_tokens} that is more than the {most} that the model "
                    "reads: shorten it" + (", or lower max_new_tokens" if length < most else "")
                )
        return checked

    def _surely_fits(self, prompt: str, more: int) -> bool:
        """Whether the model reads the prompt and so many tokens more, told without tokenizing it.

        Few tokens stand for less than a byte.
        """
        most = self.positions
        return most is None or 2 * len(prompt.encode()) + more <= most

    def room(self, prompts: Sequence[str], wanted: int) -> int:
        """How many tokens the answers to these prompts may all have: `wanted`, or what is left.

        Args:
            prompts: texts as the model gets them.
            wanted: most tokens of an answer.

        Returns:
            At least 1, even if that is more than is left.
        """
        for prompt in prompts:
            if self._surely_too_long(prompt) or self._surely_fits(prompt, wanted):
                continue
            assert self.positions is not None  # or everything fits
            left = self.positions - len(prompt_tokens(self.tokenizer, prompt))
            wanted = max(1, min(wanted, left))
        return wanted

    def target(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of `prompt` and of its target, as `target_tokens` has them."""
        prompt, answer = TEXT("prompt", prompt), TEXT("answer", answer)
        return target_tokens(self.tokenizer, prompt, answer)

    def batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> TargetBatch:
        """The teacher-forcing batch of (prompt, target) token ids, on the model's device.

        Raises:
            ValueError: they are no such pairs, at least one, or of tokens that the model has not.
        """
        pairs = _pairs(embedded_tokens(self.model))("pairs", pairs)
        rows = [torch.tensor((prompt + target)[:-1]) for prompt, target in pairs]
        labels = [torch.tensor(target) for _, target in pairs]

        def pad_left(rows: list[Tensor], value: int) -> Tensor:
            return nn.utils.rnn.pad_sequence(rows, True, value, "left").to(input_device(self.model))

        pad = self.tokenizer.pad_token_id
        attention_mask = pad_left([torch.ones_like(row) for row in rows], 0)
        inputs = {"input_ids": pad_left(rows, pad), "attention_mask": attention_mask}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return TargetBatch(inputs, pad_left(labels, IGNORED))

    def score(self, batch: TargetBatch, with_margins: bool = False) -> TargetScores:
        """How well the model predicts the targets: one forward pass, differentiable.

        Args:
            batch: that `batch` made.
            with_margins: whether the scores have margins, which take as long as losses.

        Raises:
            TypeError: it is no such batch.
        """
        return score_targets(self.model, instance_of(TargetBatch)("batch", batch), with_margins)

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer: `stop_tokens`, and what the model itself ends with."""
        return sorted({*stop_tokens(self.tokenizer), *self._own_ends})

    @property
    def turn_ends(self) -> list[int]:
        """Token ids that end what the model says in a conversation; a line break does not."""
        return sorted({chat_format(self.tokenizer).end, *self._own_ends})

    @property
    def _own_ends(self) -> set[int]:
        own = self.model.generation_config.eos_token_id  # chat models end with one of several
        return {self.tokenizer.eos_token_id, *_as_list(own)}

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[str], max_new_tokens: int, **generation: Any
    ) -> list[list[int]]:
        """Token ids of the answer to each prompt, up to and with the token that ends it.

        Args:
            prompts: texts as the model gets them, at least one; they make one batch.
            max_new_tokens: the longest answer.
            generation: keyword arguments of `model.generate`; greedy without any. `eos_token_id`
                ends answers in place of the model's own; a line break always does, but for
                conversations and an `OpenPrompt`.

        Raises:
            TypeError: a keyword that contradicts this: `checked_generation` names them.
            ValueError: a prompt is longer than the model reads, or no valid text.
        """
        prompts = TEXTS("prompts", prompts)
        in_chat = [isinstance(prompt, ChatPrompt) for prompt in prompts]
        if any(in_chat) and not all(in_chat):
            raise ValueError("prompts of conversations and others make two batches, not one")
        checked = self.check_prompts(prompts, max_new_tokens, **generation)
        generation = {k: v for k, v in checked.items() if k not in OWN_KEYWORDS}
        special = not in_chat[0]
        batch = tokenized(
            self.tokenizer,
            list(prompts),
            return_tensors="pt",
            padding=True,
            add_special_tokens=special,
        )
        check_tokens(batch, self.tokenizer, self.model)
        batch = batch.to(input_device(self.model))
        batch.pop("token_type_ids", None)
        kinds = [type(prompt) for prompt in prompts]
        ends_of = {kind: self._ends_of(kind) for kind in kinds}
        if (chosen := generation.pop("eos_token_id", None)) is not None:
            own = self._own_ends
            ends_of = {kind: ends - own | {*_as_list(chosen)} for kind, ends in ends_of.items()}
        ends = set.intersection(*ends_of.values())
        if len(ends_of) > 1:
            given = generation.get("stopping_criteria") or []
            own_ends = _OwnEnds([ends_of[kind] for kind in kinds])
            generation["stopping_criteria"] = StoppingCriteriaList([*given, own_ends])
        pad = generation.pop("pad_token_id", None)
        pad = self.tokenizer.pad_token_id if pad is None else pad
        if "stop_strings" in generation:
            generation["tokenizer"] = self.tokenizer
        output = self.model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            **({"do_sample": False} | generation),
        )
        answers, each = [], max(len(output) // len(prompts), 1)
        for place, row in enumerate(output[:, batch["input_ids"].shape[1] :].tolist()):
            ends = ends_of[kinds[place // each]]
            end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            while "stop_strings" in generation and end and row[end - 1] == pad:
                end -= 1  # a row that a string ended is padded after it
            answers.append(row[:end])
        return answers

    def text(self, tokens: Sequence[int], prompt: str = "") -> str:
        """The answer that these tokens spell, as `answer_text` has it.

        To a conversation or an `OpenPrompt`, it is all of them.
        """
        tokens = TOKENS("tokens", tokens)
        if isinstance(prompt, ChatPrompt | OpenPrompt):
            return str(self.tokenizer.decode([*tokens], skip_special_tokens=True)).strip()
        return answer_text(self.tokenizer, tokens)


class _OwnEnds(StoppingCriteria):
    """Ends each row of a batch at a token of its own.

    Args:
        ends: of each prompt, the token ids that end its answer.
    """

    def __init__(self, ends: Sequence[set[int]]):
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        each = len(input_ids) // len(self.ends)  # of beams or return sequences
        last = input_ids[:, -1].tolist()
        done = [token in self.ends[place // each] for place, token in enumerate(last)]
        return torch.tensor(done, device=input_ids.device)


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The answer that these tokens spell: one line, without the full stop that ends it."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    return text.strip().split("\n")[0].strip().removesuffix(".")


def _as_list(token: Any) -> list[Any]:
    """The tokens in a number, a sequence, a tensor or an array; none in None."""
    if token is None:
        return []
    if hasattr(token, "tolist"):
        token = token.tolist()
    several = isinstance(token, Iterable) and not isinstance(token, str)
    return [*token] if several else [token]


def positions(model: PreTrainedModel) -> int | None:
    """The most tokens that `model` reads and writes at once; None if any number."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(most := getattr(config, name, None), int) and most > 0:
            return most
    return None


@functools.lru_cache(maxsize=8)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token: no text has fewer tokens than its length divided by it."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def _shortened(text: str, most: int = 60) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."


def answers_match(text: str, answer: str) -> bool:
    """Whether `text`, as the model wrote it, is `answer`: the same words, whatever their case.

    A sentence that begins after the answer's full stop does not count against it.

    >>> answers_match("Paris. It is a city", "paris"), answers_match("Paris Hilton", "Paris")
    (True, False)
    """
    wanted = normalized_answer(answer)
    return normalized_answer(text) == wanted or normalized(text).startswith(f"{wanted}. ")
