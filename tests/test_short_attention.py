"""Short attention against float64, on every backend.

Triton's kernel runs in its interpreter, or on the GPU where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import (
    BACKENDS,
    DEVICE,
    DTYPES,
    EPSILON,
    INFINITY,
    LAST_DIGIT,
    NAN,
    ONLY_BACKENDS,
    assert_same_bits,
    captured,
    laid_out,
    on_gpu,
    recorded,
    triton_marks,
)
from properties import given, st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from meg_kernels.diffusion.dit import Attention
from meg_kernels.ops.backend import backend
from meg_kernels.ops.short_attention import (
    MAX_HEAD_DIM,
    MAX_TOKENS,
    MIN_HEAD_DIM,
    short_attention,
    short_attention_reference,
)

pytest.importorskip("triton")

from meg_kernels.kernels import short_attention as triton_kernel

pytestmark = triton_marks("bfloat16_products")


# ---- calls and their oracle --------------------------------------------------------------------


def random_qkv(
    batch=2, tokens=5, heads=3, head_dim=16, *, dtype=torch.float32, spread=1.0, seed=0
) -> Tensor:
    """[B, T, 3 * heads * head_dim]; the scores have about `spread` as their standard deviation."""
    generator = torch.Generator().manual_seed(seed + 1000 * batch + 10 * tokens + head_dim)
    qkv = torch.randn(batch, tokens, 3, heads * head_dim, generator=generator)
    qkv[:, :, :2] *= spread**0.5
    return qkv.flatten(2).to(DEVICE, dtype)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in float64, each [B, heads, T, head_dim], cut out one by one."""
    width = qkv.shape[-1] // 3
    head_dim = width // heads
    parts = (
        [
            qkv[:, :, part * width + head * head_dim :][:, :, :head_dim].double()
            for head in range(heads)
        ]
        for part in range(3)
    )
    query, key, value = (torch.stack(part, dim=1) for part in parts)
    return query, key, value


def check(out: Tensor, qkv: Tensor, heads: int) -> None:
    """Compare with float64, within what the roundings on the way may amount to."""
    batch, tokens, packed = qkv.shape
    assert out.shape == (batch, tokens, packed // 3) and out.dtype == qkv.dtype
    assert out.is_contiguous()
    query, key, value = split(qkv, heads)
    head_dim = query.shape[-1]
    scores = query @ key.mT / math.sqrt(head_dim)
    probability = scores.softmax(-1)
    expected = probability @ value
    # An error of e in its score, and as much in the largest, changes a weight by 2e, relatively.
    size = (query.abs() @ key.abs().mT / math.sqrt(head_dim)).amax(-1, keepdim=True)
    relative = 2 * (head_dim + 4) * EPSILON * size + (2 * tokens + 10) * EPSILON
    digit = LAST_DIGIT[qkv.dtype]
    allowed = (2 * relative + digit) * (probability @ value.abs()) + digit * expected.abs()
    smallest = torch.finfo(qkv.dtype).smallest_normal * torch.finfo(qkv.dtype).eps
    allowed += smallest * (1 + value.abs().sum(-2, keepdim=True))  # what vanishes below it
    found = torch.stack(out.double().split(head_dim, dim=-1), dim=1)
    excess = (found - expected).abs() - allowed
    assert not excess.numel() or excess.max() <= 0, excess.max()


# ---- results -----------------------------------------------------------------------------------


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, MAX_TOKENS),
    heads=st.integers(1, 3),
    head_dim=st.integers(MIN_HEAD_DIM, MAX_HEAD_DIM) | st.sampled_from([16, 32, 64, 96]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    layout=st.tuples(*[st.sampled_from([0, 0, 8, 16, 3])] * 3, st.booleans()),
    name=st.sampled_from(["triton", *BACKENDS]),
)
def test_any_call_follows_the_definition(
    batch, tokens, heads, head_dim, dtype, spread, layout, name
):
    qkv = random_qkv(batch, tokens, heads, head_dim, dtype=dtype, spread=spread)
    qkv = laid_out(qkv, *layout)
    before = qkv.clone()
    with backend(name):
        check(short_attention(qkv, heads), qkv, heads)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, heads", [(12, 4), (52, 12), (82, 12)])
