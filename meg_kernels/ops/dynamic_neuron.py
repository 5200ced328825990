"""The dynamic neuron: every sample of a batch gets its own extra FFN neuron, or none.

    y[m] += act(x[m] . key[i] + bias[i]) * value[i]        i = index[m]

x [B, T, d_in] with index [B] (one neuron per sample, at each of its T tokens), or x [M, d_in]
with index [M] (one per token). Index -1 leaves the row bit-untouched. Products are accumulated
in float32 (float64 for float64 inputs), whatever the dtype. Source: MeG, equation 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meg_kernels.neuron import ACTIVATIONS, Neurons
from meg_kernels.ops import native


def dynamic_neuron_reference(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable in y, x and the neurons."""
    with torch.autocast(x.device.type, enabled=False):  # it would accumulate in bfloat16
        return _reference(y, x, neurons, index)


def _reference(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> Tensor:
    if len(neurons) == 0:  # then every index is -1
        return y.clone()
    accumulate = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    used = neurons[index.clamp(min=0)].to(accumulate)
    spread = (len(index),) + (1,) * (x.dim() - 2)  # [B, 1] beside [B, T], or [M] beside [M]
    unedited = (index < 0).view(*spread, 1)
    # A row without a neuron computes with zeros: where() alone keeps a NaN in its x, or in a neuron
    # that is not its own, out of the result but not out of the gradients, where 0 * NaN is NaN.
    x = x.to(accumulate).masked_fill(unedited, 0)
    key = used.key.masked_fill((index < 0)[:, None], 0)
    before = torch.einsum("b...d,bd->b...", x, key)  # [B, T] or [M]
    if used.bias is not None:
        before = before + used.bias.masked_fill(index < 0, 0).view(spread)
    hidden = ACTIVATIONS[used.activation](before)
    added = torch.einsum("b...,bd->b...d", hidden, used.value)  # [B, T, d_out] or [M, d_out]
    return torch.where(unedited, y, (y.to(accumulate) + added).to(y.dtype))


def check_index(index: Tensor, neurons: Neurons) -> None:
    """ValueError unless `index` is an int64 vector of neuron numbers, -1 for none."""
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; it must be an int64 vector of neuron "
            "numbers (-1 for none)"
        )
    # On a GPU reading the index would make the host wait; there the caller's word is taken.
    if index.device.type == "cpu" and len(index):
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= len(neurons):
            raise ValueError(
                f"index holds values from {low} to {high}; with {len(neurons)} neurons they must "
                f"be from -1 (none) to {len(neurons) - 1}"
            )


def _check(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> None:
    layout = neurons.layout
    if x.dim() not in (2, 3) or x.shape[-1] != layout.d_in:
        raise ValueError(
            f"x is {tuple(x.shape)}; it must be [B, T, {layout.d_in}] or [M, {layout.d_in}]"
        )
    expected = (*x.shape[:-1], layout.d_out)
    if tuple(y.shape) != expected:
        raise ValueError(f"y is {tuple(y.shape)}; beside x {tuple(x.shape)} it must be {expected}")
    if index.shape != x.shape[:1]:
        raise ValueError(
            f"index is {tuple(index.shape)}; it must be [{x.shape[0]}], one neuron number "
            "(or -1 for none) for each row of x"
        )
    check_index(index, neurons)
    if not len({x.device, y.device, index.device, neurons.device}) == 1:
        raise ValueError(
            f"x is on {x.device}, y on {y.device}, index on {index.device} and the neurons on "
            f"{neurons.device}; they must share one device"
        )


def _default_index(x: Tensor, neurons: Neurons) -> Tensor:
    if x.dim() and len(neurons) != x.shape[0]:
        raise ValueError(
            f"x has {x.shape[0]} rows and there are {len(neurons)} neurons; "
            "pass index to say which row gets which"
        )
    return torch.arange(len(neurons), device=x.device)


def _runs_natively(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> bool:
    """Whether the CUDA kernel may take this call: it has no backward and wants one dtype."""
    if not y.is_cuda or not native.available(y.device):
        return False
    tensors = [y, x, *(part for part in _parts(neurons) if part is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if y.dtype not in native.DTYPES or {tensor.dtype for tensor in tensors} != {y.dtype}:
        return False
    return native.layout_problem(y, x, *_parts(neurons), index) is None


def dynamic_neuron(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor | None = None) -> Tensor:
    """y plus each row's own neuron, out of place.

    Args:
        y: the layer's output, [B, T, d_out] or [M, d_out].
        x: what the key reads, [B, T, d_in] or [M, d_in].
        neurons: N neurons with that d_in and d_out.
        index: int64 [B] or [M]: the row's neuron, -1 for none. Default: row m has neuron m.

    Returns:
        A tensor like y. Rows with index -1 hold the bits of y.

    Raises:
        ValueError: shapes, dtypes, devices or (on the CPU) index values do not fit.
    """
    index = _default_index(x, neurons) if index is None else index
    _check(y, x, neurons, index)
    if _runs_natively(y, x, neurons, index):
        return native.dynamic_neuron_(y.clone(), x, *_parts(neurons), index, neurons.activation)
    return dynamic_neuron_reference(y, x, neurons, index)


def dynamic_neuron_(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor | None = None) -> Tensor:
    """`dynamic_neuron` in place: y itself is changed and returned. Arguments as there."""
    index = _default_index(x, neurons) if index is None else index
    _check(y, x, neurons, index)
    if _runs_natively(y, x, neurons, index):
        return native.dynamic_neuron_(y, x, *_parts(neurons), index, neurons.activation)
    return y.copy_(dynamic_neuron_reference(y, x, neurons, index))


def _parts(neurons: Neurons) -> tuple[Tensor, Tensor | None, Tensor]:
    return neurons.key, neurons.bias, neurons.value
