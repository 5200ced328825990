"""The solver's step: from a state and what the network predicts to the next state of a diffusion.

    x0     = a x_t + b prediction
    x_next = c x_t + d x0 + e previous_x0 + std noise

    log std^2 = fraction log_beta + (1 - fraction) log_posterior     fraction = (variance + 1) / 2

One form for DDIM, DPM-Solver++(2M) and DDPM; `diffusion/solvers.py` has the coefficients and where
they come from. They lie on the device, one row a step, and the host never looks at them: no step
waits for it, none compiles anew, and all of them can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from meg_kernels.arguments import check_size, check_tensors
from meg_kernels.kernels.launching import has_adjacent_rows
from meg_kernels.kernels.limits import DTYPES
from meg_kernels.ops.backend import choose, refuse_gradient

SUPPORTED = {"triton": DTYPES, "cpu": None, "reference": None}
COLUMNS = (
    "x0_from_sample",  # a
    "x0_from_prediction",  # b
    "sample",  # c
    "x0",  # d
    "previous_x0",  # e
    "log_posterior",
    "log_beta",
    "adds_noise",  # 1, or 0 where the step adds none; then the logarithms are 0
)
"""What stands in a row of the table."""


def solver_step_reference(
    x_t: Tensor,
    prediction: Tensor,
    previous_x0: Tensor,
    table: Tensor,
    step: int,
    noise: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, in the dtype of x_t."""
    a, b, c, d, e, log_posterior, log_beta, adds_noise = table[step].to(x_t.dtype)
    x0 = a * x_t + b * prediction.to(x_t.dtype)
    x_next = c * x_t + d * x0 + e * previous_x0.masked_fill(e == 0, 0)
    if noise is not None:
        # Without a variance, the posterior's.
        fraction = x_t.new_zeros(()) if variance is None else (variance.to(x_t.dtype) + 1) / 2
        std = torch.exp((fraction * log_beta + (1 - fraction) * log_posterior) / 2)
        x_next = x_next + (std * noise).masked_fill(adds_noise == 0, 0)
    return x_next, x0


