"""`attach`: mount neurons on one feed-forward layer of a transformers model.

    attached = attach(model, layer=20)
    with attached.neurons(neurons, index):
        model.generate(**batch)            # each row of the batch with its own neuron, or none
    attached.detach()                      # the very modules of before

The neuron is carried at the FFN's block: a hook reads what the block reads and adds to what the
block returns. Whatever lies between stays as it is: fused or quantised projections, a mixture of
experts, adapters, weights that accelerate loads when they are needed, other hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.nn.families import FeedForward, feed_forward, language_model
from meg_kernels.nn.mounted import Mounted

_CARRIED = "_carried_neurons"  # attribute of the modules that our hooks are on


class _Carried:
    """What the hooks of one attachment share; the modules hold it, so that compilers see it."""

    def __init__(self) -> None:
        self.mounted: Mounted | None = None
        self.rows: int | None = None  # of the batch, where the FFN is given its tokens in one row
        self.source: Tensor | None = None  # what the FFN reads, where it is no single module


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among a module's arguments: what it reads."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _note_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a decoder layer: the batch's rows, which an FFN without a block may not see."""
    carried: _Carried = getattr(module, _CARRIED)
    if carried.mounted is not None:
        carried.rows = first_tensor(args, kwargs).shape[0]


def _note_source(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before an FFN's first projection."""
    carried: _Carried = getattr(module, _CARRIED)
    if carried.mounted is not None:
        carried.source = first_tensor(args, kwargs)


def _add_neurons(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """After an FFN's block, or its last projection: the output with the neurons."""
    carried: _Carried = getattr(module, _CARRIED)
    mounted = carried.mounted
    if mounted is None:
        return None
    if carried.source is None:
        source = first_tensor(args, kwargs)
    else:  # noted before the FFN's first projection
        source, carried.source = carried.source, None
    if isinstance(output, Tensor):
        return mounted.add(output, source, carried.rows)
    # Mixtures of experts may return (output, router logits).
    return type(output)([mounted.add(output[0], source, carried.rows), *output[1:]])


_MARKED: dict[type[nn.Module], type[nn.Module]] = {}


def _marked(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that differs from `kind` in its identity alone, the same at every call.

    Compiled code does not notice that a module has got hooks, but it does notice another class.
    """
    named = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return _MARKED.setdefault(kind, type(kind.__name__, (kind,), named))


class Attached:
    """Neurons' place in a model; made by `attach`.

    Attributes:
        model: the transformers model, without what PEFT or `torch.compile` put around it.
        ffn: the feed-forward layer that carries the neurons.
    """

    def __init__(self, model: PreTrainedModel, ffn: FeedForward):
        self.model = model
        self.ffn = ffn
        self._carried = _Carried()
        exit_ = ffn.exit
        # First among the hooks: others see the output of the FFN with its neurons.
        self._hooks = [exit_.register_forward_hook(_add_neurons, prepend=True, with_kwargs=True)]
        if ffn.is_block:
            self._modules = [exit_]
        else:
            entry, layer = ffn.entry, ffn.decoder_layer
            self._hooks += [
                entry.register_forward_pre_hook(_note_source, with_kwargs=True),
                layer.register_forward_pre_hook(_note_rows, with_kwargs=True),
            ]
            self._modules = [layer, entry, exit_]
        for module in self._modules:
            vars(module)[_CARRIED] = self._carried
        # Where the FFN is no module, the layer's class is marked: a projection's kind matters.
        marked = self._modules[0]
        self._kind = type(marked)
        marked.__class__ = _marked(self._kind)

    def __repr__(self) -> str:
        mounted = self._carried.mounted
        state = f"{len(mounted.neurons)} neurons" if mounted else "no neurons"
        if not self._hooks:
            state = "detached"
        return f"Attached({type(self.model).__name__}, layer={self.layer}, {state})"

    @property
    def layer(self) -> int:
        """0-based decoder layer."""
        return self.ffn.layer

    @property
    def layout(self) -> NeuronLayout:
        """The layout of this layer's neurons."""
        return self.ffn.layout

    @contextmanager
    def neurons(
        self, neurons: Neurons, index: Tensor | Sequence[int] | None = None
    ) -> Iterator[None]:
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
        if not self._hooks:
            raise RuntimeError("this attachment was detached; call attach(model, layer) again")
        if self._carried.mounted is not None:
            raise RuntimeError("neurons are mounted already; leave that `with` block first")
        if neurons.layout != self.layout:
            raise ValueError(
                f"neurons have {neurons.layout}, but layer {self.layer} needs {self.layout}"
            )
        mounted = Mounted.at(*self._device_and_dtype(), neurons, index)
        self._carried.mounted = mounted
        try:
            with _expansion_noted(self.model, mounted):
                yield
        finally:
            self._carried.mounted = self._carried.source = self._carried.rows = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, no neurons are mounted, even in a `with attached.neurons(...)` block."""
        mounted, self._carried.mounted = self._carried.mounted, None
        try:
            yield
        finally:
            self._carried.mounted = mounted

    def detach(self) -> None:
        """Leave the model as it was before `attach`. Calling it twice is harmless."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        marked = self._modules[0]
        if type(marked) is _marked(self._kind):  # and no other library's class by now
            marked.__class__ = self._kind
        for module in self._modules:
            del vars(module)[_CARRIED]

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the FFN's weights are, and what they are, as far as they show it."""
        for weight in (*self._modules[0].parameters(), *self.model.parameters()):
            if weight.is_floating_point() and not weight.is_meta:
                return weight.device, weight.dtype
        return torch.device("cpu"), self.model.dtype


@contextmanager
def _expansion_noted(model: PreTrainedModel, mounted: Mounted) -> Iterator[None]:
    """Inside, `mounted` knows how often `model.generate` repeats each row."""
    if not hasattr(model, "_expand_inputs_for_generation"):
        yield
        return
    # Another attachment of this model, mounted around this one, has its own there.
    outer = vars(model).get("_expand_inputs_for_generation")
    expand: Any = model._expand_inputs_for_generation

    def expand_and_note(expand_size: int = 1, **kwargs: Any) -> Any:
        mounted.copies = expand_size
        return expand(expand_size=expand_size, **kwargs)

    vars(model)["_expand_inputs_for_generation"] = expand_and_note
    try:
        yield
    finally:
        if outer is None:
            del vars(model)["_expand_inputs_for_generation"]
        else:
            vars(model)["_expand_inputs_for_generation"] = outer


def attach(model: nn.Module, layer: int) -> Attached:
    """Make feed-forward layer `layer` of `model` carry neurons, until `.detach()`.

    Args:
        model: a transformers causal language model, or one that PEFT or `torch.compile` wraps.
            Its weights may be quantised, offloaded or on several devices.
        layer: 0-based decoder layer.

    Returns:
        The place that neurons are mounted on, with `.neurons(...)` and `.detach()`.

    Raises:
        ValueError: the model or that layer has no feed-forward layer, the layer is out of range,
            or neurons are attached there already.
        TypeError: model is no transformers model, or layer is no int.
    """
    model = language_model(model)
    ffn = feed_forward(model, layer)
    if _CARRIED in vars(ffn.exit):
        raise ValueError(f"layer {layer} carries neurons already; detach() that attachment first")
    return Attached(model, ffn)
