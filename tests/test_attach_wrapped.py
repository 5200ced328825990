"""Neurons in models that others have changed: adapters, hooks, quantised weights, compilers.

The oracle is a hook on the same model that adds the definition, in float64.
"""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
import transformers
from torch import nn

from meg_kernels.editing.collect import collect
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.neuron import Neurons
from meg_kernels.nn import LowerLayers, attach, input_of
from meg_kernels.nn.families import decoder_layers, feed_forward

WIDTH, LAYERS, LAYER = 32, 3, 1
INDEX = torch.tensor([2, -1, 0, 1])
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
STRONG = 0.1
KINDS = ["llama", "gpt2", "opt"]  # a gated block, Conv1Ds, two projections without a block


@pytest.fixture
def ids():
    return torch.randint(2, 67, (4, 6), generator=torch.Generator().manual_seed(1))


def strong_neurons(layout, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key = 0.5 * torch.randn(count, WIDTH, generator=generator)
    bias = 1 + torch.rand(count, generator=generator) if layout.has_bias else None
    value = 2 * torch.randn(count, WIDTH, generator=generator)
    return Neurons(key, bias, value, layout.activation)


ACTIVATIONS = {
    "identity": lambda x: x,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
PLACES = {"opt": ("fc1", "fc2")}
if transformers.__version__.startswith("4."):
    PLACES["mixtral"] = ("block_sparse_moe", "block_sparse_moe")


@contextlib.contextmanager
def defined(base, neurons, index=INDEX, layer=LAYER):
    """Inside, the layer's FFN computes FFN(x) + act(x . key + bias) * value."""
    block = decoder_layers(base)[layer]
    entry, exit_ = (getattr(block, n) for n in PLACES.get(base.config.model_type, ("mlp", "mlp")))
    read = []

    def add(module, args, output):
        y = output if isinstance(output, torch.Tensor) else output[0]
        x = read[-1].reshape(len(index), -1, WIDTH).double()
        added = torch.zeros_like(x)
        for row, i in enumerate(index.tolist()):
            if i >= 0:
                inner = x[row] @ neurons.key[i].double()
                inner = inner if neurons.bias is None else inner + neurons.bias[i].double()
                hidden = ACTIVATIONS[neurons.activation](inner)
                added[row] = torch.outer(hidden, neurons.value[i].double())
        y = (y.double() + added.reshape(y.shape)).to(y.dtype)
        return y if isinstance(output, torch.Tensor) else (y, *output[1:])

    def note(module, args, kwargs):
        read.append((args or tuple(kwargs.values()))[0].detach())

    hooks = [
        entry.register_forward_pre_hook(note, with_kwargs=True),
        exit_.register_forward_hook(add),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def assert_carries(model, ids, given=None, tolerance=TOLERANCE, experts=False):
    """`model` with neurons says what `given`, the same model otherwise, says by definition."""
    attached = attach(model if given is None else given, LAYER)
    plain = model(ids).logits
    neurons = strong_neurons(attached.layout)
    with attached.neurons(neurons, INDEX):
        carried = model(ids).logits
    assert torch.equal(model(ids).logits, plain)
    attached.detach()
    with defined(attached.model, neurons):
        expected = model(ids).logits
    assert torch.equal(model(ids).logits, plain)
    torch.testing.assert_close(carried, expected, **tolerance)
    # An expert multiplies the tokens of all rows at once: how many those are may round otherwise.
    alike = TOLERANCE if experts else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(carried[1], plain[1], **alike)
    for row in (0, 2, 3):
        assert (expected[row] - plain[row]).abs().max() > STRONG
    return attached


# ---- a mixture of experts, a headless model, an image-text model ------------------------------


def mixtral(vocab_size=67):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return loud(transformers.MixtralForCausalLM(config))


def loud(model):
    """As initialised, a model of this width says the same whatever it reads."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / WIDTH**0.5)
    return model.eval().requires_grad_(False)


def test_a_mixture_of_experts_carries_linear_neurons(ids):
    attached = assert_carries(mixtral(), ids, experts=True)
    assert attached.layout.activation == "identity" and not attached.layout.has_bias


def test_a_model_without_an_output_layer_carries_neurons(tiny_model, ids):
    model = tiny_model("llama").model
    assert type(model).__name__ == "LlamaModel"
    attached = attach(model, LAYER)
    neurons = strong_neurons(attached.layout)
    with attached.neurons(neurons, INDEX):
        carried = model(ids).last_hidden_state
    with defined(model, neurons):
        expected = model(ids).last_hidden_state
    torch.testing.assert_close(carried, expected, **TOLERANCE)


# ---- PEFT -------------------------------------------------------------------------------------


def lora(model, *targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).eval()


TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc2"]}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("which", [0, 1])
def test_a_peft_model_with_a_lora_anywhere_carries_neurons(tiny_model, ids, name, which):
    model = lora(tiny_model(name), TARGETS[name][which])
    attached = assert_carries(model, ids)
    assert attached.model is model.get_base_model()
    assert attached.layout == attach(tiny_model(name), LAYER).layout


def test_peft_may_come_after_the_neurons(tiny_model, ids):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    adapted = lora(model, "down_proj")
    neurons = strong_neurons(attached.layout)
    with attached.neurons(neurons, INDEX):
        carried = adapted(ids).logits
        sequences = adapted.generate(input_ids=ids, max_new_tokens=2, num_beams=2)
    with defined(model, neurons):
        torch.testing.assert_close(carried, adapted(ids).logits, **TOLERANCE)
    assert sequences.shape == (4, 8)


def test_a_learnt_prompt_is_refused(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match=r"adapter that learns a prompt.* with a LoRA instead"):
        attach(model, LAYER)


# ---- hooks, parametrisations, accelerate ------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_others_see_the_ffn_with_its_neurons(tiny_model, ids, late):
    model, seen = tiny_model("llama"), []
    block = decoder_layers(model)[LAYER].mlp

    def register():
        block.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        block.register_forward_hook(lambda module, args, output: seen.append(output))

    if not late:
        register()
    attached = attach(model, LAYER)
    if late:
        register()
    neurons = strong_neurons(attached.layout)
    with attached.neurons(neurons, INDEX):
        carried = model(ids).logits
    with defined(model, neurons):
        torch.testing.assert_close(carried, model(ids).logits, **TOLERANCE)
    assert len(seen) == 2 and (seen[0] - seen[1])[0].abs().max() > STRONG


@pytest.mark.parametrize("name", KINDS)
def test_a_parametrised_projection_carries_neurons(tiny_model, ids, name):
    model = tiny_model(name)
    projection = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}[name]
    part = decoder_layers(model)[LAYER].get_submodule(projection)
    nn.utils.parametrize.register_parametrization(part, "weight", nn.Tanh())
    assert_carries(model, ids)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_weights_that_accelerate_offloads_are_no_matter(tiny_model, ids, name, late):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(name)
    attached = attach(model, LAYER) if late else None
    expected = model(ids).logits
    accelerate.cpu_offload(model, torch.device("cpu"))
    weights = feed_forward(model, LAYER).weights()
    assert not any(weight.is_meta for weight in weights)
    assert next(decoder_layers(model)[LAYER].parameters()).is_meta
    if attached is None:
        attached = attach(model, LAYER)
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
    neurons = strong_neurons(attached.layout)
    with attached.neurons(neurons, INDEX):
        carried = model(ids).logits
    accelerate.hooks.remove_hook_from_submodules(model)
    plain = tiny_model(name)
    with defined(plain, neurons):
        torch.testing.assert_close(carried, plain(ids).logits, **TOLERANCE)
    attached.detach()


@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_device_map_auto_spreads_over_memory_and_disk_carries_neurons(
    tiny_model, ids, tmp_path, name
):
    pytest.importorskip("accelerate")
    plain = tiny_model(name)
    plain.save_pretrained(tmp_path)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": int(0.8 * weights)},
        offload_folder=tmp_path / "offloaded",
        dtype=torch.float32,
    ).eval()
    first, second, _ = decoder_layers(model)
    assert not next(first.parameters()).is_meta and next(second.parameters()).is_meta
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **TOLERANCE)
    attached = assert_carries(model, ids)
    assert attached.layout == attach(plain, LAYER).layout
    stored = feed_forward(plain, LAYER).weights()
    assert all(map(torch.equal, feed_forward(model, LAYER).weights(), stored))


# ---- torch.compile ----------------------------------------------------------------------------


def compiled(model, way):
    if way == "torch.compile(model)":
        return torch.compile(model, backend="eager")
    if way == "model.compile()":
        model.compile(backend="eager")
    elif way == "each layer":
        for layer in decoder_layers(model):
            layer.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "name, way, before",
    [
        ("llama", "torch.compile(model)", True),
        ("llama", "model.compile()", False),
        ("llama", "each layer", True),
        ("opt", "model.compile()", True),
        ("opt", "each layer", True),
        ("opt", "each layer", False),
    ],
)
def test_compiled_models_follow_every_change_of_the_neurons(tiny_model, ids, name, way, before):
    torch.compiler.reset()
    plain, model = tiny_model(name), tiny_model(name)
    expected = plain(ids).logits
    if before:
        fast = compiled(model, way)
        torch.testing.assert_close(fast(ids).logits, expected, **TOLERANCE)
        attached = attach(fast, LAYER)
    else:
        attached = attach(model, LAYER)
        fast = compiled(model, way)
    torch.testing.assert_close(fast(ids).logits, expected, **TOLERANCE)
    for seed in (0, 1):
        neurons = strong_neurons(attached.layout, seed=seed)
        with attached.neurons(neurons, INDEX):
            carried = fast(ids).logits
        with defined(plain, neurons):
            torch.testing.assert_close(carried, plain(ids).logits, **TOLERANCE)
        torch.testing.assert_close(fast(ids).logits, expected, **TOLERANCE)
    attached.detach()
    torch.testing.assert_close(fast(ids).logits, expected, **TOLERANCE)


def test_neurons_break_no_graph(tiny_model, ids):
    torch.compiler.reset()
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    neurons = strong_neurons(attached.layout)
    fast = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), attached.neurons(neurons, INDEX):
        torch.testing.assert_close(
            fast(ids, use_cache=False)[0], model.model(ids, use_cache=False)[0], **TOLERANCE
        )


def test_a_compiled_models_lower_layers_are_skipped(tiny_model, ids):
    torch.compiler.reset()
    model = tiny_model("llama")
    model.compile(backend="eager")
    expected = model(ids).logits
    lower = LowerLayers(model, LAYER)
    hidden = lower.run(input_ids=ids)
    known = lower.outputs(hidden, input_ids=ids)
    assert lower.skips
    with lower.replaced_by(hidden, known):
        torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
    torch.testing.assert_close(
        input_of(decoder_layers(model)[0], model, {"input_ids": ids}),
        model.get_input_embeddings()(ids),
    )
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)


# ---- quantised weights ------------------------------------------------------------------------


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto_int8(model):
    quanto = pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def bitsandbytes(model, make):
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    for layer in decoder_layers(model):
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            setattr(layer.mlp, name, make(bnb, linear))
    return model


def bitsandbytes_int8(model):
    def make(bnb, linear):
        inner = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        inner.load_state_dict(linear.state_dict())
        return inner.to("cpu")

    return bitsandbytes(model, make)


def bitsandbytes_4bit(model):
    def make(bnb, linear):
        inner = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4"
        )
        inner.load_state_dict(linear.state_dict())
        return inner.to("cpu")

    return bitsandbytes(model, make)


QUANTISED = [torchao_int8, quanto_int8, bitsandbytes_int8, bitsandbytes_4bit]


@pytest.mark.parametrize("quantise", QUANTISED)
def test_quantised_models_carry_neurons_beside_what_they_compute(tiny_model, ids, quantise):
    model = quantise(tiny_model("llama"))
    layout = assert_carries(model, ids).layout
    assert layout == feed_forward(tiny_model("llama"), LAYER).layout


@pytest.mark.parametrize("quantise", QUANTISED)
def test_quantised_weights_tell_models_apart(tiny_model, quantise):
    model = quantise(tiny_model("llama"))
    other = tiny_model("llama")
    with torch.no_grad():
        decoder_layers(other)[LAYER].mlp.down_proj.weight[0, 0] *= 3
    first, second = (feed_forward(m, LAYER).weights() for m in (model, quantise(other)))
    again = feed_forward(quantise(tiny_model("llama")), LAYER).weights()
    assert all(type(weight) is torch.Tensor for weight in first)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, second))


# ---- collection -------------------------------------------------------------------------------


def offloaded(model):
    return pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def eagerly_compiled(model):
    torch.compiler.reset()
    return compiled(model, "model.compile()")


def with_lora(model):
    return lora(model, "down_proj")


COLLECTED = [*QUANTISED, offloaded, eagerly_compiled, with_lora]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.mark.parametrize("change", COLLECTED)
def test_neurons_are_fitted_for_changed_models_too(tiny_model, tokenizer, change):
    plain = tiny_model("llama", vocab_size=len(tokenizer))
    assert_fits(change(tiny.make_model(plain, tokenizer)), tokenizer)


def test_neurons_are_fitted_for_a_mixture_of_experts(tokenizer):
    assert_fits(tiny.make_model(mixtral(vocab_size=len(tokenizer)), tokenizer), tokenizer)


def assert_fits(model, tokenizer):
    config = CollectionConfig(learning_rate=0.1, max_steps=200)
    attached = attach(model, LAYER)
    prompted = PromptedModel.of(attached.model, tokenizer)
    fitted = collect(prompted, attached, tiny.FACTS[:4], config)
    assert fitted.learnt.all() and (fitted.steps > 5).all()


def test_a_model_without_an_output_layer_is_told_what_is_missing(tiny_model, tokenizer):
    attached = attach(tiny_model("llama", vocab_size=len(tokenizer)).model, LAYER)
    with pytest.raises(ValueError, match=r"LlamaModel has no output layer.*AutoModelForCausalLM"):
        collect(PromptedModel.of(attached.model, tokenizer), attached, tiny.FACTS[:1])


def test_an_index_may_be_a_list(tiny_model, ids):
    model = tiny_model("llama")
    attached = attach(model, LAYER)
    neurons = strong_neurons(attached.layout)
    with attached.neurons(neurons, INDEX.tolist()):
        carried = model(ids).logits
    with defined(model, neurons):
        torch.testing.assert_close(carried, model(ids).logits, **TOLERANCE)


def test_repr_says_where_and_what(tiny_model):
    attached = attach(tiny_model("llama"), LAYER)
    assert repr(attached) == "Attached(LlamaForCausalLM, layer=1, no neurons)"
    with attached.neurons(strong_neurons(attached.layout)):
        assert repr(attached) == "Attached(LlamaForCausalLM, layer=1, 3 neurons)"
    attached.detach()
    assert repr(attached) == "Attached(LlamaForCausalLM, layer=1, detached)"
