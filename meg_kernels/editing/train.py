"""Training a weight generator until its neurons answer right.

What counts is whether the model answers with a generated neuron, not the loss: the weights of the
averaged (EMA) network are tried on the edited queries now and then, and training stops when enough
of them are answered. A checkpoint after each look makes it resumable.

`fit` is the loop itself, for any loss: distillation runs in it too.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from meg_kernels.editing.generators import Generator, NeuronBank
from meg_kernels.familiarity import Rewording
from meg_kernels.neuron import Neurons
from meg_kernels.precision import fast_products
from meg_kernels.storage import CorruptFileError, fingerprint, read_tensors, write_tensors

log = logging.getLogger(__name__)

Answers = Callable[[Neurons, Tensor], Tensor]
"""Whether the model answers facts [B] right with these B neurons: [B] bool."""

Looks = Sequence[tuple[Any, ...]]
"""For each look the step, the mean loss since the look before, and what the task saw."""

MOST_LOOKED_AT = 256
TRIED_AT_ONCE = 64  # of them


@dataclass(frozen=True)
class Training:
    """How a training went.

    Args:
        steps: optimisation steps taken.
        answered: share of edited queries answered right by generated neurons at the end.
        history: (step, loss, answered, distance) at each look, distance as `distance` says, and
            answered among the first queries only where these showed that it is not enough.
        seconds: from the start to each look, with those before an interruption.
        seconds_before: of them, those before the interruption.
    """

    steps: int
    answered: float
    history: tuple[tuple[int, float, float, float], ...] = ()
    seconds: tuple[float, ...] = field(default=(), compare=False)
    seconds_before: float = field(default=0.0, compare=False)


def train_generator(
    generator: Generator,
    conditions: Tensor,
    neurons: Neurons,
    answers: Answers,
    *,
    rewording: Rewording | None = None,
    keep_scales: bool = False,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> Training:
    """Train `generator`, in place, to give each condition its neuron.

    Args:
        generator: of any kind; a `NeuronBank` only stores.
        conditions: [N, condition_dim].
        neurons: the N neurons collected under them.
        answers: tries neurons on the model.
        rewording: makes conditions of other wordings; default: noise makes them.
        keep_scales: leave the generator's standardisation as it is, for further training.
        work_folder: keeps a checkpoint, from which an interrupted training of the same data and
            configuration resumes. Default: none.
        progress: show a progress bar.

    Raises:
        ValueError: no conditions, as many neurons as conditions are needed, or one is not finite.
        FloatingPointError: the loss became NaN.
    """
    if not len(conditions) or len(conditions) != len(neurons):
        raise ValueError(f"{len(conditions)} conditions and {len(neurons)} neurons do not pair up")
    if not bool(neurons.is_finite().all() & conditions.isfinite().all()):
        raise ValueError("a condition or a neuron is not finite; collect it again")
    config = generator.config
    device = conditions.device
    neurons = neurons.to(device)
    generator.to(device)
    if not keep_scales:
        generator.standardize(conditions, neurons)
    trial = Trial.of(conditions, answers, config.seed)
    # Facts that even their collected neuron does not answer are nobody's to reach.
    enough = config.enough * trial.answered(neurons[trial.rows])

    wanted = generator.scaled_weights(neurons[trial.rows])

    def look(candidate: Generator) -> tuple[float, float]:
        made = trial.generate(candidate)
        return trial.answered(made, enough), distance(candidate.scaled_weights(made), wanted)

    if isinstance(generator, NeuronBank):
        generator.store(conditions, neurons)
        return Training(0, trial.answered(trial.generate(generator)))

    targets = generator.scaled_weights(neurons)
    lessons = Conditions(generator, conditions, rewording)

    def loss(step: int, random: torch.Generator) -> Tensor:
        rows, inputs = lessons.draw(random)
        return generator.loss(inputs, targets[rows], random)

    task = Task(
        "training generator",
        loss,
        look,
        done=functools.partial(_trained_enough, enough, config.close),
        identity=(*lessons.identity, targets),
        max_steps=config.steps_for(len(targets)),
    )
    fitted = fit(generator, task, work_folder=work_folder, progress=progress)
    step, _, answered, _ = fitted.history[-1]
    if answered < enough and len(trial.rows) > TRIED_AT_ONCE:  # of the first ones; now of all
        answered = trial.answered(trial.generate(generator))
    return Training(step, answered, fitted.history, fitted.seconds, fitted.seconds_before)


def _trained_enough(enough: float, close: float, history: Looks) -> bool:
    """Neurons that answer hold in fewer sampling steps and other wordings if they come closer."""
    step, _, answered, off = history[-1]
    first = next((step for step, _, answered, _ in history if answered >= enough), math.inf)
    return answered >= enough and (off <= close or step >= 2 * first)


def distance(weights: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance of standardised neurons [L, dim] from the wanted ones."""
    # Neurons that are all alike, such as a single one, are zero when standardised.
    return ((weights - wanted).norm() / max(wanted.norm().item(), wanted.numel() ** 0.5)).item()


