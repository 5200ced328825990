"""`NeuronFit`: the neurons of one batch of facts, fitted by SGD on the frozen model.

The layers below the edited one run once for each prompt, and so do the parts of the edited one that
its neurons do not reach. Products may be rounded to bfloat16 meanwhile: where that could decide
whether a fact is answered, the model is asked again as it is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.checks import Check, check_fields, integer, number
from meg_kernels.conversation import has_chat
from meg_kernels.editing.contexts import FITTED, Context, usable
from meg_kernels.editing.prompting import IGNORED, PromptedModel, TargetBatch, TargetScores
from meg_kernels.nn import Attached, LowerLayers, SharedPrefix

log = logging.getLogger(__name__)

PROMPTS_AT_ONCE_ON_CPU = 16
HIDDEN = ""  # the whole layer's name, among its parts'
SHORTEST_PREFIX = 8  # tokens from which on it pays to read them once
SHORT_ANSWER = 12  # tokens; longer ones take more steps
# Nats by which rounding of products to bfloat16 may move a margin: six standard deviations of what
# it does in SmolLM2; and as a share of the logits, which are rounded as well.
ROUNDED, OF_LOGITS = 0.5, 2**-7
# Nats by which a predicted neuron must make each token of an answer expected more than any other.
SURE = 1.0
FIRM = 2.0  # the same of one that takes steps: of a fitted one once it is lengthened


@dataclass(frozen=True)
class CollectionConfig:
    """How neurons are fitted.

    Args:
        learning_rate: of plain SGD.
        max_steps: after this many looks, with a step or without, a fact is left as it is, if its
            answer has up to 12 tokens with those that end it; a longer one may take as many more as
            it is longer.
        target_loss: a fact is fitted until in every context its target tokens are the model's
            argmax and their mean cross-entropy is below this, in nats.
        overshoot: the fitted value is multiplied by this, unless the fact is lost by it.
        contexts: in which a query is fitted; those of a chat are left out where the model has no
            chat template.
        initial_response: x . key of the initial neuron at the end of a prompt, positive.
        batch_size: facts fitted at once.
        pilot: facts, of all lengths, that are fitted before the others start from what a
            hypernetwork, which learns from these, makes of what they say; so do 16 facts or more
            that are added to as many. None: all start from one neuron.

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
    pilot: int | None = 128

    def __post_init__(self) -> None:
        check_fields(
            self,
            learning_rate=number(above=0),
            max_steps=integer(1),
            target_loss=number(above=0),
            overshoot=number(above=0),
            contexts=Check(
                "Contexts, at least one, such as [Context('plain')]", _contexts, TypeError
            ),
            initial_response=number(above=0),
            batch_size=integer(1),
            pilot=integer(1).or_none(),
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


class ReadOnce:
    """What the prompts of each context begin with, read once for all batches of a collection.

    Args:
        model: the language model, with nothing mounted.
        prefixes: token ids that the prompts of each context begin with; short ones are not kept.
    """

    def __init__(self, model: PreTrainedModel, prefixes: Sequence[Sequence[int]]):
        self._model, self._tokens = model, [list(tokens) for tokens in prefixes]
        self._found: dict[int, _Prefix | None] = {}

    def of(
        self, context: int, begins: Callable[[Tensor], bool], tried: Callable[[_Prefix], bool]
    ) -> _Prefix | None:
        """The prefix of a context; None if it is too short, or the model cannot.

        Args:
            context: its number.
            begins: whether all prompts of a batch begin with these token ids [P].
            tried: whether a prefix that was read just now gives what whole prompts give. It puts
                what is `known` of the prefix there.
        """
        tokens = self._tokens[context]
        if len(tokens) < SHORTEST_PREFIX or not begins(torch.tensor(tokens)):
            return None
        if context not in self._found:
            try:
                prefix = _Prefix(SharedPrefix(self._model, tokens))
                self._found[context] = prefix if tried(prefix) else None
            except Exception as error:  # in whatever way a model keeps what it has read
                log.debug("prefixes cannot be read once: %r", error)
                self._found[context] = None
        return self._found[context]


@dataclass
class _Prefix:
    """A prefix that was read, and what enters and leaves parts of the edited layer there.

    `known` has [P, n] by the names that `NeuronFit` has for these.
    """

    shared: SharedPrefix
    known: dict[str, Tensor] = field(default_factory=dict)


class NeuronFit:
    """Neurons of one batch of facts, being fitted by SGD.

    Each step looks at one context of the facts that may need an update there. When none does, the
    values are lengthened, and contexts that are not answered firmly then are looked at again. A
    fact is learnt when its final neuron answers in all contexts. The final neuron is the fitted one
    with its value lengthened, unless the fact is lost by that; or the predicted one, if it answers
    surely, and else what steps made of that.

        fit = NeuronFit(...)
        fit.run(config)      # products may be rounded
        fit.settle()         # as the model answers
        fit.flat, fit.learnt, fit.steps, fit.taken

    Args:
        prompted: the language model.
        attached: where in it the neurons sit.
        lower: the layers below.
        batch: prompts with their targets, F facts after each other, each in all contexts.
        initial: [1, dim] the neuron that facts start from, laid flat.
        read_once: what prompts begin with.
        contexts: how many there are.
        predicted: [F, dim] final neurons that may answer without a step.
        is_rounded: whether products are rounded while it runs.
    """

    def __init__(
        self,
        prompted: PromptedModel,
        attached: Attached,
        lower: LowerLayers,
        batch: TargetBatch,
        initial: Tensor,
        read_once: ReadOnce,
        *,
        contexts: int,
        predicted: Tensor | None = None,
        is_rounded: bool = False,
    ):
        self.prompted, self.attached, self.lower, self.batch = prompted, attached, lower, batch
        self.read_once, self.is_rounded = read_once, is_rounded
        self.contexts = range(contexts)
        device = batch.labels.device
        self.lengths = batch.inputs["attention_mask"].sum(1)  # [R]
        # What enters the edited layer, and what its parts return, by name: [R, T, ...].
        self.known: dict[str, Tensor] = {}
        self._is_known = torch.zeros_like(self.lengths, dtype=torch.bool)
        self._prefixes: dict[int, _Prefix | None] = {}
        facts = len(batch) // contexts
        self.first_row = contexts * torch.arange(facts, device=device)  # [F]
        targets = (batch.labels != IGNORED).sum(1)
        self.longest = targets.view(facts, contexts).amax(1)  # [F]
        self.initial = initial.to(device)
        self.predicted = None if predicted is None else predicted.to(device)
        self.flat = self.initial.expand(facts, -1).clone()
        self.longer = self.flat
        # The least of each fact's margins with its final neuron, in the contexts that were looked
        # at, and how far it may be from that of the model as it is.
        self.margins = torch.full((facts,), -torch.inf, device=device)
        self.unsure = torch.zeros(facts, device=device)
        self.steps = torch.zeros(facts, dtype=torch.int64, device=device)
        self.learnt = torch.zeros(facts, dtype=torch.bool, device=device)
        # Those that start from a prediction, which is of the final neuron.
        self.is_begun = torch.zeros_like(self.learnt)
        # In which contexts they may need steps.
        self.open = torch.ones(facts, contexts, dtype=torch.bool, device=device)
        self.taken = torch.zeros_like(self.learnt)  # as it was predicted

    def _read(self, rows: Tensor, context: int) -> _Prefix | None:
        """Run the layers below for these prompts, of one context, that they did not run for yet."""
        if context not in self._prefixes:
            self._prefixes[context] = self._prefix(self.first_row + context, context)
        prefix = self._prefixes[context]
        self._run_lower(rows[~self._is_known[rows]], prefix)
        return prefix

    def _run_lower(self, rows: Tensor, prefix: _Prefix | None) -> None:
        most = self.batch.inputs["input_ids"].shape[1]
        for some in self._by_length(rows) if len(rows) else ():
            some = rows[some]

            def inputs(some: Tensor = some) -> dict[str, Any]:
                whole = self.batch[some].inputs
                return whole if prefix is None else prefix.shared.inputs(whole, self.lengths[some])

            hidden = self.lower.run(**inputs())
            known = {HIDDEN: hidden, **self.lower.outputs(hidden, **inputs())}
            for name, part in known.items():
                shape = len(self.batch), most, part.shape[-1]
                if name not in self.known:
                    self.known[name] = part.new_zeros(shape)
                whole = self.known[name]
                whole[some, -part.shape[1] :] = part
                if prefix is not None:
                    whole[some.unsqueeze(1), self._places(some, len(prefix.shared))] = prefix.known[
                        name
                    ]
        self._is_known[rows] = True

    def _places(self, rows: Tensor, count: int) -> Tensor:
        """[B, count] the columns of the first tokens of these prompts."""
        most = self.batch.inputs["input_ids"].shape[1]
        return (most - self.lengths[rows]).unsqueeze(1) + torch.arange(count, device=rows.device)

    def _prefix(self, rows: Tensor, context: int) -> _Prefix | None:
        """What the prompts of a context, these rows, begin with."""
        ids, targets = self.batch.inputs["input_ids"], (self.batch.labels[rows] != IGNORED).sum(1)

        def begins(tokens: Tensor) -> bool:
            if int((self.lengths[rows] - targets).min()) < len(tokens):
                return False
            place = self._places(rows, len(tokens))
            return bool((ids[rows].gather(1, place) == tokens.to(ids.device)).all())

        @torch.no_grad()
        def tried(prefix: _Prefix) -> bool:
            # The shortest and the longest: between them most is padding, and that where one is
            # alone.
            some = rows[self.lengths[rows].argsort()[[0, -1]]]
            self._run_lower(some, None)
            place = self._places(some[:1], len(prefix.shared))[0]
            prefix.known = {name: whole[some[0], place] for name, whole in self.known.items()}
            whole = self._score(self.batch[some], some, None).losses
            self._run_lower(some, prefix)
            rest = self._score(self.batch[some], some, prefix).losses
            off = 0.1 if self.is_rounded else 0.02
            self._is_known[some] = False
            return torch.allclose(whole.float(), rest.float(), rtol=0.02, atol=off)

        return self.read_once.of(context, begins, tried)

    def _score(
        self,
        batch: TargetBatch,
        rows: Tensor,
        prefix: _Prefix | None,
        with_margins: bool = False,
    ) -> TargetScores:
        """What the layers above make of these rows, with the neurons that are mounted."""
        if prefix is not None:
            layer = self.attached.layer if self.lower.skips else 0
            inputs = prefix.shared.inputs(batch.inputs, self.lengths[rows], layer)
            batch = TargetBatch(inputs, batch.labels)
        columns = batch.inputs["input_ids"].shape[1]
        known = {name: whole[rows, -columns:] for name, whole in self.known.items()}
        with self.lower.replaced_by(known.pop(HIDDEN), known):
            return self.prompted.score(batch, with_margins)

    def run(self, config: CollectionConfig) -> None:
        """Fit the facts, and see what their neurons answer when lengthened."""
        active = torch.arange(len(self.flat), device=self.flat.device)
        self.stretch = torch.full_like(self.margins, config.overshoot)
        if self.predicted is not None:
            self.longer = self.predicted
            self.taken[self._try_longer(active, SURE, SURE)] = True
            self.is_begun = self.predicted.isfinite().all(1) & self.margins.isfinite()
            self.flat = self.predicted.where(self.is_begun.unsqueeze(1), self.flat)
            self.stretch[self.is_begun] = 1.0
            active = active[~self.taken]
        longer = (self.longest / SHORT_ANSWER).clamp(min=1)  # [F]
        most = (config.max_steps * longer).ceil()
        looks, tried_at = torch.zeros_like(self.steps), torch.full_like(self.steps, -1)
        while len(active):
            for context in self.contexts:
                some = active[self.open[active, context] & (looks[active] < most[active])]
                if not len(some):
                    continue
                looked = self._look(some, self.flat[some], context, with_gradient=True)
                fitted = looked.right & (looked.losses < config.target_loss)
                good = torch.where(self.is_begun[some], looked.margins >= FIRM, fitted)
                update = config.learning_rate * looked.gradient * ~good.unsqueeze(1)
                self.flat[some] -= update
                self.steps[some] += ~good
                # A step for one context may undo what another had: of a neuron that is fitted from
                # the start, all of them are looked at again. A predicted one moves little.
                self.open[some[~good & ~self.is_begun[some]]] = True
                self.open[some, context] = ~good
                looks[some] += 1
            if bool((self.open[active].any(1) & (looks[active] < most[active])).any()):
                continue
            # A fact that failed before, and has not changed since, fails again.
            active = active[self.steps[active] > tried_at[active]]
            tried_at[active] = self.steps[active]
            self._lengthen(active)
            active = active[self.open[active].any(1) & (looks[active] < most[active])]

    def settle(self) -> None:
        """Decide on the final neurons, by the model as it is where rounding could have decided."""
        facts = torch.arange(len(self.flat), device=self.flat.device)
        self.learnt = self.margins > 0
        unsure = facts[~(self.margins.abs() > self.unsure)]
        self.learnt[unsure] = self._answered(unsure, self.longer[unsure])
        failed = facts[~self.learnt & (self.stretch != 1)]
        recovered = failed[self._answered(failed, self.flat[failed])]
        self.longer[recovered] = self.flat[recovered]
        self.learnt[recovered] = True
        self.flat = self.longer

    def _lengthen(self, facts: Tensor) -> None:
        """Multiply these facts' values, and see how surely they are answered then."""
        neurons = self.attached.layout.unpack(self.flat[facts])
        longer = neurons.value * self.stretch[facts].unsqueeze(1)
        self.longer = self.longer.clone()
        self.longer[facts] = self.attached.layout.pack(dataclasses.replace(neurons, value=longer))
        sure = torch.where(self.is_begun[facts], SURE, FIRM)
        self.open[facts] = True
        self._try_longer(facts, sure)

    def _try_longer(self, facts: Tensor, sure: Tensor | float, until: float = -torch.inf) -> Tensor:
        """Ask these facts with their final neurons, context by context, until one loses a fact.

        Args:
            facts: [A] of the F.
            sure: [A] nats by which answers must be expected more than any other, or one for all;
                contexts in which they are, are no longer open.
            until: a fact with a smaller margin, in nats, is lost.

        Returns:
            The facts that were not lost.
        """
        self.margins[facts], self.unsure[facts] = torch.inf, 0.0
        sure = torch.as_tensor(sure, device=facts.device).expand(len(facts))
        for context in self.contexts:
            if not len(facts):
                break
            looked = self._look(facts, self.longer[facts], context, with_gradient=False)
            self.margins[facts] = self.margins[facts].minimum(looked.margins)
            self.unsure[facts] = self.unsure[facts].maximum(looked.unsure)
            self.open[facts, context] = ~(looked.margins >= sure)
            left = looked.margins >= (-looked.unsure).clamp(min=until)
            facts, sure = facts[left], sure[left]
        return facts

    def _answered(self, facts: Tensor, flat: Tensor) -> Tensor:
        """[F] bool: which of these facts the model itself answers in all their contexts."""
        right = torch.ones_like(facts, dtype=torch.bool)
        for context in self.contexts:
            left = right.nonzero()[:, 0]  # a fact that failed once needs no other context
            rows = self.first_row[facts[left]] + context
            for some in self._by_length(rows) if len(left) else ():
                neurons = self.attached.layout.unpack(flat[left[some]])
                with torch.no_grad(), self.attached.neurons(neurons):
                    right[left[some]] = self.prompted.score(self.batch[rows[some]]).right
        return right

    def _look(self, facts: Tensor, flat: Tensor, context: int, with_gradient: bool) -> _Look:
        """One context of each of these facts, with the neurons `flat`.

        Without a gradient, the neurons act on whole prompts, as they do when they answer.
        """
        rows = self.first_row[facts] + context
        prefix = self._read(rows, context)
        losses, margins, unsure = torch.zeros(3, len(facts), device=flat.device)
        right = torch.empty_like(facts, dtype=torch.bool)
        gradient = torch.zeros_like(flat)
        for some in self._by_length(rows):
            part = flat[some].requires_grad_(with_gradient)
            with (
                torch.set_grad_enabled(with_gradient),
                self.attached.neurons(self.attached.layout.unpack(part)),
            ):
                # Neurons act on whole prompts when they answer.
                began = prefix if with_gradient else None
                scores = self._score(self.batch[rows[some]], rows[some], began, True)
            if with_gradient:
                (gradient[some],) = torch.autograd.grad(scores.losses.sum(), part)
            losses[some], right[some] = scores.losses.detach(), scores.right
            if scores.margins is not None and scores.largest is not None:
                margins[some] = scores.margins
                if self.is_rounded:
                    unsure[some] = (OF_LOGITS * scores.largest).clamp(min=ROUNDED)
        if self.prompted.model.dtype == torch.float16:  # which overflows where bfloat16 does not
            unsure.fill_(torch.inf if self.is_rounded else 0.0)
        return _Look(losses, right, margins, unsure, gradient)

    def _by_length(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Places in `rows` of prompts that go through the model at once, of like length."""
        # Like lengths need little padding; a CPU's caches hold some prompts' activations only.
        at_once = PROMPTS_AT_ONCE_ON_CPU if rows.device.type == "cpu" else max(len(rows), 1)
        return self.lengths[rows].argsort().split(at_once)


@dataclass(frozen=True)
class _Look:
    """What facts give with some neurons.

    [F] losses, [F] whether right, [F] margins and what these may be off (without a gradient),
    [F, dim] gradient.
    """

    losses: Tensor
    right: Tensor
    margins: Tensor
    unsure: Tensor
    gradient: Tensor
