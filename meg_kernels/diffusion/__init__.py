"""Diffusion over a neuron's weights: the schedule, the solvers, the sampler and the network."""

from .dit import DiTConfig, NeuronDiT, load_released_checkpoint
from .sampler import Denoiser, SamplerConfig, sample
from .schedule import NoiseSchedule, Prediction, Spacing
from .solvers import Solver, SolverStep, advance, estimate_x0, noise_std, plan_steps

__all__ = [
    "Denoiser",
    "DiTConfig",
    "NeuronDiT",
    "NoiseSchedule",
    "Prediction",
    "SamplerConfig",
    "Solver",
    "SolverStep",
    "Spacing",
    "advance",
    "estimate_x0",
    "load_released_checkpoint",
    "noise_std",
    "plan_steps",
    "sample",
]
