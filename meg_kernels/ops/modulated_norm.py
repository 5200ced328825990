"""The normalisations of the DiT: LayerNorm, shifted and scaled by the condition (adaLN-Zero).

    stream[b, t] = x[b, t] + gate[b] * update[b, t]
    out[b, t]    = (r - mean(r)) / sqrt(variance(r) + eps) * (1 + scale[b]) + shift[b]

r is stream[b, t], or x[b, t] itself where nothing is added. Tokens are [B, T, D]; shift, scale and
gate [B, D] hold for all tokens of a sample, and may be columns of one matrix for all blocks.
Everything is computed in float32 (float64 for float64) and rounded once: first the stream, then
what is made of the rounded stream. Source: Peebles & Xie 2023, section 3.2.

Rounding, on every backend, for rows of any size within the dtype's range: with u = 2^-23,
K = (D + 8) u, A the largest |r|, s = sqrt(variance + eps), z the normalised r, and
t = K + 4K A/s + (2K A/s)^2,

    |out - exact| <= E + eps' (|exact| + E) + tiny
    E = |1 + scale| (2K A/s (1 + t) + |z| (t + 8u)) + 4u (|z (1 + scale)| + |shift|)

with eps' and tiny of the dtype, while t <= 1/2: the spread of a row for which t is larger is
drowned by the rounding of its mean. The stream errs by 4u (|x| + |gate update|) and one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meg_kernels.arguments import check_alike, check_floating, check_number, check_tensors
from meg_kernels.kernels.launching import rows_adjacent
from meg_kernels.kernels.limits import DTYPES, MAX_WIDTH
from meg_kernels.ops.backend import choose, refuse_gradient

# In float32 neither 0, which a constant row would be divided by, nor infinity.
MIN_EPS, MAX_EPS = 1e-30, 1e30
SUPPORTED = {"triton": DTYPES, "cpu": None, "reference": None}


def modulated_layer_norm_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> Tensor:
    """The definition in plain PyTorch, differentiable."""
    r, shift, scale = (_accumulated(part) for part in (x, shift[:, None], scale[:, None]))
    return (_normalised(r, eps) * (1 + scale) + shift).to(x.dtype)


def _normalised(r: Tensor, eps: float) -> Tensor:
    """Every row less its mean, over the root of its variance + eps; all within r's dtype."""
    # Rows whose squares would overflow are scaled by a power of two: exactly, and eps with them.
    large, down = (2.0**56, 2.0**-72) if r.dtype == torch.float32 else (2.0**448, 2.0**-576)
    is_large = r.abs().amax(-1, keepdim=True) > large
    one = r.new_ones(())  # beside two plain numbers where() would make float32 of them
    r = r * torch.where(is_large, down, one)
    centred = r - r.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    least = torch.where(is_large, max(eps * down * down, torch.finfo(r.dtype).tiny), eps * one)
    return centred * torch.rsqrt(variance + least)


