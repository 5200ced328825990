"""Generators: configurations, scaling there and back, and the bound that trains the variance."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from meg_kernels.diffusion import DiTConfig, Execution, NoiseSchedule, SamplerConfig
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.routing.generators import (
    BankConfig,
    DiTGeneratorConfig,
    Generator,
    GeneratorConfig,
    MLPGeneratorConfig,
    TrainingConfig,
    build_generator,
)

LINEAR = NeuronLayout(6, 5, False, "identity")
BIASED = NeuronLayout(6, 5, True, "gelu_tanh")
CONDITION_DIM = 4
SMALL = DiTConfig(width=16, depth=2, num_heads=2, patch_size=4)
NETWORKS = ("dit", "mlp")
KINDS = (*NETWORKS, "bank")


def random_pairs(layout: NeuronLayout, n: int = 9) -> tuple[torch.Tensor, Neurons]:
    """Unit conditions, and neurons whose parts differ in mean and spread."""
    generator = torch.Generator().manual_seed(7)
    z = torch.nn.functional.normalize(torch.randn(n, CONDITION_DIM, generator=generator), dim=-1)
    flat = torch.randn(n, layout.dim, generator=generator)
    neurons = layout.unpack(flat)
    bias = None if neurons.bias is None else 0.3 * neurons.bias - 2
    return z, dataclasses.replace(
        neurons, key=5 * neurons.key + 1, bias=bias, value=0.02 * neurons.value
    )


def config_of(kind: str, shape: DiTConfig = SMALL, **training) -> GeneratorConfig:
    if kind == "bank":
        return GeneratorConfig.bank()
    if kind == "mlp":
        return GeneratorConfig.mlp(width=24, **training)
    return GeneratorConfig.dit(network=shape, sampler=SamplerConfig(num_steps=1), **training)


def filled(kind: str, layout: NeuronLayout, **changes) -> tuple[Generator, torch.Tensor, Neurons]:
    """A generator that is fitted to nothing but has the scales, and for a bank the neurons."""
    z, neurons = random_pairs(layout)
    generator = build_generator(config_of(kind, **changes), layout, CONDITION_DIM)
    with torch.no_grad():  # a fresh DiT answers zero whatever it is asked
        noise = torch.Generator().manual_seed(8)
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    if kind == "bank":
        generator.store(z, neurons)
    else:
        generator.standardize(z, neurons)
    return generator, z, neurons


INTEGER, NUMBER = "it must be an integer of at least 1", "it must be a number, "


@pytest.mark.parametrize(
    "field, values, message",
    [
        ("batch_size", [0, -1, 1.5, True, None], INTEGER),
        ("warmup_steps", [0, 2.0], INTEGER),
        ("max_steps", [0, 1.0], INTEGER),
        ("check_every", [-1, "50"], INTEGER),
        ("learning_rate", [0.0, -1.0, math.inf, math.nan, "1e-3"], NUMBER + "positive and finite"),
        ("ema_decay", [-0.1, 1.1, math.nan], NUMBER + "at least 0 and at most 1"),
        ("condition_noise", [-0.1, math.inf, math.nan], NUMBER + "at least 0 and finite"),
        ("enough", [0.0, 1.1, math.nan, True], NUMBER + "above 0 and at most 1"),
        ("close", [-0.1, math.nan, None], NUMBER + "at least 0"),
        ("seed", [-1, 2**63, 0.0, None], "it must be an integer in 0 to 2**63 - 1"),
        ("standardize", [None, 1], "it must be True or False"),
        ("reword", [1, "no"], "it must be True or False, or None"),
    ],
)
def test_a_training_out_of_range_is_refused_when_it_is_configured(field, values, message):
    for value in values:
        for make in (
            TrainingConfig,
            GeneratorConfig.dit,
            GeneratorConfig.paper,
            GeneratorConfig.mlp,
        ):
            with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}; {message}")):
                make(**{field: value})


@pytest.mark.parametrize(
    "make, error, message",
    [
        (GeneratorConfig, TypeError, r"says no kind; use GeneratorConfig.dit\(\), .dit_b\(\)"),
        (lambda: DiTConfig(width=30, num_heads=7), ValueError, "width is 30; .* num_heads, 7"),
        (lambda: GeneratorConfig.mlp(width=0), ValueError, "width is 0; it must be an integer"),
        (lambda: GeneratorConfig.mlp(depth=99), TypeError, "a training has no 'depth'; it has sta"),
        (lambda: GeneratorConfig.dit(width=32), TypeError, r"no 'width'.*network=DiTConfig\("),
        (lambda: GeneratorConfig.dit().with_training(widht=3), TypeError, "no 'widht'"),
        (lambda: GeneratorConfig.bank(seed=3), TypeError, "seed"),
        (
            lambda: GeneratorConfig.dit(network={"width": 8}),
            TypeError,
            "it must be an instance of DiTConfig",
        ),
        (
            lambda: GeneratorConfig.paper(network={}),
            TypeError,
            "network is {}; it must be an instance of DiTC",
        ),
        (lambda: GeneratorConfig.dit(sampler=("ddim", 2)), TypeError, "instance of SamplerConfig"),
        (lambda: MLPGeneratorConfig(training={}), TypeError, "instance of TrainingConfig"),
        (
            lambda: GeneratorConfig.dit(sampler=SamplerConfig(num_steps=1001)),
            ValueError,
            "num_steps is 1001; .* needs 1 to 1000",
        ),
        (
            lambda: GeneratorConfig.dit(sampler=SamplerConfig("ddpm", 1, "respaced")),
            ValueError,
            "num_steps is 1; spacing 'respaced' over 1000 timesteps needs 2 to 1000",
        ),
    ],
)
def test_a_generator_that_cannot_be_is_refused_when_it_is_configured(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "config",
    [
        GeneratorConfig.dit(),
        GeneratorConfig.dit(
            network=DiTConfig(width=24, num_heads=3, prediction="v"),
            sampler=SamplerConfig("dpmsolver++", 7, "linspace", seed=4),
            close=math.inf,
            max_steps=7,
        ),
        GeneratorConfig.dit_b(reword=True),
        GeneratorConfig.mlp(width=3, seed=2**63 - 1),
        GeneratorConfig.bank(),
        GeneratorConfig.paper(seed=3),
    ],
)
def test_a_configuration_survives_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    read = GeneratorConfig.from_dict(values)
    assert read == config and type(read) is type(config) and read.kind == values["kind"]
    assert GeneratorConfig.from_dict({"kind": config.kind}).kind == config.kind


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "kind is None; it must be one of dit, mlp, hypernetwork, bank"),
        ({"kind": "gan"}, "kind is 'gan'; it must be one of dit, mlp, hypernetwork, bank"),
        ({"kind": "bank", "training": {}}, "of kind 'bank' has no field 'training'"),
        (
            {"kind": "mlp", "network": {}},
            "kind 'mlp' has no field 'network'; its .* training, with_answers, width",
        ),
        ({"kind": "dit", "network": {"widht": 3}}, "network of a generator .* no field 'widht'"),
        ({"kind": "dit", "sampler": {"steps": 3}}, "sampler of a generator .* no field 'steps'"),
        ({"kind": "mlp", "training": {"lr": 1}}, "training of a generator .* no field 'lr'"),
        ({"kind": "mlp", "training": {"enough": 2}}, "enough is 2; it must be"),
    ],
)
def test_what_was_not_saved_by_a_configuration_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig.from_dict(values)


def test_the_default_generator():
    config = GeneratorConfig.dit()
    assert config == DiTGeneratorConfig() and BankConfig() == GeneratorConfig.bank()
    network = config.network
    assert (network.width, network.depth, network.num_heads) == (512, 2, 8)
    assert (network.patch_size, network.prediction, network.token_condition) == (512, "x0", True)
    assert config.sampler == SamplerConfig("ddim", 1, "trailing", seed=0)
    training = config.training
    assert (training.batch_size, training.learning_rate, training.ema_decay) == (128, 1e-3, 0.98)
    assert (training.warmup_steps, training.condition_noise, training.close) == (20, 0.1, 0.1)
    assert GeneratorConfig.mlp().training == training


def test_the_papers_preset_is_the_published_generator():
    config = GeneratorConfig.paper()
    network = config.network
    assert (network.width, network.depth, network.patch_size) == (768, 12, 100)
    assert network.prediction == "v" and network.learns_variance
    assert not network.token_condition
    sampler = config.sampler
    assert (sampler.solver, sampler.num_steps, sampler.spacing) == ("ddpm", 50, "respaced")
    assert not config.training.standardize and config.training.learning_rate == 1e-4
    assert GeneratorConfig.paper(seed=5) == config.with_training(seed=5)
    ours = GeneratorConfig.dit_b()
    assert ours.network == dataclasses.replace(network, condition_dropout=0.0)
    assert ours.sampler == SamplerConfig("ddim", 2) and ours.training.learning_rate == 3e-4


@pytest.mark.parametrize("snap", [True, False])
def test_other_wordings_are_wanted_by_networks_that_are_asked_about_them(snap):
    assert GeneratorConfig.dit().rewords(snap) is not snap
    assert GeneratorConfig.mlp(reword=True).rewords(snap) is True
    assert GeneratorConfig.paper().rewords(snap) is False
    assert GeneratorConfig.bank().rewords(snap) is False


def test_how_a_dit_runs_is_chosen_on_the_generator():
    generator, z, _ = filled("dit", LINEAR)
    generator.execution = Execution(precision="float32")
    exact = LINEAR.pack(generator.generate(z))
    generator.execution = Execution(precision="bfloat16")
    rounded = LINEAR.pack(generator.generate(z))
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("standardize", [True, False])
def test_scaled_weights_and_what_generate_undoes_are_the_same_scaling(kind, standardize):
    generator, z, neurons = filled(kind, BIASED, standardize=standardize)
    scaled = generator.scaled_weights(neurons)
    generator._generate = lambda conditions: scaled
    restored = generator.generate(z)
    assert restored.layout == BIASED
    torch.testing.assert_close(BIASED.pack(restored), BIASED.pack(neurons), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [LINEAR, BIASED])
def test_a_bank_gives_each_condition_its_own_neuron_back(layout):
    bank, z, neurons = filled("bank", layout)
    order = torch.tensor([4, 0, 8, 4])
    for given in (z[order], 3 * z[order]):
        assert torch.equal(layout.pack(bank.generate(given)), layout.pack(neurons[order]))


def test_a_bank_gives_the_neuron_of_the_nearest_condition():
    bank, z, neurons = filled("bank", LINEAR)
    between = torch.nn.functional.normalize(0.8 * z[2] + 0.2 * z[5], dim=0)
    cosines = [float(torch.dot(between, row)) for row in z]
    nearest = max(range(len(z)), key=cosines.__getitem__)
    made = bank.generate(between.unsqueeze(0))
    torch.testing.assert_close(LINEAR.pack(made), LINEAR.pack(neurons[[nearest]]))


@pytest.mark.parametrize("layout", [LINEAR, BIASED])
def test_key_bias_and_value_have_one_standard_deviation_each(layout):
    generator, z, neurons = filled("mlp", layout)
    spread = layout.unpack(generator.weight_std.unsqueeze(0))
    for name in ("key", "bias", "value"):
        part = getattr(neurons, name)
        if part is None:
            assert getattr(spread, name) is None
            continue
        centred = part.double() - part.double().mean(0)
        expected = math.sqrt(float(centred.square().mean()))
        scales = getattr(spread, name).flatten()
        assert scales.tolist() == pytest.approx([expected] * len(scales), rel=1e-5)
    scaled = generator.scaled_weights(neurons)
    assert scaled.mean(0).abs().max() < 1e-5
    assert scaled.std().item() == pytest.approx(1, abs=0.1)
    conditions = generator.scaled_conditions(z)
    assert conditions.mean(0).abs().max() < 1e-6
    assert conditions.square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)


def test_the_papers_scales_leave_conditions_and_multiply_weights_by_100():
    generator, z, neurons = filled("mlp", LINEAR, standardize=False)
    assert torch.equal(generator.scaled_conditions(z), z)
    torch.testing.assert_close(generator.scaled_weights(neurons), 100 * LINEAR.pack(neurons))


@pytest.mark.parametrize("layout", [LINEAR, BIASED])
@pytest.mark.parametrize("n", [1, 3])
def test_a_single_neuron_sets_scales_that_others_can_join(layout, n):
    generator, z, neurons = filled("mlp", layout)
    generator.standardize(z[[1] * n], neurons[[3] * n])
    assert generator.scaled_weights(neurons[[3]]).abs().max() < 1e-5
    assert generator.scaled_conditions(z[[1]]).abs().max() < 1e-5
    # Neurons and conditions like it are a few units away from it, not millions.
    assert 0.1 < generator.scaled_weights(neurons).abs().max() < 20
    assert 0.1 < generator.scaled_conditions(z).abs().max() < 20
    assert bool(generator.generate(z).is_finite().all())


def test_parts_that_are_all_zero_keep_their_scale():
    generator, z, _ = filled("mlp", BIASED)
    nothing = BIASED.unpack(torch.zeros(3, BIASED.dim))
    generator.standardize(z[:3], nothing)
    assert torch.equal(generator.scaled_weights(nothing), torch.zeros(3, BIASED.dim))


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_gets_the_same_neuron_in_any_batch_and_at_any_time(kind):
    generator, z, _ = filled(kind, BIASED)
    torch.manual_seed(1)
    together = BIASED.pack(generator.generate(z))
    torch.manual_seed(2)
    assert torch.equal(BIASED.pack(generator.generate(z)), together)
    alone = torch.cat([BIASED.pack(generator.generate(row.unsqueeze(0))) for row in z])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    backward = BIASED.pack(generator.generate(z.flip(0)))
    torch.testing.assert_close(backward.flip(0), together, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_generated_for_nobody(kind):
    generator, z, _ = filled(kind, BIASED)
    assert len(generator.generate(z[:0])) == 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_seed_alone_decides_the_initial_weights(kind, undrawn):
    def state(seed):
        config = config_of(kind, seed=seed)
        return build_generator(config, LINEAR, CONDITION_DIM).state_dict()

    torch.manual_seed(1)
    first = state(0)
    assert undrawn(1)
    torch.manual_seed(2)
    again, other = state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 4)])
def test_conditions_of_another_shape_are_refused(kind, shape):
    generator, _, _ = filled(kind, LINEAR)
    with pytest.raises(ValueError, match=r"z is \(.*\); it must be \[B, 4\]"):
        generator.generate(torch.zeros(shape))


def test_neurons_of_another_layout_are_refused():
    generator, z, _ = filled("mlp", LINEAR)
    with pytest.raises(ValueError, match=r"neurons have .*has_bias=True.* was expected"):
        generator.standardize(z, random_pairs(BIASED)[1])


@pytest.mark.parametrize("prediction", ["x0", "v", "noise"])
def test_the_loss_of_a_perfect_denoiser_is_zero(prediction):
    """Whatever is predicted, it is predicted from the noised weights that the loss made."""
    generator, z, neurons = filled(
        "dit", LINEAR, shape=dataclasses.replace(SMALL, prediction=prediction)
    )
    weights, schedule = generator.scaled_weights(neurons), NoiseSchedule()

    class Perfect(torch.nn.Module):
        learns_variance = False

        def forward(self, x_t, t, condition):
            x0 = weights.double()
            alpha_squared = schedule.alphas_cumprod[t].unsqueeze(1)
            alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
            noise = (x_t.double() - alpha * x0) / sigma
            wanted = {"x0": x0, "v": alpha * noise - sigma * x0, "noise": noise}
            return wanted[prediction].float()

    perfect = Perfect()
    perfect.prediction = prediction
    generator.network = perfect
    loss = generator.loss(z, weights, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    wrong = generator.loss(z, weights + 0.1, torch.Generator().manual_seed(0))
    assert wrong.item() > 1e-5


def independent_bound(schedule, x0, x_t, t, prediction, variance):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) by Bayes, from the definition of the betas."""
    betas = [
        schedule.beta_start
        + (schedule.beta_end - schedule.beta_start) * i / (schedule.num_timesteps - 1)
        for i in range(schedule.num_timesteps)
    ]
    bounds = []
    for row, step in enumerate(t.tolist()):
        before = math.prod(1 - beta for beta in betas[:step])
        beta = betas[step]
        # The product of N(x_t; sqrt(1 - beta) x_{t-1}, beta) and N(x_{t-1}; sqrt(before) x_0, ...).
        precision = (1 - beta) / beta + 1 / (1 - before)

        def mean(clean, row=row, beta=beta, before=before, precision=precision):
            noised = x_t[row].double() * math.sqrt(1 - beta) / beta
            return (noised + clean.double() * math.sqrt(before) / (1 - before)) / precision

        share = (variance[row].double() + 1) / 2
        log_variance = share * math.log(beta) - (1 - share) * math.log(precision)
        posterior = Normal(mean(x0[row]), torch.full_like(share, precision**-0.5))
        own = Normal(mean(prediction[row]), (log_variance / 2).exp())
        bounds.append(kl_divergence(posterior, own).mean())
    return torch.stack(bounds)


