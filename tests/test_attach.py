"""Attached neurons against models whose feed-forward layer was really built one neuron wider.

The oracle answers one query at a time, without padding, with a model of its own for each neuron.
"""

from __future__ import annotations

import copy
import gc
import inspect

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.nn import LowerLayers, attach, input_of, last_feed_forward_sees
from meg_kernels.nn.families import decoder_layers, feed_forward

# Where each family keeps its decoder layers, and the two projections of a plain FFN in a layer.
PLAIN = {
    "gpt2": ("transformer.h", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gptj": ("transformer.h", "mlp.fc_in", "mlp.fc_out"),
    "opt": ("model.decoder.layers", "fc1", "fc2"),
    "phi": ("model.layers", "mlp.fc1", "mlp.fc2"),
}
GATED = ["gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3", "smollm3"]
FAMILY_NAMES = sorted([*PLAIN, *GATED])
WIDTH, LAYERS, LAYER = 32, 3, 1
LENGTHS = [5, 3, 7, 4]  # of the four queries
INDEX = torch.tensor([2, -1, 0, 1])  # their neurons
NEW_TOKENS = 5
# Logits are of size 1 to 10 and come through three layers of sums over at most 48 products, whose
# order padding and batching change: a few hundred roundings of float32.
TOLERANCE = {"rtol": 300 * torch.finfo(torch.float32).eps, "atol": 3e-5}
STRONG = 0.1  # how far a neuron must move some logit for a test to mean anything


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    return request.param


@pytest.fixture
def model(family, tiny_model):
    return tiny_model(family)


def strong_neurons(model, count=3, seed=0, activation=None):
    """Neurons that most tokens wake, and that push the residual stream far."""
    layout = expected_layout(model)
    generator = torch.Generator().manual_seed(seed)
    key = 0.5 * torch.randn(count, WIDTH, generator=generator)
    bias = 1 + torch.rand(count, generator=generator) if layout.has_bias else None
    value = 2 * torch.randn(count, WIDTH, generator=generator)
    return Neurons(key, bias, value, activation or layout.activation)


def expected_layout(model):
    name = model.config.model_type
    activation = {"gpt_neox": "gelu", "opt": "relu"}.get(
        name, "gelu_tanh" if name in PLAIN else "identity"
    )
    return NeuronLayout(WIDTH, WIDTH, name in PLAIN, activation)


class GatedFeedForwardOneWider(nn.Module):
    """A gated FFN whose output projection has one input column more, fed with x . key."""

    def __init__(self, mlp, key, value):
        super().__init__()
        self.mlp, self.key = mlp, key
        self.down = one_input_wider(mlp.down_proj, value)

    def forward(self, x):
        hidden = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        return self.down(torch.cat([hidden, (x @ self.key)[..., None]], dim=-1))


def one_input_wider(projection, value):
    """Another projection whose last input column is `value`; gradients flow through to it."""
    if isinstance(projection, Conv1D):
        wider = Conv1D(projection.nf, projection.nx + 1)
        weight = torch.cat([projection.weight, value[None]], dim=0)
    else:
        wider = nn.Linear(projection.in_features + 1, projection.out_features)
        weight = torch.cat([projection.weight, value[:, None]], dim=1)
    return with_tensors(wider, weight, projection.bias)


def one_output_wider(projection, key, bias):
    """Another projection whose last output row is `key`, with that bias."""
    if isinstance(projection, Conv1D):
        wider = Conv1D(projection.nf + 1, projection.nx)
        weight = torch.cat([projection.weight, key[:, None]], dim=1)
    else:
        wider = nn.Linear(projection.in_features, projection.out_features + 1)
        weight = torch.cat([projection.weight, key[None]], dim=0)
    return with_tensors(wider, weight, torch.cat([projection.bias, bias[None]]))


def with_tensors(projection, weight, bias):
    del projection.weight, projection.bias
    projection.weight, projection.bias = weight, bias
    return projection


def layers_of(model):
    return model.get_submodule(PLAIN.get(model.config.model_type, ("model.layers",))[0])


def widened(model, neurons, i, layer=LAYER):
    """A model with neuron i really built in; the model itself where i is -1."""
    if i < 0:
        return model
    wide = copy.deepcopy(model)
    block = layers_of(wide)[layer]
    key, value = neurons.key[i], neurons.value[i]
    name = model.config.model_type
    if name in GATED:
        block.mlp = GatedFeedForwardOneWider(block.mlp, key, value)
        return wide
    _, entry, exit_ = PLAIN[name]
    wider = {
        entry: one_output_wider(block.get_submodule(entry), key, neurons.bias[i]),
        exit_: one_input_wider(block.get_submodule(exit_), value),
    }
    for path, projection in wider.items():
        parent, _, attribute = path.rpartition(".")
        setattr(block.get_submodule(parent), attribute, projection)
    return wide


def queries(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 67, (length,), generator=generator) for length in lengths]