@dataclass(frozen=True)
class Trial:
    """Tries generators on edited queries, on all of them or on a sample.

    Args:
        conditions: [L, condition_dim] of the queries that are looked at.
        rows: [L] the facts that they belong to.
        answers: tries neurons on the model.
    """

    conditions: Tensor
    rows: Tensor
    answers: Answers

    @classmethod
    def of(cls, conditions: Tensor, answers: Answers, seed: int) -> Trial:
        rows = _sample_rows(len(conditions), seed).to(conditions.device)
        return cls(conditions[rows], rows, answers)

    def generate(self, candidate: Generator) -> Neurons:
        """The candidate's neurons [L]."""
        return candidate.eval().generate(self.conditions)

    def answered(self, neurons: Neurons, enough: float = 0.0) -> float:
        """The share of the queries that the model answers right with these neurons [L].

        Once it cannot be `enough` any more, the rest of the queries are not tried.
        """
        right, tried, every = 0, 0, len(self.rows)
        for some in torch.arange(every, device=self.rows.device).split(TRIED_AT_ONCE):
            right += int(self.answers(neurons[some], self.rows[some]).sum())
            tried += len(some)
            if (every - (tried - right)) / every < enough:
                break
        return right / tried


@dataclass(frozen=True)
class Task:
    """What `fit` fits a generator to.

    Args:
        name: shown beside the progress bar.
        loss: of the generator as it is at this step, with any random numbers from the given
            generator.
        look: what a candidate achieves, the share of edited queries answered first.
        done: whether what the looks so far saw is enough.
        identity: values and tensors that, with the generator's configuration, tell this task from
            others.
        max_steps: at which the learning rate has fallen to zero.
    """

    name: str
    loss: Callable[[int, torch.Generator], Tensor]
    look: Callable[[Generator], tuple[float, ...]]
    done: Callable[[Looks], bool]
    identity: tuple[Any, ...]
    max_steps: int


@dataclass(frozen=True)
class Fitted:
    """How a fit went.

    Args:
        history: for each look the step, the mean loss since the look before, and what `task.look`
            returned.
        seconds, seconds_before: as `Training` has them.
    """

    history: tuple[tuple[Any, ...], ...]
    seconds: tuple[float, ...]
    seconds_before: float


def fit(
    generator: Generator, task: Task, *, work_folder: str | Path | None, progress: bool
) -> Fitted:
    """Fit `generator`, in place, until a look at its averaged weights says that it is done.

    Its configuration says how: batches, learning rate, averaging and the looks.

    Args:
        generator: one with a network.
        task: loss and aim.
        work_folder, progress: as `train_generator` says.

    Raises:
        FloatingPointError: the loss became NaN.
    """
    config = generator.config
    device = next(generator.parameters()).device
    averaged = copy.deepcopy(generator)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / config.warmup_steps)
            * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / task.max_steps)))
        ),
    )
    random = torch.Generator().manual_seed(config.seed)
    checkpoint = _Checkpoint.of(work_folder, generator, task.identity)
    step, history, seconds = checkpoint.load(generator, averaged, optimizer, schedule, random)

    generator.train()
    before = seconds[-1] if seconds else 0.0
    started = time.perf_counter() - before
    total_loss = 0.0
    with tqdm(total=task.max_steps, initial=step, desc=task.name, disable=not progress) as bar:
        while step < task.max_steps and not (history and task.done(history)):
            loss = descend(optimizer, functools.partial(task.loss, step, random), device)
            schedule.step()
            step += 1
            total_loss += loss.item() if device.type == "cpu" else 0.0
            average = get_ema_multi_avg_fn(min(config.ema_decay, step / (step + 10)))
            average([*averaged.parameters()], [*generator.parameters()], None)
            bar.update()
            last = history[-1][0] if history else 0
            if step == next_look(last, config.check_every) or step == task.max_steps:
                taken = step - last
                mean_loss = total_loss / taken or loss.item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"the loss is {mean_loss} after {step} steps; try a smaller learning_rate"
                    )
                history.append((step, mean_loss, *task.look(averaged)))
                seconds.append(time.perf_counter() - started)
                total_loss = 0.0
                bar.set_postfix(loss=f"{mean_loss:.4f}", answered=f"{history[-1][2]:.1%}")
                checkpoint.save(generator, averaged, optimizer, random, step, history, seconds)
    generator.load_state_dict(averaged.state_dict())
    generator.eval()
    return Fitted(tuple(history), tuple(seconds), before)


