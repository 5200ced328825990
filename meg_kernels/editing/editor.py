"""`MeGEditor`: many facts edited in one language model, from collection to saving.

    editor = MeGEditor.for_model("smollm2")
    editor.edit(facts)
    editor.generate(["What is the capital of France?", "What is the capital of Spain?"])
    editor.save_pretrained("edited")

Each verb of editing checks what it is given, has `Stages` make new `Edits`, and puts them in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.checks import FLAG, TEXT, instance_of
from meg_kernels.editing.config import EditorConfig, GateKind
from meg_kernels.editing.distill import Distillation
from meg_kernels.editing.edited_model import load_base, one_at_a_time
from meg_kernels.editing.kept import KeptModel
from meg_kernels.editing.layers import default_layer
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.editing.stages import Stages
from meg_kernels.editing.tuning import (
    regated,
    tuned_with,
    usable_for_tuning,
    warn_of_alike,
    with_gate,
)
from meg_kernels.facts import (
    Fact,
    FactsError,
    FactsLike,
    OnConflict,
    editable_facts,
    warn_of_several_answers,
)
from meg_kernels.familiarity import Calibration
from meg_kernels.gradients import with_gradients
from meg_kernels.nn import attach
from meg_kernels.nn.families import language_model
from meg_kernels.pretrained import DEFAULT_ENCODER, load_language_model
from meg_kernels.routing.edits import EditReport, Edits, Training
from meg_kernels.routing.generators import GeneratorConfig
from meg_kernels.routing.router import Router
from meg_kernels.routing.saving import load_edited
from meg_kernels.shipped import shipped_tuning_facts
from meg_kernels.text_encoder import TextEncoder


class MeGEditor(KeptModel):
    """A language model with edited facts.

    Args:
        model: a transformers causal language model, or a PEFT model around one; its weights are
            never changed.
        tokenizer: its tokenizer; it stays as it is.
        encoder: the text encoder, or its name; `edit` tunes it. Default: all-MiniLM-L6-v2, on the
            model's device.
        config: how to edit.
        name: under which the model can be loaded again; default: what transformers noted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: TextEncoder | str | None = None,
        config: EditorConfig | None = None,
        name: str | None = None,
    ):
        config = instance_of(EditorConfig).or_none()("config", config) or EditorConfig()
        prompted = PromptedModel.of(language_model(model).eval(), tokenizer, config.template)
        name = TEXT("name", name or str(prompted.model.name_or_path))
        if not isinstance(encoder, TextEncoder):
            encoder = TextEncoder.from_pretrained(
                DEFAULT_ENCODER if encoder is None else encoder, device=model.device
            )
        # Last: an error before it leaves the model as it is.
        attached = attach(model, default_layer(model) if config.layer is None else config.layer)
        router = Router(encoder, None, config.routing, model.device)
        super().__init__(prompted, attached, router, name)
        self.config = dataclasses.replace(config, layer=self.layer, template=self.template)
        self._states = {}

    @classmethod
    def for_model(
        cls,
        name: str,
        config: EditorConfig | None = None,
        *,
        encoder: str = DEFAULT_ENCODER,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        **model_options: Any,
    ) -> MeGEditor:
        """An editor for a language model by its name.

        Args:
            name: `smollm2`, a folder, or a Hugging Face model id.
            config: how to edit.
            encoder: the text encoder: a folder or a Hugging Face model id.
            dtype: of the model's weights; in float32, answers do not depend on batching.
            device: of model and encoder; default: an accelerator if there is one.
            model_options: further keyword arguments of transformers' `from_pretrained`.
        """
        model, tokenizer = load_language_model(name, dtype, device, **model_options)
        return cls(model, tokenizer, encoder, config, name)

    def __repr__(self) -> str:
        return (
            f"MeGEditor({self.name!r}, layer {self.layer}, {len(self.facts)} facts edited, "
            f"{self.config.gate} gate, {self.model.dtype} on {self.model.device})"
        )

    # Editing: each of these makes a new `Edits` and puts it in place at the end, so that an error
    # or an interruption leaves what was edited before, and others may ask meanwhile.

    @one_at_a_time
    def edit(
        self,
        facts: FactsLike,
        *,
        tuning_facts: FactsLike | None = None,
        unrelated_queries: Iterable[str] | None = None,
        skip_known: bool = False,
        on_conflict: OnConflict = "error",
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> EditReport:
        """Edit facts into the model, in place of any edited before.

        Args:
            facts: with the new answers; a path, facts, dicts, or a `datasets.Dataset`.
            tuning_facts: other facts with paraphrases, which tune the encoder and calibrate the
                gate; those that share a query or subject with an edited fact are left out.
                Default: the facts that the package ships for this.
            unrelated_queries: queries about anything, for the gate; default: the package's.
            skip_known: leave out facts whose answers the model gives already.
            on_conflict: of facts that contradict each other, keep the `first` or `last`, or raise
                an `error`.
            work_folder: keeps finished work, so that an interrupted edit resumes.
            progress: show progress bars.

        Raises:
            FactsError: facts that contradict each other, that the model cannot be taught, too few
                to tune with, or none that the model does not answer already.
        """
        skip_known = FLAG("skip_known", skip_known)
        facts = given = editable_facts(facts, on_conflict)
        tuning, unrelated = tuned_with(tuning_facts, unrelated_queries)
        stages = self._stages(work_folder, progress).checked(facts)
        if skip_known and not (facts := self.unknown(facts, progress=progress)):
            raise FactsError(f"the model answers all {len(given)} facts so already")
        warn_of_several_answers(facts)
        warn_of_alike(self.router, facts)
        wordings = usable_for_tuning(tuning, facts, self.config)
        edits, encoder = stages.first(facts, wordings, unrelated, len(given) - len(facts))
        self._put(edits, encoder)
        return edits.report

    @one_at_a_time
    def prepare(
        self,
        facts: FactsLike | None = None,
        *,
        tuning_facts: FactsLike | None = None,
        unrelated_queries: Iterable[str] | None = None,
        on_conflict: OnConflict = "error",
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> EditReport:
        """Learn from facts how to edit others, which takes `add` little time then; edit none.

        What was edited before is gone, and `edit` would begin from the start. The generator is a
        hypernetwork from now on, which tells the neurons of facts that it never saw: of the more,
        the more it learnt from. What is saved now can be loaded again for any number of edited
        models.

        Args:
            facts: such as those that are to be edited, a thousand or more; default: the package's,
                which are 423.
            tuning_facts, unrelated_queries, on_conflict: as `edit` has them.
            work_folder: keeps finished work, so that an interrupted preparation resumes.
            progress: show progress bars.

        Raises:
            FactsError: facts that contradict each other, that the model cannot be taught, or too
                few to tune with.
        """
        facts = editable_facts(shipped_tuning_facts() if facts is None else facts, on_conflict)
        tuning, unrelated = tuned_with(tuning_facts, unrelated_queries)
        config = dataclasses.replace(self.config, generator=GeneratorConfig.hypernetwork())
        stages = self._stages(work_folder, progress, config).checked(facts)
        # Nothing of these facts stays, so that others may be tuned with as well.
        wordings = usable_for_tuning(tuning, (), config, len(facts))
        edits, encoder, report = stages.prepared(facts, wordings, unrelated)
        self._put(edits, encoder)
        return report

    @one_at_a_time
    def add(
        self,
        facts: FactsLike,
        *,
        replace: bool = False,
        on_conflict: OnConflict = "error",
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> EditReport:
        """Edit further facts. Those edited before keep their neurons, and so their answers.

        The generator stays as it is: the neurons that are collected for these facts are kept beside
        it and answer for them, until `train` teaches it all of them. A familiarity gate learns them
        at once; a similarity gate is calibrated again when there are half as many facts again as
        when it was. Either can then decide otherwise about other queries.

        Args:
            facts: with the new answers, as `edit` takes them.
            replace: put them in place of facts with the same query or id, instead of refusing.
            on_conflict: as `edit` has it, among these facts.
            work_folder: keeps finished work, so that an interrupted addition resumes.
            progress: show progress bars.

        Raises:
            FactsError: a query or id is edited already, or the model cannot be taught a fact.
            RuntimeError: nothing was edited yet; call `edit`.
        """
        replace = FLAG("replace", replace)
        edited, facts = self.edits, editable_facts(facts, on_conflict)
        before = edited.beside(facts, replace)
        warn_of_several_answers(facts, before.facts)
        warn_of_alike(self.router, facts, before)
        stages = self._stages(work_folder, progress).checked(facts)
        edits, report = stages.added(before, facts)
        self._put(edits)
        return report

    @one_at_a_time
    def remove(self, facts: str | Fact | Iterable[str | Fact]) -> None:
        """Take edits back: the base model answers their queries again.

        Args:
            facts: an edited fact, its id or its query, or several of them.

        Raises:
            KeyError: one that is not edited.
            TypeError: one that is no name.
            RuntimeError: nothing is edited.
        """
        edits = self.edits
        gone = edits.rows_to_remove(facts)
        if not gone:
            return
        left = edits.without(gone)
        if len(left):
            self._put(regated(left, self.config, progress=False))
        elif edits.is_hypernetworks:  # which edits others, as after `prepare`
            self._put(left)
        else:
            self.router.put(None)

    @one_at_a_time
    def train(self, *, work_folder: str | Path | None = None, progress: bool = False) -> Training:
        """Train the generator further, on the collected neurons of all edited facts.

        Nothing happens unless facts were added since it was trained. The neurons that it made
        before move a little; added facts that it does not answer in the end keep their collected
        neurons, until the next time. A hypernetwork stays as it is: facts that it does not tell
        keep theirs, and `replace_generator` makes one that learnt from these facts alone.

        Args:
            work_folder: keeps a checkpoint, so that an interrupted training resumes.
            progress: show a progress bar.

        Raises:
            RuntimeError: nothing is edited.
        """
        if self.edits.num_waiting and not self.edits.is_hypernetworks:
            self._put(self._stages(work_folder, progress).trained(self.edits))
        return self.edits.training

    @one_at_a_time
    def replace_generator(
        self,
        config: GeneratorConfig,
        *,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> Training:
        """Train another generator on the collected neurons of all edited facts, from the start.

        Args:
            config: its kind, network and training.
            work_folder: keeps a checkpoint, so that an interrupted training resumes.
            progress: show a progress bar.

        Raises:
            RuntimeError: nothing is edited.
        """
        self._put(self._stages(work_folder, progress).replaced(self.edits, config))
        return self.edits.training

    @one_at_a_time
    def set_gate(
        self,
        gate: GateKind | None = None,
        *,
        threshold: float | Literal["calibrated"] | None = None,
        require_subject: bool | None = None,
        serve_unlearnt: bool | None = None,
        progress: bool = False,
    ) -> Calibration:
        """Put another gate, or another threshold, in place of the present one.

        Args:
            gate: its kind; default: that of the present one.
            threshold: the score above which it accepts a query, also when facts are added or
                removed; a cosine (similarity) or minus an entropy in nats (familiarity).
                `calibrated`: as held-out queries have it. Default: as it is, if its kind is.
            require_subject, serve_unlearnt: as in `EditorConfig`; default: as they are. The former
                calibrates anew, unless a threshold was chosen.
            progress: show a progress bar.

        Returns:
            How well the gate separates the held-out queries, at the calibrated threshold even if
            another was chosen.

        Raises:
            RuntimeError: nothing is edited.
            ValueError: no such gate, a threshold that is not finite, or no True or False.
        """
        edits, config = self.edits, self.config
        given = {"require_subject": require_subject, "serve_unlearnt": serve_unlearnt}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        config = dataclasses.replace(config, **changes)
        anew = config.require_subject != self.config.require_subject and config.threshold is None
        if threshold is not None or gate not in (None, config.gate):
            chosen, anew = None if threshold == "calibrated" else threshold, True
            config = dataclasses.replace(config, gate=gate or config.gate, threshold=chosen)
        if anew:
            edits = with_gate(edits, config, progress)
        self.config = config
        self._put(edits)
        return edits.calibration

    @one_at_a_time
    def distill(
        self,
        steps: int,
        *,
        teacher_steps: int | None = None,
        seed: int | None = None,
        work_folder: str | Path | None = None,
        progress: bool = False,
    ) -> Distillation:
        """Teach the generator to sample in a few DDIM steps what it samples in many.

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
        stages = self._stages(work_folder, progress)
        edits, distillation = stages.distilled(self.edits, steps, teacher_steps, seed)
        self._put(edits)
        return distillation

    def detach(self) -> None:
        """Give the base model back, module for module; RuntimeError while a thread is answered."""
        self.attached.detach()

    @classmethod
    @with_gradients
    def from_pretrained(
        cls,
        folder: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **model_options: Any,
    ) -> MeGEditor:
        """The editor that was saved to `folder`.

        Args:
            folder: where `save_pretrained` wrote.
            model, tokenizer: the base model; default: loaded again by its name, if it had one.
            dtype: of a model loaded by name; default: as it was.
            device: of a model loaded by name; default: an accelerator if there is one.
            model_options: further keyword arguments of transformers' `from_pretrained`.

        Raises:
            FileNotFoundError: there are no edits.
            CorruptFileError: a file is damaged, or of a newer version of the format.
            ValueError: `model` is not the one that was edited, or must be given.
        """
        if (model is None) != (tokenizer is None):
            raise ValueError("pass both model and tokenizer, or neither")
        device = device if model is None else language_model(model).device
        saved, encoder = load_edited(folder, device)
        base = saved.base
        if model is None or tokenizer is None:
            model, tokenizer = load_base(saved, dtype, device, **model_options)
        editor = cls(model, tokenizer, encoder, saved.parsed(EditorConfig.from_dict), base.name)
        editor.check_base(base)
        editor.router.put(saved.edits)
        editor._states[Path(folder).resolve()] = saved.state
        return editor

    def _stages(
        self, work_folder: str | Path | None, progress: bool, config: EditorConfig | None = None
    ) -> Stages:
        config = config or self.config
        return Stages(self.prompted, self.attached, self.router, config, work_folder, progress)

    def _put(self, edits: Edits, encoder: TextEncoder | None = None) -> None:
        """Answer by these edits from now on."""
        self.config = dataclasses.replace(self.config, generator=edits.generator.config)
        self.router.put(edits, encoder, self.config.routing)
