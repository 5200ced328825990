"""Sampling: from one shared noise vector to the neuron of each query.

    x ~ N(0, 1);   for each timestep t, from the noisiest down:   x <- step(x, denoiser(x, t, z))

One query z has one right neuron, so sampling is a function: the noise comes from a seed and is the
same for every row, and a query gets the same neuron today, tomorrow and in any batch (up to the
rounding of matrix products, whose order of summation may depend on the batch size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from meg_kernels.arguments import FLOATING, check_instance, check_tensors
from meg_kernels.checks import SEED, check_fields, integer, one_of

from .schedule import NoiseSchedule, Prediction, Spacing
from .solvers import Solver, advance, estimate_x0, noise_std, plan_steps


class Denoiser(Protocol):
    """What `sample` asks of a network, an `nn.Module` such as `NeuronDiT`."""

    @property
    def prediction(self) -> Prediction:
        """What a call returns: "x0", "v" or "noise"."""

    @property
    def learns_variance(self) -> bool:
        """Whether `forward_with_variance` exists."""

    @property
    def training(self) -> bool:
        """Whether dropout is active, as `nn.Module.training` says; must be False to sample."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The prediction [B, dim] for x_t [B, dim], t [B] int64 and condition [B, c]."""

    def forward_with_variance(
        self, x_t: Tensor, t: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The prediction that a call returns and the learned variance, each [B, dim].

        Only the "ddpm" solver asks for the variance.
        """


@dataclass(frozen=True)
class SamplerConfig:
    """How neurons are sampled.

    The released code corresponds to `SamplerConfig("ddpm", num_steps=50, spacing="respaced")`,
    apart from its fresh noise for every row and call.

    Args:
        solver: "ddim" (deterministic, first order), "dpmsolver++" (deterministic, second order) or
            "ddpm" (ancestral, with the learned variance where the denoiser has one).
        num_steps: calls of the denoiser, 1 to the schedule's number of timesteps.
        spacing: "trailing", "linspace" or "respaced", see `NoiseSchedule.timesteps`.
        seed: of the shared noise, 0 to 2**63 - 1.

    Raises:
        ValueError: a field is out of range; it is named.
    """

    solver: Solver = "ddim"
    num_steps: int = 1
    spacing: Spacing = "trailing"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            solver=one_of(Solver),
            num_steps=integer(1),
            spacing=one_of(Spacing),
            seed=SEED,
        )


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    condition: Tensor,
    dim: int,
    schedule: NoiseSchedule,
    config: SamplerConfig,
) -> Tensor:
    """Generate one vector of weights for each condition.

    Args:
        denoiser: a network in eval mode, see `Denoiser`.
        condition: [B, c], any floating dtype; the device is that of the result. B may be 0.
        dim: length of the vectors.
        schedule: the schedule that the denoiser was trained with.
        config: solver, steps and seed.

    Returns:
        [B, dim] float32, in the space (centred, scaled) that the denoiser was trained in.

    Raises:
        ValueError: the denoiser is in training mode or its outputs are not [B, dim], condition is
            not [B, c], dim is below 1, or the schedule has fewer timesteps than num_steps.
        TypeError: condition is not floating point, or another argument is not what it must be.
    """
    _check_inputs(denoiser, condition, dim)
    check_sampling(schedule, config)
    timesteps = schedule.timesteps(config.num_steps, config.spacing)
    steps = plan_steps(config.solver, schedule, timesteps, denoiser.prediction)
    with_variance = config.solver == "ddpm" and denoiser.learns_variance

    batch, device = condition.shape[0], condition.device
    # The start, then for DDPM one vector a step; the last step adds none.
    num_draws = len(steps) if config.solver == "ddpm" else 1
    noise = draw_noise(num_draws, dim, config.seed).to(device)  # [num_draws, dim]
    times = torch.tensor(timesteps, device=device)  # [num_steps]

    x_t = noise[0].repeat(batch, 1)  # [B, dim]
    previous_x0 = x_t  # read by no first step
    for i, step in enumerate(steps):
        inputs = x_t, times[i].expand(batch), condition
        if with_variance:
            prediction, variance = denoiser.forward_with_variance(*inputs)
            variance = _as_state("variance", variance, x_t)
        else:
            prediction, variance = denoiser(*inputs), None
        x0 = estimate_x0(step, x_t, _as_state("prediction", prediction, x_t))
        x_t = advance(step.update, x_t, x0, previous_x0)
        if step.update.noise is not None:
            x_t = x_t + noise_std(step.update.noise, variance) * noise[i + 1]
        previous_x0 = x0
    return x_t


def draw_noise(num_draws: int, dim: int, seed: int) -> Tensor:
    """Draw the noise that all rows share: [num_draws, dim] float32 on the CPU."""
    # On the CPU whatever the device: each kind of accelerator draws other numbers from a seed, and
    # a stored seed must mean the same neurons everywhere.
    rng = torch.Generator(device="cpu").manual_seed(seed)
    draws = [
        torch.randn(dim, generator=rng, dtype=torch.float32, device="cpu") for _ in range(num_draws)
    ]
    return torch.stack(draws)


def _as_state(name: str, output: Tensor, x_t: Tensor) -> Tensor:
    # A [B, 1] or [dim] output would broadcast without a word.
    if output.shape != x_t.shape:
        raise ValueError(
            f"the denoiser's {name} has shape {tuple(output.shape)}; it must be {tuple(x_t.shape)}"
        )
    return output.float()


def check_sampling(schedule: NoiseSchedule, config: SamplerConfig) -> None:
    """TypeError unless they are what they are called."""
    check_instance("schedule", schedule, NoiseSchedule, "NoiseSchedule() is the paper's")
    check_instance("config", config, SamplerConfig, "SamplerConfig() has the defaults")


def _check_inputs(denoiser: Denoiser, condition: Tensor, dim: int) -> None:
    asked = ("prediction", "learns_variance", "training")
    if not callable(denoiser) or not all(hasattr(denoiser, name) for name in asked):
        raise TypeError(
            f"denoiser is a {type(denoiser).__name__}; it must be a network such as NeuronDiT, "
            f"with {', '.join(asked)}"
        )
    if denoiser.training:
        raise ValueError(
            "the denoiser is in training mode, where dropout would make neurons random: "
            "call denoiser.eval()"
        )
    check_condition(condition)
    integer(1)("dim", dim)


def check_condition(condition: Tensor) -> None:
    """Raise unless `condition` is floating-point [B, c]."""
    check_tensors(condition=condition)
    if condition.ndim != 2:
        raise ValueError(
            f"condition has shape {tuple(condition.shape)}; it must be [B, c], one row a sample"
        )
    if condition.dtype not in FLOATING:
        raise TypeError(
            f"condition is {condition.dtype}; it must be floating point: use condition.float()"
        )
