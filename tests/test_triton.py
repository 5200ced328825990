"""The Triton kernels against float64: in Triton's interpreter, or on the GPU where there is one.

The interpreter runs the kernels as they stand, one program after the other, in numpy. What it does
not show (registers, widths of loads, hints that are wrong) is in test_ahead_of_time.py; what only
a GPU shows is at the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from properties import given, st
from torch import Tensor

from meg_kernels import kernels

pytest.importorskip("triton")

import triton

from meg_kernels.kernels import dynamic_neuron, entropy_gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_REASON = kernels.unavailable_reason(DEVICE)
pytestmark = [
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's remarks on infinities
    pytest.mark.usefixtures("faster_interpreter", "poisoned_memory"),
]
if DEVICE.type == "cuda":
    pytestmark.append(pytest.mark.gpu)

ACTIVATIONS = {
    "identity": lambda a: a,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
    "relu": torch.relu,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
NAN = float("nan")
ALL = (True, True, True, True)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INT_OF_SIZE[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(bits(actual), bits(expected))


# ---- calls of the dynamic neuron ---------------------------------------------------------------


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

    def forward(self, out: Tensor | None = None) -> Tensor:
        """The result in `out`, or in new memory."""
        out = self.y.new_full(self.y.shape, NAN) if out is None else out
        parts = (self.key, self.bias, self.value, self.index, self.activation)
        dynamic_neuron.forward(out, self.y, self.x, *parts)
        return out

    def backward(self, needs=ALL) -> tuple[Tensor | None, ...]:
        """(dx, dkey, dbias, dvalue)"""
        parts = (self.key, self.bias, self.value, self.index, self.activation)
        return dynamic_neuron.backward(self.grad, self.x, *parts, needs)

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


# How a tensor may lie in memory, of which all the rest is NaN. (In front of the first row, between
# tokens, between samples: elements; and whether the samples of a token are neighbours.)
Layout = tuple[int, int, int, bool]
DENSE: Layout = (0, 0, 0, False)


def laid_out(tensor: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """A tensor with the same elements, and the memory that it lies in."""
    front, token_gap, sample_gap, tokens_first = layout
    shape = tensor.shape
    if tensor.dim() == 3 and tokens_first:
        view, memory = laid_out(tensor.transpose(0, 1), (front, token_gap, sample_gap, False))
        return view.transpose(0, 1), memory
    strides = [shape[-1] + token_gap, 1]
    if tensor.dim() == 3:
        strides.insert(0, shape[1] * strides[0] + sample_gap)
    memory = tensor.new_full((front + shape[0] * max(strides[0], 1) + 1,), NAN)
    view = memory.as_strided(shape, strides, front)
    view.copy_(tensor)
    return view, memory


def assert_nothing_beside(view: Tensor, memory: Tensor) -> None:
    """Around the view all memory is still NaN."""
    inside = view.clone()
    view.fill_(NAN)
    assert memory.isnan().all()
    view.copy_(inside)


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
        view, _ = laid_out(getattr(call, name), draw(layouts))
        setattr(call, name, view)
    if call.bias is not None:
        call.bias = laid_out(call.bias.unsqueeze(1), draw(layouts))[0][:, 0]
    call.index = torch.stack([call.index] * draw(st.integers(1, 2)), dim=1)[:, 0]
    return call


# ---- forward -----------------------------------------------------------------------------------


@given(calls(), layouts, layouts)
def test_any_call_follows_the_definition(call, y_layout, out_layout):
    expected, _ = oracle(call)
    call.y, y_memory = laid_out(call.y, y_layout)
    before = call.y.clone()
    out, memory = laid_out(torch.full_like(call.y, NAN), out_layout)
    call.forward(out)
    expected.assert_allows((out,), call)
    assert_nothing_beside(out, memory)
    assert_same_bits(call.y, before)
    call.forward(call.y)
    expected.assert_allows((call.y,), call)
    assert_nothing_beside(call.y, y_memory)


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
        setattr(call, name, laid_out(getattr(call, name), (0, 3, 0, False))[0])
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


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU would really need the memory")
@pytest.mark.parametrize("name", ["y", "x", "key", "value", "grad"])
def test_offsets_beyond_32_bits(name, monkeypatch):
    # The interpreter would copy all arguments back to where they are: 4 GiB that nobody touches.
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    call = random_call(3, None, 8, 8, [1, 2, 0], dtype=torch.float16)
    expected, gradients = oracle(call)
    distance = 2**30 + 8  # fits in 32 bits; twice as far does not
    memory = torch.UntypedStorage(2 * (2 * distance + 8))
    far = torch.tensor([], dtype=torch.float16).set_(memory, 0, (3, 8), (distance, 1))
    far.copy_(getattr(call, name))
    setattr(call, name, far)
    gradients.assert_allows(call.backward(), call)
    expected.assert_allows((call.forward(),), call)
    expected.assert_allows((call.forward(call.y),), call)


# ---- launches ----------------------------------------------------------------------------------


@dataclass
class Launch:
    """What one kernel was launched with."""

    kernel: object
    grid: tuple[int, ...]
    options: dict


@contextlib.contextmanager
def recorded(run: bool = True):
    """The launches made in this block; with run=False they are only noted."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                launches.append(Launch(self.kernel, grid, options))
                return self.kernel[grid](*args, **options) if run else None

            return launch

    with pytest.MonkeyPatch.context() as patch:
        for module in (dynamic_neuron, entropy_gate):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(getattr(module, name)))
        yield launches


