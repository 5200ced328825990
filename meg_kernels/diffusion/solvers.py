"""Diffusion solvers as tables of coefficients: what a step computes, apart from the network.

A step of any solver here is one linear form for the clean weights and one for the next state:

    x_0    = a x_t + b prediction
    x_next = c x_t + d x_0 + e x_0' + std noise        x_0' is the previous step's x_0

DDIM (Song et al. 2021, eq. 12, eta = 0) and DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) leave
the noise out; DDPM (Ho et al. 2020, eq. 7) has no use for x_0'. Its std is fixed, or predicted by
the network between two bounds (Nichol & Dhariwal 2021, eq. 15). All of a to e are float64 numbers
known before the first step, so that nothing in the loop waits for the device and one kernel can
take the whole step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meg_kernels.checks import one_of

from .schedule import NoiseSchedule, Prediction, x0_coefficients

Solver = Literal["ddim", "ddpm", "dpmsolver++"]
"""How a sampler steps from one timestep to the next."""


@dataclass(frozen=True)
class NoiseLevel:
    """A point on the way from noise to clean weights."""

    alpha_cumprod: float

    @property
    def alpha(self) -> float:
        """What the clean weights are multiplied by."""
        return math.sqrt(self.alpha_cumprod)

    @property
    def variance(self) -> float:
        """sigma^2, which 1 - alpha^2 would only give up to rounding."""
        return 1 - self.alpha_cumprod

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise."""
        return math.sqrt(self.variance)

    @property
    def log_snr(self) -> float:
        """The solvers' lambda, log(alpha / sigma): half the log of the signal-to-noise ratio."""
        return math.log(self.alpha / self.sigma)


CLEAN = NoiseLevel(alpha_cumprod=1.0)


@dataclass(frozen=True)
class VarianceRange:
    """Log-variance of DDPM's noise: that of the posterior, and its upper bound, the step's beta."""

    log_posterior: float
    log_beta: float


@dataclass(frozen=True)
class Update:
    """Coefficients of x_next, named after what each one multiplies; noise None adds none."""

    sample: float
    x0: float
    previous_x0: float = 0.0
    noise: VarianceRange | None = None


@dataclass(frozen=True)
class SolverStep:
    """One step of a sampler: the timestep it asks the network about, and all its coefficients."""

    timestep: int
    x0_from_sample: float
    x0_from_prediction: float
    update: Update


def plan_steps(
    solver: Solver, schedule: NoiseSchedule, timesteps: Sequence[int], prediction: Prediction
) -> list[SolverStep]:
    """The coefficients of every step, in the order in which they are taken.

    Args:
        solver: "ddim", "ddpm" or "dpmsolver++".
        schedule: the schedule that the network was trained with.
        timesteps: strictly descending, from `NoiseSchedule.timesteps`.
        prediction: what the network predicts, "x0", "v" or "noise".

    Raises:
        ValueError: solver or prediction is none of these, or timesteps do not descend.
    """
    one_of(Solver)("solver", solver)
    last = schedule.num_timesteps - 1
    falling = all(a > b for a, b in itertools.pairwise(timesteps))
    if not timesteps or not falling or not 0 <= timesteps[-1] <= timesteps[0] <= last:
        raise ValueError(
            f"timesteps are {list(timesteps)}; they must fall, from at most {last} to at least 0, "
            "as NoiseSchedule.timesteps gives them"
        )
    levels = [NoiseLevel(schedule.alphas_cumprod[t].item()) for t in timesteps] + [CLEAN]
    neighbours = zip([None, *levels], levels, levels[1:], strict=False)
    steps = []
    for timestep, (before, here, after) in zip(timesteps, neighbours, strict=True):
        if solver == "ddim":
            update = ddim_update(here, after)
        elif solver == "ddpm":
            update = ddpm_update(here, after)
        else:
            update = dpm_solver_update(before, here, after)
        steps.append(
            SolverStep(timestep, *x0_coefficients(prediction, here.alpha, here.sigma), update)
        )
    return steps


def coefficient_table(steps: Sequence[SolverStep]) -> Tensor:
    """All coefficients [S, 8] float32, as `meg_kernels.ops.solver_step` reads them on the device.

    A step's row: x0_from_sample, x0_from_prediction; of the update sample, x0, previous_x0,
    log_posterior and log_beta; 1 if it adds noise, else 0.
    """
    rows = []
    for step in steps:
        update, noise = step.update, step.update.noise
        bounds = (0.0, 0.0, 0.0) if noise is None else (noise.log_posterior, noise.log_beta, 1.0)
        weights = (update.sample, update.x0, update.previous_x0)
        rows.append((step.x0_from_sample, step.x0_from_prediction, *weights, *bounds))
    return torch.tensor(rows, dtype=torch.float32)


def ddim_update(here: NoiseLevel, after: NoiseLevel) -> Update:
    """Keep the implied noise, (x_t - alpha x_0) / sigma, and scale it to the next level."""
    noise_kept = after.sigma / here.sigma
    return Update(sample=noise_kept, x0=after.alpha - here.alpha * noise_kept)


def dpm_solver_update(before: NoiseLevel | None, here: NoiseLevel, after: NoiseLevel) -> Update:
    """Extrapolate x_0 linearly in log-SNR through the last two steps (midpoint rule)."""
    # The first step has no predecessor and the last one ends at infinite log-SNR: both are taken
    # at first order, which is DDIM.
    if before is None or after == CLEAN:
        return ddim_update(here, after)
    step = after.log_snr - here.log_snr
    previous_step = here.log_snr - before.log_snr
    first_order = -after.alpha * math.expm1(-step)
    slope = first_order * step / (2 * previous_step)
    return Update(sample=after.sigma / here.sigma, x0=first_order + slope, previous_x0=-slope)


def ddpm_update(here: NoiseLevel, after: NoiseLevel) -> Update:
    """Draw from the posterior q(x_next | x_t, x_0), however many timesteps lie in between."""
    kept = here.alpha_cumprod / after.alpha_cumprod  # 1 - beta
    beta = 1 - kept
    posterior = beta * after.variance / here.variance
    return Update(
        sample=math.sqrt(kept) * after.variance / here.variance,
        x0=after.alpha * beta / here.variance,
        # Clean weights carry no noise: the last step returns x_0 itself.
        noise=None if after == CLEAN else VarianceRange(math.log(posterior), math.log(beta)),
    )


def estimate_x0(step: SolverStep, x_t: Tensor, prediction: Tensor) -> Tensor:
    """x_0 = a x_t + b prediction, all [B, dim]."""
    return step.x0_from_sample * x_t + step.x0_from_prediction * prediction


def advance(update: Update, x_t: Tensor, x0: Tensor, previous_x0: Tensor) -> Tensor:
    """The next state but for DDPM's noise: c x_t + d x_0 + e x_0', all [B, dim]."""
    x_next = update.sample * x_t + update.x0 * x0
    if update.previous_x0 != 0:
        x_next = x_next + update.previous_x0 * previous_x0
    return x_next


def noise_std(bounds: VarianceRange, variance: Tensor | None) -> Tensor | float:
    """DDPM's standard deviation, interpolated between the bounds in log-variance.

    Args:
        bounds: those of the step.
        variance: [B, dim] as the network predicts it, -1 for the posterior's variance and 1 for
            beta; None takes the posterior's.
    """
    if variance is None:
        return math.exp(0.5 * bounds.log_posterior)
    fraction = (variance + 1) / 2
    log_variance = fraction * bounds.log_beta + (1 - fraction) * bounds.log_posterior
    return torch.exp(0.5 * log_variance)
