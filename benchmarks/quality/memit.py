"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al., ICLR 2023, arXiv 2210.07229).

Written from the paper. First, for each fact, the state z = h + δ which the last critical layer L is
to leave at the subject's last token: within the ball |δ| <= c |h|, δ goes down

    mean over prefixes x of -log p(answer | x, query)  +  w KL(p(. | "subject is a") || before)

Then, from the lowest critical layer to L, the output projection of layer l gets its share of what
is missing (eqs. 14, 15 and 20):

    R = (z - h) / (L - l + 1)        h as L leaves it after the layers below l were updated
    Δ = R Kᵀ (C + K Kᵀ)⁻¹            K: what the projection reads there, a mean over the prefixes
    C = λ E[k kᵀ]                    over the tokens of any text

The paper's text for C is Wikipedia. Here is no network: the model samples the text itself, as
answers to the package's unrelated queries. All facts are optimised at once, each with its own δ,
and what lies below the critical layers runs once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from re import IGNORECASE, escape, search
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm, trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.editing.prompting import (
    PromptedModel,
    PromptTemplate,
    TargetBatch,
    answer_text,
    score_targets,
    target_tokens,
)
from meg_kernels.facts import Fact
from meg_kernels.nn import LowerLayers, input_of
from meg_kernels.nn.families import decoder_layer, decoder_layers, feed_forward
from meg_kernels.nn.packing import frozen_products, projections
from meg_kernels.precision import fast_dtype
from meg_kernels.shipped import shipped_unrelated_queries

BEGINNINGS = ("The", "Therefore", "Because", "I", "You")  # of the prefixes, as the authors have it
PROMPTS_AT_ONCE = 16  # a CPU's caches hold some prompts' activations only
TEXTS_AT_ONCE = 100


@dataclass(frozen=True)
class MemitConfig:
    """How MEMIT edits.

    Args:
        last: the last critical layer; None: the one that our edits are in.
        num_layers: critical layers, up to that one.
        num_prefixes: random beginnings of a query, besides none.
        prefix_tokens: sampled for each of them, at most.
        learning_rate, max_steps: of Adam, which optimises δ.
        target_loss: below this, in nats, a fact's δ is left as it is.
        kl_factor: w.
        most_change: c.
        covariance_weight: λ.
        text_tokens: sampled for each of the 300 texts, at most.
    """

    last: int | None = None
    num_layers: int = 5
    num_prefixes: int = 1
    prefix_tokens: int = 10
    learning_rate: float = 0.5
    max_steps: int = 25
    target_loss: float = 0.05
    kl_factor: float = 0.0625
    most_change: float = 0.75
    covariance_weight: float = 15000.0
    text_tokens: int = 64

    def critical_layers(self, last: int) -> range:
        """The layers whose output projections are updated."""
        return range(max(last - self.num_layers + 1, 0), last + 1)


