"""Collection: for each fact, the neuron with which the frozen model answers it (paper, 3.2).

All facts of a batch are fitted at once, each with its own neuron; the layers below the edited one
run once for each batch; a fact leaves the batch when it is learnt. Three things make neurons that
still work for other wordings, and when a generator misses their weights a little:

- they start from one neuron that fires alike on every prompt and adds nothing yet, so that the
  solutions stay close together, and plain SGD ends in flat minima near it; many facts start from
  what a hypernetwork tells, which learnt from the first ones;
- each fact is fitted in several contexts of its query (never in its paraphrases, which Generality
  is measured on); what all prompts of a context begin with is read once, and no neuron acts there;
- the fitted value is lengthened a little, for a margin, where the fact survives it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from meg_kernels.checkpoints import not_finite
from meg_kernels.checks import instance_of
from meg_kernels.conversation import prompt_tokens
from meg_kernels.editing.contexts import Context
from meg_kernels.editing.hypernetwork import Hypernetwork, said_by
from meg_kernels.editing.neuron_fit import CollectionConfig, NeuronFit
from meg_kernels.editing.prompting import IGNORED, PromptedModel, TargetBatch
from meg_kernels.facts import Fact
from meg_kernels.gradients import check_trainable, with_gradients
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.nn import Attached, LowerLayers, input_device, input_of
from meg_kernels.nn.identity import check_finite
from meg_kernels.nn.packing import FrozenProducts, frozen_products
from meg_kernels.precision import fast_dtype
from meg_kernels.progress import progress_bar
from meg_kernels.routing.edits import Edits
from meg_kernels.storage import WorkFolder, fingerprint, read_tensors, write_tensors
from meg_kernels.text_encoder import TextEncoder

GROWN = 1.5  # times as many facts as it learnt from, and a hypernetwork learns again
FEWEST_PREDICTED = 16  # facts added at once, from which on it pays to learn from those before
MOST_BEFORE = 1024  # of them
INITIAL_FACTS = 8  # whose prompts decide the initial neuron; one direction needs no more


@dataclass(frozen=True)
class Collection:
    """Fitted neurons, one per fact and in the facts' order.

    Args:
        neurons: N neurons, float32, on the CPU.
        learnt: [N] bool: whether the model answers the fact with its neuron, in every context.
        steps: [N] int: SGD steps taken.
        initial: the neuron that they started from where none was predicted.
        seconds_before: that an interrupted collection spent on what was found finished.
    """

    neurons: Neurons
    learnt: Tensor
    steps: Tensor
    initial: Neurons
    seconds_before: float = 0.0

    def unlearnt(self, facts: Sequence[Fact]) -> tuple[Fact, ...]:
        """The facts that the model does not answer even with their own neuron."""
        return tuple(fact for fact, ok in zip(facts, self.learnt.tolist(), strict=True) if not ok)


@dataclass(frozen=True)
class Said:
    """What facts say, and what a hypernetwork knows from others that were fitted before.

    Args:
        facts: [N, features] of those that are collected.
        others: [M, features] of the others; M may be 0.
        neurons: [M, dim] theirs, laid flat.
    """

    facts: Tensor
    others: Tensor = field(default_factory=lambda: torch.empty(0))
    neurons: Tensor = field(default_factory=lambda: torch.empty(0))

    def learnt(self, rows: Sequence[int], neurons: Tensor) -> Hypernetwork:
        """A hypernetwork of the others, and of these rows of the facts with their neurons."""
        said = self.facts[[*rows]]
        if len(self.others):
            said = torch.cat([self.others, said])
            neurons = torch.cat([self.neurons, neurons])
        return Hypernetwork.fitted(said, neurons)


def initial_neuron(attached: Attached, batch: TargetBatch, response: float) -> Neurons:
    """The neuron that fires with `response` at the end of an average prompt and adds nothing."""
    prompt_ends = torch.arange(len(batch)), -(batch.labels != IGNORED).sum(1)
    inputs = input_of(attached.ffn.entry, attached.model, batch.inputs)
    inputs = inputs.view(*batch.inputs["input_ids"].shape, -1)  # OPT flattens its tokens
    mean = inputs[prompt_ends].float().mean(0).cpu()  # [d_in]
    layout = attached.layout
    bias = torch.zeros(1) if layout.has_bias else None
    key = response * mean / mean.square().sum()
    return Neurons(key.unsqueeze(0), bias, torch.zeros(1, layout.d_out), layout.activation)


def shared_prefix(prompted: PromptedModel, context: Context) -> list[int]:
    """Token ids that the prompts of all queries begin with in this context."""
    # A question and the beginning of a sentence, of which nothing is alike.
    prompts = [prompted.prompt(query, context) for query in ("Who?", "A man of")]
    first, second = (prompt_tokens(prompted.tokenizer, prompt) for prompt in prompts)
    unknown = prompted.tokenizer.unk_token_id
    pairs = zip(first, second, strict=False)
    return [one for one, _ in itertools.takewhile(lambda p: p[0] == p[1] != unknown, pairs)]


Targets = list[tuple[list[int], list[int]]]
"""Token ids of a fact's prompts and of their targets, one pair for each context."""


