"""What the kernels of Triton and csrc take; the ops refuse everything else at the door."""

from __future__ import annotations

import torch

from meg_kernels import neuron

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of every kernel, in the order of their codes in csrc/types.h."""
ACTIVATIONS = tuple(neuron.ACTIVATIONS)
"""The activations of a neuron. Kernels know them by their positions, the codes of csrc/types.h."""

MAX_CLASSES = 4096
"""Logits in a row of `softmax_entropy`."""
MAX_TOKENS = 128
"""Tokens of a sample in `short_attention`: all their scores fit on the chip."""
MAX_WIDTH = 8192
"""Elements of a row in `modulated_layer_norm` and `gated_residual_layer_norm`."""
