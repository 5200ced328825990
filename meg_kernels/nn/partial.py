"""Running a part of a model: up to some module, or the last FFN for the last positions alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.nn.attached import first_tensor
from meg_kernels.nn.changed import hooked, uncompiled
from meg_kernels.nn.families import LOOKS_BACK, decoder_layers, feed_forward, text_config


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its token ids; accelerate may keep its weights elsewhere meanwhile."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return model.device if place is None else torch.device(place)


@torch.no_grad()
def input_of(module: nn.Module, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What `module` of `model` gets first when the model gets `inputs`; nothing after it runs."""
    noted: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        noted.append(first_tensor(args, kwargs))
        raise _Reached

    with hooked(module.register_forward_pre_hook, note, with_kwargs=True):
        _run(model, inputs)
    return noted[0]


@torch.no_grad()
def output_of(module: nn.Module, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What `module` of `model` returns (first) for the model's `inputs`; nothing after it runs."""
    noted: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        noted.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    with hooked(module.register_forward_hook, note):
        _run(model, inputs)
    return noted[0]


class _Reached(Exception):
    pass


def _run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with contextlib.suppress(_Reached), uncompiled():
        model(**inputs, use_cache=False)


@contextmanager
def last_feed_forward_sees(model: PreTrainedModel, columns: int) -> Iterator[None]:
    """Inside, the last decoder layer's FFN works on the last `columns` positions alone.

    An FFN works on each position by itself, and no position looks at another one after the last
    layer: whoever wants the logits of these columns needs no other FFN output. Where the FFN is
    no module of its own (OPT), the last layer has none, or positions look at each other after it
    (`LOOKS_BACK`), the FFN works on all positions. Compiled models run uncompiled inside.
    """
    layers = decoder_layers(model)
    block = None
    if text_config(model).model_type not in LOOKS_BACK:
        try:
            ffn = feed_forward(model, len(layers) - 1)
            block = ffn.exit if ffn.is_block else None
        except ValueError:  # a hybrid model's last layer may have no FFN
            pass
    if block is None:
        with uncompiled():
            yield
        return
    hidden, rows = 0, 0

    def keep_last(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        nonlocal hidden, rows
        given = first_tensor(args, kwargs).shape[:2]
        rows, hidden = given[0], max(given[1] - columns, 0)

        def kept(value: Any) -> Any:  # a residual or the token ids may be given beside
            is_of_tokens = isinstance(value, Tensor) and value.shape[:2] == given
            return value[:, hidden:].contiguous() if is_of_tokens else value

        return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}

    def fill_up(module: nn.Module, args: tuple, output: Any) -> Any:
        whole: Tensor = output if isinstance(output, Tensor) else output[0]
        flat = whole.dim() == 2  # Llama 4's mixture returns its tokens in one row
        whole = whole.reshape(rows, -1, whole.shape[-1])
        whole = nn.functional.pad(whole, (0, 0, hidden, 0))
        whole = whole.flatten(0, 1) if flat else whole
        return whole if isinstance(output, Tensor) else type(output)([whole, *output[1:]])

    with (
        hooked(block.register_forward_pre_hook, keep_last, with_kwargs=True),
        hooked(block.register_forward_hook, fill_up),
        uncompiled(),
    ):
        yield
