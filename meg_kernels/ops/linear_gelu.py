"""The first half of the DiT's MLP: a linear layer, and gelu in its tanh form.

    out[b, t] = gelu(x[b, t] @ weight^T + bias)

The reference is a library's matrix product and one pass over its result. The Triton kernel keeps
that result on the chip: products are accumulated in float32, and bias and gelu work on it before
the only rounding. A row's bits depend on nothing else in its batch. Source: Peebles & Xie 2023,
section 3.2.

Rounding, on every backend: with u = 2^-23, a = x @ weight^T + bias, S its sum of magnitudes and eps
and tiny of the dtype, a errs by e = (K + 5) u S + eps |a| + tiny, and the result by 1.13 e + 8u |a|
and a rounding. S must be within the dtype's range; beyond it backends differ, in what is infinite
or NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meg_kernels.arguments import check_alike, check_floating, check_tensors
from meg_kernels.kernels.limits import DTYPES
from meg_kernels.ops.backend import choose, forced_backend, refuse_gradient

SUPPORTED = {"triton": DTYPES, "cpu": None, "reference": None}
# The choice where none is forced. cuBLAS's product may be worth more than the pass that follows it
# costs: the kernel is chosen on a GPU once the benchmark, which races the two, has shown that it
# wins.
AUTOMATIC = {"cpu": None, "reference": None}


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable; the product is rounded to its dtype."""
    with torch.autocast(x.device.type, enabled=False):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")


_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_LIBRARY.define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "linear_gelu", "CompositeExplicitAutograd")
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if _chosen(x.device, x.dtype) != "triton":
        return linear_gelu_reference(x, weight, bias)
    from meg_kernels.kernels import linear_gelu as triton_kernel

    rows = x.contiguous().flatten(0, -2)  # [M, K]
    out = triton_kernel.forward(rows, weight.contiguous(), bias.contiguous())
    return out.view(*x.shape[:-1], len(weight))


def _chosen(device: torch.device, dtype: torch.dtype) -> str:
    supported = AUTOMATIC if forced_backend() is None else SUPPORTED
    return choose("linear_gelu", device, dtype, supported=supported)


@torch.library.register_fake("meg_kernels::linear_gelu", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and gelu in its tanh form, the first half of the DiT's MLP.

    Args:
        x: [B, T, K] or [M, K]; float32, float16, bfloat16, or float64 where the backend is not
            triton.
        weight: [N, K] of that dtype, as `nn.Linear` keeps it.
        bias: [N] of that dtype.

    Returns:
        [B, T, N] or [M, N], contiguous, in the dtype of x; it errs by at most 1.13 ((K + 5) u S +
        eps |a|) + 8u |a| and a rounding, where S = sum |x weight| + |bias| is within the dtype's
        range, a the sum itself and u = 2^-23.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: a gradient is asked for, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.

    >>> linear_gelu(torch.tensor([[1.0, 2.0]]), weight=torch.eye(2), bias=torch.tensor([-1.0, 0.0]))
    tensor([[0.0000, 1.9546]])
    """
    _check(x, weight, bias)
    refuse_gradient("linear_gelu", x=x, weight=weight, bias=bias)
    return torch.ops.meg_kernels.linear_gelu(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_tensors(x=x, weight=weight, bias=bias)
    check_floating(x=x)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; it must be floating-point [B, T, K] or [M, K]"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)}; beside x {tuple(x.shape)} it must be "
            f"[N, {x.shape[-1]}], as nn.Linear keeps it"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias is {tuple(bias.shape)}; beside x {tuple(x.shape)} and weight "
            f"{tuple(weight.shape)} it must be ({len(weight)},)"
        )
    check_alike(x, weight=weight, bias=bias)
