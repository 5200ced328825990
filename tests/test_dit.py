"""NeuronDiT against the method's equations, written out one sample at a time in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from meg_kernels.diffusion import (
    DiTConfig,
    NeuronDiT,
    NoiseSchedule,
    SamplerConfig,
    load_released_checkpoint,
    sample,
)
from meg_kernels.diffusion.dit import timestep_sinusoids

SMALL = {"patch_size": 16, "width": 16, "depth": 2}
NEURON_DIM, CONDITION_DIM = 50, 12


def small(neuron_dim=NEURON_DIM, condition_dim=CONDITION_DIM, **fields):
    """A new network."""
    return NeuronDiT(DiTConfig(**SMALL | fields), neuron_dim, condition_dim)


def randomized(dtype=torch.float64, **shape):
    """A network whose every parameter matters: as initialised, its gates are closed."""
    torch.manual_seed(0)
    dit = small(**shape).to(dtype).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return dit


def inputs(dit, batch=3, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, dit.neuron_dim, generator=rng, dtype=dtype)
    condition = torch.randn(batch, dit.condition_dim, generator=rng, dtype=dtype)
    return x_t, torch.linspace(0, 999, batch).long(), condition


def reference_dit(state, config, x_t, t, condition):
    """One sample's channels [C, neuron_dim], from the equations and the parameters' names."""

    def linear(name, x):
        return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(x):
        return x / (1 + torch.exp(-x))

    def gelu(x):
        return x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def attention(name, x):
        width, head_dim = config.width, config.width // config.num_heads
        qkv, heads = linear(f"{name}.qkv", x), []
        for start in range(0, width, head_dim):
            query, key, value = (
                qkv[:, part * width + start : part * width + start + head_dim] for part in range(3)
            )
            scores = torch.exp(torch.einsum("id,jd->ij", query, key) / head_dim**0.5)
            heads.append(scores / scores.sum(-1, keepdim=True) @ value)
        return linear(f"{name}.proj", torch.cat(heads, dim=-1))

    width, patch = config.width, config.patch_size
    num_tokens = math.ceil(len(x_t) / patch)
    padded = torch.zeros(num_tokens * patch, dtype=x_t.dtype)
    padded[: len(x_t)] = x_t
    tokens = linear("inLinear", padded.reshape(num_tokens, patch)) + state["pos_embed"][0]
    if config.token_condition:
        tokens = tokens + linear("token_condition", condition).reshape(num_tokens, width)
    if len(condition) != width:
        condition = linear("condition_projection", condition)

    sinusoids = timestep_sinusoids(t[None])[0].to(x_t)
    time = linear("tEmbedder.mlp.0", sinusoids)
    c = linear("tEmbedder.mlp.2", silu(time)) + condition

    for n in range(config.depth):
        modulation = linear(f"blocks.{n}.adaLN_modulation.1", silu(c)).reshape(6, width)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        modulated = norm(tokens) * (1 + scale_a) + shift_a
        tokens = tokens + gate_a * attention(f"blocks.{n}.attn", modulated)
        modulated = norm(tokens) * (1 + scale_m) + shift_m
        hidden = gelu(linear(f"blocks.{n}.mlp.fc1", modulated))
        tokens = tokens + gate_m * linear(f"blocks.{n}.mlp.fc2", hidden)

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(2, width)
    features = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    channels = [
        linear("outLinear", features[:, channel * width : (channel + 1) * width])
        for channel in range(config.num_channels)
    ]
    return torch.stack([channel.reshape(-1)[: len(x_t)] for channel in channels])


@given(
    neuron_dim=st.integers(1, 40),
    patch_size=st.integers(1, 17),
    heads_and_width=st.sampled_from([(1, 6), (2, 12), (3, 12)]),
    condition_dim=st.sampled_from([1, 5, 12]),
    depth=st.integers(1, 2),
    mlp_ratio=st.sampled_from([4.0, 1.5]),
    token_condition=st.booleans(),
    learns_variance=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_network_is_the_methods_equations(heads_and_width, **fields):
    num_heads, width = heads_and_width
    dit = randomized(width=width, num_heads=num_heads, **fields)
    (x_t, t, condition), config, state = inputs(dit), dit.config, dit.state_dict()
    expected = torch.stack(
        [reference_dit(state, config, *row) for row in zip(x_t, t, condition, strict=True)]
    )
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(dit(x_t, t, condition), expected[:, 0], **close)
    if config.learns_variance:
        prediction, variance = dit.forward_with_variance(x_t, t, condition)
        torch.testing.assert_close(prediction, expected[:, 0], **close)
        torch.testing.assert_close(variance, expected[:, 1], **close)


def test_the_time_embedding_is_cosines_then_sines():
    # A float32 angle of up to 999 is off by up to 3e-5, and its frequency by as much again.
    sinusoids = timestep_sinusoids(torch.tensor([0, 1, 37, 999]))
    for row, t in zip(sinusoids.tolist(), (0, 1, 37, 999), strict=True):
        angles = [t / 10000 ** (i / 128) for i in range(128)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        assert row == pytest.approx(expected, abs=2e-4)


def test_positions_are_sines_then_cosines():
    dit = small()
    assert dit.pos_embed.shape == (1, 4, 16)
    for position in range(4):
        for i in range(8):
            angle = position / 10000 ** (i / 8)
            assert dit.pos_embed[0, position, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert dit.pos_embed[0, position, 8 + i].item() == pytest.approx(
                math.cos(angle), abs=1e-6
            )
    assert "pos_embed" not in dict(dit.named_parameters())


def test_paper_config_has_the_published_shape_and_exactly_the_released_names():
    with torch.device("meta"):
        dit = NeuronDiT(DiTConfig.paper(), neuron_dim=8193, condition_dim=768)
    assert dit.num_tokens == 82
    state = dit.state_dict()
    layers = {
        "inLinear": (768, 100),
        "tEmbedder.mlp.0": (768, 256),
        "tEmbedder.mlp.2": (768, 768),
        "final_layer.linear": (1536, 768),
        "final_layer.adaLN_modulation.1": (1536, 768),
        "outLinear": (100, 768),
    }
    for n in range(12):
        layers |= {
            f"blocks.{n}.attn.qkv": (2304, 768),
            f"blocks.{n}.attn.proj": (768, 768),
            f"blocks.{n}.mlp.fc1": (3072, 768),
            f"blocks.{n}.mlp.fc2": (768, 3072),
            f"blocks.{n}.adaLN_modulation.1": (4608, 768),
        }
    expected = {"pos_embed": (1, 82, 768)}
    expected |= {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_extra_parameters_exist_only_where_an_option_needs_them():
    def names(**fields):
        return set(small(**fields).state_dict())

    plain = names(condition_dim=16, token_condition=False)
    projection = {"condition_projection.weight", "condition_projection.bias"}
    per_token = {"token_condition.weight", "token_condition.bias"}
    assert names(condition_dim=12, token_condition=False) - plain == projection
    assert names(condition_dim=16, token_condition=True) - plain == per_token


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neuron_dim": 0}, "neuron_dim is 0; it must be an integer of at least 1"),
        ({"condition_dim": -1}, "condition_dim is -1; it must be an integer of at least 1"),
        ({"width": True}, "width is True; it must be an integer in 1 to 65536"),
        ({"width": 30, "num_heads": 7}, "width is 30; it must be even and a multiple of .* 7"),
        ({"patch_size": 1.5}, "patch_size is 1.5"),
        ({"depth": 0}, "depth is 0"),
        ({"num_heads": 3}, "width is 16; it must be even and a multiple of num_heads, 3"),
        ({"width": 9, "num_heads": 3}, "width is 9; it must be even"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0; it must be a number, above 0"),
        ({"mlp_ratio": -1}, "mlp_ratio is -1; it must be a number, above 0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf; it must be a number, above 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan; it must be a number, above 0"),
        ({"mlp_ratio": 0.01}, r"mlp_ratio is 0.01; .* mlp_ratio \* 16, of at least 1"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4'; it must be a number"),
        (
            {"condition_dropout": 1.0},
            r"condition_dropout is 1.0; it must be a number, at least 0 and below 1",
        ),
        ({"condition_dropout": float("nan")}, r"condition_dropout is nan; it must be a number"),
        ({"token_condition": None}, "token_condition is None; it must be True or False"),
        ({"learns_variance": 1}, "learns_variance is 1; it must be True or False"),
        ({"prediction": "eps"}, "prediction is 'eps'"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"x_t": torch.zeros(3, 49)}, ValueError, r"x_t has shape \(3, 49\).*\(3, 50\), \[B, neur"),
        ({"x_t": torch.zeros(50)}, ValueError, r"x_t has shape \(50,\)"),
        ({"x_t": torch.zeros(3, 50).long()}, TypeError, "x_t is torch.int64"),
        ({"x_t": torch.zeros(3, 50, device="meta")}, ValueError, "x_t is on meta; .* are on cpu"),
        (
            {"condition": torch.zeros(2, 12)},
            ValueError,
            r"condition has shape \(2, 12\).*\(3, 12\)",
        ),
        ({"condition": torch.zeros(3, 12).int()}, TypeError, "condition is torch.int32"),
        ({"t": torch.zeros(()).long()}, ValueError, r"t has shape \(\); it must be \(3,\)"),
        ({"t": torch.zeros(3)}, TypeError, r"t is torch.float32.*t.long\(\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(replaced, error, message):
    dit = small()
    arguments = dict(zip(("x_t", "t", "condition"), inputs(dit), strict=True)) | replaced
    with pytest.raises(error, match=message):
        dit(**arguments)


def test_a_variance_that_is_not_learned_is_refused():
    dit = small()
    with pytest.raises(ValueError, match="learns_variance=True"):
        dit.forward_with_variance(*inputs(dit))


def test_a_new_network_predicts_the_mean_neuron_and_learns_from_the_first_step():
    torch.manual_seed(0)
    dit = small()
    x_t, t, condition = inputs(dit, batch=8, dtype=torch.float32)
    neurons = torch.randn(8, NEURON_DIM)
    assert torch.equal(dit(x_t, t, condition), torch.zeros_like(neurons))

    optimizer = torch.optim.Adam(dit.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (dit(x_t, t, condition) - neurons).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("learns_variance", [False, True])
def test_gradients_reach_every_parameter(learns_variance):
    dit = randomized(learns_variance=learns_variance)
    forward = dit.forward_with_variance if learns_variance else dit.forward
    outputs = forward(*inputs(dit))
    outputs = torch.cat(outputs) if learns_variance else outputs
    outputs.square().sum().backward()
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_row_alone_is_the_row_in_its_batch():
    dit = randomized(torch.float32)
    x_t, t, condition = inputs(dit, batch=5, dtype=torch.float32)
    together = dit(x_t, t, condition)
    for i in range(5):
        row = slice(i, i + 1)
        alone = dit(x_t[row], t[row], condition[row])
        torch.testing.assert_close(alone, together[row], rtol=1e-4, atol=1e-4)


def test_an_empty_batch_gives_an_empty_batch():
    dit = small(learns_variance=True)
    assert dit(*inputs(dit, batch=0, dtype=torch.float32)).shape == (0, 50)


def test_condition_dropout_acts_in_training_only():
    dit = randomized(condition_dropout=0.5)
    arguments = inputs(dit)
    assert torch.equal(dit(*arguments), dit(*arguments))
    dit.train()
    assert not torch.equal(dit(*arguments), dit(*arguments))


def test_inputs_are_taken_to_the_dtype_of_the_parameters():
    dit = randomized(torch.float32)
    arguments = inputs(dit)
    exact = dit(*arguments)
    assert exact.dtype == torch.float32
    assert torch.equal(exact, dit(arguments[0].float(), arguments[1], arguments[2].float()))
    assert dit.bfloat16()(*arguments).dtype == torch.bfloat16


def test_the_network_compiles_into_one_graph():
    dit = randomized()
    arguments = inputs(dit)
    compiled = torch.compile(dit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), dit(*arguments))


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver++"])
def test_neurons_are_sampled_the_same_alone_and_in_a_batch(solver):
    dit = randomized(torch.float32, learns_variance=True)
    with torch.no_grad():
        dit.outLinear.weight *= 0.1
    condition = inputs(dit, batch=4, dtype=torch.float32)[2]
    arguments = NEURON_DIM, NoiseSchedule(), SamplerConfig(solver, num_steps=4)
    together = sample(dit, condition, *arguments)
    assert torch.equal(together, sample(dit, condition, *arguments))
    alone = torch.cat([sample(dit, row[None], *arguments) for row in condition])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


@pytest.fixture
def released():
    """A network of the released kind, small, and its state dict."""
    dit = randomized(
        torch.float32,
        neuron_dim=250,
        condition_dim=128,
        patch_size=100,
        width=128,
        num_heads=2,
        condition_dropout=0.2,
        token_condition=False,
        prediction="v",
        learns_variance=True,
    )
    return dit, dit.state_dict()


WRAPPINGS = {
    "plain": lambda state: state,
    "wrapped": lambda state: {"model_state_dict": state, "epoch": 3},
    "prefixed": lambda state: {f"module.{name}": value for name, value in state.items()},
    "both": lambda state: {
        "model_state_dict": {f"module.{name}": value for name, value in state.items()}
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", ["", ".pth", ".pt"])
def test_released_checkpoints_load_as_the_network_they_were(released, tmp_path, suffix, wrapping):
    dit, state = released
    source = WRAPPINGS[wrapping](state)
    if suffix:
        torch.save(source, tmp_path / f"dit{suffix}")
        source = tmp_path / f"dit{suffix}"
    loaded = load_released_checkpoint(source, neuron_dim=250)
    assert loaded.config == dit.config
    assert (loaded.neuron_dim, loaded.condition_dim) == (250, 128)
    assert not loaded.training
    arguments = inputs(dit, dtype=torch.float32)
    for mine, theirs in zip(
        loaded.forward_with_variance(*arguments),
        dit.forward_with_variance(*arguments),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_safetensors_load_too(released, tmp_path):
    dit, state = released
    save_file(state, tmp_path / "dit.safetensors")
    loaded = load_released_checkpoint(str(tmp_path / "dit.safetensors"), neuron_dim=250)
    arguments = inputs(dit, dtype=torch.float32)
    assert torch.equal(loaded(*arguments), dit(*arguments))


def test_a_checkpoint_without_variance_is_recognised(released):
    _, state = released
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = state[name][:128]
    assert not load_released_checkpoint(state, neuron_dim=250).learns_variance


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(released, tmp_path, suffix, kept):
    _, state = released
    path = tmp_path / f"dit{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"dit{suffix} .*corrupt"):
        load_released_checkpoint(path, neuron_dim=250)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "dit.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_released_checkpoint(tmp_path / "dit.pth", neuron_dim=250)


def test_a_missing_file_is_reported_as_missing(tmp_path):
    for name in ("dit.pth", "dit.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            load_released_checkpoint(tmp_path / name, neuron_dim=250)


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "dit.pth")
    with pytest.raises(TypeError, match="the checkpoint is a list, not a state dict"):
        load_released_checkpoint(tmp_path / "dit.pth", neuron_dim=250)
    with pytest.raises(ValueError, match=r"not tensors: \['epoch'\]"):
        load_released_checkpoint({"epoch": 3}, neuron_dim=250)


@pytest.mark.parametrize("name", ["pos_embed", "inLinear.weight", "blocks.1.mlp.fc2.bias"])
def test_missing_parameters_are_named(released, name):
    _, state = released
    del state[name]
    with pytest.raises(ValueError, match=rf"missing \['{name}'\]"):
        load_released_checkpoint(state, neuron_dim=250)


def test_unexpected_parameters_are_named(released):
    _, state = released
    state["y_embedder.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected \['y_embedder.weight'\]"):
        load_released_checkpoint(state, neuron_dim=250)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("outLinear.weight", (99, 128), r"outLinear.weight is \(99, 128\), not \(100, 128\)"),
        ("blocks.0.attn.qkv.bias", (3,), r"blocks.0.attn.qkv.bias is \(3,\), not \(384,\)"),
        ("pos_embed", (3, 128), r"misshapen {'pos_embed': \(3, 128\)}"),
        ("inLinear.weight", (96, 100), "width is 96; it must be a multiple of 64"),
    ],
)
def test_misshapen_parameters_are_named(released, name, shape, message):
    _, state = released
    state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        load_released_checkpoint(state, neuron_dim=250)


@pytest.mark.parametrize("neuron_dim", [200, 301])
def test_a_neuron_that_does_not_fill_the_tokens_is_refused(released, neuron_dim):
    _, state = released
    with pytest.raises(ValueError, match=f"neuron_dim is {neuron_dim}; .* hold 201 to 300 weights"):
        load_released_checkpoint(state, neuron_dim)