def collectable(
    prompted: PromptedModel, attached: Attached, facts: Sequence[Fact], config: CollectionConfig
) -> list[Targets]:
    """Token ids of each fact's prompts and targets, if neurons can be fitted for all of them.

    Args:
        prompted: the language model.
        attached: where in it the neurons sit.
        facts: with the new answers.
        config: how neurons are fitted.

    Raises:
        FactsError: facts that the model cannot be taught: `PromptedModel.targets` says why.
        ValueError: no facts, or a model that says nothing, or NaN, whatever it reads.
    """
    instance_of(PromptedModel)("prompted", prompted)
    instance_of(Attached)("attached", attached)
    instance_of(CollectionConfig)("config", config)
    if not facts:
        raise ValueError("there are no facts to collect neurons for")
    model = attached.model
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no output layer, and without logits no neuron can be "
            "fitted; load the model with AutoModelForCausalLM"
        )
    check_trainable(model, "the model")
    check_finite(model, attached.layer)
    targets = prompted.targets(facts, config.contexts_of(prompted.tokenizer))
    with torch.no_grad():
        losses = prompted.score(prompted.batch(targets[0][:1])).losses
    if not bool(losses.isfinite().all()):
        weights = not_finite(model.named_parameters())
        raise ValueError(
            f"the model's loss is {losses.item()} before anything is edited: "
            + (
                f"{', '.join(weights[:3])} hold NaN or infinite weights; load a sound checkpoint"
                if weights
                else f"its activations exceed {model.dtype}; load it in float32 or bfloat16"
            )
        )
    return targets


