"""Which of transformers' causal language models carry neurons: each is built tiny and tried.

    python -m benchmarks.models_tried            # writes docs/models.md

For each model type a random model of few layers is built from a small config, in float64. One
batch runs with a neuron for some of its rows, and the logits are compared with those of the same
model whose FFN computes the definition, FFN(x) + act(x . key + bias) * value, in plain PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.nn import LowerLayers, attach
from meg_kernels.nn.families import decoder_layers, feed_forward
from meg_kernels.nn.partial import last_feed_forward_sees

WIDTH, DEPTH, VOCABULARY = 32, 3, 67
LARGEST = 8_000_000  # parameters; what no small config makes smaller is not tried
# Roundings of some layers, in logits of size 1 to 100; neurons move them by more than STRONG.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}
STRONG = 1e-2

# Each config takes those of these that it knows.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "dim_model", "emb_dim", "embed_dim"), WIDTH
    ),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48
    ),
    **dict.fromkeys(("dim_ff", "dff", "ffn_hidden_size", "d_inner", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "expert_ffn_hidden_size": 16,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), DEPTH),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "depth"), DEPTH),
    "encoder_layers": 1,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 64),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "first_k_dense_replace": 1,
    "rotary_dim": 4,
    "sliding_window": 5,
    **dict.fromkeys(("mamba_d_state", "state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "linear_num_value_heads"), 4),
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("image_size", "patch_size"), 16),
}
# What some configs need besides, so that a small model of this type can be built and run.
_MROPE = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
ALSO: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * DEPTH},
    "gpt_neo": {"attention_types": [[["global"], DEPTH]]},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local"] * DEPTH,
        "local_attn_chunk_length": 2,
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "roc_bert": {"pronunciation_vocab_size": 10, "shape_vocab_size": 10},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 6},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Tried:
    """What became of one model type.

    Args:
        model_type: of the config.
        model_class: name of the model's class.
        carries: whether it carries neurons, as the definition has it.
        where: the FFN's place in a decoder layer.
        neuron: the neuron's activation, and whether it has a bias.
        skips: whether collection starts at the edited layer (else the whole model runs).
        reason: why it was refused, or why it could not be tried.
    """

    model_type: str
    model_class: str
    carries: bool
    where: str = ""
    neuron: str = ""
    skips: bool = False
    reason: str = ""


def model_types() -> dict[str, str]:
    """Class name of each model type that can be tried."""
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return {
        model_type: name if isinstance(name, str) else name[0]
        for model_type, name in sorted(names.items())
    }


def small_config(kind: type, also: dict[str, Any] | None = None) -> transformers.PretrainedConfig:
    """A config of this class for a model of few, narrow layers."""
    default = kind()
    known = {*default.to_dict(), *vars(default), *getattr(kind, "attribute_map", {})}
    values = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has as many keys as queries
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        own = getattr(default, name, None)
        if own is not None:
            values[name] = small_config(type(own) if part is transformers.AutoConfig else part)
    also = dict(also or {})
    for name, inner in [(n, v) for n, v in also.items() if n.endswith("_config")]:
        for key, value in inner.items():
            setattr(values[name], key, value)
        del also[name]
    return kind(**{**values, **also})


def build(model_type: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A tiny random model of this type on the CPU.

    Raises:
        ValueError: it cannot be made small.
        Exception: whatever transformers raises where the config does not fit.
    """
    kind = getattr(transformers, model_types()[model_type])
    config_class = CONFIG_MAPPING[model_type]
    if not issubclass(config_class, kind.config_class):
        config_class = kind.config_class
    config = small_config(config_class, ALSO.get(model_type))
    config._experts_implementation = "eager"  # the others take no float64
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the smallest model tried has {size / 1e6:.0f} million parameters")
    model = kind(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # as initialised, all inputs give the same logits
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / WIDTH**0.5)
        else:
            parameter.add_(0.1 * noise)
    return model


ACTIVATIONS = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


