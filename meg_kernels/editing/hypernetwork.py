"""A hypernetwork: from what a fact says to the neuron that makes a model answer it.

The neuron of a fact is a smooth function of its query and its answer. What `Hypernetwork` learns
from facts whose neurons are known it tells of others; many of those need no step of SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meg_kernels.checks import number
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.facts import Fact
from meg_kernels.nn import input_device
from meg_kernels.text_encoder import TextEncoder

RIDGE = 300.0  # of the regression; in SmolLM2 a third of it makes no difference
# Squared lengths of the parts of what a fact says, whatever their widths: the query, the answer,
# its first token, and all of them.
PARTS = (384.0, 384.0, 576.0, 576.0)


@torch.no_grad()
def said_by(
    prompted: PromptedModel,
    encoder: TextEncoder,
    facts: Sequence[Fact],
    answers: Sequence[Sequence[int]],
    conditions: Tensor | None = None,
) -> Tensor:
    """What facts say, [N, features] float32 on the CPU: four parts, each of a length of its own.

    These are the text encoder's vectors of the query and of the answer, and the language model's
    embeddings of the answer's tokens: of the first one, and of all in the mean.

    Args:
        prompted: the language model.
        encoder: makes vectors of texts.
        facts: N facts.
        answers: their answers' token ids.
        conditions: [N, dim] the encoder's vectors of the queries, if they are known.
    """
    if conditions is None:
        conditions = encoder.encode([fact.query for fact in facts])
    answer = encoder.encode([fact.answer for fact in facts])
    embed: Any = prompted.model.get_input_embeddings()
    device = input_device(prompted.model)
    first, mean = [], []
    for ids in answers:
        tokens = embed(torch.tensor([*ids], device=device)).float()
        first.append(tokens[0])
        mean.append(tokens.mean(0))
    parts = (conditions, answer, torch.stack(first), torch.stack(mean))
    scaled = [
        F.normalize(part.float().cpu(), dim=1) * square**0.5
        for part, square in zip(parts, PARTS, strict=True)
    ]
    return torch.cat(scaled, 1)


@dataclass(frozen=True)
class Hypernetwork:
    """Ridge regression, in closed form, from what facts say to their neurons.

    Args:
        said_mean: [features] of the facts that it learnt from.
        neuron_mean: [dim] of their neurons, laid flat.
        weight: [features, dim].
    """

    said_mean: Tensor
    neuron_mean: Tensor
    weight: Tensor

    @classmethod
    def fitted(cls, said: Tensor, neurons: Tensor, ridge: float = RIDGE) -> Hypernetwork:
        """Learn from N facts.

        Args:
            said: [N, features] what they say.
            neurons: [N, dim] their neurons, laid flat.
            ridge: the L2 penalty, positive.

        Raises:
            ValueError: there are no facts, not as many neurons, or a penalty out of range.
        """
        ridge = number(above=0)("ridge", ridge)
        if not len(said) or len(said) != len(neurons):
            raise ValueError(f"{len(said)} facts and {len(neurons)} neurons do not pair up")
        x, y = said.double(), neurons.double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        if len(x) <= x.shape[1]:  # of the two equal forms, the one with fewer unknowns
            weight = x.T @ _solved(x @ x.T, y, ridge)
        else:
            weight = _solved(x.T @ x, x.T @ y, ridge)
        return cls(x_mean.float(), y_mean.float(), weight.float())

    def __call__(self, said: Tensor) -> Tensor:
        """The neurons, laid flat [N, dim], of facts that say [N, features]."""
        return (said - self.said_mean) @ self.weight + self.neuron_mean


def _solved(square: Tensor, right: Tensor, ridge: float) -> Tensor:
    square.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(square))
