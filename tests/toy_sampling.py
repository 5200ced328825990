"""A toy denoiser, what the sampler makes of it, and what diffusers' schedulers make of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from meg_kernels.diffusion import NoiseSchedule, sample

DIM, CONDITION_DIM = 24, 6
SCHEDULE = NoiseSchedule()
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
PREDICTION_TYPE = {"v": "v_prediction", "x0": "sample", "noise": "epsilon"}
SOLVERS = ["ddim", "ddpm", "dpmsolver++"]


class ToyDenoiser(nn.Module):
    """A nonlinear function of everything it is given, which remembers the states it saw."""

    def __init__(self, prediction, learns_variance=False):
        super().__init__()
        self.prediction, self.learns_variance = prediction, learns_variance
        generator = torch.Generator().manual_seed(1)
        self.from_state = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5)
        self.from_condition = nn.Parameter(torch.randn(CONDITION_DIM, DIM, generator=generator))
        self.states, self.timesteps = [], []
        self.eval()

    def forward(self, x_t, t, condition):
        self.states.append(x_t.clone())
        self.timesteps.append(t.clone())
        time = torch.cos(t[:, None].to(x_t.dtype) / 300)
        return torch.tanh(
            x_t @ self.from_state.to(x_t) + condition.to(x_t) @ self.from_condition.to(x_t) + time
        )

    def forward_with_variance(self, x_t, t, condition):
        prediction = self(x_t, t, condition)
        return prediction, torch.sin(5 * prediction)


def conditions(batch):
    return torch.randn(batch, CONDITION_DIM, generator=torch.Generator().manual_seed(2))


def sampled_states(denoiser, condition, config):
    """The state before each step, and the result."""
    denoiser.states.clear()
    result = sample(denoiser, condition, DIM, SCHEDULE, config)
    return [*denoiser.states, result]


def oracle_states(scheduler, num_steps, denoiser, condition, start, **step_arguments):
    """The same from a diffusers scheduler, whose float32 table is replaced by the exact one."""
    scheduler.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
    scheduler.set_timesteps(num_steps)
    states = [start]
    for t in scheduler.timesteps:
        output = denoiser(states[-1], t.expand(len(start)), condition)
        step = scheduler.step(output, t, states[-1], **step_arguments)
        states.append(step.prev_sample.float())
    return states


def assert_states_close(actual, expected):
    assert len(actual) == len(expected)
    # float32 on both sides: a few roundings (6e-8) a step, relative to the largest value that the
    # states went through (predicting noise, the toy reaches 50).
    atol = 3e-6 * max(state.abs().max().item() for state in expected)
    for state, oracle_state in zip(actual, expected, strict=True):
        torch.testing.assert_close(state, oracle_state, rtol=0, atol=atol)
