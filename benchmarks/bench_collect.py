"""Collection: facts a second, all facts of a batch at once against one fact at a time.

Both fit the same neurons by the same SGD in the same dtype on SmolLM2-135M-Instruct. The baseline
is the loop of the released research code, as transformers users write it: one fact at a time, at
every step the whole model with all its logits, cross-entropy on the target tokens. Each side must
have learnt its facts, or the benchmark fails: a fast way to learn nothing is no result.

    pytest benchmarks/bench_collect.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meg_kernels.editing.collect import CollectionConfig, collect, initial_neuron
from meg_kernels.editing.prompting import (
    PromptTemplate,
    target_batch,
    target_tokens,
)
from meg_kernels.editing.shipped import demo_facts
from meg_kernels.integrations.pretrained import SMOLLM2, load_language_model
from meg_kernels.integrations.transformers import LowerLayers
from meg_kernels.nn import attach

LAYER = 20
ONE_AT_A_TIME = 4  # facts of the baseline; it takes seconds for each
CONFIG = CollectionConfig()
SECONDS_A_FACT: dict[tuple[str, str], float] = {}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def attached(request):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_language_model(SMOLLM2, getattr(torch, request.param), device)
    attachment = attach(model, LAYER)
    yield attachment, tokenizer, request.param
    attachment.detach()


def one_at_a_time(attached, tokenizer, facts) -> list[bool]:
    """The same fit, one fact after the other, every layer at every step."""
    model, template, learnt = attached.model, PromptTemplate(), []
    for fact in facts:
        pairs = [
            target_tokens(tokenizer, template.format(framing), fact.answer)
            for framing in CONFIG.framings(fact.query)
        ]
        batches = [_plain_batch(prompt, target, model.device) for prompt, target in pairs]
        lower = LowerLayers(model, LAYER)
        start = initial_neuron(
            attached, lower, target_batch(model, tokenizer, pairs), CONFIG.initial_response
        )
        flat = attached.layout.pack(start).to(model.device)
        passed = 0
        for step in range(CONFIG.max_steps):
            flat.requires_grad_(True)
            inputs, target = batches[step % len(batches)]
            with attached.neurons(attached.layout.unpack(flat)):
                logits = model(input_ids=inputs, use_cache=False).logits[0, -len(target) :]
            loss = F.cross_entropy(logits.float(), target)
            right = bool((logits.argmax(-1) == target).all())
            good = right and loss.item() < CONFIG.target_loss
            passed = passed + 1 if good else 0
            if passed == len(batches):
                break
            if not good:
                (gradient,) = torch.autograd.grad(loss, flat)
                flat = flat.detach() - CONFIG.learning_rate * gradient
        learnt.append(passed == len(batches))
    return learnt


def _plain_batch(prompt: list[int], target: list[int], device: torch.device):
    whole = torch.tensor([[*prompt, *target]], device=device)
    return whole[:, :-1], whole[0, -len(target) :]


def test_one_fact_at_a_time(benchmark, attached):
    attachment, tokenizer, dtype = attached
    # Every 16th fact, so that the few are as long as the many.
    facts = demo_facts()[:: 64 // ONE_AT_A_TIME]
    learnt = benchmark.pedantic(
        one_at_a_time, args=(attachment, tokenizer, facts), rounds=1, warmup_rounds=0
    )
    assert all(learnt), "the baseline did not learn its facts"
    _note(benchmark, "one at a time", dtype, len(facts))


def test_batch_of_64(benchmark, attached, monkeypatch):
    attachment, tokenizer, dtype = attached
    # The same dtype on both sides: no faster products than the model's own.
    monkeypatch.setattr(
        "meg_kernels.editing.collect.fast_products", lambda device: torch.enable_grad()
    )
    facts = demo_facts()
    collection = benchmark.pedantic(
        collect, args=(attachment, tokenizer, facts, CONFIG), rounds=1, warmup_rounds=0
    )
    assert bool(collection.learnt.all()), "the batch did not learn its facts"
    _note(benchmark, "batch of 64", dtype, len(facts))


def _note(benchmark, way: str, dtype: str, facts: int) -> None:
    seconds = benchmark.stats.stats.mean / facts
    SECONDS_A_FACT[way, dtype] = seconds
    benchmark.extra_info |= {"way": way, "dtype": dtype, "seconds_a_fact": seconds}
    if baseline := SECONDS_A_FACT.get(("one at a time", dtype)):
        benchmark.extra_info["speed_up"] = baseline / seconds
        print(f"\n{dtype}, {way}: {seconds:.3f} s a fact, {baseline / seconds:.1f} x one at a time")
