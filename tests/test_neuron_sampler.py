"""The fast sampler against the plain one, which diffusers' schedulers are the oracle of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meg_kernels.diffusion import (
    DiTConfig,
    Execution,
    NeuronDiT,
    NeuronSampler,
    NoiseSchedule,
    SamplerConfig,
    neuron_sampler,
    sample,
)
from meg_kernels.ops.backend import backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCHEDULE = NoiseSchedule()
EXACT = Execution(precision="float32")
PAPER = {"token_condition": False, "prediction": "v", "learns_variance": True}
SHAPES = {
    "ours": {},
    "like the paper's": PAPER,
    "noise, as wide as its condition": {"prediction": "noise", "condition_dim": 32},
    "one token": {"patch_size": 96},
    "no padding": {"neuron_dim": 80},
}
CONFIGS = {
    "ddim": SamplerConfig("ddim", 3),
    "one step": SamplerConfig("ddim", 1),
    "dpmsolver++": SamplerConfig("dpmsolver++", 4, "linspace", seed=3),
    "ddpm": SamplerConfig("ddpm", 4, "respaced"),
}
FOUR_STEPS = SamplerConfig(num_steps=4)


def assert_close(neurons: Tensor, expected: Tensor) -> None:
    """But for the order of float32 sums of 64 products in each of four steps.

    Against the largest weight: predicting noise, the first steps are 150 times the last, and what
    they round stays.
    """
    atol = 4 * 64 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(neurons, expected, rtol=0, atol=atol)


def network(seed=0, **changes) -> NeuronDiT:
    """A small DiT whose every weight matters."""
    sizes = [changes.pop("neuron_dim", 75), changes.pop("condition_dim", 24)]
    shape = {"patch_size": 16, "width": 32, "depth": 2, "num_heads": 2, **changes}
    dit = NeuronDiT(DiTConfig(**shape), *sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dit.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return dit.eval().to(DEVICE)


def conditions(batch: int, dit: NeuronDiT) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, dit.condition_dim, generator=generator).to(DEVICE)


def plainly(dit: NeuronDiT, condition: Tensor, config: SamplerConfig) -> Tensor:
    return sample(dit, condition, dit.neuron_dim, SCHEDULE, config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_neurons_are_those_of_the_plain_sampler(shape, config):
    dit = network(**shape)
    condition = conditions(3, dit)
    expected = plainly(dit, condition, config)
    neurons = NeuronSampler(dit, SCHEDULE, config, EXACT)(condition)
    assert neurons.dtype == torch.float32 and expected.std() > 0.1
    assert_close(neurons, expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_condition_decides(config):
    dit = network()
    sampler, condition = NeuronSampler(dit, SCHEDULE, config, EXACT), conditions(2, dit)
    one, other = sampler(condition)
    assert (one - other).abs().max() > 0.05
    assert torch.equal(sampler(condition)[1], other)


@pytest.mark.parametrize("held", [1, 3, 5])
def test_conditioning_ahead_of_its_steps_keeps_to_its_budget(monkeypatch, held):
    """A budget of less than a step's still computes one step's, and changes nothing."""
    dit, config = network(), SamplerConfig("ddim", 5)
    condition = conditions(3, dit)
    expected = NeuronSampler(dit, SCHEDULE, config, EXACT)(condition)
    sampler = NeuronSampler(dit, SCHEDULE, config, EXACT)
    width = sampler._modulation.out_features
    monkeypatch.setattr(neuron_sampler, "MODULATION_BYTES", held * 3 * width * 4)
    sizes, product = [], sampler._modulation
    sampler._modulation = lambda x: sizes.append(len(x)) or product(x)
    sampler._modulation.out_features = width
    assert_close(sampler(condition), expected)
    assert sizes == {1: [1] * 5, 3: [3, 2], 5: [5]}[held]
    monkeypatch.setattr(neuron_sampler, "MODULATION_BYTES", 0)
    assert_close(sampler(condition), expected)


def test_many_conditions_go_through_in_chunks(monkeypatch):
    dit, config = network(), SamplerConfig(num_steps=2)
    sampler, condition = NeuronSampler(dit, SCHEDULE, config, EXACT), conditions(7, dit)
    expected = sampler(condition)
    monkeypatch.setattr(neuron_sampler, "CHUNK", 3)
    assert_close(sampler(condition), expected)


def test_no_conditions_give_no_neurons():
    dit = network()
    result = NeuronSampler(dit, SCHEDULE, FOUR_STEPS)(conditions(0, dit))
    assert result.shape == (0, 75) and result.dtype == torch.float32


def test_a_query_gets_the_same_bits_whatever_its_neighbours_are():
    """In a batch of one size; the order of a product's sums may depend on that."""
    dit = network()
    sampler, condition = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, EXACT), conditions(4, dit)
    expected = sampler(condition)
    others = torch.cat([condition[2:3], 100 * condition[:3]])
    assert torch.equal(sampler(others)[0], expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_conditions_may_be_of_any_floating_dtype(dtype):
    dit = network()
    condition = conditions(2, dit).to(dtype)
    expected = plainly(dit, condition.float(), FOUR_STEPS)
    result = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, EXACT)(condition)
    assert_close(result, expected)


