"""When products run in bfloat16: where a device multiplies it natively, and that is faster.

A GPU that multiplies bfloat16 natively does so faster than float32. A CPU may have the instructions
and still lose, so there a short measurement decides, once for each machine and number of threads
(`meg_kernels.machine`). MEG_KERNELS_BFLOAT16 decides instead of it: `always` (wherever it is
native), `never`, or `auto`, the default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meg_kernels.machine import WORTHWHILE, Choice, Contest, gain, policy

VARIABLE = "MEG_KERNELS_BFLOAT16"
_MEASURED = "bfloat16 over float32 products, forward and backward"
_ROWS, _WIDTH = 256, 768  # what the measured product multiplies: about one batch, one layer


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 natively; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def bfloat16_pays(device: torch.device) -> bool:
    """Whether products of many rows are faster in bfloat16 than in float32 on `device`.

    Raises:
        ValueError: MEG_KERNELS_BFLOAT16 is not `auto`, `always` or `never`.
    """
    wanted = policy(VARIABLE)
    if wanted == "never" or not multiplies_bfloat16(device):
        return False
    return wanted == "always" or device.type != "cpu" or gain(_MEASURED, _contest) >= WORTHWHILE


def bfloat16_choice(device: torch.device) -> Choice:
    """What `bfloat16_pays` says of `device`, and why."""
    chosen = "bfloat16" if bfloat16_pays(device) else "float32"
    if not multiplies_bfloat16(device):
        why = "bfloat16 is not native"
    elif (wanted := policy(VARIABLE)) != "auto":
        why = f"{VARIABLE}={wanted}"
    elif device.type == "cpu":
        why = f"bfloat16 is {gain(_MEASURED, _contest):.2f} times as fast"
    else:
        why = "bfloat16 is native"
    return Choice(f"training's products on {device}", chosen, why)


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products that may be rounded: bfloat16 where it pays, else `dtype`.

    Args:
        device: where the products run.
        dtype: of the weights.
    """
    return torch.bfloat16 if bfloat16_pays(device) else dtype


@contextlib.contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """For training: inside, autocast to bfloat16 where it pays on `device`, else nothing."""
    if not bfloat16_pays(device):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), quick_backward(device, torch.bfloat16):
        yield


def quick_backward(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Inside, attention in `dtype` has the backward pass that is quickest on `device`."""
    # On CPUs scaled_dot_product_attention's fused backward is slow in bfloat16.
    slow = device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()


def _contest() -> Contest:
    """A layer's three products, with the conversions that autocast pays for in bfloat16."""
    x = torch.full((_ROWS, _WIDTH), 0.5, dtype=torch.float32, device="cpu")
    weight = torch.full((_WIDTH, _WIDTH), 0.01, dtype=torch.float32, device="cpu")

    def products(dtype: torch.dtype) -> Callable[[int], Tensor]:
        def run(turn: int) -> Tensor:
            converted, gradient = weight.to(dtype), x.to(dtype)
            y = gradient @ converted.t()
            (y @ converted).float()
            return (y.t() @ gradient).float()

        return run

    return Contest(plain=products(torch.float32), other=products(torch.bfloat16))