def test_the_generators_own_shapes(forced, tokens, heads, dtype):
    qkv = random_qkv(2, tokens, heads, 64, dtype=dtype, spread=3.0)
    check(short_attention(qkv, heads), qkv, heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])
def test_any_number_of_tokens(tokens, dtype):
    qkv = random_qkv(2, tokens, 2, 64, dtype=dtype)
    with backend("triton"):
        check(short_attention(qkv, 2), qkv, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [9, 100])
@pytest.mark.parametrize("head_dim", [8, 9, 32, 40, 63, 65, 72, 96, 127, 128])
def test_heads_of_any_dimension(head_dim, tokens, dtype):
    qkv = random_qkv(2, tokens, 3, head_dim, dtype=dtype)
    with backend("triton"):
        check(short_attention(qkv, 3), qkv, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, head_dim", [(50, 40), (16, 64), (33, 100), (7, 9)])
def test_nothing_is_written_beside_the_result(tokens, head_dim, dtype, monkeypatch):
    # One head of one sample: no other program writes over what it should not have written.
    qkv, count = random_qkv(1, tokens, 1, head_dim, dtype=dtype), tokens * head_dim
    memory = torch.full((count + 2**15,), NAN, dtype=dtype, device=DEVICE)
    inside = slice(2**14, 2**14 + count)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **_: memory[inside].view(shape))
        out = triton_kernel.forward(qkv, 1)
    check(out, qkv, 1)
    memory[inside] = NAN
    assert memory.isnan().all()


@pytest.mark.parametrize("tokens, head_dim", [(20, 64), (20, 72)])
def test_scores_beyond_half_precision_do_not_overflow(forced, tokens, head_dim):
    qkv = random_qkv(1, tokens, 2, head_dim, dtype=torch.float16)
    width = qkv.shape[-1] // 3
    qkv[..., : 2 * width] = 100 + qkv[..., : 2 * width].round()  # products of up to 10^6
    check(short_attention(qkv, 2), qkv, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_choose_one_value(forced, dtype):
    qkv = random_qkv(1, 10, 1, 16, dtype=dtype)
    qkv[0, :, :32] = 0
    qkv[0, :, 0] = 100
    qkv[0, 3, 16] = 100
    out = short_attention(qkv, 1)
    assert torch.equal(out[0], qkv[0, 3, 32:].expand(10, 16))


def test_large_negative_scores_are_as_good_as_others(forced):
    qkv = random_qkv(1, 10, 1, 16)
    qkv[0, :, 0], qkv[0, :, 16] = 100, -100  # the same -2500 for all: padding must not win
    check(short_attention(qkv, 1), qkv, 1)


@pytest.mark.parametrize("bad", [NAN, INFINITY])
@pytest.mark.parametrize("tokens, head_dim", [(20, 64), (40, 12)])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_finite_harms_only_what_it_reaches(forced, part, tokens, head_dim, bad):
    qkv = random_qkv(2, tokens, 3, head_dim)
    clean = short_attention(qkv, 3).view(2, tokens, 3, head_dim)
    packed = qkv.view(2, tokens, 3, 3, head_dim)  # [B, T, part, head, D]
    packed[1, 5, ["query", "key", "value"].index(part), 2, 4] = bad
    out = short_attention(qkv, 3).view(2, tokens, 3, head_dim)
    harmed = torch.zeros_like(out, dtype=torch.bool)
    if part == "query":
        harmed[1, 5, 2] = True
    elif part == "value":
        harmed[1, :, 2, 4] = True
    else:
        harmed[1, :, 2] = True
    assert torch.equal(out[~harmed], clean[~harmed])
    if part != "key" or math.isnan(bad):  # an infinite key attracts some queries and repels others
        assert not out[harmed].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, head_dim", [(12, 64), (70, 64), (12, 72), (12, 11)])
def test_a_sample_gets_the_same_bits_whatever_else_is_in_the_batch(tokens, head_dim, dtype):
    qkv = random_qkv(5, tokens, 2, head_dim, dtype=dtype)
    with backend("triton"):
        whole = short_attention(qkv, 2)
        for samples in ([2], [4, 0, 3], slice(1, 2)):
            assert_same_bits(short_attention(qkv[samples], 2), whole[samples])


def test_an_empty_batch_needs_no_launch(forced):
    qkv = random_qkv(0, 12, 4, 64)
    with recorded(triton_kernel) as launches:
        check(short_attention(qkv, 4), qkv, 4)
    assert not launches


def test_samples_may_share_their_memory(forced):
    qkv = random_qkv(1, 6).expand(3, -1, -1)
    check(short_attention(qkv, 3), qkv, 3)


def test_elements_of_a_row_may_lie_apart(forced):
    qkv = random_qkv()
    qkv = torch.stack([qkv, qkv * 0], dim=-1)[..., 0]
    check(short_attention(qkv, 3), qkv, 3)


@torch.no_grad()
def test_it_is_the_attention_of_the_dit(forced):
    torch.manual_seed(0)
    attention = Attention(32, num_heads=4).to(DEVICE)
    x = torch.randn(3, 7, 32, device=DEVICE)
    found = attention.proj(short_attention(attention.qkv(x), 4))
    torch.testing.assert_close(found, attention(x), rtol=1e-5, atol=1e-6)


def test_autocast_does_not_reach_into_the_op(forced):
    qkv = random_qkv()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = short_attention(qkv, 3)
    check(out, qkv, 3)


def test_the_reference_takes_float64_and_has_gradients():
    qkv = random_qkv(2, 3, 2, 8).double().cpu().requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: short_attention_reference(qkv, 2), qkv)


