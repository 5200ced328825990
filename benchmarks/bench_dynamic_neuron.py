"""The op alone: every usable backend against PyTorch, forward and backward.

Decode is one token of each of B samples, prefill 8192 tokens of 64 samples; every sample has its
own neuron. Baselines: the eager reference, and the products as one would write them with
`torch.bmm`, which knows no samples without a neuron and rounds the activation to the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, Passed, Race, Way, cold_caches
from meg_kernels.neuron import ACTIVATIONS, Neurons
from meg_kernels.ops import backend as backends
from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_, dynamic_neuron_reference

GPU = torch.cuda.is_available()
BACKENDS = ("cuda", "triton") if GPU else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (576, 2560, 4096, 8192) if GPU else (576, 4096)
DECODE = [(batch, 1) for batch in (1, 8, 64, 512)]
PREFILL = (64, 128)
ACTIVATION = "gelu_tanh"


@dataclass
class Problem:
    """y, x [B, T, d] and B neurons of random numbers, all of the size of 1."""

    y: Tensor
    x: Tensor
    neurons: Neurons
    index: Tensor

    @classmethod
    def random(cls, batch: int, tokens: int, d: int, dtype: torch.dtype, device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        neurons = Neurons(normal(batch, d) / d**0.5, normal(batch), normal(batch, d), ACTIVATION)
        index = torch.randperm(batch, generator=generator, device=device)
        return cls(normal(batch, tokens, d), normal(batch, tokens, d), neurons, index)

    @property
    def leaves(self) -> list[Tensor]:
        """What the op is differentiated by."""
        assert self.neurons.bias is not None
        return [self.y, self.x, self.neurons.key, self.neurons.bias, self.neurons.value]

    @property
    def parameter_bytes(self) -> int:
        return sum(part.nbytes for part in self.leaves[2:]) + self.index.nbytes

    def oracle(self) -> Tensor:
        """The definition in float64, a sample at a time."""
        rows = []
        for y, x, i in zip(self.y.double(), self.x.double(), self.index.tolist(), strict=True):
            used = self.neurons[[i]].to(torch.float64)
            assert used.bias is not None
            hidden = ACTIVATIONS[ACTIVATION](x @ used.key.T + used.bias)  # [T, 1]
            rows.append(y + hidden * used.value)
        return torch.stack(rows)

    def leave_unedited(self, share: int) -> Problem:
        """The same with no neuron for every `share`-th sample."""
        index = self.index.clone()
        index[::share] = -1
        return Problem(self.y.clone(), self.x, self.neurons, index)


def bmm_(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> Tensor:
    used = neurons[index]
    assert used.bias is not None
    hidden = ACTIVATIONS[used.activation](
        torch.baddbmm(used.bias[:, None, None], x, used.key[:, :, None])
    )
    return y.baddbmm_(hidden, used.value[:, None])


def check_unedited_rows(problem: Problem) -> None:
    """Rows without a neuron keep their bits, on the way that is about to be timed."""
    some = problem.leave_unedited(2)
    before = some.y.clone()
    after = dynamic_neuron_(some.y, some.x, some.neurons, some.index)
    assert torch.equal(after[::2], before[::2]), "rows without a neuron were changed"


@pytest.fixture(params=BACKENDS)
def backend(request, device: torch.device):
    """Runs our op on this backend, or skips."""
    reason = backends.usable_backends(device)[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with backends.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(("batch", "tokens"), [*DECODE, PREFILL])
@torch.no_grad()
def test_forward(race: Race, backend: str, batch: int, tokens: int, d: int, dtype: torch.dtype):
    problem = Problem.random(batch, tokens, d, dtype, race.device)
    check_unedited_rows(problem)
    expected = problem.oracle()

    def way(name: str, run: Callable[..., Tensor]) -> Way:
        # In place, as a layer uses it; each way has a y of its own, which grows from run to run.
        y = problem.y.clone()
        arguments = (y, problem.x, problem.neurons, problem.index)
        return Way(name, lambda: run(*arguments), cold_caches(race.device))

    def in_place_reference(y: Tensor, *others) -> Tensor:
        return y.copy_(dynamic_neuron_reference(y, *others))

    moved = 2 * problem.y.nbytes + problem.x.nbytes + problem.parameter_bytes
    race(
        Case(
            "dynamic_neuron forward",
            {"batch": batch, "tokens": tokens, "d": d},
            dtype,
            bytes=moved,
            flops=4 * batch * tokens * d,
        ),
        way(backend, dynamic_neuron_),
        way("eager reference", in_place_reference),
        way("torch.bmm", bmm_),
        gate=lambda results: Passed.close(results, expected, "float64, a sample at a time"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS[::2] if GPU else WIDTHS[:1])
@pytest.mark.parametrize(("batch", "tokens"), [(64, 16), PREFILL] if GPU else [(64, 16)])
def test_backward(race: Race, backend: str, batch: int, tokens: int, d: int, dtype: torch.dtype):
    problem = Problem.random(batch, tokens, d, dtype, race.device)
    for leaf in problem.leaves:
        leaf.requires_grad_(True)
    upstream = torch.randn_like(problem.y)

    def gradients(result: Tensor, **kwargs) -> list[Tensor]:
        return list(torch.autograd.grad(result, problem.leaves, upstream, **kwargs))

    def way(name: str, op: Callable[..., Tensor]) -> Way:
        # The forward pass is not timed; its graph serves all runs.
        result = op(problem.y, problem.x, problem.neurons, problem.index)
        return Way(name, lambda: gradients(result, retain_graph=True), cold_caches(race.device))

    expected = torch.cat([gradient.flatten() for gradient in gradients(problem.oracle())])

    def gate(results: dict[str, list[Tensor]]) -> Passed:
        flat = {name: torch.cat([g.flatten() for g in got]) for name, got in results.items()}
        return Passed.close(flat, expected, "float64 autograd, a sample at a time", ops=2)

    read = problem.x.nbytes + upstream.nbytes + problem.parameter_bytes
    written = problem.x.nbytes + problem.parameter_bytes - problem.index.nbytes
    race(
        Case(
            "dynamic_neuron backward",
            {"batch": batch, "tokens": tokens, "d": d},
            dtype,
            bytes=read + written,
            flops=10 * batch * tokens * d,
        ),
        way(backend, dynamic_neuron),
        way("eager reference", dynamic_neuron_reference),
        gate=gate,
    )
