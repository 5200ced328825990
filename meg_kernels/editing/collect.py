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

import copy
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
from meg_kernels.editing.hypernetwork import known_answers
from meg_kernels.editing.neuron_fit import CollectionConfig, NeuronFit, ReadOnce
from meg_kernels.editing.prompting import IGNORED, PromptedModel, TargetBatch
from meg_kernels.facts import Fact
from meg_kernels.gradients import check_trainable, with_gradients
from meg_kernels.neuron import Neurons
from meg_kernels.nn import Attached, LowerLayers, input_device, input_of
from meg_kernels.nn.identity import check_finite
from meg_kernels.nn.packing import FrozenProducts, frozen_products
from meg_kernels.precision import fast_dtype
from meg_kernels.progress import progress_bar
from meg_kernels.routing.edits import Edits
from meg_kernels.routing.generators import (
    GeneratorConfig,
    HypernetworkGenerator,
    build_generator,
)
from meg_kernels.routing.ridge import said
from meg_kernels.storage import WorkFolder, fingerprint, read_tensors, write_tensors
from meg_kernels.text_encoder import TextEncoder

GROWN = 1.5  # times as many facts as it learnt from, and a hypernetwork learns again
FEWEST_PREDICTED = 16  # facts added at once, from which on it pays to learn from those before
MOST_BEFORE = 1024  # of them
SAME = 1e-4  # relative distance of neurons that count as one
MOST_BATCHES = 4  # looked at together, where few facts take steps
INITIAL_FACTS = 8  # whose prompts decide the initial neuron; one direction needs no more


@dataclass(frozen=True)
class Collection:
    """Fitted neurons, one per fact and in the facts' order.

    Args:
        neurons: N neurons, float32, on the CPU.
        learnt: [N] bool: whether the model answers the fact with its neuron, in every context.
        steps: [N] int: SGD steps taken.
        initial: the neuron that they started from where none was predicted.
        hypernetwork: the last one that predicted neurons; None: none did.
        told: [N] bool: whether a neuron is just what that one tells.
        num_predicted: how many neurons are what it, or one before it, told.
        seconds_before: that an interrupted collection spent on what was found finished.
    """

    neurons: Neurons
    learnt: Tensor
    steps: Tensor
    initial: Neurons
    hypernetwork: HypernetworkGenerator | None
    told: Tensor
    num_predicted: int = 0
    seconds_before: float = 0.0

    def unlearnt(self, facts: Sequence[Fact]) -> tuple[Fact, ...]:
        """The facts that the model does not answer even with their own neuron."""
        return tuple(fact for fact, ok in zip(facts, self.learnt.tolist(), strict=True) if not ok)


