"""The DiT's normalisations against float64, on every backend.

Triton's kernel runs in its interpreter, or on the GPU where there is one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

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
    laid_out,
    on_gpu,
    recorded,
    triton_marks,
)
from properties import given, st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from meg_kernels.ops.backend import backend
from meg_kernels.ops.modulated_norm import (
    MAX_WIDTH,
    gated_residual_layer_norm,
    gated_residual_layer_norm_reference,
    modulated_layer_norm,
    modulated_layer_norm_reference,
)

pytest.importorskip("triton")

from meg_kernels.kernels import modulated_norm as triton_kernel

pytestmark = triton_marks()
LIBRARY = torch.ops.meg_kernels
OPS = {"modulated": False, "gated": True}


@pytest.fixture(params=OPS.values(), ids=OPS)
def gated(request):
    """Each of the two ops."""
    return request.param


# ---- calls and their oracle --------------------------------------------------------------------


@dataclass
class Call:
    """Arguments of one call; without update and gate, of `modulated_layer_norm`."""

    x: Tensor
    update: Tensor | None
    gate: Tensor | None
    shift: Tensor
    scale: Tensor
    eps: float = 1e-6

    def arguments(self) -> tuple:
        return tuple(part for part in vars(self).values() if part is not None)

    def run(self) -> tuple[Tensor, Tensor]:
        """(stream, out) of the op on the backend that is forced."""
        if self.update is None:
            return self.x, modulated_layer_norm(*self.arguments())
        return gated_residual_layer_norm(*self.arguments())

    def launch(self) -> tuple[Tensor, Tensor]:
        """The Triton kernel's results, which have NaN around them that must stay."""
        count = 2 if self.update is not None else 1
        memory = self.x.new_full((count, self.x.numel() // 64 * 64 + 4096), NAN)
        inside = slice(2048, 2048 + self.x.numel())
        out, stream = (*(row[inside].view(self.x.shape) for row in memory), None)[:2]
        rest = (self.x, self.shift, self.scale, self.eps, stream, self.update, self.gate)
        triton_kernel.forward(out, *rest)
        results = self.x if stream is None else stream.clone(), out.clone()
        memory[:, inside] = NAN
        assert memory.isnan().all()
        return results

    def samples(self, samples: list[int] | slice) -> Call:
        """The same for these samples only."""
        parts = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **{name: part[samples] for name, part in parts.items()})

    def check(self, results: tuple[Tensor, Tensor]) -> None:
        """Compare with float64: the stream, and what is made of the stream as it was rounded."""
        stream, out = results
        for result in results:
            assert result.shape == self.x.shape and result.dtype == self.x.dtype
        if self.update is not None:
            self._check_stream(stream)
        r = stream.double()
        shift, scale = self.shift[:, None].double(), self.scale[:, None].double()
        mean = r.mean(-1, keepdim=True)
        variance = (r - mean).square().mean(-1, keepdim=True)
        size = 1 / (variance + self.eps).sqrt()
        normed = (r - mean) * size
        expected = normed * (1 + scale) + shift
        # Of a sum, one thread adds at most 16 or 32 elements and their sums in a tree.
        of_mean = 40 * EPSILON * r.abs().mean(-1, keepdim=True) * size
        of_normed = of_mean + normed.abs() * (40 * EPSILON + of_mean.square())
        allowed = of_normed * (1 + scale).abs() + 4 * EPSILON * (expected.abs() + shift.abs())
        allowed += LAST_DIGIT[self.x.dtype] * expected.abs() + torch.finfo(self.x.dtype).tiny
        excess = (out.double() - expected).abs() - allowed
        assert not excess.numel() or excess.max() <= 0, excess.max()

    def _check_stream(self, stream: Tensor) -> None:
        added = self.gate[:, None].double() * self.update.double()
        expected = self.x.double() + added
        allowed = LAST_DIGIT[self.x.dtype] * expected.abs() + EPSILON * added.abs()
        excess = (stream.double() - expected).abs() - allowed
        assert not excess.numel() or excess.max() <= 0, excess.max()
        if self.x.dtype == torch.float16:  # a product is exact in float32: only the sum is rounded
            assert torch.equal(stream, expected.float().half())


def random_call(
    batch=3, tokens=5, width=64, *, dtype=torch.float32, gated=True, eps=1e-6, seed=0
) -> Call:
    """A call whose shift, scale and gate are columns of one matrix, as the DiT has them."""
    generator = torch.Generator().manual_seed(seed + 1000 * batch + 100 * tokens + width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x, update = normal(batch, tokens, width), normal(batch, tokens, width)
    shift, scale, gate, _ = normal(batch, 4 * width).chunk(4, dim=-1)
    return Call(x, update if gated else None, gate if gated else None, shift, scale, eps)


@st.composite
def calls(draw):
    call = random_call(
        draw(st.integers(0, 3)),
        draw(st.integers(0, 6)),
        draw(st.integers(1, 40) | st.sampled_from([64, 200, 256, 264, 768, 1024, 1032])),
        dtype=draw(st.sampled_from(DTYPES)),
        gated=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-6, 1e-3, 1.0])),
        seed=draw(st.integers(0, 9)),
    )
    gaps = st.sampled_from([0, 0, 8, 16, 3])
    for name, part in vars(call).items():
        if isinstance(part, Tensor) and draw(st.booleans()):
            layout = [draw(gaps), draw(gaps)]
            if part.dim() == 3:
                layout += [draw(gaps), draw(st.booleans())]
            setattr(call, name, laid_out(part, *layout))
    return call


