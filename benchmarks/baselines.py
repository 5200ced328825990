"""Other ways to answer each query of many with its own edit, on the same model.

`OneAtATime` does what the paper's released code does, `MixedAdapters` what its nearest relative in
PEFT does. Both are written from descriptions of their behaviour.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.models import Subject, twin
from meg_kernels.neuron import Neurons
from meg_kernels.nn.families import feed_forward


def answer(model: PreTrainedModel, queries: Sequence[Tensor], new_tokens: int, **more) -> Tensor:
    """[queries, new_tokens]: exactly so many greedy tokens for each query, all in one batch."""
    longest = max(len(query) for query in queries)
    pad = model.config.pad_token_id
    inputs = queries[0].new_full((len(queries), longest), pad)
    mask = torch.zeros_like(inputs)
    for row, query in enumerate(queries):
        inputs[row, longest - len(query) :] = query
        mask[row, longest - len(query) :] = 1
    output = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=pad,
        **more,
    )
    return output[:, longest:]


class WidenedFFN(nn.Module):
    """A gated FFN copied to F + 1 hidden units, of which the last, a linear one, is the neuron."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.gate_proj, self.act_fn = ffn.gate_proj, ffn.act_fn
        width, d = ffn.up_proj.weight.shape
        with ffn.up_proj.weight.device:
            self.up_proj = nn.Linear(d, width + 1, bias=False, dtype=ffn.up_proj.weight.dtype)
            self.down_proj = nn.Linear(width + 1, d, bias=False, dtype=ffn.up_proj.weight.dtype)
        self.requires_grad_(False)
        self.up_proj.weight[:-1] = ffn.up_proj.weight
        self.down_proj.weight[:, :-1] = ffn.down_proj.weight

    def load(self, key: Tensor, value: Tensor) -> None:
        """Overwrite the neuron."""
        self.up_proj.weight[-1] = key
        self.down_proj.weight[:, -1] = value

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(x)
        hidden[..., :-1] *= self.act_fn(self.gate_proj(x))
        return self.down_proj(hidden)


class OneAtATime:
    """Each query overwrites the weights of a physically wider model and is answered alone."""

    def __init__(self, subject: Subject):
        self.model = twin(subject.model)
        block = feed_forward(self.model, subject.layer).decoder_layer
        self._widened = block.mlp = WidenedFFN(block.mlp)

    def answer(self, queries: Sequence[Tensor], neurons: Neurons, new_tokens: int) -> Tensor:
        rows = []
        for query, key, value in zip(queries, neurons.key, neurons.value, strict=True):
            self._widened.load(key, value)
            rows.append(answer(self.model, [query], new_tokens))
        return torch.cat(rows)


class MixedAdapters:
    """PEFT's mixed batch: a LoRA adapter of rank 1 for each row, named by `adapter_names`.

    The adapters sit on the edited layer's output projection, where a neuron's value writes: there
    is no linear layer that reads what the key reads and writes what the value writes, and of the
    two ends this is the one where ours does its work. Their weights are random and change the
    answers, but they are not the neurons: this way is compared with itself, one row at a time.
    """

    def __init__(self, subject: Subject, count: int):
        if importlib.util.find_spec("peft") is None:
            pytest.skip("needs PEFT: pip install peft")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=["down_proj"],
            layers_to_transform=[subject.layer],
            init_lora_weights=False,
        )
        self.names = [f"edit{i}" for i in range(count)]
        self.model = get_peft_model(twin(subject.model), config, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        self.model.eval()
        projection = feed_forward(self.model, subject.layer).exit.down_proj
        directions = subject.neurons(count)
        for name, value in zip(self.names, directions.value, strict=True):
            reads, writes = projection.lora_A[name].weight, projection.lora_B[name].weight
            reads.data = reads.data.to(value.dtype)  # PEFT makes them float32, which costs it casts
            writes.data = value[:, None].clone()

    def answer(self, queries: Sequence[Tensor], new_tokens: int) -> Tensor:
        names = self.names[: len(queries)]
        return answer(self.model, queries, new_tokens, adapter_names=names)

    def answer_one(self, row: int, query: Tensor, new_tokens: int) -> Tensor:
        self.model.set_adapter(self.names[row])
        return answer(self.model, [query], new_tokens)
