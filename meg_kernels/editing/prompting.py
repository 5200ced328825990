"""From queries to model inputs: templates, targets for teacher forcing, greedy answers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.nn import input_device, last_feed_forward_sees

IGNORED = -100


@dataclass(frozen=True)
class PromptTemplate:
    """How a query, a question or the beginning of a sentence, becomes a prompt.

    One template for both kinds, as in the paper: a neuron fitted on one wording then works for the
    others as well, since all prompts end alike.

    >>> PromptTemplate().format("Who wrote Emma?")
    'Q: Who wrote Emma?\\nA:'
    """

    text: str = "Q: {}\nA:"

    def __post_init__(self) -> None:
        if self.text.count("{}") != 1:
            raise ValueError(f"the template is {self.text!r}; it must hold one {{}}")

    def format(self, query: str) -> str:
        return self.text.replace("{}", query.strip())

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> PromptTemplate:
        """The paper's template for the paper's models, by model_type; the default for others."""
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
    """Token ids of `prompt` and of its target: a space, the answer, a full stop, end of text."""
    prompt_ids = tokenizer(prompt).input_ids
    whole = tokenizer(f"{prompt} {answer}.").input_ids
    if whole[: len(prompt_ids)] == prompt_ids:
        target = whole[len(prompt_ids) :]
    else:
        target = tokenizer(f" {answer}.", add_special_tokens=False).input_ids
    return prompt_ids, [*target, tokenizer.eos_token_id]


def target_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
) -> TargetBatch:
    """The teacher-forcing batch of (prompt, target) token ids, on the model's device."""
    rows = [torch.tensor((prompt + target)[:-1]) for prompt, target in pairs]
    labels = [torch.tensor(target) for _, target in pairs]

    def pad_left(rows: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, True, value, "left").to(input_device(model))

    attention_mask = pad_left([torch.ones_like(row) for row in rows], 0)
    inputs = {"input_ids": pad_left(rows, tokenizer.pad_token_id), "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return TargetBatch(inputs, pad_left(labels, IGNORED))


@dataclass(frozen=True)
class TargetScores:
    """How well a model predicts the targets of a batch.

    Args:
        losses: [B] mean cross-entropy of each row's target tokens, in nats.
        hits: [B, K] bool: the target tokens that the argmax gets right; True where ignored.
    """

    losses: Tensor
    hits: Tensor

    @property
    def right(self) -> Tensor:
        """[B] bool: every target token is the argmax: greedy decoding gives the answer."""
        return self.hits.all(1)


def score_targets(model: PreTrainedModel, batch: TargetBatch) -> TargetScores:
    """One forward pass of `model` over `batch`; differentiable where the model is."""
    counted = batch.labels != IGNORED  # [B, K]

    # The output layer costs as much as many decoder layers: it sees the targets' positions alone.
    def keep_targets(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][:, -counted.shape[1] :][counted],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_targets)
    try:
        with last_feed_forward_sees(model, columns=counted.shape[1]):
            logits = model(**batch.inputs, use_cache=False).logits  # [targets, vocabulary]
    finally:
        hook.remove()
    logits = logits.float()
    labels = batch.labels[counted]
    rows = counted.nonzero()[:, 0]
    token_losses = F.cross_entropy(logits, labels, reduction="none")
    losses = token_losses.new_zeros(len(batch)).index_add(0, rows, token_losses)
    hits = torch.ones_like(counted).masked_scatter(counted, logits.argmax(-1) == labels)
    return TargetScores(losses / counted.sum(1), hits)


@functools.lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: end of text, and every token with a line break in it."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    line_breaks = [i for i, text in enumerate(texts) if "\n" in text]
    return sorted({tokenizer.eos_token_id, *line_breaks})


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    **generation: Any,
) -> list[list[int]]:
    """Token ids of each prompt's answer, up to and with the token that ends it.

    Greedy unless `generation`, keyword arguments of `model.generate`, says otherwise.
    """
    tokenizer.padding_side = "left"
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(input_device(model))
    batch.pop("token_type_ids", None)
    own = model.generation_config.eos_token_id  # chat models end with one of several
    ends = sorted({*stop_tokens(tokenizer), *([own] if isinstance(own, int) else own or [])})
    output = model.generate(  # type: ignore[operator]
        **batch,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        **({"do_sample": False} | generation),
    )
    answers = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The answer that these tokens spell: one line, without the full stop that ends it."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    return text.strip().split("\n")[0].strip().removesuffix(".")


def answers_match(text: str, answer: str) -> bool:
    """Whether `text`, as the model wrote it, is `answer`: the same words, whatever their case.

    A sentence that begins after the answer's full stop does not count against it.

    >>> answers_match("Paris. It is a city", "paris"), answers_match("Paris Hilton", "Paris")
    (True, False)
    """
    said, wanted = (" ".join(words.split()).casefold() for words in (text, answer))
    wanted = wanted.removesuffix(".")
    return said.removesuffix(".") == wanted or said.startswith(f"{wanted}. ")