def test_bfloat16_rounds_and_the_state_stays_float32():
    dit, config = network(), SamplerConfig(num_steps=4)
    condition = conditions(8, dit)
    expected = plainly(dit, condition, config)
    half = Execution(precision="bfloat16")
    result = NeuronSampler(dit, SCHEDULE, config, half)(condition)
    error = (result - expected).norm() / expected.norm()
    assert result.dtype == torch.float32 and 1e-4 < error < 0.03


def test_automatic_precision_follows_the_device(monkeypatch):
    monkeypatch.setenv("MEG_KERNELS_BFLOAT16", "always")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            "meg_kernels.precision.multiplies_bfloat16", lambda device, native=native: native
        )
        assert NeuronSampler(network(), SCHEDULE, FOUR_STEPS).dtype == dtype


def test_pytorchs_attention_gives_the_same():
    dit = network()
    condition = conditions(3, dit)
    ours = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, EXACT)(condition)
    sdpa = Execution(precision="float32", attention="sdpa")
    theirs = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, sdpa)(condition)
    assert_close(theirs, ours)


def test_more_tokens_than_our_attention_takes():
    dit = network(neuron_dim=16 * 129)
    condition = conditions(2, dit)
    with pytest.raises(ValueError, match="129 tokens; attention='ours' takes up to 128"):
        NeuronSampler(dit, SCHEDULE, FOUR_STEPS, Execution(attention="ours"))
    result = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, EXACT)(condition)
    assert_close(result, plainly(dit, condition, FOUR_STEPS))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there it may run")
