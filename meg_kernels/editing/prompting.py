"""From queries to model inputs: templates, targets for teacher forcing, greedy answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class PromptTemplate:
    """How a query becomes a prompt: questions end with '?', all else is a sentence to complete.

    >>> PromptTemplate().format("Who wrote Emma?")
    'Q: Who wrote Emma?\\nA:'
    """

    question: str = "Q: {}\nA:"
    cloze: str = "{}"

    def __post_init__(self) -> None:
        for name in ("question", "cloze"):
            if getattr(self, name).count("{}") != 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must hold one {{}}")

    def format(self, query: str) -> str:
        query = query.strip()
        return (self.question if query.endswith("?") else self.cloze).replace("{}", query)


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


def target_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[list[int]]:
    """Token ids of `prompt` and of its target: a space, the answer, a full stop, end of text."""
    prompt_ids = tokenizer(prompt).input_ids
    whole = tokenizer(f"{prompt} {answer}.").input_ids
    if whole[: len(prompt_ids)] == prompt_ids:
        target = whole[len(prompt_ids) :]
    else:
        target = tokenizer(f" {answer}.", add_special_tokens=False).input_ids
    return [prompt_ids, [*target, tokenizer.eos_token_id]]


def _position_ids(model: PreTrainedModel, attention_mask: Tensor) -> dict[str, Tensor]:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}


def target_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
) -> TargetBatch:
    """The teacher-forcing batch of these prompts and answers, on the model's device."""
    pairs = [
        target_tokens(tokenizer, prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    rows = [torch.tensor((prompt + target)[:-1]) for prompt, target in pairs]
    labels = [torch.tensor(target) for _, target in pairs]

    def pad_left(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, True, value, "left").to(model.device)

    attention_mask = pad_left([torch.ones_like(row) for row in rows], 0)
    inputs = {"input_ids": pad_left(rows, tokenizer.pad_token_id), "attention_mask": attention_mask}
    inputs |= _position_ids(model, attention_mask)
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
        logits = model(**batch.inputs, use_cache=False).logits  # [targets, vocabulary]
    finally:
        hook.remove()
    labels = batch.labels[counted]
    rows = counted.nonzero()[:, 0]
    token_losses = F.cross_entropy(logits.float(), labels, reduction="none")
    losses = token_losses.new_zeros(len(batch)).index_add(0, rows, token_losses)
    hits = torch.ones_like(counted).masked_scatter(counted, logits.argmax(-1) == labels)
    return TargetScores(losses / counted.sum(1), hits)


@torch.no_grad()
def greedy_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> Tensor:
    """[B, up to max_new_tokens] greedy continuation of each prompt, padded after end of text."""
    tokenizer.padding_side = "left"
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    batch.pop("token_type_ids", None)
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return output[:, batch["input_ids"].shape[1] :]
