"""Several edited questions in one message: each is asked by itself, one answer follows the other.

A neuron answers one question. Asked for two at once, with a neuron for the words of each, a model
hardly ever says both answers (docs/results/quality.md), so that a message is taken apart instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meg_kernels.conversation import Prompt
from meg_kernels.pretrained import tokenized
from meg_kernels.routing.router import Routing

BETWEEN = "\n"  # two answers


def asked_apart(
    prompts: Sequence[Prompt], routing: Routing
) -> tuple[list[Prompt], Routing, list[int]]:
    """The prompts with one for each question of those that ask several edited ones.

    Args:
        prompts: texts and conversations.
        routing: of them.

    Returns:
        N prompts, their routing, and the number of the given prompt that each is of, in order.
    """
    apart, owners = routing.each_question()
    parts = [
        _with_last(prompts[row], span.text) if row in routing.several else prompts[row]
        for row, span in zip(owners, apart.spans, strict=True)
    ]
    return parts, apart, owners


def _with_last(prompt: Prompt, said: str) -> Prompt:
    """The prompt with something else that is said last."""
    return said if isinstance(prompt, str) else [*prompt[:-1], {"role": "user", "content": said}]


def joined(answers: Sequence[Sequence[str]], owners: Sequence[int]) -> list[list[str]]:
    r"""The answers to each prompt, of those to its questions.

    Args:
        answers: to each of N questions, one or more.
        owners: [N] the number of the prompt that each question is of, in order.

    >>> joined([["Paris"], ["Emma", "Lady Susan"], ["1815", "1871"]], [0, 1, 1])
    [['Paris'], ['Emma\n1815', 'Lady Susan\n1871']]
    """
    found: dict[int, list[Sequence[str]]] = {}
    for owner, several in zip(owners, answers, strict=True):
        found.setdefault(owner, []).append(several)
    return [[BETWEEN.join(texts) for texts in zip(*each, strict=True)] for each in found.values()]


class OneStream:
    """A streamer of several answers, which ends with the last of them.

    Args:
        streamer: takes what is said: transformers' own, or any with put and end.
        tokenizer: of the model.
    """

    def __init__(self, streamer: Any, tokenizer: Any):
        self._streamer, self._tokenizer = streamer, tokenizer
        self._answers = self._puts = 0

    def put(self, value: Tensor) -> None:
        """Pass tokens on; what comes first is a prompt, and only that of the first answer is."""
        self._puts += 1
        if self._puts == 1 and self._answers:
            ids = tokenized(self._tokenizer, BETWEEN, add_special_tokens=False).input_ids
            value = torch.tensor(ids)
        self._streamer.put(value)

    def end(self) -> None:
        """One answer ends."""
        self._answers, self._puts = self._answers + 1, 0

    def close(self) -> None:
        """There are no more answers."""
        self._streamer.end()
