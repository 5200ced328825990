"""The DiT's linear layers with what follows them: gelu, or a gate and the residual stream.

    linear_gelu             out[b, t] = gelu(x[b, t] @ weight^T + bias)       gelu in its tanh form
    linear_gated_residual   out[b, t] = residual[b, t] + gate[b] * (x[b, t] @ weight^T + bias)

The reference is a library's matrix product and one pass over its result. The Triton kernels keep
that result on the chip: products are accumulated in float32, and bias, activation, gate and
residual work on it before the only rounding. A row's bits depend on nothing else in its batch.
Source: Peebles & Xie 2023, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meg_kernels.kernels import rows_adjacent
from meg_kernels.ops.backend import choose, forced_backend

BACKENDS = ("triton", "cpu", "reference")
# The choice where none is forced. cuBLAS's product may be worth more than the pass that follows it
# costs: the kernels are chosen on a GPU once the benchmarks, which race the two, have shown that
# they win.
AUTOMATIC = ("cpu", "reference")


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable; the product is rounded to its dtype."""
    with torch.autocast(x.device.type, enabled=False):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_gated_residual_reference(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor
) -> Tensor:
    """The definition in plain PyTorch, differentiable; the product is rounded to its dtype."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(residual, gate.unsqueeze(1), F.linear(x, weight, bias))


_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    "linear_gated_residual(Tensor x, Tensor weight, Tensor bias, Tensor gate, Tensor residual)"
    " -> Tensor",
    tags=_TAGS,
)


@torch.library.impl(_LIBRARY, "linear_gelu", "CompositeExplicitAutograd")
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kernels = _forced_kernels("linear_gelu", x)
    if kernels is None:
        return linear_gelu_reference(x, weight, bias)
    out = kernels.linear_gelu(_as_rows(x), weight.contiguous(), bias.contiguous())
    return out.view(*x.shape[:-1], len(weight))


@torch.library.impl(_LIBRARY, "linear_gated_residual", "CompositeExplicitAutograd")
def _linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor
) -> Tensor:
    kernels = _forced_kernels("linear_gated_residual", x)
    if kernels is None:
        return linear_gated_residual_reference(x, weight, bias, gate, residual).contiguous()
    out = kernels.linear_gated_residual(
        _as_rows(x), weight.contiguous(), bias.contiguous(), rows_adjacent(gate), _as_rows(residual)
    )
    return out.view(residual.shape)


def _forced_kernels(op: str, x: Tensor) -> Any:
    """The Triton kernels, if they are forced; None where the reference runs."""
    backends = AUTOMATIC if forced_backend() is None else BACKENDS
    if choose(op, x.device, x.dtype, backends=backends) != "triton":
        return None
    from meg_kernels.kernels import linear_epilogue as kernels

    if x.dtype not in kernels.DTYPES:
        supported = ", ".join(str(dtype) for dtype in kernels.DTYPES)
        raise RuntimeError(
            f"{op}: backend 'triton' is forced, but the tensors are of {x.dtype}; its kernels take "
            f"{supported}"
        )
    return kernels


def _as_rows(tokens: Tensor) -> Tensor:
    """[B, T, D] or [M, D] as contiguous [M, D]."""
    return tokens.contiguous().flatten(0, -2)


@torch.library.register_fake("meg_kernels::linear_gelu", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("meg_kernels::linear_gated_residual", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and gelu in its tanh form, the first half of the DiT's MLP.

    Args:
        x: [B, T, K] or [M, K]; float32, float16, bfloat16, or float64 where the backend is not
            triton.
        weight: [N, K] of that dtype, as `nn.Linear` keeps it.
        bias: [N] of that dtype.

    Returns:
        [B, T, N] or [M, N], contiguous, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: a gradient is asked for, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.

    >>> linear_gelu(torch.tensor([[1.0, 2.0]]), weight=torch.eye(2), bias=torch.tensor([-1.0, 0.0]))
    tensor([[0.0000, 1.9546]])
    """
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; it must be floating-point [B, T, K] or [M, K]"
        )
    _check("linear_gelu", {"x": x, "weight": weight, "bias": bias})
    return torch.ops.meg_kernels.linear_gelu(x, weight, bias)


def linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor
) -> Tensor:
    """A linear layer whose output is gated and added to the residual stream.

    Args:
        x: [B, T, K]; float32, float16, bfloat16, or float64 where the backend is not triton.
        weight: [N, K] of that dtype, as `nn.Linear` keeps it.
        bias: [N] of that dtype.
        gate: [B, N] of that dtype; rows may lie at any distance, as columns of a wider matrix do.
        residual: [B, T, N] of that dtype.

    Returns:
        [B, T, N], contiguous, in the dtype of x.

    Raises:
        ValueError, RuntimeError: as in `linear_gelu`.

    >>> x, gate = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[10.0, 100.0]])
    >>> bias, residual = torch.zeros(2), torch.tensor([[[3.0, 4.0]]])
    >>> linear_gated_residual(x, torch.eye(2), bias, gate, residual)
    tensor([[[ 13., 204.]]])
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be floating-point [B, T, K]")
    parts = {"x": x, "weight": weight, "bias": bias, "gate": gate, "residual": residual}
    _check("linear_gated_residual", parts)
    return torch.ops.meg_kernels.linear_gated_residual(*parts.values())


def _check(op: str, parts: dict[str, Tensor]) -> None:
    x, weight = parts["x"], parts["weight"]
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)}; beside x {tuple(x.shape)} it must be "
            f"[N, {x.shape[-1]}], as nn.Linear keeps it"
        )
    width = len(weight)
    expected = {"bias": (width,), "gate": (len(x), width), "residual": (*x.shape[:-1], width)}
    for name, part in parts.items():
        if name in expected and tuple(part.shape) != expected[name]:
            raise ValueError(
                f"{name} is {tuple(part.shape)}; beside x {tuple(x.shape)} and weight "
                f"{tuple(weight.shape)} it must be {expected[name]}"
            )
        if part.dtype != x.dtype or part.device != x.device:
            raise ValueError(
                f"{name} is {part.dtype} on {part.device}, x {x.dtype} on {x.device}; convert "
                "them to one dtype, and move them to one device"
            )
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts.values()):
        raise RuntimeError(
            f"{op} has no backward; call it under torch.no_grad(), or use the reference, "
            f"{op}_reference"
        )
