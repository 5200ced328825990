"""The entropy of a softmax against float64: on every backend, and csrc's kernel on the host too."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from kernel_checks import (
    BACKENDS,
    DEVICE,
    DTYPES,
    INFINITY,
    NAN,
    assert_same_bits,
    captured,
    laid_out,
    on_gpu,
    recorded,
    triton_marks,
)
from properties import HealthCheck, given, settings, st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from meg_kernels.ops import native
from meg_kernels.ops.backend import backend
from meg_kernels.ops.softmax_entropy import (
    MAX_CLASSES,
    softmax_entropy,
    softmax_entropy_reference,
)

pytest.importorskip("triton")

from meg_kernels.kernels import softmax_entropy as triton_kernel

pytestmark = triton_marks()
CSRC_ON_HOST, CSRC_ON_GPU = "csrc on the host", "csrc on a GPU"


@dataclass
class Way:
    """One implementation, and where its tensors are."""

    run: Callable[[Tensor], Tensor]
    device: torch.device

    def __call__(self, logits: Tensor) -> Tensor:
        return self.run(logits)


@pytest.fixture(params=[*BACKENDS, CSRC_ON_HOST, pytest.param(CSRC_ON_GPU, marks=pytest.mark.gpu)])
def way(request) -> Iterator[Way]:
    """The op on every backend in turn, and csrc's kernel as g++ and nvcc compile it."""
    if request.param == CSRC_ON_HOST:
        request.getfixturevalue("on_host")
        yield Way(native.softmax_entropy, torch.device("cpu"))
    elif request.param == CSRC_ON_GPU:
        if (reason := native.unavailable_reason()) is not None:
            pytest.skip(f"no CUDA kernels: {reason}")
        yield Way(native.softmax_entropy, torch.device("cuda"))
    else:
        with backend(request.param):
            yield Way(softmax_entropy, DEVICE)


def make_logits(
    samples: int, classes: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> Tensor:
    """Rows from certain to clueless, in no order."""
    generator = torch.Generator().manual_seed(seed + samples * 100 + classes)
    sharpness = 10 ** torch.rand(samples, 1, generator=generator).mul(3).sub(1)
    return (torch.randn(samples, classes, generator=generator) * sharpness).to(dtype)


def check(entropy: Tensor, logits: Tensor) -> None:
    """Compare with float64; a class of probability 0 adds nothing."""
    probability = torch.softmax(logits.double(), dim=-1)
    expected = torch.special.entr(probability).sum(-1)
    assert entropy.dtype == torch.float32 and entropy.shape == logits.shape[:1]
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 10, 32, 33, 512, 513, 1000, MAX_CLASSES])
def test_any_number_of_classes_follows_the_definition(way, classes, dtype):
    logits = make_logits(9, classes, dtype).to(way.device)
    check(way(logits), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [0, 1, 4, 5, 16, 17, 64, 65, 700])
def test_any_number_of_rows_follows_the_definition(way, samples, dtype):
    logits = make_logits(samples, 10, dtype).to(way.device)
    check(way(logits), logits)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(0, 130),
    classes=st.integers(2, 40),
    spread=st.sampled_from([0.0, 0.1, 4.0, 100.0]),
    dtype=st.sampled_from(DTYPES),
    front=st.integers(0, 9),
    row_gap=st.integers(0, 9),
)
def test_any_shape_and_stride_follows_the_definition(
    way, samples, classes, spread, dtype, front, row_gap
):
    logits = make_logits(samples, classes, dtype) * spread
    logits = laid_out(logits.to(way.device), front, row_gap)
    check(way(logits), logits)


def test_entropies_of_special_rows(way):
    rows = [
        ([3.0, -INFINITY, -INFINITY, -INFINITY], 0.0),  # three classes are impossible
        ([5.0, 5.0, -INFINITY, -INFINITY], math.log(2)),
        ([1e30, 0.0, 0.0, 0.0], 0.0),  # exp would overflow
        ([3e38, -3e38, 0.0, 0.0], 0.0),
        ([-1e30, -1e30, -1e30, -1e30], math.log(4)),
        ([0.0, NAN, 0.0, 0.0], NAN),
        ([INFINITY, 0.0, 0.0, 0.0], NAN),
        ([-INFINITY, -INFINITY, -INFINITY, -INFINITY], NAN),
    ]
    logits, expected = zip(*rows, strict=True)
    entropy = way(torch.tensor(logits, device=way.device)).cpu()
    torch.testing.assert_close(entropy, torch.tensor(expected), equal_nan=True)
    assert entropy[[0, 2, 3]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 37])
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(way, classes, dtype):
    logits = make_logits(100, classes, dtype).to(way.device)
    whole = way(logits)
    for rows in ([3], [99], [70, 1, 40]):
        assert_same_bits(way(logits[rows]), whole[rows])


def test_one_class_is_certain(on_host):
    assert native.softmax_entropy(torch.tensor([[-3.0], [0.0], [9.0]])).tolist() == [0, 0, 0]


def test_elements_of_a_row_may_lie_apart(forced):
    logits = make_logits(5, 10).to(DEVICE)
    apart = torch.stack([logits, torch.full_like(logits, NAN)], dim=-1)[..., 0]
    check(softmax_entropy(apart), logits)


