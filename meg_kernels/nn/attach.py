"""`attach`: mount neurons on one feed-forward layer of a transformers model.

    attached = attach(model, layer=20)
    with attached.neurons(neurons, index):
        model.generate(**batch)            # each row of the batch with its own neuron, or none
    attached.detach()                      # the very modules of before

The FFN's output projection is replaced by one that carries neurons over the same parameters;
the FFN's input, which the keys read, is noted as it enters the input projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.integrations.transformers import FeedForward, feed_forward
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.nn.linear import MeGConv1D, MeGLinear


class Attached:
    """Neurons' place in a model; made by `attach`."""

    def __init__(self, model: PreTrainedModel, ffn: FeedForward):
        self.model = model
        self.ffn = ffn
        self._original = ffn.output_projection
        self._carrier = (
            MeGLinear.from_linear(self._original)
            if isinstance(self._original, nn.Linear)
            else MeGConv1D.from_conv1d(self._original)  # type: ignore[arg-type]
        )
        self._samples: Tensor | None = None  # [n] on the CPU's side of generate's expansion
        self._copies = 1
        self._hooks = [
            ffn.input_projection.register_forward_pre_hook(self._note_source),
            model.register_forward_pre_hook(self._give_rows_their_neurons, with_kwargs=True),
        ]
        ffn.output_projection = self._carrier

    @property
    def layout(self) -> NeuronLayout:
        """The layout of this layer's neurons."""
        return self.ffn.layout

    @contextmanager
    def neurons(self, neurons: Neurons, index: Tensor | None = None) -> Iterator[None]:
        """Run the model with `neurons` inside a `with` block.

        Args:
            neurons: N neurons of this layer's layout.
            index: int64 [batch]: each row's neuron, -1 for none. Default: row b has neuron b.
                `model.generate` with beams or num_return_sequences expands it as it expands
                the rows.

        Raises:
            ValueError: the neurons have another layout, an index is no neuron's number, or a
                forward call's batch does not have as many rows as there are indices.
            RuntimeError: detached, or neurons are mounted already.
        """
        if self.ffn.output_projection is not self._carrier:
            raise RuntimeError("this attachment was detached; call attach(model, layer) again")
        if self._samples is not None:
            raise RuntimeError("neurons are mounted already; leave that `with` block first")
        if neurons.layout != self.layout:
            raise ValueError(
                f"neurons have {neurons.layout}, but layer {self.ffn.layer} needs {self.layout}"
            )
        samples = torch.arange(len(neurons)) if index is None else index
        self._carrier.mount(neurons, samples)
        self._samples = samples
        # Another attachment of this model, mounted around this one, has its own there.
        outer = vars(self.model).get("_expand_inputs_for_generation")
        model: Any = self.model
        expand = model._expand_inputs_for_generation

        def expand_and_note(expand_size: int = 1, **kwargs):
            self._copies = expand_size
            return expand(expand_size=expand_size, **kwargs)

        model._expand_inputs_for_generation = expand_and_note
        try:
            yield
        finally:
            if outer is None:
                del model._expand_inputs_for_generation
            else:
                self.model._expand_inputs_for_generation = outer
            self._carrier.unmount()
            self._samples, self._copies = None, 1

    def detach(self) -> None:
        """Put the model's own modules back. Calling it twice is harmless."""
        for hook in self._hooks:
            hook.remove()
        if self.ffn.output_projection is self._carrier:  # and not a later attachment's
            self.ffn.output_projection = self._original

    def _note_source(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._carrier._source = args[0] if self._samples is not None else None

    def _give_rows_their_neurons(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each forward call: one index for each row, expanded as generate expanded rows."""
        if self._samples is None:
            return
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        rows = next(given.shape[0] for given in inputs if given is not None)
        samples = len(self._samples)
        if rows not in (samples, samples * self._copies):
            raise ValueError(
                f"the batch has {rows} rows, but {samples} neuron indices are mounted; give each "
                "row one index (-1 for none)"
            )
        carried = self._carrier._index
        if carried is None or rows != len(carried):
            expanded = (
                self._samples.repeat_interleave(rows // samples) if samples else self._samples
            )
            self._carrier._index = expanded.to(self._carrier.weight.device)


def attach(model: PreTrainedModel, layer: int) -> Attached:
    """Make feed-forward layer `layer` of `model` carry neurons, until `.detach()`.

    Args:
        model: a transformers causal language model of a supported family
            (`meg_kernels.integrations.transformers.FAMILIES`).
        layer: 0-based decoder layer.

    Raises:
        ValueError: unknown family, layer out of range, or neurons are attached there already.
        TypeError: the projection is no plain Linear (quantised, wrapped by an adapter).
    """
    ffn = feed_forward(model, layer)
    if isinstance(ffn.output_projection, MeGLinear | MeGConv1D):
        raise ValueError(f"layer {layer} carries neurons already; detach() that attachment first")
    return Attached(model, ffn)
