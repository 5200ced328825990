"""What many prompts begin with is read once: the same logits, and neurons act behind it only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import EDITED, make_language_model, make_tokenizer

from meg_kernels.editing import neuron_fit
from meg_kernels.editing.collect import collect, shared_prefix
from meg_kernels.editing.contexts import Context
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.nn import SharedPrefix, attach

ACTIVATIONS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
LAYER, PREFIX, LENGTHS = 1, 9, (17, 12, 10)


def model_of(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, head_dim=8),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64
        ),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_logits_are_those_of_whole_prompts_with_neurons_behind_the_prefix(kind):
    model = model_of(kind)
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (3, max(LENGTHS)), generator=rng)
    lengths = torch.tensor(LENGTHS)
    columns = torch.arange(max(LENGTHS))
    starts = (max(LENGTHS) - lengths).unsqueeze(1)
    tokens = torch.randint(3, 64, (PREFIX,), generator=rng)
    for row, start in enumerate(starts[:, 0].tolist()):
        ids[row, start : start + PREFIX] = tokens
    mask = (columns >= starts).long()
    inputs = {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    attached = attach(model, LAYER)
    layout = attached.layout
    neurons = layout.unpack(torch.randn(3, layout.dim, generator=rng))
    prefix = SharedPrefix(model, tokens.tolist())
    assert len(prefix) == PREFIX
    with torch.no_grad(), attached.neurons(neurons):
        rest = model(**prefix.inputs(inputs, lengths)).logits

    assert attached.ffn.is_block
    block = attached.ffn.entry
    behind = columns >= starts + PREFIX  # [3, T]

    def add(module, args, output):
        x = args[0].view(3, -1, args[0].shape[-1])
        bias = 0 if neurons.bias is None else neurons.bias.view(3, 1)
        fires = torch.einsum("btd,bd->bt", x, neurons.key) + bias
        written = ACTIVATIONS[neurons.activation](fires) * behind
        return output + torch.einsum("bt,bd->btd", written, neurons.value).view_as(output)

    attached.detach()
    hook = block.register_forward_hook(add)
    with torch.no_grad():
        whole = model(**inputs).logits
    hook.remove()
    for row, length in enumerate(LENGTHS):
        new = length - PREFIX
        assert torch.allclose(rest[row, -new:], whole[row, -new:], atol=1e-4), row


def test_a_prefix_is_what_the_prompts_of_all_queries_begin_with():
    prompted = PromptedModel.of(make_language_model(make_tokenizer()), make_tokenizer())
    context = Context("far", question="red blue gold gray {}", beginning="red blue pink {}")
    tokens = shared_prefix(prompted, context)
    assert tokens == prompted.tokenizer("Q: red blue").input_ids
    for fact in EDITED:
        assert (
            prompted.tokenizer(prompted.prompt(fact.query, context)).input_ids[: len(tokens)]
            == tokens
        )


@pytest.mark.parametrize("length", [1, 10**6])
def test_facts_are_learnt_whether_or_not_prefixes_are_read_once(length, monkeypatch):
    made = []
    real = neuron_fit.SharedPrefix
    monkeypatch.setattr(neuron_fit, "SharedPrefix", lambda *a: made.append(0) or real(*a))
    monkeypatch.setattr(neuron_fit, "SHORTEST_PREFIX", length)
    tokenizer = make_tokenizer()
    prompted = PromptedModel.of(make_language_model(tokenizer), tokenizer)
    attached = attach(prompted.model, LAYER)
    long = "red blue gold gray pink green red {}"
    contexts = (Context("plain"), Context("long", question=long, beginning=long))
    config = CollectionConfig(learning_rate=0.1, contexts=contexts)
    found = collect(prompted, attached, EDITED, config)
    assert found.learnt.all() and bool(made) == (length == 1)
    for context in contexts:
        prompts = [prompted.prompt(fact.query, context) for fact in EDITED]
        with attached.neurons(found.neurons):
            said = [prompted.text(tokens) for tokens in prompted.answers(prompts, 5)]
        assert [text.rstrip(".") for text in said] == [fact.answer for fact in EDITED]


def test_a_model_that_keeps_other_things_reads_whole_prompts():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Exception, match=r"."):
        SharedPrefix(model, [1, 2, 3])