def padded(rows, side):
    """input_ids and attention_mask of a padded batch."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def with_positions(model, batch):
    """The batch with the position_ids that generate would give, where forward takes them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return batch
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, "position_ids": positions}


def one_by_one(model, neurons, index, rows, layer=LAYER):
    """Each query's logits [T, vocabulary], from a model widened for it alone."""
    logits = []
    for i, row in zip(index.tolist(), rows, strict=True):
        logits.append(widened(model, neurons, i, layer)(row[None]).logits[0])
    return logits


def assert_logits(logits, mask, expected):
    for b, row in enumerate(expected):
        torch.testing.assert_close(logits[b, mask[b].bool()], row, **TOLERANCE)


def assert_strong(model, index, rows, expected):
    for i, row, logits in zip(index.tolist(), rows, expected, strict=True):
        moved = (logits - model(row[None]).logits[0]).abs().max()
        assert moved > STRONG if i >= 0 else moved == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_gets_the_logits_of_its_own_widened_model(model, side):
    neurons, rows = strong_neurons(model), queries()
    expected = one_by_one(model, neurons, INDEX, rows)
    assert_strong(model, INDEX, rows, expected)
    batch = with_positions(model, padded(rows, side))
    attached = attach(model, LAYER)
    with attached.neurons(neurons, INDEX):
        logits = model(**batch).logits
        with torch.no_grad():
            assert_logits(model(**batch).logits, batch["attention_mask"], expected)
    assert_logits(logits, batch["attention_mask"], expected)


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_the_first_and_the_last_layer_carry_neurons_too(model, layer):
    neurons, rows = strong_neurons(model), queries([6, 6])
    index = torch.tensor([1, 2])
    expected = one_by_one(model, neurons, index, rows, layer)
    assert_strong(model, index, rows, expected)
    with attach(model, layer).neurons(neurons, index):
        logits = model(torch.stack(rows)).logits
    assert_logits(logits, torch.ones(2, 6), expected)


@pytest.mark.parametrize(
    "name, field, activation",
    [
        (name, field, activation)
        for name, field in [("phi", "hidden_act"), ("gpt2", "activation_function")]
        for activation in ("relu", "silu", "swish", "gelu", "gelu_new", "gelu_fast")
    ]
    + [("opt", "activation_function", "gelu"), ("gpt_neox", "hidden_act", "gelu_pytorch_tanh")],
)
def test_the_neuron_has_the_activation_that_the_config_names(tiny_model, name, field, activation):
    model = tiny_model(name, **{field: activation})
    ours = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu"}
    neurons = strong_neurons(model, activation=ours.get(activation, "gelu_tanh"))
    rows, index = queries([6]), torch.tensor([2])
    expected = one_by_one(model, neurons, index, rows)
    with attach(model, LAYER).neurons(neurons, index):
        logits = model(rows[0][None]).logits
    assert_logits(logits, torch.ones(1, 6), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_rows_without_a_neuron_have_the_bits_of_the_plain_models_batch(model, grad):
    batch = with_positions(model, padded(queries(), "left"))
    with torch.set_grad_enabled(grad):
        plain = model(**batch).logits
        with attach(model, LAYER).neurons(strong_neurons(model), INDEX):
            logits = model(**batch).logits
    assert torch.equal(logits[1], plain[1])
    for row in (0, 2, 3):
        assert not torch.equal(logits[row], plain[row])


def test_without_index_row_b_has_neuron_b_and_embeddings_may_stand_for_ids(model):
    rows = queries([4, 4, 4])
    neurons, ids = strong_neurons(model), torch.stack(rows)
    expected = one_by_one(model, neurons, torch.arange(3), rows)
    with attach(model, LAYER).neurons(neurons):
        by_ids = model(ids).logits
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert_logits(by_ids, torch.ones(3, 4), expected)
    assert_logits(by_embeddings, torch.ones(3, 4), expected)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "opt"])