def apply_memit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    template: PromptTemplate,
    layer: int,
    *,
    seed: int = 0,
    config: MemitConfig | None = None,
    moments: Mapping[int, Tensor] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Edit `facts` into the critical layers' output projections, in place.

    Args:
        model: its output projections are `torch.nn.Linear`s; float32.
        tokenizer: the model's, one that tells where in a text its tokens stand.
        facts: those without a subject in their query are edited at the query's last token.
        template: how queries become prompts.
        layer: the last critical one, from 0; not the model's last.
        seed: of the prefixes and of the sampled text.
        config: how to edit.
        moments: E[k kᵀ] [n, n] of each critical layer; default: of text sampled from the model.
        progress: show progress bars.

    Returns:
        `reached`, the number of facts that their own z answers, and `layers`.
    """
    config = config or MemitConfig()
    layers = config.critical_layers(layer)
    if moments is None:
        texts = sampled_texts(model, tokenizer, template, config.text_tokens, seed, progress)
        moments = key_moments(model, tokenizer, layers, texts)
    prefixes = sampled_prefixes(model, tokenizer, config, seed)
    edit = _Edit(model, tokenizer, facts, template, layers, prefixes)
    targets, reached = edit.target_states(config, progress)
    for critical in tqdm(layers, desc="updating layers", disable=not progress, leave=False):
        keys, states = edit.keys_and_states(critical)
        residuals = (targets - states) / (layer - critical + 1)
        covariance = config.covariance_weight * moments[critical]
        update = least_squares_update(keys, residuals, covariance)
        output_projection(model, critical).weight.data += update.float()
    return {"reached": reached, "layers": [*layers]}


def least_squares_update(keys: Tensor, residuals: Tensor, covariance: Tensor) -> Tensor:
    """The Δ [d, n] that minimises sum over facts |Δ k - r|² + tr(Δ C Δᵀ), in float64.

    Args:
        keys: [F, n], a fact's k each.
        residuals: [F, d], its r.
        covariance: C [n, n].
    """
    keys, residuals = keys.double(), residuals.double()
    return torch.linalg.solve(covariance.double() + keys.T @ keys, keys.T @ residuals).T


# ---- text from the model itself ---------------------------------------------------------------


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global random numbers are those of `seed`; afterwards, as if nothing was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def sampled_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MemitConfig, seed: int
) -> list[str]:
    """The beginnings of a query under which its answer is to be the same, the empty one first."""
    starts = [BEGINNINGS[i % len(BEGINNINGS)] for i in range(config.num_prefixes)]
    if not starts:
        return [""]
    with seeded(seed):
        prompted = PromptedModel.of(model, tokenizer)
        said = prompted.answers(starts, config.prefix_tokens, do_sample=True)
    texts = (
        f"{start} {answer_text(tokenizer, tokens)}"
        for start, tokens in zip(starts, said, strict=True)
    )
    return ["", *(f"{text.strip()}. " for text in texts)]


@torch.no_grad()
def sampled_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    tokens: int,
    seed: int,
    progress: bool = False,
) -> list[list[int]]:
    """Token ids of the package's unrelated queries in the template, each as the model goes on."""
    prompts = sorted(map(template.format, shipped_unrelated_queries()), key=len)
    ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    texts = []
    starts = range(0, len(prompts), TEXTS_AT_ONCE)
    tokenizer.padding_side = "left"
    with seeded(seed), frozen_products([model], fast_dtype(model.device, model.dtype)):
        for start in tqdm(starts, desc="sampling text", disable=not progress, leave=False):
            some = prompts[start : start + TEXTS_AT_ONCE]
            batch = tokenizer(some, return_tensors="pt", padding=True).to(model.device)
            batch.pop("token_type_ids", None)
            output = model.generate(  # type: ignore[operator]
                **batch,
                do_sample=True,
                max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts += [[token for token in row if token not in ends] for row in output.tolist()]
    return texts


@torch.no_grad()
def key_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: range,
    texts: Sequence[list[int]],
) -> dict[int, Tensor]:
    """E[k kᵀ] [n, n], float64, of what each output projection reads at the texts' tokens."""
    texts = sorted(texts, key=len)
    sums: dict[int, Tensor] = {}
    above = decoder_layer(model, layers[-1] + 1)
    prompted = PromptedModel.of(model, tokenizer)
    with frozen_products([model], fast_dtype(model.device, model.dtype)):
        for start in range(0, len(texts), PROMPTS_AT_ONCE):
            some = texts[start : start + PROMPTS_AT_ONCE]
            inputs = prompted.batch([(text, [tokenizer.eos_token_id]) for text in some]).inputs
            real = inputs["attention_mask"].bool()
            with _read_by_projections(model, layers) as read:
                input_of(above, model, inputs)
            for layer, keys in read.items():
                seen = keys[real].double()
                sums[layer] = sums.get(layer, 0) + seen.T @ seen
    tokens = sum(map(len, texts))
    return {layer: moments / tokens for layer, moments in sums.items()}


