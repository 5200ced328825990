"""What many prompts begin with, read once: keys and values of its tokens, in each layer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from meg_kernels.nn.changed import uncompiled
from meg_kernels.nn.partial import input_device


class SharedPrefix:
    """Lets a model read what follows a prefix, as if it had read the prefix, too.

    No neuron acts on the prefix's tokens: what is kept of them is the base model's.

        prefix = SharedPrefix(model, tokens)
        model(**prefix.inputs(inputs, lengths))     # logits of the rest's columns

    Args:
        model: a causal language model with nothing mounted.
        tokens: that all prompts begin with, at least one.

    Raises:
        Exception: in its own way, by a model that keeps other things than keys and values.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]):
        self.tokens = list(tokens)
        ids = torch.tensor([self.tokens], device=input_device(model))
        named = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in named else "past_key_values"  # as it was called
        kept = DynamicCache()
        with torch.no_grad(), uncompiled():
            model.base_model(input_ids=ids, use_cache=True, **{self._cache: kept})
        layers: list[Any] = list(kept.layers)
        self._layers: list[tuple[Tensor, Tensor]] = [(each.keys, each.values) for each in layers]
        if any(keys.shape[2] != len(self) for keys, _ in self._layers):
            raise ValueError("the model keeps other things than keys and values of all tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    def inputs(self, inputs: dict[str, Tensor], lengths: Tensor, layer: int = 0) -> dict[str, Any]:
        """What the model is given in place of whole prompts, once.

        Args:
            inputs: `input_ids`, `attention_mask` and perhaps `position_ids`, [B, T], padded on the
                left, of prompts that begin with the prefix.
            lengths: [B] of the prompts, in tokens.
            layer: below which layers are skipped, as `LowerLayers` does it; 0: none are.
        """
        rest = lengths - len(self)
        columns = int(rest.max())
        given: dict[str, Any] = {k: v[:, -columns:] for k, v in inputs.items()}
        place = torch.arange(columns, device=lengths.device)
        mask = (place >= columns - rest.unsqueeze(1)).to(inputs["attention_mask"].dtype)
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), len(self)), mask], 1)
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self._layers):
            if 0 < i < layer:  # the first layer's tells a model how much it has read
                continue
            shape = (len(mask), *keys.shape[1:])
            cache.update(keys.expand(shape), values.expand(shape), i)
        return given | {self._cache: cache}
