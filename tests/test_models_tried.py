"""Every model type that docs/models.md lists carries neurons, as the definition has it."""

from __future__ import annotations

import re

import pytest
import transformers
from torch import nn

from benchmarks.models_tried import PAGE, listed, model_types, try_type
from meg_kernels import attach
from meg_kernels.nn.families import decoder_layers

LISTED = listed(PAGE)
MADE_WITH = re.search(r"with transformers (\d+)\.", PAGE.read_text())[1]
# Another major version builds some types in other ways, and names some blocks otherwise.
SAME_MAJOR = transformers.__version__.split(".")[0] == MADE_WITH


def test_the_page_lists_more_than_the_45_types_that_were_asked_for():
    assert len(LISTED) >= 150


@pytest.mark.parametrize("model_type", LISTED)
def test_the_neurons_of_a_listed_model_type_are_those_of_the_definition(model_type):
    if model_type not in model_types():
        pytest.skip(f"transformers {transformers.__version__} does not know it")
    tried = try_type(model_type)
    if not SAME_MAJOR and tried.reason.startswith("not tried: "):
        pytest.skip(f"with transformers {transformers.__version__} {tried.reason}")
    assert tried.carries, tried.reason
    where, neuron = LISTED[model_type]
    assert tried.neuron == neuron and (tried.where == where or not SAME_MAJOR)


def test_a_model_without_feed_forward_layers_is_refused_with_what_it_has():
    tried = try_type("mamba")
    assert not tried.carries
    assert "layers of class MambaBlock that hold norm, mixer" in tried.reason
    assert "meg_kernels.nn.families.EXCEPTIONS" in tried.reason


def test_a_layer_of_a_hybrid_model_that_has_no_ffn_is_refused_and_others_are_named():
    config = transformers.NemotronHConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
    )
    model = transformers.NemotronHForCausalLM(config)
    assert len(decoder_layers(model)) == 4
    with pytest.raises(ValueError, match=r"layer 2 has no feed-forward.*one of the layers 1, 3"):
        attach(model, 2)
    attach(model, 3)


def test_a_wrong_model_or_layer_is_refused_by_type(tiny_model):
    with pytest.raises(TypeError, match="layer is 'mlp'; it must be the number of a decoder layer"):
        attach(tiny_model("llama"), "mlp")
    with pytest.raises(TypeError, match="model is a Linear; it must be a transformers PreTrained"):
        attach(nn.Linear(2, 2), 0)