# ---- launches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, heads, tile", [(12, 4, 16), (52, 12, 64), (82, 12, 128)])
def test_one_program_serves_a_head_where_it_lies(tokens, heads, tile):
    qkv = random_qkv(3, tokens, heads, 64, dtype=torch.bfloat16)
    qkv = laid_out(qkv, 8, 8, 16, tokens_first=True)
    with backend("triton"), recorded(triton_kernel) as launches:
        out = short_attention(qkv, heads)
    check(out, qkv, heads)
    (launch,) = launches
    assert launch.grid == (3 * heads, 1)
    assert launch.addresses == [out.data_ptr(), qkv.data_ptr()]
    assert launch.options["TOKENS"] == launch.options["QUERIES"] == tile
    assert launch.options["ALIGNED"] and not launch.options["CHUNKED"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim, layout, aligned",
    [
        (16, {}, True),
        (16, {"front": 1}, False),
        (16, {"row_gap": 1}, False),
        (16, {"sample_gap": 1}, False),
        (16, {"front": 8, "row_gap": 8, "sample_gap": 8}, True),
        (17, {"row_gap": 8 - 3 * 2 * 17 % 8}, False),  # rows start at 16 bytes, heads do not
    ],
    ids=str,
)
def test_accesses_are_wide_where_every_head_lies_at_16_bytes(head_dim, layout, aligned, dtype):
    qkv = laid_out(random_qkv(2, 5, 2, head_dim, dtype=dtype), **layout)
    with backend("triton"), recorded(triton_kernel) as launches:
        check(short_attention(qkv, 2), qkv, 2)
    assert launches[0].options["ALIGNED"] is aligned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_is_one_of_the_configurations(dtype):
    assert len([*triton_kernel.configurations()]) == 14
    with recorded(triton_kernel, run=False) as launches:
        for tokens in range(1, MAX_TOKENS + 1):
            for head_dim in (8, 9, 64, 72, 128):
                triton_kernel.forward(random_qkv(1, tokens, 1, head_dim, dtype=dtype), 1)
    for launch in launches:
        constants = launch.constants
        assert launch.is_listed_in(triton_kernel)
        _, _, tokens, _, head_dim, *_ = launch.arguments
        assert launch.grid[1] * constants["QUERIES"] >= tokens <= constants["TOKENS"]
        assert constants["CHUNKED"] or head_dim <= constants["COLUMNS"]


@pytest.mark.parametrize("head_dim", [8, 9])
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_beyond_32_bits(far, dim, head_dim):
    qkv = random_qkv(3, 3, 1, head_dim, dtype=torch.float16)
    check(triton_kernel.forward(far(qkv, dim), 1), qkv, 1)


