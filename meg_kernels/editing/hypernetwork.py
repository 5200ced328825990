"""A hypernetwork: from what a fact says to the neuron that makes a model answer it.

The neuron of a fact is a smooth function of its query and its answer. What `Hypernetwork` learns
from facts whose neurons were fitted it tells of others, and most of those need no step of SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.facts import Fact
from meg_kernels.nn import input_device
from meg_kernels.text_encoder import TextEncoder

RIDGE = 300.0  # of the regression; half or twice as much makes no difference


@torch.no_grad()
def said_by(
    prompted: PromptedModel,
    encoder: TextEncoder,
    facts: Sequence[Fact],
    answers: Sequence[Sequence[int]],
    conditions: Tensor | None = None,
) -> Tensor:
    """What facts say, as numbers of about unit size, [N, features] float32 on the CPU.

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
    query = _of_unit_size(conditions.float().cpu())
    answer = _of_unit_size(encoder.encode([fact.answer for fact in facts]).float().cpu())
    embed: Any = prompted.model.get_input_embeddings()
    device = input_device(prompted.model)
    tokens = [embed(torch.tensor([*ids], device=device)).float().cpu() for ids in answers]
    first = _of_unit_size(torch.stack([each[0] for each in tokens]))
    mean = _of_unit_size(torch.stack([each.mean(0) for each in tokens]))
    return torch.cat([query, answer, first, mean], 1)


def _of_unit_size(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1) * rows.shape[1] ** 0.5


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
            ridge: how much large weights cost, positive.

        Raises:
            ValueError: there are no facts, or not as many neurons.
        """
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
