"""The CUDA kernels of csrc/: their arithmetic on the host, their machine code, and on a GPU.

csrc/host/cuda_shim.h lets g++ compile kernels and launchers unchanged, so the arithmetic is tested
on any machine. nvcc needs no GPU either: registers, spills and load widths are read from what it
compiled. Only the last tests need a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from properties import HealthCheck, given, settings, st
from torch import Tensor

from meg_kernels.ops import native

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = ("dynamic_neuron", "entropy_gate")
ACTIVATIONS = {
    "identity": lambda a: a,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda a: torch.nn.functional.gelu(a, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}
POISON = -77.0
NAN = float("nan")


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

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.key, self.bias, self.value

    def reference(self, y: Tensor, x: Tensor, key: Tensor, bias: Tensor, value: Tensor) -> Tensor:
        """The definition, in the dtype of what it is given."""
        used = self.index.clamp(min=0)
        tokens = (slice(None), *(None,) * (x.dim() - 2))
        pre = (x * key[used][tokens]).sum(-1) + bias[used][tokens]
        added = ACTIVATIONS[self.activation](pre)[..., None] * value[used][tokens]
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


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


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


class Struct(ctypes.Structure):
    """A struct of csrc/types.h, dynamic_neuron.h or entropy_gate.h; every field has 8 bytes."""


def pointers(*names: str) -> list:
    return [(name, ctypes.c_void_p) for name in names]


def integers(*names: str) -> list:
    return [(name, ctypes.c_int64) for name in names]


class Rows(Struct):
    _fields_ = pointers("data") + integers("sample_stride", "token_stride")


class Matrix(Struct):
    _fields_ = pointers("data") + integers("row_stride")


class Neurons(Struct):
    _fields_ = [("key", Matrix), *pointers("bias"), ("value", Matrix), *integers("activation")]


class Shape(Struct):
    _fields_ = integers("samples", "tokens", "neurons", "d_in", "d_out", "dtype")


class Stream(Struct):
    _fields_ = integers("device") + pointers("handle")


class Forward(Struct):
    _fields_ = [
        *(("out", Rows), ("y", Rows), ("x", Rows), ("neurons", Neurons)),
        *pointers("index"),
        *(("shape", Shape), ("stream", Stream)),
    ]


class Backward(Struct):
    _fields_ = [
        *(("grad", Rows), ("x", Rows), ("neurons", Neurons)),
        *pointers("index"),
        *(("shape", Shape), ("stream", Stream), ("dx", Rows)),
        *pointers("dkey", "dbias", "dvalue", "hidden", "dpre", "order", "starts"),
    ]


class Gate(Struct):
    _fields_ = [
        *pointers("logits"),
        *integers("row_stride", "samples", "classes", "dtype"),
        ("threshold", ctypes.c_double),
        *pointers("entropy", "index", "rows", "count", "counter"),
        ("stream", Stream),
    ]


@dataclass(frozen=True)
class HostExtension:
    """Stands in for meg_kernels._C: the kernels and launchers of csrc/ as compiled by g++."""

    library: ctypes.CDLL

    def dynamic_neuron_forward(self, *arguments) -> int:
        return self.library.dynamic_neuron_forward(ctypes.byref(Forward(*arguments)))

    def dynamic_neuron_backward(self, *arguments) -> int:
        *arguments, gradients, scratch = arguments
        packed = Backward(*arguments, *gradients, *scratch)
        return self.library.dynamic_neuron_backward(ctypes.byref(packed))

    def entropy_gate(self, logits, threshold, results, stream) -> int:
        packed = Gate(*logits, threshold, *results, stream)
        return self.library.entropy_gate(ctypes.byref(packed))

    def error_string(self, code: int) -> str:
        return f"code {code}"


@pytest.fixture(scope="session")
def host_extension(tmp_path_factory) -> HostExtension:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("csrc") / "host.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-x", "c++"]
    sources = [str(CSRC / f"{source}.cu") for source in SOURCES]
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True)
    return HostExtension(ctypes.CDLL(str(library)))


@pytest.fixture
def on_host(host_extension, monkeypatch) -> None:
    monkeypatch.setattr(native, "_extension", lambda: host_extension)
    monkeypatch.setattr(native, "unavailable_reason", lambda device=None: None)
    monkeypatch.setattr(native, "_stream", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where the kernels run: as compiled by g++, or on a GPU."""
    if request.param == "host":
        request.getfixturevalue("on_host")
        return "cpu"
    if not native.available():
        pytest.skip(f"no CUDA kernels: {native.unavailable_reason()}")
    return "cuda"


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
    native.forward(out, case.y, case.x, *case.parts(), case.index, case.activation)
    return out


