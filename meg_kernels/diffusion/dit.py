"""The weight generator: a diffusion transformer (DiT, Peebles & Xie 2023) on a neuron's weights.

A neuron, its key, bias and value laid end to end, is a flat vector; patches of it are the tokens:

    x  = inLinear(patches(x_t)) + positions (+ each token's own projection of the condition)
    c  = tEmbedder(sinusoids(t)) + condition
    x += gate * attention(norm(x) * (1 + scale) + shift)        in every block, with shift, scale
    x += gate * mlp(norm(x) * (1 + scale) + shift)              and gate linear in silu(c)
    patches of a channel = outLinear(final_layer.linear(norm(x) * (1 + scale) + shift))

The second channel, where there is one, is DDPM's learned variance. Parameters carry the names of
the released checkpoints (inLinear, tEmbedder, ...), so that those load unchanged.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from meg_kernels.arguments import FLOATING, check_instance, check_tensors
from meg_kernels.checks import FLAG, check_fields, integer, number, one_of

from .schedule import Prediction

FREQUENCY_DIM = 256  # of the sinusoidal time embedding
MAX_PERIOD = 10_000
LAYER_NORM_EPS = 1e-6
RELEASED_HEAD_DIM = 64
LARGEST_WIDTH = 65536  # anything above is a slip of the pen, which no machine could build


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a `NeuronDiT`. The defaults learn fast; `paper` is the published network.

    Args:
        patch_size: weights per token; a neuron's flat vector is zero-padded to a multiple of it.
        width: length of a token, even and a multiple of num_heads, at most 65536.
        depth: number of blocks, at most 1000.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP divided by `width`, above 0 and at most 1000.
        condition_dropout: probability in [0, 1) with which each entry of the condition is dropped
            in training.
        token_condition: also add a projection of the condition to every token, each token with its
            own; without it the condition acts through the blocks' shift, scale and gate only.
        prediction: what the network predicts, "x0", "v" or "noise".
        learns_variance: whether the network has a second channel, DDPM's variance.

    Raises:
        ValueError: naming the field that is out of range.
    """

    patch_size: int = 512
    width: int = 512
    depth: int = 2
    num_heads: int = 8
    mlp_ratio: float = 4.0
    condition_dropout: float = 0.0
    token_condition: bool = True
    prediction: Prediction = "x0"
    learns_variance: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            patch_size=integer(1),
            width=integer(1, LARGEST_WIDTH),
            depth=integer(1, 1000),
            num_heads=integer(1),
            mlp_ratio=number(above=0, most=1000),
            condition_dropout=number(least=0, below=1),
            token_condition=FLAG,
            prediction=one_of(Prediction),
            learns_variance=FLAG,
        )
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(
                f"width is {self.width}; it must be even and a multiple of num_heads, "
                f"{self.num_heads}"
            )
        if round(self.width * self.mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio is {self.mlp_ratio}; it must give the MLP a hidden width, mlp_ratio * "
                f"{self.width}, of at least 1"
            )

    @classmethod
    def paper(cls) -> DiTConfig:
        """DiT-B as published: adaLN conditioning only, v-prediction, learned variance."""
        return cls(
            patch_size=100,
            width=768,
            depth=12,
            num_heads=12,
            condition_dropout=0.2,
            token_condition=False,
            prediction="v",
            learns_variance=True,
        )

    @property
    def num_channels(self) -> int:
        """Output channels: the prediction, and the variance if it is learned."""
        return 2 if self.learns_variance else 1


