"""A language model is told from others of its shape, and only from those."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from tiny import BANK, make_encoder, make_language_model, make_tokenizer, saved_editor
from torch import nn

from meg_kernels import MeGEditor, attach
from meg_kernels.nn.families import language_model
from meg_kernels.nn.identity import check_finite, compare, identity

LAYER = 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_editor(tmp_path_factory, "edited", BANK)


def loaded(folder, change=lambda model: model):
    tokenizer = make_tokenizer()
    return MeGEditor.from_pretrained(folder, change(make_language_model(tokenizer)), tokenizer)


@pytest.mark.filterwarnings("error")
def test_edits_are_loaded_without_a_word_also_in_a_coarser_type(saved):
    assert loaded(saved).model.dtype == torch.float32
    assert loaded(saved, lambda model: model.to(torch.bfloat16)).model.dtype == torch.bfloat16


def test_one_warning_says_that_a_model_cannot_be_told_from_others(saved):
    def stored_otherwise(model):
        weight = model.model.layers[LAYER].self_attn.q_proj.weight
        weight.data = weight.data.to(torch.float8_e4m3fn)
        return model

    with pytest.warns(UserWarning) as warned:
        loaded(saved, stored_otherwise)
    assert len(warned) == 1
    assert re.search(r"cannot be told from the weights of its layer 1", str(warned[0].message))


def test_a_model_that_is_refused_is_left_as_it_was(saved):
    tokenizer = make_tokenizer()
    model = make_language_model(tokenizer)
    with torch.no_grad():
        model.model.layers[LAYER].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"these edits are for another .* layer 1 are others"):
        MeGEditor.from_pretrained(saved, model, tokenizer)
    with pytest.raises(ValueError, match="neither a padding token"):
        bare = make_tokenizer()
        bare.pad_token = bare.eos_token = None
        MeGEditor(model, bare, make_encoder(), BANK)
    with pytest.raises(OSError, match="cannot load the encoder"):
        MeGEditor(model, tokenizer, "./absent", BANK)
    attach(model, LAYER).detach()


FAMILIES = ["llama", "gpt2", "opt", "gemma2", "phi", "qwen3"]


def dtype_of(model) -> str:
    return str(model.dtype).removeprefix("torch.")


def compared(noted, found, layer: int = LAYER):
    return compare(identity(noted, layer), dtype_of(noted), identity(found, layer), dtype_of(found))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_itself_and_its_copy(tiny_model, family):
    result = compared(tiny_model(family), copy.deepcopy(tiny_model(family)))
    assert result.different == result.unknown == ()


def test_an_identity_is_json_and_keeps_what_told_shapes_apart(tiny_model):
    found = identity(tiny_model("llama"), LAYER)
    assert json.loads(json.dumps(found)) == found
    assert {name: found[name] for name in list(found)[:5]} == {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "vocab_size": 67,
        "layer": LAYER,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_itself_in_another_data_type(tiny_model, dtype, other):
    result = compared(tiny_model("llama").to(dtype), tiny_model("llama").to(other))
    # Of two 16-bit types, neither holds what the other rounded away.
    unsure = {dtype, other} == {torch.bfloat16, torch.float16}
    assert result.different == ()
    assert bool(result.unknown) == unsure


def test_what_was_rounded_once_is_known_in_both_16_bit_types(tiny_model):
    rounded = tiny_model("llama").to(torch.bfloat16)
    result = compared(rounded, copy.deepcopy(rounded).to(torch.float16))
    assert result.different == result.unknown == ()


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("trained", "part"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layer 1"),
        ("model.layers.1.self_attn.q_proj.weight", "layer 1"),
        ("model.embed_tokens.weight", "embeddings"),
    ],
)
def test_a_model_that_was_trained_further_is_another(tiny_model, own, dtype, trained, part):
    model, further = tiny_model("llama").to(own), tiny_model("llama").to(dtype)
    weight = further.get_parameter(trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=generator).to(dtype))
    assert compared(model, further).different == (f"the weights of its {part} are others",)


def test_every_column_of_a_large_matrix_is_looked_at(tiny_model):
    large = {"intermediate_size": 1024}
    for column in (1, 2, 3):
        model = tiny_model("llama", **large)
        with torch.no_grad():
            model.model.layers[LAYER].mlp.down_proj.weight[:, column::4] += 1
        different = compared(tiny_model("llama", **large), model).different
        assert different == ("the weights of its layer 1 are others",)


def test_another_shape_and_another_layer_are_named(tiny_model):
    deeper = tiny_model("llama", num_hidden_layers=4)
    assert compared(tiny_model("llama"), deeper).different == ("num_hidden_layers is 4, not 3",)
    model = tiny_model("llama")
    noted, found = identity(model, 1), identity(model, 2)
    assert compare(noted, "float32", found, "float32").different == ("layer is 2, not 1",)


def test_an_adapter_around_a_model_leaves_it_the_same(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj", "q_proj", "embed_tokens"], r=2)
    adapted = language_model(peft.get_peft_model(tiny_model("llama"), config))
    result = compared(tiny_model("llama"), adapted)
    assert result.different == result.unknown == ()


def test_an_offloaded_model_is_the_same(tiny_model):
    accelerate = pytest.importorskip("accelerate")
    result = compared(tiny_model("llama"), accelerate.cpu_offload(tiny_model("llama")))
    assert result.different == result.unknown == ()


def test_nothing_is_said_of_weights_that_are_stored_otherwise(tiny_model):
    plain, quantised = tiny_model("llama"), tiny_model("llama")
    mlp = quantised.model.layers[LAYER].mlp
    stored = nn.Parameter((mlp.down_proj.weight * 100).to(torch.int8), requires_grad=False)
    mlp.down_proj.weight = stored
    assert compared(plain, quantised) == compared(quantised, plain)
    result = compared(plain, quantised)
    assert (result.different, result.unknown) == ((), ("layer 1",))
    result = compared(quantised, copy.deepcopy(quantised))
    assert result.different == result.unknown == ()


def test_nothing_is_said_of_weights_that_are_not_there_or_were_not_noted(tiny_model):
    model = tiny_model("llama")
    absent = compared(model, tiny_model("llama").to("meta"))
    assert (absent.different, absent.unknown) == ((), ("layer 1", "embeddings"))
    noted = {name: value for name, value in identity(model, LAYER).items() if name != "weights"}
    earlier = compare(noted, "float32", identity(model, LAYER), "float32")
    assert (earlier.different, earlier.unknown) == ((), ("layer 1", "embeddings"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_weights_pass(tiny_model, dtype):
    check_finite(tiny_model("llama").to(dtype), LAYER)
    check_finite(tiny_model("gpt2").to(dtype), LAYER)


def test_weights_that_are_not_there_are_not_called_infinite(tiny_model):
    check_finite(tiny_model("llama").to("meta"), LAYER)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_by_its_part(tiny_model, value):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[LAYER].mlp.c_fc.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"^the model has NaN or infinite weights in layer 1: mlp"):
        check_finite(model, LAYER)
    check_finite(model, LAYER + 1)
