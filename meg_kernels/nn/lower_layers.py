"""What does not depend on a layer's neurons, run once for many forward calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.nn.attached import first_tensor
from meg_kernels.nn.changed import hooked, own_forward, replaced, uncompiled
from meg_kernels.nn.families import decoder_layers, feed_forward
from meg_kernels.nn.partial import input_of, output_of

_log = logging.getLogger(__name__)


class LowerLayers:
    """Runs what does not depend on the neurons of `layer` once, and starts the model from there.

    Editing changes nothing below the edited layer, so that collection needs these layers once
    for each prompt instead of once for each optimisation step. The same holds for the edited
    layer's attention, and for its FFN's own output, to which the neurons are added. Compiled
    models run uncompiled.

        lower = LowerLayers(model, layer)
        hidden = lower.run(**inputs)                # [B, T, d]
        outputs = lower.outputs(hidden, **inputs)
        with lower.replaced_by(hidden, outputs):
            model(**inputs)                         # same logits, layers 0..layer-1 skipped

    Some models pass more between their layers than hidden states (keys and values that layers
    share, several residual streams), or run their layers in a loop. Whether layers can be skipped
    is tried once, on the first inputs; if not, everything above means the whole model, each time.
    """

    def __init__(self, model: PreTrainedModel, layer: int):
        self.model = model
        self.layer = layer
        self.ffn = feed_forward(model, layer)
        self.skips: bool | None = None  # whether layers can be skipped; None: not tried yet
        self._below: Any = None  # what the layer below returns, for its shape
        self._returned: dict[str, Any] = {}  # what parts of `layer` return, for its shape

    def run(self, **inputs: Tensor) -> Tensor:
        """Hidden states [B, T, d] that enter `layer`; `inputs` as the model's forward takes."""
        layers = decoder_layers(self.model)

        def look(module: nn.Module, args: tuple, output: Any) -> None:
            if not _is_plain(output):
                self._runs_whole()
            else:
                self._below = _without_tensors(output)

        below = hooked(layers[self.layer - 1].register_forward_hook, look)
        with below if self.layer else nullcontext():
            hidden = input_of(layers[self.layer], self.model, inputs)
        if hidden.dim() != 3 or hidden.shape[:2] != _shape(inputs):
            self._runs_whole()
        return hidden.new_empty(*_shape(inputs), 0) if self.skips is False else hidden

    def outputs(self, hidden: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs [B, T, n] of the parts of `layer` that neurons do not reach, by their names.

        Args:
            hidden: what `run` gave for `inputs`. No neurons may be mounted on the layer.
            **inputs: as the model's forward takes them.

        Returns:
            By the parts' names in the layer; empty where layers cannot be skipped.
        """
        if self.skips is None:
            try:
                outputs = self._recorded(hidden, inputs)
                row = {name: value[-1:] for name, value in inputs.items()}  # one is enough
                known = {name: output[-1:] for name, output in outputs.items()}
                self.skips = self._end_is_the_same(hidden[-1:], known, row)
            except Exception as error:  # in whatever way a model's loop misses a skipped layer
                _log.debug("layers of %s cannot be skipped: %r", type(self.model).__name__, error)
                self.skips = False
            if self.skips:
                return outputs
            self._runs_whole()
        return self._recorded(hidden, inputs) if self.skips else {}

    @contextmanager
    def replaced_by(
        self, hidden: Tensor, outputs: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Inside, the model's forward takes `hidden` for the output of its lower layers.

        Args:
            hidden: [B, T, d] that enter `layer`.
            outputs: of the parts of `layer`, which then do not compute them; default: they do.
        """
        if self.skips is False:
            with uncompiled():
                yield
            return
        parts = {self._part(name): self._known(name, y) for name, y in (outputs or {}).items()}
        if outputs and self.ffn.writes in outputs and not self.ffn.is_block:
            parts[self.ffn.entry] = _first_argument  # what is between has nothing to compute
        for i, layer in enumerate(decoder_layers(self.model)[: self.layer]):
            parts[layer] = self._skipped(hidden if i == self.layer - 1 else None)
        with _forward_replaced(parts), uncompiled():
            yield

    def _runs_whole(self) -> None:
        _log.info(
            "%s passes more than hidden states from layer to layer: it runs whole at each step",
            type(self.model).__name__,
        )
        self.skips = False

    def _skipped(self, hidden: Tensor | None) -> Callable[..., Any]:
        """A decoder layer's forward that returns `hidden`, or its input, in its output's shape."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _first_replaced(
                self._below, first_tensor(args, kwargs) if hidden is None else hidden
            )

        return forward

    def _part(self, name: str) -> nn.Module:
        return self.ffn.decoder_layer.get_submodule(name)

    def _known(self, name: str, output: Tensor) -> Callable[..., Any]:
        """A forward that returns `output` [B, T, n], in the shape that belongs to its input."""
        like = self._returned[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = first_tensor(args, kwargs)
            # The last layer may be asked for its last columns only; OPT flattens its tokens.
            known = output[:, -x.shape[1] :] if x.dim() == 3 else output
            known = known.reshape(*x.shape[:-1], -1).clone()  # whoever adds to it in place
            return _first_replaced(like, known)

        return forward

    def _recorded(self, hidden: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One run of the layer: what the FFN returns, and what parts before it return."""
        returned: list[tuple[str, Any]] = []
        layer, ffn = self.ffn.decoder_layer, self.ffn
        around = {ffn.reads.split(".")[0], ffn.writes.split(".")[0]}
        beside = [
            name
            for name, part in layer.named_children()
            if name not in around and any(p.dim() > 1 for p in part.parameters())
        ]

        def recording(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                returned.append((name, output))
                return output

            return record

        parts = {
            self._part(name): recording(name, own_forward(self._part(name)))
            for name in (*beside, ffn.writes)
        }
        with _forward_replaced(parts), self.replaced_by(hidden):
            output_of(layer, self.model, inputs)
        names = [name for name, _ in returned]
        if names.count(ffn.writes) != 1:
            return {}
        outputs = {}
        for name, output in returned[: names.index(ffn.writes) + 1]:
            value = output if isinstance(output, Tensor) else output[0]
            # Attention returns its weights, or nothing, beside its output; a tensor of tokens
            # beside it would matter.
            beside = [] if value is output else list(output[1:])
            matters = any(isinstance(x, Tensor) and x.dim() == 3 for x in beside)
            plain = value is output or name == ffn.writes or ("att" in name and not matters)
            if (
                not plain
                or not _is_plain(output)
                or names.count(name) != 1
                or value.numel() % hidden[..., 0].numel()
            ):
                continue
            self._returned[name] = _without_tensors(output)
            outputs[name] = value.reshape(*hidden.shape[:2], -1)
        return outputs

    def _end_is_the_same(
        self, hidden: Tensor, outputs: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> bool:
        """Whether the last layer returns what it does in the whole model, which has no loop."""
        ends: list[Tensor] = []
        calls = 0

        def count(module: nn.Module, args: tuple) -> None:
            nonlocal calls
            calls += 1

        def note(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            ends.append(output if isinstance(output, Tensor) else output[0])

        with (
            hooked(self.ffn.decoder_layer.register_forward_pre_hook, count),
            hooked(decoder_layers(self.model)[-1].register_forward_hook, note),
            torch.no_grad(),  # without the output layer, which is large and not needed
        ):
            with uncompiled():
                self.model.base_model(**inputs, use_cache=False)
            with self.replaced_by(hidden, outputs):
                self.model.base_model(**inputs, use_cache=False)
        if calls != 2 or len(ends) != 2:
            return False
        expected, given = ends
        error = (given - expected).abs().max()
        return bool(error <= 1e-2 * expected.abs().max())


def _is_plain(output: Any) -> bool:
    """Whether a part's output is a tensor, or one first in a tuple or list without names."""
    return isinstance(output, Tensor) or type(output) in (tuple, list)


def _without_tensors(output: Any) -> Any:
    """None for a tensor; a tuple or list of as many entries for a tuple or list."""
    return None if isinstance(output, Tensor) else type(output)([None for _ in output])


def _first_replaced(like: Any, output: Tensor) -> Any:
    return output if like is None else type(like)([output, *like[1:]])


def _first_argument(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


def _shape(inputs: dict[str, Tensor]) -> torch.Size:
    given = inputs.get("input_ids")
    return (inputs["inputs_embeds"] if given is None else given).shape[:2]


def _forward_replaced(
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Inside, these modules compute with the given functions; their hooks fire as before."""
    return replaced({(module, "forward"): forward for module, forward in forwards.items()})
