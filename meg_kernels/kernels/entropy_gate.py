"""The familiarity gate's decision in Triton: which rows of a batch are edited, and where.

A query is edited if the entropy of the classifier's softmax is below a threshold (paper, 3.4):

    entropy[b] = -sum over c of p[c] log p[c]        p = softmax(logits[b]), in nats

One launch does it all. Every program writes its rows' entropies and decisions and then takes a
ticket; who gets the last one knows that all decisions are there, and numbers the edited rows. The
host learns nothing and waits for nothing, so that the launch can be part of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meg_kernels.kernels import Configuration, jit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CLASSES = 4096
_SCAN = tl.constexpr(1024)  # rows that the last program numbers at once


@jit
def _gate_kernel(
    entropy_ptr,
    index_ptr,
    rows_ptr,
    count_ptr,
    counter_ptr,
    logits_ptr,
    batch: tl.int32,
    classes: tl.int32,
    stride: tl.int64,
    threshold: tl.float32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exist = columns < classes
    row = logits_ptr + b[:, None].to(tl.int64) * stride
    mask = (b < batch)[:, None] & exist[None, :]
    logits = tl.load(row + columns[None, :], mask=mask, other=0).to(tl.float32)
    logits = tl.where(exist[None, :], logits, float("-inf"))
    # With l = logit - max, p = exp(l) / total: entropy = log(total) - sum(l exp(l)) / total.
    below = logits - tl.max(logits, axis=1)[:, None]
    weight = tl.exp(below)
    total = tl.sum(weight, axis=1)
    # 0 log 0 is 0, though below is -infinity there; the comparison lets NaN pass.
    moment = tl.sum(weight * tl.where(weight == 0, 0.0, below), axis=1)
    entropy = tl.log(total) - moment / total
    tl.store(entropy_ptr + b, entropy, mask=b < batch)
    tl.store(index_ptr + b, tl.where(entropy < threshold, 0, -1).to(tl.int64), mask=b < batch)

    tl.debug_barrier()  # all threads have stored before one of them takes the ticket
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        count = tl.full((), 0, tl.int32)
        for start in range(0, batch, _SCAN):
            place = start + tl.arange(0, _SCAN)
            decision = tl.load(
                index_ptr + place, mask=place < batch, other=-1, cache_modifier=".cg"
            )
            edited = decision == 0
            rank = count + tl.cumsum(edited.to(tl.int32), axis=0) - 1
            tl.store(index_ptr + place, rank.to(tl.int64), mask=edited)
            tl.store(rows_ptr + rank, place.to(tl.int64), mask=edited)
            count += tl.sum(edited.to(tl.int32), axis=0)
        for start in range(0, batch, _SCAN):
            place = start + tl.arange(0, _SCAN)
            nobody = tl.full([_SCAN], -1, tl.int64)
            tl.store(rows_ptr + place, nobody, mask=(place >= count) & (place < batch))
        tl.store(count_ptr, count.to(tl.int64))
        tl.store(counter_ptr, 0)  # as the next launch, or the next replay of a graph, expects it


def forward(
    logits: Tensor, threshold: float, counter: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decide on every row, in one launch that the host does not wait for.

    Args:
        logits: [B, C], 2 <= C <= `MAX_CLASSES`, unit stride within a row.
        threshold: in nats; a row is edited if its entropy is below it. A NaN never is.
        counter: int32 [1] on the same device, zero, and zero again when the launch is over.
            Launches that may overlap (on two streams) need one each.

    Returns:
        entropy: float32 [B].
        index: int64 [B]: this row is the how-manieth edited row, from 0; -1 where it is not edited.
        rows: int64 [B]: the numbers of the edited rows in order, then -1.
        count: int64 [1]: how many are edited.
    """
    batch, classes = logits.shape
    device = logits.device
    entropy = torch.empty(batch, dtype=torch.float32, device=device)
    index = torch.empty(batch, dtype=torch.int64, device=device)
    rows = torch.empty(batch, dtype=torch.int64, device=device)
    count = torch.empty(1, dtype=torch.int64, device=device)
    launch = gate_launch(classes)
    with torch.cuda.device_of(logits):
        # An empty batch has its zero count to write.
        _gate_kernel[(max(triton.cdiv(batch, launch.rows), 1),)](
            entropy,
            index,
            rows,
            count,
            counter,
            logits,
            batch,
            classes,
            logits.stride(0),
            threshold,
            **launch.constants(),
            num_warps=launch.warps,
            num_stages=1,
        )
    return entropy, index, rows, count


@dataclass(frozen=True)
class GateLaunch:
    """How the kernel is compiled.

    Args:
        rows, columns: of the tile of logits that a program reads at once.
        warps: of 32 threads, per program.
    """

    rows: int
    columns: int
    warps: int = 4

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {"ROWS": self.rows, "COLUMNS": self.columns}


def gate_launch(classes: int) -> GateLaunch:
    """The launch for rows of so many classes; the paper has ten."""
    if classes <= 32:
        return GateLaunch(64, 32)
    return GateLaunch(4, 512) if classes <= 512 else GateLaunch(1, MAX_CLASSES)


def configurations() -> Iterator[Configuration]:
    """Every way in which the launcher above may have its kernel compiled."""
    integers = {"index": torch.int64, "rows": torch.int64, "count": torch.int64}
    others = {"entropy": torch.float32, "counter": torch.int32, **integers}
    for dtype in DTYPES:
        for launch in dict.fromkeys(gate_launch(2**power) for power in range(1, 13)):
            yield Configuration.of(_gate_kernel, dtype, others, launch.constants(), launch.warps)
