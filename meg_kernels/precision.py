"""Where bfloat16 pays: matrix products of training and fitting, on machines that multiply it."""

from __future__ import annotations

import contextlib

import torch


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
