"""Training a weight generator until its neurons answer right."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from meg_kernels.editing.fit import History, Task, fit
from meg_kernels.editing.trial import TRIED_AT_ONCE, AnswersRight, Trial, distance
from meg_kernels.familiarity import Rewording
from meg_kernels.neuron import Neurons
from meg_kernels.routing.edits import Training
from meg_kernels.routing.generators import Generator, NetworkGenerator, NeuronBank


def train_generator(
    generator: Generator,
    conditions: Tensor,
    neurons: Neurons,
    answers_right: AnswersRight,
    *,
    rewording: Rewording | None = None,
    keep_scales: bool = False,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> Training:
    """Train `generator`, in place, to give each condition its neuron; a `NeuronBank` stores them.

    Args:
        generator: of any kind; it is moved to the device of the conditions.
        conditions: [N, condition_dim] float32 of the edited queries.
        neurons: the N neurons collected under them.
        answers_right: tries neurons on the model.
        rewording: makes conditions of other wordings; None: noise takes their place.
        keep_scales: leave the generator's standardisation as it is, for further training.
        work_folder: keeps a checkpoint, from which an interrupted training of the same data and
            configuration resumes; None: nothing is kept.
        progress: show a progress bar.

    Raises:
        ValueError: there are no conditions, or another number of neurons than of conditions; a
            value is not finite; or the neurons are of another layout.
        FloatingPointError: the loss became infinite or NaN.
    """
    if not len(conditions) or len(conditions) != len(neurons):
        raise ValueError(f"{len(conditions)} conditions and {len(neurons)} neurons do not pair up")
    if not bool(neurons.is_finite().all() & conditions.isfinite().all()):
        raise ValueError("a condition or a neuron is not finite; collect it again")
    neurons = neurons.to(conditions.device)
    generator.to(conditions.device)
    if isinstance(generator, NeuronBank):
        generator.store(conditions, neurons)
        trial = Trial.of(conditions, answers_right, seed=0)
        return Training(0, trial.answered(trial.generate(generator)))
    assert isinstance(generator, NetworkGenerator)

    config = generator.config.training
    if not keep_scales:
        generator.standardize(conditions, neurons)
    trial = Trial.of(conditions, answers_right, config.seed)
    # Facts that even their collected neuron does not answer are nobody's to reach.
    enough = config.enough * trial.answered(neurons[trial.rows])
    wanted = generator.scaled_weights(neurons[trial.rows])
    targets = generator.scaled_weights(neurons)
    batches = ConditionBatches(generator, conditions, rewording)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows, inputs = batches.draw(rng)
        return generator.loss(inputs, targets[rows], rng)

    def tried(candidate: NetworkGenerator) -> tuple[float, float]:
        made = trial.generate(candidate)
        return trial.answered(made, enough), distance(candidate.scaled_weights(made), wanted)

    task = Task(
        "training generator",
        loss,
        tried,
        done=functools.partial(_trained_enough, enough, config.close),
        identity=(*batches.identity, targets),
        max_steps=config.steps_for(len(targets)),
    )
    fitted = fit(generator, task, work_folder=work_folder, progress=progress)
    step, _, answered, _ = fitted.history[-1]
    if answered < enough and len(trial.rows) > TRIED_AT_ONCE:  # of the first ones; now of all
        answered = trial.answered(trial.generate(generator))
    return Training(step, answered, fitted.history, fitted.seconds, fitted.seconds_before)


def _trained_enough(enough: float, close: float, history: History) -> bool:
    """Whether enough queries are answered, and the neurons are close or time is up.

    Training goes on after the answers are right: neurons closer to the collected ones survive fewer
    sampling steps and other wordings.
    """
    step, _, answered, off = history[-1]
    first = next((step for step, _, answered, _ in history if answered >= enough), math.inf)
    return answered >= enough and (off <= close or step >= 2 * first)


@dataclass(frozen=True)
class ConditionBatches:
    """Draws the batches that a generator is trained on; half of their conditions are a little off.

    Args:
        generator: its configuration says how large batches and noise are, and its scales
            standardise the conditions.
        conditions: [N, condition_dim] of the edited queries.
        rewording: makes conditions of other wordings; None: noise makes them.
    """

    generator: NetworkGenerator
    conditions: Tensor
    rewording: Rewording | None

    def draw(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows [B] int64 of a batch, and its standardised conditions [B, condition_dim]."""
        config, z = self.generator.config.training, self.conditions
        rows = torch.randperm(len(z), generator=rng)[: config.batch_size].to(z.device)
        z = z[rows]
        if self.rewording is not None:
            z[1::2] = self.rewording(z[1::2], rng)
        inputs = self.generator.scaled_conditions(z)
        if self.rewording is None:
            noise = torch.randn(inputs[1::2].shape, generator=rng).to(z.device)
            inputs[1::2] += config.condition_noise * noise
        return rows, inputs

    @property
    def identity(self) -> tuple[Tensor, ...]:
        """Tensors that tell these batches from others."""
        others = self.rewording
        wordings = () if others is None else (others.queries, others.paraphrases)
        return self.generator.scaled_conditions(self.conditions), *wordings