@dataclass(frozen=True)
class Foresight:
    """What is known of facts before they are fitted, from which their neurons are predicted.

    Args:
        said: [N, features] what the facts say.
        others: [M, features] what others say that were fitted before; M may be 0.
        neurons: theirs; None if there are none.
        hypernetwork: that tells neurons, and does not learn; None: one learns from the others, and
            from these facts, as they are fitted.
    """

    said: Tensor
    others: Tensor = field(default_factory=lambda: torch.empty(0))
    neurons: Neurons | None = None
    hypernetwork: HypernetworkGenerator | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it can tell neurons before any of these facts was fitted."""
        return self.hypernetwork is not None or len(self.others) > 0

    def learnt(self, rows: Sequence[int], neurons: Neurons) -> HypernetworkGenerator:
        """A hypernetwork of the others, and of these rows of the facts with their neurons."""
        said = self.said[[*rows]]
        if self.neurons is not None:
            said = torch.cat([self.others, said])
            neurons = Neurons.cat([self.neurons, neurons])
        made = build_generator(GeneratorConfig.hypernetwork(), neurons.layout, said.shape[1])
        assert isinstance(made, HypernetworkGenerator)
        made.learn(said, neurons)
        return made

    def identity(self) -> list[Tensor]:
        """Tensors that tell from others what can be known before the first fact is fitted.

        What the facts say is not among them: with another number of threads it is rounded
        otherwise.
        """
        known = [] if self.neurons is None else [self.neurons.layout.pack(self.neurons)]
        told = [] if self.hypernetwork is None else [*self.hypernetwork.state_dict().values()]
        return [*known, *told]


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
        encoder: tells what facts say, from which a hypernetwork predicts the neurons of all but
            the first ones; None: all are fitted from the start.
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
        foresight=None if encoder is None else foresight(prompted, encoder, facts, config),
        initial=initial,
        work_folder=work_folder,
        progress=progress,
    )


def foresight(
    prompted: PromptedModel,
    encoder: TextEncoder,
    facts: Sequence[Fact],
    config: CollectionConfig,
    *,
    conditions: Tensor | None = None,
    answers: Tensor | None = None,
    before: Edits | None = None,
) -> Foresight | None:
    """What is known of facts before they are fitted, if their neurons shall be predicted.

    Args:
        prompted: the language model.
        encoder: makes conditions.
        facts: that are fitted.
        config: how.
        conditions: [N, dim] of their queries, of this encoder; None: they are made.
        answers: [N, A] what is known of their answers; None: it is found.
        before: what was edited before, with conditions of this encoder. Its generator tells the
            neurons, if it is a hypernetwork; otherwise one learns from these facts, if there are
            enough of them.
    """
    if config.pilot is None:
        return None
    made_by = None if before is None else before.generator
    is_told = isinstance(made_by, HypernetworkGenerator)
    learnt = before.learnt.nonzero()[:, 0] if before is not None else torch.empty(0).long()
    has_pilot = is_told or (len(learnt) >= config.pilot and len(facts) >= FEWEST_PREDICTED)
    if not has_pilot and len(facts) <= config.pilot:
        return None
    if conditions is None:
        conditions = encoder.encode([fact.query for fact in facts])
    if answers is None:
        answers = known_answers(prompted, encoder, facts)
    of_facts = said(conditions.cpu(), answers.cpu())
    if isinstance(made_by, HypernetworkGenerator):
        return Foresight(of_facts, hypernetwork=copy.deepcopy(made_by).cpu())
    if before is None or not has_pilot:
        return Foresight(of_facts)
    rows = learnt[torch.linspace(0, len(learnt) - 1, min(len(learnt), MOST_BEFORE)).long()]
    known = [before.facts[row] for row in rows.tolist()]
    its = (
        known_answers(prompted, encoder, known) if before.answers is None else before.answers[rows]
    )
    others = said(before.conditions.cpu()[rows], its.cpu())
    return Foresight(of_facts, others, before.neurons[rows])


def fit_neurons(
    prompted: PromptedModel,
    attached: Attached,
    targets: Sequence[Targets],
    config: CollectionConfig,
    *,
    foresight: Foresight | None = None,
    initial: Neurons | None = None,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> Collection:
    """Fit one neuron for each fact that was found `collectable`; arguments as `collect` has them.

    Args:
        targets: of the facts, as `collectable` gave them.
        foresight: what is known of the facts; None: no neuron is predicted.
    """
    model = attached.model
    lower = LowerLayers(model, attached.layer)
    contexts = config.contexts_of(prompted.tokenizer)
    prefixes = [shared_prefix(prompted, context) for context in contexts]
    read_once = ReadOnce(model, prefixes)
    # The gradients of SGD need no more than bfloat16; the neurons themselves are float32.
    dtype = fast_dtype(input_device(model), model.dtype)
    is_rounded = dtype != model.dtype

    @functools.cache  # and not before there is a batch to fit
    def rounded() -> FrozenProducts:
        return FrozenProducts([model] if is_rounded else [], dtype)

    pilot = len(targets)
    if foresight is not None and config.pilot is not None:
        pilot = 0 if foresight.is_ready else config.pilot
    learnt_from = pilot
    if foresight is not None and foresight.is_ready:
        learnt_from = len(targets) if foresight.hypernetwork else len(foresight.others)
    # Elsewhere the batch's size is what fits into the device's memory.
    most = MOST_BATCHES if input_device(model).type == "cpu" else 1
    first, rest = _batches(targets, pilot, config.batch_size, learnt_from, most)
    batches = first + rest

    def fit(rows: Sequence[int], predicted: Tensor | None) -> dict[str, Tensor]:
        started = time.perf_counter()
        batch = prompted.batch([pair for i in rows for pair in targets[i]])
        with rounded()():
            fitted = NeuronFit(
                prompted,
                attached,
                lower,
                batch,
                start,
                read_once,
                contexts=len(contexts),
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
            fitted.taken[lost] = False
        seconds = torch.tensor(time.perf_counter() - started)
        return {
            "flat": fitted.flat,
            "steps": fitted.steps,
            "learnt": fitted.learnt,
            "taken": fitted.taken,
            "seconds": seconds,
        }

    flat = torch.empty(len(targets), attached.layout.dim)
    steps = torch.zeros(len(targets), dtype=torch.int64)
    learnt = torch.zeros(len(targets), dtype=torch.bool)
    told = torch.zeros_like(learnt)
    seconds_before, num_predicted = 0.0, 0
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
            [dataclasses.asdict(config), targets, attached.layer, prefixes, foresight is not None],
            *attached.ffn.weights(),
            *given,
            *([] if foresight is None else foresight.identity()),
        )
        work = WorkFolder.of(work_folder) / f"collect-{identity}"
        hypernetwork = None if foresight is None else foresight.hypernetwork
        taught = 0
        known: list[int] = []  # facts whose neurons were fitted, step by step
        for number, rows in enumerate(batches):
            predicted = None
            if foresight is not None and number >= len(first):
                examples = len(foresight.others) + len(known)
                grows = foresight.hypernetwork is None and 2 * examples >= pilot
                if grows and examples > GROWN * taught:
                    hypernetwork = foresight.learnt(known, attached.layout.unpack(flat[known]))
                    taught, told = examples, torch.zeros_like(told)
                if hypernetwork is not None:
                    predicted = attached.layout.pack(hypernetwork.generate(foresight.said[rows]))
            done, found = work.once(
                f"batch-{number:05d}.safetensors",
                functools.partial(fit, rows, predicted),
                write_tensors,
                lambda file: read_tensors(file)[0],
            )
            seconds_before += done["seconds"].item() if found else 0.0
            flat[rows], steps[rows] = done["flat"].cpu(), done["steps"].cpu()
            learnt[rows] = done["learnt"].cpu()
            # Found finished, it may be what another hypernetwork told.
            same = torch.zeros(len(rows), dtype=torch.bool)
            if predicted is not None:
                off = (flat[rows] - predicted).norm(dim=1)
                same = off <= SAME * predicted.norm(dim=1)
            told[rows] = done["taken"].cpu() & learnt[rows] & same
            num_predicted += int(told[rows].sum())
            known += [row for row in rows if learnt[row] and not told[row]]
            bar.update(len(rows))
            bar.set_postfix_str(f"{int(learnt.sum())} learnt, {num_predicted} as predicted")
    if not bool(flat.isfinite().all()):
        raise FloatingPointError(
            f"the fit diverged at learning_rate={config.learning_rate}; try a smaller one"
        )
    neurons = attached.layout.unpack(flat)
    return Collection(
        neurons, learnt, steps, initial, hypernetwork, told, num_predicted, seconds_before
    )


def _batches(
    targets: Sequence[Targets], pilot: int, size: int, done: int, most: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The rows of the pilot's facts, in batches of `size`, and of the others, in larger ones.

    Batches of one length waste no columns on padding; the pilot has facts of all lengths. Of facts
    with a prediction few take steps, so that more of them are looked at together; but not many more
    than a hypernetwork has learnt from, which learns again from them.

    Args:
        done: how many facts it will have learnt from before the first batch of the others.
        most: times `size`, which batches of the others may have.
    """
    order = sorted(range(len(targets)), key=lambda i: max(len(p) + len(t) for p, t in targets[i]))
    pilot = min(pilot, len(order))
    places = {place * len(order) // pilot for place in range(pilot)}
    first = [row for place, row in enumerate(order) if place in places]
    rest = [row for place, row in enumerate(order) if place not in places]
    others: list[list[int]] = []
    while rest:
        some = min(max(size, done // 2), most * size)
        others.append(rest[:some])
        rest, done = rest[some:], done + some
    return [first[i : i + size] for i in range(0, len(first), size)], others