@with_gradients
def collect(
    prompted: PromptedModel,
    attached: Attached,
    facts: Sequence[Fact],
    config: CollectionConfig | None = None,
    *,
    initial: Neurons | None = None,
    encoder: TextEncoder | None = None,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> Collection:
    """Fit one neuron for each fact.

    Args:
        prompted: the language model; its weights stay as they are.
        attached: where in it the neurons sit.
        facts: with the new answers.
        config: how neurons are fitted.
        initial: one neuron to start from, of an earlier collection; default: `initial_neuron` of
            some of the facts.
        encoder: tells a hypernetwork what facts say, which predicts the neurons of all but the
            first ones; None: all are fitted from the start.
        work_folder: keeps finished batches, so that an interrupted collection of the same facts
            with the same configuration resumes. Default: nothing is kept.
        progress: show a progress bar.

    Returns:
        The neurons; facts that could not be learnt are marked, with what was reached for them.

    Raises:
        FactsError: facts that the model cannot be taught.
        ValueError: no facts, or a model that no neuron can be fitted for: see `collectable`.
        FloatingPointError: the fit diverged; a smaller learning rate helps.
    """
    config = CollectionConfig() if config is None else config
    targets = collectable(prompted, attached, facts, config)
    return fit_neurons(
        prompted,
        attached,
        targets,
        config,
        said=said_for(prompted, encoder, facts, targets, config),
        initial=initial,
        work_folder=work_folder,
        progress=progress,
    )


def said_for(
    prompted: PromptedModel,
    encoder: TextEncoder | None,
    facts: Sequence[Fact],
    targets: Sequence[Targets],
    config: CollectionConfig,
    before: Edits | None = None,
) -> Said | None:
    """What the facts say, if a hypernetwork shall learn from it; arguments as `collect` has them.

    Args:
        targets: of the facts, as `collectable` gave them.
        before: what was edited before, with conditions of this encoder; if it has enough facts, a
            hypernetwork learns from them, and from those whose neurons were predicted themselves.
    """
    if encoder is None or config.pilot is None:
        return None
    learnt = before.learnt.nonzero()[:, 0] if before is not None else torch.empty(0).long()
    has_pilot = len(learnt) >= config.pilot and len(facts) >= FEWEST_PREDICTED
    if not has_pilot and len(facts) <= config.pilot:
        return None
    said = said_by(prompted, encoder, facts, [pairs[0][1] for pairs in targets])
    if before is None or not has_pilot:
        return Said(said)
    rows = learnt[torch.linspace(0, len(learnt) - 1, min(len(learnt), MOST_BEFORE)).long()]
    known = [before.facts[row] for row in rows.tolist()]
    first = config.contexts_of(prompted.tokenizer)[0]  # as in targets
    prompts = [prompted.prompt(fact.query, first) for fact in known]
    answers = [
        prompted.target(prompt, fact.answer)[1] for prompt, fact in zip(prompts, known, strict=True)
    ]
    others = said_by(prompted, encoder, known, answers, before.conditions[rows])
    return Said(said, others, before.layout.pack(before.neurons[rows]))


def fit_neurons(
    prompted: PromptedModel,
    attached: Attached,
    targets: Sequence[Targets],
    config: CollectionConfig,
    *,
    said: Said | None = None,
    initial: Neurons | None = None,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> Collection:
    """Fit one neuron for each fact that was found `collectable`; arguments as `collect` has them.

    Args:
        targets: of the facts, as `collectable` gave them.
        said: what the facts say, as `said_for` has it.
    """
    model = attached.model
    lower = LowerLayers(model, attached.layer)
    prefixes = [shared_prefix(prompted, c) for c in config.contexts_of(prompted.tokenizer)]
    # The gradients of SGD need no more than bfloat16; the neurons themselves are float32.
    dtype = fast_dtype(input_device(model), model.dtype)
    is_rounded = dtype != model.dtype

    @functools.cache  # and not before there is a batch to fit
    def rounded() -> FrozenProducts:
        return FrozenProducts([model] if is_rounded else [], dtype)

    pilot = len(targets)
    if said is not None and config.pilot is not None:
        pilot = 0 if len(said.others) else config.pilot
    first, rest = _batches(targets, pilot, config.batch_size)
    batches = first + rest

    def fit(rows: Sequence[int], predicted: Tensor | None) -> dict[str, Tensor]:
        started = time.perf_counter()
        batch = prompted.batch([pair for i in rows for pair in targets[i]])
        owner = [place for place, i in enumerate(rows) for _ in targets[i]]
        owners = torch.tensor(owner, device=input_device(model))
        with rounded()():
            fitted = NeuronFit(
                prompted,
                attached,
                lower,
                batch,
                owners,
                start,
                prefixes,
                predicted=predicted,
                is_rounded=is_rounded,
            )
            fitted.run(config)
        fitted.settle()
        lost = (~fitted.learnt).nonzero()[:, 0].tolist()
        if predicted is not None and lost:  # by a bad prediction, perhaps
            again = fit([rows[i] for i in lost], None)
            fitted.flat[lost], fitted.learnt[lost] = again["flat"], again["learnt"]
            fitted.steps[lost] += again["steps"]
        seconds = torch.tensor(time.perf_counter() - started)
        return {
            "flat": fitted.flat,
            "steps": fitted.steps,
            "learnt": fitted.learnt,
            "seconds": seconds,
        }

    flat = torch.empty(len(targets), attached.layout.dim)
    steps = torch.zeros(len(targets), dtype=torch.int64)
    learnt = torch.zeros(len(targets), dtype=torch.bool)
    seconds_before = 0.0
    with (
        frozen_products([model], dtype) if dtype == model.dtype else nullcontext(),
        progress_bar(total=len(targets), desc="collecting", unit="fact", shown=progress) as bar,
    ):
        # Computed from the rest, it is as others round it where work goes on with more threads; so
        # is what a hypernetwork tells.
        given = [] if initial is None else [initial.layout.pack(initial)]
        if initial is None:
            middle = batches[len(batches) // 2][:INITIAL_FACTS]
            batch = prompted.batch([pair for i in middle for pair in targets[i]])
            initial = initial_neuron(attached, batch, config.initial_response)
        start = attached.layout.pack(initial)
        # Whether layers can be skipped is tried on the model as it is.
        one = prompted.batch(targets[batches[0][0]][:1]).inputs
        with torch.no_grad():
            lower.outputs(lower.run(**one), **one)
        # Another model, fact or setting has another identity: results never mix.
        identity = fingerprint(
            [dataclasses.asdict(config), targets, attached.layer, prefixes, said is not None],
            *attached.ffn.weights(),
            *given,
            *([] if said is None else [said.neurons]),
        )
        work = WorkFolder.of(work_folder) / f"collect-{identity}"
        hypernetwork, taught = None, 0
        known: list[int] = []  # facts whose neurons were fitted, step by step
        for number, rows in enumerate(batches):
            predicted = None
            if said is not None and number >= len(first):
                examples = len(said.others) + len(known)
                if examples > GROWN * taught and 2 * examples >= pilot:
                    hypernetwork, taught = said.learnt(known, flat[known]), examples
                if hypernetwork is not None:
                    told = hypernetwork(said.facts[rows])
                    predicted = _shorter(attached.layout, told, config.overshoot)
            done, found = work.once(
                f"batch-{number:05d}.safetensors",
                functools.partial(fit, rows, predicted),
                write_tensors,
                lambda file: read_tensors(file)[0],
            )
            seconds_before += done["seconds"].item() if found else 0.0
            flat[rows], steps[rows] = done["flat"].cpu(), done["steps"].cpu()
            learnt[rows] = done["learnt"].cpu()
            known += [i for i in rows if learnt[i] and (steps[i] or hypernetwork is None)]
            bar.update(len(rows))
            bar.set_postfix_str(f"{int(learnt.sum())} learnt")
    if not bool(flat.isfinite().all()):
        raise FloatingPointError(
            f"the fit diverged at learning_rate={config.learning_rate}; try a smaller one"
        )
    return Collection(attached.layout.unpack(flat), learnt, steps, initial, seconds_before)


def _batches(
    targets: Sequence[Targets], pilot: int, size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The rows of the pilot's facts, and of the others, in batches of `size`.

    Batches of one length waste no columns on padding; the pilot has facts of all lengths.
    """
    order = sorted(range(len(targets)), key=lambda i: max(len(p) + len(t) for p, t in targets[i]))
    pilot = min(pilot, len(order))
    places = {place * len(order) // pilot for place in range(pilot)}
    first = [row for place, row in enumerate(order) if place in places]
    rest = [row for place, row in enumerate(order) if place not in places]
    one, other = ([part[i : i + size] for i in range(0, len(part), size)] for part in (first, rest))
    return one, other


def _shorter(layout: NeuronLayout, flat: Tensor, overshoot: float) -> Tensor:
    """Neurons that are these ones, laid flat [N, dim], once they are lengthened."""
    neurons = layout.unpack(flat)
    return layout.pack(dataclasses.replace(neurons, value=neurons.value / overshoot))
