"""MeGLinear: the plain projection, plus each sample's own neuron."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from meg_kernels.neuron import Neurons
from meg_kernels.nn import MeGLinear

IN, OUT, WIDE = 6, 5, 9
EPS = torch.finfo(torch.float32).eps
# A sum of at most WIDE products of size about 3, each rounded, and a few roundings after it.
ATOL = 3 * (WIDE + 10) * 3 * EPS


def carrier(bias=True):
    """A carrier beside the plain projection that it was made from."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias)
    return MeGLinear.from_linear(linear), linear


@pytest.fixture
def pair():
    return carrier()


def random_neurons(count, d_in=IN, has_bias=True, activation="gelu"):
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(count, d_in, generator=generator)
    bias = torch.randn(count, generator=generator) if has_bias else None
    return Neurons(key, bias, torch.randn(count, OUT, generator=generator), activation)


def one_by_one(plain, x, neurons, index, source=None):
    """The plain projection in float64, and each sample's neuron on top of it."""
    source = x if source is None else source
    with torch.no_grad():
        y = (x.double() @ plain.weight.T.double()).clone()
        if plain.bias is not None:
            y += plain.bias.double()
    for b, i in enumerate(index.tolist()):
        if i >= 0:
            before = source[b].double() @ neurons.key[i].double()
            if neurons.bias is not None:
                before = before + neurons.bias[i].double()
            y[b] += torch.outer(nn.functional.gelu(before), neurons.value[i].double())
    return y


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"dtype": torch.float64}])
def test_meglinear_is_constructed_and_stored_as_linear(arguments):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, **arguments)
    torch.manual_seed(0)
    layer = MeGLinear(IN, OUT, **arguments)
    assert isinstance(layer, nn.Linear) and repr(layer) == repr(linear).replace(
        "Linear", "MeGLinear"
    )
    ours, theirs = layer.state_dict(), linear.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
    assert not list(layer.buffers()) and not list(layer.children())


def test_meglinear_takes_linears_device_argument():
    assert MeGLinear(IN, OUT, device="meta").weight.is_meta


def test_state_dicts_load_both_ways_also_while_neurons_are_mounted():
    layer, linear = MeGLinear(IN, OUT), nn.Linear(IN, OUT)
    with layer.mounted(random_neurons(1)):
        assert list(layer.state_dict()) == ["weight", "bias"]
        linear.load_state_dict(layer.state_dict())
    assert torch.equal(linear.weight, layer.weight)
    layer.load_state_dict(nn.Linear(IN, OUT).state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_the_carrier_shares_the_projections_parameters(bias):
    layer, plain = carrier(bias)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert layer.weight.data_ptr() == plain.weight.data_ptr() and not layer.weight.is_meta
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert layer.extra_repr() == plain.extra_repr()


def test_repr_shows_how_many_neurons_are_mounted(pair):
    layer, plain = pair
    with layer.mounted(random_neurons(2)):
        assert repr(layer) == f"MeGLinear({plain.extra_repr()}, neurons=2)"
    assert repr(layer) == f"MeGLinear({plain.extra_repr()})"


@pytest.mark.parametrize("training", [True, False])
def test_the_carrier_is_in_the_projections_mode(training):
    assert MeGLinear.from_linear(nn.Linear(IN, OUT).train(training)).training is training


@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 3, IN), (2, 3, 4, IN), (0, IN)])
def test_without_neurons_the_output_is_the_projections_own_before_and_after(pair, shape):
    layer, plain = pair
    x = torch.randn(shape)
    assert torch.equal(layer(x), plain(x))
    layer.mount(random_neurons(2))
    layer.unmount()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x, source=torch.randn(3)), plain(x))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_each_sample_gets_its_own_neuron(pair, grad, has_bias):
    layer, plain = pair
    x, neurons = torch.randn(4, 3, IN), random_neurons(3, has_bias=has_bias)
    index = torch.tensor([2, -1, 0, 2])
    with torch.set_grad_enabled(grad), layer.mounted(neurons, index):
        y = layer(x)
    assert_close(y, one_by_one(plain, x, neurons, index))
    assert torch.equal(y[1], plain(x)[1])
    assert y.requires_grad == grad
    for b in (0, 2, 3):
        assert (y[b] - plain(x)[b]).abs().max() > 100 * ATOL


@given(
    tokens=st.integers(0, 3),
    index=st.lists(st.integers(-1, 2), min_size=1, max_size=4),
    flattened=st.booleans(),
    sourced=st.booleans(),
)
def test_any_batch_flattened_or_not_gets_each_samples_neuron(tokens, index, flattened, sourced):
    layer, plain = carrier()
    samples, index = len(index), torch.tensor(index)
    x = torch.randn(samples, tokens, IN)
    source = torch.randn(samples, tokens, WIDE) if sourced else None
    neurons = random_neurons(3, WIDE if sourced else IN)
    given_x, given_source = x, source
    if flattened:
        given_x = x.flatten(0, 1)
        given_source = source.flatten(0, 1) if sourced else None
    with layer.mounted(neurons, index):
        y = layer(given_x, given_source)
    assert y.shape == (*given_x.shape[:-1], OUT)
    assert_close(y.view(samples, tokens, OUT), one_by_one(plain, x, neurons, index, source))


def test_without_index_sample_b_has_neuron_b(pair):
    layer, plain = pair
    x, neurons = torch.randn(3, 2, IN), random_neurons(3)
    with layer.mounted(neurons):
        assert_close(layer(x), one_by_one(plain, x, neurons, torch.arange(3)))


