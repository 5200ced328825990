"""Which products run in which precision, where weights are frozen or only fitted roughly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 natively; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def fast_products(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 where the device multiplies it natively, else nothing."""
    if not multiplies_bfloat16(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where `device` multiplies it natively, else `dtype`."""
    return torch.bfloat16 if multiplies_bfloat16(device) else dtype


@contextlib.contextmanager
def frozen_products(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Inside, frozen projections among and in `modules` multiply in `dtype`, forward and backward.

    On a CPU the weights are converted and packed once, for oneDNN, instead of at every call; that
    costs as much memory as two copies of them in `dtype`, and pays from some tens of calls on.
    Elsewhere this is autocast. Outputs have their inputs' dtype; gradients flow to the inputs only.
    """
    projections: list[Any] = [
        part
        for module in modules
        for part in module.modules()
        if type(part) in (nn.Linear, Conv1D) and not part.weight.requires_grad
    ]
    if not projections:
        yield
        return
    own = projections[0].weight
    if own.device.type != "cpu":
        with torch.autocast(own.device.type, dtype, enabled=dtype != own.dtype):
            yield
        return
    # scaled_dot_product_attention's fused backward is slow in bfloat16 on CPUs.
    slow = own.dtype == torch.bfloat16
    try:
        if torch.backends.mkldnn.is_available():
            for projection in projections:
                projection.forward = _Packed(projection, dtype)
        with sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext():
            yield
    finally:
        for projection in projections:
            vars(projection).pop("forward", None)


class _Packed:
    """A frozen projection's forward over packed weights."""

    def __init__(self, projection: nn.Linear | Conv1D, dtype: torch.dtype):
        weight = projection.weight.detach().to(dtype)  # [out, in], but Conv1D's is [in, out]
        if isinstance(projection, Conv1D):
            weight = weight.t()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.dtype = dtype
        self.weight = reorder(weight.contiguous())
        self.transposed = reorder(weight.t().contiguous())
        self.bias = None if projection.bias is None else projection.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x, self)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: _Packed) -> Tensor:
        ctx.packed = packed
        return _multiply(x, packed.weight, packed.bias, packed.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packed: _Packed = ctx.packed
        return _multiply(gradient, packed.transposed, None, packed.dtype), None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise
    return product(x.to(dtype), weight, bias, "none", [], "").to(x.dtype)
