"""The entropy of a softmax in Triton; `ops/softmax_entropy.py` defines it.

    entropy[b] = - sum_c p[b, c] log p[b, c]        p = softmax(logits), in nats

A program serves neighbouring rows, each of which lies in its registers whole. Sums are float32. A
row's bits depend on nothing else in the batch; the order of its sums depends on the number of
classes.

Shapes, dtypes and devices are the ops layer's care. Rows may lie at any distance from each other;
elements within a row are adjacent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meg_kernels.kernels.launching import Configuration, jit
from meg_kernels.kernels.limits import DTYPES, MAX_CLASSES


@jit
def _softmax_entropy_kernel(
    entropy_ptr,
    logits_ptr,
    batch: tl.int32,
    classes: tl.int32,
    stride: tl.int64,
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
    tl.store(entropy_ptr + b, tl.log(total) - moment / total, mask=b < batch)


def forward(logits: Tensor) -> Tensor:
    """Every row's entropy, in one launch.

    Args:
        logits: [B, C], 2 <= C <= `MAX_CLASSES`, unit stride within a row.

    Returns:
        float32 [B], in nats.
    """
    batch, classes = logits.shape
    entropy = torch.empty(batch, dtype=torch.float32, device=logits.device)
    if batch == 0:
        return entropy
    launch = entropy_launch(classes)
    with torch.cuda.device_of(logits):
        _softmax_entropy_kernel[(triton.cdiv(batch, launch.rows),)](
            entropy,
            logits,
            batch,
            classes,
            logits.stride(0),
            **launch.constants(),
            num_warps=launch.warps,
            num_stages=1,
        )
    return entropy


@dataclass(frozen=True)
class EntropyLaunch:
    """How the kernel is compiled.

    Args:
        rows: number of rows in the tile of logits that a program reads at once.
        columns: number of columns in that tile; fewer classes are padded.
        warps: number of warps of 32 threads in a program.
    """

    rows: int
    columns: int
    warps: int = 4

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {"ROWS": self.rows, "COLUMNS": self.columns}


def entropy_launch(classes: int) -> EntropyLaunch:
    """The launch for rows of this many classes; the paper's classifier has ten."""
    if classes <= 32:
        return EntropyLaunch(64, 32)
    return EntropyLaunch(4, 512) if classes <= 512 else EntropyLaunch(1, MAX_CLASSES)


def configurations() -> Iterator[Configuration]:
    """All configurations that the launcher above may have its kernel compiled for."""
    others = {"entropy": torch.float32}
    for dtype in DTYPES:
        for launch in dict.fromkeys(entropy_launch(2**power) for power in range(1, 13)):
            constants = launch.constants()
            yield Configuration.of(_softmax_entropy_kernel, dtype, others, constants, launch.warps)
