"""What is below the neurons of a layer, run once for many forward calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.integrations.transformers import decoder_layer, decoder_layers, input_of
from meg_kernels.nn.packing import products_replaced, projections


class _Stub(nn.Module):
    """Stands for a decoder layer whose output is known already, or not wanted."""

    def __init__(self, layer: nn.Module, output: Tensor | None, returns_tuple: bool):
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: it is never run
        self._output = output
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        output = hidden_states if self._output is None else self._output
        return (output,) if self._returns_tuple else output

    def __getattr__(self, name: str):
        # Model loops read attributes of their layers (attention_type, ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)


class LowerLayers:
    """Runs what is below the neurons of `layer` once and lets the model start from there.

    Editing changes nothing below the edited layer, so that collection needs these layers once
    for each prompt instead of once for each optimisation step. The same holds for the products of
    the edited layer itself, to the last of which the neurons are added.

        lower = LowerLayers(model, layer)
        hidden = lower.run(**inputs)                # [B, T, d]
        products = lower.products(hidden, **inputs)
        with lower.replaced_by(hidden, products):
            model(**inputs)                         # same logits, layers 0..layer-1 skipped
    """

    def __init__(self, model: PreTrainedModel, layer: int):
        self.block = decoder_layer(model, layer)
        self.model = model
        self.layer = layer
        self._returns_tuple = False

    def run(self, **inputs: Tensor) -> Tensor:
        """Hidden states [B, T, d] that enter `layer`; `inputs` as the model's forward takes."""
        layers = decoder_layers(self.model)

        def look(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            self._returns_tuple = isinstance(output, tuple)

        hook = layers[self.layer - 1].register_forward_hook(look) if self.layer else None
        try:
            return input_of(layers[self.layer], self.model, inputs)
        finally:
            if hook is not None:
                hook.remove()

    def products(self, hidden: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs [B, T, n] of each projection of `layer`, by its name in the layer.

        Args:
            hidden: what `run` gave for `inputs`.
        """
        outputs: dict[str, Tensor] = {}

        def note(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[name] = output.view(*hidden.shape[:2], -1)  # OPT flattens its tokens

        hooks = [
            projection.register_forward_hook(functools.partial(note, name))
            for name, projection in self._projections().items()
        ]
        layers = decoder_layers(self.model)
        above = [*layers[self.layer + 1 :], self.model.get_output_embeddings()][0]
        try:
            with self.replaced_by(hidden):
                input_of(above, self.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @contextmanager
    def replaced_by(
        self, hidden: Tensor, products: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Inside, the model's forward takes `hidden` for the output of its lower layers.

        Args:
            hidden: [B, T, d] that enter `layer`.
            products: of `layer`, from which its projections take theirs; default: they multiply.
        """
        layers = decoder_layers(self.model)
        originals = list(layers[: self.layer])
        known = self._projections() if products else {}
        for i, layer in enumerate(originals):
            output = hidden if i == self.layer - 1 else None
            layers[i] = _Stub(layer, output, self._returns_tuple)
        try:
            with products_replaced(
                {known[name]: functools.partial(_looked_up, y) for name, y in products.items()}
                if products
                else {}
            ):
                yield
        finally:
            for i, layer in enumerate(originals):
                layers[i] = layer

    def _projections(self) -> dict[str, nn.Module]:
        wanted = set(projections([self.block]))
        return {name: part for name, part in self.block.named_modules() if part in wanted}


def _looked_up(output: Tensor, x: Tensor) -> Tensor:
    """`output` [B, T, n] in the shape that the product of x has."""
    if x.dim() == 3:
        output = output[:, -x.shape[1] :]  # the last layer may be asked for its last columns only
    return output.reshape(*x.shape[:-1], -1)
