"""What neurons cost a model: a decode step and a prefill with them, against the same without.

Every row of the batch has its own neuron. Both sides run on the same weights; the side without
neurons is the model as transformers made it, with nothing attached.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from benchmarks.measure import Case, Passed, Race, Way, name_of
from benchmarks.models import Subject, hooked, llama_3_8b, smollm2, twin
from meg_kernels.nn import attach

GPU = torch.cuda.is_available()
BATCH = 64
CONTEXT = 128 if GPU else 16
PREFILL = 128 if GPU else 8  # tokens of each row
MODELS = (
    [(llama_3_8b, torch.bfloat16), (smollm2, torch.bfloat16)]
    if GPU
    else [(smollm2, torch.float32), (smollm2, torch.bfloat16)]
)
WITHOUT = "no neurons"


@pytest.fixture(
    scope="module",
    params=MODELS,
    ids=[f"{build.__name__}-{name_of(dtype)}" for build, dtype in MODELS],
)
def subject(request, device: torch.device) -> Subject:
    build, dtype = request.param
    return build(dtype, device)


def tokens(subject: Subject, length: int) -> Tensor:
    """Random token ids [BATCH, length]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (BATCH, length), generator=generator)
    return ids.to(subject.device)


class DecodeStep:
    """One step after CONTEXT tokens, as often as it is called."""

    def __init__(self, model: PreTrainedModel, context: Tensor, token: Tensor):
        self.model, self.token = model, token
        self.cache = StaticCache(model.config, max_cache_len=CONTEXT + 1)
        model(context, past_key_values=self.cache, logits_to_keep=1)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(CONTEXT)

    def __call__(self) -> Tensor:
        return self.model(self.token, past_key_values=self.cache).logits


def captured(step: DecodeStep) -> Callable[[], Tensor]:
    """The step as a CUDA graph: the GPU's time alone, without the host's between its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step.rewind()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    step.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@pytest.mark.parametrize("mode", ["eager", "CUDA graph"] if GPU else ["eager"])
@torch.no_grad()
def test_decode_step(race: Race, subject: Subject, mode: str):
    context, token = tokens(subject, CONTEXT), tokens(subject, 1)
    neurons, index = subject.neurons(BATCH), torch.arange(BATCH)
    plain = subject.model
    carrying = twin(plain)
    attached = attach(carrying, subject.layer)

    expected = {}
    with hooked(plain, subject.layer, neurons, index):
        step = DecodeStep(plain, context, token)
        expected["neurons"] = step()
    step = DecodeStep(plain, context, token)
    expected[WITHOUT] = step().clone()

    with attached.neurons(neurons, index):
        steps = {WITHOUT: step, "neurons": DecodeStep(carrying, context, token)}

        def way(name: str) -> Way:
            run = steps[name] if mode == "eager" else captured(steps[name])
            return Way(name, run, steps[name].rewind)

        race(
            Case(
                f"decode step, {mode}",
                {"model": subject.name, "batch": BATCH, "context": CONTEXT},
                plain.dtype,
            ),
            way("neurons"),
            way(WITHOUT),
            gate=lambda results: gate(results, expected),
            longer=20,
        )
    attached.detach()


@torch.no_grad()
def test_prefill(race: Race, subject: Subject):
    prompt = tokens(subject, PREFILL)
    neurons, index = subject.neurons(BATCH), torch.arange(BATCH)
    plain = subject.model
    carrying = twin(plain)
    attached = attach(carrying, subject.layer)

    def way(name: str, model: PreTrainedModel) -> Way:
        return Way(name, lambda: model(prompt, logits_to_keep=1).logits)

    expected = {WITHOUT: plain(prompt, logits_to_keep=1).logits}
    with hooked(plain, subject.layer, neurons, index):
        expected["neurons"] = plain(prompt, logits_to_keep=1).logits
    with attached.neurons(neurons, index):
        race(
            Case(
                "prefill",
                {"model": subject.name, "batch": BATCH, "tokens": BATCH * PREFILL},
                plain.dtype,
            ),
            way("neurons", carrying),
            way(WITHOUT, plain),
            gate=lambda results: gate(results, expected),
            longer=20,
        )
    attached.detach()


def gate(results: dict[str, Tensor], expected: dict[str, Tensor]) -> Passed:
    """With neurons as the hook has it, without as the model has it, and not both the same."""
    without = results[WITHOUT]
    Passed.close({WITHOUT: without}, expected[WITHOUT], "the model as it was", ops=10)
    changed = (results["neurons"].argmax(-1) != without.argmax(-1)).float().mean()
    assert changed > 0.5, f"neurons changed the next token of {changed:.0%} of the rows only"
    ours = {"neurons": results["neurons"]}
    return Passed.close(ours, expected["neurons"], "a hook, a sample at a time", ops=10)
