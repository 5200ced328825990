"""The solver's step against float64, against `sample` and against diffusers, on every backend.

Triton's kernel runs in its interpreter, or on the GPU where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    EPSILON,
    NAN,
    ONLY_BACKENDS,
    captured,
    laid_out,
    on_gpu,
    recorded,
    triton_marks,
)
from properties import given, st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from toy_sampling import (
    BETAS,
    DIM,
    SCHEDULE,
    ToyDenoiser,
    assert_states_close,
    conditions,
    oracle_states,
    sampled_states,
)

from meg_kernels.diffusion import SamplerConfig, coefficient_table, plan_steps
from meg_kernels.ops.backend import backend
from meg_kernels.ops.solver_step import COLUMNS, solver_step, solver_step_reference

pytest.importorskip("triton")

from meg_kernels.kernels import solver_step as triton_kernel

pytestmark = triton_marks()


# ---- calls and their oracle --------------------------------------------------------------------


@dataclass
class Call:
    """Arguments of one call."""

    x_t: Tensor
    prediction: Tensor
    previous_x0: Tensor
    table: Tensor
    step: int
    noise: Tensor | None
    variance: Tensor | None

    def run(self) -> tuple[Tensor, Tensor]:
        """The op's results, on the backend that is forced."""
        return solver_step(**vars(self))

    def launch(self, front: int = 0, gap: int = 0) -> tuple[Tensor, Tensor]:
        """The Triton kernel's results, which have NaN around them that must stay."""
        x_next, x0 = (laid_out(torch.full_like(self.x_t, NAN), front, gap) for _ in range(2))
        triton_kernel.forward(x_next, x0, **vars(self))
        results = x_next.clone(), x0.clone()
        for written in (x_next, x0):
            written.fill_(NAN)
            assert written._base.isnan().all()
        return results

    def rows(self, rows: list[int] | slice) -> Call:
        """The same for these rows only."""
        names = ("x_t", "prediction", "previous_x0", "variance")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v if v is None else v[rows] for k, v in parts.items()})

    def check(self, results: tuple[Tensor, Tensor]) -> None:
        """Compare with float64; what the step must not read counts as 0."""
        a, b, c, d, e, log_posterior, log_beta, adds_noise = self.table[self.step].tolist()
        terms = [a * self.x_t.double(), b * self.prediction.double()]
        x0, size = sum(terms), sum(term.abs() for term in terms)
        terms = [c * self.x_t.double()]
        if e != 0:
            terms.append(e * self.previous_x0.double())
        allowed = 4 * EPSILON * (abs(d) * size + sum(term.abs() for term in terms))
        if adds_noise and self.noise is not None:
            fraction = 0 if self.variance is None else (self.variance.double() + 1) / 2
            log_variance = torch.as_tensor(fraction * log_beta + (1 - fraction) * log_posterior)
            terms.append(torch.exp(log_variance / 2) * self.noise.double())
            # An error of the logarithm is a relative error of its exponential.
            bend = 8 + 4 * (abs(log_posterior) + abs(log_beta))
            allowed += bend * EPSILON * terms[-1].abs()
        x_next = sum(terms) + d * x0
        for result, expected, error in zip(
            results, (x_next, x0), (allowed, 4 * EPSILON * size), strict=True
        ):
            assert result.dtype == torch.float32 and result.is_contiguous()
            assert result.shape == self.x_t.shape
            excess = (result.double() - expected).abs() - error
            assert not excess.numel() or excess.max() <= 0, excess.max()


