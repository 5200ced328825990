"""Neurons in their place: what is mounted, and how it is added to a layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meg_kernels.neuron import Neurons
from meg_kernels.ops.dynamic_neuron import check_index, dynamic_neuron, dynamic_neuron_


@dataclass
class Mounted:
    """Neurons that a layer carries, and the row of the batch that each of them belongs to.

    Args:
        neurons: N neurons.
        index: int64 [samples]: each sample's neuron, -1 for none.
        copies: rows that a sample may also have, because `generate` repeats each of them for its
            beams or return sequences.
    """

    neurons: Neurons
    index: Tensor
    copies: int = 1

    @classmethod
    def at(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        neurons: Neurons,
        index: Tensor | Sequence[int] | None,
    ) -> Mounted:
        """`neurons` on that device and in that dtype; ValueError if `index` does not fit them."""
        if index is None:
            index = torch.arange(len(neurons))
        elif not isinstance(index, Tensor):
            index = torch.tensor(index) if len(index) else torch.zeros(0, dtype=torch.int64)
        check_index(index, neurons)  # here, where it is usually on the CPU and can be read
        # Contiguous: flat vectors' views start where no 16-byte load may.
        neurons = neurons.to(device, dtype).contiguous()
        return cls(neurons, index.to(device).contiguous())

    def add(self, y: Tensor, x: Tensor, rows: int | None = None) -> Tensor:
        """Add each row's own neuron to y; without gradients y itself may be changed.

        Args:
            y: the layer's output, [rows, T, d_out], or [M, d_out] with M a multiple of the rows.
            x: what the keys read; its shape is y's but for the width d_in.
            rows: of the batch, where x is [M, d_in]; default: as many as there are samples.

        Raises:
            ValueError: rows, samples and shapes do not fit together.
        """
        neurons, index, samples = self.neurons, self.index, len(self.index)
        if x.shape[-1] != neurons.key.shape[1]:
            raise ValueError(
                f"the neurons read inputs of width {neurons.key.shape[1]}, but the layer was given "
                f"{tuple(x.shape)}; mount neurons of that width, or pass what they read as source"
            )
        if x.dim() > 2:
            rows = x.shape[0]
        elif rows is None:
            rows = samples
        if rows != samples and rows != samples * self.copies:
            raise ValueError(
                f"the batch has {rows} rows, but {samples} neuron indices are mounted; give each "
                "row one index (-1 for none)"
            )
        tokens = x[..., 0].numel()
        if tokens != y[..., 0].numel() or tokens % max(rows, 1):
            raise ValueError(
                f"{rows} rows have neurons mounted, but the layer read {tuple(x.shape)} and gave "
                f"{tuple(y.shape)}; both must hold the same number of tokens for each row"
            )
        if not tokens or not samples:
            return y
        if neurons.device != y.device:  # weights that are offloaded, or on several devices
            self.neurons = neurons = neurons.to(y.device)
            self.index = index = index.to(y.device)
        if rows != samples:
            index = index.repeat_interleave(rows // samples)
        read = x.to(y.device).reshape(rows, -1, x.shape[-1])
        written = y.reshape(rows, -1, y.shape[-1])
        op = dynamic_neuron if torch.is_grad_enabled() else dynamic_neuron_
        return op(written, read, neurons, index).view(y.shape)