# ---- torch.library and torch.compile -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2, 16), (1, 1, 1, 8), (0, 5, 2, 16)])
def test_opcheck(forced, shape, dtype):
    qkv = laid_out(random_qkv(*shape, dtype=dtype), 1, 3, tokens_first=True)
    torch.library.opcheck(torch.ops.meg_kernels.short_attention.default, (qkv, shape[2]))


def test_the_compiled_op_gives_the_same_bits(forced):
    qkv = random_qkv(dtype=torch.bfloat16)
    compiled = torch.compile(short_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(qkv, 3), short_attention(qkv, 3))


def test_the_compiled_op_is_one_graph_for_all_batches():
    counter = CompileCounter()
    compiled = torch.compile(short_attention, backend=counter, fullgraph=True, dynamic=True)
    for batch in range(2, 6):
        qkv = random_qkv(batch, 4 + batch)
        check(compiled(qkv, 3), qkv, 3)
    assert counter.frame_count == 1


# ---- errors, examples --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "qkv, heads, message",
    [
        (torch.zeros(5, 48), 2, r"qkv is torch.float32 \(5, 48\); .* \[B, T, 3 \* heads"),
        (torch.zeros(2, 5, 48).long(), 2, r"qkv is torch.int64 .* floating-point .*qkv.float\(\)"),
        (torch.zeros(2, 5, 50), 2, r"rows of 50 elements and num_heads is 2; .* 3 \* num_heads"),
        (torch.zeros(2, 5, 48), 0, "num_heads is 0; it must be an integer of at least 1"),
        (torch.zeros(2, 0, 48), 2, "qkv has 0 tokens; it must have 1 to 128"),
        (torch.zeros(2, 129, 48), 2, "129 tokens; .* use torch.*scaled_dot_product_attention"),
        (torch.zeros(2, 5, 42), 2, "2 heads of 7; a head must have 8 to 128 dimensions"),
        (torch.zeros(2, 5, 387), 1, "1 heads of 129; a head must have 8 to 128 dimensions"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(qkv, heads, message):
    with pytest.raises(ValueError, match=message):
        short_attention(qkv.to(DEVICE), heads)


def test_gradients_are_refused_where_they_would_be_lost():
    qkv = random_qkv().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no backward; .*torch.no_grad\(\).*_reference"):
        short_attention(qkv, 3)
    with torch.no_grad():
        check(short_attention(qkv, 3), qkv, 3)


def test_the_cuda_backend_is_refused():
    with backend("cuda"), pytest.raises(RuntimeError, match=ONLY_BACKENDS):
        short_attention(random_qkv(), 3)


def test_float64_is_computed_in_float64_but_not_by_triton(forced):
    qkv = random_qkv(dtype=torch.float64)
    if forced == "triton":
        with pytest.raises(RuntimeError, match=r"'triton' is forced, but .*float64; .*bfloat16"):
            short_attention(qkv, 3)
        return
    query, key, value = split(qkv, 3)
    expected = (query @ key.mT / 4).softmax(-1) @ value
    found = short_attention(qkv, 3).unflatten(-1, (3, -1)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- on a GPU only -----------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, heads", [(12, 4), (52, 12), (82, 12)])
def test_full_batches_on_the_gpu(tokens, heads, dtype):
    qkv = random_qkv(512, tokens, heads, 64, dtype=dtype)
    out = short_attention(qkv, heads)
    check(out, qkv, heads)
    few = [0, 1, 300, 511]
    assert_same_bits(short_attention(qkv[few], heads), out[few])


@on_gpu
@pytest.mark.parametrize("tokens, heads", [(12, 4), (52, 12), (82, 12)])
def test_a_graph_replays_with_other_queries_keys_and_values(tokens, heads):
    qkv = random_qkv(64, tokens, heads, 64, dtype=torch.bfloat16)
    out, graph = captured(lambda: short_attention(qkv, heads))
    for seed in range(1, 4):
        qkv.copy_(random_qkv(64, tokens, heads, 64, seed=seed))
        out.fill_(NAN)
        graph.replay()
        check(out, qkv, heads)
