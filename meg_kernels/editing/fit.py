"""The training loop: a generator's network descends a loss until a trial says that it is done.

What counts is whether the model answers with a generated neuron, not the loss: the weights of the
averaged (EMA) network are tried now and then. A checkpoint after each trial makes a fit resumable.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from meg_kernels.precision import fast_products
from meg_kernels.progress import progress_bar
from meg_kernels.routing.generators import NetworkGenerator
from meg_kernels.scoped import seeded
from meg_kernels.storage import CorruptFileError, fingerprint, read_tensors, write_tensors

log = logging.getLogger(__name__)

History = Sequence[tuple[Any, ...]]
"""For each trial the step, the mean loss since the trial before, and what `Task.trial` returned."""


@dataclass(frozen=True)
class Task:
    """What `fit` fits a generator to.

    Args:
        name: shown beside the progress bar.
        loss: the loss of the generator as it is at this step, a scalar; it draws random numbers
            from the given `torch.Generator`.
        trial: what a candidate achieves, the share of edited queries answered right first.
        done: whether the trials so far show that it is enough.
        identity: values and tensors that, with the generator's configuration, tell this task from
            others.
        max_steps: steps after which the fit ends, the learning rate having fallen to zero.
    """

    name: str
    loss: Callable[[int, torch.Generator], Tensor]
    trial: Callable[[NetworkGenerator], tuple[float, ...]]
    done: Callable[[History], bool]
    identity: tuple[Any, ...]
    max_steps: int


@dataclass(frozen=True)
class Fitted:
    """How a fit went.

    Args:
        history: for each trial the step, the mean loss since the trial before, and what
            `Task.trial` returned.
        seconds: from the start to each trial, including those before an interruption.
        seconds_before: the seconds before an interruption.
    """

    history: tuple[tuple[Any, ...], ...]
    seconds: tuple[float, ...]
    seconds_before: float


def fit(
    generator: NetworkGenerator, task: Task, *, work_folder: str | Path | None, progress: bool
) -> Fitted:
    """Fit `generator`, in place, until a trial of its averaged weights says that it is done.

    Args:
        generator: its configuration says how: batches, learning rate, averaging and trials.
        task: loss and aim.
        work_folder: keeps a checkpoint, from which an interrupted fit of the same task resumes;
            None: nothing is kept.
        progress: show a progress bar.

    Returns:
        What the trials saw; the generator has the averaged weights and is in eval mode.

    Raises:
        FloatingPointError: the loss became infinite or NaN.
    """
    config = generator.config.training
    device = next(generator.parameters()).device
    run = _Run.start(generator, task.max_steps)
    checkpoint = _Checkpoint.of(work_folder, generator, task.identity)
    checkpoint.load(run)

    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in generator.modules())

    def loss_now() -> Tensor:
        # Of this step alone, so that a resumed run drops what an uninterrupted one does.
        dropout = seeded((config.seed + run.step) % 2**63, device) if drops else nullcontext()
        with dropout:
            return task.loss(run.step, run.rng)

    generator.train()
    before = run.seconds[-1] if run.seconds else 0.0
    started = time.perf_counter() - before
    total_loss = 0.0
    with progress_bar(
        total=task.max_steps, initial=run.step, desc=task.name, shown=progress
    ) as bar:
        while run.step < task.max_steps and not (run.history and task.done(run.history)):
            loss = descend(run.optimizer, loss_now, device)
            run.schedule.step()
            run.step += 1
            total_loss += loss.item() if device.type == "cpu" else 0.0
            average = get_ema_multi_avg_fn(min(config.ema_decay, run.step / (run.step + 10)))
            average([*run.averaged.parameters()], [*generator.parameters()], None)
            bar.update()
            last = run.history[-1][0] if run.history else 0
            if run.step in (next_trial(last, config.check_every), task.max_steps):
                taken = run.step - last
                mean_loss = total_loss / taken or loss.item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"the loss is {mean_loss} after {run.step} steps; try a smaller "
                        "learning_rate"
                    )
                run.history.append((run.step, mean_loss, *task.trial(run.averaged)))
                run.seconds.append(time.perf_counter() - started)
                total_loss = 0.0
                bar.set_postfix(loss=f"{mean_loss:.4f}", answered=f"{run.history[-1][2]:.1%}")
                checkpoint.save(run)
    generator.load_state_dict(run.averaged.state_dict())
    generator.eval()
    return Fitted(tuple(run.history), tuple(run.seconds), before)


def next_trial(last: int, every: int) -> int:
    """The step of the trial after that at step `last`: a multiple of `every`.

    >>> next_trial(0, 50), next_trial(950, 50), next_trial(3000, 50)
    (50, 1000, 3300)
    """
    return last + every * max(1, last // (10 * every))


def descend(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], device: torch.device
) -> Tensor:
    """Take one optimisation step down `loss`, in bfloat16 on a `device` that multiplies it.

    Returns:
        The loss before the step, a scalar without a gradient.
    """
    with fast_products(device):
        value = loss()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


@dataclass
class _Run:
    """Everything that a fit changes on its way, and that it needs to go on."""

    generator: NetworkGenerator
    averaged: NetworkGenerator
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    rng: torch.Generator
    step: int = 0
    history: list[tuple[Any, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, generator: NetworkGenerator, max_steps: int) -> _Run:
        config = generator.config.training
        averaged = copy.deepcopy(generator)
        optimizer = torch.optim.AdamW(generator.parameters(), lr=config.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                min(1.0, (step + 1) / config.warmup_steps)
                * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / max_steps)))
            ),
        )
        rng = torch.Generator().manual_seed(config.seed)
        return cls(generator, averaged, optimizer, schedule, rng)


@dataclass(frozen=True)
class _Checkpoint:
    """A `_Run` in one file; without a path, nothing is kept."""

    path: Path | None

    @classmethod
    def of(
        cls, folder: str | Path | None, generator: NetworkGenerator, identity: tuple[Any, ...]
    ) -> _Checkpoint:
        if folder is None:
            return cls(None)
        first = next(generator.parameters())
        digest = fingerprint(generator.config.to_dict(), *identity, first)
        return cls(Path(folder) / f"generator-{digest}.safetensors")

    def save(self, run: _Run) -> None:
        if self.path is None:
            return
        tensors = {"rng": run.rng.get_state()}
        for part, module in (("generator", run.generator), ("averaged", run.averaged)):
            tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        for i, state in run.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        metadata = {"step": str(run.step), "history": json.dumps(run.history)}
        write_tensors(self.path, tensors, metadata | {"seconds": json.dumps(run.seconds)})

    def load(self, run: _Run) -> None:
        """Take `run` to where it was saved; leave it as it is if nothing readable was."""
        if self.path is None or not self.path.exists():
            return
        try:
            tensors, metadata = read_tensors(self.path)
        except CorruptFileError as error:
            log.warning("%s; training starts again", error)
            return

        def part(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            return {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}

        run.generator.load_state_dict(part("generator"))
        run.averaged.load_state_dict(part("averaged"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer").items():
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
        run.step = int(metadata["step"])
        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * run.schedule.lr_lambdas[0](run.step)
        run.schedule.last_epoch = run.step
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})
        run.rng.set_state(tensors["rng"])
        run.history = [tuple(entry) for entry in json.loads(metadata["history"])]
        run.seconds = json.loads(metadata["seconds"])