def output_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The last of the projections in this layer's FFN: the one whose output is the FFN's."""
    return [*projections([feed_forward(model, layer).exit])][-1]


@contextmanager
def _read_by_projections(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict]:
    """What the output projections of these layers read, [B, T, n] by layer, as the model runs."""
    read: dict[int, Tensor] = {}

    def note(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[layer] = args[0]

    hooks = [
        output_projection(model, layer).register_forward_pre_hook(partial(note, layer))
        for layer in layers
    ]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


# ---- prompts and the states that their subjects leave -------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    """One prompt of a fact.

    Args:
        fact: its number.
        ids, target: token ids of the prompt and of what is to follow.
        subject: which of `ids` is the subject's last.
        bare: whether it is the query without a prefix.
    """

    fact: int
    ids: list[int]
    target: list[int]
    subject: int
    bare: bool


@dataclass
class _Rows:
    """Prompts that go through the model at once.

    Args:
        batch: [R] prompts.
        fact: [R] the facts that they belong to.
        subject: [R] the column of the subject's last token, from the right: -1 is the last.
        bare: [R] whether a row has no prefix.
        entering, leaving: [R, T, d] hidden states that enter the first critical layer, and that
            the last one leaves before any update.
    """

    batch: TargetBatch
    fact: Tensor
    subject: Tensor
    bare: Tensor
    entering: Tensor
    leaving: Tensor

    def at_subject(self, states: Tensor) -> Tensor:
        """[R, n] of `states` [R, T, n]."""
        return states[torch.arange(len(states)), self.subject]


def subject_end(fact: Fact) -> int:
    """Where in the query its subject ends; without one, the query's end."""
    query = fact.query.strip()
    found = search(escape(fact.subject.strip()), query, IGNORECASE) if fact.subject else None
    return len(query) if found is None else found.end()