# ---- results -----------------------------------------------------------------------------------


@given(calls())
def test_the_kernel_follows_the_definition_whatever_it_is_given(call):
    before = [part.clone() for part in call.arguments()[:-1]]
    call.check(call.launch())
    for part, copy in zip(call.arguments(), before, strict=False):
        assert torch.equal(part, copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_follows_the_definition(forced, dtype, gated):
    call = random_call(dtype=dtype, gated=gated)
    call.check(call.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 250, 256, 257, 264, 768, 1000, 1024, 1032, MAX_WIDTH])
def test_rows_of_any_width(forced, width, dtype, gated):
    call = random_call(2, 3, width, dtype=dtype, gated=gated)
    call.check(call.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 768])
def test_the_norm_is_of_the_rounded_stream(forced, width, dtype):
    call = random_call(width=width, dtype=dtype)
    # Next to 256 most of an update is rounded away; around it the norm would see all of it.
    call.x = 256 + call.x.sign()
    stream, out = call.run()
    call.check((stream, out))
    again = replace(call, x=stream, update=None, gate=None)
    assert torch.equal(again.run()[1], out)


@pytest.mark.parametrize("width", [250, 256, 768, 2000])
def test_a_large_mean_costs_no_more_than_its_own_digits(forced, width, gated):
    call = random_call(width=width, gated=gated)
    call.x = call.x + 10_000
    call.check(call.run())


@pytest.mark.parametrize("width", [256, 768])
def test_rows_of_one_value_become_the_shift(forced, width):
    call = random_call(width=width, gated=False)
    call.x[:] = 2.0
    _, out = call.run()
    assert torch.equal(out, call.shift[:, None].expand_as(out))


def test_eps_is_added_to_the_variance(forced, gated):
    call = random_call(gated=gated, eps=0.5)
    call.x *= 0.1
    call.check(call.run())
    unlike = replace(call, eps=1e-6).run()[1]
    assert not torch.allclose(call.run()[1], unlike, atol=0.01)


def test_eps_is_a_millionth_unless_it_is_said(forced):
    call = random_call()
    call.x *= 1e-3
    call.update *= 1e-3
    expected = call.run()[1]
    assert torch.equal(gated_residual_layer_norm(*call.arguments()[:-1])[1], expected)
    call.x, call.update, call.gate = call.x, None, None
    assert torch.equal(modulated_layer_norm(call.x, call.shift, call.scale), call.run()[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 33, 768])
