"""Where in an FFN the neurons are best added: three ways, against a gated FFN without neurons.

- after it: the output projection, then the op in place on its result. What the library does.
- fused (GPU): a Triton product whose epilogue adds each row's value, scaled by its activation,
  which is computed before it.
- extra columns: the batch's keys as B more rows of the up projection and its values as B more
  columns of the output projection, so that two somewhat wider products do everything and a mask
  keeps each row to its own neuron. The wider weights are made once a batch, which is not timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Passed, Race, Way, cold_caches
from meg_kernels.neuron import Neurons
from meg_kernels.ops.dynamic_neuron import dynamic_neuron_

GPU = torch.cuda.is_available()
BATCH = 64
TOKENS = (1, 128) if GPU else (1, 16)  # of each sample: decode, prefill
WIDTHS = [(4096, 14336), (2560, 10240), (576, 1536)] if GPU else [(576, 1536)]
DTYPES = (torch.bfloat16,) if GPU else (torch.float32, torch.bfloat16)


@dataclass
class GatedFFN:
    """act(x gate^T) * (x up^T), then down; weights as in `torch.nn.Linear`."""

    gate: Tensor  # [width, d]
    up: Tensor  # [width, d]
    down: Tensor  # [d, width]

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(F.linear(x, self.gate)).mul_(F.linear(x, self.up))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(self.hidden(x), self.down)


@dataclass
class WiderFFN:
    """The same with the batch's neurons in its weights; `own` [rows, B] is 1 at a row's neuron."""

    gate: Tensor
    up: Tensor  # [width + B, d]
    down: Tensor  # [d, width + B]
    own: Tensor

    @classmethod
    def of(cls, ffn: GatedFFN, neurons: Neurons, index: Tensor, tokens: int) -> WiderFFN:
        own = F.one_hot(index, len(neurons)).repeat_interleave(tokens, 0).to(ffn.up.dtype)
        up = torch.cat([ffn.up, neurons.key])
        return cls(ffn.gate, up, torch.cat([ffn.down, neurons.value.T], dim=1), own)

    def __call__(self, x: Tensor) -> Tensor:
        width = len(self.gate)
        hidden = F.linear(x, self.up)
        hidden[:, :width] *= F.silu(F.linear(x, self.gate))
        hidden[:, width:] *= self.own
        return F.linear(hidden, self.down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "width"), WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@torch.no_grad()
def test_ffn(race: Race, tokens: int, d: int, width: int, dtype: torch.dtype):
    generator = torch.Generator(race.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=race.device)

    def weight(rows: int, columns: int) -> Tensor:
        return (normal(rows, columns) / columns**0.5).to(dtype)

    ffn = GatedFFN(weight(width, d), weight(width, d), weight(d, width))
    neurons = Neurons(weight(BATCH, d), None, normal(BATCH, d).to(dtype), "identity")
    index = torch.randperm(BATCH, generator=generator, device=race.device)
    x = normal(BATCH * tokens, d).to(dtype)
    wider = WiderFFN.of(ffn, neurons, index, tokens)

    def after_it() -> Tensor:
        y = ffn(x)
        dynamic_neuron_(y.view(BATCH, tokens, d), x.view(BATCH, tokens, d), neurons, index)
        return y

    of_token = index.repeat_interleave(tokens)

    def fused() -> Tensor:
        from benchmarks.fused_projection import project_and_add

        keys = neurons.key[index, :, None]  # [BATCH, d, 1]
        activation = torch.bmm(x.view(BATCH, tokens, d), keys).view(-1)
        return project_and_add(ffn.hidden(x), ffn.down, activation, neurons.value, of_token)

    plain = GatedFFN(ffn.gate.double(), ffn.up.double(), ffn.down.double())(x.double())
    own = neurons[of_token].to(torch.float64)
    expected = plain + (x.double() * own.key).sum(1, keepdim=True) * own.value

    def gate(results: dict[str, Tensor]) -> Passed:
        none = {"no neurons": results.pop("no neurons")}
        Passed.close(none, plain, "float64", ops=2)
        return Passed.close(results, expected, "float64", ops=2)

    prepare = cold_caches(race.device)
    race(
        Case(
            "gated FFN",
            {"batch": BATCH, "tokens": tokens, "d": d, "width": width},
            dtype,
            bytes=(3 * d * width + 2 * BATCH * tokens * d) * x.itemsize,
            flops=6 * BATCH * tokens * d * width,
        ),
        Way("after it", after_it, prepare),
        Way("no neurons", lambda: ffn(x), prepare),
        Way("extra columns", lambda: wider(x), prepare),
        *([Way("fused", fused, prepare)] if GPU else []),
        gate=gate,
        longer=2,
    )
