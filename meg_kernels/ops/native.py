"""The CUDA kernels of csrc/, called on torch tensors.

The extension `meg_kernels._C` is optional and knows nothing of torch: it takes addresses, sizes,
strides and a stream. This file is the side that knows tensors. It trusts shapes, dtypes and
devices, which `meg_kernels.ops.dynamic_neuron` checks, and looks itself only at what a raw pointer
cannot carry: the layout in memory.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

# In the order of the kernels' codes: csrc/dynamic_neuron.h.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("identity", "gelu", "gelu_tanh", "silu", "relu")


def available(device: torch.device | None = None) -> bool:
    """Whether the CUDA kernels can run on `device` (default: the current CUDA device)."""
    return unavailable_reason(device) is None


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why the CUDA kernels cannot run on `device`, and what to do about it; None if they can."""
    reason = _reason_anywhere()
    if reason is not None:
        return reason
    index = None if device is None else device.index
    return _reason_on(torch.cuda.current_device() if index is None else index)


def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it cannot run here; the message is `unavailable_reason()`.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
    return _extension()


@functools.cache
def _extension() -> ModuleType:
    return importlib.import_module("meg_kernels._C")


@functools.cache
def _reason_anywhere() -> str | None:
    try:
        _extension()
    except ModuleNotFoundError:
        return (
            "the CUDA extension is not built; install CUDA 12.8 or later with a C++17 compiler "
            "and reinstall meg-kernels with MEG_KERNELS_BUILD_CUDA=1"
        )
    except ImportError as error:
        return f"the CUDA extension is built but cannot be imported: {error}"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


@functools.cache
def _reason_on(device_index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device_index)
    architectures = _extension().ARCHITECTURES
    if any(_serves(architecture, major, minor) for architecture in architectures):
        return None
    name = torch.cuda.get_device_name(device_index)
    return (
        f"the CUDA extension is built for {', '.join(architectures)}, but {name} is "
        f"sm_{major}{minor}; reinstall meg-kernels with MEG_KERNELS_CUDA_ARCHS=sm_{major}{minor}"
    )


def _serves(architecture: str, major: int, minor: int) -> bool:
    """Whether code built for `architecture` runs on a chip of compute capability major.minor.

    >>> _serves("sm_80", 8, 9), _serves("sm_80", 9, 0)  # machine code: later minor versions too
    (True, False)
    >>> _serves("sm_90a", 9, 0), _serves("sm_100a", 10, 3)  # "a": that one chip
    (True, False)
    >>> _serves("compute_80", 12, 0)  # PTX: any later chip
    True
    """
    kind, _, version = architecture.partition("_")
    built = divmod(int(version.rstrip("af")), 10)
    if version.endswith("a"):
        return built == (major, minor)
    if kind == "compute":
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def layout_problem(
    y: Tensor, x: Tensor, key: Tensor, bias: Tensor | None, value: Tensor, index: Tensor
) -> str | None:
    """What about the tensors' layout in memory the kernels cannot take, or None if nothing.

    They want rows whose elements are adjacent, at one constant distance from each other. Any slice
    along the last dimension is fine, a transposed tensor is not.
    """
    for name, tensor in (("y", y), ("x", x), ("key", key), ("value", value)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} has stride {tensor.stride(-1)} in its last dimension, which must be 1"
        if tensor.dim() == 3:
            samples, tokens, _ = tensor.shape
            if samples > 1 and tokens > 1 and tensor.stride(0) != tokens * tensor.stride(1):
                return (
                    f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}: its samples "
                    "are not as far apart as its tokens"
                )
    for name, vector in (("bias", bias), ("index", index)):
        if vector is not None and not vector.is_contiguous():
            return f"{name} has stride {vector.stride(0)}, which must be 1"
    return None


def _row_stride(tensor: Tensor) -> int:
    """Elements between the rows of [M, d] or, as one sequence of rows, of [B, T, d]."""
    only_one_token = tensor.dim() == 3 and tensor.shape[1] == 1
    return tensor.stride(0) if only_one_token else tensor.stride(-2)


def dynamic_neuron_(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    activation: str,
) -> Tensor:
    """y[m] += act(x[m] . key[i] + bias[i]) * value[i] with i = index[m], in place, on the GPU.

    Queued on the device's current stream; nothing waits for it. Sums are float32.

    Args:
        y: [B, T, d_out] or [M, d_out], float32, float16 or bfloat16 like everything but index. It
            must not overlap any other argument.
        x: [B, T, d_in] or [M, d_in].
        key: [N, d_in].
        bias: [N], or None.
        value: [N, d_out].
        index: int64 [B] or [M], each -1 (leave the row alone) or below N, which is not checked.
        activation: one of `ACTIVATIONS`.

    Returns:
        y.

    Raises:
        ValueError: a tensor's layout does not fit (`layout_problem`).
        RuntimeError: the extension cannot run here, or CUDA refused the launch.
    """
    problem = layout_problem(y, x, key, bias, value, index)
    if problem is not None:
        raise ValueError(f"dynamic_neuron_: {problem}; call .contiguous() on it")
    reason = unavailable_reason(y.device)
    if reason is not None:
        raise RuntimeError(f"dynamic_neuron_: {reason}")
    extension = _extension()
    with torch.cuda.device(y.device):
        code = extension.dynamic_neuron_forward(
            y=y.data_ptr(),
            x=x.data_ptr(),
            key=key.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            value=value.data_ptr(),
            index=index.data_ptr(),
            M=x.shape[:-1].numel(),
            d_in=x.shape[-1],
            d_out=y.shape[-1],
            y_stride=_row_stride(y),
            x_stride=_row_stride(x),
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            tokens_per_index=max(x.shape[1], 1) if x.dim() == 3 else 1,
            dtype=DTYPES.index(y.dtype),
            activation=ACTIVATIONS.index(activation),
            device=y.device.index,
            stream=torch.cuda.current_stream(y.device).cuda_stream,
        )
    if code != 0:
        raise RuntimeError(
            f"dynamic_neuron_: CUDA error {code} ({extension.error_string(code)}) for "
            f"y {tuple(y.shape)}, x {tuple(x.shape)}, key {tuple(key.shape)}, "
            f"value {tuple(value.shape)} of {y.dtype} on {y.device}"
        )
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)  # autograd cannot see a write through a pointer
    return y
