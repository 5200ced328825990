"""`MeGLinear`: a `torch.nn.Linear` whose output carries each sample's own neuron.

As an FFN's output projection it turns the FFN into the paper's widened one: the key reads the
FFN's input (`source`), the value writes the FFN's output, and the projection's weights stay as
they are, in the storage they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from meg_kernels.arguments import check_floating, check_instance
from meg_kernels.neuron import Neurons
from meg_kernels.nn.mounted import Mounted, Place


class MeGLinear(nn.Linear):
    """A drop-in `torch.nn.Linear` that carries neurons.

    Constructor, parameters and state_dict keys are those of `torch.nn.Linear`; without mounted
    neurons its output is too, bit for bit.

    >>> import torch
    >>> layer = MeGLinear(3, 4)
    >>> neurons = Neurons(torch.ones(1, 3), None, torch.ones(1, 4))
    >>> x = torch.ones(2, 5, 3)
    >>> with layer.mounted(neurons, index=[0, -1]):
    ...     y = layer(x)
    >>> bool((y[0] - layer(x)[0] - 3).abs().max() < 1e-5), torch.equal(y[1], layer(x)[1])
    (True, True)
    """

    _place: Place | None = None  # made when neurons are first mounted

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MeGLinear:
        """A MeGLinear over the very parameters of `linear`: storage is shared, nothing copied.

        Raises:
            TypeError: it is no plain Linear.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"from_linear takes a torch.nn.Linear, got {type(linear).__name__}; in a model "
                "with quantised or adapter-wrapped projections use meg_kernels.attach, which "
                "carries neurons at the whole feed-forward layer"
            )
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def mount(self, neurons: Neurons, index: Tensor | Sequence[int] | None = None) -> None:
        """Carry `neurons` from now on, in the calls of all threads.

        Args:
            neurons: N neurons with d_out = out_features, and d_in the width of what they will
                read: in_features, or that of `source`. They are brought to the weight's device
                and dtype.
            index: int64 [B]: the neuron of each sample of the batch, -1 for none.
                Default: sample b has neuron b.

        Raises:
            TypeError: neurons is no `Neurons`.
            ValueError: the neurons write another width, or index is not int64 [B] or (on the
                CPU) holds a number that is no neuron's.
        """
        self._own_place().everywhere = self._fitting(neurons, index)

    def _own_place(self) -> Place:
        if self._place is None:
            vars(self).setdefault("_place", Place())  # one for all threads
        return vars(self)["_place"]

    def _fitting(self, neurons: Neurons, index: Tensor | Sequence[int] | None) -> Mounted:
        check_instance(
            "neurons", neurons, Neurons, "Neurons(key, bias, value, activation) makes one"
        )
        if neurons.layout.d_out != self.out_features:
            raise ValueError(
                f"neurons write outputs of width {neurons.layout.d_out}, but this layer's are "
                f"{self.out_features} wide; mount neurons of that d_out"
            )
        return Mounted.at(self.weight.device, self.weight.dtype, neurons, index)

    def unmount(self) -> None:
        """Take back what `mount` did: be the plain projection again."""
        if self._place is not None:
            self._place.everywhere = None

    @contextmanager
    def mounted(
        self, neurons: Neurons, index: Tensor | Sequence[int] | None = None
    ) -> Iterator[None]:
        """Carry `neurons` inside a `with` block, in the calls of this thread or asyncio task alone.

        Args:
            neurons: N neurons with d_out = out_features.
            index: int64 [B]: the neuron of each sample, -1 for none. Default: b for sample b.
        """
        with self._own_place().holding(self._fitting(neurons, index)):
            yield

    def project(self, x: Tensor) -> Tensor:
        """The projection alone, without neurons."""
        return super().forward(x)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """The projection of x, plus the mounted neurons.

        Args:
            x: [B, T, in_features], or [M, in_features] with M a multiple of the samples B.
            source: what the keys read, x's shape but for its width; default x itself.

        Raises:
            TypeError: source is no tensor.
            ValueError: neurons are mounted for another number of samples, or x and source do
                not fit together.
        """
        if source is not None:
            check_floating(source=source)
        y = self.project(x)
        if self._place is None or not self._place.in_use:
            return y
        source = x if source is None else source
        if y.shape[:-1] != source.shape[:-1]:
            raise ValueError(
                f"x is {tuple(x.shape)} and source {tuple(source.shape)}; they must have the same "
                "shape but for their width"
            )
        return self._place.add(y, source)

    def extra_repr(self) -> str:
        """The line inside the parentheses of `repr`."""
        mounted = None if self._place is None else self._place.mounted
        shown = "" if mounted is None else f", neurons={len(mounted.neurons)}"
        return super().extra_repr() + shown
