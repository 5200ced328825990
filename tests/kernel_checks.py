"""What the tests of the ops and their kernels share.

Triton's kernels run in its interpreter, or on the GPU where there is one. The interpreter runs them
as they stand, one program after the other, in numpy; what it does not show (registers, widths of
loads, wrong hints) is in test_ahead_of_time.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":  # Triton reads this when it is imported, by what meg_kernels imports too
    os.environ["TRITON_INTERPRET"] = "1"

from meg_kernels.kernels import launching  # noqa: E402

REASON = launching.unavailable_reason(DEVICE)
BACKENDS = ["triton", "reference"] + ["cpu"] * (DEVICE.type == "cpu")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = torch.finfo(torch.float32).eps
# How far rounding may be off, relatively. Triton's interpreter cuts bfloat16 off.
LAST_DIGIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
LAST_DIGIT[torch.bfloat16] *= 2 if DEVICE.type == "cpu" else 1
NAN, INFINITY = float("nan"), float("inf")

ONLY_BACKENDS = "only triton, cpu, reference"
"""What an op without a CUDA kernel answers if that is forced."""


def triton_marks(*fixtures: str) -> list[pytest.MarkDecorator]:
    """The `pytestmark` of a file that runs Triton's kernels, with these fixtures for every test."""
    marks = [
        pytest.mark.skipif(REASON is not None, reason=str(REASON)),
        pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's remarks on infinities
        pytest.mark.usefixtures(
            "faster_interpreter", "poisoned_memory", "within_memory", *fixtures
        ),
    ]
    return [*marks, pytest.mark.gpu] if DEVICE.type == "cuda" else marks


def on_gpu(test: Callable) -> Callable:
    """Mark a test that means nothing in the interpreter."""
    needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
    return pytest.mark.gpu(needs_gpu(test))


# ---- bits, and where they lie ------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, which tell NaNs and zeros of either sign apart."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(bits(actual), bits(expected))


def laid_out(
    tensor: Tensor,
    front: int = 0,
    row_gap: int = 0,
    sample_gap: int = 0,
    tokens_first: bool = False,
) -> Tensor:
    """A view with the elements of [M, d] or [B, T, d], amid NaN.

    Args:
        tensor: what to copy.
        front: how many NaNs lie in front of the first row.
        row_gap: how many lie between rows.
        sample_gap: how many more lie between samples.
        tokens_first: the samples of a token are neighbours in memory, not the tokens of a sample.
    """
    if tensor.dim() == 3 and tokens_first:
        return laid_out(tensor.transpose(0, 1), front, row_gap, sample_gap).transpose(0, 1)
    strides = [tensor.shape[-1] + row_gap, 1]
    if tensor.dim() == 3:
        strides.insert(0, tensor.shape[1] * strides[0] + sample_gap)
    memory = tensor.new_full((front + tensor.shape[0] * max(strides[0], 1) + 1024,), NAN)
    return memory.as_strided(tensor.shape, strides, front).copy_(tensor)


def assert_nothing_beside(view: Tensor) -> None:
    """Around a view that `laid_out` made, all memory is still NaN."""
    inside = view.clone()
    view.fill_(NAN)
    assert view._base.isnan().all()
    view.copy_(inside)


# ---- launches ----------------------------------------------------------------------------------


@dataclass
class Launch:
    """What a Triton kernel was launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {name: value for name, value in self.options.items() if name.isupper()}

    @property
    def addresses(self) -> list[int]:
        """Where the tensors lie that the kernel was given."""
        return [part.data_ptr() for part in self.arguments if isinstance(part, Tensor)]

    def is_listed_in(self, module: ModuleType) -> bool:
        """Whether it is one of the configurations that `module` lists."""
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        return any(
            one.kernel is self.kernel
            and (one.constants, one.warps, one.stages) == (self.constants, warps, stages)
            for one in module.configurations()
        )


@contextlib.contextmanager
def recorded(module: ModuleType, run: bool = True) -> Iterator[list[Launch]]:
    """The launches of a module's kernels in this block; with run=False they are only noted."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            def launch(*arguments: Any, **options: Any) -> Any:
                launches.append(Launch(self.kernel, grid, arguments, options))
                return self.kernel[grid](*arguments, **options) if run else None

            return launch

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, Recorder(getattr(module, name)))
        yield launches


def captured(run: Callable[[], Any]) -> tuple[Any, torch.cuda.CUDAGraph]:
    """What `run` returns, and a CUDA graph that computes it again."""
    run()  # compiles the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which forbids to wait for the device
        results = run()
    return results, graph