def gated_residual_layer_norm_reference(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, differentiable."""
    added = _accumulated(gate[:, None]) * _accumulated(update)
    stream = (_accumulated(x) + added).to(x.dtype)
    return stream, modulated_layer_norm_reference(stream, shift, scale, eps)


def _accumulated(part: Tensor) -> Tensor:
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _cpu_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The modulated norm in two passes over x."""
    shift, scale = _accumulated(shift[:, None]), _accumulated(scale[:, None])
    r = _accumulated(x)
    normed, _, rstd = torch.native_layer_norm(r, x.shape[-1:], None, None, eps)
    if rstd.numel() and not float(rstd.min()) > 0:  # the variance of a row has overflowed
        again = ~(rstd[..., 0] > 0)
        normed[again] = _normalised(r[again], eps)
    return torch.addcmul(shift, normed, 1 + scale, out=normed).to(x.dtype)


def _cpu_gated(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    stream = torch.addcmul(x, gate[:, None], update)  # in float32 too, rounded once
    return stream, _cpu_norm(stream, shift, scale, eps)


_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(
    "modulated_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor", tags=_TAGS
)
_LIBRARY.define(
    "gated_residual_layer_norm(Tensor x, Tensor update, Tensor gate, Tensor shift, Tensor scale,"
    " float eps) -> (Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl(_LIBRARY, "modulated_layer_norm", "CompositeExplicitAutograd")
def _modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    chosen = choose("modulated_layer_norm", x.device, x.dtype, supported=SUPPORTED)
    if chosen == "cpu":
        return _cpu_norm(x, shift, scale, eps)
    if chosen == "reference":
        return modulated_layer_norm_reference(x, shift, scale, eps).contiguous()
    from meg_kernels.kernels import modulated_norm as triton_kernel

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, shift, scale = map(rows_adjacent, (x, shift, scale))
    triton_kernel.forward(out, x, shift, scale, eps)
    return out


@torch.library.impl(_LIBRARY, "gated_residual_layer_norm", "CompositeExplicitAutograd")
def _gated_residual_layer_norm(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    chosen = choose("gated_residual_layer_norm", x.device, x.dtype, supported=SUPPORTED)
    if chosen in ("cpu", "reference"):
        compute = _cpu_gated if chosen == "cpu" else gated_residual_layer_norm_reference
        stream, out = compute(x, update, gate, shift, scale, eps)
        return stream.contiguous(), out.contiguous()
    from meg_kernels.kernels import modulated_norm as triton_kernel

    x, update, gate, shift, scale = map(rows_adjacent, (x, update, gate, shift, scale))
    stream, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    triton_kernel.forward(out, x, shift, scale, eps, stream, update, gate)
    return stream, out


@torch.library.register_fake("meg_kernels::modulated_layer_norm", lib=_LIBRARY)
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("meg_kernels::gated_residual_layer_norm", lib=_LIBRARY)
def _(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    stream = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return stream, torch.empty_like(stream)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every token, then scale and shift it as its sample's condition says.

    Args:
        x: the tokens, [B, T, D] of any strides, D from 1 to 8192; float32, float16, bfloat16, or
            float64 where the backend is not triton.
        shift: [B, D] of that dtype; rows may lie at any distance, as columns of a wider matrix do.
        scale: like shift.
        eps: added to the variance, from 1e-30 to 1e30.

    Returns:
        [B, T, D], contiguous, in the dtype of x, finite for all finite rows whose result is. It
        errs by at most (1 + |scale|) (2K A/s (1 + t) + |z| (t + 8u)) + 4u (|z (1 + scale)| +
        |shift|) and a rounding; the module's docstring has the terms, and when that holds.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not fit, or eps is out of range.
        RuntimeError: a gradient is asked for, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.

    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> modulated_layer_norm(x, shift=torch.tensor([[0.5, 0.5]]), scale=torch.tensor([[1.0, 2.0]]))
    tensor([[[-1.5000,  3.5000]]])
    """
    parts = {"x": x, "shift": shift, "scale": scale}
    _check("modulated_layer_norm", parts, eps)
    return torch.ops.meg_kernels.modulated_layer_norm(*parts.values(), float(eps))


def gated_residual_layer_norm(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a gated update to every token, then normalise, scale and shift the sum.

    Args:
        x: the residual stream, [B, T, D] of any strides, D from 1 to 8192; float32, float16,
            bfloat16, or float64 where the backend is not triton.
        update: what is added to x once it is multiplied by the gate, like x.
        gate: [B, D] of that dtype; rows may lie at any distance, as columns of a wider matrix do.
        shift: like gate.
        scale: like gate.
        eps: added to the variance, from 1e-30 to 1e30.

    Returns:
        (stream, out), each [B, T, D], contiguous, in the dtype of x: the sum, rounded, and the
        modulated norm of that.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not fit, or eps is out of range.
        RuntimeError: a gradient is asked for, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.

    >>> ones = torch.ones(1, 2)
    >>> x, update = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 2.0]]])
    >>> stream, out = gated_residual_layer_norm(x, update, gate=ones, shift=ones, scale=ones)
    >>> stream, out
    (tensor([[[1., 5.]]]), tensor([[[-1.0000,  3.0000]]]))
    """
    parts = {"x": x, "update": update, "gate": gate, "shift": shift, "scale": scale}
    _check("gated_residual_layer_norm", parts, eps)
    return torch.ops.meg_kernels.gated_residual_layer_norm(*parts.values(), float(eps))


def _check(op: str, parts: dict[str, Tensor], eps: float) -> None:
    check_tensors(**parts)
    x = parts["x"]
    check_floating(x=x)
    if x.dim() != 3:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be floating-point [B, T, D]")
    batch, _, width = x.shape
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"x has rows of {width} elements; 1 to {MAX_WIDTH} are supported")
    for name, part in parts.items():
        expected = tuple(x.shape) if name in ("x", "update") else (batch, width)
        if tuple(part.shape) != expected:
            raise ValueError(
                f"{name} is {tuple(part.shape)}; beside x {tuple(x.shape)} it must be {expected}"
            )
    check_alike(**parts)
    check_number("eps", eps, low=MIN_EPS, high=MAX_EPS)
    refuse_gradient(op, **parts)
