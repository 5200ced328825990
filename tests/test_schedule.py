"""The noise schedule against diffusers' numbers and against its own algebra."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meg_kernels.diffusion import NoiseSchedule

SCHEDULE = NoiseSchedule()
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@pytest.fixture
def noised():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    return x0, noise, torch.tensor([0, 1, 10, 250, 500, 998, 999])


def test_alphas_cumprod_are_the_float64_product_of_linear_betas():
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert SCHEDULE.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod.numpy(), expected, rtol=1e-13)


def test_noising_and_velocity_match_diffusers(noised):
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DDPMScheduler(**BETAS)
    x0, noise, t = noised
    # diffusers multiplies its 1000 factors in float32: relative error up to 1000 x 6e-8.
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(SCHEDULE.alphas_cumprod.float(), oracle.alphas_cumprod, **close)
    torch.testing.assert_close(
        SCHEDULE.add_noise(x0, noise, t), oracle.add_noise(x0, noise, t), **close
    )
    torch.testing.assert_close(
        SCHEDULE.velocity(x0, noise, t), oracle.get_velocity(x0, noise, t), **close
    )


@pytest.mark.parametrize("kind", ["x0", "v", "noise"])
def test_every_prediction_leads_back_to_x0(noised, kind):
    x0, noise, t = noised
    x_t = SCHEDULE.add_noise(x0, noise, t)
    prediction = {"x0": x0, "v": SCHEDULE.velocity(x0, noise, t), "noise": noise}[kind]
    # Dividing by alpha (t = 999) magnifies float64's rounding about 150 times.
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(SCHEDULE.to_x0(prediction, kind, x_t, t), x0, **close)


def test_float32_weights_stay_float32(noised):
    x0, noise, t = noised
    x_t = SCHEDULE.add_noise(x0.float(), noise.float(), t)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t.double(), SCHEDULE.add_noise(x0, noise, t), rtol=0, atol=1e-6)


def test_an_empty_batch_is_noised_to_an_empty_batch():
    empty, t = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    assert SCHEDULE.add_noise(empty, empty, t).shape == (0, 5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 10, 15, 49, 50, 333, 999])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_timesteps_match_diffusers(num_steps, spacing):
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing=spacing)
    oracle.set_timesteps(num_steps)
    assert SCHEDULE.timesteps(num_steps, spacing) == oracle.timesteps.tolist()


def test_respaced_timesteps_are_the_rounded_even_strides():
    # 50 of 1000 at stride 999 / 49 = 20.3878, both ends included.
    fifty = SCHEDULE.timesteps(50, "respaced")
    assert fifty[:4] == [999, 979, 958, 938]
    assert fifty[-4:] == [61, 41, 20, 0]
    assert fifty == np.rint(np.arange(49, -1, -1) * 999 / 49).astype(int).tolist()
    assert SCHEDULE.timesteps(3, "respaced") == [999, 500, 0]
    assert SCHEDULE.timesteps(1000, "respaced") == list(range(999, -1, -1))


@given(
    num_timesteps=st.integers(3, 1200),
    fraction=st.floats(0, 1),
    spacing=st.sampled_from(["trailing", "linspace", "respaced"]),
)
def test_timesteps_descend_strictly_from_the_noisiest(num_timesteps, fraction, spacing):
    num_steps = 2 + round(fraction * (num_timesteps - 3))
    timesteps = NoiseSchedule(num_timesteps).timesteps(num_steps, spacing)
    assert len(timesteps) == num_steps
    assert timesteps[0] == num_timesteps - 1
    assert timesteps[-1] >= 0
    assert all(later < earlier for earlier, later in pairwise(timesteps))


@pytest.mark.parametrize(
    ("num_steps", "spacing"),
    [(1001, "trailing"), (1000, "linspace"), (1, "respaced"), (1001, "respaced")],
)
def test_impossible_step_counts_are_refused(num_steps, spacing):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}; spacing '{spacing}'"):
        SCHEDULE.timesteps(num_steps, spacing)


def test_unknown_spacing_and_prediction_are_refused(noised):
    x0, _, t = noised
    with pytest.raises(ValueError, match="spacing is 'even'; it must be one of 'trailing'"):
        SCHEDULE.timesteps(10, "even")
    with pytest.raises(ValueError, match="prediction is 'eps'; it must be one of 'x0'"):
        SCHEDULE.to_x0(x0, "eps", x0, t)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_timesteps": 0}, "num_timesteps is 0"),
        ({"beta_start": 0.0}, "beta_start is 0.0"),
        ({"beta_start": 0.1}, "beta_end is 0.02"),
        ({"beta_end": 1.0}, "beta_end is 1.0"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**fields)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"x0": torch.zeros(7)}, ValueError, r"x0 has shape \(7,\); it must be \[B, dim\]"),
        ({"x0": torch.zeros(7, 5).bfloat16()}, TypeError, r"x0 is torch.bfloat16.*x0.float\(\)"),
        ({"noise": torch.zeros(7, 4)}, ValueError, r"noise is \(7, 4\).*must match x0, \(7, 5\)"),
        ({"noise": torch.zeros(7, 5)}, ValueError, "noise is .*float32; it must match x0"),
        ({"t": torch.zeros(7)}, TypeError, r"t is torch.float32.*t.long\(\)"),
        ({"t": torch.zeros(6).long()}, ValueError, r"t has shape \(6,\); it must be \[7\]"),
        ({"t": torch.full((7,), 1000)}, ValueError, "t spans 1000 to 1000.*0 to 999"),
        ({"t": torch.full((7,), -1)}, ValueError, "t spans -1 to -1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(noised, replaced, error, message):
    arguments = dict(zip(("x0", "noise", "t"), noised, strict=True)) | replaced
    for noise_or_velocity in (SCHEDULE.add_noise, SCHEDULE.velocity):
        with pytest.raises(error, match=message):
            noise_or_velocity(**arguments)


def test_the_conversion_refuses_a_prediction_of_another_shape(noised):
    x0, _, t = noised
    with pytest.raises(ValueError, match=r"x_t is .* it must match prediction"):
        SCHEDULE.to_x0(x0, "v", x0[:, :4], t)
