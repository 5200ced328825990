"""The dynamic neuron in Triton, forward and backward; `ops/dynamic_neuron.py` defines it.

    out[m] = y[m] + act(x[m] . key[i] + bias[i]) * value[i]        i = index of row m

One program serves one row, so a row's bits depend on nothing else in the batch. It asks for the
first block of x, key, y and value at once: a row of up to 8 KiB waits for memory only once. Longer
rows go on in loops. Sums are float32 (float64 for float64).

Shapes, dtypes and devices are the ops layer's care. All tensors but index share one dtype. Rows may
lie at any distance from each other; elements within a row are adjacent. A row's sum is formed in an
order that depends on its length, its dtype and whether it is aligned to 16 bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meg_kernels.kernels.launching import Configuration, aligned, jit, rows_adjacent
from meg_kernels.kernels.limits import ACTIVATIONS
from meg_kernels.kernels.limits import DTYPES as KERNEL_DTYPES
from meg_kernels.neuron import SATURATED, Neurons

DTYPES = (*KERNEL_DTYPES, torch.float64)  # float64 so that gradcheck can be run on the kernels
# The kernels get the activation as a number at run time: it is one scalar a row, and there are five
# times fewer kernels to compile.
_GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
_GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
_SILU = tl.constexpr(ACTIVATIONS.index("silu"))
_RELU = tl.constexpr(ACTIVATIONS.index("relu"))
_SATURATED = tl.constexpr(SATURATED)


# ---- inside the kernels ------------------------------------------------------------------------


@triton.jit
def _activate(activation, a):
    """act(a), and its slope there, which only the backward looks at."""
    hidden = a
    slope = tl.full((), 1.0, a.dtype)
    # Where the formulas of gelu and silu have no values, at infinity, and beyond 1e19 where they
    # square, those at +-1024 stand in: 1 or 0, as everywhere from there on. NaN stays NaN.
    low = tl.where(a < -_SATURATED, -_SATURATED, a)
    near = tl.where(a > _SATURATED, _SATURATED, low)
    if activation == _GELU:
        share = 0.5 + 0.5 * tl.erf(near * 0.7071067811865476)
        hidden = low * share
        slope = share + near * (0.3989422804014327 * tl.exp(-0.5 * near * near))
    elif activation == _GELU_TANH:
        # (1 + tanh(u)) / 2 is the sigmoid of 2u, which loses nothing where tanh(u) is close to -1.
        share = tl.sigmoid(1.5957691216057308 * (near + 0.044715 * near * near * near))
        hidden = low * share
        bend = 1.5957691216057308 * (1 + 0.134145 * near * near)
        slope = share + near * share * (1 - share) * bend
    elif activation == _SILU:
        share = tl.sigmoid(near)
        hidden = low * share
        slope = share + near * share * (1 - share)
    elif activation == _RELU:  # written so that NaN stays NaN
        hidden = tl.where(a < 0, 0.0, a)
        slope = tl.where(a <= 0, 0.0, slope)
    return hidden, slope


@triton.jit
def _row(pointer, sample, token, sample_stride, token_stride, ALIGNED: tl.constexpr):
    """Where a row starts, in 64 bits: a batch may hold more than 2^31 elements."""
    row = pointer + (sample.to(tl.int64) * sample_stride + token.to(tl.int64) * token_stride)
    return tl.multiple_of(row, 16) if ALIGNED else row


@triton.jit
def _neuron(pointer, i, stride, ALIGNED: tl.constexpr):
    """Where neuron i's key or value starts; i is int64."""
    row = pointer + i * stride
    return tl.multiple_of(row, 16) if ALIGNED else row