def test_autocast_does_not_reach_into_the_op(forced):
    logits = make_logits(5, 10).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        check(softmax_entropy(logits), logits)


def test_the_reference_has_the_gradient_of_the_definition():
    logits = make_logits(6, 5).double().requires_grad_()
    softmax_entropy_reference(logits).sum().backward()
    log_p = torch.log_softmax(logits.detach(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    expected = -log_p.exp() * (log_p + entropy)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-7)


# ---- launches ----------------------------------------------------------------------------------


def test_a_batch_is_one_launch_and_an_empty_one_none():
    with recorded(triton_kernel) as launches:
        triton_kernel.forward(make_logits(100, 10).to(DEVICE))
        assert len(launches) == 1
        triton_kernel.forward(make_logits(0, 10).to(DEVICE))
        assert len(launches) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_is_one_of_the_configurations(dtype):
    with recorded(triton_kernel, run=False) as launches:
        for classes in (2, 10, 32, 33, 512, 513, MAX_CLASSES):
            triton_kernel.forward(make_logits(2, classes, dtype).to(DEVICE))
    for launch in launches:
        assert launch.is_listed_in(triton_kernel), launch
        assert launch.constants["COLUMNS"] >= launch.arguments[3]
    assert len(launches) == 7 and len([*triton_kernel.configurations()]) == 3 * len(DTYPES)


def test_more_rows_than_small_grid_dimensions_hold():
    with recorded(triton_kernel, run=False) as launches:
        triton_kernel.forward(torch.zeros(1, 600, device=DEVICE).expand(70_000, -1))
    assert launches[0].grid == (70_000,)


def test_offsets_beyond_32_bits(far):
    logits = make_logits(3, 10, torch.float16)
    check(triton_kernel.forward(far(logits)), logits)


# ---- torch.library and torch.compile -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [0, 5])
def test_opcheck(forced, samples, dtype):
    if forced == "triton" and dtype == torch.float64:
        pytest.skip("float64 is not for Triton")
    logits = make_logits(samples, 7, dtype).to(DEVICE)
    torch.library.opcheck(torch.ops.meg_kernels.softmax_entropy.default, (logits,))


def test_the_compiled_op_is_one_graph_for_all_batches(forced):
    counter = CompileCounter()
    compiled = torch.compile(softmax_entropy, backend=counter, fullgraph=True, dynamic=True)
    for samples in range(2, 6):
        logits = make_logits(samples, 10).to(DEVICE)
        assert_same_bits(compiled(logits), softmax_entropy(logits))
    assert counter.frame_count == 1


# ---- errors, examples --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logits, message",
    [
        (torch.zeros(10), r"logits is torch.float32 \(10,\); it must be floating-point \[B, C\]"),
        (torch.zeros(3, 10).long(), r"logits is torch.int64 \(3, 10\); it must be floating"),
        (torch.zeros(3, 1), "logits has 1 classes; it must have 2 to 4096"),
        (torch.zeros(3, 4097), "logits has 4097 classes; it must have 2 to 4096"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        softmax_entropy(logits)


def test_gradients_are_refused_where_they_would_be_lost():
    logits = make_logits(3, 10).to(DEVICE).requires_grad_()
    refusal = r"softmax_entropy has no backward; logits requires a gradient.*torch.no_grad\(\)"
    with pytest.raises(RuntimeError, match=refusal):
        softmax_entropy(logits)
    with torch.no_grad():
        check(softmax_entropy(logits), logits)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_kernel_that_is_forced_refuses_float64(name):
    refusal = rf"softmax_entropy: backend '{name}' is forced, but .*float64; .* take .*bfloat16"
    with backend(name), pytest.raises(RuntimeError, match=refusal):
        softmax_entropy(make_logits(3, 10, torch.float64).to(DEVICE))


def test_the_csrc_kernel_refuses_elements_that_lie_apart():
    logits = make_logits(10, 3).T
    with pytest.raises(ValueError, match=r"softmax_entropy: logits .* \.contiguous\(\)"):
        native.softmax_entropy(logits)


@pytest.mark.parametrize("invalid", [(-1, 1, 0), (1, -1, 0), (1, 1, 3)])
def test_sizes_that_cannot_be_are_an_error_code(host_extension, invalid):
    assert host_extension.softmax_entropy((0, 0), invalid, 0, (0, 0)) == 1  # cudaErrorInvalidValue


# ---- on a GPU only -----------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_many_rows_on_the_gpu_again_and_again(name):
    logits = make_logits(100_000, 10).to(DEVICE)
    with _backend_or_skip(name):
        first = softmax_entropy(logits)
        check(first, logits)
        for _ in range(20):
            assert_same_bits(softmax_entropy(logits), first)


@on_gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_graph_replays_with_other_logits(name):
    logits = make_logits(3000, 10).to(DEVICE)
    with _backend_or_skip(name):
        entropy, graph = captured(lambda: softmax_entropy(logits))
    for seed in range(1, 4):
        logits.copy_(make_logits(3000, 10, seed=seed))
        entropy.fill_(NAN)
        graph.replay()
        check(entropy, logits)


@contextlib.contextmanager
def _backend_or_skip(name: str) -> Iterator[None]:
    if name == "cuda" and (reason := native.unavailable_reason()) is not None:
        pytest.skip(f"no CUDA kernels: {reason}")
    with backend(name):
        yield
