"""The op against its definition, one row and one product at a time in Python floats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_same_bits, bits
from torch import Tensor

from meg_kernels.neuron import Neurons
from meg_kernels.ops.backend import VARIABLE
from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_, dynamic_neuron_reference

ACTIVATIONS = {
    "identity": lambda a: a,
    "gelu": lambda a: a * 0.5 * math.erfc(-a / math.sqrt(2)),
    "gelu_tanh": lambda a: (
        0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    ),
    "silu": lambda a: a / (1 + math.exp(-a)),
    "relu": lambda a: max(a, 0.0),
}
OPS = {
    "out of place": dynamic_neuron,
    "in place": lambda y, *rest: dynamic_neuron_(y.clone(), *rest),
}


@pytest.fixture(scope="module", params=["cpu", "reference"], autouse=True)
def backend(request):
    """Every test on both of a CPU's backends; the kernels have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, request.param)
        yield request.param


@dataclass
class Call:
    """Arguments of one call."""

    y: Tensor
    x: Tensor
    neurons: Neurons
    index: Tensor

    def of(self, op):
        return op(self.y, self.x, self.neurons, self.index)


def random_call(
    rows,
    tokens,
    d_in,
    d_out,
    index,
    *,
    count=3,
    activation="gelu",
    has_bias=True,
    dtype=torch.float32,
):
    """A call on [B, T] tokens, or on [M] where `tokens` is None."""
    generator = torch.Generator().manual_seed(len(index) + d_in)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leading = (rows,) if tokens is None else (rows, tokens)
    neurons = Neurons(  # scaled so that the activations work where they bend
        normal(count, d_in) / d_in**0.5,
        normal(count) if has_bias else None,
        normal(count, d_out),
        activation,
    )
    index = torch.tensor(index, dtype=torch.int64)
    return Call(normal(*leading, d_out), normal(*leading, d_in), neurons, index)


