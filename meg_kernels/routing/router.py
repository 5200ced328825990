"""`Router`: the path of a query, text -> condition -> gate -> fact -> neuron.

    router = Router.from_pretrained("edited")       # no language model is loaded
    routing = router.route(["What is the capital of France?", "Who wrote Emma?"])
    neurons, index = router.neurons(routing)        # for `attached.neurons(neurons, index)`

A batch waits for its device once, for the gate's scores and the nearest facts; everything that
follows from them is decided on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meg_kernels.checks import FLAG, check_fields, instance_of
from meg_kernels.conversation import Prompts, as_prompts
from meg_kernels.familiarity import SimilarityGate, nearest_few
from meg_kernels.neuron import Neurons
from meg_kernels.routing.edits import Edits
from meg_kernels.routing.neuron_cache import NeuronCache, Served
from meg_kernels.routing.saving import load_edited
from meg_kernels.routing.spans import Span, spans
from meg_kernels.routing.spelling import Spelling, vocabulary_of
from meg_kernels.scoped import OwnLock
from meg_kernels.text_encoder import TextEncoder
from meg_kernels.texts import is_question, names, normalized_query

FEW_FACTS = 8  # the nearest ones to a query, among which is the one whose subject it names
FEW_SPANS = 8  # of more, words are corrected to those of the edited queries only


@dataclass(frozen=True)
class RoutingConfig:
    """How queries find their neurons.

    Args:
        snap: give the generator the nearest edited query's condition, which it was trained on,
            instead of the query's own.
        require_subject: whether a query must name the subject of an edited fact to be taken for
            it, where that is known and the fact's own query names it.
        serve_unlearnt: whether facts that the model did not answer with their own neuron when it
            was collected have neurons all the same. By default, the base model answers for them: a
            neuron that does not give its answer may spoil the base model's.

    Raises:
        ValueError: a field is not True or False; it is named.
    """

    snap: bool = True
    require_subject: bool = True
    serve_unlearnt: bool = False

    def __post_init__(self) -> None:
        check_fields(self, snap=FLAG, require_subject=FLAG, serve_unlearnt=FLAG)


@dataclass(frozen=True)
class Routing:
    """Where the queries of a batch go. All but `z` is on the CPU.

    A prompt that holds more than a query goes where the best of its spans goes: one that is
    accepted, before others; among several, the one with the highest score.

    Args:
        accepted: [B] bool: whether the query is taken for an edited one, and has its neuron.
        fact: [B] int64: the row of the edited fact nearest to it; with a similarity gate, of the
            nearest few, the first one whose subject it names, if there is any; -1 if nothing is
            edited.
        score: [B] the gate's score, float32; of similarity to that fact.
        named: [B] bool: false where the query would have to name that fact's subject and does not.
        z: [B, dim] the queries' conditions.
        edits: what was edited when this was decided.
        left_to_base: [B] bool: whether the query is taken for an edited one whose fact was not
            learnt, so that the base model answers it.
        snap: whether neurons are those of the facts' own queries, as `RoutingConfig` has it.
        spans: [B] the span of each prompt that decided.
        several: by the number of a prompt that asks several edited questions, one in a sentence,
            where each of them goes.
    """

    accepted: Tensor
    fact: Tensor
    score: Tensor
    named: Tensor
    z: Tensor
    edits: Edits | None
    left_to_base: Tensor
    snap: bool
    spans: tuple[Span, ...]
    several: Mapping[int, Routing] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.accepted)

    def __repr__(self) -> str:
        edited = int(self.accepted.sum())
        return f"Routing({len(self)} prompts, {edited} edited, {len(self.several)} with several)"

    def of(self, rows: Sequence[int]) -> Routing:
        """Where these queries of the batch go."""
        picked = {name: getattr(self, name)[[*rows]] for name in _OF_A_BATCH}
        several = {i: self.several[row] for i, row in enumerate(rows) if row in self.several}
        spans = tuple(self.spans[row] for row in rows)
        return dataclasses.replace(self, **picked, spans=spans, several=several)

    def each_question(self) -> tuple[Routing, list[int]]:
        """The same with a row for each question of a prompt that asks several edited ones.

        Returns:
            The routing of N rows, and the number of the prompt that each row is of, in order.
        """
        parts = [self.several.get(row, self.of([row])) for row in range(len(self))]
        owners = [row for row, part in enumerate(parts) for _ in range(len(part))]
        whole: dict[str, Any] = {
            name: torch.cat([getattr(p, name) for p in parts]) for name in _OF_A_BATCH
        }
        spans = tuple(span for part in parts for span in part.spans)
        return dataclasses.replace(self, **whole, spans=spans, several={}), owners

    def answers(self) -> list[str]:
        """[B] the edited answers of the queries that were accepted; of the others, none."""
        facts = () if self.edits is None else self.edits.facts
        accepted = zip(self.accepted.tolist(), self.fact.tolist(), strict=True)
        return [facts[fact].answer if taken else "" for taken, fact in accepted]


_OF_A_BATCH = ("accepted", "fact", "score", "named", "z", "left_to_base")


@dataclass(frozen=True)
class _By:
    """What queries are routed by: one value, so that no query meets half of a change."""

    encoder: TextEncoder
    edits: Edits | None
    config: RoutingConfig

    def __post_init__(self) -> None:
        check_fields(
            self,
            encoder=instance_of(TextEncoder),
            edits=instance_of(Edits).or_none(),
            config=instance_of(RoutingConfig),
        )

    @functools.cached_property
    def spelling(self) -> Spelling:
        """What misspelt words are corrected by."""
        facts = () if self.edits is None else self.edits.facts
        return Spelling((fact.query for fact in facts), vocabulary_of(self.encoder.tokenizer))


class Router:
    """Finds the neuron of each query, if it has one. It knows no language model.

    Args:
        encoder: makes conditions of texts.
        edits: what is edited; None: nothing yet.
        config: how queries find their neurons.
        device: where conditions are compared and neurons are made; default: the encoder's.

    Threads may share a router. `put` changes what it routes by, all at once; batches that are on
    their way finish with what they began with.

    Attributes:
        served: counts the queries that were routed, and what they cost.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        edits: Edits | None = None,
        config: RoutingConfig | None = None,
        device: torch.device | None = None,
    ):
        self._by = _By(encoder, edits, RoutingConfig() if config is None else config)
        self.device = encoder.model.device if device is None else device
        self.served = Served()
        self._cache, self._changing = NeuronCache(), OwnLock()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device | None = None
    ) -> Router:
        """The router of an edited model that was saved to `folder`.

        Args:
            folder: where `MeGEditor.save_pretrained` or `meg edit` wrote.
            device: where the encoder and the generator run; default: an accelerator if there is
                one.

        Raises:
            FileNotFoundError: there are no edits.
            CorruptFileError: a file is damaged, or of a newer version of the format.
        """
        saved, encoder = load_edited(folder, device)
        names = (f.name for f in dataclasses.fields(RoutingConfig))
        config = RoutingConfig(**{name: saved.config[name] for name in names})
        return cls(encoder, saved.edits, config, saved.edits.conditions.device)

    @property
    def encoder(self) -> TextEncoder:
        """What makes conditions of texts."""
        return self._by.encoder

    @property
    def edits(self) -> Edits | None:
        """What is edited; None: nothing."""
        return self._by.edits

    @edits.setter
    def edits(self, edits: Edits | None) -> None:
        self.put(edits)

    @property
    def config(self) -> RoutingConfig:
        """How queries find their neurons."""
        return self._by.config

    @config.setter
    def config(self, config: RoutingConfig) -> None:
        with self._changing:
            self.put(self.edits, config=config)

    def put(
        self,
        edits: Edits | None,
        encoder: TextEncoder | None = None,
        config: RoutingConfig | None = None,
    ) -> None:
        """Route by other edits from now on; encoder and configuration stay unless given."""
        with self._changing:
            by = self._by
            encoder = by.encoder if encoder is None else encoder
            self._by = _By(encoder, edits, by.config if config is None else config)

    def __repr__(self) -> str:
        edited = 0 if self.edits is None else len(self.edits)
        return f"Router({edited} facts, {self.config}, on {self.device})"

    @property
    def requires_subject(self) -> bool:
        """Whether a query must name the subject of an edited fact to be taken for it."""
        return self.config.require_subject

    @property
    def num_left_to_base(self) -> int:
        """How many edited facts the base model answers for, because they were not learnt."""
        by = self._by
        return 0 if by.edits is None or by.config.serve_unlearnt else by.edits.num_unlearnt

    def protocol(self) -> dict[str, Any]:
        """What a report on the edited model must say of how its queries are answered, JSON-able."""
        assert self.edits is not None
        how = {"require_subject": self.requires_subject, "snap": self.config.snap}
        return how | self.edits.protocol() | {"left_to_base": self.num_left_to_base}

    def forget(self) -> None:
        """Empty the cache of neurons, after the generator was changed in place."""
        self._cache.clear()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[B, dim] the texts' conditions, on the router's device."""
        return self.encoder.encode(texts).to(self.device)

    def route(self, prompts: Prompts) -> Routing:
        """Which of the prompts ask an edited query in some wording, and the fact nearest to each.

        Args:
            prompts: queries, texts with a query in them, and conversations; one conversation alone
                is a batch of one. There are B of them.

        Raises:
            TypeError: prompts that are neither texts nor conversations.
            ValueError: a text with half of a surrogate pair, or a conversation that does not end
                with what the user says.
        """
        by, prompts = self._by, as_prompts("prompts", prompts)
        edits = by.edits or None  # none, too, where it is only prepared and has no facts
        parts = [spans(prompt) for prompt in prompts]
        if edits is not None:
            parts = [[*found, *_respelt(found, by.spelling)] for found in parts]
        owner = torch.tensor([row for row, found in enumerate(parts) for _ in found]).long()
        looked = [span for found in parts for span in found]
        # What a follow-up follows is looked at as well, to be compared with.
        followed = [place for place, span in enumerate(looked) if span.follows]
        texts = [span.text for span in looked] + [looked[place].follows for place in followed]
        z = by.encoder.encode(texts).to(self.device)
        if edits is None:
            first = _first_of(owner, len(parts))
            nowhere = torch.full((len(parts),), -1)
            score, none, named = nowhere.float(), nowhere > 0, nowhere < 0
            decided = tuple(looked[place] for place in first.tolist())
            z = z[first.to(z.device)]
            return Routing(none, nowhere, score, named, z, None, none, by.config.snap, decided)
        score, fact, named = _looked_at(by, edits, texts, z)
        score, before = score.tensor_split([len(looked)])
        z, fact, named = z[: len(looked)], fact[: len(looked)], named[: len(looked)]
        accepted = (score > edits.gate.threshold) & named
        accepted[followed] &= score[followed] > before
        best = _best_of(owner, accepted, score, len(parts)).tolist()
        left = torch.zeros_like(accepted)
        if not by.config.serve_unlearnt:
            left = accepted & ~edits.learnt[fact]
        accepted = accepted & ~left
        snap = by.config.snap
        each = Routing(accepted, fact, score, named, z, edits, left, snap, tuple(looked))
        asked = _questions(owner, each)
        several = {row: each.of(places) for row, places in asked.items() if len(places) > 1}
        return dataclasses.replace(each.of(best), several=several)

    def neurons(self, routing: Routing) -> tuple[Neurons | None, Tensor]:
        """The neurons of the queries that were accepted.

        Args:
            routing: of a batch of B queries.

        Returns:
            Some neurons, None if no query was accepted; and int64 [B] on the CPU: the row of each
            query's neuron among them, -1 if it has none.
        """
        instance_of(Routing)("routing", routing)
        rows = routing.accepted.nonzero()[:, 0]
        index = torch.full((len(routing),), -1)
        self._count(Served(queries=len(routing), edited=len(rows)))
        if not len(rows):
            return None, index
        edits = routing.edits
        assert edits is not None  # nothing is accepted where nothing is edited
        if routing.snap:  # each fact's neuron is made once
            facts, index[rows] = routing.fact[rows].unique(return_inverse=True)
            z, keys = edits.inputs(facts), [edits.keys[row] for row in facts.tolist()]
        else:
            facts, index[rows] = routing.fact[rows], torch.arange(len(rows))
            own = routing.z[rows]
            z, keys = edits.inputs(facts, own), edits.keys_of(facts, own)
        return self._made(edits, facts, z, keys), index

    def _made(self, edits: Edits, facts: Tensor, z: Tensor, keys: list[bytes]) -> Neurons:
        """Neurons for what the generator is given, z [A, ...], for edited facts [A]."""
        if not edits.num_waiting:
            made, served = self._cache.generate(edits.generator, z, keys)
            self._count(served)
            return made
        generated = edits.generated[facts]
        rows = generated.nonzero()[:, 0].tolist()
        made, served = self._cache.generate(edits.generator, z[rows], [keys[row] for row in rows])
        self._count(served + Served(reused=len(facts[~generated].unique())))
        flat = edits.layout.pack(edits.neurons[facts]).to(z.device)
        flat[rows] = edits.layout.pack(made).to(flat.dtype)
        return edits.layout.unpack(flat)

    def _count(self, more: Served) -> None:
        with self._changing:
            self.served += more


def _respelt(found: Sequence[Span], spelling: Spelling) -> Iterator[Span]:
    """The spans that hold misspelt words, with those as they are meant."""
    own = len(found) > FEW_SPANS
    for span in found:
        text = spelling.corrected(span.text, own)
        if text != span.text:
            follows = spelling.corrected(span.follows, own)
            yield dataclasses.replace(span, text=text, follows=follows)


def _looked_at(
    by: _By, edits: Edits, texts: Sequence[str], z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of texts, the edited facts nearest to them, and whether they name their subjects.

    Returns:
        [S] float32, [S] int64 and [S] bool, on the CPU.
    """
    gate, required = edits.gate, by.config.require_subject
    is_similarity = isinstance(gate, SimilarityGate)
    few = FEW_FACTS if required and is_similarity else 1
    similarity, rows = nearest_few(z, edits.conditions, few)
    score = similarity if is_similarity else gate.score(z).unsqueeze(1)
    # float64 holds both exactly.
    score, rows = torch.stack([score.double(), rows.double()]).cpu()
    score, rows = score.float(), rows.long()
    named = torch.ones(len(texts), dtype=torch.bool)
    first = torch.zeros(len(texts), dtype=torch.int64)
    if required:
        asked = [normalized_query(text) for text in texts]
        for place, near in enumerate(rows.tolist()):
            subjects = [edits.subjects[row] for row in near]
            able = (i for i, name in enumerate(subjects) if name and names(asked[place], name))
            found = 0 if subjects[0] is None else next(able, None)
            first[place], named[place] = found or 0, found is not None
    first = first.unsqueeze(1)
    return score.gather(1, first)[:, 0], rows.gather(1, first)[:, 0], named


