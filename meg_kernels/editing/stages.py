"""The work of editing: facts become `Edits`, and `Edits` become other `Edits`.

    first      facts -> tuned encoder -> collected neurons, gate -> trained generator
    prepared   the same, without the facts: what any facts are edited with
    added      further facts; the generator stays as it is
    trained    the generator learns what was added
    replaced   another generator, trained from the start
    distilled  a generator that samples in fewer steps

Nothing is put in place here: whoever holds edits puts the new ones there when they are whole.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from meg_kernels.checks import instance_of
from meg_kernels.editing.answered import answers_with
from meg_kernels.editing.collect import (
    Collection,
    Targets,
    collectable,
    fit_neurons,
    foresight,
)
from meg_kernels.editing.config import EditorConfig
from meg_kernels.editing.distill import Distillation, distill
from meg_kernels.editing.hypernetwork import known_answers
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.editing.train import train_generator
from meg_kernels.editing.trial import AnswersRight
from meg_kernels.editing.tuning import (
    Stopwatch,
    calibrated_gate,
    check_any,
    regated,
    tuned_router,
)
from meg_kernels.facts import Fact, FactsError
from meg_kernels.familiarity import Rewording
from meg_kernels.neuron import Neurons
from meg_kernels.nn import Attached
from meg_kernels.routing.edits import EditReport, Edits, Training
from meg_kernels.routing.generators import (
    DiTGenerator,
    Generator,
    GeneratorConfig,
    HypernetworkGenerator,
    build_generator,
)
from meg_kernels.routing.router import Router
from meg_kernels.text_encoder import TextEncoder, Wordings


@dataclass(frozen=True)
class Stages:
    """What editing works with.

    Args:
        prompted: the language model.
        attached: where in it the neurons sit.
        router: whose encoder makes the conditions; `first` tunes a copy of it.
        config: how to edit.
        work_folder: keeps finished work, so that an interrupted stage resumes; None: nothing.
        progress: show progress bars.
        targets: what neurons are collected for, by the id of the fact; `checked` finds it.
    """

    prompted: PromptedModel
    attached: Attached
    router: Router
    config: EditorConfig
    work_folder: str | Path | None = None
    progress: bool = False
    targets: Mapping[str, Targets] = field(default_factory=dict)

    def checked(self, facts: Sequence[Fact]) -> Stages:
        """These stages for facts that collection and the encoder can take, before any work.

        Raises:
            FactsError: facts that the model cannot be taught, or that the encoder cannot tell from
                others with the same beginning; the message names all of either.
            ValueError: a model that no neuron can be fitted for.
        """
        targets = collectable(self.prompted, self.attached, facts, self.config.collection)
        encoder = self.router.encoder
        if long := encoder.too_long([fact.query for fact in facts]):
            named = "\n".join(f"facts[{row}], {facts[row].query[:60]!r}..." for row in long)
            raise FactsError(
                f"{len(long)} of {len(facts)} facts have queries of more than the "
                f"{encoder.max_tokens} tokens that the encoder reads; shorten them or leave them "
                f"out:\n{named}"
            )
        by_id = {fact.id: target for fact, target in zip(facts, targets, strict=True)}
        return dataclasses.replace(self, targets=by_id)

    def first(
        self,
        facts: Sequence[Fact],
        wordings: Sequence[Wordings],
        unrelated: Sequence[str],
        num_left_out: int,
    ) -> tuple[Edits, TextEncoder]:
        """Edits of these facts alone, and the tuned encoder.

        Args:
            facts: with the new answers; they were `checked`, and so are those of `added`.
            wordings: of other facts, which tune the encoder and calibrate the gate.
            unrelated: queries about anything.
            num_left_out: how many facts the model answered already.
        """
        stopwatch, config = Stopwatch(), self.config
        # First, so that a network that cannot be built is not refused after hours.
        generator = self._built(config.generator)
        with stopwatch.stage("encoder"):
            router, held_out, before = tuned_router(
                self.router, wordings, unrelated, config, self.work_folder, self.progress
            )
            conditions = router.encode([fact.query for fact in facts])
        stopwatch.add("encoder", before)
        stages = dataclasses.replace(self, router=router)
        collection, answers = stages._collect(facts, conditions, None, stopwatch)
        with stopwatch.stage("gate"):
            gate, calibration = calibrated_gate(facts, conditions, held_out, config, self.progress)
        made = collection.hypernetwork
        is_told = isinstance(generator, HypernetworkGenerator)
        if is_told and made is not None:
            generator = made
        edits = Edits(
            tuple(facts),
            conditions,
            collection.neurons,
            collection.initial,
            held_out,
            gate,
            generator.to(conditions.device),
            collection.told if is_told else torch.ones(len(facts), dtype=torch.bool),
            EditReport(
                collection.unlearnt(facts),
                calibration,
                None,
                {},
                num_left_out,
                collection.num_predicted,
            ),
            answers,
        )
        if is_told and made is not None:
            training = _told(edits)
        else:
            edits, training = self._learning(edits, edits.generator, stopwatch)
        report = dataclasses.replace(edits.report, training=training, seconds=stopwatch.seconds)
        return dataclasses.replace(edits, report=report), router.encoder

    def prepared(
        self, facts: Sequence[Fact], wordings: Sequence[Wordings], unrelated: Sequence[str]
    ) -> tuple[Edits, TextEncoder, EditReport]:
        """No edits, and all that editing any facts takes; arguments as `first` has them.

        A hypernetwork learns from these facts, the encoder is tuned, and what gates are calibrated
        on is found.

        Returns:
            The edits, the tuned encoder, and how that went.
        """
        edits, encoder = self.first(facts, wordings, unrelated, 0)
        # Those that were fitted since it learnt last; what it told itself teaches it nothing.
        rows = (edits.learnt & ~edits.generated).nonzero()[:, 0]
        if isinstance(edits.generator, HypernetworkGenerator) and len(rows):
            z = edits.inputs(rows)
            edits.generator.learn(z, edits.neurons[rows].to(z.device))
        return edits.without(range(len(edits))), encoder, edits.report

    def added(self, before: Edits, facts: Sequence[Fact]) -> tuple[Edits, EditReport]:
        """`before` and further facts, answered by their collected neurons; and how that went."""
        stopwatch = Stopwatch()
        with stopwatch.stage("encoder"):
            conditions = self.router.encode([fact.query for fact in facts])
        collection, answers = self._collect(facts, conditions, before.initial, stopwatch, before)
        told = collection.told if before.is_hypernetworks else None
        joined = before.joined(facts, conditions, collection.neurons, told, answers)
        with stopwatch.stage("gate"):
            edits = regated(joined, self.config, self.progress)
        calibration = None if edits is joined else edits.calibration
        report = EditReport(
            collection.unlearnt(facts),
            calibration,
            None,
            stopwatch.seconds,
            num_predicted=collection.num_predicted,
        )
        whole = before.report + report
        if edits.is_hypernetworks:
            whole = dataclasses.replace(whole, training=_told(edits))
        return dataclasses.replace(edits, report=whole), report

    def trained(self, before: Edits) -> Edits:
        """`before` with its generator trained further, on the neurons of all facts.

        Facts that it does not answer in the end keep their collected neurons.
        """
        generator, stopwatch = copy.deepcopy(before.generator), Stopwatch()
        edits, training = self._learning(before, generator, stopwatch, further=True)
        report = before.report + EditReport((), None, training, stopwatch.seconds)
        edits = dataclasses.replace(edits, report=report)
        rows = (~before.generated).nonzero()[:, 0]
        made = generator.generate(before.inputs(rows))
        collected, answers = before.neurons[rows].to(made.device), self._answers(before.facts)
        generated = before.generated.clone()
        # Facts that not even their collected neurons answer are not the generator's to reach.
        generated[rows] = (answers(made, rows) | ~answers(collected, rows)).cpu()
        return dataclasses.replace(edits, generated=generated)

    def replaced(self, before: Edits, config: GeneratorConfig) -> Edits:
        """`before` with another generator, trained from the start on the neurons of all facts.

        Raises:
            RuntimeError: there are none.
        """
        check_any(before)
        stopwatch = Stopwatch()
        generator = self._built(config)
        answers = self._known_answers(config, before.facts)
        edits = dataclasses.replace(
            before,
            generator=generator,
            generated=torch.ones_like(before.generated),
            answers=answers,
        )
        edits, training = self._learning(edits, generator, stopwatch)
        kept = {k: v for k, v in before.report.seconds.items() if k not in ("generator", "distill")}
        report = dataclasses.replace(
            before.report, training=training, seconds=kept | stopwatch.seconds
        )
        return dataclasses.replace(edits, report=report)

    def distilled(
        self, before: Edits, steps: int, teacher_steps: int | None, seed: int | None
    ) -> tuple[Edits, Distillation]:
        """`before` with a generator that samples in these few steps; and how that went.

        Raises:
            ValueError: the generator was not trained on facts that were added, or it cannot be
                distilled so: `distill` says why.
        """
        if before.num_waiting and isinstance(before.generator, DiTGenerator):
            raise ValueError(
                f"the generator was not trained on facts that were added, {before.num_waiting} of "
                f"{len(before)}: train it first, with train() or meg train"
            )
        stopwatch = Stopwatch()
        with stopwatch.stage("distill"):
            student, distillation = distill(
                before.generator,
                before.inputs(),
                before.neurons,
                self._answers(before.facts),
                steps,
                rewording=self._rewording(before, before.generator),
                teacher_steps=teacher_steps,
                seed=seed,
                work_folder=self.work_folder,
                progress=self.progress,
            )
        stopwatch.add("distill", distillation.seconds_before)
        report = before.report + EditReport((), None, None, stopwatch.seconds)
        return dataclasses.replace(before, generator=student, report=report), distillation

    def _built(self, config: GeneratorConfig) -> Generator:
        """An untrained generator for what the encoder and the language model make of facts."""
        instance_of(GeneratorConfig)("config", config)
        answers = self._known_answers(config, [])
        dim = self.router.encoder.dim + (0 if answers is None else answers.shape[1])
        return build_generator(config, self.attached.layout, dim)

    def _known_answers(self, config: GeneratorConfig, facts: Sequence[Fact]) -> Tensor | None:
        """[N, A] what is known of the facts' answers, if such a generator is given that."""
        if not config.knows_answers:
            return None
        return known_answers(self.prompted, self.router.encoder, facts)

    def _collect(
        self,
        facts: Sequence[Fact],
        conditions: Tensor,
        initial: Neurons | None,
        stopwatch: Stopwatch,
        before: Edits | None = None,
    ) -> tuple[Collection, Tensor | None]:
        """The facts' neurons, and what is known of their answers if the generator is given that."""
        config = self.config.collection
        with stopwatch.stage("collect"):
            answers = self._known_answers(self.config.generator, facts)
            known = foresight(
                self.prompted,
                self.router.encoder,
                facts,
                config,
                conditions=conditions,
                answers=answers,
                before=before,
            )
            collection = fit_neurons(
                self.prompted,
                self.attached,
                [self.targets[fact.id] for fact in facts],
                config,
                foresight=known,
                initial=initial,
                work_folder=self.work_folder,
                progress=self.progress,
            )
        stopwatch.add("collect", collection.seconds_before)
        return collection, answers

    def _learning(
        self, edits: Edits, generator: Generator, stopwatch: Stopwatch, further: bool = False
    ) -> tuple[Edits, Training]:
        """`edits` whose `generator` has learnt, in place, the collected neurons; how that went."""
        with stopwatch.stage("generator"):
            if isinstance(generator, HypernetworkGenerator):
                edits = self._learnt(edits, generator)
                return edits, _told(edits)
            training = train_generator(
                generator,
                edits.inputs(),
                edits.neurons,
                self._answers(edits.facts),
                rewording=self._rewording(edits, generator),
                keep_scales=further,
                work_folder=self.work_folder,
                progress=self.progress,
            )
        stopwatch.add("generator", training.seconds_before)
        return dataclasses.replace(edits, generator=generator), training

    def _learnt(self, edits: Edits, generator: HypernetworkGenerator) -> Edits:
        """`edits` with a hypernetwork that learnt all their neurons, and makes those it can."""
        generator.to(edits.conditions.device)
        rows = edits.learnt.nonzero()[:, 0]
        if len(rows):
            generator.learn(edits.inputs(rows), edits.neurons[rows].to(edits.conditions.device))
        made = generator.generate(edits.inputs())
        everything = torch.arange(len(edits), device=edits.conditions.device)
        right = self._answers(edits.facts)(made, everything).cpu() & edits.learnt
        flat = edits.layout.pack(edits.neurons).clone()
        flat[right] = edits.layout.pack(made).cpu()[right]
        neurons = edits.layout.unpack(flat)
        return dataclasses.replace(edits, generator=generator, generated=right, neurons=neurons)

    def _answers(self, facts: Sequence[Fact]) -> AnswersRight:
        size = self.config.collection.batch_size
        return answers_with(self.prompted, self.attached, facts, size)

    def _rewording(self, edits: Edits, generator: Generator) -> Rewording | None:
        """What a generator sees besides its queries' own conditions."""
        wanted = generator.config.rewords(self.config.snap)
        return edits.held_out.rewording if wanted else None


def _told(edits: Edits) -> Training:
    """What a hypernetwork achieves, which learnt while neurons were collected."""
    return Training(0, edits.generated.double().mean().item())
