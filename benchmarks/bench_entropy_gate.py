"""The familiarity gate's decision: entropy, threshold and compaction, in one op or in eager steps.

The baseline is what one writes in PyTorch: softmax, entropy, comparison, `nonzero`. On a GPU the
host has to wait there for the number of edited rows; that wait is part of what it costs.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Case, Passed, Race, Way, cold_caches
from meg_kernels import ops

GPU = torch.cuda.is_available()
BACKENDS = ("cuda", "triton") if GPU else ("cpu",)
CLASSES, THRESHOLD = 10, 0.3  # as in the paper


class Decision(NamedTuple):
    """Of B rows: entropies [B]; each row's neuron or -1 [B]; the edited rows, in order."""

    entropy: Tensor
    index: Tensor
    rows: Tensor


def eager(logits: Tensor) -> Decision:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    rows = (entropy < THRESHOLD).nonzero()[:, 0]
    index = torch.full_like(entropy, -1, dtype=torch.int64)
    index[rows] = torch.arange(len(rows), device=logits.device)
    return Decision(entropy, index, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [8, 64, 512, 8192])
@torch.no_grad()
def test_entropy_gate(race: Race, batch: int, backend: str):
    reason = ops.usable_backends(race.device).get(backend, "there is no such backend here")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    generator = torch.Generator(race.device).manual_seed(0)
    logits = 4 * torch.randn(batch, CLASSES, generator=generator, device=race.device)

    p = torch.softmax(logits.double(), dim=-1)
    entropy = -(p * p.log()).sum(-1)
    edited = [row for row, nats in enumerate(entropy.tolist()) if nats < THRESHOLD]
    ranks = {row: rank for rank, row in enumerate(edited)}
    index = [ranks.get(row, -1) for row in range(batch)]

    def gate(results: dict) -> Passed:
        assert 0 < len(edited) < batch
        ours = results[backend]
        rows = {backend: ours.rows[: int(ours.count)], "eager": results["eager"].rows}
        Passed.identical({name: got.tolist() for name, got in rows.items()}, edited, "a loop")
        indices = {name: got.index.tolist() for name, got in results.items()}
        Passed.identical(indices, index, "a loop")
        entropies = {name: got.entropy for name, got in results.items()}
        return Passed.close(entropies, entropy, "float64")

    prepare = cold_caches(race.device)
    with ops.backend(backend):
        race(
            Case("entropy gate", {"batch": batch, "classes": CLASSES}, logits.dtype),
            Way(backend, lambda: ops.entropy_gate(logits, THRESHOLD), prepare),
            Way("eager", lambda: eager(logits), prepare),
            gate=gate,
        )