def test_neurons_are_unmounted_when_the_block_raises(pair):
    layer, plain = pair
    x = torch.randn(1, 2, IN)
    with pytest.raises(KeyError), layer.mounted(random_neurons(1)):
        raise KeyError
    assert torch.equal(layer(x), plain(x))


def test_mounting_again_replaces_the_neurons(pair):
    layer, plain = pair
    x, neurons = torch.randn(1, 2, IN), random_neurons(2)
    layer.mount(neurons[:1])
    layer.mount(neurons[1:])
    assert_close(layer(x), one_by_one(plain, x, neurons, torch.tensor([1])))


def test_neurons_are_brought_to_the_weights_dtype(pair):
    layer, plain = pair
    layer, plain = layer.to(torch.bfloat16), plain.to(torch.bfloat16)
    x, neurons = torch.randn(2, 3, IN).to(torch.bfloat16), random_neurons(2)
    with layer.mounted(neurons):
        y = layer(x)
    with layer.mounted(neurons.to(torch.bfloat16)):
        assert torch.equal(layer(x), y)
    assert y.dtype == torch.bfloat16
    expected = one_by_one(plain, x, neurons.to(torch.bfloat16), torch.arange(2))
    # The projection and the sum are rounded to bfloat16, each by its own size.
    eps = torch.finfo(torch.bfloat16).eps
    atol = eps * (plain(x).abs().max() + expected.abs().max()).item()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)


def test_gradients_reach_the_neurons_the_input_and_the_weights(pair):
    layer, _ = pair
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    layer = layer.double()
    key, bias, value = (part.double().requires_grad_() for part in vars_of(random_neurons(2)))

    def function(x, weight, layer_bias, key, bias, value):
        with layer.mounted(Neurons(key, bias, value, "gelu"), torch.tensor([1, -1])):
            return layer(x)

    assert torch.autograd.gradcheck(function, (x, layer.weight, layer.bias, key, bias, value))


def vars_of(neurons):
    return neurons.key, neurons.bias, neurons.value


def refuses(message, x, source=None, index=(0, 1)):
    return message, x, source, torch.tensor(index, dtype=torch.int64)


MISFITS = {
    "more rows than samples": refuses(
        r"the batch has 4 rows, but 2 neuron indices are mounted; give each row one index",
        torch.ones(4, 3, IN),
    ),
    "one row": refuses(r"the batch has 1 rows, but 2 neuron indices", torch.ones(1, 2, IN)),
    "more axes": refuses(r"the batch has 3 rows, but 2 neuron", torch.ones(3, 2, 4, IN)),
    "tokens that do not divide": refuses(r"2 rows .* read \(5, 6\) and gave", torch.ones(5, IN)),
    "source of other tokens": refuses(
        r"x is \(2, 3, 6\) and source \(2, 4, 6\)", torch.ones(2, 3, IN), torch.ones(2, 4, IN)
    ),
    "source of other axes": refuses(
        r"x is \(6, 6\) and source \(2, 3, 6\)", torch.ones(6, IN), torch.ones(2, 3, IN)
    ),
    "no samples": refuses(r"but 0 neuron indices are mounted", torch.ones(2, 3, IN), index=()),
    "source of other width": refuses(
        r"neurons read inputs of width 6, but the layer was given \(2, 3, 5\)",
        torch.ones(2, 3, IN),
        torch.ones(2, 3, 5),
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_batch_that_does_not_fit_the_mounted_neurons_is_refused(pair, misfit):
    message, x, source, index = MISFITS[misfit]
    with pair[0].mounted(random_neurons(2), index), pytest.raises(ValueError, match=message):
        pair[0](x, source)


BAD_INDICES = {
    "too high": (torch.tensor([0, 2]), "index holds values from 0 to 2; with 2 neurons they must"),
    "too low": (torch.tensor([0, -2]), "index holds values from -2 to 0"),
    "of floats": (torch.tensor([0.0, 1.0]), "index is torch.float32 .* must be an int64 vector"),
    "of two axes": (torch.tensor([[0, 1]]), r"index is torch.int64 \(1, 2\); it must be an int64"),
}


@pytest.mark.parametrize("bad", BAD_INDICES)
def test_a_bad_index_is_refused_when_it_is_mounted_and_nothing_is_mounted(pair, bad):
    layer, plain = pair
    index, message = BAD_INDICES[bad]
    with pytest.raises(ValueError, match=message):
        layer.mount(random_neurons(2), index)
    assert torch.equal(layer(torch.ones(2, IN)), plain(torch.ones(2, IN)))


def test_an_index_may_be_a_list(pair):
    layer, _ = pair
    x, neurons = torch.randn(2, 3, IN), random_neurons(2)
    with layer.mounted(neurons, torch.tensor([1, -1])):
        expected = layer(x)
    with layer.mounted(neurons, [1, -1]):
        assert torch.equal(layer(x), expected)


def test_neurons_that_write_another_width_are_refused_and_nothing_is_mounted(pair):
    layer, plain = pair
    neurons = Neurons(torch.ones(1, IN), None, torch.ones(1, OUT + 1))
    with pytest.raises(ValueError, match="write outputs of width 6, but this layer's are 5 wide"):
        layer.mount(neurons)
    assert torch.equal(layer(torch.ones(1, IN)), plain(torch.ones(1, IN)))


class SpecialLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "other", [SpecialLinear(IN, OUT), MeGLinear(IN, OUT), Conv1D(OUT, IN), nn.Identity()]
)
def test_only_plain_projections_can_become_carriers(other):
    with pytest.raises(TypeError, match=f"got {type(other).__name__}; .* use meg_kernels.attach"):
        MeGLinear.from_linear(other)
