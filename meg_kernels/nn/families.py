"""Where a transformers model keeps its feed-forward layers.

A feed-forward layer (FFN) is found by structure. Usually it is one module of the decoder layer
(`mlp`, `feed_forward`, `block_sparse_moe`, ...): a neuron reads what this block reads and adds to
what the block returns, whatever lies between. Some decoder layers hold the two projections with
no module around them (OPT's `fc1` and `fc2`): there the neuron reads what the first one reads and
adds to what the second one returns. What no rule finds is a line of `EXCEPTIONS`; what cannot
carry neurons is a line of `REFUSED`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meg_kernels.checks import Check, as_integer
from meg_kernels.neuron import ACTIVATIONS, NeuronLayout

# The FFN's usual names in a decoder layer. Where a mixture of experts has a shared expert beside
# it, both read the same and are summed: the neuron may sit at either.
BLOCK_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "ff")
# Two projections with no module around them: the path of what is read, and of what is written.
SPANS = (("fc1", "fc2"), ("intermediate", "output.dense"))
# What an FFN's class is called whose attribute has another name.
_BLOCK_CLASS = re.compile(r"mlp|moe|feedforward|ffn", re.IGNORECASE)

# By model type: the paths of what is read and of what is written, in a decoder layer.
EXCEPTIONS: dict[str, tuple[str, str]] = {
    # Here the block of that name also holds the norm before the FFN and the residual sum.
    "cpmant": ("ffn.ffn", "ffn.ffn"),
    "zamba": ("shared_transf.feed_forward", "shared_transf.feed_forward"),
    "zamba2": ("shared_transformer.feed_forward", "shared_transformer.feed_forward"),
    "reformer": ("feed_forward.dense", "feed_forward.output"),
}
# Models in which positions look at each other after the last FFN, too: their layers run in a
# loop, a convolution follows the FFN, or there are several streams of positions.
LOOKS_BACK = {
    "dory",
    "hrm_text",
    "inkling2_loop_text",
    "inkling2_text",
    "inkling_text",
    "prophetnet",
}
REFUSED: dict[str, str] = {
    "rwkv": "its feed-forward layers read the position before each one too, from a running state",
    "xlnet": "its layers hold positions before rows, so that rows cannot be told apart",
}


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward layer of a model, wherever the model keeps it.

    Args:
        layer: 0-based number of the decoder layer.
        decoder_layer: the decoder layer that the FFN is a part of.
        reads: path, in the decoder layer, of the module whose first argument the keys read.
        writes: path of the module to whose output the values are added; mostly the same one.
        layout: the layout of this FFN's neurons.
    """

    layer: int
    decoder_layer: nn.Module
    reads: str
    writes: str
    layout: NeuronLayout

    @property
    def entry(self) -> nn.Module:
        """The module whose first argument is the FFN's input."""
        return self.decoder_layer.get_submodule(self.reads)

    @property
    def exit(self) -> nn.Module:
        """The module whose output (or its first element, if that is a tuple) is the FFN's."""
        return self.decoder_layer.get_submodule(self.writes)

    @property
    def is_block(self) -> bool:
        """Whether the FFN is one module: `entry` and `exit` are the same."""
        return self.reads == self.writes

    def weights(self) -> list[Tensor]:
        """The FFN's parameters and buffers as plain tensors, however they are stored.

        A quantised weight is several of them; one that accelerate keeps elsewhere is fetched.
        """
        blocks = [self.entry] if self.is_block else [self.entry, self.exit]
        return [
            plain for block in blocks for part in block.modules() for plain in plain_tensors(part)
        ]


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what PEFT, `torch.compile` or DDP wrapped around it.

    Raises:
        TypeError: there is none.
        ValueError: a PEFT model whose prompt is learnt; its adapter is not in the layers.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        adapters = getattr(inner, "peft_config", {})
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
            raise ValueError(
                "the model has a PEFT adapter that learns a prompt, which is no part of the "
                "language model's layers; attach to a model without it, or with a LoRA instead"
            )
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DistributedDataParallel
            inner = inner.module
        else:
            raise TypeError(
                f"model is a {type(model).__name__}; it must be a transformers PreTrainedModel, "
                "or one that PEFT or torch.compile wraps"
            )
    return inner


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the language model; in an image-text model that is a part of the whole one."""
    return model.config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, in order.

    Raises:
        ValueError: no list of layers with feed-forward layers was found.
    """
    model = language_model(model)
    config = text_config(model)
    for name in {model.config.model_type, config.model_type} & set(REFUSED):
        raise ValueError(f"models of type {name!r} carry no neurons: {REFUSED[name]}")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    roots = [root for root in (decoder, model) if isinstance(root, nn.Module)]
    for root in roots:
        lists = [found for found in _lists(root) if any(_place(part, config) for part in found[1])]
        # Beside the decoder a model may hold other stacks, of another length or deeper inside.
        length = getattr(config, "num_hidden_layers", None)
        lists = [found for found in lists if len(found[1]) == length] or lists
        if lists:
            return min(lists, key=lambda found: found[0])[1]
    longest = max((found for _, found in _lists(model)), key=len, default=None)
    held = "no list of layers"
    if longest:
        parts = ", ".join(name for name, _ in longest[0].named_children())
        held = f"layers of class {type(longest[0]).__name__} that hold {parts}"
    raise ValueError(
        f"no feed-forward layer was found in {type(model).__name__}: it has {held}. Models "
        "without feed-forward layers, such as Mamba, carry no neurons; if this model has them "
        "under another name, add a line to meg_kernels.nn.families.EXCEPTIONS"
    )


