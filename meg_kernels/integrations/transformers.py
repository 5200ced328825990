"""Where a transformers model keeps its feed-forward layers, and how to look into it.

A new family is one line of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.neuron import NeuronLayout


@dataclass(frozen=True)
class Family:
    """Module paths of a model family.

    `layers` is the path of the decoder layers in the model; the others are paths in a layer.
    A gated FFN (act(gate(x)) * up(x)) has no single activation for an extra neuron: there the
    neuron is linear and has no bias, as the paper has it for Llama.
    """

    layers: str
    input_projection: str
    output_projection: str
    gated: bool = False


_GATED = Family("model.layers", "mlp.gate_proj", "mlp.down_proj", gated=True)

FAMILIES: dict[str, Family] = {
    "gemma": _GATED,
    "gemma2": _GATED,
    "gpt2": Family("transformer.h", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gptj": Family("transformer.h", "mlp.fc_in", "mlp.fc_out"),
    "llama": _GATED,
    "mistral": _GATED,
    "opt": Family("model.decoder.layers", "fc1", "fc2"),
    "phi": Family("model.layers", "mlp.fc1", "mlp.fc2"),
    "qwen2": _GATED,
    "qwen3": _GATED,
    "smollm3": _GATED,
}

_NEURON_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def family_of(model: PreTrainedModel) -> Family:
    """The family of `model`, by its config's model_type; ValueError names the supported ones."""
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"models of type {model_type!r} are not supported; supported: {', '.join(FAMILIES)}. "
            "A new family is one line of meg_kernels.integrations.transformers.FAMILIES"
        )
    return FAMILIES[model_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, in order."""
    return model.get_submodule(family_of(model).layers)  # type: ignore[return-value]


def decoder_layer(model: PreTrainedModel, layer: int) -> nn.Module:
    """Decoder layer `layer` (0-based); ValueError if the model has no such layer."""
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer is {layer}; the model has layers 0 to {len(layers) - 1}")
    return layers[layer]


@dataclass
class FeedForward:
    """One feed-forward layer of a model, wherever its family keeps it."""

    block: nn.Module
    family: Family
    layer: int
    layout: NeuronLayout

    @property
    def input_projection(self) -> nn.Module:
        return self.block.get_submodule(self.family.input_projection)

    @property
    def output_projection(self) -> nn.Module:
        return self.block.get_submodule(self.family.output_projection)

    @output_projection.setter
    def output_projection(self, module: nn.Module) -> None:
        parent, _, name = self.family.output_projection.rpartition(".")
        setattr(self.block.get_submodule(parent), name, module)


def feed_forward(model: PreTrainedModel, layer: int) -> FeedForward:
    """Feed-forward layer `layer` (0-based) of `model`, with the layout of its neurons."""
    family, config = family_of(model), model.config
    block = decoder_layer(model, layer)
    activation = "identity"
    if not family.gated:
        names = ("hidden_act", "activation_function", "hidden_activation")
        name = next(getattr(config, key) for key in names if hasattr(config, key))
        if name not in _NEURON_ACTIVATIONS:
            raise ValueError(
                f"the model's activation {name!r} has no neuron counterpart; "
                f"supported: {', '.join(_NEURON_ACTIVATIONS)}"
            )
        activation = _NEURON_ACTIVATIONS[name]
    layout = NeuronLayout(config.hidden_size, config.hidden_size, not family.gated, activation)
    return FeedForward(block, family, layer, layout)


@contextmanager
def last_feed_forward_sees(model: PreTrainedModel, columns: int) -> Iterator[None]:
    """Inside, the last decoder layer's FFN works on the last `columns` positions alone.

    An FFN works on each position by itself, and no position looks at another one after the last
    layer: whoever wants the logits of these columns needs no other FFN output. Where the family
    keeps its FFN in no module of its own (OPT), nothing changes.
    """
    layer = decoder_layers(model)[-1]
    name = family_of(model).output_projection.rpartition(".")[0]
    hidden: int = 0

    def keep_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal hidden
        hidden = max(args[0].shape[1] - columns, 0)
        return (args[0][:, hidden:].contiguous(), *args[1:])

    def fill_up(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.pad(output, (0, 0, hidden, 0))

    if not name:
        yield
        return
    block = layer.get_submodule(name)
    hooks = [block.register_forward_pre_hook(keep_last), block.register_forward_hook(fill_up)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def input_of(module: nn.Module, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What `module` of `model` gets first when the model gets `inputs`; nothing after it runs."""
    noted: list[Tensor] = []

    class Reached(Exception):
        pass

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        noted.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except Reached:
        pass
    finally:
        hook.remove()
    return noted[0]