def test_flash_attention_says_what_it_needs(monkeypatch):
    wanted = Execution(attention="flash-attn")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install flash-attn"):
        NeuronSampler(network(), SCHEDULE, FOUR_STEPS, wanted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(RuntimeError, match="on a GPU in bfloat16 or float16, not on cpu"):
        NeuronSampler(network(), SCHEDULE, FOUR_STEPS, wanted)


@pytest.mark.parametrize("changes", [{"precision": "int8"}, {"attention": "flash"}])
def test_unknown_choices_are_refused(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}'; it must be one of 'auto'"):
        Execution(**changes)


def test_wrong_conditions_and_a_training_network_are_refused():
    dit = network()
    sampler = NeuronSampler(dit, SCHEDULE, FOUR_STEPS)
    for condition, error, message in (
        (torch.zeros(24), ValueError, r"condition has shape \(24,\); it must be \[B, c\]"),
        (torch.zeros(2, 23), ValueError, r"it must be \[B, 24\] on"),
        (torch.zeros(2, 24, dtype=torch.int64), TypeError, "it must be floating point"),
        (torch.zeros(2, 24, device="meta"), ValueError, "on meta; it must be"),
    ):
        with pytest.raises(error, match=message):
            sampler(condition if condition.device.type == "meta" else condition.to(DEVICE))
    with pytest.raises(ValueError, match=r"training mode: call network.eval\(\)"):
        NeuronSampler(dit.train(), SCHEDULE, FOUR_STEPS)


def change_in_place(dit: nn.Module) -> None:
    with torch.no_grad():
        dit.blocks[1].mlp.fc2.weight[3, 4] += 1


def load_other_weights(dit: nn.Module) -> None:
    dit.load_state_dict(network(seed=1).state_dict())


def replace_a_parameter(dit: nn.Module) -> None:
    dit.outLinear.weight = nn.Parameter(dit.outLinear.weight.clone())


@pytest.mark.parametrize("change", [change_in_place, load_other_weights, replace_a_parameter])
def test_a_changed_network_makes_the_sampler_stale(change):
    dit, config = network(), FOUR_STEPS
    sampler = NeuronSampler(dit, SCHEDULE, config, EXACT)
    assert sampler.is_current(config, EXACT)
    assert not sampler.is_current(SamplerConfig(num_steps=9), EXACT)
    assert not sampler.is_current(config, Execution())
    condition = conditions(2, dit)
    change(dit)
    assert not sampler.is_current(config, EXACT)
    again = NeuronSampler(dit, SCHEDULE, config, EXACT)(condition)
    assert_close(again, plainly(dit, condition, config))


@pytest.mark.usefixtures("faster_interpreter", "poisoned_memory")
@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("shape", ["ours", "like the paper's"])
def test_every_backend_of_its_ops_gives_the_same(name, shape):
    if name == "triton":
        pytest.importorskip("triton")
    dit, config = network(**SHAPES[shape]), SamplerConfig("ddpm", 2, "respaced")
    condition = conditions(2, dit)
    expected = plainly(dit, condition, config)
    with backend(name):
        result = NeuronSampler(dit, SCHEDULE, config, EXACT)(condition)
    assert_close(result, expected)


def test_autocast_around_it_changes_nothing():
    dit = network()
    sampler, condition = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, EXACT), conditions(2, dit)
    expected = sampler(condition)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(sampler(condition), expected)


# ---- only a GPU shows --------------------------------------------------------------------------


def on_gpu(test):
    """A test that needs a GPU."""
    needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
    return pytest.mark.gpu(needs_gpu(test))


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_graph_replays_with_other_conditions(config, precision):
    dit = network()
    execution = Execution(precision=precision)
    recorded = NeuronSampler(dit, SCHEDULE, config, execution)
    eager = NeuronSampler(dit, SCHEDULE, config, Execution(precision=precision, graphs=False))
    for batch in (1, 3, 4, 2, 3, 1):  # buckets 1, 4, 4, 2, 4, 1
        condition = conditions(batch, dit) + batch
        bucket = 1 << (batch - 1).bit_length()
        padded = torch.cat([condition, condition.new_zeros(bucket - batch, condition.shape[1])])
        result = recorded(condition)
        torch.testing.assert_close(result, eager(padded)[:batch], rtol=1e-3, atol=1e-3)
    assert sorted(recorded._graphs._graphs) == [1, 2, 4]


@on_gpu
def test_the_oldest_graph_makes_room(monkeypatch):
    monkeypatch.setattr(neuron_sampler, "GRAPHS", 2)
    dit = network()
    sampler = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, EXACT)
    expected = {batch: sampler(conditions(batch, dit)) for batch in (1, 2, 4)}
    assert sorted(sampler._graphs._graphs) == [2, 4]
    for batch in (4, 1, 2):
        assert torch.equal(sampler(conditions(batch, dit)), expected[batch])


@on_gpu
def test_results_survive_the_next_replay():
    dit = network()
    sampler, condition = NeuronSampler(dit, SCHEDULE, FOUR_STEPS, EXACT), conditions(4, dit)
    first = sampler(condition)
    kept = first.clone()
    sampler(condition + 1)
    assert torch.equal(first, kept)


def test_a_compiled_loop_gives_the_same_neurons():
    dit, config = network(depth=1), SamplerConfig("dpmsolver++", 3)
    sampler = NeuronSampler(dit, SCHEDULE, config, Execution(precision="float32", compile=True))
    condition = conditions(3, dit)
    assert_close(sampler(condition), plainly(dit, condition, config))
