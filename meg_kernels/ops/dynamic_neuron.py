"""The dynamic neuron: every sample of a batch gets its own extra FFN neuron, or none.

    y[m] += act(x[m] . key[i] + bias[i]) * value[i]        i = index[m]

x [B, T, d_in] with index [B] (one neuron per sample, at each of its T tokens), or x [M, d_in]
with index [M] (one per token). Index -1 leaves the row bit-untouched. Products are accumulated
in float32 (float64 for float64 inputs), whatever the dtype. A row's result depends on nothing else
in the batch. Source: MeG, equation 3.

Rounding, on every backend: with u = 2^-23, S = sum |x_j key_j| + |bias| and h = act(pre),

    |out - exact| <= E + eps (|exact| + E) + tiny      E = |value| e + 4u (|h value| + |y|)
    e = 1.13 (d_in + 5) u S + 8u |pre|

with eps and tiny, the least normal number (in float16 the least of all), of the dtype. That holds
where h, h * value and the result are within float32's range and the dtype's. The sum of x . key
need not be so on the way. Above the range the result is infinite or NaN; below it gelu, silu and
relu add 0. NaN and infinity in a row's arguments come out as the definition in float64 has them.

Reading order: the reference; the CPU path; which backend runs; the ops as PyTorch knows them
(`torch.ops.meg_kernels.*`); their gradient; the public functions.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meg_kernels.arguments import check_floating, check_instance, check_tensors, check_written
from meg_kernels.kernels.launching import rows_adjacent
from meg_kernels.kernels.limits import DTYPES
from meg_kernels.neuron import ACTIVATIONS, FORMULAS, SATURATED, Neurons
from meg_kernels.ops import native
from meg_kernels.ops.backend import backend, choose, forced_backend
from meg_kernels.scoped import is_traced

# Triton's kernels take float64 too, so that gradcheck can be run on them.
SUPPORTED = {
    "cuda": DTYPES,
    "triton": (*DTYPES, torch.float64),
    "cpu": None,
    "reference": None,
}


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
    pre = _reference_sums(x, key)  # pre-activations, [B, T] or [M]
    if used.bias is not None:
        pre = pre + used.bias.masked_fill(index < 0, 0).view(spread)
    hidden = ACTIVATIONS[used.activation](pre)
    added = torch.einsum("b...,bd->b...d", hidden, used.value)  # [B, T, d_out] or [M, d_out]
    return torch.where(unedited, y, (y.to(accumulate) + added).to(y.dtype))


def _reference_sums(x: Tensor, key: Tensor) -> Tensor:
    """[B, T] or [M]: each x . key, of whatever size its products are."""
    sums = torch.einsum("b...d,bd->b...", x, key)
    # Where they overflow on the way, they are added up once more, scaled by a power of two.
    down = 2.0 ** (-80 if sums.dtype == torch.float32 else -640)
    scaled = torch.einsum("b...d,bd->b...", x * down, key * down)
    return torch.where(sums.isfinite(), sums, scaled / down / down)


def _saturating(backward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`backward`, with the slopes 0 and 1 where its formula has none."""
    return lambda gradient, a: backward(gradient, a.clamp(-SATURATED, SATURATED))


_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (gradient, pre-activation)
    "identity": lambda gradient, a: gradient,
    "gelu": _saturating(torch.ops.aten.gelu_backward),
    "gelu_tanh": _saturating(functools.partial(torch.ops.aten.gelu_backward, approximate="tanh")),
    "silu": _saturating(torch.ops.aten.silu_backward),
    "relu": functools.partial(torch.ops.aten.threshold_backward, threshold=0),
}


