"""`EditorConfig`: everything that decides how a model is edited, checked before any work."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from meg_kernels.checks import SEED, check_fields, from_fields, instance_of, integer, number, one_of
from meg_kernels.editing.contexts import Context
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.routing.generators import GeneratorConfig
from meg_kernels.routing.router import RoutingConfig
from meg_kernels.text_encoder import EncoderTuningConfig

GateKind = Literal["similarity", "familiarity"]


def _collection(values: Any, name: str) -> CollectionConfig:
    """The collection's configuration from its fields, also as versions up to 0.1 wrote them."""
    old = values.get("question_framings") if isinstance(values, Mapping) else None
    if isinstance(old, list | tuple):
        values = {**values}
        del values["question_framings"]
        beginnings = values.pop("cloze_framings", None) or ()
        pairs = itertools.zip_longest(old, beginnings, fillvalue="{}")
        values["contexts"] = [
            {"name": f"framing {number}", "question": question, "beginning": beginning}
            for number, (question, beginning) in enumerate(pairs, 1)
        ]
    return from_fields(CollectionConfig, values, name, contexts=_contexts)


def _contexts(values: Any, name: str) -> Any:
    if not isinstance(values, list | tuple):
        return values  # which the configuration refuses
    return [from_fields(Context, value, f"{name}[{i}]") for i, value in enumerate(values)]


@dataclass(frozen=True)
class EditorConfig:
    """How a model is edited.

    Args:
        layer: the edited feed-forward layer, from 0; None: three quarters up the model.
        template: how queries become prompts; None: the model's own (`PromptTemplate.for_model`).
        collection: how neurons are fitted.
        encoder_tuning: how the text encoder is tuned.
        generator: the weight generator, its network and its training.
        gate: `similarity`, or the paper's `familiarity` network.
        threshold: the score above which the gate accepts a query: a cosine (similarity), or minus
            an entropy in nats (familiarity); None: calibrated on held-out queries.
        require_subject, snap, serve_unlearnt: how queries find their neurons, as in
            `RoutingConfig`. If the subject is required, queries about other subjects keep their
            answers, and so do wordings that name the subject otherwise ("the French capital").
        calibration_share: the share of the tuning facts that calibrate the gate and do not tune
            the encoder, between 0 and 1.
        most_tuning_facts: at most this number of tuning facts is used; default: four for each
            edited fact, but at least 512 and at most 2048. The more facts are edited, the more of
            them look like a query that is none of them.
        rejection_weight: how much worse it is that the gate accepts a query wrongly, which changes
            an answer that nobody asked to change, than that it rejects one wrongly.
        seed: of the choice of tuning facts, and of the gate.

    Raises:
        TypeError: a stage's configuration is of another type.
        ValueError: a value is out of range.
    """

    layer: int | None = None
    template: PromptTemplate | None = None
    collection: CollectionConfig = field(default_factory=CollectionConfig)
    encoder_tuning: EncoderTuningConfig = field(default_factory=EncoderTuningConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig.dit)
    gate: GateKind = "similarity"
    threshold: float | None = None
    require_subject: bool = True
    snap: bool = True
    serve_unlearnt: bool = False
    calibration_share: float = 0.25
    most_tuning_facts: int | None = None
    rejection_weight: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            layer=integer(0).or_none(),
            template=instance_of(PromptTemplate).or_none(),
            collection=instance_of(CollectionConfig),
            encoder_tuning=instance_of(EncoderTuningConfig),
            generator=instance_of(GeneratorConfig),
            gate=one_of(GateKind),
            threshold=number().or_none(),
            calibration_share=number(above=0, below=1),
            most_tuning_facts=integer(1).or_none(),
            rejection_weight=number(above=0),
            seed=SEED,
        )
        _ = self.routing  # which checks the rest

    @property
    def routing(self) -> RoutingConfig:
        """How queries find their neurons."""
        return RoutingConfig(self.snap, self.require_subject, self.serve_unlearnt)

    def tuning_facts_for(self, num_facts: int) -> int:
        """How many tuning facts are used at most when this number of facts is edited.

        >>> [EditorConfig().tuning_facts_for(num_facts) for num_facts in (64, 256, 10_000)]
        [512, 1024, 2048]
        """
        wanted = 4 * integer(0)("num_facts", num_facts)
        return self.most_tuning_facts or min(max(wanted, 512), 2048)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, for `from_dict`."""
        return dataclasses.asdict(self) | {"generator": self.generator.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditorConfig:
        """The configuration whose `to_dict` gave these values.

        Raises:
            ValueError: a field is unknown, or a value is out of range.
        """
        return from_fields(
            cls,
            values,
            "the editor's configuration",
            template=functools.partial(from_fields, PromptTemplate),
            collection=_collection,
            encoder_tuning=functools.partial(from_fields, EncoderTuningConfig),
            generator=lambda given, _: GeneratorConfig.from_dict(given),
        )
