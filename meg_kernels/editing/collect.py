"""Collection: for each fact, the neuron with which the frozen model answers it (paper, 3.2).

All facts of a batch are fitted at once, each with its own neuron; the layers below the edited one
run once for each batch; a fact leaves the batch when it is learnt. Three things make neurons that
still work for other wordings, and when a generator misses their weights a little:

- all start from one neuron that fires alike on every prompt and adds nothing yet, so that the
  solutions stay close together, and plain SGD ends in flat minima near it;
- each fact is fitted in several contexts of its query (never in its paraphrases, which Generality
  is measured on); what all prompts of a context begin with is read once, and no neuron acts there;
- the fitted value is lengthened a little, for a margin, where the fact survives it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from meg_kernels.checkpoints import not_finite
from meg_kernels.checks import Check, check_fields, instance_of, integer, number
from meg_kernels.conversation import has_chat, prompt_tokens
from meg_kernels.editing.contexts import FITTED, Context, usable
from meg_kernels.editing.prompting import IGNORED, PromptedModel, TargetBatch, TargetScores
from meg_kernels.facts import Fact
from meg_kernels.gradients import check_trainable, with_gradients
from meg_kernels.neuron import Neurons
from meg_kernels.nn import Attached, LowerLayers, SharedPrefix, input_device, input_of
from meg_kernels.nn.families import decoder_layers
from meg_kernels.nn.identity import check_finite
from meg_kernels.nn.packing import frozen_products
from meg_kernels.precision import fast_dtype
from meg_kernels.progress import progress_bar
from meg_kernels.storage import WorkFolder, fingerprint, read_tensors, write_tensors

log = logging.getLogger(__name__)

PROMPTS_AT_ONCE_ON_CPU = 16
HIDDEN = ""  # the whole layer's name, among its parts'
SHORTEST_PREFIX = 8  # tokens from which on it pays to read them once
SHORT_ANSWER = 12  # tokens; longer ones take more steps
INITIAL_FACTS = 8  # whose prompts decide the initial neuron; one direction needs no more


@dataclass(frozen=True)
class CollectionConfig:
    """How neurons are fitted.

    Args:
        learning_rate: of plain SGD.
        max_steps: after this many steps a fact is left as it is, if its answer has up to 12 tokens
            with those that end it; a longer one may take as many more as it is longer.
        target_loss: a fact is fitted until in every context its target tokens are the model's
            argmax and their mean cross-entropy is below this, in nats.
        overshoot: the fitted value is multiplied by this, unless the fact is lost by it.
        contexts: in which a query is fitted; those of a chat are left out where the model has no
            chat template.
        initial_response: x . key of the initial neuron at the end of a prompt, positive.
        batch_size: facts fitted at once.

    Raises:
        ValueError: a field is out of range or of the wrong type; it is named.
    """

    learning_rate: float = 1.0
    max_steps: int = 60
    target_loss: float = 0.1
    overshoot: float = 1.25
    contexts: tuple[Context, ...] = FITTED
    initial_response: float = 3.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(
            self,
            learning_rate=number(above=0),
            max_steps=integer(1),
            target_loss=number(above=0),
            overshoot=number(above=0),
            contexts=Check("contexts, at least one", _contexts, TypeError),
            initial_response=number(above=0),
            batch_size=integer(1),
        )

    def contexts_of(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Context, ...]:
        """Those in which a model with this tokenizer is fitted.

        Raises:
            ValueError: none, since it has no chat template and all of them are chats.
        """
        if not (found := usable(self.contexts, has_chat(tokenizer))):
            raise ValueError(
                "all contexts to fit in are chats, and the tokenizer has no chat template; add one "
                "of form 'template' or 'raw'"
            )
        return found


def _contexts(value: Any) -> tuple[Context, ...]:
    contexts = tuple(value)
    if not contexts or not all(isinstance(context, Context) for context in contexts):
        raise TypeError
    return contexts


@dataclass(frozen=True)
class Collection:
    """Fitted neurons, one per fact and in the facts' order.

    Args:
        neurons: N neurons, float32, on the CPU.
        learnt: [N] bool: whether the model answers the fact with its neuron, in every context.
        steps: [N] int: SGD steps taken.
        initial: the neuron that all started from.
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


