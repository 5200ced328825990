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

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.arguments import check_instance
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.nn.changed import itself
from meg_kernels.nn.families import FeedForward, feed_forward, language_model
from meg_kernels.nn.mounted import EMPTY, Mounted, Place
from meg_kernels.scoped import is_traced

_CARRIED = "_carried_neurons"  # attribute of the modules that our hooks are on
_CHECKPOINTED = "_neurons_of_checkpoint"  # attribute of the storage of what a decoder layer read


class _Noted(threading.local):
    """What one hook notes for the next, in one forward call of one thread."""

    rows: int | None = None  # of the batch, where the FFN is given its tokens in one row
    source: Tensor | None = None  # what the FFN reads, where it is no single module
    recalled: tuple[Mounted | None] | None = None  # of the call that a checkpoint runs again


class _Carried:
    """What the hooks of one attachment share; the modules hold it, so that compilers see it."""

    def __init__(self) -> None:
        self.place, self.noted = Place(), _Noted()
        self.notes = False  # whether parts of the layer note what is mounted: once it was trained
        self.trained = False  # whether the model was ever in training mode with neurons mounted
        self.owner: weakref.ref[Attached] | None = None

    def __reduce__(self) -> Any:
        return _Carried, ()  # a copy of the model carries no neurons, and nobody has attached it

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """The output y of the FFN that read x, with this call's neurons."""
        noted = self.noted
        if not self.notes or is_traced() or not _runs_again():
            return self.place.add(y, x, noted.rows)
        recalled, noted.recalled = noted.recalled, None
        if recalled is None and self.place.mounted is None:
            if not self.trained:
                return y
            raise RuntimeError(
                "a backward pass runs the model again, outside of the `with` block in which "
                "neurons were mounted; call backward() inside that block, or let the model "
                "checkpoint its layers itself: model.gradient_checkpointing_enable()"
            )
        (mounted,) = recalled or (self.place.mounted,)
        return y if mounted is None else mounted.add(y, x)


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among a module's arguments: what it reads."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a decoder layer: what is told of the batch here, and not to its FFN."""
    carried: _Carried = getattr(module, _CARRIED)
    if module.training and not (carried.notes or is_traced()):
        carried.notes = True
        for part in module.children():
            vars(part).setdefault(_CARRIED, carried)
            part.register_forward_pre_hook(_before_part, with_kwargs=True)
    if not (carried.place.in_use or carried.trained):
        return
    hidden = first_tensor(args, kwargs)
    carried.noted.rows = hidden.shape[0]
    if is_traced():
        return
    if carried.place.mounted is None:
        return
    _check_one_sequence_a_row(kwargs)
    carried.trained = carried.trained or module.training


def _runs_again() -> bool:
    """Whether a backward pass is running this, because of a checkpoint around it."""
    return torch._C._current_graph_task_id() != -1


