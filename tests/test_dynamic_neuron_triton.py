"""The dynamic neuron's Triton kernels against float64: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    DEVICE,
    DTYPES,
    NAN,
    assert_nothing_beside,
    assert_same_bits,
    bits,
    captured,
    laid_out,
    on_gpu,
    recorded,
    triton_marks,
)
from properties import given, st
from torch import Tensor

from meg_kernels.neuron import Neurons

pytest.importorskip("triton")

from meg_kernels.kernels import dynamic_neuron

pytestmark = triton_marks()
ACTIVATIONS = {
    "identity": lambda a: a,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
    "relu": torch.relu,
}
ALL = (True, True, True, True)


# ---- calls and their oracle --------------------------------------------------------------------


@dataclass
class Call:
    """Arguments of one call, and the gradient of its result."""

    y: Tensor
    x: Tensor
    key: Tensor
    bias: Tensor | None
    value: Tensor
    index: Tensor
    activation: str
    grad: Tensor

    @property
    def neurons(self) -> Neurons:
        return Neurons(self.key, self.bias, self.value, self.activation)

    def forward(self, out: Tensor | None = None) -> Tensor:
        """The result in `out`, or in new memory."""
        out = self.y.new_full(self.y.shape, NAN) if out is None else out
        dynamic_neuron.forward(out, self.y, self.x, self.neurons, self.index)
        return out

    def backward(self, needs=ALL) -> tuple[Tensor | None, ...]:
        """(dx, dkey, dbias, dvalue)"""
        return dynamic_neuron.backward(self.grad, self.x, self.neurons, self.index, needs)

    def rows(self, rows: list[int] | slice) -> Call:
        """The same for these rows only."""
        chosen = {name: getattr(self, name)[rows] for name in ("y", "x", "index", "grad")}
        return replace(self, **chosen)


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
) -> Call:
    """A call on [B, T] tokens, or on [M] where `tokens` is None."""
    generator = torch.Generator().manual_seed(len(index) + d_in)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(DEVICE, dtype)

    leading = (rows,) if tokens is None else (rows, tokens)
    return Call(
        y=normal(*leading, d_out),
        x=normal(*leading, d_in),
        key=normal(count, d_in) / d_in**0.5,  # so that the activations work where they bend
        bias=normal(count) if has_bias else None,
        value=normal(count, d_out),
        index=torch.tensor(index, dtype=torch.int64, device=DEVICE),
        activation=activation,
        grad=normal(*leading, d_out),
    )


@dataclass
class Oracle:
    """Results in float64, and how far from them sums of another order and one rounding may end."""

    expected: tuple[Tensor | None, ...]
    allowed: tuple[Tensor | None, ...]

    def assert_allows(self, actual: tuple[Tensor | None, ...], call: Call) -> None:
        rounding = torch.finfo(call.x.dtype)
        for result, expected, allowed in zip(actual, self.expected, self.allowed, strict=True):
            if expected is None:
                assert result is None
                continue
            assert result.shape == expected.shape and result.dtype == call.x.dtype
            rounded = rounding.eps * expected.abs() + rounding.smallest_normal
            excess = (result.double() - expected).abs() - allowed - rounded
            assert not len(excess.flatten()) or excess.max() <= 0, excess.max()


def oracle(call: Call) -> tuple[Oracle, Oracle]:
    """Forward and backward, a row at a time."""
    tokens = call.x.shape[1] if call.x.dim() == 3 else 1
    names = ("y", "x", "grad", "key", "bias", "value")
    y, x, grad, key, bias, value = (
        None if tensor is None else tensor.double().clone(memory_format=torch.contiguous_format)
        for tensor in (getattr(call, name) for name in names)
    )
    out, dx, dkey, dvalue = y.clone(), x * 0, key * 0, value * 0
    dbias = None if bias is None else bias * 0
    error = {name: torch.zeros_like(t) for name, t in (("out", y), ("dx", x), ("dkey", key))}
    error["dvalue"] = torch.zeros_like(value)
    error["dbias"] = torch.zeros(len(key), dtype=torch.float64, device=DEVICE)
    flat = [t.view(-1, t.shape[-1]) for t in (out, dx, error["out"], error["dx"])]
    out_rows, dx_rows, out_error, dx_error = flat
    x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    epsilon = torch.finfo(torch.promote_types(call.x.dtype, torch.float32)).eps
    epsilon *= x.shape[-1] + grad.shape[-1] + len(x_rows) + 20  # every sum, and what is around it

    for m in range(len(x_rows)):
        i = int(call.index[m // tokens])
        if i < 0:
            dx_rows[m] = 0
            continue
        before = (x_rows[m] @ key[i] + (0 if bias is None else bias[i])).requires_grad_()
        hidden = ACTIVATIONS[call.activation](before)
        (slope,) = torch.autograd.grad(hidden, before)
        hidden = hidden.detach()
        dhidden = grad_rows[m] @ value[i]
        dbefore = dhidden * slope
        out_rows[m] += hidden * value[i]
        dx_rows[m] = dbefore * key[i]
        dkey[i] += dbefore * x_rows[m]
        dvalue[i] += hidden * grad_rows[m]
        if dbias is not None:
            dbias[i] += dbefore
        # The activations bend by 1.2 at most, and by as much their slopes change.
        size = 1 + (x_rows[m] * key[i]).abs().sum() + (0 if bias is None else bias[i].abs())
        hidden_error = 1.2 * epsilon * size
        dbefore_error = 3 * epsilon * size * (grad_rows[m] * value[i]).abs().sum()
        out_error[m] = hidden_error * value[i].abs() + epsilon * out_rows[m].abs()
        dx_error[m] = dbefore_error * key[i].abs()
        error["dkey"][i] += (dbefore_error + epsilon * dbefore.abs()) * x_rows[m].abs()
        error["dbias"][i] += dbefore_error + epsilon * dbefore.abs()
        error["dvalue"][i] += hidden_error * grad_rows[m].abs()
    backward = (dx, dkey, dbias, dvalue)
    return (
        Oracle((out,), (error["out"],)),
        Oracle(backward, tuple(error[name] for name in ("dx", "dkey", "dbias", "dvalue"))),
    )


# What `laid_out` takes: gaps in front, between rows and between samples, and the order.
layouts = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.booleans())


@st.composite
def calls(draw):
    rows, count = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    call = random_call(
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
    for name in ("x", "grad", "key", "value"):
        setattr(call, name, laid_out(getattr(call, name), *draw(layouts)))
    if call.bias is not None:
        call.bias = laid_out(call.bias.unsqueeze(1), *draw(layouts))[:, 0]
    call.index = torch.stack([call.index] * draw(st.integers(1, 2)), dim=1)[:, 0]
    return call


# ---- forward -----------------------------------------------------------------------------------


@given(calls(), layouts, layouts)
def test_any_call_follows_the_definition(call, y_layout, out_layout):
    expected, _ = oracle(call)
    call.y = laid_out(call.y, *y_layout)
    before = call.y.clone()
    out = laid_out(torch.full_like(call.y, NAN), *out_layout)
    call.forward(out)
    expected.assert_allows((out,), call)
    assert_nothing_beside(out)
    assert_same_bits(call.y, before)
    call.forward(call.y)
    expected.assert_allows((call.y,), call)
    assert_nothing_beside(call.y)


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype_follows_the_definition(activation, has_bias, dtype, tokens):
    arguments = {"activation": activation, "has_bias": has_bias, "dtype": dtype}
    call = random_call(4, tokens, 64, 24, [2, -1, 0, 2], **arguments)
    expected, gradients = oracle(call)
    expected.assert_allows((call.forward(),), call)
    gradients.assert_allows(call.backward(), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d_in", "d_out"),
    [
        (1, 1),
        (7, 13),  # misaligned rows, shorter than a vector
        (576, 576),
        (2560, 2560),
        (2561, 3001),  # misaligned rows of more than one block
        (9000, 64),  # aligned rows of several blocks, before and
        (64, 9000),  # after the activation
    ],
)
def test_rows_of_any_width(d_in, d_out, dtype):
    call = random_call(3, None, d_in, d_out, [1, -1, 0], count=2, dtype=dtype)
    expected, gradients = oracle(call)
    expected.assert_allows((call.forward(),), call)
    expected.assert_allows((call.forward(call.y),), call)
    dx, *_ = call.backward((True, False, False, False))
    Oracle(gradients.expected[:1], gradients.allowed[:1]).assert_allows((dx,), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 7), (128, 300), (301, 256)])
def test_gradients_of_any_width(d_in, d_out, dtype):
    call = random_call(4, 5, d_in, d_out, [1, -1, 0, 1], count=2, dtype=dtype)
    oracle(call)[1].assert_allows(call.backward(), call)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_pre_activations_are_followed_without_nan(activation):
    call = random_call(8, None, 1, 1, list(range(8)), count=8, activation=activation)
    call.x = torch.tensor([-3e4, -90.0, -9.0, -1e-6, 0.0, 9.0, 90.0, 3e4], device=DEVICE)[:, None]
    call.key, call.bias, call.value = call.key * 0 + 1, call.bias * 0, call.value * 0 + 1
    call.y, call.grad = call.y * 0, call.grad * 0 + 1
    expected, gradients = oracle(call)
    expected.assert_allows((call.forward(),), call)
    gradients.assert_allows(call.backward(), call)


def test_sums_are_accumulated_in_float32_and_rounded_once():
    # 1 + 4096 * 2^-12 = 2: in float16 every single addition to 1 of 2^-12 would be rounded away.
    x = torch.full((1, 4097), 2.0**-12, dtype=torch.float16, device=DEVICE)
    x[0, 0] = 1
    value = x.new_ones(1, 1)
    y = x.new_full((1, 1), 2.0**-10)
    index = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    Call(y, x, torch.ones_like(x), None, value, index, "identity", y).forward(y)
    assert y.item() == 2.0  # 2 + 2^-10 lies halfway: to even


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("tokens", [None, 3])
def test_rows_without_a_neuron_keep_their_very_bits(tokens, dtype, in_place):
    call = random_call(4, tokens, 5, 6, [-1, 0, -1, 1], dtype=dtype)
    odd = [NAN, float("inf"), -float("inf"), -0.0, torch.finfo(dtype).tiny / 4, 1.0]
    call.y[0] = torch.tensor(odd, dtype=dtype)
    bits(call.y)[..., 0].view(-1)[0] ^= 1  # a NaN with a payload of its own
    call.x[0], call.x[2] = NAN, float("inf")
    before = call.y.clone()
    result = call.forward(call.y if in_place else None)
    for row in (0, 2):
        assert_same_bits(result[row], before[row])
    for row in (1, 3):
        assert result[row].isfinite().all() and not torch.equal(result[row], before[row])


@pytest.mark.parametrize("rows, tokens, count", [(0, None, 2), (0, 2, 2), (2, 0, 2), (3, 2, 0)])
def test_no_rows_no_tokens_or_no_neurons(rows, tokens, count):
    call = random_call(rows, tokens, 4, 5, [0 if count > 0 else -1] * rows, count=count)
    assert_same_bits(call.forward(), call.y)
    dx, dkey, dbias, dvalue = call.backward()
    assert dx.shape == call.x.shape and not dx.any()
    for gradient, like in ((dkey, call.key), (dbias, call.bias), (dvalue, call.value)):
        assert gradient.shape == like.shape and not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 33])
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(width, dtype):
    call = random_call(6, 2, width, width, [2, -1, 0, 1, 2, 0], dtype=dtype)
    whole, (dx, *_) = call.forward(), call.backward()
    for rows in ([2], [4, 2, 0, 5]):
        some = call.rows(rows)
        assert_same_bits(some.forward(), whole[rows])
        assert_same_bits(some.forward(some.y), whole[rows])
        assert_same_bits(some.backward()[0], dx[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_cut_from_a_batch_of_any_stride_gets_the_same_bits(dtype):
    call = random_call(3, None, 64, 64, [2, 0, 1], dtype=dtype)
    for name in ("y", "x", "grad"):
        setattr(call, name, laid_out(getattr(call, name), row_gap=3))
    whole, (dx, *_) = call.forward(), call.backward()
    for row in range(3):
        alone = call.rows(slice(row, row + 1))
        assert_same_bits(alone.forward(), whole[row : row + 1])
        assert_same_bits(alone.backward()[0], dx[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_tokens_get_the_bits_that_they_get_as_samples(dtype):
    call = random_call(3, 4, 16, 8, [1, -1, 0], dtype=dtype)
    flat = {name: getattr(call, name).flatten(0, 1) for name in ("y", "x", "grad")}
    packed = replace(call, index=call.index.repeat_interleave(4), **flat)
    assert_same_bits(packed.forward(), call.forward().flatten(0, 1))
    for actual, expected in zip(packed.backward(), call.backward(), strict=True):
        assert_same_bits(actual.flatten(), expected.flatten())


def test_one_sequence_may_serve_the_whole_batch():
    call = random_call(4, 3, 6, 8, [0, -1, 2, 1])
    call.x = call.x[:1].expand(4, 3, 6)
    call.y = call.y[:, :1].expand(4, 3, 8)
    expected, gradients = oracle(call)
    expected.assert_allows((call.forward(torch.full((4, 3, 8), NAN, device=DEVICE)),), call)
    gradients.assert_allows(call.backward(), call)


def test_a_slice_of_longer_sequences():
    longer = random_call(3, 9, 16, 8, [1, -1, 0])
    before = longer.y.clone()
    tokens = slice(3, 7)
    parts = {name: getattr(longer, name)[:, tokens] for name in ("y", "x", "grad")}
    call = replace(longer, **parts)
    assert not call.y.is_contiguous()
    expected, gradients = oracle(call)
    gradients.assert_allows(call.backward(), call)
    expected.assert_allows((call.forward(call.y),), call)
    outside = [0, 1, 2, 7, 8]
    assert_same_bits(longer.y[:, outside], before[:, outside])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_every_activation(activation):
    call = random_call(2, None, 4, 5, [1, 0], activation=activation)
    call.x[0, 2] = NAN
    out, (_, dkey, *_) = call.forward(), call.backward()
    assert out[0].isnan().all() and out[1].isfinite().all()
    assert dkey[1].isnan().any() and dkey[0].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_poisoned_neuron_harms_only_the_rows_that_have_it(has_bias, bad):
    call = random_call(5, 2, 4, 5, [1, -1, 0, 2, 1], has_bias=has_bias)
    clean, clean_gradients = call.forward(), call.backward()
    for part in (call.key, call.bias, call.value):
        if part is not None:
            part[0] = bad
    poisoned, gradients = call.forward(), call.backward()
    assert not poisoned[2].isfinite().any()
    others, neurons = [0, 1, 3, 4], [1, 2]
    assert_same_bits(poisoned[others], clean[others])
    assert_same_bits(gradients[0][others], clean_gradients[0][others])
    for actual, expected in zip(gradients[1:], clean_gradients[1:], strict=True):
        if expected is not None:
            assert_same_bits(actual[neurons], expected[neurons])


@pytest.mark.parametrize("name", ["y", "x", "key", "value", "grad"])
def test_offsets_beyond_32_bits(far, name):
    call = random_call(3, None, 8, 8, [1, 2, 0], dtype=torch.float16)
    expected, gradients = oracle(call)
    setattr(call, name, far(getattr(call, name)))
    gradients.assert_allows(call.backward(), call)
    expected.assert_allows((call.forward(),), call)
    expected.assert_allows((call.forward(call.y),), call)


# ---- launches ----------------------------------------------------------------------------------


def test_more_programs_than_small_grid_dimensions_hold():
    call = random_call(1, None, 4, 4, [0], count=1)
    many = 70_000
    for name in ("y", "x", "grad", "index"):
        tensor = getattr(call, name)
        setattr(call, name, tensor.expand(many, *tensor.shape[1:]))
    call.key, call.value = call.key.expand(many, 4), call.value.expand(many, 4)
    call.bias = call.bias.expand(many)
    with recorded(dynamic_neuron, run=False) as launches:
        call.forward()
        call.backward()
    assert [launch.grid for launch in launches] == [(many,)] * 4


def test_forward_is_one_launch():
    with recorded(dynamic_neuron) as launches:
        random_call(4, 3, 8, 8, [0, 1, -1, 2]).forward()
    assert len(launches) == 1


ALIGNED = {"ROWS_ALIGNED": True, "NEURONS_ALIGNED": True}


def test_aligned_rows_are_recognised():
    for call in (
        random_call(4, None, 64, 32, [0, 1, -1, 2], dtype=torch.bfloat16),
        random_call(1, None, 64, 32, [0], dtype=torch.bfloat16),
        random_call(2, 3, 8, 8, [0, -1], dtype=torch.float16),
    ):
        with recorded(dynamic_neuron) as launches:
            call.forward()
            call.backward()
        for launch in launches[:2]:
            assert launch.options.items() >= ALIGNED.items()
        assert all(launch.options["ALIGNED"] for launch in launches[2:])


def test_rows_that_end_within_16_bytes_are_not_aligned():
    call = random_call(2, None, 60, 60, [0, 1], dtype=torch.bfloat16)
    for name in ("y", "x", "grad", "key", "value"):
        setattr(call, name, laid_out(getattr(call, name), row_gap=4))  # they start at 16 bytes
    with recorded(dynamic_neuron, run=False) as launches:
        call.forward(call.y)
        call.backward((False, True, True, True))
    assert not any(
        value
        for launch in launches
        for name, value in launch.options.items()
        if name.endswith("ALIGNED")
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *itertools.product(["y", "x", "grad", "key", "value"], [(1, 0, 0), (0, 4, 0)]),
        *itertools.product(["y", "x", "grad"], [(0, 0, 4)]),
    ],
    ids=str,
)
def test_one_misaligned_argument_is_enough_for_narrow_loads(name, layout):
    call = random_call(4, 2, 64, 32, [0, 1, -1, 2], dtype=torch.bfloat16)
    expected, gradients = oracle(call)
    setattr(call, name, laid_out(getattr(call, name), *layout))
    part = "NEURONS_ALIGNED" if name in ("key", "value") else "ROWS_ALIGNED"
    with recorded(dynamic_neuron) as launches:
        expected.assert_allows((call.forward(),), call)
        gradients.assert_allows(call.backward(), call)
    forward, rows, x_sums, grad_sums = (launch.options for launch in launches)
    assert forward[part] is (name == "grad")
    assert rows[part] is (name == "y")
    assert x_sums["ALIGNED"] is (name != "x")
    assert grad_sums["ALIGNED"] is (name != "grad")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_every_launch_is_one_of_the_configurations(dtype):
    with recorded(dynamic_neuron, run=False) as launches:
        for width, offset in itertools.product([1, 8, 500, 576, 1024, 4096, 5121, 20_000], [0, 1]):
            call = random_call(2, None, width, 8, [0, 1], dtype=dtype)
            for name in ("y", "key"):
                moved = replace(call, **{name: laid_out(getattr(call, name), offset)})
                moved.forward()
                moved.backward()
    for launch in launches:
        assert launch.options["num_stages"] == 1
        assert launch.is_listed_in(dynamic_neuron), launch


# ---- backward ----------------------------------------------------------------------------------


@given(calls())
def test_gradients_of_any_call_follow_the_definition(call):
    _, gradients = oracle(call)
    gradients.assert_allows(call.backward(), call)


class Differentiable(torch.autograd.Function):
    """The kernels as autograd sees them."""

    @staticmethod
    def forward(ctx, y, x, key, bias, value, index, activation):
        ctx.save_for_backward(x, key, bias, value, index)
        ctx.activation = activation
        out = torch.empty_like(y)
        dynamic_neuron.forward(out, y, x, Neurons(key, bias, value, activation), index)
        return out

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1:5]
        x, key, bias, value, index = ctx.saved_tensors
        neurons = Neurons(key, bias, value, ctx.activation)
        gradients = dynamic_neuron.backward(grad, x, neurons, index, needs)
        return grad, *gradients, None, None


@pytest.mark.parametrize(
    ("activation", "tokens", "has_bias"),
    [*((activation, 2, True) for activation in ACTIVATIONS), ("silu", None, False)],
)
def test_gradients_pass_gradcheck(activation, tokens, has_bias):
    # Neuron 1 has two rows, neuron 2 none.
    arguments = {"activation": activation, "has_bias": has_bias, "dtype": torch.float64}
    call = random_call(4, tokens, 3, 2, [1, -1, 0, 1], **arguments)
    inputs = [
        None if part is None else part.requires_grad_()
        for part in (call.y, call.x, call.key, call.bias, call.value)
    ]
    assert torch.autograd.gradcheck(
        lambda *parts: Differentiable.apply(*parts, call.index, activation), inputs, fast_mode=True
    )


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)), ids=str)
def test_only_the_gradients_needed_are_made_with_the_same_bits(needs):
    call = random_call(4, 2, 5, 7, [1, -1, 0, 1])
    everything, some = call.backward(), call.backward(needs)
    for needed, expected, actual in zip(needs, everything, some, strict=True):
        if needed:
            assert_same_bits(actual, expected)
        else:
            assert actual is None


def test_neurons_that_nobody_has_get_zero():
    call = random_call(3, 2, 4, 5, [3, -1, 1], count=5)
    for part in (call.key, call.bias, call.value):
        part[[0, 2, 4]] = NAN
    for gradient in call.backward()[1:]:
        assert not gradient[[0, 2, 4]].any()
        assert gradient[[1, 3]].isfinite().all() and gradient[[1, 3]].any()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_without_a_neuron_send_and_get_nothing(activation, bad):
    call = random_call(4, 2, 4, 5, [-1, 1, -1, 1], activation=activation)
    call.x[[0, 2]], call.grad[[0, 2]] = bad, bad
    dx, *of_neurons = call.backward()
    assert not dx[[0, 2]].any() and dx.isfinite().all()
    alone = call.rows([1, 3]).backward()
    for actual, expected in zip(of_neurons, alone[1:], strict=True):
        assert_same_bits(actual, expected)


def test_a_bad_row_harms_only_its_own_neuron():
    call = random_call(4, None, 4, 5, [1, 0, 1, 2])
    _, *clean = call.backward()
    call.x[1], call.grad[3] = NAN, float("inf")
    dx, *poisoned = call.backward()
    assert dx[[0, 2]].isfinite().all()
    for actual, expected in zip(poisoned, clean, strict=True):
        assert not actual[[0, 2]].isfinite().all()
        assert_same_bits(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_neurons_gradient_has_the_same_bits_whatever_other_rows_there_are(dtype):
    index = [1, 0, -1, 1, 2, 1, 0, 1, 1]  # 20 tokens of neuron 1: more than are summed at once
    call = random_call(9, 4, 16, 8, index, dtype=dtype)
    whole = call.backward()
    for again, expected in zip(call.backward(), whole, strict=True):
        assert_same_bits(again, expected)
    for neuron in range(3):
        own = [row for row, i in enumerate(index) if i == neuron]
        alone = call.rows(own).backward()
        for actual, expected in zip(alone[1:], whole[1:], strict=True):
            assert_same_bits(actual[neuron], expected[neuron])


def test_the_gradient_of_a_sum_may_be_one_element_expanded():
    call = random_call(4, 3, 6, 5, [1, -1, 0, 1])
    call.grad = torch.ones((), device=DEVICE).expand(4, 3, 5)
    _, gradients = oracle(call)
    gradients.assert_allows(call.backward(), call)


# ---- on a GPU only -----------------------------------------------------------------------------


@on_gpu
def test_many_rows_on_the_gpu():
    call = random_call(700, 100, 64, 64, list(range(-1, 699)), count=699, dtype=torch.bfloat16)
    few = [0, 1, 350, 699]
    expected, _ = oracle(call.rows(few))
    expected.assert_allows((call.forward()[few],), call)
    dx, *_ = call.backward()
    assert_same_bits(dx[few], call.rows(few).backward()[0])


@on_gpu
def test_a_graph_replays_forward_with_other_neurons():
    call = random_call(64, 1, 576, 576, [b % 3 - 1 for b in range(64)], dtype=torch.bfloat16)
    out, graph = captured(call.forward)
    for seed in range(3):
        other = random_call(64, 1, 576, 576, [(b + seed) % 4 - 1 for b in range(64)])
        for name in ("y", "x", "key", "bias", "value", "index"):
            getattr(call, name).copy_(getattr(other, name))
        out.fill_(NAN)
        graph.replay()
        oracle(call)[0].assert_allows((out,), call)