@contextlib.contextmanager
def defined(model: nn.Module, layer: int, neurons: Neurons, index: Tensor) -> Iterator[None]:
    """Inside, FFN `layer` of `model` computes the definition, in plain PyTorch."""
    ffn = feed_forward(model, layer)
    read: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        read[:] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:1]

    def add(module: nn.Module, args: tuple, output: Any) -> Any:
        y, x = (output if isinstance(output, Tensor) else output[0]), read[0]
        rows = x.reshape(len(index), -1, x.shape[-1])
        added = torch.zeros_like(y).reshape(len(index), -1, y.shape[-1])
        for row, i in enumerate(index.tolist()):
            if i >= 0:
                inner = rows[row] @ neurons.key[i]
                if neurons.bias is not None:
                    inner = inner + neurons.bias[i]
                added[row] = torch.outer(ACTIVATIONS[neurons.activation](inner), neurons.value[i])
        y = y + added.reshape(y.shape)
        return y if isinstance(output, Tensor) else type(output)([y, *output[1:]])

    hooks = [
        ffn.entry.register_forward_pre_hook(note, with_kwargs=True),
        ffn.exit.register_forward_hook(add),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def strong_neurons(layout: NeuronLayout, count: int = 2) -> Neurons:
    """Random neurons that change what the model says."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bias = random(count).abs() if layout.has_bias else None
    value = 2 * random(count, layout.d_out)
    return Neurons(random(count, layout.d_in), bias, value, layout.activation)


@torch.no_grad()
def try_type(model_type: str) -> Tried:
    """Build a model of this type and compare its neurons with the definition.

    Raises:
        AssertionError: the neurons are not what the definition says, or something is left behind.
    """
    name = model_types()[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(2))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        dtype, refusals = torch.float64, []
        while True:  # in float64 if it can: some parts of some models are written for float32
            try:
                model = build(model_type, dtype)
                plain = model(**inputs, use_cache=False).logits
                if plain.isfinite().all():
                    break
                refusals.append("its logits are not finite")
            except Exception as error:
                refusals.append(" ".join(str(error).split())[:150])
            if dtype == torch.float32:
                return Tried(model_type, name, False, reason=f"not tried: {refusals[0]}")
            dtype = torch.float32
        try:
            layers = len(decoder_layers(model))
            carrying = [layer for layer in range(layers) if _has_ffn(model, layer)]
            layer = carrying[len(carrying) // 2]
            attached = attach(model, layer)
        except ValueError as error:
            return Tried(model_type, name, False, reason=str(error))
        ffn = attached.ffn
        neurons, index = strong_neurons(attached.layout).to(dtype), torch.tensor([1, -1, 0])
        with attached.neurons(neurons, index):
            carried = model(**inputs, use_cache=False).logits
        unmounted = model(**inputs, use_cache=False).logits
        lower = LowerLayers(model, layer)
        hidden = lower.run(**inputs)
        outputs = lower.outputs(hidden, **inputs)
        with lower.replaced_by(hidden, outputs), attached.neurons(neurons, index):
            collected = model(**inputs, use_cache=False).logits
        attached.detach()
        detached = model(**inputs, use_cache=False).logits
        with defined(model, layer, neurons, index):
            expected = model(**inputs, use_cache=False).logits
        with last_feed_forward_sees(model, 2):
            last = model(**inputs, use_cache=False).logits
    close = functools.partial(torch.testing.assert_close, **TOLERANCE[dtype])
    assert (expected - plain).abs().max() > STRONG
    close(carried, expected)
    # In a mixture of experts other rows decide with which ones a row's product is computed.
    close(carried[1], plain[1])
    close(unmounted, plain)
    close(detached, plain)
    close(collected, expected)
    # Some routers compute in float32 whatever the model's dtype.
    torch.testing.assert_close(last[:, -2:], plain[:, -2:], **TOLERANCE[torch.float32])
    where = f"`{ffn.reads}`" if ffn.is_block else f"`{ffn.reads}` to `{ffn.writes}`"
    layout = attached.layout
    neuron = f"{layout.activation}, bias" if layout.has_bias else layout.activation
    return Tried(model_type, name, True, where, neuron, bool(lower.skips))


def _has_ffn(model: nn.Module, layer: int) -> bool:
    with contextlib.suppress(ValueError):
        feed_forward(model, layer)
        return True
    return False


INTRODUCTION = """# Models that carry neurons

Made by `python -m benchmarks.models_tried` with transformers {version}. Every causal language
model and every image-text model that can be built from a small config is built tiny, with random
weights, in float64 (in float32 where its code asks for that). A neuron is mounted on one of its
feed-forward layers (FFN) for some rows of a batch, and the logits are compared with those of the
definition, FFN(x) + act(x . key + bias) * value, computed in plain PyTorch.

**{carrying} model types carry neurons**; {refused} are refused, and {untried} could not be tried:
an image-text model may insist on an image, or a config on sizes that no general rule gives.
`attach` finds the FFN of such a model by the same rules, and says so if it finds none.

*FFN*: what in a decoder layer carries the neuron: a block, or the first and the last of two
projections that have no block around them. *Neuron*: its activation; gated FFNs and mixtures of
experts have linear neurons without bias. *Collection*: whether fitting neurons starts at the edited
layer, or runs the whole model at each step because the model passes more than hidden states from
layer to layer.
"""


def table(tried: list[Tried]) -> str:
    """The page docs/models.md."""
    carrying = [one for one in tried if one.carries]
    untried = [one for one in tried if one.reason.startswith("not tried: ")]
    refused = [one for one in tried if not one.carries and one not in untried]
    lines = INTRODUCTION.format(
        version=transformers.__version__,
        carrying=len(carrying),
        refused=len(refused),
        untried=len(untried),
    ).splitlines()
    lines += ["", "## Carry neurons", "", "| model type | class | FFN | neuron | collection |"]
    lines += ["|---|---|---|---|---|"]
    for one in carrying:
        collection = "from the layer" if one.skips else "whole model"
        lines.append(
            f"| {one.model_type} | {one.model_class} | {one.where} | {one.neuron} | {collection} |"
        )
    for title, some in (("Refused", refused), ("Not tried", untried)):
        lines += ["", f"## {title}", "", "| model type | class | reason |", "|---|---|---|"]
        for one in some:
            reason = one.reason.removeprefix("not tried: ").replace("|", "\\|")
            lines.append(f"| {one.model_type} | {one.model_class} | {reason} |")
    return "\n".join(lines) + "\n"


def listed(page: Path) -> dict[str, tuple[str, str]]:
    """The FFN and the neuron of each model type that this page says carries neurons."""
    text = page.read_text().split("## Carry neurons")[1].split("## Refused")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: (row[2], row[3]) for row in rows[1:]}


PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def main() -> None:
    """Try every model type and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tried = []
    for model_type in model_types():
        try:
            tried.append(try_type(model_type))
        except Exception as error:  # to go on with the others; the page must not be written
            print(f"{model_type}: {type(error).__name__}: {error}")
            tried.append(None)
    if None in tried:
        raise SystemExit("some models do not carry neurons as the definition has it")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(table(tried))


if __name__ == "__main__":
    main()
