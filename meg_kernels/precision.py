"""Which products run in which precision, where weights are frozen or only fitted roughly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from meg_kernels.nn.linear import products_replaced, projections


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 natively; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


@contextlib.contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """For training: autocast to bfloat16 where the device multiplies it natively, else nothing."""
    if not multiplies_bfloat16(device):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), _quick_backward(device, torch.bfloat16):
        yield


def _quick_backward(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Inside, attention has the backward pass that is quickest on `device`."""
    # On CPUs scaled_dot_product_attention's fused backward is slow in bfloat16.
    slow = device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where `device` multiplies it natively, else `dtype`."""
    return torch.bfloat16 if multiplies_bfloat16(device) else dtype


@contextlib.contextmanager
def frozen_products(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Inside, frozen projections among and in `modules` multiply in `dtype`, forward and backward.

    On a CPU the weights are converted and packed once, for oneDNN, instead of at every call; that
    costs as much memory as a copy of them in `dtype`, and another one if there is a backward pass,
    and pays from some tens of calls on. Elsewhere this is autocast. Outputs have their inputs'
    dtype; gradients flow to the inputs only. Under `torch.no_grad()` every projection is frozen.
    """
    learns = torch.is_grad_enabled()
    frozen: list[Any] = [
        part for part in projections(modules) if not (learns and part.weight.requires_grad)
    ]
    if not frozen:
        yield
        return
    own = frozen[0].weight
    if own.device.type != "cpu":
        with torch.autocast(own.device.type, dtype, enabled=dtype != own.dtype):
            yield
        return
    packs = torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
    with (
        products_replaced({part: _Frozen(part, dtype) for part in frozen} if packs else {}),
        _quick_backward(own.device, own.dtype),
    ):
        yield


class PackedWeight:
    """A weight [out, in], rearranged once for oneDNN's products on a CPU."""

    def __init__(self, weight: Tensor):
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight | None:
        """None where the weight is not on a CPU, or oneDNN has no product for its dtype."""
        takes = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        return cls(weight) if takes and torch.backends.mkldnn.is_available() else None

    def __call__(self, x: Tensor, bias: Tensor | None, gelu_tanh: bool = False) -> Tensor:
        """x @ weight.T + bias, or the tanh-GELU of that, in the weight's dtype, which is x's."""
        epilogue: tuple = ("gelu", [], "tanh") if gelu_tanh else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, *epilogue)


class _Frozen:
    """A frozen projection's product, forward and backward, over packed weights."""

    def __init__(self, projection: nn.Linear | Conv1D, dtype: torch.dtype):
        self.dtype, self.projection = dtype, projection
        self.weight = self._pack(transposed=False)
        self.bias = None if projection.bias is None else projection.bias.detach().to(dtype)

    @functools.cached_property
    def transposed(self) -> PackedWeight:
        return self._pack(transposed=True)

    def _pack(self, transposed: bool) -> PackedWeight:
        # A Linear's weight is [out, in]; a Conv1D's is [in, out].
        weight = self.projection.weight.detach().to(self.dtype)
        if isinstance(self.projection, Conv1D) != transposed:
            weight = weight.t()
        return PackedWeight(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen) -> Tensor:
        ctx.frozen = frozen
        return frozen.weight(x.to(frozen.dtype), frozen.bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        frozen: _Frozen = ctx.frozen
        return frozen.transposed(gradient.to(frozen.dtype), None).to(gradient.dtype), None