def oracle(call: Call) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it float32 accumulation and one rounding may end."""
    expected = call.y.double()
    rounding = torch.finfo(call.y.dtype)
    accumulation = torch.finfo(torch.promote_types(call.y.dtype, torch.float32)).eps
    allowed = torch.zeros_like(expected)
    activation = ACTIVATIONS[call.neurons.activation]
    tokens = call.x.shape[1] if call.x.dim() == 3 else 1
    rows = zip(
        call.x.reshape(-1, call.x.shape[-1]).tolist(),
        expected.view(-1, expected.shape[-1]),
        allowed.view(-1, expected.shape[-1]),
        strict=True,
    )
    for m, (x, y, allowed_here) in enumerate(rows):
        i = int(call.index[m // tokens])
        if i < 0:
            continue
        products = [a * b for a, b in zip(x, call.neurons.key[i].tolist(), strict=True)]
        if call.neurons.bias is not None:
            products.append(call.neurons.bias[i].item())
        hidden = activation(math.fsum(products))
        for d, value in enumerate(call.neurons.value[i].tolist()):
            y[d] += hidden * value
            # Every sum and function in between may round by its own size, a few times over.
            in_between = (len(products) + 10) * (1 + math.fsum(map(abs, products))) * abs(value)
            allowed_here[d] = accumulation * (in_between + 2 * abs(y[d]) + abs(hidden * value))
    return expected, allowed + rounding.eps * expected.abs() + rounding.smallest_normal


def assert_follows_the_oracle(actual: Tensor, call: Call) -> None:
    expected, allowed = oracle(call)
    assert actual.shape == call.y.shape and actual.dtype == call.y.dtype
    excess = (actual.double() - expected).abs() - allowed
    assert not len(excess.flatten()) or excess.max() <= 0, excess.max()


@st.composite
def calls(draw):
    rows, count = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    return random_call(
        rows,
        draw(st.none() | st.integers(0, 3)),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 9)),
        draw(st.lists(st.integers(-1, count - 1), min_size=rows, max_size=rows)),
        count=count,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        has_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, *DTYPES])),
    )


@given(calls(), st.sampled_from(sorted(OPS)))
def test_any_call_follows_the_definition(call, op):
    assert_follows_the_oracle(call.of(OPS[op]), call)


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype_follows_the_definition(activation, has_bias, dtype, tokens):
    arguments = {"activation": activation, "has_bias": has_bias, "dtype": dtype}
    call = random_call(5, tokens, 65, 17, [2, -1, 0, 1, 2], **arguments)
    actual = call.of(dynamic_neuron)
    assert_follows_the_oracle(actual, call)
    _, allowed = oracle(call)
    for row in (0, 2, 3, 4) if activation != "relu" else ():  # every neuron acts, visibly
        assert ((actual[row] - call.y[row]).abs() > 10 * allowed[row]).any()


def test_sums_are_accumulated_in_float32_and_rounded_once():
    # 1 + 4096 * 2^-12 = 2: in float16 every single addition to 1 of 2^-12 would be rounded away.
    x = torch.full((1, 4097), 2.0**-12, dtype=torch.float16)
    x[0, 0] = 1
    neurons = Neurons(torch.ones_like(x), None, torch.ones(1, 1, dtype=torch.float16))
    y = torch.full((1, 1), 2.0**-10, dtype=torch.float16)
    assert dynamic_neuron(y, x, neurons).item() == 2.0  # 2 + 2^-10 lies halfway: to even


def test_float64_y_keeps_its_precision_beside_float32_neurons():
    y = torch.full((2, 1), 1 + 2.0**-40, dtype=torch.float64)
    neurons = Neurons(torch.ones(2, 3), None, torch.ones(2, 1))
    result = dynamic_neuron(y, torch.ones(2, 3), neurons, torch.tensor([0, -1]))
    assert result.tolist() == [[4 + 2.0**-40], [1 + 2.0**-40]]


def test_gradients_of_float64_y_are_added_up_in_float64():
    x, neurons = torch.ones(3, 1), Neurons(torch.ones(1, 1), None, torch.ones(1, 1))
    neurons.value.requires_grad_()
    result = dynamic_neuron(x.double(), x, neurons, torch.zeros(3, dtype=torch.int64))
    result.backward(torch.tensor([[2.0**30], [1.0], [-(2.0**30)]], dtype=torch.float64))
    assert neurons.value.grad.item() == 1  # in float32 2^30 + 1 is 2^30


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_does_not_lower_the_precision_of_the_sums(dtype):
    call = random_call(4, 3, 64, 7, [1, -1, 0, 1], dtype=dtype)
    expected = call.of(dynamic_neuron)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call.of(dynamic_neuron), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("tokens", [None, 3])
def test_rows_without_a_neuron_keep_their_very_bits(tokens, dtype, op):
    call = random_call(4, tokens, 5, 6, [-1, 0, -1, 1], dtype=dtype)
    odd = [float("nan"), float("inf"), -float("inf"), -0.0, torch.finfo(dtype).tiny / 4, 1.0]
    call.y[0] = torch.tensor(odd, dtype=dtype)
    bits(call.y)[..., 0].view(-1)[0] ^= 1  # a NaN with a payload of its own
    call.x[0] = float("nan")
    call.x[2] = float("inf")
    result = call.of(OPS[op])
    for row in (0, 2):
        assert_same_bits(result[row], call.y[row])
    for row in (1, 3):
        assert result[row].isfinite().all() and not torch.equal(result[row], call.y[row])


@pytest.mark.parametrize("tokens", [None, 2])
@pytest.mark.parametrize("rows, count", [(0, 0), (0, 2), (3, 0)])
def test_no_rows_or_no_neurons_change_nothing(rows, count, tokens):
    call = random_call(rows, tokens, 4, 5, [-1] * rows, count=count)
    for op in (*OPS.values(), dynamic_neuron_reference):
        result = call.of(op)
        assert torch.equal(result, call.y) and result is not call.y


def test_no_tokens_are_fine():
    assert random_call(2, 0, 4, 5, [0, 1]).of(dynamic_neuron).shape == (2, 0, 5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows, tokens", [(2, 4200), (5, 1500)])
def test_samples_may_be_larger_than_a_cpus_caches_or_fill_them_a_few_times(rows, tokens, op):
    call = random_call(rows, tokens, 64, 1, [1, -1, 0, 2, 1][:rows])
    assert tokens * 64 > 2**18 or rows * tokens * 64 > 1.5 * 2**18  # numbers that are cached
    assert_follows_the_oracle(call.of(OPS[op]), call)


def test_without_index_row_m_has_neuron_m():
    call = random_call(3, 2, 4, 5, [0, 1, 2])
    for op in (dynamic_neuron, dynamic_neuron_):
        expected = call.of(dynamic_neuron)
        assert torch.equal(op(call.y.clone(), call.x, call.neurons), expected)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_poisoned_neuron_harms_only_the_rows_that_have_it(bad, has_bias):
    call = random_call(5, 2, 4, 5, [1, -1, 0, 2, 1], has_bias=has_bias)
    clean = call.of(dynamic_neuron)
    for part in (call.neurons.key, call.neurons.bias, call.neurons.value):
        if part is not None:
            part[0] = bad
    poisoned = call.of(dynamic_neuron)
    assert not poisoned[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(poisoned[others], clean[others])


@pytest.mark.parametrize("op", [dynamic_neuron, dynamic_neuron_reference])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_without_a_neuron_send_nothing_but_ys_own_gradient(has_bias, activation, op):
    call = random_call(3, 2, 4, 5, [-1, 1, -1], has_bias=has_bias, activation=activation)
    call.x[0], call.x[2] = float("nan"), float("inf")
    for part in (call.neurons.key, call.neurons.bias, call.neurons.value):
        if part is not None:
            part[0] = float("nan")  # nobody's neuron
            part.requires_grad_()
    y, x = call.y.requires_grad_(), call.x.requires_grad_()
    call.of(op).sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    assert not x.grad[[0, 2]].any() and x.grad.isfinite().all()
    for part in (call.neurons.key, call.neurons.bias, call.neurons.value):
        if part is not None:
            assert not part.grad[[0, 2]].any() and part.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(dtype):
    call = random_call(6, 3, 64, 33, [2, -1, 0, 1, 2, 0], dtype=dtype)
    whole = call.of(dynamic_neuron)
    for row in range(6):
        only = slice(row, row + 1)
        alone = dynamic_neuron(call.y[only], call.x[only], call.neurons, call.index[only])
        assert torch.equal(alone, whole[only])
    order = torch.tensor([4, 2, 0, 5])
    some = dynamic_neuron(call.y[order], call.x[order], call.neurons, call.index[order])
    assert torch.equal(some, whole[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_tokens_get_what_they_get_as_samples(dtype):
    call = random_call(3, 4, 16, 7, [1, -1, 0], dtype=dtype)
    packed = Call(
        call.y.flatten(0, 1), call.x.flatten(0, 1), call.neurons, call.index.repeat_interleave(4)
    )
    result = packed.of(dynamic_neuron)
    assert_follows_the_oracle(result.view(3, 4, 7), call)


def strided(tensor: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """A view with the tensor's elements, and the NaN-poisoned memory that it lies in."""
    if how == "columns of a wider tensor":
        memory = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
        view = memory[..., 1:-2]
    elif how == "every second row":
        memory = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), float("nan"))
        view = memory[::2]
    else:
        memory = tensor.new_full(tensor.shape[::-1], float("nan"))
        view = memory.permute(*reversed(range(tensor.dim())))
    view.copy_(tensor)
    return view, memory


