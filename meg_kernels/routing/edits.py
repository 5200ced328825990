"""What editing makes: facts with their conditions and neurons, a gate and a generator.

`Edits` is everything that is saved of an edited model beside its encoder, and everything that
answering needs. It never changes: each edit puts a new one in the place of the one before.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meg_kernels.checks import shown
from meg_kernels.facts import Fact, FactsError, check_facts, listed_facts
from meg_kernels.familiarity import Calibration, Gate, Rewording, transplant
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.routing.generators import Generator, HypernetworkGenerator, NeuronBank
from meg_kernels.routing.ridge import said
from meg_kernels.storage import fingerprint
from meg_kernels.texts import normalized_query

MADE_AT_ONCE = 1024  # neurons


@dataclass(frozen=True)
class HeldOut:
    """Conditions of queries that were neither edited nor tuned on; they calibrate gates.

    How their paraphrases lie can also teach a generator other wordings.

    Args:
        queries: [H, dim] of held-out facts, each repeated for each of its paraphrases.
        paraphrases: [H, dim] of those paraphrases.
        alike_queries: [L, dim] of held-out facts, each repeated for each query that looks like it.
        alike: [L, dim] of the queries that look like them and ask for something else.
        unrelated: [U, dim] of queries about anything.
        named: [H] bool: whether the paraphrase names the subject that its query names.
        alike_named: [L] bool: the same of the query that looks like it.
    """

    queries: Tensor
    paraphrases: Tensor
    alike_queries: Tensor
    alike: Tensor
    unrelated: Tensor
    named: Tensor
    alike_named: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def by_name(self) -> tuple[Tensor, Tensor]:
        """[H] and [L]: cosines of the paraphrases, and of what looks alike, to their own queries.

        They are -1 where a query that must name its subject does not.
        """
        positive = (self.queries * self.paraphrases).sum(1)
        negative = (self.alike_queries * self.alike).sum(1)
        return positive.where(self.named, -1.0), negative.where(self.alike_named, -1.0)

    @property
    def rewording(self) -> Rewording:
        """What turns any query's condition into that of another wording."""
        return Rewording(self.queries, self.paraphrases)

    def positive(self, conditions: Tensor, rng: torch.Generator) -> Tensor:
        """[H, dim] the paraphrases, moved beside the edited queries' conditions [N, dim]."""
        beside = _any_of(conditions, len(self.queries), rng)
        return transplant(self.paraphrases, self.queries, beside)

    def negative(self, conditions: Tensor, rng: torch.Generator) -> Tensor:
        """[L + U, dim] the queries that look alike, moved beside them, and the unrelated ones."""
        beside = _any_of(conditions, len(self.alike_queries), rng)
        return torch.cat([transplant(self.alike, self.alike_queries, beside), self.unrelated])


def _any_of(conditions: Tensor, count: int, rng: torch.Generator) -> Tensor:
    rows = torch.randint(len(conditions), (count,), generator=rng)
    return conditions[rows.to(conditions.device)]


