"""Neurons and their flat vectors."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meg_kernels.neuron import ACTIVATIONS, NeuronLayout, Neurons

layouts = st.builds(
    NeuronLayout,
    d_in=st.integers(1, 7),
    d_out=st.integers(1, 7),
    has_bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


def numbered(layout, count, dtype=torch.float32):
    """Neurons whose every element is another number: nothing can be mixed up unseen."""
    elements = torch.arange(count * layout.dim).view(count, layout.dim).to(dtype)
    key = elements[:, : layout.d_in].clone()
    bias = elements[:, layout.d_in].clone() if layout.has_bias else None
    value = elements[:, layout.dim - layout.d_out :].clone()
    return Neurons(key, bias, value, layout.activation)


def assert_same(actual, expected):
    assert actual.activation == expected.activation
    for name in ("key", "bias", "value"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and torch.equal(one, other), name


@given(layouts, st.integers(0, 4), dtypes)
def test_unpacking_packed_neurons_gives_them_back(layout, count, dtype):
    neurons = numbered(layout, count, dtype)
    assert neurons.layout == layout and len(neurons) == count and neurons.dtype == dtype
    assert neurons.device == torch.device("cpu")
    flat = layout.pack(neurons)
    assert flat.shape == (count, layout.dim) and flat.dtype == dtype
    assert_same(layout.unpack(flat), neurons)


@given(layouts, st.integers(1, 4))
def test_a_flat_vector_is_key_then_bias_then_value(layout, count):
    neurons = numbered(layout, count)
    for row, flat in enumerate(layout.pack(neurons)):
        expected = neurons.key[row].tolist()
        expected += [] if neurons.bias is None else [neurons.bias[row].item()]
        expected += neurons.value[row].tolist()
        assert flat.tolist() == expected


@given(layouts)
def test_unpacked_neurons_are_views_of_the_flat_vectors(layout):
    flat = torch.zeros(3, layout.dim)
    neurons = layout.unpack(flat)
    flat.copy_(layout.pack(numbered(layout, 3)))
    assert_same(neurons, numbered(layout, 3))


def test_gradients_flow_through_pack_and_unpack():
    layout = NeuronLayout(2, 3, True, "gelu")
    flat = torch.randn(4, layout.dim, requires_grad=True)
    weights = torch.randn(4, layout.dim)
    (layout.pack(layout.unpack(flat)) * weights).sum().backward()
    assert torch.equal(flat.grad, weights)


@given(layouts, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_cat_puts_the_parts_rows_in_order(layout, counts):
    whole = numbered(layout, sum(counts))
    parts, start = [], 0
    for count in counts:
        parts.append(whole[start : start + count])
        start += count
    assert_same(Neurons.cat(parts), whole)


@given(layouts, st.data())
def test_a_slice_a_list_a_tensor_and_a_mask_index_rows_of_every_part(layout, data):
    neurons = numbered(layout, 5)
    rows = data.draw(st.lists(st.integers(0, 4), max_size=6))
    flat = layout.pack(neurons)
    for picked in (neurons[rows], neurons[torch.tensor(rows, dtype=torch.int64)]):
        assert_same(picked, layout.unpack(flat[rows]))
    assert_same(neurons[1:3], layout.unpack(flat[1:3]))
    mask = torch.tensor([True, False, True, True, False])
    assert_same(neurons[mask], layout.unpack(flat[[0, 2, 3]]))


@pytest.mark.parametrize("has_bias", [True, False])
def test_to_converts_every_part(has_bias):
    neurons = numbered(NeuronLayout(2, 3, has_bias, "relu"), 2)
    halves = neurons.to(torch.bfloat16)
    assert halves.dtype == torch.bfloat16 and halves.layout == neurons.layout
    assert_same(halves.to("cpu", torch.float32), neurons)  # these small integers are exact
    assert neurons.to("meta").device == torch.device("meta")


def test_detach_leaves_the_graph_and_shares_the_storage():
    key, bias, value = (torch.randn(*shape, requires_grad=True) for shape in [(2, 3), (2,), (2, 4)])
    detached = Neurons(key, bias, value, "silu").detach()
    for part, source in zip(
        (detached.key, detached.bias, detached.value), (key, bias, value), strict=True
    ):
        assert not part.requires_grad and part.data_ptr() == source.data_ptr()
    assert detached.activation == "silu"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("has_bias", [True, False])
def test_is_finite_finds_the_bad_neuron_wherever_the_bad_number_is(has_bias, bad):
    layout = NeuronLayout(2, 3, has_bias, "gelu")
    for column in range(layout.dim):
        flat = torch.ones(4, layout.dim)
        flat[2, column] = bad
        assert layout.unpack(flat).is_finite().tolist() == [True, True, False, True]


@given(layouts)
def test_is_finite_of_no_neurons_is_empty(layout):
    finite = numbered(layout, 0).is_finite()
    assert finite.shape == (0,) and finite.dtype == torch.bool


def test_neurons_and_layouts_cannot_be_changed():
    neurons = numbered(NeuronLayout(2, 3, True, "relu"), 1)
    for frozen, field in [(neurons, "key"), (neurons.layout, "d_in")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field, None)


def test_an_unknown_activation_is_refused_by_name():
    for build in (
        lambda: NeuronLayout(2, 3, True, "tanh"),
        lambda: Neurons(torch.ones(1, 2), None, torch.ones(1, 3), "tanh"),
    ):
        with pytest.raises(ValueError, match="'tanh'; it must be one of identity, gelu, gelu_tanh"):
            build()


@pytest.mark.parametrize("d_in, d_out", [(0, 3), (3, 0), (-1, 3)])
def test_a_layout_without_width_is_refused(d_in, d_out):
    with pytest.raises(ValueError, match=r"^d_(in|out) is (0|-1); it must be an integer in 1 to"):
        NeuronLayout(d_in, d_out, True, "relu")


KEY, BIAS, VALUE = torch.ones(2, 3), torch.ones(2), torch.ones(2, 4)
MISFITS = {
    "key of one axis": (torch.ones(3), None, VALUE, r"key is \(3,\); it must be \[N, d_in\]"),
    "key of no axis": (torch.tensor(1.0), None, VALUE, r"key is \(\); it must be \[N, d_in\]"),
    "value of one axis": (KEY, None, torch.ones(2), r"value is \(2,\); it must be \[2, d_out\]"),
    "value of other N": (KEY, None, torch.ones(3, 4), r"value is \(3, 4\); it must be \[2, d_out"),
    "bias of other N": (KEY, torch.ones(3), VALUE, r"bias is \(3,\); it must be \[2\] or None"),
    "bias of two axes": (KEY, torch.ones(2, 1), VALUE, r"bias is \(2, 1\); it must be \[2\]"),
    "integer key": (KEY.long(), None, VALUE.long(), r"key is torch.int64 .* floating-point"),
    "integer bias": (KEY, BIAS.int(), VALUE, r"bias is torch.int32 .* floating"),
    "value of other dtype": (KEY, BIAS, VALUE.half(), r"value is torch.float16 .* with .to\(\)"),
    "bias on other device": (KEY, BIAS.to("meta"), VALUE, r"bias is .* on meta, but key is .* cpu"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_parts_that_do_not_fit_are_refused(misfit):
    key, bias, value, message = MISFITS[misfit]
    with pytest.raises(ValueError, match=message):
        Neurons(key, bias, value)


def test_an_int_index_is_refused():
    with pytest.raises(TypeError, match="with a slice, a list of integers or a tensor"):
        Neurons(KEY, BIAS, VALUE)[0]


@pytest.mark.parametrize("shape", [(2, 7), (2, 9), (8,), (1, 2, 8)])
def test_unpack_refuses_vectors_of_another_length(shape):
    layout = NeuronLayout(3, 4, True, "gelu")
    with pytest.raises(ValueError, match=r"it must be \[N, 8\]"):
        layout.unpack(torch.zeros(shape))


@pytest.mark.parametrize(
    "change", [{"d_in": 2}, {"d_out": 2}, {"has_bias": False}, {"activation": "relu"}]
)
def test_pack_and_cat_refuse_neurons_of_another_layout(change):
    layout = NeuronLayout(3, 4, True, "gelu")
    other = dataclasses.replace(layout, **change)
    with pytest.raises(ValueError, match="was expected"):
        layout.pack(numbered(other, 2))
    with pytest.raises(ValueError, match="was expected"):
        Neurons.cat([numbered(layout, 1), numbered(other, 1)])


def test_cat_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no neurons to concatenate"):
        Neurons.cat([])


@pytest.mark.parametrize(
    ("layout", "dtype", "expected"),
    [
        (
            NeuronLayout(3, 4, True, "gelu_tanh"),
            torch.float32,
            "Neurons(n=2, d_in=3, d_out=4, bias, gelu_tanh, float32, cpu)",
        ),
        (
            NeuronLayout(5, 1, False, "identity"),
            torch.bfloat16,
            "Neurons(n=2, d_in=5, d_out=1, no bias, identity, bfloat16, cpu)",
        ),
    ],
)
def test_neurons_print_themselves_in_a_line_without_their_numbers(layout, dtype, expected):
    neurons = numbered(layout, 2, dtype)
    assert repr(neurons) == str(neurons) == expected
    assert repr(neurons.to("meta")) == expected.replace("cpu", "meta")
