"""The dynamic neuron: the one value that collection, generation, storage and serving pass on.

A neuron (paper, section 3.1) widens one feed-forward layer by one hidden unit:

    FFN'(x) = FFN(x) + act(x . key + bias) * value

`Neurons` holds N of them; `NeuronLayout` packs them into the flat vectors w = (key, bias, value)
that the weight generators learn, and back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meg_kernels.arguments import check_floating, check_instance, check_tensors
from meg_kernels.checks import FLAG, as_integer, check_fields, integer, shown

SATURATED = 1024.0
"""From here on gelu and silu are what they tend to, in every dtype: x above it, 0 below its minus.

Their formulas have no values there: they multiply infinity by 0, and square or cube what they get.
"""
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
"""The activations from -SATURATED to SATURATED."""


def _saturating(formula: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`formula`, with the values and slopes that it tends to beyond its range."""
    return lambda x: torch.where(x > SATURATED, x, formula(x.clamp(-SATURATED, SATURATED)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: formula if name in ("identity", "relu") else _saturating(formula)
    for name, formula in FORMULAS.items()
}
"""The activations, of numbers of any size."""


def _check_activation(activation: object) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {shown(activation)}; it must be one of {', '.join(ACTIVATIONS)}"
        )


@dataclass(frozen=True)
class NeuronLayout:
    """Where key, bias and value stand in a flat neuron vector: `[key | bias | value]`.

    Args:
        d_in: width of the FFN's input, which the key reads.
        d_out: width of the FFN's output, which the value writes.
        has_bias: whether a neuron has a bias (FFNs of Phi, GPT-J, GPT-2, GPT-NeoX, OPT do;
            the gated FFNs of Llama, Mistral, Qwen and Gemma do not).
        activation: `identity`, `gelu` (erf), `gelu_tanh`, `silu` or `relu`.

    Raises:
        ValueError: a width is not in 1 to 2**24, or the activation is unknown.
    """

    d_in: int
    d_out: int
    has_bias: bool
    activation: str

    def __post_init__(self) -> None:
        _check_activation(self.activation)
        width = integer(1, 2**24)
        check_fields(self, d_in=width, d_out=width, has_bias=FLAG)

    @property
    def dim(self) -> int:
        """Length of one flat neuron vector."""
        return self.d_in + self.has_bias + self.d_out

    def pack(self, neurons: Neurons) -> Tensor:
        """Flat vectors [N, dim] of `neurons`, copied.

        Args:
            neurons: N neurons of this layout.

        Raises:
            ValueError: their layout is another.
            TypeError: they are no `Neurons`.
        """
        check_instance("neurons", neurons, Neurons, _HOW)
        if neurons.layout != self:
            raise ValueError(f"neurons have {neurons.layout}, but {self} was expected")
        parts = [neurons.key, neurons.value]
        if neurons.bias is not None:
            parts.insert(1, neurons.bias.unsqueeze(1))
        return torch.cat(parts, dim=1)

    def unpack(self, flat: Tensor) -> Neurons:
        """The neurons that flat vectors hold, as views: no copy is made.

        Args:
            flat: [N, dim], any floating dtype.

        Raises:
            ValueError: `flat` has another shape, or no floating dtype.
            TypeError: it is no tensor.
        """
        check_floating(flat=flat)
        if flat.dim() != 2 or flat.shape[1] != self.dim:
            raise ValueError(f"flat is {tuple(flat.shape)}; it must be [N, {self.dim}]")
        key, rest = flat[:, : self.d_in], flat[:, self.d_in :]
        bias = rest[:, 0] if self.has_bias else None
        return Neurons(key, bias, rest[:, int(self.has_bias) :], self.activation)