@pytest.mark.parametrize("how", ["columns of a wider tensor", "every second row", "transposed"])
@pytest.mark.parametrize("tokens", [None, 3])
def test_strided_arguments_give_the_same_and_memory_between_their_elements_is_untouched(
    tokens, how
):
    call = random_call(4, tokens, 6, 7, [1, -1, 0, 1])
    expected, before = call.of(dynamic_neuron), call.y.clone()
    (y, memory), (x, _) = strided(call.y, how), strided(call.x, how)
    key, value = strided(call.neurons.key, how)[0], strided(call.neurons.value, how)[0]
    neurons = Neurons(key, call.neurons.bias, value, call.neurons.activation)
    index = torch.stack([call.index, call.index], dim=1)[:, 0]
    assert not y.is_contiguous() and not index.is_contiguous()

    torch.testing.assert_close(dynamic_neuron(y, x, neurons, index), expected)
    assert torch.equal(y, before)
    assert dynamic_neuron_(y, x, neurons, index) is y
    torch.testing.assert_close(y, expected)
    outside = memory.numel() - y.numel()
    assert memory.isnan().sum() == outside


def test_in_place_changes_and_returns_y_and_out_of_place_leaves_it():
    call = random_call(3, 2, 4, 5, [0, -1, 2])
    before = call.y.clone()
    result = call.of(dynamic_neuron)
    assert torch.equal(call.y, before) and result.data_ptr() != call.y.data_ptr()
    assert call.of(dynamic_neuron_) is call.y
    assert torch.equal(call.y, result) and not torch.equal(result, before)


def test_in_place_with_gradients_changes_y_too_unless_it_is_a_leaf_that_wants_one():
    call = random_call(3, 2, 4, 5, [0, -1, 2])
    expected, y = call.of(dynamic_neuron), call.y.clone()
    call.x.requires_grad_()
    assert dynamic_neuron_(y, call.x, call.neurons, call.index) is y
    assert torch.equal(y, expected) and y.requires_grad
    leaf = call.y.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"y is a leaf that requires a gradient"):
        dynamic_neuron_(leaf, call.x, call.neurons, call.index)
    assert torch.equal(leaf, call.y)


