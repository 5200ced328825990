"""Trial runs: whether the model answers right with a generator's neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meg_kernels.neuron import Neurons
from meg_kernels.routing.generators import Generator

AnswersRight = Callable[[Neurons, Tensor], Tensor]
"""Called with B neurons and rows [B] int64: whether the model answers the facts of these rows
right with them, [B] bool."""

MOST_TRIED = 256  # edited queries
TRIED_AT_ONCE = 64  # of them


@dataclass(frozen=True)
class Trial:
    """Tries generators on edited queries, on all of them or on a sample.

    Args:
        conditions: [L, condition_dim] of the queries that are tried.
        rows: [L] int64, the facts that they belong to.
        answers_right: tries neurons on the model.
    """

    conditions: Tensor
    rows: Tensor
    answers_right: AnswersRight

    @classmethod
    def of(cls, conditions: Tensor, answers_right: AnswersRight, seed: int) -> Trial:
        """A trial on at most 256 of the edited queries.

        Args:
            conditions: [N, condition_dim] of all edited queries.
            answers_right: tries neurons on the model.
            seed: of the sample, and of the order in which its queries are tried.
        """
        rows = sample_rows(len(conditions), seed).to(conditions.device)
        return cls(conditions[rows], rows, answers_right)

    def generate(self, candidate: Generator) -> Neurons:
        """The candidate's L neurons; it is in eval mode afterwards."""
        return candidate.eval().generate(self.conditions)

    def answered(self, neurons: Neurons, enough: float = 0.0) -> float:
        """The share of the queries that the model answers right with these neurons.

        Args:
            neurons: one for each of the L queries.
            enough: a share; as soon as it is out of reach, the remaining queries are not tried.
        """
        right, tried, every = 0, 0, len(self.rows)
        for some in torch.arange(every, device=self.rows.device).split(TRIED_AT_ONCE):
            right += int(self.answers_right(neurons[some], self.rows[some]).sum())
            tried += len(some)
            if (every - (tried - right)) / every < enough:
                break
        return right / tried


def distance(weights: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance of standardised neurons [L, dim] from the wanted ones [L, dim].

    If the wanted ones are smaller than a standard deviation, it is relative to that.
    """
    # Neurons that are all alike, such as a single one, are zero when standardised.
    return ((weights - wanted).norm() / max(wanted.norm().item(), wanted.numel() ** 0.5)).item()


def sample_rows(n: int, seed: int) -> Tensor:
    """The rows that a trial tries, in random order: at most 256 of n, [L] int64."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:MOST_TRIED]