LAYER = Check("the number of a decoder layer, an integer", as_integer, TypeError)


def decoder_layer(model: nn.Module, layer: int) -> nn.Module:
    """Decoder layer `layer` (0-based).

    Raises:
        TypeError: layer is no integer.
        ValueError: the model has no such layer.
    """
    layer, layers = LAYER("layer", layer), decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer is {layer}; the model has layers 0 to {len(layers) - 1}")
    return layers[layer]


def feed_forward(model: nn.Module, layer: int) -> FeedForward:
    """Feed-forward layer `layer` (0-based) of `model`, with the layout of its neurons.

    Raises:
        TypeError: layer is no integer, or model is no transformers model.
        ValueError: the model has no such layer, or that layer has no FFN.
    """
    model, layer = language_model(model), LAYER("layer", layer)
    config, part = text_config(model), decoder_layer(model, layer)
    place = _place(part, config)
    if place is None:
        layers = [i for i, other in enumerate(decoder_layers(model)) if _place(other, config)]
        held = ", ".join(name for name, _ in part.named_children())
        raise ValueError(
            f"layer {layer} has no feed-forward layer (it holds {held}); choose one of the layers "
            f"{', '.join(map(str, layers))}"
        )
    block = part.get_submodule(place[1])
    sharing = [i for i, other in enumerate(decoder_layers(model)) if block in other.modules()]
    if len(sharing) > 1:
        raise ValueError(
            f"layers {', '.join(map(str, sharing))} are given one and the same feed-forward layer, "
            "so that a neuron would act in all of them; choose another layer or another model"
        )
    activation = _activation(part, place)
    width = config.hidden_size
    # A gated FFN (act(gate(x)) * up(x)) and a mixture of experts have no single activation for an
    # extra neuron: there it is linear and has no bias, as the paper has it for Llama.
    layout = NeuronLayout(width, width, activation is not None, activation or "identity")
    return FeedForward(layer, part, *place, layout)


