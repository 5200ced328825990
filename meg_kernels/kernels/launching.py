"""How the Triton kernels are launched: where they run, what they are compiled for, which layouts.

Nothing here needs triton to be installed, except compiling and launching itself.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@functools.cache
def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, and what to do; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; on Linux, pip install triton"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return (
            f"Triton needs tensors on a CUDA device, these are on {device}; move them, or set "
            "TRITON_INTERPRET=1 before Python starts for Triton's (very slow) interpreter"
        )
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"{name} is sm_{major}{minor}; the Triton kernels need sm_80 (Ampere) or later"
    try:
        _ = triton.runtime.driver.active
    except Exception as error:  # its first use may compile C: no compiler, no Python headers
        return f"Triton cannot start: {error}"
    return None


def jit(function: Callable) -> Any:
    """`triton.jit`, compiling once per set of types and compile-time arguments.

    By itself Triton compiles again when a pointer happens to be a multiple of 16, or a number to be
    1. Here alignment is a compile-time argument that the launcher sets, so that all compilations
    can be listed, and tested, in advance. Run-time arguments that are not pointers are annotated.
    """
    import triton

    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation != "tl.constexpr"
    ]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


def has_adjacent_rows(tensor: Tensor) -> bool:
    """Whether neighbouring elements of a row are neighbours in memory, as all kernels need it."""
    return tensor.shape[-1] < 2 or tensor.stride(-1) == 1


def rows_adjacent(tensor: Tensor) -> Tensor:
    """`tensor` itself if it `has_adjacent_rows`, or else a contiguous copy."""
    return tensor if has_adjacent_rows(tensor) else tensor.contiguous()


def aligned(*tensors: Tensor, elements: int | None = None) -> bool:
    """Whether every row of the tensors starts and ends at a multiple of a vector's size in memory.

    A row alone counts the stride of the batch that it was cut from, and so gets the same bits.

    Args:
        tensors: any number, each with adjacent elements in its rows.
        elements: in a vector. Default: as many as 16 bytes hold.
    """
    for tensor in tensors:
        *steps, _ = tensor.stride()
        size = tensor.element_size()
        addresses = tensor.data_ptr() | tensor.shape[-1] * size
        for step in steps:
            addresses |= step * size
        if addresses % (16 if elements is None else elements * size):
            return False
    return True


@dataclass(frozen=True)
class Configuration:
    """One set of types and constants that a launcher may have its kernel compiled for.

    Args:
        kernel: the function under `jit`.
        types: each parameter's type as Triton writes it: `*bf16`, `i64`, `constexpr`.
        constants: the compile-time arguments.
        warps: number of warps of 32 threads in a program.
        stages: number of iterations whose loads a loop keeps in flight.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 1

    @classmethod
    def of(
        cls,
        kernel: Any,
        dtype: torch.dtype,
        others: dict[str, torch.dtype],
        constants: dict[str, Any],
        warps: int,
        stages: int = 1,
    ) -> Configuration:
        """The configuration in which every parameter `NAME_ptr` points to `dtype`.

        Args:
            kernel: the function under `jit`.
            dtype: of the pointers.
            others: the dtypes of the pointers that differ, by NAME.
            constants: the compile-time arguments.
            warps: number of warps of 32 threads in a program.
            stages: number of iterations whose loads a loop keeps in flight.
        """
        types = {}
        for name, parameter in inspect.signature(kernel.fn).parameters.items():
            if name.endswith("_ptr"):
                types[name] = "*" + _TYPES[others.get(name.removesuffix("_ptr"), dtype)]
            else:
                types[name] = _TYPES[parameter.annotation]
        return cls(kernel, types, constants, warps, stages)


_TYPES: dict[torch.dtype | str, str] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    "tl.int32": "i32",
    "tl.int64": "i64",
    "tl.float32": "fp32",
    "tl.constexpr": "constexpr",
}
