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

from meg_kernels.kernels.launching import has_adjacent_rows, rows_adjacent
from meg_kernels.kernels.limits import ACTIVATIONS, DTYPES
from meg_kernels.neuron import Neurons


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why the CUDA kernels cannot run on `device`, and what to do about it; None if they can."""
    reason = _reason_anywhere()
    if reason is not None:
        return reason
    index = None if device is None else device.index
    return _reason_on(torch.cuda.current_device() if index is None else index)


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


def layout_problem(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> str | None:
    """What about the tensors' layout in memory the dynamic neuron's kernels cannot take, or None.

    Elements of a row must be adjacent. Rows may be anywhere: a slice, a transposed batch or an
    expanded one is fine, a transposed matrix is not.
    """
    for name, rows in (("y", y), ("x", x), ("key", neurons.key), ("value", neurons.value)):
        if (problem := _row_problem(name, rows)) is not None:
            return problem
    for name, vector in (("bias", neurons.bias), ("index", index)):
        if vector is not None and not vector.is_contiguous():
            return f"{name} has stride {vector.stride(0)}, which must be 1"
    return None


def _row_problem(name: str, tensor: Tensor) -> str | None:
    if has_adjacent_rows(tensor):
        return None
    return f"{name} has stride {tensor.stride(-1)} in its last dimension, which must be 1"


def dynamic_neuron_forward(
    out: Tensor, y: Tensor, x: Tensor, neurons: Neurons, index: Tensor
) -> None:
    """out[m] = y[m] + act(x[m] . key[i] + bias[i]) * value[i] with i = index[m].

    Sums are float32. A row's result depends on that row alone, to the bit.

    Args:
        out: like y. It is y itself, or overlaps no other argument. Rows with index -1 are left
            alone if it is y, and get the bits of y if not.
        y: [B, T, d_out] or [M, d_out], float32, float16 or bfloat16 like everything but index.
        x: [B, T, d_in] or [M, d_in].
        neurons: N neurons with that d_in and d_out.
        index: int64 [B] or [M], each -1 or below N, which is not checked.

    Raises:
        ValueError: a tensor's layout does not fit (`layout_problem`).
        RuntimeError: the extension cannot run here, or CUDA refused the launch.
    """
    op = "dynamic_neuron forward"
    _require(op, layout_problem(y, x, neurons, index))
    _require(op, _row_problem("out", out))
    extension = _extension_on(op, y.device)
    with torch.cuda.device(y.device):
        code = extension.dynamic_neuron_forward(
            _rows(out),
            _rows(y),
            _rows(x),
            _neurons(neurons),
            index.data_ptr(),
            _shape(x, neurons),
            _stream(y.device),
        )
    _raise_on_error(op, code, y=y, x=x, key=neurons.key, value=neurons.value)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # it cannot see a write through a pointer


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def dynamic_neuron_backward(
    grad: Tensor, x: Tensor, neurons: Neurons, index: Tensor, needs: Sequence[bool]
) -> Gradients:
    """The gradients of `dynamic_neuron_forward` at x and the neurons; at y it is `grad` itself.

    Sums are float32 in a fixed order, without atomics: the same inputs give the same bits. Samples
    with index -1 give a zero gradient at x and none to any neuron, whatever their x and grad hold.

    Args:
        grad: the gradient at out, [B, T, d_out] or [M, d_out]; an expanded one is copied.
        x: [B, T, d_in] or [M, d_in], float32, float16 or bfloat16 like everything but index.
        neurons: N neurons with that d_in and d_out.
        index: int64 [B] or [M], each -1 or below N, which is not checked.
        needs: whether x, key, bias and value need a gradient: four of them.

    Returns:
        The gradients at x, key, bias and value; None where not needed, or without a bias.

    Raises:
        ValueError: a tensor's layout does not fit (`layout_problem`).
        RuntimeError: the extension cannot run here, or CUDA refused a launch.
    """
    op = "dynamic_neuron backward"
    grad = rows_adjacent(grad)
    _require(op, layout_problem(grad, x, neurons, index))
    extension = _extension_on(op, x.device)
    contiguous = torch.contiguous_format
    key, bias, value = neurons.key, neurons.bias, neurons.value
    dx = torch.empty_like(x, memory_format=contiguous) if needs[0] else None
    dkey = torch.empty_like(key, memory_format=contiguous) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] and bias is not None else None
    dvalue = torch.empty_like(value, memory_format=contiguous) if needs[3] else None
    scratch: tuple[Tensor | None, ...] = (None, None, None, None)
    if dkey is not None or dbias is not None or dvalue is not None:
        rows = x.shape[:-1].numel()
        hidden, dpre = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        sorted_index, order = index.sort(stable=True)
        numbers = torch.arange(len(neurons) + 1, device=x.device)
        scratch = (hidden, dpre, order, torch.searchsorted(sorted_index, numbers))
    with torch.cuda.device(x.device):
        code = extension.dynamic_neuron_backward(
            _rows(grad),
            _rows(x),
            _neurons(neurons),
            index.data_ptr(),
            _shape(x, neurons),
            _stream(x.device),
            ((0, 0, 0) if dx is None else _rows(dx), *map(_address, (dkey, dbias, dvalue))),
            tuple(map(_address, scratch)),
        )
    _raise_on_error(op, code, grad=grad, x=x, key=key, value=value)
    return dx, dkey, dbias, dvalue


def softmax_entropy(logits: Tensor) -> Tensor:
    """The entropy of each row's softmax, in nats.

    Args:
        logits: [B, C] float32, float16 or bfloat16.

    Returns:
        float32 [B].

    Raises:
        ValueError: the layout of logits does not fit.
        RuntimeError: the extension cannot run here, or CUDA refused the launch.
    """
    op = "softmax_entropy"
    _require(op, _row_problem("logits", logits))
    extension = _extension_on(op, logits.device)
    entropy = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        code = extension.softmax_entropy(
            _matrix(logits),
            (*logits.shape, DTYPES.index(logits.dtype)),
            entropy.data_ptr(),
            _stream(logits.device),
        )
    _raise_on_error(op, code, logits=logits)
    return entropy


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    """The struct Rows of csrc/types.h: [B, T, d], or [M, d] as M samples of one token."""
    token_stride = tensor.stride(1) if tensor.dim() == 3 else 0
    return tensor.data_ptr(), tensor.stride(0), token_stride


def _matrix(tensor: Tensor) -> tuple[int, int]:
    """The struct Matrix of csrc/types.h."""
    return tensor.data_ptr(), tensor.stride(0)


def _neurons(neurons: Neurons) -> tuple:
    """The struct Neurons of csrc/dynamic_neuron.h."""
    activation = ACTIVATIONS.index(neurons.activation)
    return _matrix(neurons.key), _address(neurons.bias), _matrix(neurons.value), activation


def _shape(x: Tensor, neurons: Neurons) -> tuple[int, ...]:
    """The struct DynamicNeuronShape of csrc/dynamic_neuron.h."""
    tokens = x.shape[1] if x.dim() == 3 else 1
    widths = x.shape[-1], neurons.value.shape[-1]
    return x.shape[0], tokens, len(neurons), *widths, DTYPES.index(x.dtype)


def _stream(device: torch.device) -> tuple[int, int]:
    """The struct Stream of csrc/types.h: the device's current one."""
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
