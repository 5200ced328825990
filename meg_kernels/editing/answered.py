"""Whether the language model answers facts with given neurons."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meg_kernels.editing.prompting import PromptedModel, TargetBatch
from meg_kernels.facts import Fact
from meg_kernels.neuron import Neurons
from meg_kernels.nn import Attached, LowerLayers


def answers_with(
    prompted: PromptedModel, attached: Attached, facts: Sequence[Fact], batch_size: int
) -> Callable[[Neurons, Tensor], Tensor]:
    """A function that tries neurons on the model, whose layers below them run once.

    Args:
        prompted: the language model.
        attached: where in it the neurons sit.
        facts: what can be asked.
        batch_size: facts that are asked at once.

    Returns:
        A function of B neurons and of the rows [B] of the facts that they belong to. It says,
        [B] bool, whether greedy decoding gives each fact's answer to its query.
    """
    lower = LowerLayers(prompted.model, attached.layer)

    @functools.cache
    def prepared(rows: tuple[int, ...]) -> tuple[TargetBatch, Tensor]:
        asked = [facts[row] for row in rows]
        batch = prompted.batch(
            [prompted.target(prompted.prompt(fact.query), fact.answer) for fact in asked]
        )
        return batch, lower.run(**batch.inputs)

    @torch.no_grad()
    def answers(neurons: Neurons, rows: Tensor) -> Tensor:
        right = []
        for start in range(0, len(rows), batch_size):
            batch, hidden = prepared(tuple(rows[start : start + batch_size].tolist()))
            mounted = attached.neurons(neurons[start : start + batch_size])
            with lower.replaced_by(hidden), mounted:
                right.append(prompted.score(batch).right)
        return torch.cat(right)

    return answers
