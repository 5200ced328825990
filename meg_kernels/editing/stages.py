"""The work of editing: facts become `Edits`, and `Edits` become other `Edits`.

    first      facts -> collected neurons -> tuned encoder, gate -> trained generator
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

from meg_kernels.checks import instance_of
from meg_kernels.editing.answered import answers_with
from meg_kernels.editing.collect import Collection, Targets, collectable, fit_neurons, said_for
from meg_kernels.editing.config import EditorConfig
from meg_kernels.editing.distill import Distillation, distill
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.editing.train import train_generator
from meg_kernels.editing.trial import AnswersRight
from meg_kernels.editing.tuning import (
    Stopwatch,
    calibrated_gate,
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
        generator = build_generator(config.generator, self.attached.layout, self.router.encoder.dim)
        collection = self._collect(facts, None, stopwatch)
        with stopwatch.stage("encoder"):
            router, held_out, before = tuned_router(
                self.router, wordings, unrelated, config, self.work_folder, self.progress
            )
            conditions = router.encode([fact.query for fact in facts])
        stopwatch.add("encoder", before)
        with stopwatch.stage("gate"):
            gate, calibration = calibrated_gate(facts, conditions, held_out, config, self.progress)
        edits = Edits(
            tuple(facts),
            conditions,
            collection.neurons,
            collection.initial,
            held_out,
            gate,
            generator,
            torch.ones(len(facts), dtype=torch.bool),
            EditReport(collection.unlearnt(facts), calibration, None, {}, num_left_out),
        )
        training = self._train(edits, edits.generator, stopwatch)
        report = dataclasses.replace(edits.report, training=training, seconds=stopwatch.seconds)
        return dataclasses.replace(edits, report=report), router.encoder

    def added(self, before: Edits, facts: Sequence[Fact]) -> tuple[Edits, EditReport]:
        """`before` and further facts, answered by their collected neurons; and how that went."""
        stopwatch = Stopwatch()
        collection = self._collect(facts, before.initial, stopwatch, before)
        with stopwatch.stage("encoder"):
            conditions = self.router.encode([fact.query for fact in facts])
        joined = before.joined(facts, conditions, collection.neurons)
        with stopwatch.stage("gate"):
            edits = regated(joined, self.config, self.progress)
        calibration = None if edits is joined else edits.calibration
        report = EditReport(collection.unlearnt(facts), calibration, None, stopwatch.seconds)
        return dataclasses.replace(edits, report=before.report + report), report

    def trained(self, before: Edits) -> Edits:
        """`before` with its generator trained further, on the neurons of all facts.

        Facts that it does not answer in the end keep their collected neurons.
        """
        generator, stopwatch = copy.deepcopy(before.generator), Stopwatch()
        training = self._train(before, generator, stopwatch, further=True)
        rows = (~before.generated).nonzero()[:, 0]
        made = generator.generate(before.conditions[rows.to(before.conditions.device)])
        collected, answers = before.neurons[rows].to(made.device), self._answers(before.facts)
        generated = before.generated.clone()
        # Facts that not even their collected neurons answer are not the generator's to reach.
        generated[rows] = (answers(made, rows) | ~answers(collected, rows)).cpu()
        report = before.report + EditReport((), None, training, stopwatch.seconds)
        return dataclasses.replace(before, generator=generator, generated=generated, report=report)

    def replaced(self, before: Edits, config: GeneratorConfig) -> Edits:
        """`before` with another generator, trained from the start on the neurons of all facts."""
        stopwatch = Stopwatch()
        instance_of(GeneratorConfig)("config", config)
        generator = build_generator(config, self.attached.layout, before.conditions.shape[1])
        training = self._train(before, generator, stopwatch)
        kept = {k: v for k, v in before.report.seconds.items() if k not in ("generator", "distill")}
        return dataclasses.replace(
            before,
            generator=generator,
            generated=torch.ones_like(before.generated),
            report=dataclasses.replace(
                before.report, training=training, seconds=kept | stopwatch.seconds
            ),
        )

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
                before.conditions,
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

    def _collect(
        self,
        facts: Sequence[Fact],
        initial: Neurons | None,
        stopwatch: Stopwatch,
        before: Edits | None = None,
    ) -> Collection:
        with stopwatch.stage("collect"):
            targets, config = [self.targets[fact.id] for fact in facts], self.config.collection
            collection = fit_neurons(
                self.prompted,
                self.attached,
                targets,
                config,
                said=said_for(self.prompted, self.router.encoder, facts, targets, config, before),
                initial=initial,
                work_folder=self.work_folder,
                progress=self.progress,
            )
        stopwatch.add("collect", collection.seconds_before)
        return collection

    def _train(
        self, edits: Edits, generator: Generator, stopwatch: Stopwatch, further: bool = False
    ) -> Training:
        """Train `generator`, in place, on the collected neurons of these edits."""
        with stopwatch.stage("generator"):
            training = train_generator(
                generator,
                edits.conditions,
                edits.neurons,
                self._answers(edits.facts),
                rewording=self._rewording(edits, generator),
                keep_scales=further,
                work_folder=self.work_folder,
                progress=self.progress,
            )
        stopwatch.add("generator", training.seconds_before)
        return training

    def _answers(self, facts: Sequence[Fact]) -> AnswersRight:
        size = self.config.collection.batch_size
        return answers_with(self.prompted, self.attached, facts, size)

    def _rewording(self, edits: Edits, generator: Generator) -> Rewording | None:
        """What a generator sees besides its queries' own conditions."""
        wanted = generator.config.rewords(self.config.snap)
        return edits.held_out.rewording if wanted else None
