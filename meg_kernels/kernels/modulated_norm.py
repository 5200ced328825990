"""The normalisations of the DiT in Triton; `ops/modulated_norm.py` defines them.

    stream[b, t] = x[b, t] + gate[b] * update[b, t]             or x itself, where nothing is added
    out[b, t]    = norm(stream[b, t]) * (1 + scale[b]) + shift[b]

Every element is read once, and the mean and then the centred variance of a row are formed in
float32 where it lies in registers: a large mean costs no more than its own digits. A row of up to
1024 elements lies in the registers of one warp, so that warps exchange nothing. A program serves
neighbouring tokens, which share what modulates their sample.

Shapes, dtypes and devices are the ops layer's care. All tensors share one dtype. Rows may lie at
any distance from each other; elements within a row are adjacent. A row's bits depend on nothing
else in the batch; its sums are formed in an order that depends on its length, its dtype and whether
it is aligned to 16 bytes.
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
from meg_kernels.kernels.limits import DTYPES, MAX_WIDTH


@triton.jit
def _tile(pointer, row, width, chunk: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Where one chunk of each row lies, [ROWS, BLOCK], and which of it exists, [1, BLOCK].

    Rows start `row` elements, [ROWS] in 64 bits, from `pointer`.
    """
    columns = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    elements = (pointer + row)[:, None] + columns
    exist = columns < width
    if ALIGNED:  # then 16 bytes exist whole or not
        elements = tl.multiple_of(elements, (16, 16))
        exist = tl.max_constancy(exist, (1, 128 // pointer.dtype.element_ty.primitive_bitwidth))
    return elements, exist


@triton.jit
def _load(
    pointer,
    row,
    width,
    wanted,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The chunks of the wanted rows, each [ROWS, BLOCK]; 0 beyond them."""
    chunks = tl.tuple(())
    for chunk in tl.static_range(CHUNKS):
        elements, exist = _tile(pointer, row, width, chunk, BLOCK, ALIGNED)
        chunks += (tl.load(elements, mask=wanted[:, None] & exist, other=0),)
    return chunks


@triton.jit
def _scaled(stream, eps, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and their eps, scaled by a power of two where the rows' squares would overflow."""
    highest = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        highest = tl.maximum(highest, tl.abs(stream[chunk]))
    large = tl.max(highest, axis=1)[:, None] > 7.205759403792794e16  # 2^56
    down = tl.where(large, 2.117582368135751e-22, 1.0)  # 2^-72
    scaled = tl.tuple(())
    for chunk in tl.static_range(CHUNKS):
        scaled += (stream[chunk] * down,)
    # Beside a spread of such rows, and of 0 beside which it matters, eps is as good as any.
    return scaled, tl.where(large, tl.maximum(eps * down * down, 1.1754943508222875e-38), eps)


@jit
def _modulated_norm_kernel(
    out_ptr,
    stream_ptr,
    x_ptr,
    update_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    rows: tl.int32,
    tokens: tl.int32,
    width: tl.int32,
    x_sample_stride: tl.int64,
    x_token_stride: tl.int64,
    update_sample_stride: tl.int64,
    update_token_stride: tl.int64,
    gate_stride: tl.int64,
    shift_stride: tl.int64,
    scale_stride: tl.int64,
    eps: tl.float32,
    gated: tl.int32,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample, token = (m // tokens).to(tl.int64), (m % tokens).to(tl.int64)
    wanted = m < rows
    added = wanted & (gated != 0)
    row = sample * x_sample_stride + token * x_token_stride
    x = _load(x_ptr, row, width, wanted, CHUNKS, BLOCK, ALIGNED)
    row = sample * update_sample_stride + token * update_token_stride
    update = _load(update_ptr, row, width, added, CHUNKS, BLOCK, ALIGNED)
    gate = _load(gate_ptr, sample * gate_stride, width, added, CHUNKS, BLOCK, ALIGNED)
    shift = _load(shift_ptr, sample * shift_stride, width, wanted, CHUNKS, BLOCK, ALIGNED)
    scale = _load(scale_ptr, sample * scale_stride, width, wanted, CHUNKS, BLOCK, ALIGNED)

    row = m.to(tl.int64) * width
    stream = tl.tuple(())
    for chunk in tl.static_range(CHUNKS):
        change = gate[chunk].to(tl.float32) * update[chunk].to(tl.float32)
        rounded = (x[chunk].to(tl.float32) + change).to(x[chunk].dtype)
        elements, exist = _tile(stream_ptr, row, width, chunk, BLOCK, ALIGNED)
        tl.store(elements, rounded, mask=added[:, None] & exist)
        stream += (rounded.to(tl.float32),)
    if x_ptr.dtype.element_ty != tl.float16:
        stream, eps = _scaled(stream, eps, CHUNKS, ROWS, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)  # within each thread, before it asks its warp
    for chunk in tl.static_range(CHUNKS):
        total += stream[chunk]
    mean = tl.sum(total, axis=1)[:, None] / width
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        _, exist = _tile(out_ptr, row, width, chunk, BLOCK, ALIGNED)
        centred = tl.where(exist, stream[chunk] - mean, 0.0)
        squares += centred * centred
    inverse = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / width + eps)
    for chunk in tl.static_range(CHUNKS):
        normed = (stream[chunk] - mean) * inverse
        out = normed * (1 + scale[chunk].to(tl.float32)) + shift[chunk].to(tl.float32)
        elements, exist = _tile(out_ptr, row, width, chunk, BLOCK, ALIGNED)
        tl.store(elements, out.to(x[chunk].dtype), mask=wanted[:, None] & exist)


def forward(
    out: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    stream: Tensor | None = None,
    update: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Write the modulated norm of x, or of x plus the gated update, into `out`, in one launch.

    Args:
        out: [B, T, D], contiguous, 1 <= D <= `MAX_WIDTH`.
        x: [B, T, D], unit stride within a row.
        shift: [B, D], unit stride within a row.
        scale: like shift.
        eps: added to the variance.
        stream: like out, for x plus the gated update; None to add nothing.
        update: like x; needed with a stream, and only then.
        gate: like shift; needed with a stream, and only then.
    """
    batch, tokens, width = x.shape
    if batch * tokens == 0:
        return
    gated = stream is not None
    if stream is None or update is None or gate is None:
        stream, update, gate = out, x, shift  # stand-ins: nothing is read or written
    launch = norm_launch(width, x.dtype, aligned(out, stream, x, update, gate, shift, scale))
    with torch.cuda.device_of(x):
        _modulated_norm_kernel[(triton.cdiv(batch * tokens, launch.rows),)](
            out,
            stream,
            x,
            update,
            gate,
            shift,
            scale,
            batch * tokens,
            tokens,
            width,
            *x.stride()[:2],
            *update.stride()[:2],
            gate.stride(0),
            shift.stride(0),
            scale.stride(0),
            eps,
            int(gated),
            **launch.constants(),
            num_warps=launch.warps,
            num_stages=1,
        )


# ---- launching ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormLaunch:
    """How the kernel is compiled.

    Args:
        chunks: the most chunks that a row has.
        rows: number of rows that a program serves.
        block: number of elements in a chunk.
        warps: number of warps of 32 threads in a program.
        aligned: every row, read or written, starts and ends at a multiple of 16 bytes.
    """

    chunks: int
    rows: int
    block: int
    warps: int
    aligned: bool

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "CHUNKS": self.chunks,
            "ROWS": self.rows,
            "BLOCK": self.block,
            "ALIGNED": self.aligned,
        }


def norm_launch(width: int, dtype: torch.dtype, aligned: bool) -> NormLaunch:
    """The launch for rows of this many elements.

    A chunk is what one warp loads at 16 bytes a thread: in the released DiT a row of 768 elements
    is three of them. Rows of more than 1024, or not aligned, share a configuration for them all.
    """
    block = 512 // dtype.itemsize
    for longest, rows in ((256, 8), (768, 4), (1024, 4)):
        if aligned and width <= longest:
            return NormLaunch(longest // block, rows, block, 4, True)
    return NormLaunch(1, 1, MAX_WIDTH, 16, False)


def configurations() -> Iterator[Configuration]:
    """All configurations that the launcher above may have its kernel compiled for."""
    for dtype in DTYPES:
        for width in (256, 768, 1024, MAX_WIDTH):
            launch = norm_launch(width, dtype, aligned=True)
            kernel, constants = _modulated_norm_kernel, launch.constants()
            yield Configuration.of(kernel, dtype, {}, constants, launch.warps)
