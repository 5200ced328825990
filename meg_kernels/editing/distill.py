"""Distillation: a DiT generator that samples in one to four steps what takes it some fifty.

Sampling starts from one shared noise vector and DDIM adds none: each condition has one trajectory.
The student, a copy of the teacher, learns to follow it in N steps. At each of its N timesteps one
DDIM step must lead from the teacher's state there to the teacher's state at the next,

    x_next = c x_t + d x_0,    which takes    x_0 = (x_next - c x_t) / d

(Salimans & Ho 2022, algorithm 2, without its halvings). The loss is the error of the x_0 that the
student implies, x_0 = a x_t + b prediction, since that is how an error appears in the weights. In
strong noise that the network predicts, |b| > 1 would blow that error up; there it is the error of
the prediction itself:

    loss = |x_0(student) - x_0|^2 / max(1, |b|)^2
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meg_kernels.checks import SEED, integer
from meg_kernels.diffusion import NeuronDiT, plan_steps, sample
from meg_kernels.editing.fit import Task, fit
from meg_kernels.editing.train import ConditionBatches
from meg_kernels.editing.trial import AnswersRight, Trial, distance
from meg_kernels.familiarity import Rewording
from meg_kernels.neuron import Neurons
from meg_kernels.routing.generators import DiTGenerator, Generator, NetworkGenerator

MOST_STEPS = 4  # of a student; with more, d falls below 0.05
TEACHER_STEPS = 50
CLOSE = 0.02  # distance from the teacher's neurons at which a student has learnt enough
# A teacher must answer this share of what the generator answers as it is.
FIT_TO_TEACH = 0.9
USES = 10  # of a state: making a trajectory takes as many calls of the network as it has steps


@dataclass(frozen=True)
class Quality:
    """What a network achieves when it is sampled in a number of steps.

    Args:
        num_steps: steps of DDIM.
        answered: share of the edited queries that the model answers right.
        to_teacher: relative L2 distance of the standardised neurons from the teacher's; if the
            teacher's are smaller than a standard deviation, relative to that.
        to_collected: relative L2 distance of the standardised neurons from the collected ones,
            measured in that way too.
    """

    num_steps: int
    answered: float
    to_teacher: float
    to_collected: float


@dataclass(frozen=True)
class Distillation:
    """How a distillation went.

    Args:
        asked: number of edited queries that all of this was measured on.
        teacher: the network before distillation, in many steps.
        undistilled: the network before distillation, in the student's few steps.
        student: the distilled network, in its few steps.
        steps: optimisation steps taken.
        history: (step, loss, answered, to_teacher) at each trial, the loss being the mean since the
            trial before.
        seconds_before: the seconds of training before an interruption.
    """

    asked: int
    teacher: Quality
    undistilled: Quality
    student: Quality
    steps: int
    history: tuple[tuple[int, float, float, float], ...] = ()
    seconds_before: float = field(default=0.0, compare=False)


def distill(
    generator: Generator,
    conditions: Tensor,
    neurons: Neurons,
    answers_right: AnswersRight,
    steps: int,
    *,
    rewording: Rewording | None = None,
    teacher_steps: int | None = None,
    seed: int | None = None,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> tuple[DiTGenerator, Distillation]:
    """Make a generator that samples in a few DDIM steps what `generator` samples in many.

    It is trained until it answers as many edited queries as the teacher, with neurons close to
    the teacher's, or until the steps are taken that the configuration allows. The teacher, too, is
    sampled with DDIM, whatever its own solver: a variance that it learnt has no part in it.

    Args:
        generator: the teacher, a trained DiT; it stays as it is.
        conditions: [N, condition_dim] float32 of the edited queries, on the generator's device.
        neurons: the N neurons collected under them, which the result is compared with.
        answers_right: tries neurons on the model.
        steps: sampling steps of the student, 1 to 4.
        rewording: makes conditions of other wordings; None: noise takes their place.
        teacher_steps: sampling steps of the teacher, a multiple of `steps`; None: the multiple
            closest to 50.
        seed: of batches and noise; None: that of the generator's configuration.
        work_folder: keeps a checkpoint, from which an interrupted distillation of the same data and
            configuration resumes; None: nothing is kept.
        progress: show a progress bar.

    Returns:
        The student, and how its distillation went.

    Raises:
        ValueError: the generator is no DiT, a number of steps is out of range, or the generator
            answers too little in `teacher_steps` to teach.
        FloatingPointError: the loss became infinite or NaN.
    """
    if not isinstance(generator, DiTGenerator):
        raise ValueError(
            f"the generator is of kind {generator.config.kind!r}; only a dit can be distilled: "
            "mlp and bank already take one step"
        )
    steps = integer(1, MOST_STEPS)("steps", steps)
    seed = SEED.or_none()("seed", seed)
    if teacher_steps is None:
        teacher_steps = round(TEACHER_STEPS / steps) * steps
    teacher_steps = integer(1)("teacher_steps", teacher_steps)
    most = generator.noise_schedule.num_timesteps
    if teacher_steps % steps or not steps < teacher_steps <= most:
        raise ValueError(
            f"teacher_steps is {teacher_steps}; it must be a multiple of steps, {steps}, greater "
            f"than it and at most {most}"
        )
    teacher = _sampled_in(teacher_steps, generator)
    student = copy.deepcopy(_sampled_in(steps, generator))
    if seed is not None:
        student.config = student.config.with_training(seed=seed)

    trial = Trial.of(conditions, answers_right, student.config.training.seed)
    expected = generator.scaled_weights(trial.generate(teacher))
    collected = generator.scaled_weights(neurons.to(conditions.device)[trial.rows])

    def quality(candidate: DiTGenerator) -> Quality:
        made = trial.generate(candidate)
        weights = generator.scaled_weights(made)
        return Quality(
            candidate.config.sampler.num_steps,
            trial.answered(made),
            distance(weights, expected),
            distance(weights, collected),
        )

    taught = quality(teacher)
    _check_fit_to_teach(taught, generator, trial)
    undistilled = quality(student)

    def tried(candidate: NetworkGenerator) -> tuple[float, float]:
        assert isinstance(candidate, DiTGenerator)  # as the student is
        measured = quality(candidate)
        return measured.answered, measured.to_teacher

    def as_good(answered: float, to_teacher: float) -> bool:
        return answered >= taught.answered and to_teacher <= CLOSE

    if as_good(undistilled.answered, undistilled.to_teacher):
        return student, Distillation(len(trial.rows), taught, undistilled, undistilled, 0)
    batches = ConditionBatches(generator, conditions, rewording)
    task = Task(
        "distilling generator",
        _TrajectoryBatches(teacher, student, batches).loss,
        tried,
        done=lambda history: as_good(*history[-1][2:]),
        identity=(teacher_steps, *batches.identity, *teacher.parameters()),
        max_steps=student.config.training.steps_for(len(conditions)),
    )
    fitted = fit(student, task, work_folder=work_folder, progress=progress)
    report = Distillation(
        len(trial.rows),
        taught,
        undistilled,
        quality(student),
        fitted.history[-1][0],
        fitted.history,
        fitted.seconds_before,
    )
    return student, report


def _sampled_in(num_steps: int, generator: DiTGenerator) -> DiTGenerator:
    """The generator, its network shared, that samples in this number of DDIM steps."""
    config = generator.config
    sampler = dataclasses.replace(
        config.sampler, solver="ddim", num_steps=num_steps, spacing="trailing"
    )
    other = copy.copy(generator)
    other.config = dataclasses.replace(config, sampler=sampler)
    return other


def _check_fit_to_teach(teacher: Quality, generator: DiTGenerator, trial: Trial) -> None:
    own = generator.config.sampler
    answered = trial.answered(trial.generate(generator))
    if teacher.answered < FIT_TO_TEACH * answered:
        raise ValueError(
            f"in teacher_steps = {teacher.num_steps} the generator answers "
            f"{teacher.answered:.1%} of the edited queries, but {answered:.1%} with its own "
            f"{own.num_steps} steps of {own.solver}; one that was distilled already can only teach "
            "in its own number of steps"
        )


class _TrajectoryBatches:
    """What the student learns from: the teacher's trajectories, made anew after every trial.

    Args:
        teacher: makes them; stays as it is.
        student: learns to follow them in its own number of steps.
        conditions: draws the conditions that they are sampled under.
    """

    def __init__(self, teacher: DiTGenerator, student: DiTGenerator, conditions: ConditionBatches):
        self.teacher, self.student, self.conditions = teacher, student, conditions
        self.schedule, self.prediction = teacher.noise_schedule, teacher.network.prediction
        timesteps = self.schedule.timesteps(student.config.sampler.num_steps)
        self.steps = plan_steps("ddim", self.schedule, timesteps, self.prediction)
        self.pool: tuple[Tensor, ...] = ()

    def loss(self, step: int, rng: torch.Generator) -> Tensor:
        """The loss of the student as it is at this step."""
        config = self.student.config.training
        if step % config.check_every == 0:  # where checkpoints are: resumed runs do so too
            self.pool = self._make(rng)
        rows = torch.randperm(len(self.pool[0]), generator=rng)[: config.batch_size]
        condition, x_t, t, x0, weight = (part[rows.to(part.device)] for part in self.pool)
        prediction = self.student.network(x_t, t, condition).float()
        implied = self.schedule.to_x0(prediction, self.prediction, x_t, t)
        return (weight * (implied - x0)).square().mean()

    def _make(self, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Conditions [P, c], states [P, dim], timesteps [P], x_0 [P, dim] and weights [P, 1]."""
        config = self.student.config.training
        made = []
        for _ in range(math.ceil(config.check_every / (USES * len(self.steps)))):
            _, conditions = self.conditions.draw(rng)
            states = self._states(conditions)
            for step, (x_t, x_next) in zip(self.steps, pairwise(states), strict=True):
                x0 = (x_next - step.update.sample * x_t) / step.update.x0
                t = torch.full((len(x_t),), step.timestep, device=x_t.device)
                weight = torch.full_like(x_t[:, :1], 1 / max(1, abs(step.x0_from_prediction)))
                made.append((conditions, x_t, t, x0, weight))
        return tuple(torch.cat(parts) for parts in zip(*made, strict=True))

    def _states(self, conditions: Tensor) -> list[Tensor]:
        """The teacher's states at the student's N timesteps and its result, N + 1 of [B, dim]."""
        watched: Any = _Watched(self.teacher.network)
        dim, sampler = self.teacher.layout.dim, self.teacher.config.sampler
        result = sample(watched, conditions, dim, self.schedule, sampler)
        return [*watched.states[:: sampler.num_steps // len(self.steps)], result]


class _Watched:
    """A denoiser that keeps the states that it is asked about."""

    learns_variance = False  # DDIM has no use for it

    def __init__(self, network: NeuronDiT):
        self.network, self.prediction = network, network.prediction
        self.training = network.training
        self.states: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.states.append(x_t)
        return self.network(x_t, t, condition)
