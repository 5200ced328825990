"""The dynamic neuron's CUDA kernels against float64, on the host and on a GPU.

csrc/host/cuda_shim.h lets g++ compile kernels and launchers unchanged, so that their arithmetic is
tested on any machine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import NAN, bits, captured
from properties import HealthCheck, given, settings, st
from torch import Tensor

from meg_kernels.kernels.limits import ACTIVATIONS, DTYPES
from meg_kernels.neuron import Neurons
from meg_kernels.ops import native

FUNCTIONS = {
    "identity": lambda a: a,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda a: torch.nn.functional.gelu(a, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}
POISON = -77.0


@dataclass
class Case:
    """Arguments of a call. y [B, T, d_out] and x [B, T, d_in], or [M, ...]; index [B] or [M]."""

    y: Tensor
    x: Tensor
    key: Tensor
    bias: Tensor | None
    value: Tensor
    index: Tensor
    activation: str = "gelu_tanh"

    @property
    def unedited(self) -> Tensor:
        return self.index < 0

    @property
    def neurons(self) -> Neurons:
        return Neurons(self.key, self.bias, self.value, self.activation)

    def reference(self, y: Tensor, x: Tensor, key: Tensor, bias: Tensor, value: Tensor) -> Tensor:
        """The definition, in the dtype of what it is given."""
        used = self.index.clamp(min=0)
        tokens = (slice(None), *(None,) * (x.dim() - 2))
        pre = (x * key[used][tokens]).sum(-1) + bias[used][tokens]
        added = FUNCTIONS[self.activation](pre)[..., None] * value[used][tokens]
        return y + added.masked_fill(self.unedited.view(-1, *(1,) * (y.dim() - 1)), 0)

    def in_float64(self) -> tuple[Tensor, ...]:
        """y, x, key, bias and value; what samples without a neuron hold does not matter."""
        bias = torch.zeros(len(self.key)) if self.bias is None else self.bias
        y, x = (
            t.double().masked_fill(self.unedited.view(-1, *(1,) * (t.dim() - 1)), 0)
            for t in (self.y, self.x)
        )
        return y, x, self.key.double(), bias.double().to(y.device), self.value.double()

    def expected(self) -> Tensor:
        """[..., d_out] float64; rows without a neuron are left out: see `assert_forward`."""
        return self.reference(*self.in_float64())

    def expected_gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Of x, key, bias and value, by autograd in float64."""
        inputs = [tensor.requires_grad_() for tensor in self.in_float64()[1:]]
        out = self.reference(torch.zeros_like(grad, dtype=torch.float64), *inputs)
        grad = grad.double().masked_fill(self.unedited.view(-1, *(1,) * (grad.dim() - 1)), 0)
        return torch.autograd.grad(out, inputs, grad)


def rows(values: Tensor, padding: int = 0, offset: int = 0) -> Tensor:
    """`values` with `padding` poisoned elements between its rows, `offset` into a buffer."""
    *shape, width = values.shape
    count = math.prod(shape)
    buffer = values.new_full((offset + count * (width + padding),), POISON)
    view = buffer[offset:].view(*shape, width + padding)[..., :width]
    return view.copy_(values)


def poison_left(view: Tensor) -> int:
    return int((view._base == POISON).sum())


