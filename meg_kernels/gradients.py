"""Gradients where the caller has turned them off: editing is training, whatever is around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
T = TypeVar("T")


def with_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which then computes gradients, and makes tensors that take part in them.

    Inside `torch.no_grad()` and `torch.inference_mode()` it runs as outside.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return run


def check_trainable(module: nn.Module, what: str) -> None:
    """Refuse a module that was made under `torch.inference_mode()`: no gradient passes it.

    Raises:
        ValueError: its weights are inference tensors.
    """
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise ValueError(
            f"{what} was loaded inside torch.inference_mode(), and no gradient passes such "
            "weights; load it outside"
        )
