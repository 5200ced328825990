"""An output projection whose epilogue adds the neurons: a candidate that bench_ffn measures.

    y[m] = hidden[m] @ weight^T + activation[m] * value[index[m]]

A plain tiled product in Triton; the library itself leaves the product to cuBLAS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGURATIONS = [
    triton.Config({"ROWS": 64, "COLUMNS": 32, "DEPTH": 128}, num_warps=4, num_stages=4),
    triton.Config({"ROWS": 64, "COLUMNS": 64, "DEPTH": 128}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 128, "COLUMNS": 128, "DEPTH": 64}, num_warps=8, num_stages=4),
    triton.Config({"ROWS": 128, "COLUMNS": 256, "DEPTH": 64}, num_warps=8, num_stages=3),
]
GROUP = 8  # row tiles that share the weight tiles they find in L2


@triton.jit
def _kernel(
    y_ptr,
    hidden_ptr,
    weight_ptr,
    activation_ptr,
    value_ptr,
    index_ptr,
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    m = (first + within % height) * ROWS + tl.arange(0, ROWS)
    n = within // height * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Rows and columns beyond the end wrap around and are not stored; depth is a multiple of DEPTH.
    hidden = hidden_ptr + (m % rows).to(tl.int64)[:, None] * depth + k[None, :]
    weight = weight_ptr + (n % columns).to(tl.int64)[None, :] * depth + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(0, depth, DEPTH):
        total = tl.dot(tl.load(hidden), tl.load(weight), total)
        hidden += DEPTH
        weight += DEPTH

    neuron = tl.load(index_ptr + m, mask=m < rows, other=-1)
    activation = tl.load(activation_ptr + m, mask=neuron >= 0, other=0).to(tl.float32)
    store = (m < rows)[:, None] & (n < columns)[None, :]
    value = tl.load(
        value_ptr + neuron[:, None] * columns + n[None, :],
        mask=store & (neuron >= 0)[:, None],
        other=0,
    )
    total += activation[:, None] * value.to(tl.float32)
    y = y_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=store)


_tuned = triton.autotune(CONFIGURATIONS, key=["rows", "columns", "depth"])(_kernel)


def project_and_add(
    hidden: Tensor, weight: Tensor, activation: Tensor, value: Tensor, index: Tensor
) -> Tensor:
    """y [M, d] of hidden [M, width], weight [d, width], activation [M], value [N, d], index [M].

    All contiguous and of one dtype; width is a multiple of 128. Index -1 adds nothing.
    """
    (rows, depth), columns = hidden.shape, len(weight)
    y = torch.empty(rows, columns, dtype=hidden.dtype, device=hidden.device)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"]),)

    _tuned[grid](y, hidden, weight, activation, value, index, rows, columns, depth, GROUP=GROUP)
    return y