class _Fit:
    """Neurons of one batch of facts, being fitted by SGD.

    Each step looks at one context of every fact, in turn; a fact is fitted when all its contexts,
    one after the other, needed no update, and learnt when its final neuron answers them all.

    Args:
        batch: [R] prompts with their targets.
        owner: [R] the fact that each prompt belongs to, 0 to F - 1, each fact's together.
        initial: one neuron that all F facts start from.
        prefixes: token ids that the prompts of each context begin with, as `shared_prefix` has
            them.
    """

    def __init__(
        self,
        prompted: PromptedModel,
        attached: Attached,
        lower: LowerLayers,
        batch: TargetBatch,
        owner: Tensor,
        initial: Neurons,
        prefixes: Sequence[Sequence[int]],
    ):
        self.prompted, self.attached, self.lower, self.batch = prompted, attached, lower, batch
        self.lengths = batch.inputs["attention_mask"].sum(1)  # [R]
        everything = torch.arange(len(batch), device=owner.device)
        # What enters the edited layer, and what its parts return, by name: [R, T, ...].
        self.known: dict[str, Tensor] = {}
        for rows in self._by_length(everything):
            inputs = batch[rows].inputs
            hidden = lower.run(**inputs)
            known = {HIDDEN: hidden, **lower.outputs(hidden, **inputs)}
            for name, part in known.items():
                shape = *batch.inputs["input_ids"].shape, part.shape[-1]
                whole = self.known.setdefault(name, part.new_zeros(shape))
                whole[rows, -part.shape[1] :] = part
        self.contexts = owner.bincount()  # [F] how many each fact has
        self.first_row = self.contexts.cumsum(0) - self.contexts  # [F]
        self.prefixes = [self._read_once(i, tokens) for i, tokens in enumerate(prefixes)]
        facts = len(self.contexts)
        targets = (batch.labels != IGNORED).sum(1)
        self.longest = targets.new_zeros(facts).scatter_reduce_(0, owner, targets, "amax")  # [F]
        self.flat = initial.layout.pack(initial.to(owner.device)).repeat(facts, 1)
        self.steps = torch.zeros(facts, dtype=torch.int64, device=owner.device)
        self.learnt = torch.zeros(facts, dtype=torch.bool, device=owner.device)

    def _read_once(self, context: int, tokens: Sequence[int]) -> SharedPrefix | None:
        """The prefix of a context's prompts; None if it is too short, or the model cannot."""
        rows = self.first_row + context
        ids, most = self.batch.inputs["input_ids"], self.batch.inputs["input_ids"].shape[1]
        targets = (self.batch.labels[rows] != IGNORED).sum(1)
        if len(tokens) < SHORTEST_PREFIX or int((self.lengths[rows] - targets).min()) < len(tokens):
            return None
        place = (most - self.lengths[rows]).unsqueeze(1) + torch.arange(
            len(tokens), device=ids.device
        )
        if not bool((ids[rows].gather(1, place) == ids.new_tensor([*tokens])).all()):
            return None
        # The shortest and the longest, between which most is padding, and that where one is alone.
        rows = rows[self.lengths[rows].argsort()[[0, -1]]]
        some = self.batch[rows]
        try:
            layer = self.attached.layer if self.lower.skips else 0
            prefix = SharedPrefix(self.attached.model, tokens, layer)
            with torch.no_grad():
                whole = self.prompted.score(some).losses
                rest = self._score(some, rows, prefix).losses
        except Exception as error:  # in whatever way a model keeps what it has read
            log.debug("prefixes cannot be read once: %r", error)
            return None
        same = torch.allclose(whole.float(), rest.float(), rtol=0.02, atol=0.02)
        return prefix if same else None

    def _score(self, batch: TargetBatch, rows: Tensor, prefix: SharedPrefix | None) -> TargetScores:
        """What the layers above make of these rows, with the neurons that are mounted."""
        if prefix is not None:
            inputs = prefix.inputs(batch.inputs, self.lengths[rows])
            batch = TargetBatch(inputs, batch.labels)
        columns = batch.inputs["input_ids"].shape[1]
        known = {name: whole[rows, -columns:] for name, whole in self.known.items()}
        with self.lower.replaced_by(known.pop(HIDDEN), known):
            return self.prompted.score(batch)

    def run(self, config: CollectionConfig) -> None:
        active = torch.arange(len(self.flat), device=self.flat.device)
        passed = torch.zeros_like(self.contexts)  # contexts in a row that needed no update
        longer = (self.longest / SHORT_ANSWER).clamp(min=1)  # [F]
        most = (config.max_steps * longer).ceil()
        for step in range(int(most.max())):
            looked = self._look(active, self.flat[active], step, with_gradient=True)
            good = looked.right & (looked.losses < config.target_loss)
            update = config.learning_rate * looked.gradient * ~good.unsqueeze(1)
            self.flat[active] -= update
            self.steps[active] += ~good
            passed[active] = torch.where(good, passed[active] + 1, 0)
            goes_on = (passed[active] < self.contexts[active]) & (step + 1 < most[active])
            active = active[goes_on]
            if not len(active):
                break

    def lengthen(self, overshoot: float) -> None:
        """Multiply the values, but for facts that only the fitted one answers; note the learnt."""
        facts = torch.arange(len(self.flat), device=self.flat.device)
        fitted = self.attached.layout.unpack(self.flat)
        longer = dataclasses.replace(fitted, value=fitted.value * overshoot)
        flat = self.attached.layout.pack(longer)
        self.learnt = self._answered(facts, flat)
        failed = facts[~self.learnt]
        if len(failed):
            recovered = failed[self._answered(failed, self.flat[failed])]
            flat[recovered] = self.flat[recovered]
            self.learnt[recovered] = True
        self.flat = flat

    def _answered(self, facts: Tensor, flat: Tensor) -> Tensor:
        """[F] bool: which of these facts the model answers in all their contexts."""
        right = torch.ones_like(facts, dtype=torch.bool)
        for turn in range(int(self.contexts[facts].max())):
            right &= self._look(facts, flat, turn, with_gradient=False).right
        return right

    def _look(self, facts: Tensor, flat: Tensor, turn: int, with_gradient: bool) -> _Look:
        """One context of each of these facts, with the neurons `flat`.

        Without a gradient, the neurons act on whole prompts, as they do when they answer.
        """
        rows = self.first_row[facts] + turn % self.contexts[facts]
        prefix = self.prefixes[turn % len(self.prefixes)] if with_gradient else None
        losses = torch.empty(len(facts), device=flat.device)
        right = torch.empty_like(facts, dtype=torch.bool)
        gradient = torch.zeros_like(flat)
        for some in self._by_length(rows):
            part = flat[some].requires_grad_(with_gradient)
            with (
                torch.set_grad_enabled(with_gradient),
                self.attached.neurons(self.attached.layout.unpack(part)),
            ):
                scores = self._score(self.batch[rows[some]], rows[some], prefix)
            if with_gradient:
                (gradient[some],) = torch.autograd.grad(scores.losses.sum(), part)
            losses[some], right[some] = scores.losses.detach(), scores.right
        return _Look(losses, right, gradient)

    def _by_length(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Places in `rows` of prompts that go through the model at once, of like length."""
        # Like lengths need little padding; a CPU's caches hold some prompts' activations only.
        at_once = PROMPTS_AT_ONCE_ON_CPU if rows.device.type == "cpu" else max(len(rows), 1)
        return self.lengths[rows].argsort().split(at_once)


@dataclass(frozen=True)
class _Look:
    """What facts give with some neurons: [F] losses, [F] whether right, [F, dim] gradient."""

    losses: Tensor
    right: Tensor
    gradient: Tensor


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
        initial=initial,
        work_folder=work_folder,
        progress=progress,
    )


def fit_neurons(
    prompted: PromptedModel,
    attached: Attached,
    targets: Sequence[Targets],
    config: CollectionConfig,
    *,
    initial: Neurons | None = None,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> Collection:
    """Fit one neuron for each fact that was found `collectable`; arguments as `collect` has them.

    Args:
        targets: of the facts, as `collectable` gave them.
    """
    model = attached.model
    lower = LowerLayers(model, attached.layer)
    prefixes = [shared_prefix(prompted, c) for c in config.contexts_of(prompted.tokenizer)]
    upper = [*decoder_layers(model)[attached.layer + 1 :], model.get_output_embeddings()]
    # The gradients of SGD need no more than bfloat16; the neurons themselves are float32.
    dtype = fast_dtype(input_device(model), model.dtype)
    # Batches of one length waste no columns on padding.
    order = sorted(range(len(targets)), key=lambda i: max(len(p) + len(t) for p, t in targets[i]))
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]

    def fit(rows: Sequence[int], initial: Neurons) -> dict[str, Tensor]:
        started = time.perf_counter()
        batch = prompted.batch([pair for i in rows for pair in targets[i]])
        owner = [place for place, i in enumerate(rows) for _ in targets[i]]
        owners = torch.tensor(owner, device=input_device(model))
        fitted = _Fit(prompted, attached, lower, batch, owners, initial, prefixes)
        with frozen_products(upper, dtype) if dtype != model.dtype else nullcontext():
            fitted.run(config)
        fitted.lengthen(config.overshoot)
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
        # Computed from the rest, it is as others round it where work goes on with more threads.
        given = [] if initial is None else [initial.layout.pack(initial)]
        if initial is None:
            middle = batches[len(batches) // 2][:INITIAL_FACTS]
            batch = prompted.batch([pair for i in middle for pair in targets[i]])
            initial = initial_neuron(attached, batch, config.initial_response)
        # Another model, fact or setting has another identity: results never mix.
        identity = fingerprint(
            [dataclasses.asdict(config), targets, attached.layer, prefixes],
            *attached.ffn.weights(),
            *given,
        )
        work = WorkFolder.of(work_folder) / f"collect-{identity}"
        for number, rows in enumerate(batches):
            done, found = work.once(
                f"batch-{number:05d}.safetensors",
                functools.partial(fit, rows, initial),
                write_tensors,
                lambda file: read_tensors(file)[0],
            )
            seconds_before += done["seconds"].item() if found else 0.0
            flat[rows], steps[rows] = done["flat"].cpu(), done["steps"].cpu()
            learnt[rows] = done["learnt"].cpu()
            bar.update(len(rows))
            bar.set_postfix_str(f"{int(learnt.sum())} learnt")
    if not bool(flat.isfinite().all()):
        raise FloatingPointError(
            f"the fit diverged at learning_rate={config.learning_rate}; try a smaller one"
        )
    return Collection(attached.layout.unpack(flat), learnt, steps, initial, seconds_before)