def _cpu(
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
    # A CPU's table can be read: a step makes no pass for what it has no use for.
    a, b, c, d, e, log_posterior, log_beta, adds_noise = table[step].tolist()
    torch.mul(x_t, a, out=x0).add_(prediction, alpha=b)
    torch.mul(x_t, c, out=x_next).add_(x0, alpha=d)
    if e:
        x_next.add_(previous_x0, alpha=e)
    if adds_noise and noise is not None:
        if variance is None:
            x_next.add_(noise, alpha=math.exp(log_posterior / 2))
        else:
            middle, slope = (log_beta + log_posterior) / 4, (log_beta - log_posterior) / 4
            x_next.addcmul_(variance.float().mul(slope).add_(middle).exp_(), noise)


_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_LIBRARY.define(
    "solver_step(Tensor x_t, Tensor prediction, Tensor previous_x0, Tensor table, SymInt step,"
    " Tensor? noise, Tensor? variance) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "solver_step", "CompositeExplicitAutograd")
def _solver_step(x_t: Tensor, prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    chosen = choose("solver_step", x_t.device, prediction.dtype, supported=SUPPORTED)
    if chosen == "reference":
        return solver_step_reference(x_t, prediction, *rest)
    x_next, x0 = (torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device) for _ in range(2))
    if chosen == "cpu":
        _cpu(x_next, x0, x_t, prediction, *rest)
    else:
        from meg_kernels.kernels import solver_step as triton_kernel

        triton_kernel.forward(x_next, x0, x_t, prediction, *rest)
    return x_next, x0


@torch.library.register_fake("meg_kernels::solver_step", lib=_LIBRARY)
def _(x_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x_t.new_empty(x_t.shape), x_t.new_empty(x_t.shape)


def solver_step(
    x_t: Tensor,
    prediction: Tensor,
    previous_x0: Tensor,
    table: Tensor,
    step: int,
    noise: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a diffusion solver for a batch of samples, in one kernel; not differentiable.

    Elements within a row must be adjacent. Rows may lie at any distance: the prediction may be a
    slice of padded patches, or one of two channels. It is read as it is.

    Args:
        x_t: float32 [B, dim], the state.
        prediction: [B, dim] of the network, float32, float16 or bfloat16.
        previous_x0: float32 [B, dim], the x0 of the step before; not read where e is 0.
        table: float32 [S, 8], the coefficients of every step, see `COLUMNS`.
        step: the row of the table, 0 to S - 1.
        noise: float32 [dim], for all rows the same; not read where the step adds none.
        variance: [B, dim] in the prediction's dtype, -1 for the posterior's variance and 1 for
            beta; read only with noise. Default: the posterior's.

    Returns:
        x_next: float32 [B, dim], the next state, contiguous.
        x0: float32 [B, dim], the clean sample that the prediction implies, contiguous.

        Each errs by at most 8u times the sum of its terms' magnitudes, u = 2^-23 (x_next by d times
        the error of x0 more, and its noise by 16u times the magnitude of std's exponent more),
        where every term is within float32's range.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device or stride does not fit, or the table has no such row.
        RuntimeError: an argument requires a gradient, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.

    Source: Ho et al. 2020, eq. 7; Song et al. 2021, eq. 12; Nichol & Dhariwal 2021, eq. 15; Lu et
    al. 2022, algorithm 2.

    >>> x_t, prediction = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 3.0]])
    >>> table = torch.tensor([[0.5, 1.0, 0.25, 0.5, 0.0, 0.0, 0.0, 0.0]])
    >>> x_next, x0 = solver_step(x_t, prediction, x_t, table, step=0)
    >>> x0.tolist(), x_next.tolist()
    ([[2.0, 5.0]], [[1.5, 3.5]])
    """
    step = _checked_step(x_t, prediction, previous_x0, table, step, noise, variance)
    return torch.ops.meg_kernels.solver_step(
        x_t, prediction, previous_x0, table, step, noise, variance
    )


def _checked_step(
    x_t: Tensor,
    prediction: Tensor,
    previous_x0: Tensor,
    table: Tensor,
    step: int,
    noise: Tensor | None,
    variance: Tensor | None,
) -> int:
    tensors = {"x_t": x_t, "prediction": prediction, "previous_x0": previous_x0, "table": table}
    optional = {"noise": noise, "variance": variance}
    check_tensors(**tensors, **{name: part for name, part in optional.items() if part is not None})
    if x_t.dim() != 2:
        raise ValueError(f"x_t is {tuple(x_t.shape)}; it must be [B, dim]")
    if prediction.dtype not in DTYPES:
        supported = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(
            f"prediction is {prediction.dtype}; it must be one of {supported}: "
            "call prediction.float()"
        )
    state, (_, dim), (steps, *_) = torch.float32, x_t.shape, (*table.shape, 0)
    expected = {
        "x_t": (x_t, state, x_t.shape),
        "prediction": (prediction, prediction.dtype, x_t.shape),
        "previous_x0": (previous_x0, state, x_t.shape),
        "table": (table, state, (steps, len(COLUMNS))),
        "noise": (noise, state, (dim,)),
        "variance": (variance, prediction.dtype, x_t.shape),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; beside x_t {tuple(x_t.shape)} "
                f"and a prediction of {prediction.dtype} it must be {dtype} {tuple(shape)}"
            )
        if tensor.device != x_t.device:
            raise ValueError(f"{name} is on {tensor.device} and x_t on {x_t.device}; move it there")
        if not has_adjacent_rows(tensor):
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} within its rows; elements of a row must "
                f"be adjacent: call {name}.contiguous()"
            )
    refuse_gradient("solver_step", **{name: tensor for name, (tensor, *_) in expected.items()})
    return check_size("step", step, low=0, high=steps - 1)
