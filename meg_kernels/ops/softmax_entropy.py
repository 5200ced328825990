"""The entropy of a softmax: how uncertain a classifier is about each row of a batch.

    entropy[b] = - sum_c p[b, c] log p[b, c]        p = softmax(logits), in nats

It is 0 where one class has all the probability, and log C where C classes share it evenly. The
paper's familiarity gate edits a query whose entropy is below a threshold. Source: MeG, section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meg_kernels.arguments import check_floating
from meg_kernels.kernels.launching import rows_adjacent
from meg_kernels.kernels.limits import DTYPES, MAX_CLASSES
from meg_kernels.ops import native
from meg_kernels.ops.backend import choose, refuse_gradient

SUPPORTED = {"cuda": DTYPES, "triton": DTYPES, "cpu": None, "reference": None}


def softmax_entropy_reference(logits: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable; float32 [B]."""
    with torch.autocast(logits.device.type, enabled=False):
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        # A class of probability 0 adds 0 times a finite number, and so nothing, as in the limit.
        finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
        return -(log_p.exp() * finite).sum(-1).float()


_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_LIBRARY.define("softmax_entropy(Tensor logits) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_LIBRARY, "softmax_entropy", "CompositeExplicitAutograd")
def _softmax_entropy(logits: Tensor) -> Tensor:
    chosen = choose("softmax_entropy", logits.device, logits.dtype, supported=SUPPORTED)
    if chosen in ("cpu", "reference"):
        return softmax_entropy_reference(logits)
    if chosen == "cuda":
        return native.softmax_entropy(rows_adjacent(logits))
    from meg_kernels.kernels import softmax_entropy as triton_kernel

    return triton_kernel.forward(rows_adjacent(logits))


@torch.library.register_fake("meg_kernels::softmax_entropy", lib=_LIBRARY)
def _(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)


def softmax_entropy(logits: Tensor) -> Tensor:
    """The entropy of each row's softmax, in nats.

    Args:
        logits: [B, C], C from 2 to 4096; float32, float16, bfloat16, or float64 where the backend
            is neither cuda nor triton. Rows may lie at any distance; a stride within them costs a
            copy.

    Returns:
        float32 [B], from 0 to log C, off by at most (C + 16) u (1 + sum p |l| + sum p l^2) with
        l = logit - max and u = 2^-23, for all finite logits; NaN for a row that holds a NaN or
        +infinity, or nothing but -infinity.

    Raises:
        TypeError: logits is no tensor.
        ValueError: logits has another shape or dtype.
        RuntimeError: a gradient is asked for, or the backend that is forced
            (`meg_kernels.ops.backend`) cannot run.

    >>> softmax_entropy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([0.6931, 0.0012])
    """
    check_floating(logits=logits)
    if logits.dim() != 2:
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)}; it must be floating-point [B, C]"
        )
    if not 2 <= logits.shape[1] <= MAX_CLASSES:
        raise ValueError(f"logits has {logits.shape[1]} classes; it must have 2 to {MAX_CLASSES}")
    refuse_gradient("softmax_entropy", logits=logits)
    return torch.ops.meg_kernels.softmax_entropy(logits)