def random_call(
    batch=3, dim=24, *, dtype=torch.float32, step=1, noise=True, variance=True, seed=0
) -> Call:
    """A call whose table has three random rows, each with every term."""
    generator = torch.Generator().manual_seed(seed + 100 * batch + dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    table = normal(3, len(COLUMNS))
    table[:, 5:] = torch.tensor([[-9.0, -8.5, 1.0], [-3.0, -1.0, 1.0], [0.5, 2.0, 1.0]])
    return Call(
        x_t=normal(batch, dim),
        prediction=normal(batch, dim).to(dtype),
        previous_x0=normal(batch, dim),
        table=table,
        step=step,
        noise=normal(dim) if noise else None,
        variance=normal(batch, dim).tanh().to(dtype) if variance else None,
    )


gaps = st.sampled_from([0, 1, 4, 7])


@st.composite
def calls(draw):
    call = random_call(
        draw(st.integers(0, 4)),
        draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from(DTYPES)),
        step=draw(st.integers(0, 2)),
        noise=draw(st.booleans()),
        variance=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )
    call.table = laid_out(call.table, draw(gaps), draw(gaps))
    if draw(st.booleans()):
        call.table[call.step, 4] = 0
        call.previous_x0.fill_(NAN)
    if draw(st.booleans()):
        call.table[call.step, 5:] = 0
        for part in (call.noise, call.variance):
            if part is not None:
                part.fill_(NAN)
    for name in ("x_t", "prediction", "previous_x0", "variance"):
        if (part := getattr(call, name)) is not None:
            setattr(call, name, laid_out(part, draw(gaps), draw(gaps)))
    return call


# ---- one step ----------------------------------------------------------------------------------


@given(calls(), gaps, gaps)
def test_the_kernel_follows_the_definition_whatever_it_is_given(call, front, gap):
    call.check(call.launch(front, gap))


@pytest.mark.parametrize("noise, variance", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_follows_the_definition(forced, dtype, noise, variance):
    call = random_call(dtype=dtype, noise=noise, variance=variance)
    call.check(call.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 4, 1023, 1024, 1025, 3072, 5121])
def test_rows_of_any_length(dim, dtype):
    call = random_call(3, dim, dtype=dtype)
    call.check(call.launch())


@pytest.mark.parametrize("step", range(3))
def test_each_step_takes_its_own_row_of_the_table_as_it_is_now(forced, step):
    call = random_call(step=step)
    call.check(call.run())
    call.table.copy_(call.table.roll(1, dims=0))
    call.check(call.run())


def test_what_a_step_has_no_use_for_may_hold_anything(forced):
    call = random_call()
    call.table[1, 4] = 0
    call.previous_x0.fill_(NAN)
    call.check(call.run())
    call.noise = None
    call.variance.fill_(NAN)
    call.check(call.run())


@pytest.mark.parametrize("variance", [True, False])
def test_a_step_that_adds_no_noise_ignores_it(forced, variance):
    call = random_call(variance=variance)
    call.table[1, 5:] = 0
    call.noise.fill_(NAN)
    if variance:
        call.variance.fill_(NAN)
    with_noise = call.run()
    call.check(with_noise)
    call.noise = None
    for actual, expected in zip(with_noise, call.run(), strict=True):
        assert torch.equal(actual, expected)


def test_the_previous_x0_counts_where_it_is_asked_for(forced):
    call = random_call(noise=False)
    call.previous_x0[1, 2] = NAN
    x_next, x0 = call.run()
    assert x_next.isnan().nonzero().tolist() == [[1, 2]]
    assert x0.isfinite().all()


def test_the_ends_of_the_variance_are_the_posterior_and_beta(forced):
    call = random_call()
    call.table[1, :5] = 0
    call.noise.fill_(1)
    for variance, log_variance in ((-1.0, -3.0), (1.0, -1.0), (0.0, -2.0)):
        call.variance.fill_(variance)
        x_next, _ = call.run()
        expected = torch.full_like(x_next, log_variance / 2).exp()
        torch.testing.assert_close(x_next, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 21])
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(forced, dim, dtype):
    call = random_call(5, dim, dtype=dtype)
    whole = call.run()
    for rows in ([2], [4, 0, 3], slice(1, 2)):
        for actual, expected in zip(call.rows(rows).run(), whole, strict=True):
            assert torch.equal(actual, expected[rows])


@pytest.mark.parametrize("batch, dim", [(0, 5), (2, 0), (0, 0)])
def test_no_rows_or_no_elements(forced, batch, dim):
    call = random_call(batch, dim)
    with recorded(triton_kernel) as launches:
        for result in call.run():
            assert result.shape == (batch, dim)
    assert launches == []


def test_one_vector_may_be_the_state_of_all_rows(forced):
    call = random_call()
    call.x_t = call.noise.expand(3, -1)
    call.check(call.run())


