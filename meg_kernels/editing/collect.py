"""Collection: for each fact, the neuron with which the frozen model answers it (paper, 3.2).

All facts of a batch are fitted at once, each with its own neuron; the layers below the edited one
run once for each batch; a fact leaves the batch when it is learnt. Every fact starts from one
initial neuron, the mean of a pilot's solutions, so that the solutions stay close together:
they are what the generator has to learn.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.editing.facts import Fact
from meg_kernels.editing.prompting import (
    PromptTemplate,
    TargetBatch,
    score_targets,
    target_batch,
)
from meg_kernels.integrations.transformers import LowerLayers
from meg_kernels.neuron import Neurons
from meg_kernels.nn import Attached
from meg_kernels.storage import CorruptFileError, fingerprint, read_tensors, write_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectionConfig:
    """How neurons are fitted.

    Args:
        learning_rate: of plain SGD. Its small steps from a common start end in flat minima:
            neurons that still work when a generator misses them a little.
        max_steps: after this many steps a fact counts as not learnt.
        target_loss: a fact is learnt when every target token is the model's argmax and their mean
            cross-entropy is below this, in nats.
        batch_size: facts fitted at once.
        pilot_size: facts whose mean solution is everyone's initial neuron.
        pilot_steps: SGD steps of the pilot.
        initial_std: standard deviation of the pilot's own initial weights.
        seed: of the pilot's initial weights.
    """

    learning_rate: float = 1.0
    max_steps: int = 60
    target_loss: float = 0.05
    batch_size: int = 64
    pilot_size: int = 64
    pilot_steps: int = 25
    initial_std: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Collection:
    """Fitted neurons, one per fact and in the facts' order.

    Args:
        neurons: N neurons, float32, on the CPU.
        learnt: [N] bool: whether the model answers the fact with its neuron.
        steps: [N] int: SGD steps taken.
        initial: the neuron that all started from.
    """

    neurons: Neurons
    learnt: Tensor
    steps: Tensor
    initial: Neurons

    def unlearnt(self, facts: Sequence[Fact]) -> list[Fact]:
        """The facts that the model does not answer even with their own neuron."""
        return [fact for fact, ok in zip(facts, self.learnt.tolist(), strict=True) if not ok]


class _Fit:
    """Neurons of one batch of facts, being fitted by SGD."""

    def __init__(
        self, attached: Attached, lower: LowerLayers, batch: TargetBatch, initial: Neurons
    ):
        self.attached = attached
        self.lower = lower
        self.batch = batch
        self.hidden = lower.run(**batch.inputs)
        rows = torch.zeros(len(batch), dtype=torch.int64)
        self.flat = initial.layout.pack(initial)[rows].to(attached.model.device).clone()
        self.steps = torch.zeros(len(batch), dtype=torch.int64)
        self.learnt = torch.zeros(len(batch), dtype=torch.bool)

    def run(self, config: CollectionConfig, max_steps: int, stop_when_learnt: bool) -> None:
        active = torch.arange(len(self.batch))
        for step in range(max_steps + 1):
            rows = active.to(self.flat.device)
            batch = self.batch[rows]
            flat = self.flat[rows].requires_grad_(True)
            losses, hits = self._evaluate(batch, rows, flat)
            learnt = hits & (losses.detach() < config.target_loss)
            self.learnt[active] = (hits if step == max_steps else learnt).cpu()
            going = torch.ones_like(learnt) if not stop_when_learnt else ~learnt
            if step == max_steps or not going.any():
                break
            (gradient,) = torch.autograd.grad(losses.sum(), flat)
            update = config.learning_rate * gradient * going.unsqueeze(1)
            self.flat[rows] = flat.detach() - update
            active = active[going.cpu()]
            self.steps[active] = step + 1

    def _evaluate(self, batch: TargetBatch, rows: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's loss and whether all its target tokens are hit."""
        first = self.hidden.shape[1] - batch.inputs["input_ids"].shape[1]
        neurons = self.attached.layout.unpack(flat)
        hidden = self.hidden[rows, first:]
        with self.lower.replaced_by(hidden), self.attached.neurons(neurons):
            scores = score_targets(self.attached.model, batch)
        return scores.losses, scores.right