@dataclass(frozen=True)
class Training:
    """How a training went.

    Args:
        steps: optimisation steps taken.
        answered: share of edited queries answered right by generated neurons at the end.
        history: (step, loss, answered, distance) at each trial: the mean loss since the trial
            before, the share of tried queries answered right, and the relative L2 distance of the
            standardised neurons from the collected ones. If the first queries of a trial showed
            that its share cannot be enough, answered is the share of those.
        seconds: from the start to each trial, including those before an interruption.
        seconds_before: the seconds before an interruption.
    """

    steps: int
    answered: float
    history: tuple[tuple[int, float, float, float], ...] = ()
    seconds: tuple[float, ...] = field(default=(), compare=False)
    seconds_before: float = field(default=0.0, compare=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Training:
        """The training whose `dataclasses.asdict`, by way of JSON, gave these values."""
        history = tuple(map(tuple, values["history"]))
        return cls(**(dict(values) | {"history": history, "seconds": tuple(values["seconds"])}))


@dataclass(frozen=True)
class EditReport:
    """How one step of editing went; `Edits.report` is the sum of all of them.

    Args:
        unlearnt: facts that the model does not answer even with their own neuron.
        calibration: of the gate, on held-out queries; None if the gate kept its threshold.
        training: of the generator; None if none was trained.
        seconds: that each stage took: collect, encoder, gate, generator or distill; including what
            an interruption ended.
        num_left_out: facts that were not edited, because the model gave their answers already.
        num_predicted: facts whose neurons a hypernetwork told, so that none was fitted for them; it
            is not saved.
    """

    unlearnt: tuple[Fact, ...]
    calibration: Calibration | None
    training: Training | None
    seconds: dict[str, float]
    num_left_out: int = 0
    num_predicted: int = field(default=0, compare=False)

    def __add__(self, later: EditReport) -> EditReport:
        """Both steps; of calibration and training the later one."""
        stages = dict.fromkeys([*self.seconds, *later.seconds])
        seconds = {s: self.seconds.get(s, 0.0) + later.seconds.get(s, 0.0) for s in stages}
        return EditReport(
            self.unlearnt + later.unlearnt,
            later.calibration or self.calibration,
            later.training or self.training,
            seconds,
            self.num_left_out + later.num_left_out,
            self.num_predicted + later.num_predicted,
        )


@dataclass(frozen=True)
class Edits:
    """Edited facts and what answers them.

    Args:
        facts: N edited facts.
        conditions: [N, dim] unit vectors of their queries.
        neurons: the N neurons that were collected for them, on the CPU; a hypernetwork's are those
            that it makes.
        initial: the one neuron that the collection started from.
        held_out: what gates are calibrated on.
        gate: decides whether a query is one of the edited ones.
        generator: makes the neurons.
        generated: [N] bool, on the CPU: whether the generator makes this fact's neuron. The others
            have their collected neurons: they were added since it was trained, or it is a
            hypernetwork, which does not tell all facts.
        report: of all steps so far.
        answers: [N, A] what is known of the facts' answers, for a generator that is given it; None
            for another.
    """

    facts: tuple[Fact, ...]
    conditions: Tensor
    neurons: Neurons
    initial: Neurons
    held_out: HeldOut
    gate: Gate
    generator: Generator
    generated: Tensor
    report: EditReport = field(repr=False)
    answers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.generator.config.knows_answers != (self.answers is not None):
            raise ValueError(
                "answers must be given to a generator that knows them, and to no other"
            )

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def layout(self) -> NeuronLayout:
        """The layout of all these neurons."""
        return self.initial.layout

    @property
    def calibration(self) -> Calibration:
        """The gate's, when it was calibrated last."""
        assert self.report.calibration is not None  # a first edit calibrates
        return self.report.calibration

    @property
    def training(self) -> Training:
        """The generator's, when it was trained last."""
        assert self.report.training is not None  # a first edit trains
        return self.report.training

    @functools.cached_property
    def keys(self) -> list[bytes]:
        """What tells each fact's condition, and its answer, from others, on the host."""
        return self.keys_of(torch.arange(len(self)), self.conditions)

    def inputs(self, rows: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """What the generator is given for these facts, [B, its condition_dim].

        Args:
            rows: [B] of the facts; None: of all.
            z: [B, dim] conditions that stand in for those of the facts' own queries.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        z = self.conditions[rows.to(self.conditions.device)] if z is None else z
        return z if self.answers is None else said(z, self.answers[rows.to(self.answers.device)])

    @functools.cached_property
    def neuron_ids(self) -> list[str]:
        """What tells each fact's neuron from any other, alike in all processes that load these.

        A neuron that the generator makes is told by what it makes it from: two processors may make
        it a little differently.
        """
        made_by = fingerprint(
            self.generator.config.to_dict(), self.initial.key, *self.generator.state_dict().values()
        )
        is_stored = isinstance(self.generator, NeuronBank)
        flat = self.layout.pack(self.neurons).cpu().float().numpy()
        ids = []
        for row, generated in enumerate(self.generated.tolist()):
            made = generated and not is_stored
            content = made_by.encode() + self.keys[row] if made else flat[row].tobytes()
            ids.append(hashlib.blake2b(content, digest_size=16).hexdigest())
        return ids

    @functools.cached_property
    def rows_of_neurons(self) -> dict[str, int]:
        """Whose neuron it is, by the ids of neurons."""
        return {name: row for row, name in enumerate(self.neuron_ids)}

    @torch.no_grad()
    def served_neurons(self, rows: Tensor) -> Neurons:
        """The neurons with which queries of these facts [B] are answered, where they are made."""
        rows = rows.cpu()
        flat = self.layout.pack(self.neurons[rows])
        for places in self.generated[rows].nonzero()[:, 0].split(MADE_AT_ONCE):
            made = self.generator.generate(self.inputs(rows[places]))
            flat[places] = self.layout.pack(made).to(flat)
        return self.layout.unpack(flat)

    @property
    def is_hypernetworks(self) -> bool:
        """Whether the generator is a hypernetwork, which makes just the same neurons again."""
        return isinstance(self.generator, HypernetworkGenerator)

    @property
    def is_made_again(self) -> Tensor:
        """[N] bool, on the CPU: whether the generator makes just this fact's neuron again."""
        return self.generated if self.is_hypernetworks else torch.zeros_like(self.generated)

    def keys_of(self, rows: Tensor, z: Tensor) -> list[bytes]:
        """What tells what the generator makes for these facts from others, on the host.

        Args:
            rows: [B] of the facts.
            z: [B, dim] conditions that stand in for those of their own queries.
        """
        keys = condition_keys(z)
        if self.answers is None:
            return keys
        texts = (self.facts[row].answer.encode() for row in rows.tolist())
        return [key + text for key, text in zip(keys, texts, strict=True)]

    @functools.cached_property
    def subjects(self) -> list[str | None]:
        """What each fact's subject is called in queries: `Fact.named_subject`."""
        return [fact.named_subject for fact in self.facts]

    @functools.cached_property
    def num_waiting(self) -> int:
        """How many facts have a neuron that the generator was not trained to make."""
        return int((~self.generated).sum())

    @functools.cached_property
    def learnt(self) -> Tensor:
        """[N] bool, on the CPU: whether the model answered the fact with its collected neuron."""
        unlearnt = {fact.id for fact in self.report.unlearnt}
        return torch.tensor([fact.id not in unlearnt for fact in self.facts], dtype=torch.bool)

    @property
    def num_unlearnt(self) -> int:
        """How many facts the model did not answer with their collected neurons."""
        return int((~self.learnt).sum())

    def rows_of(self, facts: Iterable[Fact]) -> list[int]:
        """Where facts with the same queries stand in these edits; -1 for those that do not."""
        rows = {fact.normalized_query: row for row, fact in enumerate(self.facts)}
        return [rows.get(fact.normalized_query, -1) for fact in listed_facts(facts)]

    def rows_to_remove(self, names: str | Fact | Iterable[str | Fact]) -> set[int]:
        """Where the facts stand that are named by an id, by a query, or by themselves.

        Args:
            names: one name, or several.

        Raises:
            KeyError: a name that is none of these.
            TypeError: a name that is neither text nor a fact.
        """
        if isinstance(names, str | Fact):
            names = [names]
        if not isinstance(names, Iterable) or isinstance(names, bytes | Mapping):
            raise TypeError(
                f"facts is {shown(names)}; it must be an id, a query, a Fact, or a list of them"
            )
        by_id = {fact.id: row for row, fact in enumerate(self.facts)}
        by_query = {fact.normalized_query: row for row, fact in enumerate(self.facts)}
        rows = set()
        for i, name in enumerate(names):
            if not isinstance(name, str | Fact):
                raise TypeError(f"facts[{i}] is {shown(name)}; it must be an id, a query or a Fact")
            given_id, query = (name.id, name.query) if isinstance(name, Fact) else (name, name)
            row = by_id.get(given_id)
            if row is None:
                row = by_query.get(normalized_query(query))
            if row is None:
                raise KeyError(
                    f"no edited fact has the id or the query {name!r}; `meg list` shows them all"
                )
            rows.add(row)
        return rows

    def without(self, gone: Collection[int]) -> Edits:
        """These edits but for the facts in the rows `gone`; the gate keeps its threshold."""
        kept = [row for row in range(len(self)) if row not in gone]
        facts = tuple(self.facts[row] for row in kept)
        left = set(facts)
        return self._over(
            facts,
            self.conditions[kept],
            self.neurons[kept],
            self.generated[kept],
            None if self.answers is None else self.answers[kept],
            dataclasses.replace(
                self.report, unlearnt=tuple(f for f in self.report.unlearnt if f in left)
            ),
        )

    def beside(self, facts: Sequence[Fact], replace: bool) -> Edits:
        """These edits as further facts can be put beside them.

        Args:
            facts: the further ones, no two with one query or id.
            replace: leave out what has the query or the id of one of them.

        Raises:
            FactsError: one of them has the query or the id of an edited fact; the message names
                both.
        """
        facts, left = listed_facts(facts), self
        if replace:
            ids, queries = {fact.id for fact in facts}, {fact.normalized_query for fact in facts}
            taken = {f for f in self.facts if f.id in ids or f.normalized_query in queries}
            left = self.without({row for row, f in enumerate(self.facts) if f in taken})
        try:
            check_facts(facts, left.facts)
        except FactsError as error:
            hint = "with replace=True (meg add --replace) they take the place of the edited ones"
            raise FactsError(f"{error}\n{hint}") from None
        return left

    def joined(
        self,
        facts: Sequence[Fact],
        conditions: Tensor,
        neurons: Neurons,
        generated: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> Edits:
        """These edits and further facts, whose collected neurons answer them.

        The generator stays as it is, and the gate keeps its threshold.

        Args:
            facts: F facts with other queries and ids.
            conditions: [F, dim] of their queries.
            neurons: the F neurons collected for them.
            generated: [F] bool: whether the generator makes these; None: none of them.
            answers: [F, A] what is known of their answers, for a generator that is given it.
        """
        generated = torch.zeros(len(facts), dtype=torch.bool) if generated is None else generated
        if self.answers is not None and answers is not None:
            answers = torch.cat([self.answers, answers.to(self.answers.device)])
        return self._over(
            (*self.facts, *facts),
            torch.cat([self.conditions, conditions]),
            Neurons.cat([self.neurons, neurons]),
            torch.cat([self.generated, generated]),
            answers,
            self.report,
        )

    def _over(
        self,
        facts: tuple[Fact, ...],
        conditions: Tensor,
        neurons: Neurons,
        generated: Tensor,
        answers: Tensor | None,
        report: EditReport,
    ) -> Edits:
        generator = self.generator
        if isinstance(generator, NeuronBank):  # which holds just the neurons of what is edited
            generator = copy.deepcopy(generator)
            generator.store(conditions, neurons.to(conditions.device))
            generated = torch.ones_like(generated)
        return dataclasses.replace(
            self,
            facts=facts,
            conditions=conditions,
            neurons=neurons,
            gate=self.gate.over(conditions),
            generator=generator,
            generated=generated,
            report=report,
            answers=answers,
        )

    def identity(self) -> list[Any]:
        """JSON-able values and tensors that tell these edits from any others."""
        return [
            self.gate.kind,
            self.gate.threshold,
            self.generator.config.to_dict(),
            self.conditions,
            self.layout.pack(self.neurons)[~self.is_made_again],
            self.generated,
            *([] if self.answers is None else [self.answers]),
            *self.gate.state_dict().values(),
            *self.generator.state_dict().values(),
        ]

    def protocol(self) -> dict[str, Any]:
        """What a report on these edits must say of them, JSON-able."""
        config = self.generator.config.to_dict()
        return {
            "gate": self.gate.kind,
            "generator": config["kind"],
            "sampler": config.get("sampler"),
            "seed": config.get("training", {}).get("seed"),  # the generator's; a bank has none
            "edited_facts": len(self),
            "generated_facts": len(self) - self.num_waiting,
            "left_out": f"{self.report.num_left_out} facts that the base model answered so already",
            "threshold": self.gate.threshold,
            "threshold_calibrated_on": dataclasses.asdict(self.calibration),
        }


def condition_keys(conditions: Tensor) -> list[bytes]:
    """For each of the conditions [B, dim] what it can be found again by; copies it to the host."""
    return [row.tobytes() for row in conditions.float().cpu().numpy()]
