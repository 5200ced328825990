"""`MeGEditor`: many facts edited in one model, from collection to saving.

    editor = MeGEditor.for_model("smollm2")
    editor.edit(facts)
    editor.generate(["What is the capital of France?", "What is the capital of Spain?"])
    editor.save_pretrained("edited")

The path of a query: encoder -> gate -> (familiar?) generator -> neuron -> the model's forward.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.editing.collect import Collection, CollectionConfig, collect
from meg_kernels.editing.distill import Distillation, distill
from meg_kernels.editing.evaluate import (
    Evaluation,
    EvaluationReport,
    evaluate,
    unknown_facts,
)
from meg_kernels.editing.facts import (
    Fact,
    FactsError,
    check_facts,
    unrelated_to,
    warn_of_several_answers,
)
from meg_kernels.editing.general_ability import Perplexity, perplexity
from meg_kernels.editing.generators import (
    DiTGenerator,
    Generator,
    GeneratorConfig,
    NeuronBank,
    build_generator,
)
from meg_kernels.editing.layers import default_layer
from meg_kernels.editing.neuron_cache import NeuronCache, Served
from meg_kernels.editing.prompting import (
    PromptTemplate,
    TargetBatch,
    answer_text,
    greedy_answers,
    score_targets,
    target_batch,
    target_tokens,
)
from meg_kernels.editing.saving import load_editor, save_editor
from meg_kernels.editing.shipped import (
    shipped_passages,
    shipped_tuning_facts,
    shipped_unrelated_queries,
)
from meg_kernels.editing.train import Answers, Training, train_generator
from meg_kernels.familiarity import (
    Calibration,
    FamiliarityNetwork,
    Rewording,
    SimilarityGate,
    calibrate,
    transplant,
)
from meg_kernels.integrations.pretrained import DEFAULT_ENCODER, load_language_model
from meg_kernels.neuron import Neurons
from meg_kernels.nn import LowerLayers, attach
from meg_kernels.nn.packing import frozen_products
from meg_kernels.storage import (
    CorruptFileError,
    fingerprint,
    once,
    read_tensors,
    write_tensors,
)
from meg_kernels.text_encoder import EncoderTuningConfig, TextEncoder, Wordings

log = logging.getLogger(__name__)

FEWEST_TUNING_FACTS = 8
MANY_FACTS = 1000  # of which one comes close to many a query about another subject
CALIBRATED_TO = 1.5  # times as many facts, or as few, one threshold serves as well


@dataclass(frozen=True)
class EditorConfig:
    """Everything that decides how a model is edited.

    Args:
        layer: the edited feed-forward layer; None: three quarters up the model.
        template: how queries become prompts; None: the model's own (`PromptTemplate.for_model`).
        collection, encoder_tuning, generator: of the stages.
        gate: `similarity`, or the paper's `familiarity` network.
        threshold: the score above which the gate accepts; None: calibrated on held-out queries.
        require_subject: whether a query must name the subject of the edited fact nearest to it,
            where that is known and the fact's own query names it. Queries about other subjects
            then keep their answers, and so do wordings that name the subject otherwise (the French
            capital). Default: from a thousand edited facts on, which otherwise come close to many a
            query about other subjects.
        snap: give the generator the nearest edited query's condition, which it was trained on,
            instead of the query's own.
        calibration_share: share of the tuning facts kept from tuning, for the gate's threshold.
        most_tuning_facts: so many of the tuning facts are used; default: four for each edited fact,
            but at least 512 and at most 2048. The more facts are edited, the more of them look
            like a query that is none of them.
        rejection_weight: how much worse it is that the gate accepts a query too many, which changes
            an answer that nobody asked to change, than one too few.
        seed: of their choice, and of the gate.
    """

    layer: int | None = None
    template: PromptTemplate | None = None
    collection: CollectionConfig = field(default_factory=CollectionConfig)
    encoder_tuning: EncoderTuningConfig = field(default_factory=EncoderTuningConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    gate: Literal["similarity", "familiarity"] = "similarity"
    threshold: float | None = None
    require_subject: bool | None = None
    snap: bool = True
    calibration_share: float = 0.25
    most_tuning_facts: int | None = None
    rejection_weight: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate not in ("similarity", "familiarity"):
            raise ValueError(f"gate is {self.gate!r}; it must be 'similarity' or 'familiarity'")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; it must be finite, or None")
        if not 0 < self.calibration_share < 1:
            raise ValueError(
                f"calibration_share is {self.calibration_share}; it must be between 0 and 1"
            )

    def tuning_facts_for(self, facts: int) -> int:
        """How many tuning facts are used at most when so many facts are edited.

        >>> [EditorConfig().tuning_facts_for(facts) for facts in (64, 256, 10_000)]
        [512, 1024, 2048]
        """
        return self.most_tuning_facts or min(max(4 * facts, 512), 2048)

    def requires_subject(self, facts: int) -> bool:
        """Whether a query must name the subject when so many facts are edited.

        >>> [EditorConfig().requires_subject(facts) for facts in (64, 1000)]
        [False, True]
        """
        return facts >= MANY_FACTS if self.require_subject is None else self.require_subject

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditorConfig:
        nested = dict(values)
        if nested["template"] is not None:
            nested["template"] = PromptTemplate(**nested["template"])
        lists = nested["collection"]
        framings = {k: tuple(v) for k, v in lists.items() if isinstance(v, list)}
        nested["collection"] = CollectionConfig(**(lists | framings))
        nested["encoder_tuning"] = EncoderTuningConfig(**nested["encoder_tuning"])
        nested["generator"] = GeneratorConfig.from_dict(nested["generator"])
        return cls(**nested)


@dataclass(frozen=True)
class HeldOut:
    """Conditions of queries that were neither edited nor tuned on, to calibrate a gate by.

    How their paraphrases lie can also teach a generator other wordings.

    Args:
        queries: [H, dim] of held-out facts, each repeated for each of its paraphrases.
        paraphrases: [H, dim] of their paraphrases.
        alike_queries, alike: [L, dim] of held-out facts, and of queries that look like them.
        unrelated: [U, dim] of all sorts of queries.
    """

    queries: Tensor
    paraphrases: Tensor
    alike_queries: Tensor
    alike: Tensor
    unrelated: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def rewording(self) -> Rewording:
        """Other wordings for any queries."""
        return Rewording(self.queries, self.paraphrases)

    def positive(self, edited: Tensor, generator: torch.Generator) -> Tensor:
        """[H, dim] the paraphrases, moved beside edited queries."""
        return transplant(self.paraphrases, self.queries, _any(edited, self.queries, generator))

    def negative(self, edited: Tensor, generator: torch.Generator) -> Tensor:
        """[L + U, dim] the queries that look alike, moved likewise, and the unrelated ones."""
        beside = _any(edited, self.alike_queries, generator)
        return torch.cat([transplant(self.alike, self.alike_queries, beside), self.unrelated])


def _any(edited: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
    rows = torch.randint(len(edited), (len(like),), generator=generator)
    return edited[rows.to(edited.device)]


@dataclass(frozen=True)
class Routing:
    """Where queries go.

    Args:
        edited: [B] bool: accepted by the gate.
        fact: [B] int64: the edited fact nearest to each query.
        score: [B] the gate's score.
        z: [B, dim] the queries' conditions.
        named: [B] bool: false where the query should name that fact's subject and does not.
    """

    edited: Tensor
    fact: Tensor
    score: Tensor
    z: Tensor
    named: Tensor


@dataclass(frozen=True)
class EditReport:
    """How an edit went.

    Args:
        unlearnt: facts which the model does not answer even with their own neuron.
        calibration: the gate's, on held-out queries; the similarity gate keeps it until there are
            half as many edited facts again, or a third fewer.
        training: the generator's.
        seconds: of the stages collect, encoder, gate and generator, and of a distillation; of
            those that resumed, with what an interruption ended. An addition has no generator.
        known: facts that were left out, because the model answered them so already.
    """

    unlearnt: list[Fact]
    calibration: Calibration
    training: Training
    seconds: dict[str, float]
    known: int = 0


@dataclass(frozen=True)
class Edits:
    """What editing makes, and all that is saved of it beside the encoder.

    Args:
        facts: N edited facts.
        queries: [N, dim] their conditions.
        neurons: N collected neurons.
        initial: the one neuron that the collection started from.
        held_out: what the gate is calibrated on.
        gate, generator: as the configuration names them.
        generated: [N] bool, on the CPU: the facts whose neurons the generator makes. It was not
            trained on the others yet, which were added since: they have their collected neurons.
        report: of the edit, its seconds with those of what was added since.
    """

    facts: list[Fact]
    queries: Tensor
    neurons: Neurons
    initial: Neurons
    held_out: HeldOut
    gate: SimilarityGate | FamiliarityNetwork
    generator: Generator
    generated: Tensor
    report: EditReport


class MeGEditor:
    """A language model with edited facts.

    Args:
        model: a transformers causal language model of a supported family; its weights are never
            changed.
        tokenizer: its tokenizer.
        encoder: the text encoder; `edit` tunes it.
        config: how to edit.
        name: under which the model can be loaded again; default: what transformers noted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: TextEncoder,
        config: EditorConfig | None = None,
        name: str | None = None,
    ):
        config = config or EditorConfig()
        self.layer = default_layer(model) if config.layer is None else config.layer
        self.template = config.template or PromptTemplate.for_model(model)
        self.config = dataclasses.replace(config, layer=self.layer, template=self.template)
        self.model, self.tokenizer, self.encoder = model.eval(), tokenizer, encoder
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.name = name or model.name_or_path
        self.attached = attach(model, self.layer)
        self._edits: Edits | None = None
        self._serving = False
        self.served = Served()
        self._cache = NeuronCache(self.served)

    @classmethod
    def for_model(
        cls,
        name: str,
        config: EditorConfig | None = None,
        *,
        encoder: str = DEFAULT_ENCODER,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> MeGEditor:
        """An editor for a model by name: `smollm2`, a folder, or a Hugging Face model id."""
        model, tokenizer = load_language_model(name, dtype, device)
        text_encoder = TextEncoder.from_pretrained(encoder, device=device)
        return cls(model, tokenizer, text_encoder, config, name)

    @property
    def edits(self) -> Edits:
        """What was edited; RuntimeError if nothing was."""
        if self._edits is None:
            raise RuntimeError("nothing is edited yet; call edit(facts) first")
        return self._edits

    @property
    def facts(self) -> list[Fact]:
        """The edited facts."""
        return [] if self._edits is None else self._edits.facts

    # Editing: each of these makes a new `Edits` and puts it in place at the end, so that an error
    # or an interruption leaves what was edited before.

    def edit(
        self,
        facts: Sequence[Fact],
        *,
        tuning: Sequence[Fact] | None = None,
        unrelated: Sequence[str] | None = None,
        skip_known: bool = False,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> EditReport:
        """Edit `facts` into the model, in place of any edited before.

        Args:
            facts: what shall be answered; distinct queries and ids.
            tuning: other facts with paraphrases, to tune the encoder and calibrate the gate;
                those that share a query or subject with an edited fact are left out. Default: the
                facts that the package ships for this.
            unrelated: queries of all sorts, for the gate; default: the package's.
            skip_known: leave out facts that the model answers so already, as ZsRE is used.
            work_folder: keeps finished work, so that an interrupted edit resumes.
            progress: show progress bars.

        Raises:
            FactsError: facts that contradict each other, too few to tune with, or none that the
                model does not answer already.
        """
        if not facts:
            raise FactsError("there are no facts to edit")
        check_facts(facts)
        given = len(facts)
        if skip_known and not (facts := self.unknown(facts, progress=progress)):
            raise FactsError(f"the model answers all {given} facts so already")
        warn_of_several_answers(facts)
        tuning = shipped_tuning_facts() if tuning is None else tuning
        unrelated = shipped_unrelated_queries() if unrelated is None else unrelated
        wordings = self._usable_for_tuning(tuning, facts)
        seconds: dict[str, float] = {}
        with _timed(seconds, "collect"):
            collection = self._collect(facts, None, work_folder, progress)
        seconds["collect"] += collection.seconds_before
        with _as_before_on_error(self.encoder):
            with _timed(seconds, "encoder"):
                held_out, before = self._tune_encoder(wordings, unrelated, work_folder, progress)
                queries = self._encode([fact.query for fact in facts])
            seconds["encoder"] += before
            with _timed(seconds, "gate"):
                gate, calibration = self._make_gate(self.config, queries, held_out, progress)
            layout = self.attached.layout
            generator = build_generator(self.config.generator, layout, self.encoder.dim)
            training = self._train(
                generator,
                facts,
                queries,
                collection.neurons,
                held_out,
                seconds,
                work_folder,
                progress,
            )
            unlearnt, known = collection.unlearnt(facts), given - len(facts)
            report = EditReport(unlearnt, calibration, training, seconds, known)
            self._edits = Edits(
                list(facts),
                queries,
                collection.neurons,
                collection.initial,
                held_out,
                gate,
                generator,
                torch.ones(len(facts), dtype=torch.bool),
                report,
            )
        return report

    def add(
        self,
        facts: Sequence[Fact],
        *,
        replace: bool = False,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> EditReport:
        """Edit further facts. Those edited before keep their neurons, and so their answers.

        The generator stays as it is: the neurons that are collected for these facts are kept beside
        it and answer for them, until `train` teaches it all of them. A familiarity gate learns them
        at once; a similarity gate is calibrated again when there are half as many facts again as
        when it was. Either can then decide otherwise about other queries.

        Args:
            facts: what shall be answered as well.
            replace: put them in place of facts with the same query or id, instead of refusing.
            work_folder: keeps finished work, so that an interrupted addition resumes.
            progress: show progress bars.

        Raises:
            FactsError: a query or id is edited already.
            RuntimeError: nothing was edited yet; call `edit`.
        """
        before = self.edits
        if not facts:
            raise FactsError("there are no facts to add")
        check_facts(facts)
        rows = list(range(len(before.facts)))
        if replace:
            ids, given = {fact.id for fact in facts}, {fact.normalized_query for fact in facts}
            rows = [
                row
                for row in rows
                if before.facts[row].id not in ids
                and before.facts[row].normalized_query not in given
            ]
        kept = [before.facts[row] for row in rows]
        try:
            check_facts([*kept, *facts])
        except FactsError as error:
            hint = "with replace=True (meg add --replace) they take the place of the edited ones"
            raise FactsError(f"{error}\n{hint}") from None
        warn_of_several_answers(facts, kept)
        seconds: dict[str, float] = {}
        with _timed(seconds, "collect"):
            collection = self._collect(facts, before.initial, work_folder, progress)
        seconds["collect"] += collection.seconds_before
        with _timed(seconds, "encoder"):
            new = self._encode([fact.query for fact in facts])
        queries = torch.cat([before.queries[rows], new])
        neurons = Neurons.cat([before.neurons[rows], collection.neurons])
        with _timed(seconds, "gate"):
            gate, calibration = self._gate_among(queries, progress)
        unlearnt = [fact for fact in before.report.unlearnt if fact in kept]
        unlearnt += collection.unlearnt(facts)
        report = dataclasses.replace(
            before.report, unlearnt=unlearnt, calibration=calibration, seconds=seconds
        )
        in_all = {
            stage: took + seconds.get(stage, 0.0) for stage, took in before.report.seconds.items()
        }
        generator = _holding(before.generator, queries, neurons)
        added = torch.full((len(facts),), isinstance(generator, NeuronBank))
        self._edits = dataclasses.replace(
            before,
            facts=[*kept, *facts],
            queries=queries,
            neurons=neurons,
            gate=gate,
            generator=generator,
            generated=torch.cat([before.generated[rows], added]),
            report=dataclasses.replace(report, seconds=in_all),
        )
        return report

    def remove(self, ids: Sequence[str]) -> None:
        """Take edits back: their queries are answered by the base model again.

        Raises:
            KeyError: an id that is not edited.
        """
        known, gone = {fact.id for fact in self.facts}, set(ids)
        if unknown := sorted(gone - known):
            raise KeyError(f"no edited fact has the id {unknown[0]!r}")
        before = self.edits
        keep = [row for row, fact in enumerate(before.facts) if fact.id not in gone]
        if not keep:
            self._edits = None
            return
        queries, neurons = before.queries[keep], before.neurons[keep]
        gate, calibration = self._gate_among(queries, progress=False)
        unlearnt = [fact for fact in before.report.unlearnt if fact.id not in gone]
        self._edits = dataclasses.replace(
            before,
            facts=[before.facts[row] for row in keep],
            queries=queries,
            neurons=neurons,
            gate=gate,
            generator=_holding(before.generator, queries, neurons),
            generated=before.generated[keep],
            report=dataclasses.replace(before.report, unlearnt=unlearnt, calibration=calibration),
        )

    def train(
        self,
        generator: GeneratorConfig | None = None,
        *,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> Training:
        """Train a generator on the collected neurons of all edited facts.

        Args:
            generator: the kind, network and training of one that takes the place of the present
                one. Default: the present one is trained further, if facts were added since it was
                trained; that takes less long, and its other neurons move a little. Added facts that
                it does not answer in the end keep their collected neurons, until the next time.
            work_folder: keeps a checkpoint, so that an interrupted training resumes.
            progress: show a progress bar.

        Raises:
            RuntimeError: nothing is edited.
        """
        before, seconds = self.edits, dict(self.edits.report.seconds)
        waiting = ~before.generated
        if generator is None and not bool(waiting.any()):
            return before.report.training
        if generator is None:
            made, earlier = copy.deepcopy(before.generator), seconds["generator"]
        else:
            made, earlier = build_generator(generator, self.attached.layout, self.encoder.dim), 0.0
            seconds.pop("distill", None)
        training = self._train(
            made,
            before.facts,
            before.queries,
            before.neurons,
            before.held_out,
            seconds,
            work_folder,
            progress,
            keep_scales=generator is None,
        )
        seconds["generator"] += earlier
        generated = torch.ones_like(waiting)
        if generator is None:
            generated[waiting] = self._generates(made, waiting)
        self._edits = dataclasses.replace(
            before,
            generator=made,
            generated=generated,
            report=dataclasses.replace(before.report, training=training, seconds=seconds),
        )
        self.config = dataclasses.replace(self.config, generator=made.config)
        return training

    def set_gate(
        self,
        gate: Literal["similarity", "familiarity"] | None = None,
        *,
        threshold: float | None = None,
        calibrated: bool = False,
        require_subject: bool | None = None,
        progress: bool = False,
    ) -> Calibration:
        """Put another gate in place of the present one.

        Args:
            gate: its kind; default: that of the present one.
            threshold: the score above which it accepts, also when facts are added or removed;
                default: as it is, or calibrated if the kind changes.
            calibrated: take the threshold that is calibrated on the queries that were held out when
                the encoder was tuned, in place of one that was chosen.
            require_subject: as `EditorConfig` says; default: as it is.
            progress: show a progress bar.

        Returns:
            How well it separates the held-out queries, at the calibrated threshold even if
            another was chosen.

        Raises:
            RuntimeError: nothing is edited.
            ValueError: no such gate, a threshold that is not finite, or one to be calibrated.
        """
        before, config = self.edits, self.config
        if calibrated and threshold is not None:
            raise ValueError("a threshold is either given or calibrated")
        if require_subject is not None:
            config = dataclasses.replace(config, require_subject=require_subject)
        if calibrated or threshold is not None or gate not in (None, config.gate):
            config = dataclasses.replace(config, gate=gate or config.gate, threshold=threshold)
            made, calibration = self._make_gate(config, before.queries, before.held_out, progress)
            report = dataclasses.replace(before.report, calibration=calibration)
            self._edits = dataclasses.replace(before, gate=made, report=report)
        self.config = config
        return self.edits.report.calibration

    def distill(
        self,
        steps: int,
        *,
        teacher_steps: int | None = None,
        seed: int | None = None,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> Distillation:
        """Have the generator sample in a few DDIM steps what it samples in many.

        Args:
            steps: of the generator from now on, 1 to 4.
            teacher_steps: in which it teaches them, a multiple of `steps`; default: the one
                closest to 50.
            seed: of the training; default: that of the generator's configuration.
            work_folder: keeps finished work, so that an interrupted distillation resumes.
            progress: show a progress bar.

        Raises:
            RuntimeError: nothing is edited.
            ValueError: the generator is no DiT, it was not trained on facts that were added, a
                number of steps is out of range, or it answers too little in `teacher_steps` to
                teach.
        """
        before = self.edits
        waiting = int((~before.generated).sum())
        if waiting and isinstance(before.generator, DiTGenerator):
            raise ValueError(
                f"the generator was not trained on facts that were added, {waiting} of "
                f"{len(before.facts)}: train it first, with train() or meg train"
            )
        seconds = dict(before.report.seconds)
        with _timed(seconds, "distill"):
            student, distillation = distill(
                before.generator,
                before.queries,
                before.neurons,
                self._answers(before.facts),
                steps,
                rewording=self._rewording(self.config.generator, before.held_out),
                teacher_steps=teacher_steps,
                seed=seed,
                work_folder=work_folder,
                progress=progress,
            )
        seconds["distill"] += distillation.seconds_before
        report = dataclasses.replace(before.report, seconds=seconds)
        self._edits = dataclasses.replace(before, generator=student, report=report)
        self.config = dataclasses.replace(self.config, generator=student.config)
        return distillation

    def detach(self) -> None:
        """Give the base model back as it was, module for module. Harmless if called twice."""
        self.attached.detach()

    # Answering; `served` counts what is asked, and how many neurons that takes.

    def route(self, queries: Sequence[str]) -> Routing:
        """Which queries are edited ones in some wording, and the edited fact nearest to each."""
        z = self._encode(queries)
        if self._edits is None:
            nowhere = torch.full((len(z),), -1, device=z.device)
            return Routing(nowhere > 0, nowhere, nowhere.float(), z, nowhere < 0)
        gate = self._edits.gate
        score = gate.score(z)
        _, fact = SimilarityGate(self._edits.queries).nearest(z)
        named = torch.ones_like(score, dtype=torch.bool)
        if self.config.requires_subject(len(self.facts)):
            named = self._subject_named(queries, fact)
        return Routing((score > gate.threshold) & named, fact, score, z, named)

    @contextmanager
    def routed(self, queries: Sequence[str], routing: Routing | None = None) -> Iterator[Routing]:
        """Inside, the model answers this batch of queries as edited: row b is queries[b]."""
        routing = self.route(queries) if routing is None else routing
        accepted = routing.edited.nonzero()[:, 0]
        self.served.queries += len(queries)
        self.served.edited += len(accepted)
        if not len(accepted):
            yield routing
            return
        # Only accepted queries are generated for, and with snapping each fact once.
        index = torch.full((len(queries),), -1, device=routing.edited.device)
        if self.config.snap:
            facts, index[accepted] = routing.fact[accepted].unique(return_inverse=True)
            z = self.edits.queries[facts]
        else:
            index[accepted] = torch.arange(len(accepted), device=index.device)
            facts, z = routing.fact[accepted], routing.z[accepted]
        with self.attached.neurons(self._neurons(facts, z), index):
            yield routing

    def _neurons(self, facts: Tensor, z: Tensor) -> Neurons:
        """Neurons for conditions z [B, dim], the edited facts nearest to which are facts [B]."""
        edits = self.edits
        if bool(edits.generated.all()):
            return self._cache.generate(edits.generator, z)
        facts, layout = facts.cpu(), self.attached.layout
        generated = edits.generated[facts]
        self.served.reused += len(facts[~generated].unique())
        flat = layout.pack(edits.neurons[facts]).to(z.device)
        rows = generated.nonzero()[:, 0].to(z.device)
        flat[rows] = layout.pack(self._cache.generate(edits.generator, z[rows])).to(flat.dtype)
        return layout.unpack(flat)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, answers come faster, if there are more than a few to give.

        On a CPU the model's weights are packed once for its matrix products, instead of being
        rearranged at every call; that takes some seconds and as much memory as the model again.
        Elsewhere, and where the model is more than a quarter of the machine's memory, nothing
        changes. The weights must stay as they are meanwhile.
        """
        if self._serving or not _fits_twice(self.model):
            yield
            return
        self._serving = True
        try:
            with torch.no_grad(), frozen_products([self.model], self.model.dtype):
                yield
        finally:
            self._serving = False

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 32, **generation: Any
    ) -> list[str]:
        """Answers to prompts, edited and unrelated ones in one batch.

        Args:
            prompts: queries, without the template.
            max_new_tokens: the longest answer; it ends at a line break.
            generation: keyword arguments of `model.generate`; greedy without.

        Returns:
            One line for each prompt, or num_return_sequences lines.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a str; pass a list of prompts")
        if not prompts:
            return []
        texts = [self.template.format(prompt) for prompt in prompts]
        with self.routed(prompts):
            answers = greedy_answers(
                self.model, self.tokenizer, texts, max_new_tokens, **generation
            )
        return [answer_text(self.tokenizer, answer) for answer in answers]

    def generate_base(
        self, prompts: Sequence[str], max_new_tokens: int = 32, **generation: Any
    ) -> list[str]:
        """The base model's answers to the same prompts."""
        texts = [self.template.format(prompt) for prompt in prompts]
        answers = greedy_answers(self.model, self.tokenizer, texts, max_new_tokens, **generation)
        return [answer_text(self.tokenizer, answer) for answer in answers]

    def unknown(self, facts: Sequence[Fact], *, progress: bool = False) -> list[Fact]:
        """Those of `facts` which the base model does not answer already."""
        with self.serving():
            return unknown_facts(self.model, self.tokenizer, facts, self.template, progress)

    def evaluate(
        self,
        facts: Sequence[Fact] | None = None,
        *,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> EvaluationReport:
        """Reliability, Generality and Locality of the edited model beside the base model's.

        Args:
            facts: edited facts with the paraphrases and locality queries to ask; default: those
                that were edited, as they were read.
            work_folder: keeps what was answered, so that an interrupted evaluation resumes.
            progress: show progress bars.
        """
        edits = self.edits
        facts = edits.facts if facts is None else list(facts)
        identity = [
            self.config.to_dict(),
            edits.gate.threshold,
            edits.queries,
            self.attached.layout.pack(edits.neurons),
            edits.generated,
            *edits.gate.state_dict().values(),
            *edits.generator.state_dict().values(),
        ]
        evaluation = Evaluation(
            self.model,
            self.tokenizer,
            facts,
            self.template,
            work_folder=work_folder,
            edits=identity,
        )
        places = {fact.normalized_query: row for row, fact in enumerate(edits.facts)}
        rows = [places.get(fact.normalized_query, -1) for fact in facts]

        def mount_own(queries: Sequence[str], owners: Sequence[int]):
            return self.attached.neurons(edits.neurons, torch.tensor([rows[i] for i in owners]))

        protocol = {
            "model": self.name,
            "layer": self.layer,
            "gate": self.config.gate,
            "require_subject": self.config.requires_subject(len(edits.facts)),
            "generator": self.config.generator.kind,
            "sampler": dataclasses.asdict(self.config.generator.sampler),
            "snap": self.config.snap,
            "edited_facts": len(edits.facts),
            "generated_facts": int(edits.generated.sum()),
            "left_out": f"{edits.report.known} facts that the base model answered so already",
            "threshold": edits.gate.threshold,
            "threshold_calibrated_on": dataclasses.asdict(edits.report.calibration),
            "seed": self.config.seed,
        }
        before = dataclasses.replace(self.served)
        with self.serving():
            report = evaluate(
                evaluation,
                lambda queries, owners: self.routed(queries),
                mount_own,
                protocol=protocol,
                seconds=edits.report.seconds,
                progress=progress,
            )
        return dataclasses.replace(report, served=self.served.since(before))

    def perplexity(
        self, texts: Sequence[str] | None = None, *, progress: bool = False
    ) -> Perplexity:
        """How well base and edited model predict text that has nothing to do with the edits.

        Args:
            texts: passages; the gate sees each one's first sentence, and its neuron, if any, stays
                mounted for the whole passage. Default: the package's.
            progress: show a progress bar.

        Raises:
            ValueError: no texts, or one of a single token.
        """

        @contextmanager
        def edited(query: str) -> Iterator[bool]:
            with self.routed([query]) as routing:
                yield bool(routing.edited)

        texts = shipped_passages() if texts is None else texts
        with self.serving():
            return perplexity(self.model, self.tokenizer, texts, edited, progress)

    # Keeping

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the edits, everything but the base model, to `folder`.

        An interruption at any point leaves what was saved there before.

        Raises:
            RuntimeError: nothing is edited.
            FileExistsError: the folder holds something else.
        """
        save_editor(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> MeGEditor:
        """The editor that was saved to `folder`.

        Args:
            folder: where `save_pretrained` wrote.
            model, tokenizer: the base model; default: loaded again by its name.
            dtype: of a model loaded by name; default: as it was.
            device: of a model loaded by name.

        Raises:
            FileNotFoundError: there are no edits.
            CorruptFileError: a file is damaged, or of a newer version of the format.
            ValueError: `model` is not the one that was edited.
        """
        return load_editor(cls, Path(folder), model, tokenizer, dtype, device)

    # The stages

    def _encode(self, texts: Sequence[str]) -> Tensor:
        return self.encoder.encode(texts).to(self.model.device)

    def _collect(
        self,
        facts: Sequence[Fact],
        initial: Neurons | None,
        work_folder: str | Path | None,
        progress: bool,
    ) -> Collection:
        return collect(
            self.attached,
            self.tokenizer,
            facts,
            self.config.collection,
            template=self.template,
            initial=initial,
            work_folder=work_folder,
            progress=progress,
        )

    def _usable_for_tuning(self, tuning: Sequence[Fact], facts: Sequence[Fact]) -> list[Wordings]:
        usable = []
        for fact in unrelated_to(tuning, facts):
            same = tuple(dict.fromkeys((fact.query, *fact.paraphrases)))
            if len(same) > 1:
                usable.append(Wordings(same, tuple(other.query for other in fact.locality)))
        if len(usable) < FEWEST_TUNING_FACTS:
            raise FactsError(
                f"{len(usable)} of {len(tuning)} tuning facts have a paraphrase and neither query "
                f"nor subject in common with an edited fact; at least {FEWEST_TUNING_FACTS} are "
                "needed: pass others"
            )
        random.Random(self.config.seed).shuffle(usable)
        return usable[: self.config.tuning_facts_for(len(facts))]

    def _tune_encoder(
        self,
        wordings: Sequence[Wordings],
        unrelated: Sequence[str],
        work_folder: str | Path | None,
        progress: bool,
    ) -> tuple[HeldOut, float]:
        """Tune the encoder on most of the wordings; the conditions of the others are held out.

        Also returns the seconds that this took before an interruption, if it was finished then.
        """
        held = max(2, round(len(wordings) * self.config.calibration_share))
        before = self._tune_once(wordings[held:], work_folder, progress)
        pairs = [(w.same[0], other) for w in wordings[:held] for other in w.same[1:]]
        alike = [(w.same[0], other) for w in wordings[:held] for other in w.different]
        held_out = HeldOut(
            self._encode([query for query, _ in pairs]),
            self._encode([other for _, other in pairs]),
            self._encode([query for query, _ in alike]),
            self._encode([other for _, other in alike]),
            self._encode(unrelated),
        )
        return held_out, before

    def _tune_once(
        self, wordings: Sequence[Wordings], work_folder: str | Path | None, progress: bool
    ) -> float:
        """Tune the encoder, or take what an interrupted edit tuned; the seconds that took then."""
        encoder, config = self.encoder, self.config.encoder_tuning
        path = None
        if work_folder is not None:
            texts = [dataclasses.asdict(wording) for wording in wordings]
            how = [dataclasses.asdict(config), encoder.pooling]
            digest = fingerprint(how, texts, *encoder.model.state_dict().values())
            path = Path(work_folder) / f"encoder-{digest}.safetensors"

        def make() -> tuple[dict[str, Tensor], dict[str, str]]:
            seconds: dict[str, float] = {}
            with _timed(seconds, "tuning"):
                encoder.tune(wordings, config, progress)
            return encoder.model.state_dict(), {"seconds": str(seconds["tuning"])}

        def write(path: Path, tuned: tuple[dict[str, Tensor], dict[str, str]]) -> None:
            write_tensors(path, *tuned)

        def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
            weights, noted = read_tensors(path)
            if weights.keys() != encoder.model.state_dict().keys() or "seconds" not in noted:
                raise CorruptFileError(f"{path} holds no tuned encoder")
            return weights, noted

        (weights, noted), found = once(path, make, write, read)
        if not found:
            return 0.0
        encoder.model.load_state_dict(weights)
        return float(noted["seconds"])

    def _make_gate(
        self, config: EditorConfig, queries: Tensor, held_out: HeldOut, progress: bool
    ) -> tuple[SimilarityGate | FamiliarityNetwork, Calibration]:
        """The gate over the edited queries, its threshold calibrated on held-out ones."""
        generator = torch.Generator().manual_seed(self.config.seed)
        negative = held_out.negative(queries, generator)
        positive = held_out.positive(queries, generator)
        gate: SimilarityGate | FamiliarityNetwork
        if config.gate == "similarity":
            gate = SimilarityGate(queries)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                gate = FamiliarityNetwork(self.encoder.dim).to(queries.device)
                # Half of the other queries teach uncertainty, the other half calibrate.
                order = torch.randperm(len(negative), generator=generator)
                taught, negative = negative[order].chunk(2)
                gate.fit(queries, taught, seed=self.config.seed, progress=progress)
        weight = config.rejection_weight
        calibration = dataclasses.replace(
            calibrate(gate.score(positive), gate.score(negative), weight), edited=len(queries)
        )
        gate.threshold = calibration.threshold if config.threshold is None else config.threshold
        return gate, calibration

    def _gate_among(
        self, queries: Tensor, progress: bool
    ) -> tuple[SimilarityGate | FamiliarityNetwork, Calibration]:
        """The present gate, now over these edited queries: calibrated again only if it must be.

        Another threshold would change who is let through among queries that have nothing to do
        with what is added or removed. A familiarity network is another one after every change.
        """
        before = self.edits
        then, now = before.report.calibration.edited or 0, len(queries)
        if self.config.gate == "familiarity" or max(then, now) > CALIBRATED_TO * min(then, now):
            return self._make_gate(self.config, queries, before.held_out, progress)
        return SimilarityGate(queries, before.gate.threshold), before.report.calibration

    def _train(
        self,
        generator: Generator,
        facts: Sequence[Fact],
        queries: Tensor,
        neurons: Neurons,
        held_out: HeldOut,
        seconds: dict[str, float],
        work_folder: str | Path | None,
        progress: bool,
        keep_scales: bool = False,
    ) -> Training:
        """Train `generator`, in place; its seconds, with those that a resumed one took before."""
        with _timed(seconds, "generator"):
            training = train_generator(
                generator,
                queries,
                neurons,
                self._answers(facts),
                rewording=self._rewording(generator.config, held_out),
                keep_scales=keep_scales,
                work_folder=work_folder,
                progress=progress,
            )
        seconds["generator"] += training.seconds_before
        return training

    def _generates(self, generator: Generator, which: Tensor) -> Tensor:
        """Whether generated neurons answer the edited facts `which` [N] bool marks: [M] bool.

        Those that not even their collected neurons answer are not the generator's to reach.
        """
        edits, rows = self.edits, which.nonzero()[:, 0]
        answers = self._answers(edits.facts)
        made = generator.generate(edits.queries[rows.to(edits.queries.device)])
        collected = edits.neurons[rows].to(made.device)
        return (answers(made, rows) | ~answers(collected, rows)).cpu()

    def _subject_named(self, queries: Sequence[str], fact: Tensor) -> Tensor:
        """[B] whether each query names the subject of its row of `fact` [B], if that has one."""
        near = [self.facts[row] for row in fact.tolist()]
        named = [f.is_named_in(query) for f, query in zip(near, queries, strict=True)]
        return torch.tensor(named, dtype=torch.bool, device=fact.device)

    def _rewording(self, config: GeneratorConfig, held_out: HeldOut) -> Rewording | None:
        """What a generator shall see besides its queries' own conditions."""
        wanted = not self.config.snap if config.reword is None else config.reword
        return held_out.rewording if wanted else None

    def _answers(self, facts: Sequence[Fact]) -> Answers:
        """Whether the model answers facts with given neurons; layers below them run once."""
        lower = LowerLayers(self.model, self.layer)
        size = self.config.collection.batch_size

        @functools.cache
        def prepared(rows: tuple[int, ...]) -> tuple[TargetBatch, Tensor]:
            pairs = [
                target_tokens(
                    self.tokenizer, self.template.format(facts[row].query), facts[row].answer
                )
                for row in rows
            ]
            batch = target_batch(self.model, self.tokenizer, pairs)
            return batch, lower.run(**batch.inputs)

        @torch.no_grad()
        def answers(neurons: Neurons, rows: Tensor) -> Tensor:
            right = []
            for start in range(0, len(rows), size):
                batch, hidden = prepared(tuple(rows[start : start + size].tolist()))
                mounted = self.attached.neurons(neurons[start : start + size])
                with lower.replaced_by(hidden), mounted:
                    right.append(score_targets(self.model, batch).right)
            return torch.cat(right)

        return answers


def _holding(generator: Generator, queries: Tensor, neurons: Neurons) -> Generator:
    """The generator of an edited model with these facts; a bank holds just their neurons."""
    if not isinstance(generator, NeuronBank):
        return generator
    bank = copy.deepcopy(generator)
    bank.store(queries, neurons.to(queries.device))
    return bank


def _fits_twice(model: PreTrainedModel) -> bool:
    """Whether a copy of the weights leaves half of the machine's memory to others."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = 4 * model.get_memory_footprint() <= memory
    if not fits:
        log.info("the model takes more than a quarter of the memory: its weights are not packed")
    return fits


@contextmanager
def _as_before_on_error(encoder: TextEncoder) -> Iterator[None]:
    """Tuning changes the encoder in place; what was edited before needs it as it was."""
    before = copy.deepcopy(encoder.state_dict())
    try:
        yield
    except BaseException:
        encoder.load_state_dict(before)
        encoder.eval().requires_grad_(False)
        raise


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