def test_neurons_get_the_gradients_of_the_widened_models_parameters(tiny_model, name):
    model, rows = tiny_model(name), queries()
    batch = with_positions(model, padded(rows, "right"))

    def leaves():
        neurons = strong_neurons(model)
        parts = [part for part in (neurons.key, neurons.bias, neurons.value) if part is not None]
        return neurons, [part.requires_grad_() for part in parts]

    neurons, expected = leaves()
    for logits in one_by_one(model, neurons, INDEX, rows):
        if logits.requires_grad:  # not the row without a neuron
            logits.log_softmax(-1)[:, 7].sum().backward()
    neurons, parts = leaves()
    with attach(model, LAYER).neurons(neurons, INDEX):
        logits = model(**batch).logits
    logits.log_softmax(-1)[..., 7][batch["attention_mask"].bool()].sum().backward()
    for part, oracle in zip(parts, expected, strict=True):
        scale = oracle.grad.abs().max().item()
        assert scale > STRONG
        torch.testing.assert_close(
            part.grad, oracle.grad, rtol=TOLERANCE["rtol"], atol=scale * TOLERANCE["atol"]
        )


def test_a_bfloat16_model_takes_float32_neurons(tiny_model):
    model = tiny_model("llama").to(torch.bfloat16)
    row, neurons = torch.stack(queries([6])), strong_neurons(model, 1)
    expected = widened(model, neurons.to(torch.bfloat16), 0)(row).logits
    with attach(model, LAYER).neurons(neurons):
        logits = model(row).logits
    assert logits.dtype == torch.bfloat16
    # The neuron is rounded to bfloat16 once more or less than in the widened sum, two layers below.
    moved = (expected - model(row).logits).abs().max()
    assert (logits - expected).abs().max() < 0.05 * moved


GENERATE = {
    "max_new_tokens": NEW_TOKENS,
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_scores": True,
}


def test_greedy_generation_of_a_padded_batch_follows_the_widened_models_token_by_token(model):
    neurons, rows = strong_neurons(model), queries()
    batch = padded(rows, "left")
    with attach(model, LAYER).neurons(neurons, INDEX):
        answer = model.generate(**batch, do_sample=False, **GENERATE)
    changed = 0
    for b, (i, row) in enumerate(zip(INDEX.tolist(), rows, strict=True)):
        alone = padded([row], "left")
        oracle = widened(model, neurons, i).generate(**alone, do_sample=False, **GENERATE)
        assert (
            answer.sequences[b, -NEW_TOKENS:].tolist() == oracle.sequences[0, len(row) :].tolist()
        )
        assert len(answer.logits) == len(oracle.logits) == NEW_TOKENS
        for step, expected in zip(answer.logits, oracle.logits, strict=True):
            torch.testing.assert_close(step[b], expected[0], **TOLERANCE)
        plain = model.generate(**alone, do_sample=False, **GENERATE).sequences[0, len(row) :]
        changed += plain.tolist() != oracle.sequences[0, len(row) :].tolist()
    assert changed >= 2  # of three: the neurons decide what is said


def test_beams_are_the_widened_models_beams(model):
    neurons, rows = strong_neurons(model), queries()
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, **GENERATE}
    with attach(model, LAYER).neurons(neurons, INDEX):
        answer = model.generate(**padded(rows, "left"), **beams)
    for b, (i, row) in enumerate(zip(INDEX.tolist(), rows, strict=True)):
        oracle = widened(model, neurons, i).generate(**padded([row], "left"), **beams)
        mine = slice(2 * b, 2 * b + 2)
        assert torch.equal(answer.sequences[mine, -NEW_TOKENS:], oracle.sequences[:, len(row) :])
        torch.testing.assert_close(
            answer.sequences_scores[mine], oracle.sequences_scores, **TOLERANCE
        )