def test_more_programs_than_small_grid_dimensions_hold():
    call = random_call(1, None, 4, 4, [0], count=1)
    many = 70_000
    for name in ("y", "x", "grad", "index"):
        tensor = getattr(call, name)
        setattr(call, name, tensor.expand(many, *tensor.shape[1:]))
    call.key, call.value = call.key.expand(many, 4), call.value.expand(many, 4)
    with recorded(run=False) as launches:
        call.forward()
        call.backward()
    assert [launch.grid for launch in launches] == [(many,)] * 4


def test_forward_is_one_launch():
    with recorded() as launches:
        random_call(4, 3, 8, 8, [0, 1, -1, 2]).forward()
        entropy_gate.forward(torch.zeros(100, 10, device=DEVICE), 1.0, new_counter())
    assert len(launches) == 2


ALIGNED = {"ROWS_ALIGNED": True, "NEURONS_ALIGNED": True}


def test_aligned_rows_are_recognised():
    for call in (
        random_call(4, None, 64, 32, [0, 1, -1, 2], dtype=torch.bfloat16),
        random_call(1, None, 64, 32, [0], dtype=torch.bfloat16),
        random_call(2, 3, 8, 8, [0, -1], dtype=torch.float16),
    ):
        with recorded() as launches:
            call.forward()
            call.backward()
        for launch in launches[:2]:
            assert launch.options.items() >= ALIGNED.items()
        assert all(launch.options["ALIGNED"] for launch in launches[2:])


def test_rows_that_end_within_16_bytes_are_not_aligned():
    call = random_call(2, None, 60, 60, [0, 1], dtype=torch.bfloat16)
    for name in ("y", "x", "grad", "key", "value"):
        view, _ = laid_out(getattr(call, name), (0, 4, 0, False))  # they start at 16 bytes
        setattr(call, name, view)
    with recorded(run=False) as launches:
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
        *itertools.product(
            ["y", "x", "grad", "key", "value"], [(1, 0, 0, False), (0, 4, 0, False)]
        ),
        *itertools.product(["y", "x", "grad"], [(0, 0, 4, False)]),
    ],
    ids=str,
)
def test_one_misaligned_argument_is_enough_for_narrow_loads(name, layout):
    call = random_call(4, 2, 64, 32, [0, 1, -1, 2], dtype=torch.bfloat16)
    expected, gradients = oracle(call)
    view, _ = laid_out(getattr(call, name), layout)
    setattr(call, name, view)
    part = "NEURONS_ALIGNED" if name in ("key", "value") else "ROWS_ALIGNED"
    with recorded() as launches:
        expected.assert_allows((call.forward(),), call)
        gradients.assert_allows(call.backward(), call)
    forward, rows, x_sums, grad_sums = (launch.options for launch in launches)
    assert forward[part] is (name == "grad")
    assert rows[part] is (name == "y")
    assert x_sums["ALIGNED"] is (name != "x")
    assert grad_sums["ALIGNED"] is (name != "grad")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_every_launch_is_one_of_the_configurations(dtype):
    listed = [*dynamic_neuron.configurations(), *entropy_gate.configurations()]
    with recorded(run=False) as launches:
        for width, offset in itertools.product([1, 8, 500, 576, 1024, 4096, 5121, 20_000], [0, 1]):
            call = random_call(2, None, width, 8, [0, 1], dtype=dtype)
            for name in ("y", "key"):
                view, _ = laid_out(getattr(call, name), (offset, 0, 0, False))
                moved = replace(call, **{name: view})
                moved.forward()
                moved.backward()
        if dtype in entropy_gate.DTYPES:
            for classes in (2, 10, 32, 33, 512, 513, 4096):
                logits = torch.zeros(2, classes, dtype=dtype, device=DEVICE)
                entropy_gate.forward(logits, 1.0, new_counter())
    for launch in launches:
        constants = {name: value for name, value in launch.options.items() if name.isupper()}
        assert launch.options["num_stages"] == 1
        assert any(
            configuration.kernel is launch.kernel
            and configuration.constants == constants
            and configuration.warps == launch.options["num_warps"]
            for configuration in listed
        ), launch


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
        dynamic_neuron.forward(out, y, x, key, bias, value, index, activation)
        return out

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1:5]
        gradients = dynamic_neuron.backward(grad, *ctx.saved_tensors, ctx.activation, needs)
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


