"""A diffusion solver's step in Triton, for a batch of samples; `ops/solver_step.py` defines it.

    x0     = a x_t + b prediction
    x_next = c x_t + d x0 + e previous_x0 + std noise

One program serves one stretch of one row. It reads the step's coefficients itself, from a table on
the device: the host knows only the number of the step. What a step has no use for (the previous x0
where e is 0; noise and variance where none is added) is not read, and may hold anything.
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

# Elements that lie together in aligned rows: 16 bytes of float32, 8 of a prediction in 16 bits.
# Were those loaded 16 bytes at a time too, they would have to change threads to meet the float32s.
_VECTOR = tl.constexpr(4)


@triton.jit
def _row(pointer, row, stride, ALIGNED: tl.constexpr):
    """Where a row starts, in 64 bits: a batch may hold more than 2^31 elements."""
    start = pointer + row.to(tl.int64) * stride
    if ALIGNED:
        start = tl.multiple_of(start, _VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8)
    return start


@triton.jit
def _exist(columns, count, ALIGNED: tl.constexpr):
    """Which columns are among the first `count`. In aligned rows a vector is so whole or not."""
    mask = columns < count
    return tl.max_constancy(mask, _VECTOR) if ALIGNED else mask


@jit
def _solver_step_kernel(
    x_next_ptr,
    x0_ptr,
    x_t_ptr,
    prediction_ptr,
    previous_x0_ptr,
    table_ptr,
    noise_ptr,
    variance_ptr,
    step: tl.int32,
    dim: tl.int32,
    programs_per_row: tl.int32,
    out_stride: tl.int64,
    x_t_stride: tl.int64,
    prediction_stride: tl.int64,
    previous_x0_stride: tl.int64,
    table_stride: tl.int64,
    noise_stride: tl.int64,
    variance_stride: tl.int64,
    has_noise: tl.int32,
    has_variance: tl.int32,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0) // programs_per_row
    columns = tl.program_id(0) % programs_per_row * BLOCK + tl.arange(0, BLOCK)
    exist = _exist(columns, dim, ALIGNED)
    x_t = _row(x_t_ptr, row, x_t_stride, ALIGNED)
    x_t = tl.load(x_t + columns, mask=exist, other=0)
    prediction = _row(prediction_ptr, row, prediction_stride, ALIGNED)
    prediction = tl.load(prediction + columns, mask=exist, other=0)

    coefficients = table_ptr + step.to(tl.int64) * table_stride
    a = tl.load(coefficients)
    b = tl.load(coefficients + 1)
    c = tl.load(coefficients + 2)
    d = tl.load(coefficients + 3)
    e = tl.load(coefficients + 4)
    log_posterior = tl.load(coefficients + 5)
    log_beta = tl.load(coefficients + 6)
    adds_noise = (tl.load(coefficients + 7) != 0) & (has_noise != 0)

    needed = _exist(columns, tl.where(e != 0, dim, 0), ALIGNED)
    previous_x0 = _row(previous_x0_ptr, row, previous_x0_stride, ALIGNED)
    previous_x0 = tl.load(previous_x0 + columns, mask=needed, other=0)
    needed = _exist(columns, tl.where(adds_noise, dim, 0), ALIGNED)
    noise = _row(noise_ptr, row, noise_stride, ALIGNED)
    noise = tl.load(noise + columns, mask=needed, other=0)
    needed = _exist(columns, tl.where(adds_noise & (has_variance != 0), dim, 0), ALIGNED)
    variance = _row(variance_ptr, row, variance_stride, ALIGNED)
    variance = tl.load(variance + columns, mask=needed, other=-1.0)  # the posterior's

    x0 = a * x_t + b * prediction.to(tl.float32)
    fraction = 0.5 * (variance.to(tl.float32) + 1)
    std = tl.exp(0.5 * (fraction * log_beta + (1 - fraction) * log_posterior))
    x_next = c * x_t + d * x0 + e * previous_x0 + std * noise
    tl.store(_row(x0_ptr, row, out_stride, ALIGNED) + columns, x0, mask=exist)
    tl.store(_row(x_next_ptr, row, out_stride, ALIGNED) + columns, x_next, mask=exist)


def forward(
    x_next: Tensor,
    x0: Tensor,
    x_t: Tensor,
    prediction: Tensor,
    previous_x0: Tensor,
    table: Tensor,
    step: int,
    noise: Tensor | None,
    variance: Tensor | None,
) -> None:
    """Write the next state and the clean sample into `x_next` and `x0`, in one launch.

    Args:
        x_next: float32 [B, dim], the next state.
        x0: float32 [B, dim], the clean sample, with the stride of x_next.
        x_t: float32 [B, dim], the state.
        prediction: [B, dim], one of `DTYPES`.
        previous_x0: float32 [B, dim], the x0 of the step before.
        table: float32 [S, 8].
        step: the row of the table.
        noise: float32 [dim], or None.
        variance: [B, dim] in the prediction's dtype, or None for the posterior's.
    """
    batch, dim = x_t.shape
    if x_t.numel() == 0:
        return
    read = [part for part in (x_t, prediction, previous_x0, noise, variance) if part is not None]
    launch = StepLaunch(aligned(x_next, x0, *read, elements=_VECTOR.value))
    programs_per_row = triton.cdiv(dim, launch.block)
    with torch.cuda.device_of(x_t):
        _solver_step_kernel[(batch * programs_per_row,)](
            x_next,
            x0,
            x_t,
            prediction,
            previous_x0,
            table,
            x_t if noise is None else noise,
            prediction if variance is None else variance,
            step,
            dim,
            programs_per_row,
            x_next.stride(0),
            x_t.stride(0),
            prediction.stride(0),
            previous_x0.stride(0),
            table.stride(0),
            0,  # the noise is one row for all
            0 if variance is None else variance.stride(0),
            int(noise is not None),
            int(variance is not None),
            **launch.constants(),
            num_warps=launch.warps,
            num_stages=1,
        )


@dataclass(frozen=True)
class StepLaunch:
    """How the kernel is compiled.

    Args:
        aligned: every row starts and ends at a multiple of a vector of four elements.
        block: number of elements of a row that a program handles.
        warps: number of warps of 32 threads in a program.
    """

    aligned: bool
    block: int = 1024
    warps: int = 4

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {"BLOCK": self.block, "ALIGNED": self.aligned}


def configurations() -> Iterator[Configuration]:
    """All configurations that the launcher above may have its kernel compiled for."""
    state = ("x_next", "x0", "x_t", "previous_x0", "table", "noise")
    others = dict.fromkeys(state, torch.float32)
    for dtype in DTYPES:
        for launch in (StepLaunch(aligned=True), StepLaunch(aligned=False)):
            constants = launch.constants()
            yield Configuration.of(_solver_step_kernel, dtype, others, constants, launch.warps)
