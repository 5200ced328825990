"""A linear layer and gelu against float64, on every backend.

Triton's kernel runs in its interpreter, or on the GPU where there is one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    EPSILON,
    LAST_DIGIT,
    NAN,
    ONLY_BACKENDS,
    captured,
    on_gpu,
    recorded,
    triton_marks,
)
from properties import given, st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from meg_kernels.kernels import launching
from meg_kernels.ops import linear_gelu as op_module
from meg_kernels.ops.backend import VARIABLE, backend
from meg_kernels.ops.linear_gelu import linear_gelu, linear_gelu_reference

pytest.importorskip("triton")

from meg_kernels.kernels import linear_gelu as triton_kernel

pytestmark = triton_marks("bfloat16_products")
LIBRARY = torch.ops.meg_kernels
STEEPEST = 1.13  # slope of gelu


# ---- calls and their oracle --------------------------------------------------------------------


@dataclass
class Call:
    """Arguments of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    def run(self) -> Tensor:
        return linear_gelu(*self.arguments())

    def launch(self) -> Tensor:
        """The Triton kernel's result, which has NaN around it that must stay."""
        allocate, beside = torch.empty, 2**17
        memories = []

        def amid_nan(*shape, **options):
            size = math.prod(shape)
            memory = allocate(size + 2 * beside, **options).fill_(NAN)
            memories.append((memory, slice(beside, beside + size)))
            return memory[memories[-1][1]].view(shape)

        with backend("triton"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", amid_nan)
            out = self.run().clone()
        for memory, inside in memories:
            memory[inside] = NAN
            assert memory.isnan().all()
        return out

    def samples(self, samples: list[int] | slice) -> Call:
        """The same for these samples only."""
        return replace(self, x=self.x[samples])

    def check(self, result: Tensor, rounded_product: bool = False) -> None:
        """Compare with float64; some backends round the product before they go on with it."""
        dtype = self.x.dtype
        assert result.shape == (*self.x.shape[:-1], len(self.weight)) and result.dtype == dtype
        assert result.is_contiguous()
        x, weight, bias = self.x.double(), self.weight.double(), self.bias.double()
        linear = x @ weight.T + bias
        terms = weight.shape[1] + 2
        error = terms * EPSILON * (x.abs() @ weight.abs().T + bias.abs())
        if rounded_product:
            error = error + 2 * LAST_DIGIT[dtype] * linear.abs()  # and so they round the bias
        bent = math.sqrt(2 / math.pi) * (linear + 0.044715 * linear**3)
        expected = 0.5 * linear * (1 + torch.tanh(bent))
        allowed = STEEPEST * error + 8 * EPSILON * linear.abs()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = allowed + LAST_DIGIT[dtype] * expected.abs() + smallest
        excess = (result.double() - expected).abs() - allowed
        assert not excess.numel() or excess.max() <= 0, excess.max()


def random_call(batch=3, tokens=5, depth=72, width=40, *, dtype=torch.float32, seed=0) -> Call:
    generator = torch.Generator().manual_seed(seed + 1000 * batch + 100 * tokens + depth + width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x, weight = normal(batch, tokens, depth), normal(width, depth) / max(depth, 1) ** 0.5
    return Call(x, weight, normal(width))


@functools.cache
def many_rows(width, dtype) -> tuple[Call, Tensor]:
    """Enough for large tiles, and their groups of eight do not come out even; with the result."""
    call = random_call(40, 52, 72, width, dtype=dtype)
    return call, call.launch()


MANY_ROWS = [*((1000, dtype) for dtype in DTYPES), (1001, torch.bfloat16)]


def apart(part: Tensor) -> Tensor:
    """The same elements, with NaN between them."""
    return torch.stack([part, torch.full_like(part, NAN)], dim=-1)[..., 0]


def shifted(part: Tensor) -> Tensor:
    """The same elements, one element further from a multiple of 16 bytes."""
    memory = part.new_full((part.numel() + 1,), NAN)
    return memory[1:].view(part.shape).copy_(part)


@st.composite
def calls(draw):
    call = random_call(
        draw(st.integers(0, 3)),
        draw(st.integers(0, 40)),
        draw(st.integers(0, 40) | st.sampled_from([64, 72, 136, 200])),
        draw(st.integers(1, 40) | st.sampled_from([64, 72, 136])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 9)),
    )
    for name, part in vars(call).items():
        setattr(call, name, draw(st.sampled_from([torch.clone, apart, shifted]))(part))
    return call


# ---- results -----------------------------------------------------------------------------------


@given(calls())
def test_the_kernel_follows_the_definition_whatever_it_is_given(call):
    before = [part.clone() for part in call.arguments()]
    call.check(call.launch())
    for part, copy in zip(call.arguments(), before, strict=True):
        assert torch.equal(part, copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth, width", [(1, 1), (72, 40), (65, 130), (200, 7)])
def test_every_backend_follows_the_definition(forced, depth, width, dtype):
    call = random_call(3, 5, depth, width, dtype=dtype)
    call.check(call.run(), rounded_product=forced != "triton")


@pytest.mark.parametrize(
    "depth, width",
    [(256, 1024), (1024, 256), (256, 256), (768, 3072), (3072, 768), (768, 768)],
)
def test_the_layers_of_the_networks(depth, width):
    call = random_call(1, 12, depth, width, dtype=torch.bfloat16)
    call.check(call.launch())


@pytest.mark.parametrize("width, dtype", MANY_ROWS, ids=str)
def test_many_rows(width, dtype):
    call, result = many_rows(width, dtype)
    call.check(result)


def test_rows_without_samples_are_taken(forced):
    call = random_call()
    call.x = call.x.flatten(0, 1)
    call.check(call.run())


def test_bias_and_gelu_follow_before_the_only_rounding():
    # 2049 lies between two numbers of float16, which has 2048 and 2050.
    x = torch.tensor([[2048.0, 1.0]], dtype=torch.float16, device=DEVICE)
    with backend("triton"):
        assert linear_gelu(x, x.new_ones(1, 2), x.new_ones(1)).item() == 2050
        assert linear_gelu(x, x.new_ones(1, 2), -x.new_ones(1)).item() == 2048  # not 2047


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_formed_in_float32(dtype):
    # 1 + 4096 * 2^-12 = 2: in float16 every single addition to 1 of 2^-12 would be rounded away.
    x = torch.full((1, 4097), 2.0**-12, dtype=dtype, device=DEVICE)
    x[0, 0] = 2
    expected = Call(x, torch.ones_like(x), x.new_zeros(1))
    expected.check(expected.launch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_follows_its_tanh_form_from_end_to_end(dtype):
    a = torch.tensor([-3e4, -90.0, -9.0, -5.0, -3.0, -1.0, -1e-6, 0.0, 0.7, 3.0, 9.0, 3e4])
    call = Call(a.to(DEVICE, dtype)[:, None], a.new_ones(1, 1).to(DEVICE, dtype), a.new_zeros(1))
    call.bias = call.bias.to(DEVICE, dtype)
    call.check(call.launch())


def interpreter_keeps_bits() -> bool:
    """Whether numpy, which multiplies in Triton's interpreter, minds a row's place in a tile."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape, np.float32) for shape in ((64, 32), (32, 64)))
    return np.array_equal((a[::-1].copy() @ b)[::-1], a @ b)


@pytest.mark.parametrize("width, dtype", MANY_ROWS, ids=str)
def test_a_row_gets_the_same_bits_alone_and_in_a_batch_of_any_size(width, dtype):
    call, whole = many_rows(width, dtype)
    exact = DEVICE.type == "cuda" or interpreter_keeps_bits()

    def assert_same(result, expected):
        # Some of OpenBLAS' kernels sum the rows of a tile differently: there it is the last bit.
        torch.testing.assert_close(result, expected, **({"rtol": 0, "atol": 0} if exact else {}))

    with backend("triton"):
        for samples in ([7], [39, 0, 20, 21]):
            assert_same(call.samples(samples).run(), whole[samples])
        row = (slice(11, 12), slice(3, 4))
        assert_same(replace(call, x=call.x[row]).run(), whole[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_bits_depend_on_does_not_depend_on_the_number_of_rows(dtype):
    sizes = [(2**p, 2**q, aligned) for p in range(20) for q in range(13) for aligned in (0, 1)]
    launches = {triton_kernel.tile_launch(*size[:2], dtype, bool(size[2])) for size in sizes}
    assert len({launch.depth for launch in launches}) == 1
    assert all(launch.rows >= 64 for launch in launches)  # as sm_90's instruction takes them
    assert len(launches) == (1 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_what_is_not_finite_harms_only_its_own_rows_and_columns(forced, name, bad):
    call = random_call(3, 5, 9, 11)
    clean = call.run()
    harmed = torch.zeros(3, 5, 11, dtype=torch.bool, device=DEVICE)
    harmed[(1, 2) if name == "x" else (..., 4)] = True
    getattr(call, name)[(1, 2, 0) if name == "x" else 4] = bad
    out = call.run()
    assert torch.equal(out[~harmed], clean[~harmed])
    assert not out[harmed].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 5, 8, 3), (3, 0, 8, 3), (3, 5, 0, 3), (3, 5, 8, 0)])
def test_no_samples_no_tokens_or_no_width(forced, shape):
    call = random_call(*shape)
    call.check(call.run())


def test_arguments_may_lie_in_memory_as_they_like(forced):
    call = random_call()
    call.x = call.x.transpose(0, 1).contiguous().transpose(0, 1)
    call.weight = call.weight.T.contiguous().T
    call.bias = apart(call.bias)
    call.check(call.run())


def test_autocast_does_not_reach_into_the_op(forced):
    call = random_call()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        call.check(call.run())


def test_the_reference_takes_float64_and_has_gradients():
    call = random_call(2, 2, 5, 3)
    parts = [part.double().cpu().requires_grad_() for part in call.arguments()]
    assert torch.autograd.gradcheck(linear_gelu_reference, parts)


# ---- the choice, and launches ------------------------------------------------------------------


def test_the_kernel_runs_only_where_it_is_forced(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    call = random_call()
    with recorded(triton_kernel) as launches:
        by_itself = call.run()
        with backend("reference"):
            assert torch.equal(call.run(), by_itself)
        assert not launches
        monkeypatch.setenv(VARIABLE, "triton")
        call.check(call.run())
        assert len(launches) == 1


def test_a_gpu_takes_the_reference_unless_another_backend_is_forced(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(launching, "unavailable_reason", lambda device: None)
    gpu = torch.device("cuda")
    assert op_module._chosen(gpu, torch.bfloat16) == "reference"
    with backend("triton"):
        assert op_module._chosen(gpu, torch.bfloat16) == "triton"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_layers_arguments_are_read_as_they_are_in_one_aligned_launch(dtype):
    call = random_call(2, 3, 64, 32, dtype=dtype)
    with backend("triton"), recorded(triton_kernel) as launches:
        call.check(call.run())
    (launch,) = launches
    assert {part.data_ptr() for part in call.arguments()} <= set(launch.addresses)
    assert launch.options["ALIGNED"]


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_one_misaligned_argument_is_enough_for_narrow_loads(name):
    call = random_call(2, 3, 64, 32, dtype=torch.bfloat16)
    setattr(call, name, shifted(getattr(call, name)))
    with recorded(triton_kernel) as launches:
        call.check(call.launch())
    assert not launches[0].options["ALIGNED"]


@pytest.mark.parametrize("depth, width", [(60, 32), (64, 28)])
def test_rows_that_end_within_16_bytes_are_not_aligned(depth, width):
    with backend("triton"), recorded(triton_kernel, run=False) as launches:
        random_call(1, 1, depth, width, dtype=torch.bfloat16).run()
    assert not launches[0].options["ALIGNED"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_launched_are_the_configurations(dtype):
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    listed = [
        {**one.constants, "num_warps": one.warps, "num_stages": one.stages}
        for one in triton_kernel.configurations()
        if one.types["x_ptr"] == pointer
    ]
    with backend("triton"), recorded(triton_kernel, run=False) as launches:
        for shape in ((1, 1, 1, 1), (1, 12, 64, 64), (3, 5, 33, 7), (40, 52, 8, 1024)):
            random_call(*shape, dtype=dtype).run()
    assert len(launches) == 4 and all(launch.is_listed_in(triton_kernel) for launch in launches)
    assert all(launch.options in listed for launch in launches)
    assert all(options in [launch.options for launch in launches] for options in listed)


@pytest.mark.parametrize("rows, columns", [(1, 1), (64, 128), (65, 129), (2080, 1024)])
def test_there_is_a_program_for_every_tile(rows, columns):
    with backend("triton"), recorded(triton_kernel, run=False) as launches:
        random_call(rows, 1, 8, columns, dtype=torch.bfloat16).run()
    (launch,) = launches
    tiles = -(-rows // launch.options["ROWS"]) * -(-columns // launch.options["COLUMNS"])
    assert launch.grid == (tiles,)


def test_small_results_have_small_tiles():
    def rows_of_a_tile(*shape):
        with backend("triton"), recorded(triton_kernel, run=False) as launches:
            random_call(*shape, dtype=torch.bfloat16).run()
        return launches[0].options["ROWS"]

    assert rows_of_a_tile(1, 82, 8, 3072) == 64
    assert rows_of_a_tile(40, 52, 8, 1024) == 128


# ---- torch.library and torch.compile -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 16, 8), (0, 5, 16, 8), (2, 0, 16, 8)])
def test_opcheck(forced, shape, dtype):
    call = random_call(*shape, dtype=dtype)
    torch.library.opcheck(LIBRARY.linear_gelu.default, call.arguments())
    call.x = call.x.flatten(0, 1)
    torch.library.opcheck(LIBRARY.linear_gelu.default, call.arguments())


def test_results_of_strided_arguments_are_contiguous_as_the_fake_says(forced):
    call = random_call()
    call.x = call.x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(LIBRARY.linear_gelu.default, call.arguments())


def test_the_compiled_op_gives_the_same_bits(forced):
    call = random_call(dtype=torch.bfloat16)
    compiled = torch.compile(linear_gelu, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*call.arguments()), call.run())


def test_the_compiled_op_is_one_graph_for_all_batches():
    counter = CompileCounter()
    compiled = torch.compile(linear_gelu, backend=counter, fullgraph=True, dynamic=True)
    for batch in range(2, 6):
        call = random_call(batch)
        call.check(compiled(*call.arguments()))
    assert counter.frame_count == 1


# ---- errors, examples --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x": torch.zeros(5)},
            r"x is torch.float32 \(5,\); it must be floating-point \[B, T, K\] or \[M, K\]",
        ),
        ({"x": torch.zeros(3, 5, 72).long()}, "x is torch.int64 .* must be floating-point"),
        ({"weight": torch.zeros(72, 40)}, r"weight is \(72, 40\); .* must be \[N, 72\], as nn.Lin"),
        ({"weight": torch.zeros(72)}, r"weight is \(72,\); beside x \(3, 5, 72\) it must be"),
        ({"bias": torch.zeros(72)}, r"bias is \(72,\); .* weight \(40, 72\) it must be \(40,\)"),
        ({"bias": torch.zeros(40).half()}, "bias is torch.float16 on .* x torch.float32 on .*conv"),
        ({"weight": torch.zeros(40, 72, device="meta")}, "weight is .* on meta, x .* move them"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    on_device = {
        name: part if part.device.type == "meta" else part.to(DEVICE)
        for name, part in changes.items()
    }
    call = replace(random_call(), **on_device)
    with pytest.raises(ValueError, match=message):
        call.run()


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_gradients_are_refused_where_they_would_be_lost(name):
    call = random_call()
    setattr(call, name, getattr(call, name).clone().requires_grad_())
    refusal = rf"linear_gelu has no backward; {name} requires .*no_grad.*linear_gelu_reference"
    with pytest.raises(RuntimeError, match=refusal):
        call.run()
    with torch.no_grad():
        call.check(call.run())


def test_the_cuda_backend_is_refused():
    with backend("cuda"), pytest.raises(RuntimeError, match=ONLY_BACKENDS):
        random_call().run()


def test_float64_is_computed_in_float64_but_not_by_triton(forced):
    call = random_call(dtype=torch.float64)
    if forced == "triton":
        with pytest.raises(RuntimeError, match=r"'triton' is forced, but .*float64; .*bfloat16"):
            call.run()
        return
    linear = torch.einsum("btk,nk->btn", call.x, call.weight) + call.bias
    expected = torch.nn.functional.gelu(linear, approximate="tanh")
    torch.testing.assert_close(call.run(), expected, rtol=1e-12, atol=1e-12)


# ---- on a GPU only -----------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize(
    "depth, width, dtype",
    [
        (256, 1024, torch.bfloat16),
        (768, 3072, torch.bfloat16),
        (3072, 768, torch.float16),
        (256, 256, torch.float32),
    ],
    ids=str,
)
def test_many_samples_on_the_gpu(depth, width, dtype):
    call = random_call(512, 82, depth, width, dtype=dtype)
    with backend("triton"):
        whole = call.run()
        few = [0, 1, 255, 511]
        some = call.samples(few)
        some.check(whole[few])
        assert torch.equal(some.run(), whole[few])


@on_gpu
def test_a_graph_replays_with_other_samples():
    call = random_call(64, 52, 256, 1024, dtype=torch.bfloat16)
    with backend("triton"):
        out, graph = captured(call.run)
    for seed in range(1, 4):
        other = random_call(64, 52, 256, 1024, dtype=torch.bfloat16, seed=seed)
        for part, new in zip(call.arguments(), other.arguments(), strict=True):
            part.copy_(new)
        out.fill_(NAN)
        graph.replay()
        call.check(out)
