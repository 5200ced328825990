"""MeG Kernels: massive editing of language models by dynamic weight generation.

from meg_kernels import MeGEditor, read_facts

editor = MeGEditor.for_model("smollm2")
editor.edit(read_facts("facts.jsonl"))
editor.generate(["What is the capital of France?"])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meg_kernels.diffusion import (
        DiTConfig,
        NeuronDiT,
        NoiseSchedule,
        SamplerConfig,
        load_released_checkpoint,
        sample,
    )
    from meg_kernels.editing.by_context import ContextReport, InContext
    from meg_kernels.editing.collect import Collection, collect
    from meg_kernels.editing.config import EditorConfig
    from meg_kernels.editing.contexts import Context
    from meg_kernels.editing.distill import Distillation
    from meg_kernels.editing.editor import MeGEditor
    from meg_kernels.editing.evaluate import EvaluationReport, Metrics
    from meg_kernels.editing.general_ability import Perplexity
    from meg_kernels.editing.neuron_fit import CollectionConfig
    from meg_kernels.editing.prompting import PromptedModel, PromptTemplate
    from meg_kernels.facts import (
        Fact,
        FactsError,
        LocalityQuery,
        as_facts,
        read_facts,
        write_facts,
    )
    from meg_kernels.familiarity import Calibration, FamiliarityNetwork, SimilarityGate
    from meg_kernels.neuron import NeuronLayout, Neurons
    from meg_kernels.nn import Attached, MeGLinear, attach
    from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_
    from meg_kernels.routing.edits import EditReport, Edits, Training
    from meg_kernels.routing.generators import GeneratorConfig
    from meg_kernels.routing.router import Router, Routing, RoutingConfig
    from meg_kernels.storage import CorruptFileError
    from meg_kernels.text_encoder import EncoderTuningConfig, TextEncoder

__version__ = "0.1.0"

# Where each public name is; a module is imported when one of its names is first used.
_MODULES = {
    "diffusion": (
        "DiTConfig",
        "NeuronDiT",
        "NoiseSchedule",
        "SamplerConfig",
        "load_released_checkpoint",
        "sample",
    ),
    "editing.by_context": ("ContextReport", "InContext"),
    "editing.collect": ("Collection", "collect"),
    "editing.config": ("EditorConfig",),
    "editing.contexts": ("Context",),
    "editing.distill": ("Distillation",),
    "editing.editor": ("MeGEditor",),
    "editing.evaluate": ("EvaluationReport", "Metrics"),
    "facts": (
        "Fact",
        "FactsError",
        "LocalityQuery",
        "as_facts",
        "read_facts",
        "write_facts",
    ),
    "editing.general_ability": ("Perplexity",),
    "editing.neuron_fit": ("CollectionConfig",),
    "routing.generators": ("GeneratorConfig",),
    "editing.prompting": ("PromptTemplate", "PromptedModel"),
    "familiarity": ("Calibration", "FamiliarityNetwork", "SimilarityGate"),
    "neuron": ("NeuronLayout", "Neurons"),
    "nn": ("Attached", "MeGLinear", "attach"),
    "ops.dynamic_neuron": ("dynamic_neuron", "dynamic_neuron_"),
    "routing.edits": ("EditReport", "Edits", "Training"),
    "routing.router": ("Router", "Routing", "RoutingConfig"),
    "storage": ("CorruptFileError",),
    "text_encoder": ("EncoderTuningConfig", "TextEncoder"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