def _before_part(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a part of a decoder layer, once the model was trained.

    Gradient checkpointing runs a layer again on the very storage that its first part read. What is
    mounted is noted there the first time.
    """
    carried: _Carried = getattr(module, _CARRIED)
    if is_traced() or not module.training:
        return
    storage = first_tensor(args, kwargs).untyped_storage()
    if not _runs_again():
        setattr(storage, _CHECKPOINTED, (carried.place.mounted,))
        carried.noted.recalled = None
    elif hasattr(storage, _CHECKPOINTED):
        carried.noted.recalled = getattr(storage, _CHECKPOINTED)


def _check_one_sequence_a_row(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if rows hold several sequences, each of which would need its neuron."""
    position_ids, bounds = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    packed = isinstance(bounds, Tensor) and bounds.numel() > 2
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.shape[1] > 1:
        begins = position_ids == 0
        # Positions of padding may be 0 too, but nothing came before it.
        again = begins[:, 1:] & (position_ids[:, :-1] > 0) & begins.cumsum(1)[:, :-1].bool()
        packed = packed or bool(again.any())
    if packed:
        raise ValueError(
            "a row holds several sequences (their positions start again), but neurons are mounted "
            "for whole rows; give each sequence a row of its own, padded to one length"
        )


def _note_source(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before an FFN's first projection."""
    carried: _Carried = getattr(module, _CARRIED)
    if carried.place.in_use or carried.trained:
        carried.noted.source = first_tensor(args, kwargs)


def _add_neurons(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """After an FFN's block, or its last projection: the output with the neurons."""
    carried: _Carried = getattr(module, _CARRIED)
    if not (carried.place.in_use or carried.trained):
        return None
    if carried.noted.source is None:
        source = first_tensor(args, kwargs)
    else:  # noted before the FFN's first projection
        source, carried.noted.source = carried.noted.source, None
    if isinstance(output, Tensor):
        return carried.add(output, source)
    # Mixtures of experts may return (output, router logits).
    return type(output)([carried.add(output[0], source), *output[1:]])


_HOOKS = (_before_layer, _before_part, _note_source, _add_neurons)


def _unhook(ffn: FeedForward) -> None:
    """Remove our hooks from a layer, also from a copy of one that has them."""
    layer = ffn.decoder_layer
    for module in (layer, *layer.children(), ffn.entry, ffn.exit):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if hook in _HOOKS]:
                del hooks[number]
                module._forward_hooks_with_kwargs.pop(number, None)
                module._forward_pre_hooks_with_kwargs.pop(number, None)
        vars(module).pop(_CARRIED, None)


# Methods of a model that repeat rows, and those that pack requests into one row.
_REPEATING = "_expand_inputs_for_generation"
_PACKING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class _Watched:
    """A method of a model that has attachments, which they have to know of."""

    def __init__(self, name: str, own: Any, is_attribute: bool):
        self.name, self.own, self.is_attribute = name, own, is_attribute
        self.places: list[Place] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for place in self.places:
            if (mounted := place.mounted) is None:
                continue
            if self.name in _PACKING:
                raise ValueError(
                    f"{self.name} packs its requests into one row, but neurons are mounted for "
                    "whole rows; use model.generate, or leave the `with` block"
                )
            mounted.copies.number = kwargs.get("expand_size", 1)
        return self.own(*args, **kwargs)

    def __reduce__(self) -> Any:
        return itself, (self.own,)  # a copy of the model has no attachments


def _watch(model: PreTrainedModel, place: Place) -> None:
    for name in (_REPEATING, *_PACKING):
        if not hasattr(model, name):
            continue
        watched = vars(model).get(name)
        if not isinstance(watched, _Watched):
            watched = _Watched(name, getattr(model, name), name in vars(model))
            vars(model)[name] = watched
        watched.places.append(place)


def _unwatch(model: PreTrainedModel, place: Place) -> None:
    for name in (_REPEATING, *_PACKING):
        watched = vars(model).get(name)
        if not isinstance(watched, _Watched) or place not in watched.places:
            continue
        watched.places.remove(place)
        if not watched.places and watched.is_attribute:
            vars(model)[name] = watched.own
        elif not watched.places:
            del vars(model)[name]


_ATTACHING = threading.Lock()
_MARKED: dict[type[nn.Module], type[nn.Module]] = {}


def _marked(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that differs from `kind` in its identity alone, the same at every call.

    Compiled code does not notice that a module has got hooks, but it does notice another class.
    """
    named = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return _MARKED.setdefault(kind, type(kind.__name__, (kind,), named))


def _to_be_marked(ffn: FeedForward) -> nn.Module:
    """Whose class is marked: where the FFN is no module, a projection's kind matters."""
    return ffn.exit if ffn.is_block else ffn.decoder_layer


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
        self._carried.owner = weakref.ref(self)
        self._is_attached = True
        for module in (ffn.decoder_layer, ffn.entry, ffn.exit):
            vars(module)[_CARRIED] = self._carried
        ffn.decoder_layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        if not ffn.is_block:
            ffn.entry.register_forward_pre_hook(_note_source, with_kwargs=True)
        # First among the hooks: others see the output of the FFN with its neurons.
        ffn.exit.register_forward_hook(_add_neurons, prepend=True, with_kwargs=True)
        marked = _to_be_marked(ffn)
        marked.__class__ = _marked(type(marked))
        _watch(model, self._carried.place)

    def __repr__(self) -> str:
        mounted = self._carried.place.mounted
        state = f"{len(mounted.neurons)} neurons" if mounted else "no neurons"
        if not self._is_attached:
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

    @property
    def has_neurons(self) -> bool:
        """Whether this thread or task has neurons mounted."""
        return self._carried.place.mounted is not None

    @property
    def is_disabled(self) -> bool:
        """Whether this thread or task runs inside `disabled()`."""
        return self._carried.place.is_emptied

    @contextmanager
    def neurons(
        self, neurons: Neurons, index: Tensor | Sequence[int] | None = None
    ) -> Iterator[None]:
        """Run the model with `neurons` inside a `with` block, in this thread or asyncio task.

        Calls of the model in other threads and tasks are left alone, and may have neurons of their
        own. As with `torch.no_grad`, a `threading.Thread` started inside counts as another one;
        `asyncio.to_thread`, and what runs in a copy of the context, does not.

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
        if self.has_neurons:
            raise RuntimeError("neurons are mounted already; leave that `with` block first")
        check_instance("neurons", neurons, Neurons, "collect(...).neurons are some")
        if neurons.layout != self.layout:
            raise ValueError(
                f"neurons have {neurons.layout}, but layer {self.layer} needs {self.layout}"
            )
        mounted = Mounted.at(*self._device_and_dtype(), neurons, index)
        with ExitStack() as block:
            with _ATTACHING:  # so that nobody detaches in between
                if not self._is_attached:
                    raise RuntimeError(
                        "this attachment was detached; call attach(model, layer) again"
                    )
                block.enter_context(self._carried.place.holding(mounted))
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, this thread or task has no neurons mounted, even in a block of `neurons`."""
        with self._carried.place.holding(EMPTY):
            yield

    def detach(self) -> None:
        """Leave the model as it was before `attach`. Calling it twice is harmless.

        What this thread or task has mounted itself ends with it.

        Raises:
            RuntimeError: another thread or task has neurons mounted, whose answers would become
                the base model's.
        """
        with _ATTACHING:
            if not self._is_attached:
                return
            if self._carried.place.is_used_elsewhere:
                raise RuntimeError(
                    f"layer {self.layer} has neurons mounted in another thread or task; wait until "
                    "its answers are there, and detach then"
                )
            self._is_attached = False
            _clear(self.model, self.ffn, self._carried.place)

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the FFN's weights are, and what they are, as far as they show it."""
        for weight in (*_to_be_marked(self.ffn).parameters(), *self.model.parameters()):
            if weight.is_floating_point() and not weight.is_meta:
                return weight.device, weight.dtype
        return torch.device("cpu"), self.model.dtype


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
        TypeError: model is no transformers model, or layer is no integer.
    """
    model = language_model(model)
    ffn = feed_forward(model, layer)
    with _ATTACHING:
        carried: _Carried | None = vars(ffn.exit).get(_CARRIED)
        if carried is not None:
            if carried.owner is not None and carried.owner() is not None:
                raise ValueError(
                    f"layer {layer} carries neurons already; detach() that attachment first"
                )
            _clear(model, ffn, carried.place)  # a copy's, or one that nobody holds
        return Attached(model, ffn)


def _clear(model: PreTrainedModel, ffn: FeedForward, place: Place) -> None:
    """Leave a layer as it was before it was attached, or before what it is a copy of was."""
    _unhook(ffn)
    marked = _to_be_marked(ffn)
    for kind, made in _MARKED.items():
        if type(marked) is made:  # and no other library's class by now
            marked.__class__ = kind
            break
    _unwatch(model, place)