def make_case(
    dtype: torch.dtype,
    d_in: int = 40,
    d_out: int = 24,
    index: tuple[int, ...] = (0, -1, 2, 1, 0),
    tokens: int | None = None,
    padding: int = 0,
    offset: int = 0,
    with_bias: bool = True,
    activation: str = "gelu_tanh",
    neurons: int | None = None,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(d_in * 1000 + d_out)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return rows(values.to(device, dtype), padding, offset)

    neurons = max((0, *index)) + 1 if neurons is None else neurons
    batch = (len(index),) if tokens is None else (len(index), tokens)
    return Case(
        y=random(*batch, d_out),
        x=random(*batch, d_in),
        key=random(neurons, d_in, scale=1 / math.sqrt(d_in)),
        bias=random(neurons, 1).reshape(-1).contiguous() if with_bias else None,
        value=random(neurons, d_out),
        index=torch.tensor(index, dtype=torch.int64, device=device),
        activation=activation,
    )


def assert_forward(actual: Tensor, case: Case, expected: Tensor, before: Tensor) -> None:
    """Within a rounding of the output's dtype, plus float32 rounding of a sum of d_in terms.

    `expected` is in float64; `before` holds the y of the call: the bits of rows without a neuron.
    """
    epsilon = torch.finfo(actual.dtype).eps
    sum_error = 2 * math.sqrt(case.x.shape[-1]) * torch.finfo(torch.float32).eps
    edited = ~case.unedited
    torch.testing.assert_close(
        actual[edited].double(),
        expected[edited],
        rtol=0.51 * epsilon + sum_error,
        atol=8 * sum_error,
    )
    assert torch.equal(bits(actual[case.unedited]), bits(before[case.unedited]))


def assert_gradients(actual, expected: tuple[Tensor, ...], case: Case) -> None:
    """A rounding of the dtype, plus float32 rounding along two sums, for each gradient."""
    terms = max(*case.x.shape[-1:], *case.y.shape[-1:], case.x.shape[:-1].numel(), 1)
    sum_error = 2 * math.sqrt(terms) * torch.finfo(torch.float32).eps
    for name, got, right in zip(("dx", "dkey", "dbias", "dvalue"), actual, expected, strict=True):
        if got is None:
            continue
        assert got.shape == right.shape and got.dtype == case.x.dtype
        scale = max(float(right.abs().max()) if right.numel() else 0.0, 1.0)
        epsilon = torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got.double(),
            right,
            rtol=0.51 * epsilon + sum_error,
            atol=8 * sum_error * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# ---- the same calls on the host and on a GPU ---------------------------------------------------


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Here torch.empty is full of NaN: whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forward(case: Case, out: Tensor | None = None) -> Tensor:
    """In place, or into `out`."""
    out = case.y if out is None else out
    native.dynamic_neuron_forward(out, case.y, case.x, case.neurons, case.index)
    return out


def backward(case: Case, grad: Tensor, needs: Sequence[bool] = (True,) * 4) -> native.Gradients:
    with poisoned_memory():
        return native.dynamic_neuron_backward(grad, case.x, case.neurons, case.index, needs)


def random_grad(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(case.y.shape, generator=generator).to(case.y)


def check_forward(case: Case) -> None:
    """Out of place, with all of out poisoned, and in place, against float64."""
    expected, before = case.expected(), case.y.clone()
    out = rows(torch.full_like(case.y, NAN), padding=3, offset=8)
    assert_forward(forward(case, out), case, expected, before)
    assert torch.equal(bits(case.y), bits(before))
    assert poison_left(out) == 8 + 3 * case.x.shape[:-1].numel()
    aligned = torch.full_like(case.y, NAN, memory_format=torch.contiguous_format)
    assert torch.equal(bits(forward(case, aligned)), bits(out))
    assert torch.equal(bits(forward(case)), bits(out))


def check_backward(case: Case) -> None:
    grad = random_grad(case)
    assert_gradients(backward(case, grad), case.expected_gradients(grad), case)


# ---- the dynamic neuron ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_match_float64(csrc_device, dtype, activation):
    case = make_case(dtype, tokens=3, activation=activation, device=csrc_device)
    check_backward(case)
    check_forward(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d_in", "d_out", "padding", "offset"),
    [
        (1, 1, 0, 0),
        (7, 13, 0, 0),  # misaligned rows, shorter than a chunk
        (37, 41, 3, 0),  # rows apart by a multiple of 16 bytes in float32 only
        (33, 65, 7, 8),  # 16-byte rows with a ragged end
        (64, 32, 0, 1),  # a misaligned first row
        (576, 576, 0, 0),  # several tokens a block
        (1032, 2056, 0, 0),  # a chunk more than 32 and 64 threads hold at once
        (4104, 5200, 0, 0),  # 256 threads a token in every dtype
        (4099, 5203, 0, 0),
        (8200, 8, 0, 0),  # more than one batch of chunks a thread
        (16, 8200, 0, 0),
    ],
)
def test_kernels_take_any_width_and_alignment(csrc_device, dtype, d_in, d_out, padding, offset):
    case = make_case(dtype, d_in, d_out, padding=padding, offset=offset, device=csrc_device)
    check_backward(case)
    check_forward(case)


LAYOUTS = {
    "contiguous": lambda values: values.clone(),
    "slice of the tokens": lambda values: torch.cat([values + 1, values, values], dim=1)[
        :, values.shape[1] : 2 * values.shape[1]
    ],
    "tokens first": lambda values: values.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded over the batch": lambda values: values[:1].expand_as(values),
    "slice of the width": lambda values: rows(values, padding=5, offset=3),
    "16-byte slice of the width": lambda values: rows(values, padding=-values.shape[-1] % 8 + 8),
}
WRITABLE_LAYOUTS = sorted(set(LAYOUTS) - {"expanded over the batch"})


@st.composite
def case_arguments(draw) -> dict:
    neurons = draw(st.integers(1, 5))
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "d_in": draw(st.integers(1, 300)),
        "d_out": draw(st.integers(1, 300)),
        "index": tuple(draw(st.lists(st.integers(-1, neurons - 1), max_size=4))),
        "tokens": draw(st.integers(0, 4)),
        "with_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "neurons": neurons,
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arguments=case_arguments(),
    x_layout=st.sampled_from(sorted(LAYOUTS)),
    y_layout=st.sampled_from(WRITABLE_LAYOUTS),
)
def test_kernels_take_samples_and_tokens_wherever_they_are(
    csrc_device, arguments, x_layout, y_layout
):
    case = make_case(**arguments, device=csrc_device)
    case.x, case.y = LAYOUTS[x_layout](case.x), LAYOUTS[y_layout](case.y)
    check_backward(case)
    check_forward(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_may_come_in_any_layout(csrc_device, layout):
    case = make_case(torch.bfloat16, 64, 64, tokens=3, device=csrc_device)
    grad = LAYOUTS[layout](random_grad(case))
    assert_gradients(backward(case, grad), case.expected_gradients(grad), case)


def test_the_gradient_of_a_sum_is_one_number_expanded(csrc_device):
    case = make_case(torch.float32, tokens=3, device=csrc_device)
    grad = torch.ones((), device=csrc_device).expand(case.y.shape)
    assert_gradients(backward(case, grad), case.expected_gradients(grad), case)


@pytest.mark.parametrize("misaligned", ["y", "x", "key", "value"])
def test_one_misaligned_argument_is_enough_for_scalar_loads(csrc_device, misaligned):
    for offset, padding in ((1, 0), (0, 1)):  # the first row, and the distance between rows
        case = make_case(torch.bfloat16, 64, 64, device=csrc_device)
        setattr(case, misaligned, rows(getattr(case, misaligned), padding, offset))
        check_backward(case)
        check_forward(case)


def test_nothing_beside_its_rows_is_written(csrc_device):
    case = make_case(torch.float16, 40, 21, padding=3, offset=5, device=csrc_device)
    assert poison_left(case.y) == 5 + 3 * len(case.y)
    forward(case)
    assert poison_left(case.y) == 5 + 3 * len(case.y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_neuron_keep_their_bits_even_nan(csrc_device, dtype):
    case = make_case(dtype, 40, 21, index=(-1, 0, -1), tokens=2, device=csrc_device)
    case.y[0] = NAN
    case.x[2] = float("inf")
    before = case.y.clone()
    out = forward(case, torch.zeros_like(case.y))
    assert torch.equal(bits(out[[0, 2]]), bits(before[[0, 2]]))
    forward(case)
    assert torch.equal(bits(case.y[[0, 2]]), bits(before[[0, 2]]))
    assert not torch.equal(case.y[1], before[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_reaches_its_own_row_and_its_own_neuron_only(csrc_device, activation):
    case = make_case(
        torch.float32, index=(0, 1, -1, 1), neurons=3, activation=activation, device=csrc_device
    )
    grad = random_grad(case)
    case.x[0, 3] = NAN
    case.x[2], grad[2] = NAN, NAN
    case.key[2], case.value[2] = NAN, NAN  # of nobody
    dx, *of_neurons = backward(case, grad)
    assert dx[[1, 3]].isfinite().all()
    assert dx[2].eq(0).all()
    assert of_neurons[2][0].isnan().all()
    for gradient in of_neurons:
        assert gradient[1].isfinite().all()
        assert gradient[2].eq(0).all()
    forward(case)
    assert case.y[0].isnan().all()
    assert case.y[1:].isfinite().all()


def test_without_bias(csrc_device):
    case = make_case(torch.bfloat16, with_bias=False, device=csrc_device)
    check_backward(case)
    check_forward(case)
    assert backward(case, random_grad(case))[2] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [101, 1037, 4096])
def test_a_row_does_not_depend_on_its_batch_nor_on_alignment(csrc_device, dtype, width):
    index = (2, -1, 0, 1, 2)
    batch = make_case(dtype, width, width - 8, index, device=csrc_device)
    # Rows apart by a multiple of 16 bytes take the vector path; most of those above do not.
    padding = -width % 8 + 8
    elsewhere = replace(
        batch,
        **{name: rows(getattr(batch, name), padding) for name in ("y", "x", "key", "value")},
    )
    grad = random_grad(batch)
    dx = backward(batch, grad)[0]
    together = forward(batch, torch.empty_like(batch.y))
    assert torch.equal(backward(elsewhere, rows(grad, padding))[0], dx)
    assert torch.equal(forward(elsewhere), together)
    for m in range(len(index)):
        one = replace(
            batch, y=batch.y[m : m + 1], x=batch.x[m : m + 1], index=batch.index[m : m + 1]
        )
        assert torch.equal(backward(one, grad[m : m + 1])[0], dx[m : m + 1])
        assert torch.equal(forward(one), together[m : m + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_tokens_and_samples_of_tokens_give_the_same_bits(csrc_device, dtype):
    index, tokens = (2, -1, 0, 2), 9
    batch = make_case(dtype, 72, 40, index, tokens, device=csrc_device)
    grad = random_grad(batch)
    packed = replace(
        batch,
        y=batch.y.clone().flatten(0, 1),
        x=batch.x.flatten(0, 1),
        index=batch.index.repeat_interleave(tokens),
    )
    pairs = zip(backward(batch, grad), backward(packed, grad.flatten(0, 1)), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.view(-1), theirs.view(-1))
    assert torch.equal(forward(batch).flatten(0, 1), forward(packed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_neurons_gradient_depends_on_its_own_samples_only(csrc_device, dtype):
    case = make_case(dtype, 72, 300, (1, 0, -1, 1, 2, 1), tokens=11, device=csrc_device)
    grad = random_grad(case)
    mine = case.index == 1
    alone = replace(case, y=case.y[mine], x=case.x[mine], index=case.index[mine])
    for ours, theirs in zip(backward(case, grad)[1:], backward(alone, grad[mine])[1:], strict=True):
        assert torch.equal(ours[1], theirs[1])


def test_neurons_shared_by_many_tokens_and_neurons_of_none(csrc_device):
    case = make_case(torch.float32, 40, 24, (3,) * 200 + (5, -1), neurons=8, device=csrc_device)
    grad = random_grad(case)
    gradients = backward(case, grad)
    assert_gradients(gradients, case.expected_gradients(grad), case)
    for gradient in gradients[1:]:
        assert gradient[[0, 1, 2, 4, 6, 7]].eq(0).all()


@pytest.mark.parametrize("needed", range(4), ids=["x", "key", "bias", "value"])
def test_each_gradient_can_be_had_alone(csrc_device, needed):
    case = make_case(torch.bfloat16, 40, 24, tokens=2, device=csrc_device)
    grad = random_grad(case)
    everything = backward(case, grad)
    needs = tuple(part == needed for part in range(4))
    alone = backward(case, grad, needs)
    assert tuple(gradient is not None for gradient in alone) == needs
    assert torch.equal(alone[needed], everything[needed])


@pytest.mark.parametrize(("samples", "tokens"), [(0, 3), (3, 0), (0, None)])
def test_an_empty_batch_is_a_success(csrc_device, samples, tokens):
    case = make_case(
        torch.float32, index=(0,) * samples, tokens=tokens, neurons=2, device=csrc_device
    )
    forward(case)
    dx, *of_neurons = backward(case, case.y)
    assert dx.shape == case.x.shape
    for gradient in of_neurons:
        assert gradient.eq(0).all()


def test_no_neurons_at_all(csrc_device):
    case = make_case(torch.float32, index=(-1, -1), neurons=0, device=csrc_device)
    before = case.y.clone()
    assert torch.equal(forward(case, torch.empty_like(case.y)), before)
    assert backward(case, case.y)[0].eq(0).all()


def test_more_blocks_than_a_small_grid_dimension_holds(csrc_device):
    many, width = 65_537, 516  # a block a token: 516 float32 keep 128 threads busy
    case = make_case(torch.float32, width, width, index=(0,), tokens=1, device=csrc_device)
    before, expected = case.y.clone(), case.expected()
    case.index = torch.full((many,), -1, device=csrc_device)
    case.index[-1] = 0
    case.x, case.y = case.x.expand(many, 1, width), case.y.expand(many, 1, width)
    forward(case)
    assert_forward(case.y[-1:], replace(case, index=case.index[-1:]), expected, before)


def test_a_write_through_a_pointer_is_told_to_autograd(csrc_device):
    case = make_case(torch.float32, device=csrc_device)
    version = case.y._version
    forward(case)
    assert case.y._version == version + 1


def test_what_cuda_refuses_is_raised_with_the_shapes(csrc_device):
    case = make_case(torch.float32, index=(0,), tokens=1, device=csrc_device)
    case.y, case.x = (t.expand(2**16, 2**15, t.shape[-1]) for t in (case.y, case.x))
    case.index = case.index.expand(2**16).contiguous()
    with pytest.raises(RuntimeError, match=r"forward: CUDA error 1 .* x \(65536, 32768, 40\)"):
        forward(case)


def test_layouts_the_kernel_cannot_take_are_named():
    good = make_case(torch.float32, 8, 8, padding=8)

    def problem(**changed: Tensor) -> str | None:
        case = replace(good, **changed)
        return native.layout_problem(case.y, case.x, case.neurons, case.index)

    assert problem() is None
    for name in ("y", "x", "key", "value"):
        assert problem(**{name: getattr(good, name).T.contiguous().T}).startswith(name)
    batched = torch.zeros(4, 3, 8)
    for fine in (batched[:, :2], batched.transpose(0, 1), batched[:1].expand(4, 3, 8)):
        assert problem(y=batched, x=fine) is None
    assert problem(bias=torch.zeros(2 * len(good.key))[::2]).startswith("bias")
    strided = torch.arange(10)[::2]
    assert problem(index=strided).startswith("index")
    with pytest.raises(ValueError, match=r"dynamic_neuron forward: index .* \.contiguous\(\)"):
        native.dynamic_neuron_forward(good.y, good.y, good.x, good.neurons, strided)
    transposed = good.y.T.contiguous().T
    with pytest.raises(ValueError, match=r"dynamic_neuron forward: out .* \.contiguous\(\)"):
        native.dynamic_neuron_forward(transposed, good.y, good.x, good.neurons, good.index)
    with pytest.raises(ValueError, match=r"dynamic_neuron backward: index .* \.contiguous\(\)"):
        native.dynamic_neuron_backward(good.y, good.x, good.neurons, strided, (True,) * 4)


# ---- only on a GPU -----------------------------------------------------------------------------


needs_kernels = pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=f"no CUDA kernels: {native.unavailable_reason()}",
)


@pytest.mark.gpu
@needs_kernels
def test_gpu_kernels_take_many_rows_and_neurons():
    index = tuple(range(-1, 699))
    for case in (
        make_case(torch.bfloat16, 64, 64, index, tokens=100, device="cuda"),
        make_case(torch.bfloat16, 1024, 1032, (0,) * 70_000, device="cuda"),
    ):
        check_backward(case)
        check_forward(case)


@pytest.mark.gpu
@needs_kernels
def test_gpu_kernels_replay_in_a_graph_with_other_inputs():
    case = make_case(torch.float32, 576, 576, (0, 1, 2, 3), tokens=6, device="cuda")
    grad, out = random_grad(case), torch.empty_like(case.y)

    def step() -> native.Gradients:
        native.dynamic_neuron_forward(out, case.y, case.x, case.neurons, case.index)
        return native.dynamic_neuron_backward(grad, case.x, case.neurons, case.index, (True,) * 4)

    gradients, graph = captured(step)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for tensor in (case.x, case.y, case.value, case.bias, grad):
            tensor.normal_(generator=generator)
        case.key.normal_(std=1 / 24, generator=generator)
        case.index.copy_(torch.tensor([2, -1, 0, 3]).roll(seed))
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert_forward(out, case, case.expected(), case.y)
        assert_gradients(gradients, case.expected_gradients(grad), case)
