"""Diffusion over a neuron's weights: the schedule, the solvers, the sampler and the network."""

from .dit import DiTConfig, NeuronDiT, load_released_checkpoint
from .neuron_sampler import Execution, NeuronSampler
from .sampler import Denoiser, SamplerConfig, sample
from .schedule import NoiseSchedule, Prediction, Spacing
from .solvers import (
    Solver,
    SolverStep,
    advance,
    coefficient_table,
    estimate_x0,
    noise_std,
    plan_steps,
)

__all__ = [
    "Denoiser",
    "DiTConfig",
    "Execution",
    "NeuronDiT",
    "NeuronSampler",
    "NoiseSchedule",
    "Prediction",
    "SamplerConfig",
    "Solver",
    "SolverStep",
    "Spacing",
    "advance",
    "coefficient_table",
    "estimate_x0",
    "load_released_checkpoint",
    "noise_std",
    "plan_steps",
    "sample",
]
