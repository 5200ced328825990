"""Choosing the edited layer (paper, appendix A.4): what neurons are worth in each of them.

Neurons are collected in one layer after the other, and the model is asked with each fact's own:
no gate and no generator decide here, so that a layer takes seconds instead of a whole edit.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from meg_kernels.checks import shown
from meg_kernels.editing.collect import collect
from meg_kernels.editing.evaluate import Evaluation
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.facts import Fact
from meg_kernels.nn import attach
from meg_kernels.nn.families import LAYER, decoder_layer, decoder_layers, feed_forward
from meg_kernels.progress import progress_bar
from meg_kernels.storage import WorkFolder, fingerprint, read_kept_json, write_kept_json
from meg_kernels.texts import is_ordered


@dataclass(frozen=True)
class LayerQuality:
    """What neurons in one layer are worth.

    Args:
        layer: 0-based.
        learnt: share of the facts that the model answers in every context that they were fitted in.
        reliability, generality: AG, with each fact's own collected neuron; generality is None if
            no fact has a paraphrase.
        steps: SGD steps, mean over the facts.
        seconds: that collecting took, per fact.
        norm: of the neurons, L2, mean over the facts.
    """

    layer: int
    learnt: float
    reliability: float
    generality: float | None
    steps: float
    seconds: float
    norm: float


@dataclass(frozen=True)
class LayerComparison:
    """The layers side by side.

    Args:
        layers: in ascending order.
        default: the layer that an editor takes by itself.
        n: facts.
        protocol: everything needed to repeat the comparison.
    """

    layers: list[LayerQuality]
    default: int
    n: int
    protocol: dict[str, Any]

    @property
    def best(self) -> LayerQuality:
        """The highest Generality, or Reliability where there are no paraphrases.

        Among equals the highest layer: the fewer layers above it, the cheaper a step of SGD.
        """
        return max(
            self.layers,
            key=lambda q: (q.reliability if q.generality is None else q.generality, q.layer),
        )

    def to_dict(self) -> dict[str, Any]:
        """The comparison, JSON-able."""
        return {
            "n": self.n,
            "best": self.best.layer,
            "default": self.default,
            "layers": [asdict(quality) for quality in self.layers],
            "protocol": self.protocol,
        }


def default_layer(model: PreTrainedModel) -> int:
    """The layer that is edited if none is named: three quarters up."""
    return 3 * len(decoder_layers(model)) // 4


def compare_layers(
    prompted: PromptedModel,
    facts: Sequence[Fact],
    layers: Sequence[int] | None = None,
    config: CollectionConfig | None = None,
    *,
    work_folder: str | Path | None = None,
    progress: bool = False,
) -> LayerComparison:
    """Collect neurons for `facts` in several layers, and ask the model with them.

    Args:
        prompted: the language model; it stays as it is.
        facts: with the new answers; some tens are enough.
        layers: 0-based; default: every second one. The editor's default layer is always among them.
        config: how neurons are fitted.
        work_folder: keeps finished layers, so that an interrupted comparison of the same facts
            with the same configuration resumes. Default: nothing is kept.
        progress: show progress bars.

    Raises:
        ValueError: no facts, or a layer that the model does not have.
        FloatingPointError: the fit diverged; a smaller learning rate helps.
    """
    model = prompted.model
    if layers is not None and not is_ordered(layers):
        raise TypeError(f"layers is {shown(layers)}; it must be a list of layers, such as [4, 8]")
    if layers is None:
        layers = range(0, len(decoder_layers(model)), 2)
    chosen = sorted({*(LAYER("layer", layer) for layer in layers), default_layer(model)})
    for layer in chosen:
        decoder_layer(model, layer)
    config = config or CollectionConfig()
    # Locality queries have no neuron of their own.
    asked = [dataclasses.replace(fact, locality=()) for fact in facts]
    evaluation = Evaluation(prompted, asked)
    settings = [asdict(config), [asdict(fact) for fact in asked], evaluation.protocol()]
    qualities, work = [], WorkFolder.of(work_folder)
    for layer in (bar := progress_bar(chosen, desc="comparing", unit="layer", shown=progress)):
        bar.set_postfix_str(f"layer {layer}")
        # Another model, fact or setting has another identity: results never mix.
        weights = feed_forward(model, layer).weights()
        quality, _ = work.once(
            f"layer-{layer}-{fingerprint(settings, *weights)}.json",
            functools.partial(_measure, evaluation, layer, config, progress),
            lambda file, quality: write_kept_json(file, asdict(quality)),
            lambda file: LayerQuality(**read_kept_json(file)),
        )
        qualities.append(quality)
    wanted = ("prompt_template", "decoding", "ag", "queries", "dtype", "device")
    protocol = {name: evaluation.protocol()[name] for name in wanted}
    protocol["collection"] = asdict(config)
    return LayerComparison(qualities, default_layer(model), len(facts), protocol)


def _measure(
    evaluation: Evaluation, layer: int, config: CollectionConfig, progress: bool
) -> LayerQuality:
    prompted = evaluation.prompted
    attached = attach(prompted.model, layer)
    try:
        started = time.perf_counter()
        collection = collect(prompted, attached, evaluation.facts, config, progress=progress)
        seconds = time.perf_counter() - started

        def own(queries: Sequence[str], owners: Sequence[int]) -> AbstractContextManager:
            return attached.neurons(collection.neurons, torch.tensor(owners))

        metrics = evaluation.collected(own, progress)
    finally:
        attached.detach()
    assert metrics.reliability_ag is not None  # every fact has a query
    return LayerQuality(
        layer,
        collection.learnt.double().mean().item(),
        metrics.reliability_ag,
        metrics.generality_ag,
        collection.steps.double().mean().item(),
        seconds / len(evaluation.facts),
        attached.layout.pack(collection.neurons).norm(dim=1).mean().item(),
    )
