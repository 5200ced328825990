"""MeG Kernels: massive editing of language models by dynamic weight generation.

from meg_kernels import MeGEditor, read_facts

editor = MeGEditor.for_model("smollm2")
editor.edit(read_facts("facts.jsonl"))
editor.generate(["What is the capital of France?"])
"""

from meg_kernels.diffusion import (
    DiTConfig,
    NeuronDiT,
    NoiseSchedule,
    SamplerConfig,
    load_released_checkpoint,
    sample,
)
from meg_kernels.editing.collect import Collection, CollectionConfig, collect
from meg_kernels.editing.editor import EditorConfig, EditReport, MeGEditor
from meg_kernels.editing.evaluate import EvaluationReport, Metrics
from meg_kernels.editing.facts import Fact, FactsError, LocalityQuery, read_facts, write_facts
from meg_kernels.editing.generators import GeneratorConfig
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.familiarity import FamiliarityNetwork, SimilarityGate
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.nn import MeGLinear, attach
from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_
from meg_kernels.storage import CorruptFileError
from meg_kernels.text_encoder import EncoderTuningConfig, TextEncoder

__version__ = "0.1.0"

__all__ = [
    "Collection",
    "CollectionConfig",
    "CorruptFileError",
    "DiTConfig",
    "EditReport",
    "EditorConfig",
    "EncoderTuningConfig",
    "EvaluationReport",
    "Fact",
    "FactsError",
    "FamiliarityNetwork",
    "GeneratorConfig",
    "LocalityQuery",
    "MeGEditor",
    "MeGLinear",
    "Metrics",
    "NeuronDiT",
    "NeuronLayout",
    "Neurons",
    "NoiseSchedule",
    "PromptTemplate",
    "SamplerConfig",
    "SimilarityGate",
    "TextEncoder",
    "attach",
    "collect",
    "dynamic_neuron",
    "dynamic_neuron_",
    "load_released_checkpoint",
    "read_facts",
    "sample",
    "write_facts",
]