def test_all_sequences_sampled_for_a_row_come_from_its_own_widened_model(model):
    neurons, rows = strong_neurons(model), queries()
    sampling = {"do_sample": True, "num_return_sequences": 3, "top_k": 0, **GENERATE}
    torch.manual_seed(0)
    with attach(model, LAYER).neurons(neurons, INDEX):
        answer = model.generate(**padded(rows, "left"), **sampling)
    logits = torch.stack(answer.logits, dim=1)  # [4 * 3, NEW_TOKENS, vocabulary]
    assert len(logits) == 12
    for r, sampled in enumerate(answer.sequences[:, -NEW_TOKENS:]):
        row = rows[r // 3]
        wide = widened(model, neurons, int(INDEX[r // 3]))
        read = wide(torch.cat([row, sampled])[None]).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(logits[r], read, **TOLERANCE)


def test_sampling_one_query_draws_the_widened_models_tokens(model):
    neurons, batch = strong_neurons(model, 1), padded(queries([6]), "left")
    sampling = {"do_sample": True, "temperature": 1.5, **GENERATE}
    wide = widened(model, neurons, 0)
    torch.manual_seed(0)
    oracle = wide.generate(**batch, **sampling)
    torch.manual_seed(0)
    with attach(model, LAYER).neurons(neurons):
        answer = model.generate(**batch, **sampling)
    assert torch.equal(answer.sequences, oracle.sequences)


def test_one_block_serves_beams_samples_greedy_and_plain_calls_in_turn(tiny_model):
    model = tiny_model("phi")
    neurons, batch = strong_neurons(model), padded(queries([5, 5]), "left")
    index = torch.tensor([1, 0])
    attached = attach(model, LAYER)
    with attached.neurons(neurons, index):
        logits = model(**batch).logits
        greedy = model.generate(**batch, do_sample=False, max_new_tokens=4)
        model.generate(**batch, num_beams=3, do_sample=False, max_new_tokens=2)
        assert torch.equal(model(**batch).logits, logits)
        model.generate(**batch, num_return_sequences=2, do_sample=True, max_new_tokens=2)
        assert torch.equal(model.generate(**batch, do_sample=False, max_new_tokens=4), greedy)


def fingerprint(model):
    """All that attaching could leave behind: modules, parameters, hooks, attributes."""
    hooks = [
        (
            name,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            "forward" in vars(module),
        )
        for name, module in model.named_modules()
    ]
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [
            (name, id(parameter), parameter.data_ptr())
            for name, parameter in model.named_parameters()
        ],
        hooks,
        sorted(vars(model)),
        list(model.state_dict()),
    )


def test_detach_puts_back_the_very_modules_and_bits(model):
    batch = with_positions(model, padded(queries(), "left"))
    logits, before = model(**batch).logits, fingerprint(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached = attach(model, LAYER)
    assert fingerprint(model) != before
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(**batch).logits, logits)
    with attached.neurons(strong_neurons(model), INDEX):
        assert not torch.equal(model(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)
    attached.detach()
    attached.detach()
    assert fingerprint(model) == before
    assert torch.equal(model(**batch).logits, logits)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_neurons_are_gone_after_an_exception_in_the_block(tiny_model):
    model, ids = tiny_model("llama"), torch.stack(queries([5]))
    attached, logits = attach(model, LAYER), model(ids).logits
    with pytest.raises(KeyError), attached.neurons(strong_neurons(model, 1)):
        raise KeyError
    assert torch.equal(model(ids).logits, logits)
    with attached.neurons(strong_neurons(model, 1)):
        assert not torch.equal(model(ids).logits, logits)


def test_detaching_inside_the_block_ends_the_neurons_there(tiny_model):
    model, ids = tiny_model("llama"), torch.stack(queries([5]))
    logits, before = model(ids).logits, fingerprint(model)
    attached = attach(model, LAYER)
    with attached.neurons(strong_neurons(model, 1)):
        attached.detach()
        assert torch.equal(model(ids).logits, logits)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["phi", "llama"])
def test_two_layers_carry_neurons_at_once(tiny_model, name):
    model, rows = tiny_model(name), queries([5, 5])
    before, batch = fingerprint(model), padded(rows, "left")
    low, high = strong_neurons(model, 2), strong_neurons(model, seed=5)
    beams = {"num_beams": 3, "do_sample": False, **GENERATE}
    outer, inner = attach(model, 0), attach(model, 2)
    with outer.neurons(low):
        with inner.neurons(high, torch.tensor([2, -1])):
            both = model.generate(**batch, **beams)
        one = model.generate(**batch, **beams)
    inner.detach()
    outer.detach()
    assert fingerprint(model) == before

    def assert_oracle_says(answer, b, wide):
        oracle = wide.generate(**padded([rows[b]], "left"), **beams)
        assert torch.equal(answer.sequences[b], oracle.sequences[0])
        scores = answer.sequences_scores[b], oracle.sequences_scores[0]
        torch.testing.assert_close(*scores, **TOLERANCE)

    lower = [widened(model, low, b, 0) for b in range(2)]
    for b in range(2):
        assert_oracle_says(one, b, lower[b])
    assert_oracle_says(both, 0, widened(lower[0], high, 2, 2))
    assert_oracle_says(both, 1, lower[1])
    assert (both.sequences_scores[0] - one.sequences_scores[0]).abs() > 10 * TOLERANCE["atol"]


def test_a_late_detach_of_an_old_attachment_leaves_the_new_one_alone(tiny_model):
    model, ids = tiny_model("gpt2"), torch.stack(queries([5]))
    neurons, plain = strong_neurons(model, 1), model(ids).logits
    old = attach(model, LAYER)
    old.detach()
    new = attach(model, LAYER)
    old.detach()
    with new.neurons(neurons):
        assert not torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_batch_of_other_rows_than_indices_is_refused(tiny_model, rows):
    model = tiny_model("opt")
    ids = torch.stack(queries([4] * rows))
    with attach(model, LAYER).neurons(strong_neurons(model, 2)):
        for call in (
            lambda: model(ids),
            lambda: model(input_ids=ids),
            lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2),
        ):
            message = f"the batch has {rows} rows, but 2 neuron indices are mounted; give each row"
            with pytest.raises(ValueError, match=message):
                call()


def test_neurons_inside_neurons_are_refused_and_the_outer_ones_stay(tiny_model):
    model, ids = tiny_model("phi"), torch.stack(queries([5]))
    neurons, attached = strong_neurons(model), attach(model, LAYER)
    with attached.neurons(neurons[:1]):
        logits = model(ids).logits
        message = "mounted already; leave that `with` block first"
        with pytest.raises(RuntimeError, match=message), attached.neurons(neurons[1:2]):
            pass
        assert torch.equal(model(ids).logits, logits)


def test_a_detached_attachment_refuses_neurons(tiny_model):
    model = tiny_model("phi")
    attached = attach(model, LAYER)
    attached.detach()
    message = r"was detached; call attach\(model, layer\) again"
    with pytest.raises(RuntimeError, match=message), attached.neurons(strong_neurons(model)):
        pass
    attach(model, LAYER)  # by another attachment the old one does not come back to life
    with pytest.raises(RuntimeError, match=message), attached.neurons(strong_neurons(model)):
        pass


@pytest.mark.parametrize("name", ["phi", "gpt2", "llama"])
def test_attaching_twice_to_a_layer_is_refused(tiny_model, name):
    model = tiny_model(name)
    attached = attach(model, LAYER)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"layer {LAYER} carries neurons already; detach"):
        attach(model, LAYER)
    assert fingerprint(model) == before
    attached.detach()


def test_an_attachment_that_nobody_holds_makes_room_for_another(tiny_model):
    model = tiny_model("llama")
    before = fingerprint(model)
    attach(model, LAYER)
    gc.collect()
    attach(model, LAYER).detach()
    assert fingerprint(model) == before


@pytest.mark.parametrize("layer", [-1, LAYERS])
@pytest.mark.parametrize("refuser", [attach, LowerLayers, feed_forward])
def test_a_layer_that_the_model_does_not_have_is_refused(tiny_model, refuser, layer):
    with pytest.raises(ValueError, match=f"layer is {layer}; the model has layers 0 to 2"):
        refuser(tiny_model("phi"), layer)


@pytest.mark.parametrize("activation", ["tanh", "quick_gelu", "relu2"])
def test_beside_an_activation_that_no_neuron_has_it_is_linear(tiny_model, activation):
    layout = attach(tiny_model("phi", hidden_act=activation), LAYER).layout
    assert layout == NeuronLayout(WIDTH, WIDTH, False, "identity")


ONES = torch.ones(2, WIDTH)
WRONG_LAYOUTS = {
    "phi": [
        Neurons(ONES, None, ONES, "gelu_tanh"),
        Neurons(ONES, torch.ones(2), ONES, "gelu"),
        Neurons(torch.ones(2, 48), torch.ones(2), ONES, "gelu_tanh"),
        Neurons(ONES, torch.ones(2), torch.ones(2, 48), "gelu_tanh"),
    ],
    "llama": [Neurons(ONES, torch.ones(2), ONES), Neurons(ONES, None, ONES, "silu")],
}


@pytest.mark.parametrize(
    "name, neurons", [(name, neurons) for name in WRONG_LAYOUTS for neurons in WRONG_LAYOUTS[name]]
)
def test_neurons_of_another_layout_are_refused(tiny_model, name, neurons):
    attached = attach(tiny_model(name), LAYER)
    message = r"neurons have NeuronLayout.*but layer 1 needs NeuronLayout"
    with pytest.raises(ValueError, match=message), attached.neurons(neurons):
        pass


def test_a_bad_index_is_refused_at_the_with_and_a_good_one_taken_afterwards(tiny_model):
    model, ids = tiny_model("phi"), torch.stack(queries([5, 5]))
    attached, neurons = attach(model, LAYER), strong_neurons(model, 2)
    for index in (torch.tensor([0, 2]), torch.tensor([0, -2]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="index "), attached.neurons(neurons, index):
            pass
    plain = model(ids).logits
    with attached.neurons(neurons):
        assert not torch.equal(model(ids).logits, plain)


def test_the_layout_is_the_familys(model):
    assert attach(model, LAYER).layout == expected_layout(model)
    assert feed_forward(model, LAYER).layer == LAYER
    assert decoder_layers(model) is layers_of(model) and len(decoder_layers(model)) == LAYERS


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_model_continues_from_its_lower_layers_output_to_the_same_logits(model, layer):
    batch = with_positions(model, padded(queries(), "left"))
    expected, before = model(**batch).logits, fingerprint(model)
    lower = LowerLayers(model, layer)
    hidden = lower.run(**batch)
    assert fingerprint(model) == before
    assert hidden.shape == (4, max(LENGTHS), WIDTH) and not hidden.requires_grad

    calls = []
    for i, block in enumerate(layers_of(model)):
        computing = next(m for m in block.modules() if getattr(m, "weight", hidden[0, 0]).dim() > 1)
        computing.register_forward_hook(lambda *_, i=i: calls.append(i))
    before = fingerprint(model)
    for _ in range(2):  # the same hidden states serve many forward calls
        with lower.replaced_by(hidden):
            logits = model(**batch).logits
        assert torch.equal(logits, expected)
    assert calls == 2 * list(range(layer, LAYERS))
    assert fingerprint(model) == before


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_remembered_outputs_serve_any_neurons_and_any_rows(tiny_model, name, layer):
    model = tiny_model(name)
    batch = with_positions(model, padded(queries(), "left"))
    neurons, attached = strong_neurons(model), attach(model, layer)
    lower = LowerLayers(model, layer)
    hidden = lower.run(**batch)
    before = fingerprint(model)
    outputs = lower.outputs(hidden, **batch)
    assert fingerprint(model) == before and lower.skips
    assert len(outputs) == 2  # attention and FFN
    kept = {part: output.clone() for part, output in outputs.items()}
    with attached.neurons(neurons, INDEX):
        expected = model(**batch).logits

    rows = [3, 1]
    some = {part: value[rows, 2:] for part, value in batch.items()}  # none of them is longer
    known = {part: output[rows, 2:] for part, output in outputs.items()}
    matrices = [weight for weight in decoder_layers(model)[layer].parameters() if weight.dim() > 1]
    with (
        lower.replaced_by(hidden[rows, 2:], known),
        attached.neurons(neurons, INDEX[rows]),
    ):
        for grad in (True, False):  # without gradients neurons are added in place
            with torch.set_grad_enabled(grad):
                logits = model(**some).logits
            torch.testing.assert_close(logits[:, -3:], expected[rows, -3:], **TOLERANCE)
        # Where every output is known, the weights are not asked for.
        for weight in matrices:
            weight.fill_(float("nan"))
        assert torch.equal(model(**some).logits, logits)
    assert all(torch.equal(outputs[part], output) for part, output in kept.items())
    assert fingerprint(model) == before


@pytest.mark.parametrize("layer", [1, 2])
def test_the_upper_layers_read_the_given_hidden_states(model, layer):
    batch = with_positions(model, padded(queries(), "left"))
    lower = LowerLayers(model, layer)
    shift = torch.randn(4, max(LENGTHS), WIDTH)
    hidden = lower.run(**batch).add(shift).requires_grad_()
    with lower.replaced_by(hidden):
        logits = model(**batch).logits
    assert torch.autograd.grad(logits.sum(), hidden)[0].abs().sum() > 0

    def add(module, args, kwargs):
        if args:
            return (args[0] + shift, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + shift}

    layers_of(model)[layer].register_forward_pre_hook(add, with_kwargs=True)
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["phi", "gpt2", "gptj", "opt", "smollm3"])
def test_neurons_above_replaced_layers_act_as_in_the_whole_model(tiny_model, name, layer):
    model = tiny_model(name)
    batch = with_positions(model, padded(queries(), "left"))
    neurons, attached = strong_neurons(model), attach(model, layer)
    lower = LowerLayers(model, layer)
    hidden = lower.run(**batch)
    with attached.neurons(neurons, INDEX):
        expected = model(**batch).logits
        with lower.replaced_by(hidden):
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("columns", [1, 3, 99])
def test_the_last_columns_logits_need_the_last_ffn_at_these_columns_alone(model, columns):
    batch = with_positions(model, padded(queries(), "left"))
    expected, before = model(**batch).logits, fingerprint(model)
    seen = []
    block = layers_of(model)[-1]
    entry = PLAIN.get(model.config.model_type, (None, "mlp.gate_proj"))[1]
    reads = block.get_submodule(entry)
    hook = reads.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    with last_feed_forward_sees(model, columns):
        logits = model(**batch).logits
    hook.remove()
    torch.testing.assert_close(logits[:, -columns:], expected[:, -columns:])
    if model.config.model_type != "opt":  # whose FFN is no module
        assert seen == [4 * min(columns, max(LENGTHS)) * WIDTH]
    assert fingerprint(model) == before


def test_neurons_of_the_last_layer_act_on_the_columns_that_its_ffn_sees(model):
    batch = with_positions(model, padded(queries(), "left"))
    with attach(model, LAYERS - 1).neurons(strong_neurons(model), INDEX):
        expected = model(**batch).logits
        with last_feed_forward_sees(model, 2):
            logits = model(**batch).logits
    torch.testing.assert_close(logits[:, -2:], expected[:, -2:])


def test_what_a_module_gets_is_known_without_running_what_follows(model):
    batch = with_positions(model, padded(queries(), "left"))
    before = fingerprint(model)
    ran = []
    for i, block in enumerate(layers_of(model)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    noted = []
    reads = feed_forward(model, 1).entry
    hook = reads.register_forward_pre_hook(lambda module, args: noted.append(args[0].clone()))
    given = input_of(reads, model, batch)
    assert torch.equal(given, noted[0]) and ran == [0] and not given.requires_grad
    hook.remove()
    with pytest.raises(IndexError):
        input_of(reads, model, {"input_ids": torch.tensor([[10_000]])})
    for block in layers_of(model):
        block._forward_hooks.clear()
    assert fingerprint(model) == before


def test_layers_and_hooks_are_restored_when_the_model_raises(model):
    batch = with_positions(model, padded(queries(), "left"))
    before = fingerprint(model)
    lower = LowerLayers(model, 2)
    with pytest.raises(IndexError):
        lower.run(input_ids=torch.tensor([[10_000]]))
    assert fingerprint(model) == before
    hidden = lower.run(**batch)
    with pytest.raises(KeyError), lower.replaced_by(hidden):
        assert fingerprint(model) != before
        raise KeyError
    assert fingerprint(model) == before
