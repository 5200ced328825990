"""The noise schedule: how a neuron's weights dissolve into noise, and how they are read back.

    x_t = alpha_t x_0 + sigma_t noise        alpha_t^2 = prod_{s <= t} (1 - beta_s)
    v_t = alpha_t noise - sigma_t x_0        sigma_t^2 = 1 - alpha_t^2

with linear betas (Ho et al. 2020) and v as in Salimans & Ho 2022. Everything about the schedule is
computed in float64 and cast only where it meets a tensor of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor

from meg_kernels.arguments import check_tensors
from meg_kernels.checks import check_fields, integer, number, one_of

Prediction = Literal["x0", "v", "noise"]
"""What a denoiser predicts: the clean weights, the velocity, or the noise."""

Spacing = Literal["trailing", "linspace", "respaced"]
"""How the few timesteps of a sampler are spread over the many of the training."""

Scale = TypeVar("Scale", float, Tensor)


@dataclass(frozen=True)
class NoiseSchedule:
    """The variance-preserving schedule with linear betas, 1000 of them as in the paper.

    Args:
        num_timesteps: timesteps of the training, t = 0 (nearly clean) to num_timesteps - 1; at
            most a million.
        beta_start: variance added by the first step, in (0, beta_end].
        beta_end: variance added by the last step, in [beta_start, 1).

    Raises:
        ValueError: for values out of these ranges.

    >>> NoiseSchedule().timesteps(4)
    [999, 749, 499, 249]
    """

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        check_fields(
            self,
            num_timesteps=integer(1, 1_000_000),
            beta_start=number(above=0, below=1),
            beta_end=number(above=0, below=1),
        )
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end is {self.beta_end}; "
                "they must satisfy 0 < beta_start <= beta_end < 1"
            )

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha_t^2 for every timestep, [num_timesteps] float64 on the CPU."""
        betas = torch.linspace(
            self.beta_start, self.beta_end, self.num_timesteps, dtype=torch.float64, device="cpu"
        )
        return torch.cumprod(1 - betas, dim=0)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noised weights x_t.

        Args:
            x0, noise: [B, dim], float32 or float64.
            t: [B] int64 timesteps.
        """
        alpha, sigma = self._alpha_sigma(t, x0=x0, noise=noise)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity v_t that a v-predicting denoiser is trained on.

        Args:
            x0, noise: [B, dim], float32 or float64.
            t: [B] int64 timesteps.
        """
        alpha, sigma = self._alpha_sigma(t, x0=x0, noise=noise)
        return alpha * noise - sigma * x0

    def to_x0(self, prediction: Tensor, kind: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean weights that a prediction implies.

        Args:
            prediction, x_t: [B, dim], float32 or float64.
            kind: what the prediction is, "x0", "v" or "noise".
            t: [B] int64 timesteps.
        """
        alpha, sigma = self._alpha_sigma(t, prediction=prediction, x_t=x_t)
        from_sample, from_prediction = x0_coefficients(kind, alpha, sigma)
        return from_sample * x_t + from_prediction * prediction

    def variational_bound(
        self, x0: Tensor, x_t: Tensor, t: Tensor, x0_prediction: Tensor, variance: Tensor
    ) -> Tensor:
        """What a learned variance is trained on: the bound's term at t (Nichol & Dhariwal 2021).

        The divergence from the posterior q(x_{t-1} | x_t, x_0) to the network's own step, whose
        log-variance lies between the posterior's and log beta_t.

        Args:
            x0, x_t, x0_prediction: [B, dim]; detach the prediction, so that the bound trains the
                variance alone.
            t: [B] int64 timesteps.
            variance: [B, dim] as the network predicts it, -1 for the posterior's and 1 for beta.

        Returns:
            [B] nats, the mean over the weights.
        """
        self._check(t, {"x0": x0, "x_t": x_t, "x0_prediction": x0_prediction, "variance": variance})
        cumprod = self.alphas_cumprod.to(t.device)
        before = torch.cat([cumprod.new_ones(1), cumprod[:-1]])
        beta = 1 - cumprod / before
        posterior = beta * (1 - before) / (1 - cumprod)
        posterior[0] = posterior[min(1, len(posterior) - 1)]  # the first step has none of its own

        def at(table: Tensor) -> Tensor:
            return table[t].unsqueeze(1).to(x0.dtype)

        mean_of_x0 = at(before.sqrt() * beta / (1 - cumprod))
        error = mean_of_x0 * (x0 - x0_prediction)  # of the mean; the share of x_t cancels
        low, high = at(posterior.log()), at(beta.log())
        log_variance = low + (variance + 1) / 2 * (high - low)
        ratio = low - log_variance
        divergence = (ratio.exp() - ratio - 1 + error.square() * (-log_variance).exp()) / 2
        return divergence.mean(1)

    def timesteps(self, num_steps: int, spacing: Spacing = "trailing") -> list[int]:
        """The timesteps a sampler visits, from the noisiest down.

        Args:
            num_steps: how many, from 1 (2 for "respaced") to num_timesteps (one less for
                "linspace").
            spacing: "trailing" and "linspace" as in Lin et al. 2023, table 2, both starting from
                pure noise and leaving the last jump to end on clean weights; "respaced" takes both
                ends, as the released code does.
        """
        num_steps = integer(1)("num_steps", num_steps)
        fewest, most = _step_limits(spacing, self.num_timesteps)
        if not fewest <= num_steps <= most:
            raise ValueError(
                f"num_steps is {num_steps}; spacing {spacing!r} over {self.num_timesteps} "
                f"timesteps needs {fewest} to {most}"
            )
        last = self.num_timesteps - 1
        if spacing == "trailing":
            stride = self.num_timesteps / num_steps
            return [round(self.num_timesteps - i * stride) - 1 for i in range(num_steps)]
        if spacing == "linspace":
            return [round(i * (last / num_steps)) for i in range(num_steps, 0, -1)]
        # Summed rather than multiplied: at a tie (999/2) the accumulated rounding decides, and the
        # timesteps must be the very ones that released generators were sampled with.
        position, ascending = 0.0, []
        for _ in range(num_steps):
            ascending.append(round(position))
            position += last / (num_steps - 1)
        return ascending[::-1]

    def _alpha_sigma(self, t: Tensor, **samples: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t as [B, 1] columns in the samples' dtype, after checking them all."""
        self._check(t, samples)
        # non_blocking: a copy this small is staged at once, so a training step never waits for it.
        table = self.alphas_cumprod.to(t.device, non_blocking=True)
        alpha_cumprod = table[t].unsqueeze(-1)  # [B, 1]
        dtype = next(iter(samples.values())).dtype
        return alpha_cumprod.sqrt().to(dtype), (1 - alpha_cumprod).sqrt().to(dtype)

    def _check(self, t: Tensor, samples: dict[str, Tensor]) -> None:
        check_tensors(**samples, t=t)
        (first_name, first), *_ = samples.items()
        for name, sample in samples.items():
            if sample.ndim != 2:
                raise ValueError(f"{name} has shape {tuple(sample.shape)}; it must be [B, dim]")
            if sample.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name} is {sample.dtype}; diffusion arithmetic needs float32 or float64: "
                    f"call {name}.float()"
                )
            if sample.shape != first.shape or sample.dtype != first.dtype:
                raise ValueError(
                    f"{name} is {tuple(sample.shape)} {sample.dtype}; "
                    f"it must match {first_name}, {tuple(first.shape)} {first.dtype}"
                )
        if t.dtype != torch.int64:
            raise TypeError(f"t is {t.dtype}; timesteps must be int64: call t.long()")
        if t.shape != first.shape[:1]:
            raise ValueError(
                f"t has shape {tuple(t.shape)}; it must be [{first.shape[0]}], "
                f"one timestep for each row of {first_name}"
            )
        # On an accelerator, looking at the values would stall the training step; indexing with
        # them is checked there by the device itself.
        if (
            t.device.type == "cpu"
            and t.numel()
            and not 0 <= t.min() <= t.max() < self.num_timesteps
        ):
            raise ValueError(
                f"t spans {t.min().item()} to {t.max().item()}; "
                f"timesteps must lie in 0 to {self.num_timesteps - 1}"
            )


def x0_coefficients(
    kind: Prediction, alpha: Scale, sigma: Scale
) -> tuple[Scale | float, Scale | float]:
    """(a, b) of x_0 = a x_t + b prediction."""
    one_of(Prediction)("prediction", kind)
    if kind == "x0":
        return 0.0, 1.0
    if kind == "v":
        return alpha, -sigma
    return 1 / alpha, -sigma / alpha


def _step_limits(spacing: Spacing, num_timesteps: int) -> tuple[int, int]:
    one_of(Spacing)("spacing", spacing)
    if spacing == "respaced":
        # A single respaced step would be t = 0, where the network expects clean weights.
        return 2, num_timesteps
    if spacing == "linspace":
        # num_timesteps points between the two ends would round to the same timestep twice.
        return 1, num_timesteps - 1
    return 1, num_timesteps