def collect(
    attached: Attached,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    config: CollectionConfig | None = None,
    *,
    template: PromptTemplate | None = None,
    initial: Neurons | None = None,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> Collection:
    """Fit one neuron for each fact.

    Args:
        attached: where in the model the neurons sit. Its weights stay as they are.
        tokenizer: the model's.
        facts: what shall be answered.
        config: how neurons are fitted.
        template: how queries become prompts.
        initial: one neuron to start from, of an earlier collection; else a pilot makes it.
        work_folder: keeps finished batches, so that an interrupted collection of the same facts
            with the same configuration resumes. Default: nothing is kept.
        progress: show a progress bar.

    Returns:
        The neurons; facts that could not be learnt are marked, with what was reached for them.

    Raises:
        ValueError: no facts.
        FloatingPointError: the fit diverged; a smaller learning rate helps.
    """
    config, template = config or CollectionConfig(), template or PromptTemplate()
    if not facts:
        raise ValueError("there are no facts to collect neurons for")
    model = attached.model
    prompts = [template.format(fact.query) for fact in facts]
    answers = [fact.answer for fact in facts]
    # Batches of one length waste no columns on padding.
    order = sorted(range(len(facts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    lower = LowerLayers(model, attached.ffn.layer)
    work = _WorkFolder.open(work_folder, attached, prompts, answers, config, initial)

    def fit(rows: Sequence[int], initial: Neurons) -> _Fit:
        chosen = [prompts[i] for i in rows], [answers[i] for i in rows]
        return _Fit(attached, lower, target_batch(model, tokenizer, *chosen), initial)

    def pilot() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(config.seed)
        start = torch.randn(1, attached.layout.dim, generator=generator) * config.initial_std
        stride = max(1, len(facts) // config.pilot_size)  # of every length, not the shortest only
        pilot_fit = fit(order[::stride][: config.pilot_size], attached.layout.unpack(start))
        pilot_fit.run(config, config.pilot_steps, stop_when_learnt=False)
        return {"flat": pilot_fit.flat.mean(0, keepdim=True)}

    with tqdm(total=len(facts), desc="collecting", unit="fact", disable=not progress) as bar:
        if initial is None:
            bar.set_postfix_str("pilot")
            initial = attached.layout.unpack(work.once("pilot", pilot)["flat"].cpu())
        flat = torch.empty(len(facts), attached.layout.dim)
        steps = torch.zeros(len(facts), dtype=torch.int64)
        learnt = torch.zeros(len(facts), dtype=torch.bool)
        for start in range(0, len(facts), config.batch_size):
            rows = order[start : start + config.batch_size]

            def fit_batch(rows: Sequence[int] = rows) -> dict[str, Tensor]:
                done = fit(rows, initial)
                done.run(config, config.max_steps, stop_when_learnt=True)
                return {"flat": done.flat, "steps": done.steps, "learnt": done.learnt}

            done = work.once(f"batch-{start:06d}", fit_batch)
            flat[rows], steps[rows], learnt[rows] = (
                done["flat"].cpu(),
                done["steps"],
                done["learnt"],
            )
            bar.update(len(rows))
            bar.set_postfix_str(f"{int(learnt.sum())} learnt")
    collection = Collection(attached.layout.unpack(flat), learnt, steps, initial)
    if not bool(flat.isfinite().all()):
        raise FloatingPointError(
            f"the fit diverged at learning_rate={config.learning_rate}; try a smaller one"
        )
    return collection


@dataclass(frozen=True)
class _WorkFolder:
    """Results of steps that need not be done again; without a folder, nothing is kept."""

    folder: Path | None

    @classmethod
    def open(
        cls,
        folder: str | Path | None,
        attached: Attached,
        prompts: Sequence[str],
        answers: Sequence[str],
        config: CollectionConfig,
        initial: Neurons | None,
    ) -> _WorkFolder:
        if folder is None:
            return cls(None)
        # Another model, fact or setting gets another sub-folder: results never mix.
        identity = fingerprint(
            dataclasses.asdict(config),
            [list(prompts), list(answers)],
            attached.ffn.layer,
            attached.ffn.output_projection.weight,
            "pilot" if initial is None else initial.layout.pack(initial),
        )
        return cls(Path(folder) / f"collect-{identity}")

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, from the folder if it was made before."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return read_tensors(path)[0]
            except CorruptFileError as error:
                log.warning("%s; it is made again", error)
        made = make()
        write_tensors(path, made)
        return made