def test_a_sample_gets_the_same_bits_whatever_else_is_in_the_batch(forced, width, dtype, gated):
    call = random_call(5, 3, width, dtype=dtype, gated=gated)
    whole = call.run()
    for samples in ([2], [4, 0, 3], slice(1, 2)):
        for actual, expected in zip(call.samples(samples).run(), whole, strict=True):
            assert torch.equal(actual, expected[samples])


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("name", ["x", "update", "gate", "shift", "scale"])
def test_what_is_not_finite_harms_only_its_own_rows(forced, name, bad):
    call = random_call(3, 5)
    clean = call.run()
    getattr(call, name)[1][(..., 2, 0) if name in ("x", "update") else 0] = bad
    harmed = torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)
    harmed[1, 2 if name in ("x", "update") else slice(None)] = True
    for actual, expected in zip(call.run(), clean, strict=True):
        assert torch.equal(actual[~harmed], expected[~harmed])
    assert not call.run()[1][harmed][:, 0].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 0, 1)])
def test_no_samples_or_no_tokens(forced, shape, gated):
    call = random_call(*shape, gated=gated)
    call.check(call.run())


def test_tokens_may_lie_in_any_order(forced, gated):
    call = random_call(3, 4, gated=gated)
    call.x = laid_out(call.x, tokens_first=True)
    if gated:
        call.update = call.update[:1].expand_as(call.x)
    call.check(call.run())
    assert all(result.is_contiguous() for result in call.run()[not gated :])


def test_elements_of_a_row_may_lie_apart(forced, gated):
    call = random_call(3, 4, gated=gated)
    for name, part in vars(call).items():
        if isinstance(part, Tensor):
            setattr(call, name, torch.stack([part, part * 0], dim=-1)[..., 0])
    call.check(call.run())


def test_one_modulation_may_serve_the_whole_batch(forced):
    call = random_call()
    for name in ("gate", "shift", "scale"):
        setattr(call, name, getattr(call, name)[:1].expand(3, -1))
    call.check(call.run())


def test_autocast_does_not_reach_into_the_ops(forced, gated):
    call = random_call(gated=gated)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        call.check(call.run())


def test_the_reference_takes_float64_and_has_gradients():
    call = random_call(2, 2, 5)
    parts = [part.double().cpu().requires_grad_() for part in call.arguments()[:-1]]
    x, _, _, shift, scale = parts
    assert torch.autograd.gradcheck(gated_residual_layer_norm_reference, parts)
    assert torch.autograd.gradcheck(modulated_layer_norm_reference, (x, shift, scale))


# ---- launches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [256, 768])
def test_columns_of_one_matrix_are_read_as_they_are_in_one_launch(width, dtype, gated):
    call = random_call(2, 3, width, dtype=dtype, gated=gated)
    call.x = laid_out(call.x, row_gap=16, tokens_first=True)
    with backend("triton"), recorded(triton_kernel) as launches:
        call.check(call.run())
    (launch,) = launches
    assert {part.data_ptr() for part in call.arguments()[:-1]} <= set(launch.addresses)
    assert launch.options["ALIGNED"]


@pytest.mark.parametrize(
    "name, layout",
    [
        *itertools.product(["x", "update", "gate", "shift", "scale"], [(1, 0), (0, 4)]),
        *itertools.product(["x", "update"], [(0, 0, 4)]),
    ],
    ids=str,
)
def test_one_misaligned_argument_is_enough_for_narrow_loads(name, layout):
    call = random_call(dtype=torch.bfloat16)
    setattr(call, name, laid_out(getattr(call, name), *layout))
    with recorded(triton_kernel) as launches:
        call.check(call.launch())
    assert not launches[0].options["ALIGNED"]