def test_autocast_does_not_reach_into_the_op(forced):
    call = random_call(dtype=torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        call.check(call.run())


def test_the_reference_takes_float64_and_has_gradients():
    call = random_call(2, 3)
    tensors = (call.x_t, call.prediction, call.previous_x0, call.noise, call.variance)
    inputs = [tensor.double().requires_grad_() for tensor in tensors]

    def run(x_t, prediction, previous_x0, noise, variance):
        table = call.table.double()
        return solver_step_reference(x_t, prediction, previous_x0, table, 1, noise, variance)

    assert torch.autograd.gradcheck(run, inputs)


# ---- whole trajectories ------------------------------------------------------------------------


@torch.no_grad()
def stepped_states(denoiser, condition, config) -> list[Tensor]:
    """The states that `sample` goes through, each made by one call of the op."""
    timesteps = SCHEDULE.timesteps(config.num_steps, config.spacing)
    steps = plan_steps(config.solver, SCHEDULE, timesteps, denoiser.prediction)
    table = coefficient_table(steps).to(DEVICE)
    generator = torch.Generator().manual_seed(config.seed)
    draws = [torch.randn(DIM, generator=generator) for _ in range(config.num_steps + 1)]
    start, *noise = torch.stack(draws).to(DEVICE)
    x_t = start.expand(len(condition), DIM)
    previous_x0 = torch.full_like(x_t, NAN)
    states = [x_t.cpu()]
    for i, timestep in enumerate(timesteps):
        inputs = states[-1], torch.full((len(condition),), timestep), condition
        if denoiser.learns_variance:
            prediction, variance = denoiser.forward_with_variance(*inputs)
            variance = variance.to(DEVICE)
        else:
            prediction, variance = denoiser(*inputs), None
        # Every step gets noise; the table says which have a use for it.
        x_t, previous_x0 = solver_step(
            x_t, prediction.to(DEVICE), previous_x0, table, i, noise[i], variance
        )
        states.append(x_t.cpu())
    return states


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "respaced"])
@pytest.mark.parametrize("prediction", ["v", "x0", "noise"])
@pytest.mark.parametrize(
    "solver, learns_variance",
    [("ddim", False), ("dpmsolver++", False), ("ddpm", False), ("ddpm", True)],
)
def test_samples_follow_the_sampler_state_by_state(
    forced, solver, learns_variance, prediction, spacing
):
    denoiser, condition = ToyDenoiser(prediction, learns_variance), conditions(3)
    for num_steps in (2, 15):
        config = SamplerConfig(solver, num_steps, spacing, seed=3)
        states = stepped_states(denoiser, condition, config)
        assert_states_close(states, sampled_states(denoiser, condition, config))


@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_samples_follow_diffusers_ddim_state_by_state(forced, num_steps):
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    denoiser, condition = ToyDenoiser("v"), conditions(3)
    states = stepped_states(denoiser, condition, SamplerConfig("ddim", num_steps))
    assert_states_close(states, oracle_states(oracle, num_steps, denoiser, condition, states[0]))


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_samples_follow_diffusers_dpm_solver_state_by_state(forced, num_steps, spacing):
    diffusers = pytest.importorskip("diffusers")
    oracle = diffusers.DPMSolverMultistepScheduler(
        **BETAS, prediction_type="v_prediction", timestep_spacing=spacing
    )
    denoiser, condition = ToyDenoiser("v"), conditions(3)
    states = stepped_states(denoiser, condition, SamplerConfig("dpmsolver++", num_steps, spacing))
    assert_states_close(states, oracle_states(oracle, num_steps, denoiser, condition, states[0]))


def test_the_last_step_returns_x0_itself(forced):
    steps = plan_steps("dpmsolver++", SCHEDULE, SCHEDULE.timesteps(2), "x0")
    call = replace(random_call(), table=coefficient_table(steps).to(DEVICE))
    x_next, x0 = call.run()
    assert torch.equal(x0, call.prediction) and torch.equal(x_next, x0)


