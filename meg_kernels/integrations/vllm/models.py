"""vLLM's models whose edited feed-forward layer adds each token's neuron, by vLLM's names.

A model is one of vLLM's own, with a table of neurons at one feed-forward layer: the layer's class
is replaced by one whose forward adds the neuron to what the layer returns. Names of modules stay,
and `torch.compile` traces through it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meg_kernels.integrations.vllm import ARCHITECTURES, BY_TRANSFORMERS
from meg_kernels.integrations.vllm.settings import Settings
from meg_kernels.integrations.vllm.table import Loaded, NeuronTable
from meg_kernels.integrations.vllm.workers import fill_in_runner, model_state
from meg_kernels.routing.saving import load_edits

LAYERS = ("layers", "h")  # what models call their decoder layers


def __getattr__(name: str) -> Any:
    if name not in ARCHITECTURES | BY_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _carrying_model(name)


@functools.cache
def _carrying_model(name: str) -> type[nn.Module]:
    module, own = (ARCHITECTURES | BY_TRANSFORMERS)[name]
    base: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), own)

    class Carrying(base):
        """vLLM's model, with neurons if an edited one is configured."""

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            settings = Settings.of(vllm_config)
            self.neuron_table = None if settings is None else carry(self, settings, vllm_config)
            if settings is None:
                return
            if vllm_config.use_v2_model_runner:
                self.get_model_state_cls = model_state
            else:
                fill_in_runner()

    Carrying.__name__ = Carrying.__qualname__ = name
    Carrying.__module__ = __name__
    return Carrying


def carry(model: nn.Module, settings: Settings, vllm_config: Any) -> NeuronTable:
    """Put a table of the edited model's neurons at its feed-forward layer.

    Raises:
        ValueError: the model has no such layer, or it is not where neurons are added.
    """
    block = getattr(_decoder_layers(model)[settings.layer], "mlp", None)
    if block is None:
        raise ValueError(
            f"layer {settings.layer} of {type(model).__name__} has no mlp as one module; "
            "its neurons are served by MeGEditor alone"
        )
    weight = next(model.parameters())
    with as_by_default():  # vLLM builds a model in its own data type, and on its device
        edits = load_edits(settings.edited, "cpu").edits
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        dtype = vllm_config.model_config.dtype
        table = NeuronTable.for_edits(edits, tokens, dtype, weight.device)
        table.commit(table.load(Loaded.of(edits)))
    block.neuron_table = table
    own: Any = type(block)
    block.__class__ = _carrying_block(own)
    return table


@contextmanager
def as_by_default() -> Iterator[None]:
    """Inside, new tensors are float32 and on the CPU, whatever was set around it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    found = [
        part
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] in LAYERS
    ]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} stacks of layers, not one")
    return found[0]


@functools.cache
def _carrying_block(base: type[nn.Module]) -> type[nn.Module]:
    class CarryingBlock(base):  # type: ignore[misc, valid-type]
        """A feed-forward layer that adds each token's neuron."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = base.forward(self, x, *args, **kwargs)
            return self.neuron_table.add_to(y, x)

    CarryingBlock.__name__ = CarryingBlock.__qualname__ = f"Carrying{base.__name__}"
    return CarryingBlock
