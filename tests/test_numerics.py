"""Every op on every backend keeps the bounds of its rounding, on ordinary and extreme numbers."""

from __future__ import annotations

import kernel_checks
import pytest
import torch
from kernel_checks import DTYPES, INFINITY, NAN, assert_same_bits

from benchmarks.trust import numerics
from meg_kernels.neuron import ACTIVATIONS, Neurons
from meg_kernels.ops import native
from meg_kernels.ops.backend import backend
from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_, dynamic_neuron_reference
from meg_kernels.ops.modulated_norm import modulated_layer_norm, modulated_layer_norm_reference

pytestmark = [
    *kernel_checks.triton_marks("bfloat16_products"),
    pytest.mark.skipif(kernel_checks.DEVICE.type != "cpu", reason="compares a CPU's backends"),
]
BACKENDS = ("reference", "cpu", "triton", "csrc")
EDITED = (torch.float32, torch.bfloat16)  # the dtypes with float32's range


@pytest.fixture(params=BACKENDS)
def on(request) -> str:
    if request.param == "csrc":
        request.getfixturevalue("on_host")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", numerics.OPS)
def test_errors_stay_within_their_derived_bounds(op, dtype, on):
    if on == "csrc" and op not in numerics.IN_CSRC:
        pytest.skip("there is no such kernel in csrc")
    found = numerics.worst(op, dtype, on, trials=1 if on == "triton" else 3)
    assert max(found.values()) <= 1, found


def test_the_bounds_would_show_an_error_of_a_few_roundings():
    exact = torch.tensor([1.0], dtype=torch.float64)
    allowed = numerics.rounded(torch.zeros(1), exact, torch.bfloat16)

    def worst(actual):
        return numerics.Compared("out", torch.tensor([actual]).bfloat16(), exact, allowed).worst()

    assert worst(1.0) == 0 and worst(1 + 2**-6) > 1
    assert worst(NAN) == worst(INFINITY) == INFINITY