@pytest.mark.parametrize("op", [dynamic_neuron, lambda y, *rest: dynamic_neuron_(y.clone(), *rest)])
@pytest.mark.parametrize("tokens", [None, 2])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_every_argument_are_those_of_finite_differences(
    activation, has_bias, tokens, op
):
    arguments = {"activation": activation, "has_bias": has_bias, "dtype": torch.float64}
    call = random_call(4, tokens, 3, 2, [1, -1, 0, 1], **arguments)
    neurons = call.neurons
    if activation == "relu":
        keys = neurons.key[call.index].unsqueeze(1)
        before = (call.x.view(4, -1, 3) * keys).sum(-1)
        before = before if neurons.bias is None else before + neurons.bias[call.index][:, None]
        assert before.abs().min() > 1e-3  # finite differences must not step over the kink
    inputs = [call.y, call.x, neurons.key, neurons.value]
    inputs += [] if neurons.bias is None else [neurons.bias]

    def function(y, x, key, value, bias=None):
        return op(y, x, Neurons(key, bias, value, activation), call.index)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def refusal(message, **changed):
    """A call with some arguments changed, and what its refusal must say."""
    ones = Neurons(torch.ones(3, 4), torch.ones(3), torch.ones(3, 5))
    y, x = torch.zeros(2, 6, 5), torch.zeros(2, 6, 4)
    call = {"y": y, "x": x, "neurons": ones, "index": torch.tensor([0, 1]), **changed}
    return call, message


REFUSALS = {
    "x of one axis": refusal(
        r"x is \(4,\); it must be \[B, T, 4\] or \[M, 4\]", x=torch.zeros(4), y=torch.zeros(5)
    ),
    "x of four axes": refusal(r"x is \(2, 1, 6, 4\); it must be", x=torch.zeros(2, 1, 6, 4)),
    "x of other width": refusal(
        r"x is \(2, 6, 5\); it must be \[B, T, 4\]", x=torch.zeros(2, 6, 5)
    ),
    "y of other width": refusal(
        r"y is \(2, 6, 4\); beside x \(2, 6, 4\) it must be \(2, 6, 5\)", y=torch.zeros(2, 6, 4)
    ),
    "y of other rows": refusal(r"y is \(1, 6, 5\).* must be \(2, 6, 5\)", y=torch.zeros(1, 6, 5)),
    "y of other axes": refusal(r"y is \(12, 5\).* must be \(2, 6, 5\)", y=torch.zeros(12, 5)),
    "short index": refusal(r"index is \(1,\); it must be \[2\]", index=torch.tensor([0])),
    "index of two axes": refusal(r"index is \(2, 1\); it must be \[2\]", index=torch.zeros(2, 1)),
    "index of int32": refusal(
        r"index is torch.int32 \(2,\); it must be an int64", index=torch.tensor([0, 1]).int()
    ),
    "index too high": refusal(
        r"index holds values from 0 to 3; with 3 neurons they must be from -1 \(none\) to 2",
        index=torch.tensor([0, 3]),
    ),
    "index too low": refusal(r"index holds values from -2 to 0", index=torch.tensor([0, -2])),
    "index elsewhere": refusal(
        r"index on meta and the neurons on cpu; they must share one device",
        index=torch.tensor([0, 1], device="meta"),
    ),
    "x elsewhere": refusal(r"x is on meta, y on cpu", x=torch.zeros(2, 6, 4, device="meta")),
    "y elsewhere": refusal(r"x is on cpu, y on meta", y=torch.zeros(2, 6, 5, device="meta")),
    "neurons elsewhere": refusal(
        r"the neurons on meta",
        neurons=Neurons(torch.ones(3, 4), None, torch.ones(3, 5)).to("meta"),
    ),
    "no index for other rows": refusal(
        r"x has 2 rows and there are 3 neurons; pass index to say", index=None
    ),
}


@pytest.mark.parametrize("op", [dynamic_neuron, dynamic_neuron_])
@pytest.mark.parametrize("case", REFUSALS)
def test_arguments_that_do_not_fit_are_refused(case, op):
    call, message = REFUSALS[case]
    before = call["y"].clone()
    with pytest.raises(ValueError, match=message):
        op(**call)
    assert call["y"].is_meta or torch.equal(call["y"], before)