# ---- the entropy gate --------------------------------------------------------------------------


def new_counter() -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


def gate(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's four results, checked against each other and against float64."""
    counter = new_counter()
    entropy, index, rows, count = results = entropy_gate.forward(logits, threshold, counter)
    assert counter.item() == 0
    assert [result.dtype for result in results] == [torch.float32] + [torch.int64] * 3
    probability = logits.double().softmax(-1)
    expected = torch.special.entr(probability).sum(-1)  # 0 log 0 = 0
    allowed = torch.finfo(torch.float32).eps * (logits.shape[1] + 20) * 4
    assert torch.equal(entropy.isnan(), expected.isnan())
    assert ((entropy.double() - expected).abs().nan_to_num(0) <= allowed).all()
    threshold = torch.tensor(threshold, dtype=torch.float32).item()
    edited = [b for b, nats in enumerate(entropy.tolist()) if nats < threshold]
    assert count.tolist() == [len(edited)]
    assert rows.tolist() == edited + [-1] * (len(logits) - len(edited))
    rank = {b: place for place, b in enumerate(edited)}
    assert index.tolist() == [rank.get(b, -1) for b in range(len(logits))]
    return results


def random_logits(batch, classes, *, spread=4.0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 5000 + classes)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * spread
    return logits.to(DEVICE, dtype)


@given(
    batch=st.integers(0, 130),
    classes=st.integers(2, 40),
    spread=st.sampled_from([0.0, 0.1, 4.0, 100.0]),
    dtype=st.sampled_from(DTYPES),
    threshold=st.floats(0, 4, width=32),
    layout=layouts,
)
def test_the_gate_follows_the_definition(batch, classes, spread, dtype, threshold, layout):
    logits = random_logits(batch, classes, spread=spread, dtype=dtype)
    gate(laid_out(logits, layout)[0], threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 32, 33, 512, 513, 4096])
def test_the_gate_takes_any_number_of_classes(classes, dtype):
    *_, count = gate(random_logits(9, classes, dtype=dtype), math.log(classes) / 4)
    assert classes > 512 or 0 < count.item() < 9


def test_the_gate_numbers_more_rows_than_it_scans_at_once():
    *_, count = gate(random_logits(2500, 3), 0.5)
    assert 0 < count.item() < 2500


@pytest.mark.parametrize("threshold, edited", [(0.0, 0), (10.0, 130)])
def test_the_gate_may_take_no_row_or_all(threshold, edited):
    *_, count = gate(random_logits(130, 10), threshold)
    assert count.item() == edited


def test_an_entropy_at_the_threshold_is_not_below_it():
    logits = torch.zeros(3, 2, device=DEVICE)
    entropy = gate(logits, 1.0)[0]
    assert torch.allclose(entropy, torch.full_like(entropy, math.log(2)))
    at = entropy[0].item()
    assert gate(logits, at)[1].tolist() == [-1, -1, -1]
    assert gate(logits, math.nextafter(at, 1) + 1e-7)[1].tolist() == [0, 1, 2]


