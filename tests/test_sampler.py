"""The sampler, state by state, against diffusers' schedulers and against the DDPM formulas."""

import numpy as np
import pytest
import torch
from toy_sampling import (
    ALPHAS_CUMPROD,
    BETAS,
    CONDITION_DIM,
    DIM,
    PREDICTION_TYPE,
    SCHEDULE,
    SOLVERS,
    ToyDenoiser,
    assert_states_close,
    conditions,
    oracle_states,
    sampled_states,
)

from meg_kernels.diffusion import SamplerConfig, sample


@pytest.mark.parametrize("prediction", ["v", "x0", "noise"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 50])
def test_ddim_follows_diffusers_ddim_state_by_state(num_steps, prediction):
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type=PREDICTION_TYPE[prediction],
        timestep_spacing="trailing",
        clip_sample=False,
    )
    denoiser, condition = ToyDenoiser(prediction), conditions(3)
    states = sampled_states(denoiser, condition, SamplerConfig("ddim", num_steps))
    assert_states_close(states, oracle_states(oracle, num_steps, denoiser, condition, states[0]))


# diffusers' DDIM steps by 1000 // num_steps whatever the spacing, which misses the linspace
# timesteps; its first-order DPM-Solver++ is DDIM and follows the timesteps themselves.
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmsolver++", 2)])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["v", "x0", "noise"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 14, 15, 50])
def test_solvers_follow_diffusers_dpm_solver_state_by_state(
    num_steps, prediction, spacing, solver, order
):
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        prediction_type=PREDICTION_TYPE[prediction],
        timestep_spacing=spacing,
        solver_order=order,
    )
    denoiser, condition = ToyDenoiser(prediction), conditions(3)
    states = sampled_states(denoiser, condition, SamplerConfig(solver, num_steps, spacing))
    assert_states_close(states, oracle_states(oracle, num_steps, denoiser, condition, states[0]))


@pytest.mark.parametrize("learns_variance", [False, True])
@pytest.mark.parametrize("num_steps", [2, 5, 50])
def test_ddpm_follows_its_formulas_state_by_state(num_steps, learns_variance):
    config = SamplerConfig("ddpm", num_steps, "respaced", seed=7)
    denoiser, condition = ToyDenoiser("v", learns_variance), conditions(3)
    states = sampled_states(denoiser, condition, config)

    # In the documented order: the start, then one vector for each step but the last.
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(DIM, generator=generator).double().expand(3, DIM)
    ascending = np.rint(np.arange(num_steps) * 999 / (num_steps - 1)).astype(int)
    cumprod = ALPHAS_CUMPROD[ascending]
    previous = np.append(1.0, cumprod[:-1])
    betas = 1 - cumprod / previous
    expected = [x]
    for i in reversed(range(num_steps)):
        t = torch.full((3,), int(ascending[i]))
        if learns_variance:
            velocity, variance = denoiser.forward_with_variance(x, t, condition)
        else:
            velocity, variance = denoiser(x, t, condition), torch.tensor(-1.0)
        x0 = cumprod[i] ** 0.5 * x - (1 - cumprod[i]) ** 0.5 * velocity.detach()
        # Ho et al. 2020, eq. 7.
        x = (
            previous[i] ** 0.5 * betas[i] / (1 - cumprod[i]) * x0
            + (1 - betas[i]) ** 0.5 * (1 - previous[i]) / (1 - cumprod[i]) * x
        )
        if i > 0:
            posterior = betas[i] * (1 - previous[i]) / (1 - cumprod[i])
            # Nichol & Dhariwal 2021, eq. 15, with v = (variance + 1) / 2.
            v = (variance.detach().double() + 1) / 2
            std = (v * np.log(betas[i]) + (1 - v) * np.log(posterior)).exp().sqrt()
            x = x + std * torch.randn(DIM, generator=generator).double()
        expected.append(x)
    assert_states_close([state.double() for state in states], expected)