@triton.jit
def _exist(columns, width, row, ALIGNED: tl.constexpr):
    """Which columns the row has. In an aligned row a chunk of 16 bytes exists whole or not."""
    mask = columns < width
    if ALIGNED:
        mask = tl.max_constancy(mask, 128 // row.dtype.element_ty.primitive_bitwidth)
    return mask


@triton.jit
def _load(row, columns, width, ALIGNED: tl.constexpr):
    return tl.load(row + columns, mask=_exist(columns, width, row, ALIGNED), other=0)


@triton.jit
def _store(row, columns, width, values, ALIGNED: tl.constexpr):
    mask = _exist(columns, width, row, ALIGNED)
    tl.store(row + columns, values.to(row.dtype.element_ty), mask=mask)


@triton.jit
def _in_range(
    total,
    a,
    b,
    width,
    BLOCK: tl.constexpr,
    A_ALIGNED: tl.constexpr,
    B_ALIGNED: tl.constexpr,
):
    """The sum of a row's products: `total`, or where that overflowed on the way, the sum once more.

    Scaled by 2^-160, products of any two float32 can be added up; what falls below float32's range
    is nothing beside a sum that left it above.
    """
    if total.dtype == tl.float32:  # noqa: SIM102  # known when compiling; the next is not
        if (total - total) != 0:  # infinite or NaN
            # In halves of a block, lest this rare loop take registers from the usual path's loads.
            columns = tl.arange(0, BLOCK // 2)
            sums = tl.zeros([BLOCK // 2], tl.float32)
            for start in range(0, width, BLOCK // 2):
                a_block = _load(a, start + columns, width, A_ALIGNED).to(tl.float32)
                b_block = _load(b, start + columns, width, B_ALIGNED).to(tl.float32)
                sums += (a_block * 8.271806125530277e-25) * (b_block * 8.271806125530277e-25)
            total = tl.sum(sums, axis=0) * 1.2089258196146292e24 * 1.2089258196146292e24
    return total


# ---- forward -----------------------------------------------------------------------------------


@jit
def _forward_kernel(
    out_ptr,
    y_ptr,
    x_ptr,
    key_ptr,
    bias_ptr,
    value_ptr,
    index_ptr,
    tokens: tl.int32,
    d_in: tl.int32,
    d_out: tl.int32,
    out_sample_stride: tl.int64,
    out_token_stride: tl.int64,
    y_sample_stride: tl.int64,
    y_token_stride: tl.int64,
    x_sample_stride: tl.int64,
    x_token_stride: tl.int64,
    key_stride: tl.int64,
    bias_stride: tl.int64,
    value_stride: tl.int64,
    index_stride: tl.int64,
    activation: tl.int32,
    has_bias: tl.int32,
    in_place: tl.int32,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_ALIGNED: tl.constexpr,
    NEURONS_ALIGNED: tl.constexpr,
):
    m = tl.program_id(0)
    sample, token = m // tokens, m % tokens
    i = tl.load(index_ptr + sample.to(tl.int64) * index_stride)
    out = _row(out_ptr, sample, token, out_sample_stride, out_token_stride, ROWS_ALIGNED)
    y = _row(y_ptr, sample, token, y_sample_stride, y_token_stride, ROWS_ALIGNED)
    columns = tl.arange(0, BLOCK)
    if i >= 0:
        x = _row(x_ptr, sample, token, x_sample_stride, x_token_stride, ROWS_ALIGNED)
        key = _neuron(key_ptr, i, key_stride, NEURONS_ALIGNED)
        value = _neuron(value_ptr, i, value_stride, NEURONS_ALIGNED)
        x_block = _load(x, columns, d_in, ROWS_ALIGNED)
        key_block = _load(key, columns, d_in, NEURONS_ALIGNED)
        # These wait for nobody: they are on their way while the dot product is formed.
        bias = tl.load(bias_ptr + i * bias_stride, mask=has_bias != 0, other=0)
        y_block = _load(y, columns, d_out, ROWS_ALIGNED)
        value_block = _load(value, columns, d_out, NEURONS_ALIGNED)

        products = x_block.to(ACCUMULATE) * key_block.to(ACCUMULATE)
        for start in range(BLOCK, d_in, BLOCK):
            x_block = _load(x, start + columns, d_in, ROWS_ALIGNED)
            key_block = _load(key, start + columns, d_in, NEURONS_ALIGNED)
            products += x_block.to(ACCUMULATE) * key_block.to(ACCUMULATE)
        total = tl.sum(products, axis=0)
        total = _in_range(total, x, key, d_in, BLOCK, ROWS_ALIGNED, NEURONS_ALIGNED)
        hidden, _ = _activate(activation, total + bias.to(ACCUMULATE))

        edited = y_block.to(ACCUMULATE) + hidden * value_block.to(ACCUMULATE)
        _store(out, columns, d_out, edited, ROWS_ALIGNED)
        for start in range(BLOCK, d_out, BLOCK):
            y_block = _load(y, start + columns, d_out, ROWS_ALIGNED)
            value_block = _load(value, start + columns, d_out, NEURONS_ALIGNED)
            edited = y_block.to(ACCUMULATE) + hidden * value_block.to(ACCUMULATE)
            _store(out, start + columns, d_out, edited, ROWS_ALIGNED)
    elif in_place == 0:
        for start in range(0, d_out, BLOCK):
            y_block = _load(y, start + columns, d_out, ROWS_ALIGNED)
            _store(out, start + columns, d_out, y_block, ROWS_ALIGNED)


def forward(out: Tensor, y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> None:
    """Write y plus each row's own neuron into `out`, in one launch.

    Args:
        out: like y; y itself for the operation in place, where rows with index -1 are not touched.
        y: [B, T, d_out] or [M, d_out].
        x: [B, T, d_in] or [M, d_in].
        neurons: N neurons with that d_in and d_out.
        index: int64 [B] or [M], -1 for a row that stays as it is.
    """
    rows = x.shape[:-1].numel()
    if rows == 0:
        return
    key, bias, value = neurons.key, neurons.bias, neurons.value
    launch = row_launch(
        max(x.shape[-1], y.shape[-1]), y.dtype, aligned(out, y, x), aligned(key, value)
    )
    with torch.cuda.device_of(y):
        _forward_kernel[(rows,)](
            out,
            y,
            x,
            key,
            key if bias is None else bias,
            value,
            index,
            _tokens(x),
            x.shape[-1],
            y.shape[-1],
            *_row_strides(out),
            *_row_strides(y),
            *_row_strides(x),
            key.stride(0),
            0 if bias is None else bias.stride(0),
            value.stride(0),
            index.stride(0),
            ACTIVATIONS.index(neurons.activation),
            int(bias is not None),
            int(out.data_ptr() == y.data_ptr()),
            **launch.constants(y.dtype),
            num_warps=launch.warps,
            num_stages=1,
        )


# ---- backward ----------------------------------------------------------------------------------


@jit
def _backward_rows_kernel(
    dx_ptr,
    hidden_ptr,
    dpre_ptr,
    grad_ptr,
    x_ptr,
    key_ptr,
    bias_ptr,
    value_ptr,
    index_ptr,
    tokens: tl.int32,
    d_in: tl.int32,
    d_out: tl.int32,
    dx_sample_stride: tl.int64,
    dx_token_stride: tl.int64,
    grad_sample_stride: tl.int64,
    grad_token_stride: tl.int64,
    x_sample_stride: tl.int64,
    x_token_stride: tl.int64,
    key_stride: tl.int64,
    bias_stride: tl.int64,
    value_stride: tl.int64,
    index_stride: tl.int64,
    activation: tl.int32,
    has_bias: tl.int32,
    needs_x: tl.int32,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_ALIGNED: tl.constexpr,
    NEURONS_ALIGNED: tl.constexpr,
):
    m = tl.program_id(0)
    sample, token = m // tokens, m % tokens
    i = tl.load(index_ptr + sample.to(tl.int64) * index_stride)
    dx = _row(dx_ptr, sample, token, dx_sample_stride, dx_token_stride, ROWS_ALIGNED)
    columns = tl.arange(0, BLOCK)
    if i >= 0:
        x = _row(x_ptr, sample, token, x_sample_stride, x_token_stride, ROWS_ALIGNED)
        grad = _row(grad_ptr, sample, token, grad_sample_stride, grad_token_stride, ROWS_ALIGNED)
        key = _neuron(key_ptr, i, key_stride, NEURONS_ALIGNED)
        value = _neuron(value_ptr, i, value_stride, NEURONS_ALIGNED)
        x_block = _load(x, columns, d_in, ROWS_ALIGNED)
        first_key_block = _load(key, columns, d_in, NEURONS_ALIGNED)
        bias = tl.load(bias_ptr + i * bias_stride, mask=has_bias != 0, other=0)
        grad_block = _load(grad, columns, d_out, ROWS_ALIGNED)
        value_block = _load(value, columns, d_out, NEURONS_ALIGNED)

        products = x_block.to(ACCUMULATE) * first_key_block.to(ACCUMULATE)
        grad_products = grad_block.to(ACCUMULATE) * value_block.to(ACCUMULATE)
        for start in range(BLOCK, d_in, BLOCK):
            x_block = _load(x, start + columns, d_in, ROWS_ALIGNED)
            key_block = _load(key, start + columns, d_in, NEURONS_ALIGNED)
            products += x_block.to(ACCUMULATE) * key_block.to(ACCUMULATE)
        for start in range(BLOCK, d_out, BLOCK):
            grad_block = _load(grad, start + columns, d_out, ROWS_ALIGNED)
            value_block = _load(value, start + columns, d_out, NEURONS_ALIGNED)
            grad_products += grad_block.to(ACCUMULATE) * value_block.to(ACCUMULATE)
        total = tl.sum(products, axis=0)
        total = _in_range(total, x, key, d_in, BLOCK, ROWS_ALIGNED, NEURONS_ALIGNED)
        hidden, slope = _activate(activation, total + bias.to(ACCUMULATE))
        total = tl.sum(grad_products, axis=0)
        total = _in_range(total, grad, value, d_out, BLOCK, ROWS_ALIGNED, NEURONS_ALIGNED)
        dpre = total * slope

        tl.store(hidden_ptr + m, hidden)
        tl.store(dpre_ptr + m, dpre)
        if needs_x != 0:
            _store(dx, columns, d_in, dpre * first_key_block.to(ACCUMULATE), ROWS_ALIGNED)
            for start in range(BLOCK, d_in, BLOCK):
                key_block = _load(key, start + columns, d_in, NEURONS_ALIGNED)
                values = dpre * key_block.to(ACCUMULATE)
                _store(dx, start + columns, d_in, values, ROWS_ALIGNED)
    elif needs_x != 0:
        for start in range(0, d_in, BLOCK):
            _store(dx, start + columns, d_in, tl.zeros([BLOCK], ACCUMULATE), ROWS_ALIGNED)


@jit
def _sum_rows_kernel(
    sums_ptr,  # [N, width]: of weight * row, over the rows of each neuron
    totals_ptr,  # [N]: of the weights alone
    rows_ptr,
    weights_ptr,
    order_ptr,
    starts_ptr,
    tokens: tl.int32,
    width: tl.int32,
    row_sample_stride: tl.int64,
    row_token_stride: tl.int64,
    programs_per_neuron: tl.int32,
    needs_totals: tl.int32,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    i = tl.program_id(0) // programs_per_neuron
    part = tl.program_id(0) % programs_per_neuron
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    exist = _exist(columns, width, rows_ptr, ALIGNED)
    first = tl.load(starts_ptr + i)
    count = (tl.load(starts_ptr + i + 1) - first).to(tl.int32) * tokens
    sums = tl.zeros([ROWS, COLUMNS], ACCUMULATE)
    totals = tl.zeros([ROWS], ACCUMULATE)
    for start in range(0, count, ROWS):
        m = start + tl.arange(0, ROWS)  # among the rows of this neuron
        sample = tl.load(order_ptr + first + m // tokens, mask=m < count, other=0)
        token = m % tokens
        weight = tl.load(weights_ptr + sample * tokens + token, mask=m < count, other=0)
        row = rows_ptr + (sample * row_sample_stride + token.to(tl.int64) * row_token_stride)
        row = row[:, None]
        if ALIGNED:
            row = tl.multiple_of(row, (16, 16))
        values = tl.load(
            row + columns[None, :], mask=(m < count)[:, None] & exist[None, :], other=0
        )
        sums += weight[:, None] * values.to(ACCUMULATE)
        totals += weight
    row = _neuron(sums_ptr, i.to(tl.int64), width, ALIGNED)
    _store(row, columns, width, tl.sum(sums, axis=0), ALIGNED)
    if (needs_totals != 0) & (part == 0):
        tl.store(totals_ptr + i, tl.sum(totals, axis=0).to(totals_ptr.dtype.element_ty))


def backward(
    grad: Tensor, x: Tensor, neurons: Neurons, index: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, key, bias and value; that of y is `grad` itself.

    One launch for the rows, then one or two that sum over the rows of each neuron, in their order
    in the batch: the same bits every time, and for a neuron the same whatever other rows there are.
    Rows with index -1 get zeros and give nothing, whatever they hold. Nothing waits for the GPU.

    Args:
        grad: of the result, [B, T, d_out] or [M, d_out]; an expanded one is copied.
        x: [B, T, d_in] or [M, d_in].
        neurons: N neurons with that d_in and d_out.
        index: int64 [B] or [M], -1 for a row without a neuron.
        needs: which of the gradients of (x, key, bias, value) to compute.

    Returns:
        (dx, dkey, dbias, dvalue) in the dtypes of their tensors; None where not needed.
    """
    grad = rows_adjacent(grad)
    key, bias, value = neurons.key, neurons.bias, neurons.value
    needs_x, needs_key, needs_bias, needs_value = needs
    rows = x.shape[:-1].numel()
    accumulate = torch.promote_types(x.dtype, torch.float32)
    hidden = torch.empty(rows, dtype=accumulate, device=x.device)
    dpre = torch.empty_like(hidden)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    if rows > 0:
        written = grad if dx is None else dx
        launch = row_launch(
            max(x.shape[-1], grad.shape[-1]),
            x.dtype,
            aligned(written, grad, x),
            aligned(key, value),
        )
        with torch.cuda.device_of(x):
            _backward_rows_kernel[(rows,)](
                written,
                hidden,
                dpre,
                grad,
                x,
                key,
                key if bias is None else bias,
                value,
                index,
                _tokens(x),
                x.shape[-1],
                grad.shape[-1],
                *_row_strides(written),
                *_row_strides(grad),
                *_row_strides(x),
                key.stride(0),
                0 if bias is None else bias.stride(0),
                value.stride(0),
                index.stride(0),
                ACTIVATIONS.index(neurons.activation),
                int(bias is not None),
                int(needs_x),
                **launch.constants(x.dtype),
                num_warps=launch.warps,
                num_stages=1,
            )
    dkey = torch.empty(key.shape, dtype=key.dtype, device=key.device) if needs_key else None
    dbias = None
    if bias is not None and needs_bias:
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    dvalue = (
        torch.empty(value.shape, dtype=value.dtype, device=value.device) if needs_value else None
    )
    if len(key) > 0:
        # The samples of neuron i are order[starts[i] : starts[i + 1]]; those of none come first.
        index, order = torch.sort(index, stable=True)
        starts = torch.searchsorted(index, torch.arange(len(key) + 1, device=index.device))
        if dkey is not None or dbias is not None:
            _sum_rows(dkey, dbias, x, dpre, order, starts)
        if dvalue is not None:
            _sum_rows(dvalue, None, grad, hidden, order, starts)
    return dx, dkey, dbias, dvalue


def _sum_rows(
    sums: Tensor | None,
    totals: Tensor | None,
    rows: Tensor,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
) -> None:
    """Sum weights[m] * rows[m] into sums[i], weights[m] into totals[i], over neuron i's rows."""
    width = 0 if sums is None else rows.shape[-1]
    launch = sum_launch(rows.dtype, aligned(rows) if sums is None else aligned(rows, sums))
    programs_per_neuron = max(triton.cdiv(width, launch.columns), 1)
    with torch.cuda.device_of(rows):
        _sum_rows_kernel[((len(starts) - 1) * programs_per_neuron,)](
            rows if sums is None else sums,
            rows if totals is None else totals,
            rows,
            weights,
            order,
            starts,
            _tokens(rows),
            width,
            *_row_strides(rows),
            programs_per_neuron,
            int(totals is not None),
            **launch.constants(rows.dtype),
            num_warps=launch.warps,
            num_stages=1,
        )


# ---- launching ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLaunch:
    """How the kernels with one program per row are compiled.

    Args:
        block: number of elements of a row handled at once; a power of two.
        warps: number of warps of 32 threads in a program.
        rows_aligned: every row of x, y and their gradients starts and ends at a multiple of 16
            bytes.
        neurons_aligned: every key and value does.
    """

    block: int
    warps: int
    rows_aligned: bool
    neurons_aligned: bool

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "ACCUMULATE": _accumulate(dtype),
            "BLOCK": self.block,
            "ROWS_ALIGNED": self.rows_aligned,
            "NEURONS_ALIGNED": self.neurons_aligned,
        }


def row_launch(
    width: int, dtype: torch.dtype, rows_aligned: bool, neurons_aligned: bool
) -> RowLaunch:
    """The launch for rows of up to `width` elements, whatever their number.

    A thread holds 32 bytes of each of the four rows, so that all of it fits in its registers. What
    does not lie at 16 bytes is slow anyway and gets one configuration: keys and values that stand
    packed behind a bias, and rows of odd width. Float64, there for gradcheck, gets one as well.
    """
    if dtype == torch.float64:
        return RowLaunch(256, 4, False, False)
    if not rows_aligned:
        return RowLaunch(4096 // dtype.itemsize, 4, False, False)
    row_bytes = 8192
    if neurons_aligned:
        row_bytes = min(max(triton.next_power_of_2(width) * dtype.itemsize, 2048), row_bytes)
    return RowLaunch(row_bytes // dtype.itemsize, row_bytes // 1024, True, neurons_aligned)


@dataclass(frozen=True)
class SumLaunch:
    """How the kernel that sums over a neuron's rows is compiled.

    Args:
        rows: number of rows in the tile that a program reads at once.
        columns: number of columns in that tile.
        warps: number of warps of 32 threads in a program.
        aligned: every row, read or written, starts and ends at a multiple of 16 bytes.
    """

    rows: int
    columns: int
    warps: int
    aligned: bool

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "ACCUMULATE": _accumulate(dtype),
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "ALIGNED": self.aligned,
        }


def sum_launch(dtype: torch.dtype, aligned: bool) -> SumLaunch:
    """The launch for rows of this dtype: 256 bytes of 16 rows at once."""
    return SumLaunch(16, 256 // dtype.itemsize, 4, aligned and dtype != torch.float64)


def configurations() -> Iterator[Configuration]:
    """All configurations that the launchers above may have a kernel compiled for."""
    widths = [2**power for power in range(16)]  # row_launch asks only for the next power of two
    for dtype in DTYPES:
        accumulate = torch.promote_types(dtype, torch.float32)
        row_launches = [
            row_launch(width, dtype, rows_aligned, neurons_aligned)
            for rows_aligned, neurons_aligned in itertools.product((True, False), repeat=2)
            for width in widths
        ]
        for launch in dict.fromkeys(row_launches):
            for kernel in (_forward_kernel, _backward_rows_kernel):
                others = {"index": torch.int64, "hidden": accumulate, "dpre": accumulate}
                constants = launch.constants(dtype)
                yield Configuration.of(kernel, dtype, others, constants, launch.warps)
        for tile in dict.fromkeys(sum_launch(dtype, wide) for wide in (True, False)):
            others = {"weights": accumulate, "order": torch.int64, "starts": torch.int64}
            constants = tile.constants(dtype)
            yield Configuration.of(_sum_rows_kernel, dtype, others, constants, tile.warps)


def _accumulate(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _tokens(x: Tensor) -> int:
    """The number of rows of x for each number in index."""
    return x.shape[1] if x.dim() == 3 else 1


def _row_strides(x: Tensor) -> tuple[int, int]:
    """Elements from sample to sample, and from token to token."""
    return (x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), 0)