def plain_tensors(module: nn.Module) -> list[Tensor]:
    """The module's own parameters and buffers as plain tensors, without its children's."""
    if hasattr(module, "_hf_hook"):  # accelerate may keep its weights elsewhere
        from accelerate.utils import align_module_device

        fetched = align_module_device(module)
    else:
        fetched = contextlib.nullcontext()
    with fetched:
        own = set(module.state_dict()) - {
            f"{name}.{key}" for name, child in module.named_children() for key in child.state_dict()
        }
        tensors = [module.state_dict()[key] for key in sorted(own)]
        return [inner for tensor in tensors for inner in _inner_tensors(tensor)]


def _inner_tensors(tensor: Any) -> Iterator[Tensor]:
    """What a quantised tensor is made of; a plain one itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _inner_tensors(getattr(tensor, name))
    elif isinstance(tensor, Tensor):
        yield tensor.detach()


def _lists(root: nn.Module, depth: int = 0) -> Iterator[tuple[int, nn.ModuleList]]:
    """The module lists in `root` that lie in no other one, with how deep inside they are."""
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            yield depth, child
        else:
            yield from _lists(child, depth + 1)


def _place(layer: nn.Module, config: PretrainedConfig) -> tuple[str, str] | None:
    """Paths of the FFN's entry and exit in a decoder layer; None if it has no FFN."""
    exception = EXCEPTIONS.get(config.model_type)
    if exception is not None:
        return exception if all(_has(layer, path) for path in exception) else None
    for name in BLOCK_NAMES:
        if _has(layer, name):
            return name, name
    for span in SPANS:
        if all(_has(layer, path) for path in span):
            return span
    for name, child in layer.named_children():
        if _BLOCK_CLASS.search(type(child).__name__) and _has(layer, name):
            return name, name
    return None


def _has(layer: nn.Module, path: str) -> bool:
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        return False
    return not isinstance(module, nn.ModuleList | nn.Identity)


def _activation(layer: nn.Module, place: tuple[str, str]) -> str | None:
    """The neuron's activation in an FFN of two projections; None if it has none of ours.

    The FFN's own activation is known by what it computes: configs name it in many ways, or not.
    """
    entry, exit_ = (layer.get_submodule(path) for path in place)
    blocks = [entry] if entry is exit_ else [entry, exit_]
    shapes = [shape for block in blocks for shape in _projections(block)]
    if len(shapes) != 2 or shapes[0] != shapes[1][::-1] or _has_bare_weights(blocks):
        return None
    holders = [part for block in blocks for part in block.modules()]
    if len(blocks) == 2:  # the activation between the two is the layer's
        holders = [layer, *(child for _, child in layer.named_children()), *holders]
    for holder in holders:
        functions = [value for name, value in vars(holder).items() if "act" in name]
        for function in (holder, *functions):
            for name in ("gelu", "gelu_tanh", "silu", "relu"):
                if _is_activation(function) and _agree(function, ACTIVATIONS[name]):
                    return name
    return None


def _projections(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of each projection in `module`, plain, quantised or with adapters."""
    if isinstance(module, Conv1D):
        yield module.weight.shape[0], module.nf
    elif hasattr(module, "in_features") and hasattr(module, "out_features"):
        yield module.in_features, module.out_features  # type: ignore[misc]
    else:
        for child in module.children():
            yield from _projections(child)


def _has_bare_weights(blocks: list[nn.Module]) -> bool:
    """Whether matrices lie in no projection: a mixture's experts."""
    return any(parameter.dim() > 2 for block in blocks for parameter in block.parameters())


def _is_activation(function: object) -> bool:
    if isinstance(function, nn.Module):
        return not [*function.parameters(), *function.children()]
    return callable(function) and not isinstance(function, type)


@torch.no_grad()
def _agree(function: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor]) -> bool:
    grid = torch.linspace(-12, 12, 97, dtype=torch.float64, device="cpu")
    try:
        output = function(grid)
    except Exception:  # a part that takes something else is no activation
        return False
    expected = activation(grid)
    return (
        isinstance(output, Tensor)
        and output.shape == grid.shape
        and torch.allclose(output.double(), expected, rtol=1e-6, atol=1e-6)
    )