@pytest.mark.parametrize(
    ("learns_variance", "variance_type"), [(False, "fixed_small"), (True, "learned_range")]
)
def test_ddpm_follows_diffusers_for_one_row(learns_variance, variance_type):
    diffusers = pytest.importorskip("diffusers")
    config = SamplerConfig("ddpm", 50, "respaced")
    denoiser, condition = ToyDenoiser("v", learns_variance), conditions(1)
    states = sampled_states(denoiser, condition, config)
    oracle = diffusers.DDPMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        variance_type=variance_type,
        clip_sample=False,
    )
    oracle.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
    oracle.set_timesteps(timesteps=SCHEDULE.timesteps(50, "respaced"))
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn(1, DIM, generator=generator)]
    for t in oracle.timesteps:
        arguments = expected[-1], t.expand(1), condition
        if learns_variance:
            output = torch.cat(denoiser.forward_with_variance(*arguments), dim=1)
        else:
            output = denoiser(*arguments)
        step = oracle.step(output, t, expected[-1], generator=generator)
        expected.append(step.prev_sample.float())
    assert_states_close(states, expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_last_step_returns_x0_itself(solver, num_steps):
    class Constant(ToyDenoiser):
        def forward(self, x_t, t, condition):
            return condition.repeat(1, DIM // CONDITION_DIM)

    condition = conditions(4)
    config = SamplerConfig(solver, num_steps)
    result = sample(Constant("x0"), condition, DIM, SCHEDULE, config)
    assert torch.equal(result, condition.repeat(1, DIM // CONDITION_DIM))


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_row_is_asked_about_every_timestep_in_order(solver):
    denoiser = ToyDenoiser("v")
    sample(denoiser, conditions(3), DIM, SCHEDULE, SamplerConfig(solver, 4))
    assert [t.tolist() for t in denoiser.timesteps] == [[t] * 3 for t in (999, 749, 499, 249)]
    assert all(t.dtype == torch.int64 for t in denoiser.timesteps)


@pytest.mark.parametrize("learns_variance", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_query_gets_the_same_neuron_in_any_batch(solver, learns_variance):
    denoiser, condition = ToyDenoiser("v", learns_variance), conditions(5)
    config = SamplerConfig(solver, num_steps=10)
    together = sample(denoiser, condition, DIM, SCHEDULE, config)
    alone = [sample(denoiser, row[None], DIM, SCHEDULE, config) for row in condition]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(together, sample(denoiser, condition, DIM, SCHEDULE, config))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_seed_alone_decides_the_noise(solver, undrawn):
    denoiser, condition = ToyDenoiser("v"), conditions(2)
    first = sample(denoiser, condition, DIM, SCHEDULE, SamplerConfig(solver, 3, seed=0))
    torch.manual_seed(99)
    again = sample(denoiser, condition, DIM, SCHEDULE, SamplerConfig(solver, 3, seed=0))
    other = sample(denoiser, condition, DIM, SCHEDULE, SamplerConfig(solver, 3, seed=1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    assert undrawn(99)


def test_the_state_is_float32_without_autograd_whatever_the_denoiser_computes_in():
    class Double(ToyDenoiser):
        def forward(self, x_t, t, condition):
            assert x_t.dtype == torch.float32
            return super().forward(x_t, t, condition).double()

    result = sample(Double("v"), conditions(2).double(), DIM, SCHEDULE, SamplerConfig(num_steps=4))
    assert result.dtype == torch.float32
    assert not result.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_queries_give_no_neurons(solver):
    result = sample(ToyDenoiser("v"), conditions(0), DIM, SCHEDULE, SamplerConfig(solver, 2))
    assert result.shape == (0, DIM)


def test_only_ddpm_asks_for_the_variance():
    class WithoutVariance(ToyDenoiser):
        def forward_with_variance(self, x_t, t, condition):
            raise AssertionError("asked for the variance")

    denoiser = WithoutVariance("v", learns_variance=True)
    for solver in ("ddim", "dpmsolver++"):
        sample(denoiser, conditions(1), DIM, SCHEDULE, SamplerConfig(solver, 3))
    with pytest.raises(AssertionError, match="asked for the variance"):
        sample(denoiser, conditions(1), DIM, SCHEDULE, SamplerConfig("ddpm", 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "euler"}, "solver is 'euler'; it must be one of 'ddim', 'ddpm', 'dpmsolver"),
        ({"spacing": "leading"}, "spacing is 'leading'; it must be one of 'trailing'"),
        ({"num_steps": 0}, "num_steps is 0; it must be an integer of at least 1"),
        ({"num_steps": 2.0}, "num_steps is 2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**fields)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="num_steps is 1001; spacing 'trailing'"):
        sample(ToyDenoiser("v"), conditions(1), DIM, SCHEDULE, SamplerConfig(num_steps=1001))


@pytest.mark.parametrize(
    ("condition", "dim", "error", "message"),
    [
        (torch.zeros(CONDITION_DIM), DIM, ValueError, r"condition has shape \(6,\)"),
        (torch.zeros(2, CONDITION_DIM).long(), DIM, TypeError, "condition is torch.int64"),
        (torch.zeros(2, CONDITION_DIM), 0, ValueError, "dim is 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(condition, dim, error, message):
    with pytest.raises(error, match=message):
        sample(ToyDenoiser("v"), condition, dim, SCHEDULE, SamplerConfig(num_steps=4))


def test_a_denoiser_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call denoiser.eval\(\)"):
        sample(ToyDenoiser("v").train(), conditions(1), DIM, SCHEDULE, SamplerConfig(num_steps=4))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="prediction is 'eps'"):
        sample(ToyDenoiser("eps"), conditions(1), DIM, SCHEDULE, SamplerConfig(num_steps=4))


@pytest.mark.parametrize("output", ["prediction", "variance"])
def test_outputs_that_would_broadcast_are_refused(output):
    class Narrow(ToyDenoiser):
        def forward_with_variance(self, x_t, t, condition):
            outputs = {"prediction": x_t, "variance": x_t} | {output: x_t[:, :1]}
            return tuple(outputs.values())

    with pytest.raises(ValueError, match=rf"denoiser's {output} has shape \(2, 1\)"):
        sample(Narrow("v", True), conditions(2), DIM, SCHEDULE, SamplerConfig("ddpm"))
