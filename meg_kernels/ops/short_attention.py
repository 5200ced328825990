"""Attention among few tokens, as a diffusion transformer over a neuron's patches has it.

    out[b, t, h] = sum over s of p[s] v[b, s, h]    p = softmax(q[b, t, h] . k[b, :, h] / sqrt(D))

Every token attends to all tokens of its sample; D is the dimension of a head. The op reads q, k and
v where the qkv Linear left them, side by side in a token's row, and writes the heads side by side,
as the output projection reads them. A neuron's patches are three to some tens of tokens: a head's
scores fit on the chip. Source: Vaswani et al. 2017, equation 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from meg_kernels.arguments import check_floating, check_size
from meg_kernels.kernels.launching import rows_adjacent
from meg_kernels.kernels.limits import DTYPES, MAX_TOKENS
from meg_kernels.ops.backend import choose, refuse_gradient

SUPPORTED = {"triton": DTYPES, "cpu": None, "reference": None}
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 128


def short_attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """The definition in plain PyTorch, differentiable in qkv."""
    with torch.autocast(qkv.device.type, enabled=False):  # it would multiply in bfloat16
        accumulate = torch.promote_types(qkv.dtype, torch.float32)
        query, key, value = _heads(qkv.to(accumulate), num_heads)
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # [B, heads, T, T]
        return _side_by_side(scores.softmax(-1) @ value).to(qkv.dtype)


def _cpu(qkv: Tensor, num_heads: int) -> Tensor:
    with torch.autocast(qkv.device.type, enabled=False):
        query, key, value = _heads(qkv, num_heads)
        return _side_by_side(F.scaled_dot_product_attention(query, key, value))


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Views of query, key and value, each [B, heads, T, head_dim]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _side_by_side(heads: Tensor) -> Tensor:
    """[B, heads, T, head_dim] to [B, T, heads * head_dim]."""
    return heads.transpose(1, 2).flatten(2).contiguous()


_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_LIBRARY.define(
    "short_attention(Tensor qkv, int num_heads) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "short_attention", "CompositeExplicitAutograd")
def _short_attention(qkv: Tensor, num_heads: int) -> Tensor:
    chosen = choose("short_attention", qkv.device, qkv.dtype, supported=SUPPORTED)
    if chosen == "reference" or len(qkv) == 0:
        return short_attention_reference(qkv, num_heads)
    if chosen == "cpu":
        return _cpu(qkv, num_heads)
    from meg_kernels.kernels import short_attention as triton_kernel

    return triton_kernel.forward(rows_adjacent(qkv), num_heads)


@torch.library.register_fake("meg_kernels::short_attention", lib=_LIBRARY)
def _(qkv: Tensor, num_heads: int) -> Tensor:
    batch, tokens, packed = qkv.shape
    return torch.empty(batch, tokens, packed // 3, dtype=qkv.dtype, device=qkv.device)


def short_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Full softmax self-attention over at most 128 tokens, straight from the packed qkv.

    Args:
        qkv: [B, T, 3 * heads * head_dim] as a qkv Linear returns it, all heads' queries, then the
            keys, then the values; T from 1 to 128, head_dim from 8 to 128; float32, float16,
            bfloat16, or float64 where the backend is not triton. Rows may lie at any distance; a
            stride within them costs a copy.
        num_heads: how many heads each of queries, keys and values has; at least 1.

    Returns:
        [B, T, heads * head_dim], contiguous, in the dtype of qkv. With u = 2^-23 and
        e = (head_dim + 8) u max sum |q k| / sqrt(head_dim), it errs by at most sum p |v| (exp(2e) -
        1 + (T + 8) u + 2 eps) and a rounding, while e < 1/4 and T max |v| is within float32's
        range. Beyond it a result may be infinite or NaN.

    Raises:
        TypeError: qkv is no tensor.
        ValueError: qkv or num_heads is out of these ranges.
        RuntimeError: a gradient is asked for, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.

    >>> short_attention(torch.randn(2, 52, 3 * 12 * 64), num_heads=12).shape
    torch.Size([2, 52, 768])
    """
    num_heads = _checked(qkv, num_heads)
    refuse_gradient("short_attention", qkv=qkv)
    return torch.ops.meg_kernels.short_attention(qkv, num_heads)


def _checked(qkv: Tensor, num_heads: int) -> int:
    check_floating(qkv=qkv)
    if qkv.dim() != 3:
        raise ValueError(
            f"qkv is {qkv.dtype} {tuple(qkv.shape)}; it must be [B, T, 3 * heads * head_dim]"
        )
    num_heads = check_size("num_heads", num_heads)
    _, tokens, packed = qkv.shape
    if packed % (3 * num_heads):
        raise ValueError(
            f"qkv has rows of {packed} elements and num_heads is {num_heads}; rows must be "
            "3 * num_heads * head_dim long"
        )
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(
            f"qkv has {tokens} tokens; it must have 1 to {MAX_TOKENS}: for more use "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    head_dim = packed // (3 * num_heads)
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"qkv holds {num_heads} heads of {head_dim}; a head must have {MIN_HEAD_DIM} to "
            f"{MAX_HEAD_DIM} dimensions"
        )
    return num_heads