class NeuronDiT(nn.Module):
    """The diffusion transformer that predicts a neuron from its noised weights and a query.

    Args:
        config: its shape.
        neuron_dim: length of a neuron's flat vector.
        condition_dim: length of a condition, the text encoder's output.

    Raises:
        TypeError: config is no DiTConfig.
        ValueError: neuron_dim or condition_dim is not a positive integer.

    >>> dit = NeuronDiT(DiTConfig(width=64, depth=1), neuron_dim=200, condition_dim=32)
    >>> x_t, t, condition = torch.randn(3, 200), torch.tensor([0, 500, 999]), torch.randn(3, 32)
    >>> dit(x_t, t, condition).shape
    torch.Size([3, 200])
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig, neuron_dim: int, condition_dim: int) -> None:
        super().__init__()
        check_instance("config", config, DiTConfig, "DiTConfig() has the defaults")
        neuron_dim = integer(1)("neuron_dim", neuron_dim)
        condition_dim = integer(1)("condition_dim", condition_dim)
        self.config, self.neuron_dim, self.condition_dim = config, neuron_dim, condition_dim
        width, num_tokens = config.width, self.num_tokens
        # A buffer: fixed, yet in the state dict, where released checkpoints have it.
        self.register_buffer("pos_embed", sincos_positions(num_tokens, width))  # [1, T, width]
        self.inLinear = nn.Linear(config.patch_size, width)
        self.tEmbedder = TimestepEmbedder(width)
        self.condition_dropout = nn.Dropout(config.condition_dropout)
        if condition_dim != width:
            self.condition_projection = nn.Linear(condition_dim, width)
        if config.token_condition:
            self.token_condition = nn.Linear(condition_dim, num_tokens * width)
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.num_heads, round(width * config.mlp_ratio))
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.num_channels)
        self.outLinear = nn.Linear(width, config.patch_size)
        self._initialize()

    @property
    def num_tokens(self) -> int:
        """Tokens of a neuron, the last one padded.

        >>> with torch.device("meta"):
        ...     NeuronDiT(DiTConfig.paper(), neuron_dim=5121, condition_dim=768).num_tokens  # Phi-2
        52
        """
        return math.ceil(self.neuron_dim / self.config.patch_size)

    @property
    def prediction(self) -> Prediction:
        """What `forward` returns: "x0", "v" or "noise"."""
        return self.config.prediction

    @property
    def learns_variance(self) -> bool:
        """Whether `forward_with_variance` can be called."""
        return self.config.learns_variance

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict x_0, v or the noise, whichever `prediction` names.

        Args:
            x_t: [B, neuron_dim] noised weights, any floating dtype.
            t: [B] int64 timesteps.
            condition: [B, condition_dim], any floating dtype.

        Returns:
            [B, neuron_dim] in the dtype of the parameters.

        Raises:
            ValueError: a shape or device does not fit.
            TypeError: a dtype does not fit.
        """
        # The variance channel is not computed: deterministic solvers have no use for it.
        return self._denoise(x_t, t, condition, num_channels=1)[:, 0]

    def forward_with_variance(
        self, x_t: Tensor, t: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict both channels: what `forward` predicts, and the learned variance.

        Args:
            x_t: [B, neuron_dim] noised weights, any floating dtype.
            t: [B] int64 timesteps.
            condition: [B, condition_dim], any floating dtype.

        Returns:
            Prediction and variance, each [B, neuron_dim] in the dtype of the parameters. The
            variance is -1 for the posterior's and 1 for beta (Nichol & Dhariwal 2021, eq. 15).

        Raises:
            ValueError: the config learns no variance, or a shape or device does not fit.
            TypeError: a dtype does not fit.
        """
        if not self.learns_variance:
            raise ValueError(
                "this NeuronDiT has no variance channel: build it with learns_variance=True"
            )
        prediction, variance = self._denoise(x_t, t, condition, num_channels=2).unbind(1)
        return prediction, variance

    def _denoise(self, x_t: Tensor, t: Tensor, condition: Tensor, num_channels: int) -> Tensor:
        self._check_inputs(x_t, t, condition)
        config, dtype = self.config, self.inLinear.weight.dtype
        padding = self.num_tokens * config.patch_size - self.neuron_dim
        patches = F.pad(x_t.to(dtype), (0, padding)).unflatten(1, (self.num_tokens, -1))
        tokens = self.inLinear(patches) + self.pos_embed  # [B, T, width]

        condition = self.condition_dropout(condition.to(dtype))
        if config.token_condition:
            tokens = tokens + self.token_condition(condition).unflatten(1, tokens.shape[1:])
        if self.condition_dim != config.width:
            condition = self.condition_projection(condition)
        c = self.tEmbedder(timestep_sinusoids(t).to(dtype)) + condition  # [B, width]

        for block in self.blocks:
            tokens = block(tokens, c)
        channels = self.outLinear(self.final_layer(tokens, c, num_channels))  # [B, T, C, patch]
        return channels.transpose(1, 2).flatten(2)[..., : self.neuron_dim]  # [B, C, neuron_dim]

    def _initialize(self) -> None:
        """DiT's: every block starts as the identity and the network as zero, the mean neuron.

        Of the head's two linears only `final_layer.linear` is zero, so that it has a gradient from
        the first step and everything below it from the second.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in self.tEmbedder.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        if self.config.token_condition:
            # Each token's slice is a projection of its own; the fan-out of all of them together
            # would drown the condition in the noise.
            for weight in self.token_condition.weight.detach().split(self.config.width):
                nn.init.xavier_uniform_(weight)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def _check_inputs(self, x_t: Tensor, t: Tensor, condition: Tensor) -> None:
        check_tensors(x_t=x_t, t=t, condition=condition)
        batch = x_t.shape[0] if x_t.ndim else 0
        expected = {
            "x_t": (x_t, (batch, self.neuron_dim), "neuron_dim"),
            "condition": (condition, (batch, self.condition_dim), "condition_dim"),
        }
        for name, (tensor, shape, field) in expected.items():
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; it must be {shape}, [B, {field}]"
                )
            if tensor.dtype not in FLOATING:
                raise TypeError(
                    f"{name} is {tensor.dtype}; it must be floating point: use {name}.float()"
                )
        if t.shape != (batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}; it must be {(batch,)}, one per row")
        if t.dtype != torch.int64:
            raise TypeError(f"t is {t.dtype}; timesteps must be int64: call t.long()")
        device = self.inLinear.weight.device
        for name, tensor in (("x_t", x_t), ("t", t), ("condition", condition)):
            if tensor.device != device:
                raise ValueError(
                    f"{name} is on {tensor.device}; the parameters are on {device}: call "
                    f"{name}.to({str(device)!r})"
                )


