"""`MeGLinear`: a `torch.nn.Linear` whose output carries each sample's own neuron.

As an FFN's output projection it turns the FFN into the paper's widened one: the key reads the
FFN's input (`source`), the value writes the FFN's output, and the projection's weights stay as
they are, in the storage they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meg_kernels.neuron import Neurons
from meg_kernels.ops import dynamic_neuron, dynamic_neuron_
from meg_kernels.ops.dynamic_neuron import check_index


class CarriesNeurons:
    """What makes a projection carry neurons; mixed into the projection's own class."""

    _neurons: Neurons | None = None
    _index: Tensor | None = None
    _source: Tensor | None = None

    def mount(self, neurons: Neurons, index: Tensor | None = None) -> None:
        """Carry `neurons` from now on.

        Args:
            neurons: N neurons; they are brought to the weight's device and dtype.
            index: int64 [B]: the neuron of each sample of the batch, -1 for none.
                Default: sample b has neuron b.

        Raises:
            ValueError: index is not int64 [B] or (on the CPU) holds a number that is no neuron's.
        """
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        if index is None:
            index = torch.arange(len(neurons))
        check_index(index, neurons)  # here, where it is usually on the CPU and can be read
        # Contiguous: flat vectors' views start where no 16-byte load may.
        neurons = neurons.to(weight.device, weight.dtype).contiguous()
        index = index.to(weight.device).contiguous()
        self._neurons, self._index, self._source = neurons, index, None

    def unmount(self) -> None:
        """Be the plain projection again."""
        self._neurons = self._index = self._source = None

    @contextmanager
    def mounted(self, neurons: Neurons, index: Tensor | None = None) -> Iterator[None]:
        """`mount` for the length of a `with` block."""
        self.mount(neurons, index)
        try:
            yield
        finally:
            self.unmount()

    def project(self, x: Tensor) -> Tensor:
        """The projection alone."""
        return super().forward(x)  # type: ignore[misc]

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """The projection of x, plus the mounted neurons.

        Args:
            x: [B, T, in_features], or [M, in_features] with M a multiple of the samples B.
            source: what the keys read, x's shape but for its width; default x itself.
        """
        y = self.project(x)
        if self._neurons is None or self._index is None:
            return y
        if source is None:
            source, self._source = (x if self._source is None else self._source), None
        samples = len(self._index)
        if samples == 0 or source[..., 0].numel() % samples or y.shape[:-1] != source.shape[:-1]:
            raise ValueError(
                f"{samples} samples have neurons mounted, but the layer was called with x "
                f"{tuple(x.shape)} and source {tuple(source.shape)}; give each sample of the batch "
                "one index (-1 for none)"
            )
        if source.dim() > 2 and source.shape[0] != samples:
            raise ValueError(
                f"{samples} samples have neurons mounted, but the batch has {source.shape[0]}; "
                "give each sample of the batch one index (-1 for none)"
            )
        # OPT flattens its tokens to [B * T, d]; [B, T, d] is their other view.
        tokens = source.reshape(samples, -1, source.shape[-1])
        output = y.reshape(samples, -1, y.shape[-1])
        op = dynamic_neuron if torch.is_grad_enabled() else dynamic_neuron_
        return op(output, tokens, self._neurons, self._index).view(y.shape)


class MeGLinear(CarriesNeurons, nn.Linear):
    """A drop-in `torch.nn.Linear` that carries neurons.

    Constructor, parameters and state_dict keys are those of `torch.nn.Linear`; without mounted
    neurons its output is too, bit for bit.

    >>> layer = MeGLinear(3, 4)
    >>> neurons = Neurons(torch.ones(1, 3), None, torch.ones(1, 4))
    >>> x = torch.ones(2, 5, 3)
    >>> with layer.mounted(neurons, index=torch.tensor([0, -1])):
    ...     y = layer(x)
    >>> bool((y[0] - layer(x)[0] - 3).abs().max() < 1e-5), torch.equal(y[1], layer(x)[1])
    (True, True)
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MeGLinear:
        """A MeGLinear over the very parameters of `linear`: storage is shared, nothing copied."""
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"from_linear takes a torch.nn.Linear, got {type(linear).__name__}; quantised or "
                "adapter-wrapped projections are not supported: load the model without them"
            )
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)


class MeGConv1D(CarriesNeurons, Conv1D):
    """The same over transformers' `Conv1D`, GPT-2's transposed Linear (weight [in, out])."""

    @classmethod
    def from_conv1d(cls, conv: Conv1D) -> MeGConv1D:
        """A MeGConv1D over the very parameters of `conv`: storage is shared, nothing copied."""
        if type(conv) is not Conv1D:
            raise TypeError(
                f"from_conv1d takes a transformers Conv1D, got {type(conv).__name__}; quantised or "
                "adapter-wrapped projections are not supported: load the model without them"
            )
        with torch.device("meta"):
            layer = cls(conv.nf, conv.nx)
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)