# ---- launches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_the_networks_output_are_read_as_they_are(dtype):
    call = random_call(4, 24, dtype=dtype)
    channels = torch.full((4, 2, 28), NAN, dtype=dtype, device=DEVICE)  # [B, C, T * patch]
    channels[:, 0, :24], channels[:, 1, :24] = call.prediction, call.variance
    call.prediction, call.variance = channels[..., :24].unbind(1)
    with backend("triton"), recorded(triton_kernel) as launches:
        call.check(call.run())
    (launch,) = launches
    assert {call.prediction.data_ptr(), call.variance.data_ptr()} <= set(launch.addresses)
    assert launch.options["ALIGNED"]


@pytest.mark.parametrize("front, gap", [(1, 0), (2, 0), (0, 2), (0, 1)])
@pytest.mark.parametrize("name", ["x_t", "prediction", "previous_x0", "variance"])
def test_one_misaligned_argument_is_enough_for_narrow_loads(name, front, gap):
    call = random_call(3, 24, dtype=torch.bfloat16)
    setattr(call, name, laid_out(getattr(call, name), front, gap))
    with recorded(triton_kernel) as launches:
        call.check(call.launch())
    assert not launches[0].options["ALIGNED"]


@pytest.mark.parametrize("dim, aligned", [(24, True), (22, False), (21, False)])
def test_rows_are_aligned_if_they_end_at_a_vector(dim, aligned):
    call = random_call(1, dim)
    for name in ("x_t", "prediction", "previous_x0", "variance"):
        setattr(call, name, laid_out(getattr(call, name), 0, -dim % 4))
    with recorded(triton_kernel) as launches:
        call.check(call.launch(0, -dim % 4))
    assert launches[0].options["ALIGNED"] is aligned