def next_look(last: int, every: int) -> int:
    """The step of the look after that at step `last`: a multiple of `every`.

    >>> next_look(0, 50), next_look(950, 50), next_look(3000, 50)
    (50, 1000, 3300)
    """
    return last + every * max(1, last // (10 * every))


def descend(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], device: torch.device
) -> Tensor:
    """One step down `loss`, in bfloat16 where `device` multiplies it; returns the loss."""
    with fast_products(device):
        value = loss()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


@dataclass(frozen=True)
class Conditions:
    """What a generator is trained on: in each batch, half of the conditions are a little off.

    Args:
        generator: whose configuration says how, and whose scales are those of the batches.
        conditions: [N, condition_dim].
        rewording: makes those of other wordings; without, noise makes them.
    """

    generator: Generator
    conditions: Tensor
    rewording: Rewording | None

    def draw(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows [B] of a batch, and its standardised conditions [B, condition_dim]."""
        config, z = self.generator.config, self.conditions
        rows = torch.randperm(len(z), generator=random)[: config.batch_size].to(z.device)
        z = z[rows]
        if self.rewording is not None:
            z[1::2] = self.rewording(z[1::2], random)
        inputs = self.generator.scaled_conditions(z)
        if self.rewording is None:
            noise = torch.randn(inputs[1::2].shape, generator=random).to(z.device)
            inputs[1::2] += config.condition_noise * noise
        return rows, inputs

    @property
    def identity(self) -> tuple[Tensor, ...]:
        """Tensors that tell these conditions from others."""
        others = self.rewording
        wordings = () if others is None else (others.queries, others.paraphrases)
        return self.generator.scaled_conditions(self.conditions), *wordings


def _sample_rows(n: int, seed: int) -> Tensor:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:MOST_LOOKED_AT]


@dataclass(frozen=True)
class _Checkpoint:
    """Everything a training needs to go on, in one file; without a path, nothing is kept."""

    path: Path | None

    @classmethod
    def of(
        cls, folder: str | Path | None, generator: Generator, identity: tuple[Any, ...]
    ) -> _Checkpoint:
        if folder is None:
            return cls(None)
        first = next(generator.parameters())
        digest = fingerprint(generator.config.to_dict(), *identity, first)
        return cls(Path(folder) / f"generator-{digest}.safetensors")

    def save(self, generator, averaged, optimizer, random, step, history, seconds) -> None:
        if self.path is None:
            return
        tensors = {f"generator.{name}": value for name, value in generator.state_dict().items()}
        tensors |= {f"averaged.{name}": value for name, value in averaged.state_dict().items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        tensors["random"] = random.get_state()
        metadata = {"step": str(step), "history": json.dumps(history)}
        write_tensors(self.path, tensors, metadata | {"seconds": json.dumps(seconds)})

    def load(self, generator, averaged, optimizer, schedule, random) -> tuple[int, list, list]:
        if self.path is None or not self.path.exists():
            return 0, [], []
        try:
            tensors, metadata = read_tensors(self.path)
        except CorruptFileError as error:
            log.warning("%s; training starts again", error)
            return 0, [], []

        def part(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            return {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}

        generator.load_state_dict(part("generator"))
        averaged.load_state_dict(part("averaged"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer").items():
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
        step = int(metadata["step"])
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.lr_lambdas[0](step)
        schedule.last_epoch = step
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        random.set_state(tensors["random"])
        history = [tuple(entry) for entry in json.loads(metadata["history"])]
        return step, history, json.loads(metadata["seconds"])