@pytest.mark.parametrize("width, aligned", [(24, True), (22, False), (21, False)])
def test_rows_are_aligned_if_they_end_at_16_bytes(width, aligned):
    call = random_call(1, 1, width)
    for name in ("x", "update", "gate", "shift", "scale"):
        setattr(call, name, laid_out(getattr(call, name), row_gap=-width % 4))
    with recorded(triton_kernel) as launches:
        call.check(call.launch())
    assert launches[0].options["ALIGNED"] is aligned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_is_one_of_the_configurations(dtype, gated):
    with recorded(triton_kernel, run=False) as launches:
        for width in (1, 8, 256, 264, 768, 1024, 1032, MAX_WIDTH):
            random_call(2, 3, width, dtype=dtype, gated=gated).launch()
    for launch in launches:
        assert launch.is_listed_in(triton_kernel)
        assert launch.constants["CHUNKS"] * launch.constants["BLOCK"] >= launch.arguments[9]
    assert len(launches) == 8 and len([*triton_kernel.configurations()]) == 4 * len(DTYPES)


def test_more_tokens_than_small_grid_dimensions_hold():
    call = random_call(1, 1, 768, gated=False)
    many = 300_000
    x = call.x.expand(many, 1, -1)
    with recorded(triton_kernel, run=False) as launches:
        triton_kernel.forward(x, x, call.shift.expand(many, -1), call.scale.expand(many, -1), 1e-6)
    assert launches[0].grid == (many // 4,)


@pytest.mark.parametrize(
    "name, dim",
    [("x", 0), ("x", 1), ("update", 0), ("update", 1), ("gate", 0), ("shift", 0), ("scale", 0)],
)
def test_offsets_beyond_32_bits(far, name, dim):
    call = random_call(3, 3, 8, dtype=torch.float16)
    setattr(call, name, far(getattr(call, name), dim))
    call.check(call.launch())


# ---- torch.library and torch.compile -----------------------------------------------------------


def opcheck(call: Call) -> None:
    torch.library.opcheck(LIBRARY.gated_residual_layer_norm.default, call.arguments())
    call = replace(call, update=None, gate=None)
    torch.library.opcheck(LIBRARY.modulated_layer_norm.default, call.arguments())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(forced, dtype):
    call = random_call(dtype=dtype)
    call.x = laid_out(call.x, 1, 3, tokens_first=True)
    opcheck(call)


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_opcheck_of_empty_batches(forced, batch, tokens):
    call = random_call(batch, tokens)
    for name in ("gate", "shift", "scale"):  # opcheck cannot clone the columns of an empty matrix
        setattr(call, name, torch.zeros(batch, 64, device=DEVICE))
    opcheck(call)


def test_compiled_ops_give_the_same_bits(forced, gated):
    call = random_call(dtype=torch.bfloat16, gated=gated)
    op = (
        gated_residual_layer_norm
        if gated
        else lambda *parts: (call.x, modulated_layer_norm(*parts))
    )
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*call.arguments()), call.run(), strict=True):
        assert torch.equal(actual, expected)


def test_compiled_ops_are_one_graph_for_all_batches():
    counter = CompileCounter()
    compiled = torch.compile(
        gated_residual_layer_norm, backend=counter, fullgraph=True, dynamic=True
    )
    for batch in range(2, 6):
        call = random_call(batch)
        call.check(compiled(*call.arguments()))
    assert counter.frame_count == 1