_HOW = "Neurons(key, bias, value, activation) makes one of tensors"


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Neurons:
    """N neurons of one feed-forward layer; all their tensors share one dtype and device.

    Args:
        key: [N, d_in]; float32, float16, bfloat16 or float64 like the others.
        bias: [N], or None for neurons without one.
        value: [N, d_out].
        activation: `identity`, `gelu` (erf), `gelu_tanh`, `silu` or `relu`.

    Raises:
        TypeError: one of them is no tensor.
        ValueError: shapes, dtypes or devices do not fit together, or the activation is unknown.

    >>> neurons = Neurons(key=torch.ones(2, 3), bias=None, value=torch.zeros(2, 4))
    >>> neurons
    Neurons(n=2, d_in=3, d_out=4, no bias, identity, float32, cpu)
    >>> neurons.layout.dim
    7
    """

    key: Tensor
    bias: Tensor | None
    value: Tensor
    activation: str = "identity"

    def __post_init__(self) -> None:
        _check_activation(self.activation)
        check_tensors(**self._tensors())
        n = self.key.shape[0] if self.key.dim() else 0
        if self.key.dim() != 2:
            raise ValueError(f"key is {tuple(self.key.shape)}; it must be [N, d_in]")
        if self.value.dim() != 2 or self.value.shape[0] != n:
            raise ValueError(f"value is {tuple(self.value.shape)}; it must be [{n}, d_out]")
        if self.bias is not None and self.bias.shape != (n,):
            raise ValueError(f"bias is {tuple(self.bias.shape)}; it must be [{n}] or None")
        for name, width in (("key", self.key.shape[1]), ("value", self.value.shape[1])):
            if width < 1:
                shape = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} is {shape}; its rows must have at least one element")
        check_floating(**self._tensors())
        for name, tensor in self._tensors().items():
            if tensor.dtype != self.key.dtype or tensor.device != self.key.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, but key is "
                    f"{self.key.dtype} on {self.key.device}; bring them together with .to()"
                )

    def _tensors(self) -> dict[str, Tensor]:
        named = {"key": self.key, "bias": self.bias, "value": self.value}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __repr__(self) -> str:
        """Everything but the numbers."""
        layout, dtype = self.layout, str(self.dtype).removeprefix("torch.")
        bias = "bias" if layout.has_bias else "no bias"
        return (
            f"Neurons(n={len(self)}, d_in={layout.d_in}, d_out={layout.d_out}, {bias}, "
            f"{self.activation}, {dtype}, {self.device})"
        )

    def __len__(self) -> int:
        """N."""
        return self.key.shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Neurons:
        """The neurons of these rows; an int would drop the row axis: use `[i : i + 1]`."""
        if isinstance(rows, list | tuple | range):
            # A list of bools would pick neurons 0 and 1, where a mask was meant.
            with contextlib.suppress(TypeError):
                rows = [as_integer(row) for row in rows]
        if isinstance(rows, list) and all(type(row) is int for row in rows):
            beyond = [row for row in rows if not -len(self) <= row < len(self)]
            if beyond:
                raise IndexError(f"there is no neuron {beyond[0]}; there are {len(self)}")
        elif not isinstance(rows, slice) and not (isinstance(rows, Tensor) and rows.dim() == 1):
            raise TypeError(
                f"rows is {rows!r}; index Neurons with a slice, a list of integers or a tensor of "
                "one axis, so that N stays an axis"
            )
        elif isinstance(rows, Tensor) and rows.dtype not in (torch.int64, torch.int32, torch.bool):
            raise TypeError(
                f"rows is {rows.dtype}; index Neurons with integers or a mask: call rows.long()"
            )
        return self._map(lambda tensor: tensor[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Neurons:
        """What `change` makes of every tensor; they fit together as these did, unchecked."""
        bias = None if self.bias is None else change(self.bias)
        return Neurons.trusted(change(self.key), bias, change(self.value), self.activation)

    @classmethod
    def trusted(cls, key: Tensor, bias: Tensor | None, value: Tensor, activation: str) -> Neurons:
        """`Neurons(...)` of what was checked before."""
        neurons = object.__new__(cls)
        parts = {"key": key, "bias": bias, "value": value, "activation": activation}
        neurons.__dict__.update(parts)
        return neurons

    @property
    def layout(self) -> NeuronLayout:
        """Widths, bias and activation, which neurons of one layer have in common."""
        return NeuronLayout(
            self.key.shape[1], self.value.shape[1], self.bias is not None, self.activation
        )

    @property
    def device(self) -> torch.device:
        """The device of all their tensors."""
        return self.key.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all their tensors."""
        return self.key.dtype

    def to(self, *args, **kwargs) -> Neurons:
        """These neurons on another device or in another dtype; takes what `Tensor.to` takes."""
        moved = self._map(lambda tensor: tensor.to(*args, **kwargs))
        check_floating(**moved._tensors())
        return moved

    def contiguous(self) -> Neurons:
        """These neurons, copied where they are views of something wider."""
        return self._map(Tensor.contiguous)

    def detach(self) -> Neurons:
        """These neurons outside any autograd graph."""
        return self._map(Tensor.detach)

    def is_finite(self) -> Tensor:
        """[N] bool: which neurons hold no NaN and no infinity."""
        finite = self.key.isfinite().all(1) & self.value.isfinite().all(1)
        return finite if self.bias is None else finite & self.bias.isfinite()

    @staticmethod
    def cat(parts: Sequence[Neurons]) -> Neurons:
        """All the parts' neurons as one `Neurons`, in order.

        Args:
            parts: at least one, all of one layout.

        Raises:
            TypeError: one of them is no `Neurons`.
            ValueError: there are none, or their layouts differ.
        """
        if not isinstance(parts, list | tuple):
            what = f"parts is a {type(parts).__name__}; it must be a list of Neurons"
            raise TypeError(f"{what}: use [parts]" if isinstance(parts, Neurons) else what)
        if not parts:
            raise ValueError("there are no neurons to concatenate; give a list of at least one")
        for number, part in enumerate(parts):
            check_instance(f"part {number}", part, Neurons, _HOW)
        layout = parts[0].layout
        return layout.unpack(torch.cat([layout.pack(part) for part in parts]))