def test_logits_that_are_not_finite():
    infinity = float("inf")
    logits = torch.zeros(6, 3, device=DEVICE)
    logits[1, 0] = NAN
    logits[2] = -infinity
    logits[3, 1:] = -infinity  # impossible classes: the third row is certain of the first one
    logits[4, 0] = infinity
    logits[5] = torch.tensor([3e38, -3e38, 0.0])
    entropy, index, _, _ = gate(logits, 0.1)
    assert entropy[[3, 5]].tolist() == [0, 0]
    assert index.tolist() == [-1, -1, -1, 0, -1, 1]


def test_a_rows_entropy_has_the_same_bits_whatever_else_is_in_the_batch():
    logits = random_logits(100, 10)
    whole = entropy_gate.forward(logits, 0.5, new_counter())[0]
    for rows in ([3], [99], [70, 1, 40]):
        assert_same_bits(entropy_gate.forward(logits[rows], 0.5, new_counter())[0], whole[rows])


def test_the_counter_serves_one_launch_after_another():
    counter = new_counter()
    for batch in (200, 1, 0, 64):
        logits = random_logits(batch, 10)
        results = entropy_gate.forward(logits, 0.5, counter)
        for actual, expected in zip(results, gate(logits, 0.5), strict=True):
            assert_same_bits(actual, expected)


# ---- where the kernels run ---------------------------------------------------------------------


@pytest.fixture
def reason(monkeypatch):
    """reason(device): asked anew, outside the interpreter."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    kernels.unavailable_reason.cache_clear()
    yield lambda device: kernels.unavailable_reason(torch.device(device))
    kernels.unavailable_reason.cache_clear()


def test_without_triton_the_reason_says_how_to_install_it(reason, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in reason("cuda")


def test_tensors_on_the_cpu_need_the_interpreter(reason, monkeypatch):
    assert "TRITON_INTERPRET=1" in reason("cpu")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    kernels.unavailable_reason.cache_clear()
    assert reason("cpu") is None


def test_a_torch_without_cuda_is_named(reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in reason("cuda")


def test_a_missing_or_an_old_gpu_is_named(reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in reason("cuda")
    kernels.unavailable_reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 is sm_75" in reason("cuda")


def test_a_triton_that_cannot_start_says_why(reason, monkeypatch):
    def no_compiler(_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(no_compiler))
    assert "Failed to find C compiler" in reason("cuda")
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda _: "a driver"))
    kernels.unavailable_reason.cache_clear()
    assert reason("cuda") is None


# ---- on a GPU only -----------------------------------------------------------------------------


def on_gpu(test):
    """Mark a test that means nothing in the interpreter."""
    needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
    return pytest.mark.gpu(needs_gpu(test))


@on_gpu
def test_many_rows_on_the_gpu():
    call = random_call(700, 100, 64, 64, list(range(-1, 699)), count=699, dtype=torch.bfloat16)
    few = [0, 1, 350, 699]
    expected, _ = oracle(call.rows(few))
    expected.assert_allows((call.forward()[few],), call)
    dx, *_ = call.backward()
    assert_same_bits(dx[few], call.rows(few).backward()[0])


@on_gpu
def test_the_gate_on_many_rows_again_and_again():
    logits = random_logits(100_000, 10)
    first = gate(logits, 0.5)
    counter = new_counter()
    for _ in range(20):
        for actual, expected in zip(entropy_gate.forward(logits, 0.5, counter), first, strict=True):
            assert_same_bits(actual, expected)


def captured(launch):
    """What `launch` returns, and a CUDA graph that computes it again."""
    launch()  # compiles the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = launch()
    return results, graph


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


@on_gpu
def test_a_graph_replays_the_gate_with_other_logits():
    logits, counter = random_logits(3000, 10), new_counter()
    results, graph = captured(lambda: entropy_gate.forward(logits, 0.5, counter))
    for spread in (4.0, 0.0, 8.0):
        logits.copy_(random_logits(3000, 10, spread=spread) + spread)
        graph.replay()
        for actual, expected in zip(results, gate(logits, 0.5), strict=True):
            assert_same_bits(actual, expected)