class TimestepEmbedder(nn.Module):
    """The small MLP behind a timestep's sinusoids."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_DIM, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, sinusoids: Tensor) -> Tensor:
        """Embed sinusoids [B, 256] as [B, width]."""
        return self.mlp(sinusoids)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = MLP(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Update tokens x [B, T, width] under the condition c [B, width]; returns [B, T, width]."""
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)  # 6 of [B, 1, width]
        shift, scale, gate = modulation[:3]
        x = x + gate * self.attn(modulate(x, shift, scale))
        shift, scale, gate = modulation[3:]
        return x + gate * self.mlp(modulate(x, shift, scale))


class Attention(nn.Module):
    """Self-attention over a neuron's patches."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens [B, T, width] by attention; returns [B, T, width]."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend with packed queries, keys and values [B, T, 3 * width]; returns [B, T, width]."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, head_dim]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linears with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token of [B, T, width] by itself; returns [B, T, width]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Tokens to the features of each output channel, before `outLinear` turns them into patches."""

    def __init__(self, width: int, num_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_channels * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor, num_channels: int) -> Tensor:
        """The first channels [B, T, num_channels, width] of x [B, T, width] under c [B, width]."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        # Released checkpoints are taken to store a channel's rows together, prediction first and
        # variance second; their shape alone would also allow interleaved rows.
        rows = num_channels * x.shape[-1]
        features = F.linear(
            modulate(x, shift, scale), self.linear.weight[:rows], self.linear.bias[:rows]
        )
        return features.unflatten(-1, (num_channels, -1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters of its own, then the condition's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale) + shift


def sincos_positions(num_tokens: int, width: int) -> Tensor:
    """Fixed positions [1, num_tokens, width] float32: sines of width / 2 periods, then cosines."""
    half = width // 2
    frequencies = MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies  # [T, half]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float().unsqueeze(0)


def timestep_sinusoids(t: Tensor) -> Tensor:
    """Embed timesteps [B] as [B, 256] float32: cosines of 128 periods, then sines."""
    half = FREQUENCY_DIM // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)  # [B, half]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def load_released_checkpoint(
    source: str | PathLike[str] | Mapping[str, Any], neuron_dim: int
) -> NeuronDiT:
    """Load a network that the authors released, its shape read from the checkpoint itself.

    Args:
        source: a state dict, or the path of one: `.pth` and `.pt` are read by `torch.load` without
            executing anything in them, any other file as safetensors. A `model_state_dict` around
            the parameters and a `module.` before their names are removed.
        neuron_dim: length of a neuron's flat vector, which a padded last patch leaves open.

    Returns:
        The network in eval mode, on the CPU in float32.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the file holds something other than a state dict.
        ValueError: the file cannot be read, parameters are missing, unexpected or of the wrong
            shape (they are named), or neuron_dim does not fill the tokens.
    """
    parameters = source if isinstance(source, Mapping) else _read(Path(source))
    if isinstance(parameters, Mapping):
        parameters = parameters.get("model_state_dict", parameters)
    if not isinstance(parameters, Mapping):
        raise TypeError(f"the checkpoint is a {type(parameters).__name__}, not a state dict")
    parameters = {name.removeprefix("module."): value for name, value in parameters.items()}
    not_tensors = [name for name, value in parameters.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise ValueError(f"the checkpoint has entries that are not tensors: {not_tensors}")

    config = _infer_config(parameters, neuron_dim)
    sizes = neuron_dim, config.width  # a condition is as long as a token is wide
    # On the meta device the network has shapes but no memory to fill.
    with torch.device("meta"):
        expected = NeuronDiT(config, *sizes).state_dict()
    missing = sorted(expected.keys() - parameters.keys())
    unexpected = sorted(parameters.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(parameters[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in parameters and parameters[name].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"not a released checkpoint of width {config.width} and depth {config.depth}: "
            f"missing {missing}, unexpected {unexpected}, misshapen {misshapen}"
        )
    dit = NeuronDiT(config, *sizes)
    dit.load_state_dict(parameters)
    return dit.eval()


def _read(path: Path) -> Any:
    try:
        if path.suffix in (".pth", ".pt"):
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, or is corrupt: {error}") from error
    except Exception as error:  # the readers promise no common exception
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def _infer_config(parameters: Mapping[str, Tensor], neuron_dim: int) -> DiTConfig:
    telling = {
        "pos_embed": 3,
        "inLinear.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    missing = [name for name in telling if name not in parameters]
    if missing:
        raise ValueError(f"not a released checkpoint: missing {missing}")
    misshapen = [name for name, ndim in telling.items() if parameters[name].ndim != ndim]
    if misshapen:
        shapes = {name: tuple(parameters[name].shape) for name in misshapen}
        raise ValueError(f"not a released checkpoint: misshapen {shapes}")

    width, patch_size = parameters["inLinear.weight"].shape
    num_tokens = parameters["pos_embed"].shape[1]
    if math.ceil(neuron_dim / patch_size) != num_tokens:
        raise ValueError(
            f"neuron_dim is {neuron_dim}; the checkpoint's {num_tokens} tokens of {patch_size} "
            f"hold {(num_tokens - 1) * patch_size + 1} to {num_tokens * patch_size} weights"
        )
    if width % RELEASED_HEAD_DIM:
        raise ValueError(
            f"the checkpoint's width is {width}; it must be a multiple of {RELEASED_HEAD_DIM}, "
            "the width of an attention head"
        )
    block_names = (re.match(r"blocks\.\d+\.", name) for name in parameters)
    return replace(
        DiTConfig.paper(),
        patch_size=patch_size,
        width=width,
        depth=len({match.group() for match in block_names if match}),
        num_heads=width // RELEASED_HEAD_DIM,
        mlp_ratio=parameters["blocks.0.mlp.fc1.weight"].shape[0] / width,
        learns_variance=parameters["final_layer.linear.weight"].shape[0] != width,
    )
