"""What tells a language model from others of its shape: a sample of its weights.

Neurons fit the weights that they were collected in. The edited decoder layer and the input
embeddings are looked at, a few thousand values of each tensor: training, further or another one,
moves nearly all of them.

The sample is noted rounded to each data type, so that a model loaded in another one is compared in
the coarser of the two, to the bit and on whatever device. Quantised weights are compared as they
are stored; where they differ, or are stored otherwise, nothing is said about the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meg_kernels.checkpoints import not_finite
from meg_kernels.nn.families import decoder_layer, plain_tensors, text_config
from meg_kernels.storage import fingerprint

SAMPLED = 1 << 13  # values of a tensor
STORED = "quantised"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def identity(model: PreTrainedModel, layer: int) -> dict[str, Any]:
    """What is known of a model that is edited in this layer.

    Args:
        model: the transformers model.
        layer: 0-based decoder layer.

    Returns:
        JSON-able: its type and shape, the layer, and `weights`: for the layer and the embeddings
        the digest of a sample in each data type.
    """
    config = text_config(model)
    shape = {name: getattr(config, name, None) for name in _SHAPE}
    shape["model_type"] = model.config.model_type
    return shape | {
        "layer": layer,
        "weights": {name: _digests(part) for name, part in _parts(model, layer).items()},
    }


@dataclass(frozen=True)
class Comparison:
    """How a model compares with the one whose identity was noted.

    Args:
        different: what differs, in words; nothing if nothing does.
        unknown: the parts whose weights cannot be compared.
    """

    different: tuple[str, ...]
    unknown: tuple[str, ...]


def compare(
    noted: Mapping[str, Any], noted_dtype: str, found: Mapping[str, Any], found_dtype: str
) -> Comparison:
    """Compare two models by their identities and the data types of their weights.

    Args:
        noted: `identity` of the one; without weights, as earlier releases noted it, only the
            shapes are compared.
        noted_dtype: of its weights, such as `float32`.
        found: `identity` of the other.
        found_dtype: of its weights.
    """
    different = [
        f"{name} is {found.get(name)!r}, not {noted[name]!r}"
        for name in noted
        if name != "weights" and found.get(name) != noted[name]
    ]
    unknown = []
    if not different:  # else the weights say nothing further
        for part in found["weights"]:
            one, other = noted.get("weights", {}).get(part), found["weights"][part]
            same = _same(one, noted_dtype, other, found_dtype)
            if same is None:
                unknown.append(part)
            elif not same:
                different.append(f"the weights of its {part} are others")
    return Comparison(tuple(different), tuple(unknown))


def _same(
    one: Mapping[str, str] | None, one_dtype: str, other: Mapping[str, str] | None, other_dtype: str
) -> bool | None:
    """Whether two samples are of the same weights; None if that cannot be told."""
    if one is None or other is None or one.get("tensors") != other.get("tensors"):
        return None
    if STORED in one or STORED in other:
        # The same weights may be stored in several ways, such as on another device.
        return True if one.get(STORED) == other.get(STORED) else None
    coarser = [name for name in (one_dtype, other_dtype) if name in ("bfloat16", "float16")]
    equal = {name: one.get(name) == other.get(name) for name in _DTYPES}
    if len(set(coarser)) < 2:
        return equal[coarser[0] if coarser else "float32"]
    # Of bfloat16 and float16, neither holds all values of the other.
    return True if equal["float16"] or equal["bfloat16"] else None


def check_finite(model: PreTrainedModel, layer: int) -> None:
    """Refuse NaN and infinite weights in the edited decoder layer and in the embeddings.

    Args:
        model: the transformers model.
        layer: 0-based decoder layer.

    Raises:
        ValueError: there are some; the message names the tensors.
    """
    named = [
        (f"{part}: {name}", tensor)
        for part, module in _parts(model, layer).items()
        for name, tensor in _tensors(module)
    ]
    if names := not_finite(named):
        raise ValueError(
            f"the model has NaN or infinite weights in {', '.join(names)}; load a sound "
            "checkpoint, in float32 if its values are beyond float16"
        )


def _parts(model: PreTrainedModel, layer: int) -> dict[str, nn.Module]:
    parts = {f"layer {layer}": decoder_layer(model, layer)}
    embeddings = model.get_input_embeddings()
    return parts if embeddings is None else parts | {"embeddings": embeddings}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that `module` holds, without those of PEFT's adapters, by name."""
    adapters = set()
    for path, part in module.named_modules():
        for name in getattr(part, "adapter_layer_names", ()) if hasattr(part, "base_layer") else ():
            adapters.add(f"{path}.{name}" if path else name)
    for path, part in module.named_modules():
        if any(path == adapter or path.startswith(f"{adapter}.") for adapter in adapters):
            continue
        plain = ".".join(step for step in path.split(".") if step not in ("", "base_layer"))
        for i, tensor in enumerate(plain_tensors(part)):
            yield f"{plain}.{i}", tensor


@torch.no_grad()
def _digests(module: nn.Module) -> dict[str, str] | None:
    tensors = sorted(_tensors(module), key=lambda named: named[0])
    if any(tensor.is_meta for _, tensor in tensors):
        return None
    samples = []
    for _, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        # An odd step meets every column of a matrix.
        samples.append(flat[:: max(1, len(flat) // SAMPLED) | 1].cpu())
    digests = {"tensors": fingerprint([[name, [*tensor.shape]] for name, tensor in tensors])}
    if all(sample.dtype in (*_DTYPES.values(), torch.float64) for sample in samples):
        for name, dtype in _DTYPES.items():
            digests[name] = fingerprint(*(sample.to(dtype) for sample in samples))
    else:
        digests[STORED] = fingerprint(*samples)
    return digests