def _sums(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Each a . b along the last axis, of whatever size its products are, and the largest of them.

    Not a matrix product: its order of summation would depend on the batch. Sums that overflow on
    the way are added up once more, in float64.
    """
    sums = (a * b).sum(-1)
    largest = float(torch.linalg.vector_norm(sums, math.inf)) if sums.numel() else 0.0
    if sums.dtype == torch.float32 and not math.isfinite(largest):
        again = ~sums.isfinite()
        a, b = (part.expand(*sums.shape, -1)[again].double() for part in (a, b))
        sums[again] = (a * b).sum(-1).float()
    return sums, largest


class _EditedRows:
    """The rows of a batch that have a neuron, with their neurons, in the accumulation dtype.

    On a CPU the index can be read: rows without a neuron cost nothing.
    """

    def __init__(self, x: Tensor, neurons: Neurons, index: Tensor, *others: torch.dtype):
        self.rows = (index >= 0).nonzero()[:, 0]  # [R]
        self.all = len(self.rows) == len(index)
        dtype = functools.reduce(torch.promote_types, others, x.dtype)
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.neuron = index if self.all else index[self.rows]  # [R]
        used = neurons[self.neuron].to(self.dtype)
        self.x = self.of(x)  # [R, d_in] or [R, T, d_in]
        self.key, self.value = (self._spread(part, x.dim()) for part in (used.key, used.value))
        pre, largest = _sums(self.x, self.key)  # pre-activations, [R] or [R, T]
        if used.bias is not None:
            pre = pre + self._spread(used.bias, x.dim() - 1)
            largest = float(torch.linalg.vector_norm(pre, math.inf)) if pre.numel() else 0.0
        self.saturates = not largest <= SATURATED
        self.pre, self.activation = pre, used.activation

    def of(self, tensor: Tensor) -> Tensor:
        return (tensor if self.all else tensor[self.rows]).to(self.dtype)

    @staticmethod
    def _spread(part: Tensor, dim: int) -> Tensor:
        """[R, ...] beside [R, T, ...] if there is a T."""
        return part if part.dim() == dim else part.unsqueeze(1)

    def hidden(self) -> Tensor:
        formulas = ACTIVATIONS if self.saturates else FORMULAS
        return formulas[self.activation](self.pre)


_IN_CACHE = 2**18  # numbers that a CPU's caches hold: more are worked on in blocks of samples


def _cpu_forward(out: Tensor, y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> None:
    if out is not y:
        out.copy_(y)
    samples = max(_IN_CACHE // max(x[0].numel(), y[0].numel()), 1)
    for start in range(0, len(index), samples):
        block = slice(start, start + samples)
        _cpu_forward_block(out[block], x[block], neurons, index[block])


def _cpu_forward_block(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> None:
    edited = _EditedRows(x, neurons, index, y.dtype)
    if not len(edited.rows):
        return
    changed = torch.addcmul(edited.of(y), edited.hidden().unsqueeze(-1), edited.value)
    if edited.all:
        y.copy_(changed)
    else:
        y[edited.rows] = changed.to(y.dtype)


def _eager_backward(
    grad: Tensor, x: Tensor, neurons: Neurons, index: Tensor, needs: Sequence[bool]
) -> native.Gradients:
    edited = _EditedRows(x, neurons, index, grad.dtype)
    upstream = edited.of(grad)  # [R, (T,) d_out]
    dhidden, _ = _sums(upstream, edited.value)  # [R, (T)]
    dpre = _DERIVATIVES[neurons.activation](dhidden, edited.pre).unsqueeze(-1)  # [R, (T,) 1]

    def of_neurons(like: Tensor, rows: Tensor) -> Tensor:
        """Sum [R, (T,) d] over the tokens and rows of each neuron."""
        rows = rows.sum(1) if x.dim() == 3 else rows
        total = torch.zeros(like.shape, dtype=edited.dtype, device=like.device)
        return total.index_add_(0, edited.neuron, rows.view(-1, *like.shape[1:])).to(like.dtype)

    dx = None
    if needs[0]:
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        dx[edited.rows] = (dpre * edited.key).to(x.dtype)
    key, bias, value = neurons.key, neurons.bias, neurons.value
    return (
        dx,
        of_neurons(key, dpre * edited.x) if needs[1] else None,
        of_neurons(bias, dpre) if needs[2] and bias is not None else None,
        of_neurons(value, edited.hidden().unsqueeze(-1) * upstream) if needs[3] else None,
    )


def _reference_forward(out: Tensor, y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> None:
    out.copy_(dynamic_neuron_reference(y, x, neurons, index))


def _implementation(chosen: str) -> tuple[Callable[..., None], Callable[..., native.Gradients]]:
    """(forward, backward) of a backend."""
    if chosen == "cuda":
        return native.dynamic_neuron_forward, native.dynamic_neuron_backward
    if chosen == "triton":
        from meg_kernels.kernels import dynamic_neuron as triton_kernels

        return triton_kernels.forward, triton_kernels.backward
    if chosen == "cpu":
        return _cpu_forward, _eager_backward
    # Autograd does not reach into a registered op: the formula stands in for the reference's.
    return _reference_forward, _eager_backward


def _is_empty(x: Tensor, neurons: Neurons) -> bool:
    """Whether there are no tokens, no neurons or no width: kernels need not know that."""
    return x.numel() == 0 or neurons.value.numel() == 0


def _as_kernels_read(key: Tensor, bias: Tensor | None, value: Tensor, activation: str) -> Neurons:
    """The neurons, copied where the elements of their rows are not adjacent."""
    bias = None if bias is None else bias.contiguous()
    return Neurons.trusted(rows_adjacent(key), bias, rows_adjacent(value), activation)


def _forward_into(out: Tensor, y: Tensor, x: Tensor, neurons: Neurons, index: Tensor) -> None:
    """Write y plus each row's neuron into `out`, which may be y."""
    if _is_empty(x, neurons):
        _reference_forward(out, y, x, neurons, index)
        return
    dtypes = (y.dtype, x.dtype, neurons.dtype)
    run, _ = _implementation(choose("dynamic_neuron", x.device, *dtypes, supported=SUPPORTED))
    target = rows_adjacent(out)
    y = target if out is y else rows_adjacent(y)
    with torch.autocast(x.device.type, enabled=False):
        run(target, y, rows_adjacent(x), neurons, index.contiguous())
    if target is not out:
        out.copy_(target)


_LIBRARY = torch.library.Library("meg_kernels", "DEF")
_NEURONS = "Tensor key, Tensor? bias, Tensor value, Tensor index, str activation"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"dynamic_neuron(Tensor y, Tensor x, {_NEURONS}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"dynamic_neuron_(Tensor(a!) y, Tensor x, {_NEURONS}) -> ()", tags=_TAGS)
_LIBRARY.define(
    f"dynamic_neuron_backward(Tensor grad, Tensor x, {_NEURONS}, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl(_LIBRARY, "dynamic_neuron", "CompositeExplicitAutograd")
def _dynamic_neuron(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    activation: str,
) -> Tensor:
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    _forward_into(out, y, x, _as_kernels_read(key, bias, value, activation), index)
    return out


@torch.library.impl(_LIBRARY, "dynamic_neuron_", "CompositeExplicitAutograd")
def _dynamic_neuron_(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    activation: str,
) -> None:
    memory = y.untyped_storage().data_ptr()

    def apart(read: Tensor) -> Tensor:
        """Copied if writing to y may change it."""
        return read.clone() if read.untyped_storage().data_ptr() == memory else read

    neurons = _as_kernels_read(
        apart(key), None if bias is None else apart(bias), apart(value), activation
    )
    _forward_into(y, y, apart(x), neurons, apart(index))


@torch.library.impl(_LIBRARY, "dynamic_neuron_backward", "CompositeExplicitAutograd")
def _dynamic_neuron_backward(
    grad: Tensor,
    x: Tensor,
    key: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    neurons = _as_kernels_read(key, bias, value, activation)
    if _is_empty(x, neurons):
        gradients: tuple[Tensor | None, ...] = tuple(
            None if part is None else torch.zeros(part.shape, dtype=part.dtype, device=x.device)
            for part in (x, key, bias, value)
        )
    else:
        dtypes = (grad.dtype, x.dtype, key.dtype)
        _, run = _implementation(choose("dynamic_neuron", x.device, *dtypes, supported=SUPPORTED))
        with torch.autocast(x.device.type, enabled=False):
            gradients = run(
                rows_adjacent(grad), rows_adjacent(x), neurons, index.contiguous(), needs
            )
    return tuple(
        found.contiguous() if found is not None and need else x.new_empty(0)
        for found, need in zip(gradients, needs, strict=True)
    )


@torch.library.register_fake("meg_kernels::dynamic_neuron", lib=_LIBRARY)
def _(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@torch.library.register_fake("meg_kernels::dynamic_neuron_", lib=_LIBRARY)
def _(y: Tensor, x: Tensor, *rest: Any) -> None:
    return None


@torch.library.register_fake("meg_kernels::dynamic_neuron_backward", lib=_LIBRARY)
def _(
    grad: Tensor,
    x: Tensor,
    key: Tensor,
    bias: Tensor | None,
    value: Tensor,
    index: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(part.shape, dtype=part.dtype, device=part.device)
        if part is not None and need
        else x.new_empty(0)
        for part, need in zip((x, key, bias, value), needs, strict=True)
    )


class _Differentiable(torch.autograd.Function):
    """The op with its gradient; outside the op, where it costs nothing without gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, *rest[:-1])
        ctx.activation = rest[-1]
        # Autograd works on a GPU's tensors in a thread of its own, which does not see the context.
        ctx.backend = None if is_traced() else forced_backend()
        return torch.ops.meg_kernels.dynamic_neuron(y, x, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dynamic_neuron has no second derivative; differentiate without create_graph=True"
            )
        x, key, bias, value, index = ctx.saved_tensors
        of_y, of_x, of_key, of_bias, of_value = ctx.needs_input_grad[:5]
        needs = [of_x, of_key, of_bias and bias is not None, of_value]
        with contextlib.nullcontext() if ctx.backend is None else backend(ctx.backend):
            found = torch.ops.meg_kernels.dynamic_neuron_backward(
                grad, x, key, bias, value, index, ctx.activation, needs
            )
        wanted = [part if need else None for part, need in zip(found, needs, strict=True)]
        return (grad if of_y else None, *wanted, None, None)


def check_index(index: Tensor, neurons: Neurons) -> None:
    """Raise unless `index` is an int64 vector of neuron numbers, -1 for none.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another dtype or shape, or (on the CPU) holds no neuron's number.
    """
    check_tensors(index=index)
    if index.dim() != 1 or index.dtype != torch.int64:
        number = "index.long() makes one of whole numbers"
        mask = "for a mask, torch.where(mask, numbers, -1) does"
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; it must be an int64 vector of neuron "
            f"numbers (-1 for none): {mask if index.dtype == torch.bool else number}"
        )
    # On a GPU reading the index would make the host wait; there the caller's word is taken,
    # and a compiler that traces the op has no values yet.
    if index.device.type == "cpu" and len(index) and not is_traced():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= len(neurons):
            raise ValueError(
                f"index holds values from {low} to {high}; with {len(neurons)} neurons they must "
                f"be from -1 (none) to {len(neurons) - 1}"
            )


def _check(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor | None) -> Tensor:
    """Raise unless the arguments fit; the index, which is 0, 1, ... where it is left out."""
    check_instance(
        "neurons", neurons, Neurons, "Neurons(key, bias, value, activation) makes one of tensors"
    )
    check_floating(y=y, x=x)
    d_in, d_out = neurons.key.shape[1], neurons.value.shape[1]
    if x.dim() not in (2, 3) or x.shape[-1] != d_in:
        raise ValueError(f"x is {tuple(x.shape)}; it must be [B, T, {d_in}] or [M, {d_in}]")
    expected = (*x.shape[:-1], d_out)
    if tuple(y.shape) != expected:
        raise ValueError(f"y is {tuple(y.shape)}; beside x {tuple(x.shape)} it must be {expected}")
    if index is None:
        index = _default_index(x, neurons)
    if isinstance(index, Tensor) and index.shape != x.shape[:1]:
        raise ValueError(
            f"index is {tuple(index.shape)}; it must be [{x.shape[0]}], one neuron number "
            "(or -1 for none) for each row of x"
        )
    check_index(index, neurons)
    if not len({x.device, y.device, index.device, neurons.device}) == 1:
        raise ValueError(
            f"x is on {x.device}, y on {y.device}, index on {index.device} and the neurons on "
            f"{neurons.device}; they must share one device: move them with .to()"
        )
    return index


def _default_index(x: Tensor, neurons: Neurons) -> Tensor:
    if len(neurons) != x.shape[0]:
        raise ValueError(
            f"x has {x.shape[0]} rows and there are {len(neurons)} neurons; "
            "pass index to say which row gets which"
        )
    return torch.arange(len(neurons), device=x.device)


def dynamic_neuron(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor | None = None) -> Tensor:
    """Add each row's own neuron to y out of place; differentiable once in y, x and the neurons.

    Args:
        y: the layer's output, [B, T, d_out] or [M, d_out].
        x: what the key reads, [B, T, d_in] or [M, d_in].
        neurons: N neurons with that d_in and d_out.
        index: int64 [B] or [M]: the row's neuron, -1 for none. Default: row m has neuron m.

    Returns:
        A contiguous tensor like y. Rows with index -1 hold the bits of y. With u = 2^-23 the others
        err by at most E + eps (|y| + E) + tiny, E = |value| (1.13 (d_in + 5) u S + 8u |pre|) + 4u
        (|h value| + |y|), S = sum |x_j key_j| + |bias|, where h = act(pre) and h * value are
        within float32's range.

    Raises:
        TypeError: an argument is no tensor, or neurons no `Neurons`.
        ValueError: shapes, dtypes, devices or (on the CPU) index values do not fit.
        RuntimeError: the backend that is forced (`meg_kernels.ops.backend`) cannot run.
    """
    index = _check(y, x, neurons, index)
    arguments = (y, x, *_parts(neurons), index, neurons.activation)
    if _wants_gradient(y, x, neurons):
        return _Differentiable.apply(*arguments)
    return torch.ops.meg_kernels.dynamic_neuron(*arguments)


def dynamic_neuron_(y: Tensor, x: Tensor, neurons: Neurons, index: Tensor | None = None) -> Tensor:
    """Add each row's own neuron to y in place; differentiable once in y, x and the neurons.

    Args:
        y: the layer's output, [B, T, d_out] or [M, d_out]; it is changed. Others may lie in its
            memory: what they held before the call counts.
        x: what the key reads, [B, T, d_in] or [M, d_in].
        neurons: N neurons with that d_in and d_out.
        index: int64 [B] or [M]: the row's neuron, -1 for none. Default: row m has neuron m.

    Returns:
        y itself. Rows with index -1 are not touched.

    Raises:
        TypeError: an argument is no tensor, or neurons no `Neurons`.
        ValueError: shapes, dtypes, devices or (on the CPU) index values do not fit, or elements of
            y share their memory.
        RuntimeError: y is a leaf that requires a gradient, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.
    """
    index = _check(y, x, neurons, index)
    check_written("y", y)
    if _wants_gradient(y, x, neurons):
        if y.is_leaf and y.requires_grad:
            raise RuntimeError(
                "y is a leaf that requires a gradient, which cannot be changed in place; use "
                "dynamic_neuron, which leaves it as it is"
            )
        return y.copy_(dynamic_neuron(y, x, neurons, index))
    torch.ops.meg_kernels.dynamic_neuron_(y, x, *_parts(neurons), index, neurons.activation)
    return y


def _wants_gradient(y: Tensor, x: Tensor, neurons: Neurons) -> bool:
    parts = (y, x, *_parts(neurons))
    return torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in parts
    )


def _parts(neurons: Neurons) -> tuple[Tensor, Tensor | None, Tensor]:
    return neurons.key, neurons.bias, neurons.value
