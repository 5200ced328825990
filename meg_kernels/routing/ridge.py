"""What facts say, in numbers, and ridge regression on it, in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Squared lengths of the parts of what a fact says, whatever their widths: the query, and what is
# known of its answer: the answer, its first token, and all of its tokens.
QUERY = 384.0
ANSWER = (384.0, 576.0, 576.0)


def scaled(part: Tensor, square: float) -> Tensor:
    """A part [N, features], each row of this squared length."""
    return F.normalize(part.float(), dim=1) * square**0.5


def said(conditions: Tensor, answers: Tensor) -> Tensor:
    """What facts say, [N, features]: their queries' conditions and what is known of their answers.

    Args:
        conditions: [N, dim], of any length.
        answers: [N, A] whose parts have their lengths already, on any device.
    """
    return torch.cat([scaled(conditions, QUERY), answers.to(conditions.device)], 1)


def ridge_regression(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The linear map from x [N, features] to y [N, dim] with an L2 penalty on its weight.

    Returns:
        The means [features] and [dim] of both, and the weight [features, dim] between what is
        left when they are taken out; float32.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    if len(x) <= x.shape[1]:  # of the two equal forms, the one with fewer unknowns
        weight = x.T @ _solved(x @ x.T, y, ridge)
    else:
        weight = _solved(x.T @ x, x.T @ y, ridge)
    return x_mean.float(), y_mean.float(), weight.float()


def _solved(square: Tensor, right: Tensor, ridge: float) -> Tensor:
    square.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(square))