def _questions(owner: Tensor, each: Routing) -> dict[int, list[int]]:
    """By prompt, the accepted spans that are sentences and questions, one of each fact, in order.

    Args:
        owner: [S] the prompt of each span.
        each: where each of the S spans goes.
    """
    best: dict[tuple[int, int], int] = {}  # of a sentence as it is and with its words corrected
    for place in each.accepted.nonzero()[:, 0].tolist():
        span, key = each.spans[place], (int(owner[place]), each.spans[place].start)
        if not (span.is_sentence and is_question(span.text)):
            continue
        if key not in best or each.score[place] > each.score[best[key]]:
            best[key] = place
    asked: dict[int, dict[int, int]] = {}
    for (row, _), place in sorted(best.items()):
        asked.setdefault(row, {}).setdefault(int(each.fact[place]), place)
    return {row: [*places.values()] for row, places in asked.items()}


def _first_of(owner: Tensor, count: int) -> Tensor:
    """[count] the first place of each prompt among the spans of all; owner [S] is in order."""
    return torch.searchsorted(owner, torch.arange(count))


def _best_of(owner: Tensor, accepted: Tensor, score: Tensor, count: int) -> Tensor:
    """[count] the place of each prompt's best span: an accepted one, then the highest score."""
    order = score.argsort(stable=True, descending=True)  # ties: the first span wins
    order = order[accepted[order].long().argsort(stable=True, descending=True)]
    order = order[owner[order].argsort(stable=True)]
    return order[_first_of(owner[order], count)]