def backward(case: Case, grad: Tensor, needs: Sequence[bool] = (True,) * 4) -> native.Gradients:
    with poisoned_memory():
        rest = (*case.parts(), case.index, case.activation)
        return native.backward(grad, case.x, *rest, needs)


def gate(logits: Tensor, threshold: float, counter: Tensor | None = None) -> tuple[Tensor, ...]:
    with poisoned_memory():
        counter = new_counter(logits.device) if counter is None else counter
        return native.entropy_gate(logits, threshold, counter)


def new_counter(device: str | torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


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


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_kernels_match_float64(device, dtype, activation):
    case = make_case(dtype, tokens=3, activation=activation, device=device)
    check_backward(case)
    check_forward(case)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
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
def test_kernels_take_any_width_and_alignment(device, dtype, d_in, d_out, padding, offset):
    case = make_case(dtype, d_in, d_out, padding=padding, offset=offset, device=device)
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
        "dtype": draw(st.sampled_from(native.DTYPES)),
        "d_in": draw(st.integers(1, 300)),
        "d_out": draw(st.integers(1, 300)),
        "index": tuple(draw(st.lists(st.integers(-1, neurons - 1), max_size=4))),
        "tokens": draw(st.integers(0, 4)),
        "with_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(native.ACTIVATIONS)),
        "neurons": neurons,
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arguments=case_arguments(),
    x_layout=st.sampled_from(sorted(LAYOUTS)),
    y_layout=st.sampled_from(WRITABLE_LAYOUTS),
)
def test_kernels_take_samples_and_tokens_wherever_they_are(device, arguments, x_layout, y_layout):
    case = make_case(**arguments, device=device)
    case.x, case.y = LAYOUTS[x_layout](case.x), LAYOUTS[y_layout](case.y)
    check_backward(case)
    check_forward(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_may_come_in_any_layout(device, layout):
    case = make_case(torch.bfloat16, 64, 64, tokens=3, device=device)
    grad = LAYOUTS[layout](random_grad(case))
    assert_gradients(backward(case, grad), case.expected_gradients(grad), case)


def test_the_gradient_of_a_sum_is_one_number_expanded(device):
    case = make_case(torch.float32, tokens=3, device=device)
    grad = torch.ones((), device=device).expand(case.y.shape)
    assert_gradients(backward(case, grad), case.expected_gradients(grad), case)


@pytest.mark.parametrize("misaligned", ["y", "x", "key", "value"])
def test_one_misaligned_argument_is_enough_for_scalar_loads(device, misaligned):
    for offset, padding in ((1, 0), (0, 1)):  # the first row, and the distance between rows
        case = make_case(torch.bfloat16, 64, 64, device=device)
        setattr(case, misaligned, rows(getattr(case, misaligned), padding, offset))
        check_backward(case)
        check_forward(case)


def test_nothing_beside_its_rows_is_written(device):
    case = make_case(torch.float16, 40, 21, padding=3, offset=5, device=device)
    assert poison_left(case.y) == 5 + 3 * len(case.y)
    forward(case)
    assert poison_left(case.y) == 5 + 3 * len(case.y)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_rows_without_a_neuron_keep_their_bits_even_nan(device, dtype):
    case = make_case(dtype, 40, 21, index=(-1, 0, -1), tokens=2, device=device)
    case.y[0] = NAN
    case.x[2] = float("inf")
    before = case.y.clone()
    out = forward(case, torch.zeros_like(case.y))
    assert torch.equal(bits(out[[0, 2]]), bits(before[[0, 2]]))
    forward(case)
    assert torch.equal(bits(case.y[[0, 2]]), bits(before[[0, 2]]))
    assert not torch.equal(case.y[1], before[1])


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_nan_reaches_its_own_row_and_its_own_neuron_only(device, activation):
    case = make_case(
        torch.float32, index=(0, 1, -1, 1), neurons=3, activation=activation, device=device
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


def test_without_bias(device):
    case = make_case(torch.bfloat16, with_bias=False, device=device)
    check_backward(case)
    check_forward(case)
    assert backward(case, random_grad(case))[2] is None


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("width", [101, 1037, 4096])
def test_a_row_does_not_depend_on_its_batch_nor_on_alignment(device, dtype, width):
    index = (2, -1, 0, 1, 2)
    batch = make_case(dtype, width, width - 8, index, device=device)
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


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_packed_tokens_and_samples_of_tokens_give_the_same_bits(device, dtype):
    index, tokens = (2, -1, 0, 2), 9
    batch = make_case(dtype, 72, 40, index, tokens, device=device)
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


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_a_neurons_gradient_depends_on_its_own_samples_only(device, dtype):
    case = make_case(dtype, 72, 300, (1, 0, -1, 1, 2, 1), tokens=11, device=device)
    grad = random_grad(case)
    mine = case.index == 1
    alone = replace(case, y=case.y[mine], x=case.x[mine], index=case.index[mine])
    for ours, theirs in zip(backward(case, grad)[1:], backward(alone, grad[mine])[1:], strict=True):
        assert torch.equal(ours[1], theirs[1])


def test_neurons_shared_by_many_tokens_and_neurons_of_none(device):
    case = make_case(torch.float32, 40, 24, (3,) * 200 + (5, -1), neurons=8, device=device)
    grad = random_grad(case)
    gradients = backward(case, grad)
    assert_gradients(gradients, case.expected_gradients(grad), case)
    for gradient in gradients[1:]:
        assert gradient[[0, 1, 2, 4, 6, 7]].eq(0).all()


@pytest.mark.parametrize("needed", range(4), ids=["x", "key", "bias", "value"])
def test_each_gradient_can_be_had_alone(device, needed):
    case = make_case(torch.bfloat16, 40, 24, tokens=2, device=device)
    grad = random_grad(case)
    everything = backward(case, grad)
    needs = tuple(part == needed for part in range(4))
    alone = backward(case, grad, needs)
    assert tuple(gradient is not None for gradient in alone) == needs
    assert torch.equal(alone[needed], everything[needed])


@pytest.mark.parametrize(("samples", "tokens"), [(0, 3), (3, 0), (0, None)])
def test_an_empty_batch_is_a_success(device, samples, tokens):
    case = make_case(torch.float32, index=(0,) * samples, tokens=tokens, neurons=2, device=device)
    forward(case)
    dx, *of_neurons = backward(case, case.y)
    assert dx.shape == case.x.shape
    for gradient in of_neurons:
        assert gradient.eq(0).all()


def test_no_neurons_at_all(device):
    case = make_case(torch.float32, index=(-1, -1), neurons=0, device=device)
    before = case.y.clone()
    assert torch.equal(forward(case, torch.empty_like(case.y)), before)
    assert backward(case, case.y)[0].eq(0).all()


def test_more_blocks_than_a_small_grid_dimension_holds(device):
    many, width = 65_537, 516  # a block a token: 516 float32 keep 128 threads busy
    case = make_case(torch.float32, width, width, index=(0,), tokens=1, device=device)
    before, expected = case.y.clone(), case.expected()
    case.index = torch.full((many,), -1, device=device)
    case.index[-1] = 0
    case.x, case.y = case.x.expand(many, 1, width), case.y.expand(many, 1, width)
    forward(case)
    assert_forward(case.y[-1:], replace(case, index=case.index[-1:]), expected, before)


def test_a_write_through_a_pointer_is_told_to_autograd(device):
    case = make_case(torch.float32, device=device)
    version = case.y._version
    forward(case)
    assert case.y._version == version + 1


def test_what_cuda_refuses_is_raised_with_the_shapes(device):
    case = make_case(torch.float32, index=(0,), tokens=1, device=device)
    case.y, case.x = (t.expand(2**16, 2**15, t.shape[-1]) for t in (case.y, case.x))
    case.index = case.index.expand(2**16).contiguous()
    with pytest.raises(RuntimeError, match=r"forward: CUDA error 1 .* x \(65536, 32768, 40\)"):
        forward(case)


# ---- the entropy gate --------------------------------------------------------------------------


def expected_entropy(logits: Tensor) -> Tensor:
    """In float64 nats; a class of probability 0 adds nothing."""
    return torch.special.entr(torch.softmax(logits.double(), dim=-1)).sum(-1)


def check_gate(results: tuple[Tensor, ...], logits: Tensor, threshold: float) -> None:
    entropy, index, rows_edited, count = results
    expected = expected_entropy(logits)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    # A row whose entropy is the threshold to within rounding may fall on either side of it.
    edited = entropy < torch.tensor(threshold, dtype=torch.float32)
    sure = (expected - threshold).abs() > 1e-5
    assert torch.equal(edited[sure], (expected < threshold)[sure])
    numbers = edited.nonzero().flatten()
    assert count.tolist() == [len(numbers)]
    assert torch.equal(rows_edited[: len(numbers)], numbers)
    assert rows_edited[len(numbers) :].eq(-1).all()
    assert torch.equal(index[numbers], torch.arange(len(numbers), device=index.device))
    assert index[~edited].eq(-1).all()


def make_logits(samples: int, classes: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows from certain to clueless, in no order."""
    generator = torch.Generator().manual_seed(samples * 100 + classes)
    sharpness = 10 ** torch.empty(samples, 1).uniform_(-1, 2, generator=generator)
    logits = torch.randn(samples, classes, generator=generator) * sharpness
    return logits.to(device, dtype)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 10, 33, 1000])
@pytest.mark.parametrize("samples", [0, 1, 16, 17, 700])
def test_gate_matches_float64(device, dtype, classes, samples):
    logits = make_logits(samples, classes, dtype, device)
    counter = new_counter(device)
    for _ in range(2):  # the second time with the ticket that the first one left
        check_gate(gate(logits, 0.3, counter), logits, 0.3)
        assert counter.tolist() == [0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(0, 40),
    classes=st.integers(1, 40),
    dtype=st.sampled_from(native.DTYPES),
    threshold=st.sampled_from([0.0, 1e-6, 0.1, 0.7, 2.0, 100.0]),
    padding=st.integers(0, 3),
)
def test_gate_takes_any_shape_and_stride(device, samples, classes, dtype, threshold, padding):
    logits = rows(make_logits(samples, classes, dtype, device), padding, offset=1)
    check_gate(gate(logits, threshold), logits, threshold)


def test_gate_keeps_the_order_over_many_blocks(device):
    logits = make_logits(20_000, 2, torch.float32, device)
    check_gate(gate(logits, 0.3), logits, 0.3)


def test_entropies_of_special_rows(device):
    inf = float("inf")
    logits = torch.tensor(
        [
            [3.0, -inf, -inf, -inf],  # certain
            [5.0, 5.0, -inf, -inf],  # two classes
            [1e30, 0.0, 0.0, 0.0],  # exp would overflow
            [-1e30, -1e30, -1e30, -1e30],
            [0.0, NAN, 0.0, 0.0],
            [inf, 0.0, 0.0, 0.0],
            [-inf, -inf, -inf, -inf],
        ],
        device=device,
    )
    entropy, index, edited, count = (result.cpu() for result in gate(logits, 1.0))
    torch.testing.assert_close(entropy[:4], torch.tensor([0.0, math.log(2), 0.0, math.log(4)]))
    assert entropy[4:].isnan().all()
    assert index.tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert edited.tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert count.tolist() == [3]


def test_an_entropy_equal_to_the_threshold_is_not_edited(device):
    logits = torch.zeros(2, 2, device=device)
    logits[1, 0] = 0.01
    entropy = gate(logits, 1.0)[0]
    assert gate(logits, float(entropy[0]))[1].tolist() == [-1, 0]


# ---- the machine code --------------------------------------------------------------------------


@dataclass
class Compiled:
    """One source for one architecture: what ptxas printed, and the path of the machine code."""

    source: str
    messages: str
    cubin: Path


@pytest.fixture(scope="session")
def build_script():
    spec = importlib.util.spec_from_file_location("meg_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=["sm_80", "sm_90a", "sm_100"])
def compiled(request, build_script, tmp_path_factory) -> dict[str, Compiled]:
    try:
        nvcc = build_script.find_nvcc()
    except build_script.BuildError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("cubin")
    results = {}
    for source in SOURCES:
        cubin = directory / f"{source}.{request.param}.cubin"
        flags = [*build_script.compile_flags([request.param]), "-Xptxas", "-v", "-cubin"]
        result = subprocess.run(
            [nvcc, *flags, str(CSRC / f"{source}.cu"), "-o", str(cubin)],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        results[source] = Compiled(source, result.stderr, cubin)
    return results


def disassembler() -> str:
    """nvdisasm of the CUDA toolkit, or else the one inside the triton wheel."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(bundled) if bundled.exists() else None
    if found is None:
        pytest.skip("nvdisasm is neither on PATH nor in the triton wheel")
    return found


# Kernels, by dtype and load width, and the registers that leave as many threads resident on an SM
# as the kernel counts on: 512 of the token kernels, 1024 of the others.
KERNELS = {
    "dynamic_neuron": {
        "21dynamic_neuron_kernel": (6, 128),
        "35dynamic_neuron_backward_rows_kernel": (6, 128),
        "38dynamic_neuron_backward_neurons_kernel": (6, 64),
    },
    "entropy_gate": {"19entropy_gate_kernel": (3, 64)},
}


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_do_not_spill_and_leave_room_for_enough_threads(compiled, source):
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        compiled[source].messages,
        re.S,
    )
    for kernel, (count, limit) in KERNELS[source].items():
        versions = [entry for entry in report if entry[0].startswith(f"_Z{kernel}I")]
        assert len(versions) == count
        for name, *spills, registers in versions:
            assert spills == ["0", "0", "0"], name
            assert int(registers) <= limit, name
    assert len(report) == sum(count for count, _ in KERNELS[source].values())


def test_vector_kernels_move_16_bytes_and_wait_once_for_all_loads(compiled):
    listing = subprocess.run(
        [disassembler(), "-c", str(compiled["dynamic_neuron"].cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = {
        text.split(",")[0]: re.findall(
            r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M
        )
        for text in re.split(r"\.section\s+\.text\.", listing)[1:]
    }
    for name, opcodes in functions.items():
        loads = [at for at, op in enumerate(opcodes) if re.match(r"LDG\.E.*\.128", op)]
        stores = [at for at, op in enumerate(opcodes) if re.match(r"STG\.E.*\.128", op)]
        if "Lb0E" in name:
            assert not loads and not stores, name
            continue
        assert stores, name
        # Before the first product: four chunks of each of four rows, of which the compiler may let
        # two slip, or one chunk of each of four tokens.
        product = next(at for at in range(loads[0], len(opcodes)) if opcodes[at] == "FFMA")
        in_flight = sum(at < product for at in loads)
        assert in_flight >= (4 if "backward_neurons" in name else 14), name
    assert sum("Lb1E" in name for name in functions) == 9


# ---- the extension module ----------------------------------------------------------------------


@pytest.fixture
def extension():
    return pytest.importorskip("meg_kernels._C", reason="the CUDA extension is not built")


def test_extension_agrees_with_the_python_side_on_codes(extension):
    assert tuple(f"torch.{name}" for name in extension.DTYPES) == tuple(map(str, native.DTYPES))
    assert extension.ACTIVATIONS == native.ACTIVATIONS == tuple(ACTIVATIONS)


def test_extension_needs_no_cuda_library_to_import(extension):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run([readelf, "-d", extension.__file__], capture_output=True, text=True)
    assert "libcuda" not in needed.stdout


INVALID = 1  # cudaErrorInvalidValue


@pytest.mark.parametrize(
    ("changed", "activation"),
    [
        ({"dtype": 3}, 0),
        ({"samples": 2**31}, 0),
        ({"tokens": 2**30}, 0),
        ({"d_in": 2**31}, 0),
        ({"d_out": 2**31}, 0),
        ({}, 5),
        ({}, -1),
    ],
)
@pytest.mark.parametrize("compiler", ["g++", "nvcc"])
def test_arguments_out_of_range_are_refused(request, compiler, changed, activation):
    built = request.getfixturevalue("host_extension" if compiler == "g++" else "extension")
    if compiler == "nvcc" and "dtype" in changed and not torch.cuda.is_available():
        pytest.skip("the device is looked at before the dtype")
    sizes = {"samples": 3, "tokens": 4, "neurons": 1, "d_in": 8, "d_out": 8, "dtype": 0}
    shape = tuple({**sizes, **changed}.values())
    nowhere, neurons = (0, 0, 0), ((0, 0), 0, (0, 0), activation)
    call = (neurons, 0, shape, (0, 0))
    assert built.dynamic_neuron_forward(nowhere, nowhere, nowhere, *call) == INVALID
    gradients = (nowhere, 0, 0, 0)
    assert (
        built.dynamic_neuron_backward(nowhere, nowhere, *call, gradients, (0, 0, 0, 0)) == INVALID
    )


def test_extension_reports_cuda_errors_as_codes(extension):
    nowhere, neurons, empty = (0, 0, 0), ((0, 0), 0, (0, 0), 0), (0, 1, 1, 8, 8, 0)
    assert (
        extension.dynamic_neuron_forward(nowhere, nowhere, nowhere, neurons, 0, empty, (0, 0)) == 0
    )
    assert extension.entropy_gate((0, 0, -1, 1, 0), 0.5, (0, 0, 0, 0, 0), (0, 0)) == INVALID
    assert extension.error_string(INVALID) == "invalid argument"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_reason_is_said(extension):
    assert not native.available()
    with pytest.raises(RuntimeError, match="CUDA"):
        native.load()
    case = make_case(torch.float32)
    rest = (*case.parts(), case.index, case.activation)
    with pytest.raises(RuntimeError, match="dynamic_neuron forward: PyTorch"):
        native.forward(case.y, case.y, case.x, *rest)
    with pytest.raises(RuntimeError, match="dynamic_neuron backward: PyTorch"):
        native.backward(case.y, case.x, *rest, (True,) * 4)
    with pytest.raises(RuntimeError, match="entropy_gate: PyTorch"):
        native.entropy_gate(case.x, 0.3, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("architecture", "capability", "serves"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100", (10, 3), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("compute_80", (12, 0), True),
        ("compute_90", (8, 9), False),
    ],
)
def test_which_chips_a_build_serves(architecture, capability, serves):
    assert native._serves(architecture, *capability) is serves


def test_layouts_the_kernel_cannot_take_are_named():
    good = make_case(torch.float32, 8, 8, padding=8)
    parts = {name: getattr(good, name) for name in ("y", "x", "key", "bias", "value", "index")}
    assert native.layout_problem(**parts) is None
    for name in ("y", "x", "key", "value"):
        transposed = parts[name].T.contiguous().T
        assert native.layout_problem(**{**parts, name: transposed}).startswith(name)
    batched = torch.zeros(4, 3, 8)
    for fine in (batched[:, :2], batched.transpose(0, 1), batched[:1].expand(4, 3, 8)):
        assert native.layout_problem(**{**parts, "y": batched, "x": fine}) is None
    strided = torch.arange(10)[::2]
    for name in ("bias", "index"):
        assert native.layout_problem(**{**parts, name: strided}).startswith(name)
    rest = {**parts, "activation": "silu"}
    with pytest.raises(ValueError, match=r"dynamic_neuron forward: index .* \.contiguous\(\)"):
        native.forward(good.y, **{**rest, "index": strided})
    transposed = good.y.T.contiguous().T
    with pytest.raises(ValueError, match=r"dynamic_neuron forward: out .* \.contiguous\(\)"):
        native.forward(transposed, **rest)
    with pytest.raises(ValueError, match=r"entropy_gate: logits .* \.contiguous\(\)"):
        native.entropy_gate(transposed, 0.3, torch.zeros(1, dtype=torch.int32))


# ---- building ----------------------------------------------------------------------------------


def test_every_file_of_csrc_is_named_in_the_build(build_script):
    named = {*build_script.SOURCES, *build_script.HEADERS}
    assert named == {f"csrc/{path.name}" for path in CSRC.iterdir() if path.is_file()}


def test_architectures_come_from_the_environment(build_script, monkeypatch):
    monkeypatch.setenv("MEG_KERNELS_CUDA_ARCHS", "sm_90a;compute_100, sm_80")
    assert build_script.architectures() == ["sm_90a", "compute_100", "sm_80"]
    assert "arch=compute_90a,code=sm_90a" in build_script.compile_flags(["sm_90a"])
    assert "arch=compute_100,code=compute_100" in build_script.compile_flags(["compute_100"])


def test_a_wrong_cuda_home_is_named(build_script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build_script.BuildError, match="has no bin/nvcc"):
        build_script.find_nvcc()


def test_without_nvcc_nothing_is_built_unless_demanded(build_script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("MEG_KERNELS_BUILD_CUDA", raising=False)
    monkeypatch.setattr("sys.argv", ["setup.py", "bdist_wheel"])
    with pytest.warns(UserWarning, match="OFF .* has no bin/nvcc.* MEG_KERNELS_BUILD_CUDA=1"):
        assert build_script.extensions() == []
    monkeypatch.setenv("MEG_KERNELS_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="has no bin/nvcc"):
        build_script.extensions()


# ---- only on a GPU -----------------------------------------------------------------------------


needs_kernels = pytest.mark.skipif(
    not native.available(), reason=f"no CUDA kernels: {native.unavailable_reason()}"
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
    grad = random_grad(case)
    logits = make_logits(4, 10, torch.float32, "cuda")
    counter, out = new_counter("cuda"), torch.empty_like(case.y)

    def step() -> tuple[tuple[Tensor, ...], native.Gradients]:
        results = native.entropy_gate(logits, 0.5, counter)
        case.index = results[1]
        rest = (*case.parts(), case.index, case.activation)
        native.forward(out, case.y, case.x, *rest)
        return results, native.backward(grad, case.x, *rest, (True,) * 4)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads the kernels before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results, gradients = step()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for tensor in (case.x, case.y, case.value, case.bias, grad):
            tensor.normal_(generator=generator)
        case.key.normal_(std=1 / 24, generator=generator)
        logits.copy_(make_logits(4, 10, torch.float32, "cuda").roll(seed, 0))
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        check_gate(results, logits, 0.5)
        assert_forward(out, case, case.expected(), case.y)
        assert_gradients(gradients, case.expected_gradients(grad), case)


SANITIZED = """
import torch
from tests import test_csrc as t
for d_in, d_out, padding, offset in [(576, 136, 0, 0), (37, 41, 3, 1), (2056, 4104, 0, 0)]:
    for dtype in (torch.float32, torch.bfloat16):
        case = t.make_case(
            dtype, d_in, d_out, tokens=3, padding=padding, offset=offset, device="cuda"
        )
        t.check_backward(case)
        t.check_forward(case)
logits = t.make_logits(40, 10, torch.float32, "cuda")
t.check_gate(t.gate(logits, 0.3), logits, 0.3)
print("through")
"""


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    result = subprocess.run(
        [
            *(sanitizer, "--tool", tool, "--error-exitcode", "9"),
            *("--report-api-errors", "no"),  # PyTorch asks for what may be missing
            *(argument for name in SOURCES for argument in ("--kernel-name", f"kns={name}")),
            *(sys.executable, "-c", SANITIZED),
        ],
        cwd=ROOT,
        # Each tensor in an allocation of its own: in PyTorch's pool a slip lands in a neighbour.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer cannot work on this machine: Device not supported")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "through" in result.stdout
