"""A linear layer and gelu in Triton, with the gelu on the chip; `ops/linear_gelu.py` defines it.

    out[m] = gelu(x[m] @ weight^T + bias)          gelu in its tanh form

One program serves one tile of the result. It forms its sums in float32, in blocks of the inner
dimension from the first to the last. How deep a block is depends on the dtype alone, and tiles of
either size are computed by the same matrix instructions in the same order: a row's bits depend on
nothing else in the batch.

Shapes, dtypes and devices are the ops layer's care. All tensors share one dtype and are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meg_kernels.kernels.launching import Configuration, aligned, jit
from meg_kernels.kernels.limits import DTYPES

_GROUP = tl.constexpr(8)  # row tiles that share the weight they find in L2


# ---- inside the kernel -------------------------------------------------------------------------


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of this program's tile and its first column; rows may lie beyond the end."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // (_GROUP * column_tiles) * _GROUP
    height = tl.minimum(row_tiles - first, _GROUP)
    within = tl.program_id(0) % (_GROUP * column_tiles)
    m = (first + within % height) * ROWS + tl.arange(0, ROWS)
    return m, within // height * COLUMNS


@triton.jit
def _row(pointer, m, stride, ALIGNED: tl.constexpr):
    """Where row m starts, in 64 bits: a batch may hold more than 2^31 elements."""
    row = pointer + m.to(tl.int64) * stride
    return tl.multiple_of(row, 16) if ALIGNED else row


@triton.jit
def _exist(columns, width, pointer, ALIGNED: tl.constexpr):
    """Which columns a row has. In an aligned row a chunk of 16 bytes exists whole or not."""
    mask = columns < width
    if ALIGNED:
        mask = tl.max_constancy(mask, 128 // pointer.dtype.element_ty.primitive_bitwidth)
    return mask


@triton.jit
def _linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    m,
    n,
    rows,
    columns,
    depth,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """x[m] @ weight[n]^T + bias[n] in float32."""
    # Beyond the end the last row and column stand in, so that only the depth needs a mask.
    x = _row(x_ptr, tl.minimum(m, rows - 1), depth, ALIGNED)
    weight = _row(weight_ptr, tl.minimum(n, columns - 1), depth, ALIGNED)
    sums = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        exist = _exist(k, depth, x_ptr, ALIGNED)
        x_block = tl.load(x[:, None] + k[None, :], mask=exist[None, :], other=0)
        weight_block = tl.load(weight[None, :] + k[:, None], mask=exist[:, None], other=0)
        sums = tl.dot(x_block, weight_block, sums, input_precision="ieee")
    bias = bias_ptr + n
    if ALIGNED:
        bias = tl.multiple_of(bias, 16)
    bias = tl.load(bias, mask=_exist(n, columns, bias_ptr, ALIGNED), other=0)
    return sums + bias.to(tl.float32)[None, :]


# ---- the kernel -------------------------------------------------------------------------------


@jit
def _linear_gelu_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows: tl.int32,
    columns: tl.int32,
    depth: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    m, first = _tile(rows, columns, ROWS, COLUMNS)
    n = first + tl.arange(0, COLUMNS)
    a = _linear(x_ptr, weight_ptr, bias_ptr, m, n, rows, columns, depth, DEPTH, ALIGNED)
    # (1 + tanh(u)) / 2 is the sigmoid of 2u, which loses nothing where tanh(u) is close to -1.
    hidden = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    out = _row(out_ptr, m, columns, ALIGNED)[:, None] + n[None, :]
    mask = (m < rows)[:, None] & _exist(n, columns, out_ptr, ALIGNED)[None, :]
    tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight^T + bias), gelu in its tanh form, in one launch.

    Args:
        x: [M, K].
        weight: [N, K].
        bias: [N].

    Returns:
        [M, N].
    """
    (rows, depth), columns = x.shape, len(weight)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        launch = tile_launch(rows, columns, x.dtype, aligned(out, x, weight, bias))
        with torch.cuda.device_of(x):
            _linear_gelu_kernel[launch.grid(rows, columns)](
                out,
                x,
                weight,
                bias,
                rows,
                columns,
                depth,
                **launch.constants(),
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
    return out


# ---- launching ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileLaunch:
    """How the kernel is compiled.

    Args:
        rows: number of rows in the tile of the result that a program computes.
        columns: number of columns in that tile.
        depth: number of elements of the inner dimension that it multiplies at once.
        warps: number of warps of 32 threads in a program.
        stages: number of blocks of the inner dimension whose loads are in flight.
        aligned: all rows start and end at a multiple of 16 bytes.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    aligned: bool

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "ALIGNED": self.aligned,
        }

    def grid(self, rows: int, columns: int) -> tuple[int]:
        """The programs for a result of this size."""
        return (triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns),)


def tile_launch(rows: int, columns: int, dtype: torch.dtype, aligned: bool) -> TileLaunch:
    """The launch for a result of this size.

    Small tiles where there would be fewer large ones than a GPU has multiprocessors. The bits are
    the same: so is the depth, and small tiles still have the 64 rows that sm_90's matrix
    instruction takes.
    """
    if dtype == torch.float32:
        return TileLaunch(64, 64, 16, 4, 3, False)
    if not aligned:
        return TileLaunch(64, 64, 64, 8, 1, False)
    large = TileLaunch(128, 128, 64, 8, 3, True)
    (programs,) = large.grid(rows, columns)
    return large if programs >= 128 else TileLaunch(64, 64, 64, 4, 4, True)


def configurations() -> Iterator[Configuration]:
    """All configurations that the launcher above may have its kernel compiled for."""
    for dtype in DTYPES:
        sizes = [(1, False), (1, True), (2**20, True)]
        launches = [tile_launch(rows, 1, dtype, aligned) for rows, aligned in sizes]
        for launch in dict.fromkeys(launches):
            constants, warps, stages = launch.constants(), launch.warps, launch.stages
            yield Configuration.of(_linear_gelu_kernel, dtype, {}, constants, warps, stages)
