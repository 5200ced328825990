"""The entropy gate: which queries of a batch are edited, and which place each of them takes.

    entropy[b] = - sum_c p[b, c] log p[b, c]        p = softmax(logits)
    edited[b]  = entropy[b] < threshold             never for a NaN

The edited rows are numbered in order: `rows` compacts a batch to them, `index` leads each row to
its neuron among those that are generated, as `dynamic_neuron` takes it. On a GPU this is one
launch, and the host learns nothing of it: nothing waits. Source: MeG, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meg_kernels.kernels import rows_adjacent
from meg_kernels.ops import native
from meg_kernels.ops.backend import choose

MAX_CLASSES = 4096


@dataclass(frozen=True, eq=False)
class GateDecision:
    """What `entropy_gate` found for B rows.

    Args:
        entropy: float32 [B], in nats.
        index: int64 [B]: the row is the how-manieth edited one, from 0; -1 where it is not edited.
        rows: int64 [B]: the numbers of the edited rows in order, then -1.
        count: int64 [1]: how many are edited. Reading it makes the host wait for a GPU.
    """

    entropy: Tensor
    index: Tensor
    rows: Tensor
    count: Tensor


def entropy_gate_reference(logits: Tensor, threshold: float) -> GateDecision:
    """The definition in plain PyTorch."""
    with torch.autocast(logits.device.type, enabled=False):
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        # A class of probability 0 adds nothing: 0 * -inf is 0 here, as in the limit.
        entropy = torch.special.entr(log_p.exp()).sum(-1).float()
    edited = entropy < threshold
    index = torch.where(edited, edited.cumsum(0) - 1, -1)
    # Stable: the edited rows first, in order.
    order = (~edited).to(torch.int8).argsort(stable=True)
    rows = torch.where(torch.arange(len(order), device=order.device) < edited.sum(), order, -1)
    return GateDecision(entropy, index, rows, edited.sum().view(1))


_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_LIBRARY.define(
    "entropy_gate(Tensor logits, float threshold) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "entropy_gate", "CompositeExplicitAutograd")
def _entropy_gate(logits: Tensor, threshold: float) -> tuple[Tensor, ...]:
    chosen = choose("entropy_gate", logits.device, logits.dtype)
    if chosen in ("cpu", "reference"):
        decision = entropy_gate_reference(logits, threshold)
        return decision.entropy, decision.index, decision.rows, decision.count
    logits = rows_adjacent(logits)
    counter = torch.zeros(1, dtype=torch.int32, device=logits.device)
    if chosen == "cuda":
        return native.entropy_gate(logits, threshold, counter)
    from meg_kernels.kernels import entropy_gate as triton_kernel

    return triton_kernel.forward(logits, threshold, counter)


@torch.library.register_fake("meg_kernels::entropy_gate", lib=_LIBRARY)
def _(logits: Tensor, threshold: float) -> tuple[Tensor, ...]:
    rows = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    entropy = torch.empty_like(rows, dtype=torch.float32)
    return entropy, rows, torch.empty_like(rows), rows.new_empty(1)


def entropy_gate(logits: Tensor, threshold: float) -> GateDecision:
    """Decide on every row of a batch whether it is edited.

    Args:
        logits: [B, C] of the familiarity network, float32, float16 or bfloat16, C from 2 to 4096.
        threshold: the paper's epsilon, in nats; a row of lower entropy is edited.

    Raises:
        ValueError: logits is no such tensor.
        RuntimeError: the backend that is forced (`meg_kernels.ops.backend`) cannot run.

    >>> decision = entropy_gate(torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), 0.3)
    >>> decision.index.tolist(), decision.rows.tolist(), decision.count.tolist()
    ([-1, 0, 1], [1, 2, -1], [2])
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)}; it must be floating-point [B, C]"
        )
    if not 2 <= logits.shape[1] <= MAX_CLASSES:
        raise ValueError(f"logits has {logits.shape[1]} classes; 2 to {MAX_CLASSES} are supported")
    return GateDecision(*torch.ops.meg_kernels.entropy_gate(logits, float(threshold)))