@pytest.mark.parametrize("num_timesteps", [1000, 20])
def test_the_variational_bound_is_the_divergence_of_the_two_gaussians(num_timesteps):
    schedule = NoiseSchedule(num_timesteps)
    generator = torch.Generator().manual_seed(3)
    t = torch.tensor([1, 2, num_timesteps // 2, num_timesteps - 2, num_timesteps - 1])
    x0, noise, error = torch.randn(3, len(t), 7, generator=generator, dtype=torch.float64)
    variance = 2 * torch.rand(len(t), 7, generator=generator, dtype=torch.float64) - 1
    x_t, prediction = schedule.add_noise(x0, noise, t), x0 + 0.1 * error
    expected = independent_bound(schedule, x0, x_t, t, prediction, variance)
    bound = schedule.variational_bound(x0, x_t, t, prediction, variance)
    assert expected.min() > 0
    torch.testing.assert_close(bound, expected, rtol=1e-8, atol=1e-12)


def test_the_variational_bound_stays_finite_at_the_first_timestep():
    schedule = NoiseSchedule()
    x0, t = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2).long()
    bound = schedule.variational_bound(x0, x0, t, x0, torch.zeros_like(x0))
    assert bound.shape == (2,) and bound.isfinite().all() and bool((bound >= 0).all())


def test_the_bound_trains_the_variance_alone():
    """The prediction's gradient is that of its squared error: nothing comes through the bound."""
    generator, z, neurons = filled(
        "dit", LINEAR, shape=dataclasses.replace(SMALL, learns_variance=True, prediction="x0")
    )
    weights = generator.scaled_weights(neurons)
    forward, noted = generator.network.forward_with_variance, []

    def noting(*args):
        outputs = forward(*args)
        for output in outputs:
            output.retain_grad()
        noted.extend(outputs)
        return outputs

    generator.network.forward_with_variance = noting
    generator.loss(z, weights, torch.Generator().manual_seed(0)).backward()
    prediction, variance = noted
    squared_error = 2 * (prediction - weights) / weights.numel()
    torch.testing.assert_close(prediction.grad, squared_error.detach(), rtol=1e-5, atol=1e-9)
    assert variance.grad.abs().max() > 0
