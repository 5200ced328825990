"""What an argument must be before any work begins: tensors, and the numbers beside them."""

from __future__ import annotations

import math
import operator
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes that everything here computes with."""


def check_tensors(**arguments: object) -> None:
    """Raise unless each argument is an ordinary tensor, whatever its dtype.

    Raises:
        TypeError: it is no tensor; the message says how to make one of it.
        ValueError: it is sparse, quantised or nested.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            made = {"ndarray": "as_tensor", "generic": "as_tensor"}.get(type(value).__name__)
            raise TypeError(
                f"{name} is a {type(value).__name__}; it must be a torch.Tensor: "
                f"torch.{made or 'tensor'}({name}) makes one of numbers"
            )
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            mending = f"call {name}.{'to_padded_tensor(0)' if value.is_nested else 'to_dense()'}"
            raise ValueError(f"{name} is {kind}; it must be a dense tensor: {mending}")
        if value.is_quantized:
            raise ValueError(
                f"{name} is {value.dtype}; it must not be quantised: call {name}.dequantize()"
            )


def check_floating(**arguments: object) -> None:
    """Raise unless each argument is an ordinary tensor of one of the dtypes `FLOATING`.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is sparse, quantised or nested, or of another dtype.
    """
    check_tensors(**arguments)
    for name, value in arguments.items():
        assert isinstance(value, Tensor)
        if value.dtype not in FLOATING:
            mending = f"{name}.real" if value.is_complex() else f"{name}.float()"
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}; it must be floating-point "
                f"(float32, float16, bfloat16 or float64): use {mending}"
            )


def check_instance(name: str, value: object, kind: type, how: str) -> None:
    """TypeError unless `value` is a `kind`; `how` says how to get one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}: {how}")


def check_size(name: str, value: object, low: int = 1, high: int | None = None) -> int:
    """The integer `value`; ValueError unless it is one, of at least `low` and at most `high`.

    For code that `torch.compile` traces, as `checks.integer` is for all other.
    """
    # A compiler's symbolic numbers are of type int to isinstance, and of no other kind.
    integer = isinstance(value, int | Integral) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        upto = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; it must be an integer {upto}")
    return value if isinstance(value, int) else operator.index(value)  # type: ignore[arg-type]


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """ValueError unless `value` is a finite number from `low` to `high`.

    For code that `torch.compile` traces, as `checks.number` is for all other.
    """
    number = isinstance(value, int | float | Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or abs(value) == math.inf:  # type: ignore[operator, arg-type]
        bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (
            high < math.inf
        )
        wanted = " and ".join(["a finite number", *bounds]).replace("number and", "number,")
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def check_alike(x: Tensor, **parts: Tensor) -> None:
    """ValueError unless the parts are of the dtype and on the device of `x`."""
    for name, part in parts.items():
        if part.dtype != x.dtype or part.device != x.device:
            raise ValueError(
                f"{name} is {part.dtype} on {part.device}, x {x.dtype} on {x.device}; convert "
                "them to one dtype, and move them to one device"
            )


def check_written(name: str, tensor: Tensor) -> None:
    """ValueError if elements of a tensor that is to be changed share one place in memory."""
    if tensor.is_contiguous():
        return
    widest = 1  # of what the dimensions so far reach: a longer stride steps over all of it
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < widest:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: some of "
                f"its elements share their memory, and cannot be changed one by one; call "
                f"{name}.clone(memory_format=torch.contiguous_format) first"
            )
        widest = max(widest, stride * size) if size > 1 else widest