def token_at(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> int:
    """The number of the token which holds the last character before `end`."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (first, last) in enumerate(offsets) if first < end and first < last)


class _Edit:
    """The facts' prompts, and what the model makes of them at their subjects' last tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        template: PromptTemplate,
        layers: range,
        prefixes: Sequence[str],
    ):
        self.model, self.layers = model, layers
        self.num_facts, self.num_prefixes = len(facts), len(prefixes)
        self.lower = LowerLayers(model, layers[0])
        self.below_next = LowerLayers(model, layers[-1] + 1)
        after = template.text.partition("{}")[2]  # of the query
        queries, essences = [], []
        for i, fact in enumerate(facts):
            query, end = fact.query.strip(), subject_end(fact)
            for prefix in prefixes:
                text = template.format(prefix + query)
                ids, target = target_tokens(tokenizer, text, fact.answer)
                place = token_at(tokenizer, text, len(text) - len(after) - len(query) + end)
                queries.append(_Prompt(i, ids, target, place, bare=not prefix))
            subject = fact.subject.strip() if fact.subject else query
            text = template.format(f"{subject} is a")
            place = token_at(tokenizer, text, len(text) - len(after) - len(" is a"))
            ids = tokenizer(text).input_ids
            essences.append(_Prompt(i, ids, [tokenizer.eos_token_id], place, bare=False))
        with frozen_products(decoder_layers(model)[: layers[0]], model.dtype):
            self.queries = self._rows(queries, tokenizer)
            self.essences = self._rows(essences, tokenizer)

    @torch.no_grad()
    def _rows(self, prompts: list[_Prompt], tokenizer: PreTrainedTokenizerBase) -> list[_Rows]:
        prompted = PromptedModel.of(self.model, tokenizer)
        prompts = sorted(prompts, key=lambda prompt: len(prompt.ids) + len(prompt.target))
        rows = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[start : start + PROMPTS_AT_ONCE]
            batch = prompted.batch([(p.ids, p.target) for p in some])
            entering = self.lower.run(**batch.inputs)
            with self.lower.replaced_by(entering):
                leaving = self.below_next.run(**batch.inputs)
            subject = [p.subject - len(p.ids) - len(p.target) + 1 for p in some]
            numbers = (torch.tensor([p.fact for p in some]), torch.tensor(subject))
            bare = torch.tensor([p.bare for p in some])
            rows.append(_Rows(batch, *numbers, bare, entering, leaving))
        return rows

    @torch.no_grad()
    def keys_and_states(self, layer: int) -> tuple[Tensor, Tensor]:
        """K [F, n] of this layer and h [F, d] of the last critical one, as the model is now."""
        projection = output_projection(self.model, layer)
        keys = torch.zeros(self.num_facts, projection.in_features)
        states = torch.empty(self.num_facts, projection.out_features)
        for rows in self.queries:
            with (
                self.lower.replaced_by(rows.entering),
                _read_by_projections(self.model, [layer]) as read,
            ):
                leaving = self.below_next.run(**rows.batch.inputs)
            keys.index_add_(0, rows.fact, rows.at_subject(read[layer]) / self.num_prefixes)
            states[rows.fact[rows.bare]] = rows.at_subject(leaving)[rows.bare]
        return keys, states

    def target_states(self, config: MemitConfig, progress: bool) -> tuple[Tensor, int]:
        """z [F, d] of all facts, and how many of them came below the target loss."""
        model = self.model
        _, states = self.keys_and_states(self.layers[-1])
        radius = config.most_change * states.norm(dim=1, keepdim=True)
        delta = torch.zeros_like(states, requires_grad=True)
        adam = torch.optim.Adam([delta], config.learning_rate)
        active = torch.ones(self.num_facts, dtype=torch.bool)
        before: dict[int, Tensor] = {}  # by prompts: log p [R, vocabulary] after "subject is a"
        upper = [*decoder_layers(model)[self.layers[-1] + 1 :], model.get_output_embeddings()]
        # δ needs no more than bfloat16; keys, states and updates are float32.
        with frozen_products(upper, fast_dtype(model.device, model.dtype)):
            for _ in (bar := trange(config.max_steps, desc="target states", disable=not progress)):
                losses = torch.zeros(self.num_facts)
                adam.zero_grad()
                for rows in self.queries:
                    if (moved := self._moved(rows, active, delta)) is not None:
                        with moved.states_replaced:
                            loss = score_targets(model, moved.batch).losses / self.num_prefixes
                        loss.sum().backward()
                        losses.index_add_(0, moved.fact, loss.detach())
                for number, rows in enumerate(self.essences):
                    if (moved := self._moved(rows, active, delta)) is not None:
                        with moved.states_replaced:
                            logits = model(**moved.batch.inputs, logits_to_keep=1).logits[:, 0]
                        now = logits.float().log_softmax(-1)
                        was = before.setdefault(number, now.detach())[moved.rows]
                        kl = F.kl_div(was, now, reduction="none", log_target=True).sum(-1)
                        (config.kl_factor * kl).sum().backward()
                        losses.index_add_(0, moved.fact, config.kl_factor * kl.detach())
                active &= losses >= config.target_loss
                if not active.any():
                    break
                bar.set_postfix_str(f"{int((~active).sum())} of {self.num_facts} reached")
                left = delta.detach().clone()
                adam.step()
                with torch.no_grad():
                    within = delta * (radius / delta.norm(dim=1, keepdim=True)).clamp(max=1)
                    delta.copy_(torch.where(active.unsqueeze(1), within, left))
        return states + delta.detach(), int((~active).sum())

    def _moved(self, rows: _Rows, active: Tensor, delta: Tensor) -> _Moved | None:
        """Those of `rows` whose facts are active, with their δ at the subject; None without any."""
        chosen = active[rows.fact].nonzero()[:, 0]
        if not len(chosen):
            return None
        batch, fact = rows.batch[chosen], rows.fact[chosen]
        states = rows.leaving[chosen, -batch.inputs["input_ids"].shape[1] :]
        places = (torch.arange(len(chosen)), rows.subject[chosen])
        states = states.index_put(places, delta[fact], accumulate=True)
        return _Moved(chosen, batch, fact, self.below_next.replaced_by(states))


@dataclass(frozen=True)
class _Moved:
    """Some of the prompts that go through the model at once, with δ added at their subjects.

    Args:
        rows: [A] which of them.
        batch, fact: theirs, as in `_Rows`.
        states_replaced: a context in which the model goes on from the moved states.
    """

    rows: Tensor
    batch: TargetBatch
    fact: Tensor
    states_replaced: AbstractContextManager