def edited(pre, activation, dtype, on, value=1.0, split=1):
    """y + act(pre) * value with y = 3, and its gradient at x [1, 4], whose product is `pre`."""
    x = torch.zeros(1, 4, dtype=torch.float64)
    x[0, 0] = pre / split
    key = torch.zeros(1, 4, dtype=torch.float64)
    key[0, 0] = split
    x, key = x.to(dtype), key.to(dtype)
    neurons = Neurons(key, None, torch.full((1, 4), value, dtype=dtype), activation)
    y, index = torch.full((1, 4), 3.0, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    grad = torch.ones(1, 4, dtype=dtype)
    parts = (x, neurons.key, None, neurons.value, index, activation)
    if on == "csrc":
        out = torch.empty_like(y)
        native.dynamic_neuron_forward(out, y, x, neurons, index)
        return out, native.dynamic_neuron_backward(grad, x, neurons, index, (True,) * 4)[0]
    with backend(on):
        out = dynamic_neuron(y, x, neurons)
        backward = torch.ops.meg_kernels.dynamic_neuron_backward
        return out, backward(grad, *parts, [True] * 4)[0]


@pytest.mark.parametrize("dtype", EDITED)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("pre", [2.0**65, 2.0**120, -(2.0**65), -(2.0**120)])
def test_slopes_of_huge_activations_are_one_and_zero(pre, activation, dtype, on):
    out, dx = edited(pre, activation, dtype, on, value=2.0**-10)
    assert out[0, 0].item() == (3.0 if pre < 0 else pre * 2.0**-10)
    assert dx[0, 0].item() == (0.0 if pre < 0 else 4 * 2.0**-10)


@pytest.mark.parametrize("dtype", EDITED)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_a_sum_below_the_range_adds_nothing(activation, dtype, on):
    out, dx = edited(-(2.0**200), activation, dtype, on, split=2.0**100)
    assert out.tolist() == [[3.0] * 4] and not dx.any()


@pytest.mark.parametrize("dtype", EDITED)
def test_a_sum_above_the_range_is_infinite_not_wrong(dtype, on):
    out, _ = edited(2.0**200, "silu", dtype, on, split=2.0**100)
    assert out.isinf().all()


@pytest.mark.parametrize("dtype", EDITED)
@pytest.mark.parametrize("order", [[1, 1, -1, -1], [-1, -1, 1, 1], [1, -1, 1, -1]])
def test_sums_may_leave_the_range_on_the_way(order, dtype, on):
    x = torch.tensor([[*order, 5.0]]).to(dtype)
    key = torch.tensor([[2.0**127] * 4 + [1.0]]).to(dtype)
    neurons = Neurons(key, None, torch.ones(1, 2, dtype=dtype))
    y, index = torch.ones(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    out = torch.empty_like(y)
    if on == "csrc":
        native.dynamic_neuron_forward(out, y, x, neurons, index)
    else:
        with backend(on):
            out = dynamic_neuron(y, x, neurons)
    bound = 8 * torch.finfo(torch.float32).eps * 4 * 2.0**127  # of the sum's magnitudes
    assert out.isfinite().all() and out.abs().max() <= bound


@pytest.mark.parametrize("dtype, size", [(torch.float32, 2.0**100), (torch.float64, 2.0**900)])
def test_products_in_the_reference_may_leave_the_range_of_their_sum(dtype, size):
    x, key = torch.tensor([[size, -size]], dtype=dtype), torch.full((1, 2), size, dtype=dtype)
    y = torch.full((1, 1), 3.0, dtype=dtype)
    neurons = Neurons(key, None, torch.ones_like(y))
    assert dynamic_neuron_reference(y, x, neurons, torch.tensor([0])).item() == 3.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_has_gradients_at_any_size(activation):
    x = torch.tensor([[2.0**100], [-(2.0**100)], [0.5]], requires_grad=True)
    one = torch.ones(3, 1)
    dynamic_neuron_reference(
        one, x, Neurons(one, None, one, activation), torch.arange(3)
    ).sum().backward()
    assert x.grad.isfinite().all() and x.grad[0] == 1


@pytest.mark.parametrize("dtype", EDITED)
@pytest.mark.parametrize("size", [2.0**60, 2.0**64, 2.0**100, 2.0**125])
@pytest.mark.parametrize("on", ["reference", "cpu", "triton"])
def test_a_norm_does_not_see_how_large_a_row_is(on, size, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 64, generator=generator).to(dtype)
    shift, scale = (torch.randn(1, 64, generator=generator).to(dtype) for _ in range(2))
    with backend(on):
        small = modulated_layer_norm(x * 2.0**20, shift, scale)
        large = modulated_layer_norm(x * size, shift, scale)
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("size", [2.0**440, 2.0**512, 2.0**1000])
@pytest.mark.parametrize("on", ["reference", "cpu"])
def test_a_norm_in_float64_does_not_see_it_either(on, size):
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift, scale = torch.zeros(1, 64).double(), torch.ones(1, 64).double()
    with backend(on):
        small = modulated_layer_norm(x * 2.0**60, shift, scale)
        large = modulated_layer_norm(x * size, shift, scale)
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("on", ["reference", "cpu"])
def test_in_float64_eps_has_all_its_digits(on):
    x = torch.tensor([[[1e-3, -1e-3]]], dtype=torch.float64)
    zeros = torch.zeros(1, 2).double()
    with backend(on):
        out = modulated_layer_norm(x, zeros, zeros, eps=1e-6)
    torch.testing.assert_close(out[0, 0, 0].item(), 0.5**0.5, rtol=1e-13, atol=0)


@pytest.mark.parametrize("on", ["reference", "cpu", "triton"])
def test_a_huge_row_does_not_change_its_neighbours(on):
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0, 1] *= 2.0**90
    zeros = torch.zeros(2, 64)
    with backend(on):
        alone = modulated_layer_norm(x, zeros, zeros)
        beside = modulated_layer_norm(other, zeros, zeros)
    alone[0, 1] = beside[0, 1]
    assert_same_bits(alone, beside)


@pytest.mark.parametrize("on", ["reference", "cpu", "triton"])
def test_a_huge_row_is_normalised_beside_one_of_nan(on):
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(1, 64)
    expected = torch.nn.functional.layer_norm(x[0, 0].double(), [64], eps=0).float()
    x[0, 0] *= 2.0**90
    x[0, 1] = NAN
    with backend(on):
        out = modulated_layer_norm(x, zeros, zeros)
    torch.testing.assert_close(out[0, 0], expected)
    assert out[0, 1].isnan().all()


@pytest.mark.parametrize("on", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("eps", [1e-30, 1e-6, 1e30])
def test_a_row_of_one_huge_number_is_its_shift(on, eps):
    x, shift = torch.full((1, 2, 64), 2.0**90), torch.randn(1, 64)
    with backend(on):
        out = modulated_layer_norm(x, shift, torch.ones(1, 64), eps)
    assert torch.equal(out, shift[:, None].expand_as(out))


def test_the_references_norm_is_differentiable_at_any_size():
    x = (torch.arange(8.0) * 2.0**90).view(1, 1, 8).requires_grad_()
    zeros = torch.zeros(1, 8)
    (modulated_layer_norm_reference(x, zeros, zeros) * torch.arange(8.0)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("on", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("shift", [0, 1, 5, 8])
def test_in_place_what_lies_in_ys_memory_is_read_before_it_changes(shift, on):
    def call():
        memory = torch.randn(3 * 8 + 8, generator=torch.Generator().manual_seed(2))
        y, x = memory[:24].view(3, 8), memory[shift : shift + 24].view(3, 8)
        neurons = Neurons(x[:2], None, y[1:], "silu")
        return y, x, neurons, torch.tensor([1, -1, 0])

    with backend(on):
        expected = dynamic_neuron(*call())
        y, *rest = call()
        assert_same_bits(dynamic_neuron_(y, *rest), expected)


def test_columns_of_one_matrix_are_changed_and_read_in_place():
    wide = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
    neurons = Neurons(torch.ones(4, 4), None, torch.ones(4, 6))
    expected = dynamic_neuron(wide[:, :6], wide[:, 6:], neurons)
    assert_same_bits(dynamic_neuron_(wide[:, :6], wide[:, 6:], neurons), expected)


def test_tensors_without_memory_pass_through():
    y, x = torch.zeros(2, 5, device="meta"), torch.zeros(2, 4, device="meta")
    neurons = Neurons(torch.ones(2, 4), None, torch.ones(2, 5)).to("meta")
    assert dynamic_neuron(y, x, neurons).shape == (2, 5)
    assert dynamic_neuron_(y, x, neurons) is y


@pytest.mark.parametrize("on", ["reference", "cpu", "triton"])
def test_a_refusal_is_the_same_from_every_backend(on):
    neurons = Neurons(torch.ones(2, 4), None, torch.ones(2, 5))
    with (
        backend(on),
        pytest.raises(ValueError, match=r"y is torch.int64 \(2, 5\); it must be floa"),
    ):
        dynamic_neuron(torch.zeros(2, 5).long(), torch.ones(2, 4), neurons)
