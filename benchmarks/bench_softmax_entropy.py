"""The entropy of a softmax, which the familiarity gate compares with a threshold.

The baseline is what one writes in PyTorch: the log-softmax, and the entropy from it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, Passed, Race, Way, cold_caches
from meg_kernels.ops import backend as backends
from meg_kernels.ops.softmax_entropy import softmax_entropy

GPU = torch.cuda.is_available()
BACKENDS = ("cuda", "triton") if GPU else ("cpu",)
CLASSES = 10  # as in the paper


def eager(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [8, 64, 512, 8192])
@torch.no_grad()
def test_softmax_entropy(race: Race, batch: int, backend: str):
    reason = backends.usable_backends(race.device)[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    generator = torch.Generator(race.device).manual_seed(0)
    logits = 4 * torch.randn(batch, CLASSES, generator=generator, device=race.device)
    p = torch.softmax(logits.double(), dim=-1)
    expected = -(p * p.log()).sum(-1)

    prepare = cold_caches(race.device)
    with backends.backend(backend):
        race(
            Case("softmax entropy", {"batch": batch, "classes": CLASSES}, logits.dtype),
            Way(backend, lambda: softmax_entropy(logits), prepare),
            Way("eager", lambda: eager(logits), prepare),
            gate=lambda results: Passed.close(results, expected, "float64"),
        )
