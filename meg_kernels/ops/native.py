"""The CUDA kernels of csrc/, called on torch tensors.

The extension `meg_kernels._C` is optional and knows nothing of torch: it takes addresses, sizes,
strides and a stream. This file is the side that knows tensors. It trusts shapes, dtypes and
devices, which the ops above it check, and looks itself only at what a raw pointer cannot carry: the
layout in memory. Kernels are queued on the device's current stream; nothing waits for them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

# In the order of the kernels' codes: csrc/types.h.
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

    They want rows whose elements are adjacent. Rows may be anywhere: a slice, a transposed batch or
    an expanded one is fine, a transposed matrix is not.
    """
    for name, tensor in (("y", y), ("x", x), ("key", key), ("value", value)):
        if not _has_rows(tensor):
            return _row_problem(name, tensor)
    for name, vector in (("bias", bias), ("index", index)):
        if vector is not None and not vector.is_contiguous():
            return f"{name} has stride {vector.stride(0)}, which must be 1"
    return None


def forward(
    out: Tensor,
    y: Tensor,
    x: Tensor,
    key: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    activation: str,
) -> None:
    """out[m] = y[m] + act(x[m] . key[i] + bias[i]) * value[i] with i = index[m].

    Sums are float32. A row's result depends on that row alone, to the bit.

    Args:
        out: like y. It is y itself, or overlaps no other argument. Rows with index -1 are left
            alone if it is y, and get the bits of y if not.
        y: [B, T, d_out] or [M, d_out], float32, float16 or bfloat16 like everything but index.
        x: [B, T, d_in] or [M, d_in].
        key: [N, d_in].
        bias: [N], or None.
        value: [N, d_out].
        index: int64 [B] or [M], each -1 or below N, which is not checked.
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: a tensor's layout does not fit (`layout_problem`).
        RuntimeError: the extension cannot run here, or CUDA refused the launch.
    """
    op = "dynamic_neuron forward"
    _require(op, layout_problem(y, x, key, bias, value, index))
    _require(op, None if _has_rows(out) else _row_problem("out", out))
    extension = _extension_on(op, y.device)
    with torch.cuda.device(y.device):
        code = extension.dynamic_neuron_forward(
            _rows(out),
            _rows(y),
            _rows(x),
            _neurons(key, bias, value, activation),
            index.data_ptr(),
            _shape(x, key, value),
            _stream(y.device),
        )
    _raise_on_error(op, code, y=y, x=x, key=key, value=value)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # it cannot see a write through a pointer


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward(
    grad: Tensor,
    x: Tensor,
    key: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    activation: str,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of `forward` at x, key, bias and value; at y it is `grad` itself.

    Sums are float32 in a fixed order, without atomics: the same inputs give the same bits. Samples
    with index -1 give a zero gradient at x and none to any neuron, whatever their x and grad hold.

    Args:
        grad: the gradient at out, shaped like it; autograd's expanded ones are fine.
        x: as in `forward`, like the arguments up to activation.
        needs: whether x, key, bias and value need a gradient: four of them.

    Returns:
        The gradients at x, key, bias and value; None where not needed, or without a bias.

    Raises:
        ValueError: a tensor's layout does not fit (`layout_problem`).
        RuntimeError: the extension cannot run here, or CUDA refused a launch.
    """
    op = "dynamic_neuron backward"
    grad = grad if _has_rows(grad) else grad.contiguous()
    _require(op, layout_problem(grad, x, key, bias, value, index))
    extension = _extension_on(op, x.device)
    contiguous = torch.contiguous_format
    dx = torch.empty_like(x, memory_format=contiguous) if needs[0] else None
    dkey = torch.empty_like(key, memory_format=contiguous) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] and bias is not None else None
    dvalue = torch.empty_like(value, memory_format=contiguous) if needs[3] else None
    scratch: tuple[Tensor | None, ...] = (None, None, None, None)
    if dkey is not None or dbias is not None or dvalue is not None:
        rows = x.shape[:-1].numel()
        hidden, dpre = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        sorted_index, order = index.sort(stable=True)
        neurons = torch.arange(len(key) + 1, device=x.device)
        scratch = (hidden, dpre, order, torch.searchsorted(sorted_index, neurons))
    with torch.cuda.device(x.device):
        code = extension.dynamic_neuron_backward(
            _rows(grad),
            _rows(x),
            _neurons(key, bias, value, activation),
            index.data_ptr(),
            _shape(x, key, value),
            _stream(x.device),
            ((0, 0, 0) if dx is None else _rows(dx), *map(_address, (dkey, dbias, dvalue))),
            tuple(map(_address, scratch)),
        )
    _raise_on_error(op, code, grad=grad, x=x, key=key, value=value)
    return dx, dkey, dbias, dvalue


def entropy_gate(
    logits: Tensor, threshold: float, counter: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows are edited: those whose softmax has an entropy below `threshold`. NaN is not.

    Args:
        logits: [B, C] float32, float16 or bfloat16.
        threshold: in nats; rows with this very entropy are not edited.
        counter: int32 [1], zero; it is zero again once the kernel is through. Kernels that run at
            the same time need one each.

    Returns:
        entropy: float32 [B], in nats.
        index: int64 [B], the row's rank among the edited rows, or -1.
        rows: int64 [B], the numbers of the edited rows in order, then -1.
        count: int64 [1], how many rows are edited.

    Raises:
        ValueError: the layout of logits does not fit.
        RuntimeError: the extension cannot run here, or CUDA refused the launch.
    """
    op = "entropy_gate"
    _require(op, None if _has_rows(logits) else _row_problem("logits", logits))
    extension = _extension_on(op, logits.device)
    samples, classes = logits.shape
    entropy = torch.empty(samples, dtype=torch.float32, device=logits.device)
    index = torch.empty(samples, dtype=torch.int64, device=logits.device)
    rows = torch.empty_like(index)
    count = torch.empty(1, dtype=torch.int64, device=logits.device)
    with torch.cuda.device(logits.device):
        code = extension.entropy_gate(
            (*_matrix(logits), samples, classes, DTYPES.index(logits.dtype)),
            threshold,
            tuple(map(_address, (entropy, index, rows, count, counter))),
            _stream(logits.device),
        )
    _raise_on_error(op, code, logits=logits)
    return entropy, index, rows, count


def _has_rows(tensor: Tensor) -> bool:
    """Whether elements that follow each other in the last dimension are adjacent in memory."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1


def _row_problem(name: str, tensor: Tensor) -> str:
    return f"{name} has stride {tensor.stride(-1)} in its last dimension, which must be 1"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    """Rows: [B, T, d], or [M, d] as M samples of one token."""
    token_stride = tensor.stride(1) if tensor.dim() == 3 else 0
    return tensor.data_ptr(), tensor.stride(0), token_stride


def _matrix(tensor: Tensor) -> tuple[int, int]:
    """Matrix."""
    return tensor.data_ptr(), tensor.stride(0)


def _neurons(key: Tensor, bias: Tensor | None, value: Tensor, activation: str) -> tuple:
    """Neurons."""
    return _matrix(key), _address(bias), _matrix(value), ACTIVATIONS.index(activation)


def _shape(x: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """DynamicNeuronShape."""
    tokens = x.shape[1] if x.dim() == 3 else 1
    widths = x.shape[-1], value.shape[-1]
    return x.shape[0], tokens, key.shape[0], *widths, DTYPES.index(x.dtype)


def _stream(device: torch.device) -> tuple[int, int]:
    """Stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _require(op: str, problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"{op}: {problem}; call .contiguous() on it")


def _extension_on(op: str, device: torch.device) -> ModuleType:
    reason = unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}")
    return _extension()


def _raise_on_error(op: str, code: int, **tensors: Tensor) -> None:
    if code == 0:
        return
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    first = next(iter(tensors.values()))
    raise RuntimeError(
        f"{op}: CUDA error {code} ({_extension().error_string(code)}) for {shapes} of "
        f"{first.dtype} on {first.device}"
    )
