"""Attention among few tokens in Triton, read from the packed qkv as its Linear leaves it.

    out[b, t, h] = sum over s of p[s] v[b, s, h]    p = softmax(q[b, t, h] . k[b, :, h] / sqrt(D))

A program serves one head of one sample, or 32 of its queries where they are too much at once. All
their scores fit on the chip, so that the softmax sees whole rows, and nothing is transposed in
memory. Scores and sums are float32; probabilities are rounded to the dtype of the values that they
are multiplied by.

Shapes, dtypes and devices are the ops layer's care. The order of a sum depends on the number of
tokens, the size of a head, the dtype and whether all heads are aligned to 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meg_kernels.kernels.launching import Configuration, aligned, jit
from meg_kernels.kernels.limits import DTYPES, MAX_TOKENS

_WHOLE_HEAD = 64  # columns of a head that need no loop


@triton.jit
def _exist(columns, head_dim, rows, ALIGNED: tl.constexpr):
    """Which columns a head has. In aligned rows a chunk of 16 bytes exists whole or not."""
    mask = columns < head_dim
    if ALIGNED:
        mask = tl.max_constancy(mask, 128 // rows.dtype.element_ty.primitive_bitwidth)
    return mask


@triton.jit
def _load(rows, exist, columns, head_dim, ALIGNED: tl.constexpr):
    """A tile of rows by columns, 0 where there is nothing."""
    mask = exist[:, None] & _exist(columns, head_dim, rows, ALIGNED)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0)


@jit
def _short_attention_kernel(
    out_ptr,
    qkv_ptr,
    tokens: tl.int32,
    heads: tl.int32,
    head_dim: tl.int32,
    sample_stride: tl.int64,
    token_stride: tl.int64,
    scale: tl.float32,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    sample = (tl.program_id(0) // heads).to(tl.int64)
    first_column = tl.program_id(0) % heads * head_dim
    width = heads * head_dim
    q = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    t = tl.arange(0, TOKENS)
    columns = tl.arange(0, COLUMNS)
    end = head_dim if CHUNKED else COLUMNS

    head = qkv_ptr + sample * sample_stride + first_column
    query = head + q.to(tl.int64) * token_stride
    key = head + t.to(tl.int64) * token_stride + width
    value = key + width
    out = out_ptr + (sample * tokens + q) * width + first_column
    if ALIGNED:
        query = tl.multiple_of(query, 16)
        key = tl.multiple_of(key, 16)
        value = tl.multiple_of(value, 16)
        out = tl.multiple_of(out, 16)

    if not CHUNKED:  # asked for before it is needed: the program waits for memory only once
        values = _load(value, t < tokens, columns, head_dim, ALIGNED)
    scores = tl.zeros([QUERIES, TOKENS], tl.float32)
    for start in range(0, end, COLUMNS):
        queries = _load(query, q < tokens, start + columns, head_dim, ALIGNED)
        keys = _load(key, t < tokens, start + columns, head_dim, ALIGNED)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision="ieee")
    scores = tl.where((t < tokens)[None, :], scores, float("-inf"))
    weights = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * scale)
    total = tl.sum(weights, axis=1)
    weights = weights.to(qkv_ptr.dtype.element_ty)
    for start in range(0, end, COLUMNS):
        if CHUNKED:
            values = _load(value, t < tokens, start + columns, head_dim, ALIGNED)
        sums = tl.dot(weights, values, input_precision="ieee")
        result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        mask = (q < tokens)[:, None] & _exist(start + columns, head_dim, out, ALIGNED)[None, :]
        tl.store(out[:, None] + (start + columns)[None, :], result, mask=mask)


def forward(qkv: Tensor, num_heads: int) -> Tensor:
    """Every head's attention, side by side as the output projection reads them.

    Args:
        qkv: [B, T, 3 * heads * head_dim], 1 <= T <= `MAX_TOKENS`, unit stride within a row.
        num_heads: how many heads each of queries, keys and values has.

    Returns:
        [B, T, heads * head_dim], contiguous.
    """
    batch, tokens, packed = qkv.shape
    width = packed // 3
    head_dim = width // num_heads
    out = torch.empty(batch, tokens, width, dtype=qkv.dtype, device=qkv.device)
    heads = qkv.unflatten(-1, (-1, head_dim))
    launch = attention_launch(tokens, head_dim, qkv.dtype, aligned(heads))
    with torch.cuda.device_of(qkv):
        _short_attention_kernel[(batch * num_heads, triton.cdiv(tokens, launch.queries))](
            out,
            qkv,
            tokens,
            num_heads,
            head_dim,
            qkv.stride(0),
            qkv.stride(1),
            math.log2(math.e) / math.sqrt(head_dim),  # for powers of two
            **launch.constants(),
            num_warps=launch.warps,
            num_stages=1,
        )
    return out


@dataclass(frozen=True)
class AttentionLaunch:
    """How the kernel is compiled.

    Args:
        queries: number of queries that a program serves.
        tokens: number of tokens that they attend to, padded.
        columns: number of columns of a head handled at once; a narrower head is padded.
        warps: number of warps of 32 threads in a program.
        chunked: heads may have more columns than that, which a loop goes through.
        aligned: every head's part of a row starts and ends at a multiple of 16 bytes.
    """

    queries: int
    tokens: int
    columns: int
    warps: int
    chunked: bool
    aligned: bool

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "QUERIES": self.queries,
            "TOKENS": self.tokens,
            "COLUMNS": self.columns,
            "CHUNKED": self.chunked,
            "ALIGNED": self.aligned,
        }


def attention_launch(
    tokens: int, head_dim: int, dtype: torch.dtype, aligned: bool
) -> AttentionLaunch:
    """The launch for this many tokens, whatever the batch and the number of heads.

    Heads of up to 64 columns are taken whole, 16 queries a warp, as matrix instructions like it.
    Wider heads, float32 (of which no such instruction keeps all digits) and what does not lie at 16
    bytes share one launch, whose tiles fit in the registers for any of them.
    """
    if dtype == torch.float32 or head_dim > _WHOLE_HEAD or not aligned:
        return AttentionLaunch(32, MAX_TOKENS, 32, 8, True, aligned)
    padded = max(triton.next_power_of_2(tokens), 16)
    return AttentionLaunch(padded, padded, _WHOLE_HEAD, padded // 16, False, True)


def configurations() -> Iterator[Configuration]:
    """All configurations that the launcher above may have its kernel compiled for."""
    for dtype in DTYPES:
        launches = [
            attention_launch(tokens, head_dim, dtype, aligned)
            for aligned in (True, False)
            for head_dim in (_WHOLE_HEAD, 2 * _WHOLE_HEAD)
            for tokens in (16, 32, 64, MAX_TOKENS)  # it asks only for the next power of two
        ]
        for launch in dict.fromkeys(launches):
            constants = launch.constants()
            yield Configuration.of(_short_attention_kernel, dtype, {}, constants, launch.warps)