# ---- errors, examples --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(3, 64)}, r"x is torch.float32 \(3, 64\); .* \[B, T, D\]"),
        ({"x": torch.zeros(3, 5, 64).long()}, "x is torch.int64 .* must be floating-point"),
        ({"x": torch.zeros(3, 5, 0)}, f"x has rows of 0 elements; 1 to {MAX_WIDTH}"),
        ({"x": torch.zeros(3, 5, 8193)}, f"x has rows of 8193 elements; 1 to {MAX_WIDTH}"),
        ({"update": torch.zeros(3, 1, 64)}, r"update is \(3, 1, 64\); .* must be \(3, 5, 64\)"),
        ({"gate": torch.zeros(64)}, r"gate is \(64,\); .* it must be \(3, 64\)"),
        ({"shift": torch.zeros(3, 1, 64)}, r"shift is \(3, 1, 64\); .* it must be \(3, 64\)"),
        ({"scale": torch.zeros(2, 64)}, r"scale is \(2, 64\); .* it must be \(3, 64\)"),
        ({"gate": torch.zeros(3, 64).half()}, "gate is torch.float16 .* x torch.float32 on .*conv"),
        ({"scale": torch.zeros(3, 64, device="meta")}, "scale is .* on meta, x .* move them"),
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
    if "gate" not in changes and "update" not in changes:
        with pytest.raises(ValueError, match=message):
            replace(call, update=None, gate=None).run()


@pytest.mark.parametrize("name", ["x", "update", "gate", "shift", "scale"])
def test_gradients_are_refused_where_they_would_be_lost(name):
    call = random_call()
    setattr(call, name, getattr(call, name).clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"gated_residual_layer_norm has no backward.*no_grad"):
        call.run()
    alone = replace(call, update=None, gate=None)
    if name not in ("update", "gate"):
        with pytest.raises(RuntimeError, match=r"modulated_layer_norm has no backward.*_reference"):
            alone.run()
    with torch.no_grad():
        call.check(call.run())
        alone.check(alone.run())


def test_the_cuda_backend_is_refused(gated):
    with backend("cuda"), pytest.raises(RuntimeError, match=ONLY_BACKENDS):
        random_call(gated=gated).run()


def test_float64_is_computed_in_float64_but_not_by_triton(forced, gated):
    call = random_call(dtype=torch.float64, gated=gated)
    if forced == "triton":
        with pytest.raises(RuntimeError, match=r"'triton' is forced, but .*float64; .*bfloat16"):
            call.run()
        return
    call.x = call.x + 10_000
    _, out = call.run()
    stream = call.x if call.update is None else call.x + call.gate[:, None] * call.update
    expected = torch.nn.functional.layer_norm(stream, (64,), eps=1e-6)
    expected = expected * (1 + call.scale[:, None]) + call.shift[:, None]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


# ---- on a GPU only -----------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("width", [256, 768])
def test_many_tokens_on_the_gpu(width):
    call = random_call(300, 82, width, dtype=torch.bfloat16)
    whole = call.run()
    call.check(whole)
    few = [0, 1, 150, 299]
    for actual, expected in zip(call.samples(few).run(), whole, strict=True):
        assert torch.equal(actual, expected[few])


@on_gpu
def test_results_of_more_elements_than_32_bits_count():
    call = random_call(1, 1, 1024, dtype=torch.bfloat16, gated=False)
    _, expected = call.run()
    call.x = call.x.expand(513, 4096, 1024)
    call.shift, call.scale = call.shift.expand(513, -1), call.scale.expand(513, -1)
    _, out = call.run()
    assert torch.equal(out[[0, 511, 512]], expected.expand(3, 4096, -1))


@on_gpu
@pytest.mark.parametrize("width", [256, 768])
def test_a_graph_of_both_ops_replays_with_other_samples(width):
    call = random_call(64, 52, width, dtype=torch.bfloat16)

    def both():
        stream, out = call.run()
        again = replace(call, x=out, update=None, gate=None)
        return [(call, (stream, out)), (again, again.run())]

    taken, graph = captured(both)
    for seed in range(1, 4):
        other = random_call(64, 52, width, dtype=torch.bfloat16, seed=seed)
        for name in ("x", "update", "gate", "shift", "scale"):
            getattr(call, name).copy_(getattr(other, name))
        for _, results in taken:
            for result in results:
                result.fill_(NAN)
        graph.replay()
        for made, results in taken:
            made.check(results)