def test_noise_that_is_not_aligned_is_read_narrowly():
    call = random_call(2, 24)
    call.noise = laid_out(call.noise[None], 3, 0)[0]
    with recorded(triton_kernel) as launches:
        call.check(call.launch())
    assert not launches[0].options["ALIGNED"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_is_one_of_the_configurations(dtype):
    with recorded(triton_kernel, run=False) as launches:
        for dim in (1, 24, 1500, 5121):
            random_call(2, dim, dtype=dtype).launch()
    assert all(launch.is_listed_in(triton_kernel) for launch in launches)
    assert len(launches) == 4 and len([*triton_kernel.configurations()]) == 2 * len(DTYPES)


def test_more_rows_than_small_grid_dimensions_hold():
    call = random_call(1, 2000)
    many = 70_000
    for name in ("x_t", "prediction", "previous_x0", "variance"):
        setattr(call, name, getattr(call, name).expand(many, -1))
    out = call.x_t  # nothing is written
    with recorded(triton_kernel, run=False) as launches:
        triton_kernel.forward(out, out, **vars(call))
    assert launches[0].grid == (2 * many,)


@pytest.mark.parametrize("name", ["results", "x_t", "prediction", "previous_x0", "variance"])
def test_offsets_beyond_32_bits(far, name):
    call = random_call(3, 8)
    x_next, x0 = torch.full((2, 3, 8), NAN)
    if name == "results":
        x_next, x0 = far(x_next), far(x0)
    else:
        setattr(call, name, far(getattr(call, name)))
    triton_kernel.forward(x_next, x0, **vars(call))
    call.check((x_next.contiguous(), x0.contiguous()))


# ---- torch.library and torch.compile -----------------------------------------------------------


@pytest.mark.parametrize("noise, variance", [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(forced, dtype, noise, variance):
    call = random_call(dtype=dtype, noise=noise, variance=variance)
    call.x_t = laid_out(call.x_t, 1, 3)
    torch.library.opcheck(torch.ops.meg_kernels.solver_step.default, tuple(vars(call).values()))


def test_opcheck_of_an_empty_batch(forced):
    arguments = tuple(vars(random_call(0, 5)).values())
    torch.library.opcheck(torch.ops.meg_kernels.solver_step.default, arguments)


def test_a_compiled_step_gives_the_same_bits(forced):
    call = random_call(dtype=torch.bfloat16)
    compiled = torch.compile(solver_step, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(**vars(call)), call.run(), strict=True):
        assert torch.equal(actual, expected)


def test_a_compiled_step_is_one_graph_for_all_steps():
    counter = CompileCounter()
    compiled = torch.compile(solver_step, backend=counter, fullgraph=True, dynamic=True)
    call = random_call()
    call.table = call.table.repeat(3, 1)
    for step in range(2, 9):  # PyTorch takes 0 and 1 for constants
        call.step = step
        call.check(compiled(**vars(call)))
    assert counter.frame_count == 1


# ---- errors, examples --------------------------------------------------------------------------


def wrong(**changes) -> Call:
    return replace(random_call(), **changes)


@pytest.mark.parametrize(
    "call, message",
    [
        (wrong(x_t=torch.zeros(24)), r"x_t is \(24,\); it must be \[B, dim\]"),
        (wrong(x_t=torch.zeros(3, 24).half()), "x_t is torch.float16 .* it must be torch.float32"),
        (wrong(prediction=torch.zeros(3, 24).double()), r"prediction is .*float64; .*\.float\(\)"),
        (wrong(prediction=torch.zeros(3, 1)), r"prediction is .* it must be .* \(3, 24\)"),
        (wrong(previous_x0=torch.zeros(24)), r"previous_x0 is .* it must be .* \(3, 24\)"),
        (wrong(previous_x0=torch.zeros(3, 24).half()), "previous_x0 is torch.float16"),
        (wrong(table=torch.zeros(3, 7)), r"table is .*\(3, 7\); .* it must be .* \(3, 8\)"),
        (wrong(table=torch.zeros(())), r"table is .*\(\); .* it must be .* \(0, 8\)"),
        (wrong(table=torch.zeros(3, 8).double()), "table is torch.float64"),
        (wrong(noise=torch.zeros(3, 24)), r"noise is .* it must be torch.float32 \(24,\)"),
        (wrong(variance=torch.zeros(3, 24).half()), "variance is torch.float16 .* torch.float32"),
        (wrong(x_t=torch.zeros(24, 3).t()), r"x_t has stride 3 .* call x_t.contiguous\(\)"),
        (wrong(prediction=torch.zeros(3, 48)[:, ::2]), "prediction has stride 2"),
        (wrong(table=torch.zeros(8, 4).t()), "table has stride 4"),
        (wrong(noise=torch.zeros(3, 24, device="meta")[0]), "noise is on meta and x_t on"),
        (wrong(step=3), "step is 3; it must be an integer from 0 to 2"),
        (wrong(step=-1), "step is -1; it must be an integer from 0 to 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    on_device = {
        name: part.to(DEVICE)
        for name, part in vars(call).items()
        if isinstance(part, Tensor) and part.device.type != "meta"
    }
    with pytest.raises(ValueError, match=message):
        solver_step(**{**vars(call), **on_device})


@pytest.mark.parametrize("name", ["x_t", "prediction", "previous_x0", "table", "noise", "variance"])
def test_gradients_are_refused_where_they_would_be_lost(name):
    call = random_call()
    getattr(call, name).requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires a gradient.*torch.no_grad"):
        call.run()
    with torch.no_grad():
        call.check(call.run())


def test_the_cuda_backend_is_refused():
    with backend("cuda"), pytest.raises(RuntimeError, match=ONLY_BACKENDS):
        random_call().run()


# ---- on a GPU only -----------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dim", [1536, 5121])
def test_a_graph_of_three_steps_replays_with_other_samples_and_coefficients(dim):
    call = random_call(64, dim, dtype=torch.bfloat16)

    def steps() -> list[tuple[Call, tuple[Tensor, Tensor]]]:
        done, now = [], call
        for step in range(3):
            now = replace(now, step=step)
            results = now.run()
            done.append((now, results))
            now = replace(now, x_t=results[0], previous_x0=results[1])
        return done

    done, graph = captured(steps)
    for seed in range(1, 4):
        other = random_call(64, dim, dtype=torch.bfloat16, seed=seed)
        for name in ("x_t", "prediction", "previous_x0", "table", "noise", "variance"):
            getattr(call, name).copy_(getattr(other, name))
        for _, results in done:
            for result in results:
                result.fill_(NAN)
        graph.replay()
        for taken, results in done:
            taken.check(results)
