"""Weight generators: from a query's condition z to its neuron, behind one interface.

    DiTGenerator    the paper's: a conditional diffusion model samples the weights
    MLPGenerator    the paper's ablation: one regression step
    NeuronBank      no network: the stored neuron of the nearest edited query

A generator learns standardised weights from standardised conditions: scaling decides whether it
converges (the mean neuron and one standard deviation for each of key, bias and value are taken
out; conditions are centred and scaled to unit variance).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meg_kernels.diffusion import (
    DiTConfig,
    Execution,
    NeuronDiT,
    NeuronSampler,
    NoiseSchedule,
    SamplerConfig,
)
from meg_kernels.neuron import NeuronLayout, Neurons

PAPER_WEIGHT_STD = 0.01
FEWEST_STEPS, PASSES = 3000, 100  # a training may take, if nothing else is asked for


@dataclass(frozen=True)
class GeneratorConfig:
    """Which generator, its network and its training. `paper()` is the published one.

    Args:
        kind: `dit`, `mlp` or `bank`.
        width, depth, num_heads, patch_size, token_condition, prediction, learns_variance,
            condition_dropout: of the DiT, as `DiTConfig` says.
        mlp_width: hidden width of the MLP.
        standardize: centre and scale weights and conditions by the data; otherwise, as in the
            paper, weights are divided by 0.01 and conditions stay unit vectors.
        sampler: solver and steps of the DiT.
        batch_size, learning_rate, warmup_steps: of AdamW with a cosine schedule.
        max_steps: at which that ends; default: 3000, or 100 passes over the facts if more.
        ema_decay: of the averaged weights, which are the ones that generate.
        reword: have half of the training conditions be those of other wordings of the query, made
            of paraphrases of facts that are not edited; default: in an editor that does not snap,
            whose generator is asked about such.
        condition_noise: otherwise, standard deviation of noise added to that half, in units of the
            conditions' own.
        check_every: steps between two looks at the answers of generated neurons; in a long training
            about a tenth of the steps taken, if that is more.
        enough: training has done its work when this share of the edited queries is answered right,
        close: and the neurons are within this distance of the collected ones, relative to the
            spread of those; or when it took twice the steps that the answers took.
        seed: of the initial weights, batches and noise.
    """

    kind: Literal["dit", "mlp", "bank"] = "dit"
    width: int = 512
    depth: int = 2
    num_heads: int = 8
    patch_size: int = 512
    token_condition: bool = True
    prediction: Literal["x0", "v", "noise"] = "x0"
    learns_variance: bool = False
    condition_dropout: float = 0.0
    mlp_width: int = 1024
    standardize: bool = True
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(num_steps=1))
    batch_size: int = 128
    learning_rate: float = 1e-3
    max_steps: int | None = None
    warmup_steps: int = 20
    ema_decay: float = 0.98
    reword: bool | None = None
    condition_noise: float = 0.1
    check_every: int = 50
    enough: float = 1.0
    close: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in GENERATORS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(GENERATORS)}")
        if not 0 < self.enough <= 1:
            raise ValueError(f"enough is {self.enough}; it must be above 0 and at most 1")
        for name in ("batch_size", "max_steps", "warmup_steps", "check_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @classmethod
    def paper(cls, **changes: Any) -> GeneratorConfig:
        """DiT-B as published, sampled as released: 50 ancestral steps with learned variance."""
        published: dict[str, Any] = {
            "width": 768,
            "depth": 12,
            "num_heads": 12,
            "patch_size": 100,
            "token_condition": False,
            "prediction": "v",
            "learns_variance": True,
            "condition_dropout": 0.2,
            "standardize": False,
            "sampler": SamplerConfig("ddpm", 50, "respaced"),
            "learning_rate": 1e-4,
            "ema_decay": 0.0,
            "reword": False,
            "condition_noise": 0.0,
        }
        return cls(**(published | changes))

    @classmethod
    def dit_b(cls, **changes: Any) -> GeneratorConfig:
        """DiT-B's network on the default's scales, trained and sampled in few steps like it."""
        ours: dict[str, Any] = {
            "condition_dropout": 0.0,
            "standardize": True,
            "sampler": SamplerConfig("ddim", 2),
            "learning_rate": 3e-4,
            "ema_decay": cls.ema_decay,
            "reword": None,
            "condition_noise": cls.condition_noise,
            "check_every": 25,
        }
        return cls.paper(**(ours | changes))

    def steps_for(self, facts: int) -> int:
        """The most steps of training on so many facts.

        >>> GeneratorConfig().steps_for(64), GeneratorConfig().steps_for(10_000)
        (3000, 7813)
        """
        passes = math.ceil(PASSES * facts / self.batch_size)
        return self.max_steps or max(FEWEST_STEPS, passes)

    def dit(self, neuron_dim: int, condition_dim: int) -> DiTConfig:
        shared = {f.name for f in dataclasses.fields(DiTConfig)} & {
            f.name for f in dataclasses.fields(self)
        }
        return DiTConfig(
            neuron_dim, condition_dim, **{name: getattr(self, name) for name in shared}
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        sampler = SamplerConfig(**values["sampler"])
        # What was saved before there was a choice had not seen other wordings.
        return cls(**({"reword": False} | dict(values) | {"sampler": sampler}))


def _deviation(rows: Tensor) -> Tensor:
    """One standard deviation of rows around their mean; where they are alike, their size."""
    spread = (rows - rows.mean(0)).square().mean().sqrt()
    size = rows.square().mean().sqrt()
    # Further neurons may be added to a single one: then these are the only scales there are.
    alike = torch.where(size > 0, size, torch.ones_like(size))
    return torch.where(spread > 1e-4 * size, spread, alike)


class Generator(nn.Module):
    """What every generator is: conditions in, neurons out.

    Args:
        config: its kind and network.
        layout: of the neurons.
        condition_dim: length of a condition.
    """

    weight_mean: Tensor
    weight_std: Tensor
    condition_mean: Tensor
    condition_std: Tensor

    def __init__(self, config: GeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__()
        self.config, self.layout, self.condition_dim = config, layout, condition_dim
        self.register_buffer("weight_mean", torch.zeros(layout.dim))
        self.register_buffer("weight_std", torch.ones(layout.dim))
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_std", torch.ones(()))

    def standardize(self, conditions: Tensor, neurons: Neurons) -> None:
        """Take the scales of the data, from conditions [N, condition_dim] and their N neurons."""
        if not self.config.standardize:
            self.weight_std.fill_(PAPER_WEIGHT_STD)
            return
        self.weight_mean.copy_(self.layout.pack(neurons).mean(0))
        one = dataclasses.replace(
            neurons,
            key=_deviation(neurons.key).expand(1, self.layout.d_in),
            bias=None if neurons.bias is None else _deviation(neurons.bias).expand(1),
            value=_deviation(neurons.value).expand(1, self.layout.d_out),
        )
        self.weight_std.copy_(self.layout.pack(one)[0])
        self.condition_mean.copy_(conditions.mean(0))
        self.condition_std.copy_(_deviation(conditions))

    def scaled_conditions(self, z: Tensor) -> Tensor:
        return (z - self.condition_mean) / self.condition_std

    def scaled_weights(self, neurons: Neurons) -> Tensor:
        return (self.layout.pack(neurons) - self.weight_mean) / self.weight_std

    def generate(self, z: Tensor) -> Neurons:
        """The neurons of conditions z [B, condition_dim]: the same z, the same neuron."""
        if z.dim() != 2 or z.shape[1] != self.condition_dim:
            raise ValueError(f"z is {tuple(z.shape)}; it must be [B, {self.condition_dim}]")
        with torch.no_grad():
            weights = self._generate(self.scaled_conditions(z))
        return self.layout.unpack(weights * self.weight_std + self.weight_mean)

    def _generate(self, conditions: Tensor) -> Tensor:
        """Standardised weights [B, dim] from standardised conditions [B, condition_dim]."""
        raise NotImplementedError

    def loss(self, conditions: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """The training loss of standardised pairs."""
        raise NotImplementedError


class DiTGenerator(Generator):
    """Samples the weights with a conditional diffusion transformer."""

    def __init__(self, config: GeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        self.network = NeuronDiT(config.dit(layout.dim, condition_dim))
        self.noise_schedule = NoiseSchedule()
        self.execution = Execution()
        self._sampler: NeuronSampler | None = None

    def _generate(self, conditions: Tensor) -> Tensor:
        sampler = self._sampler
        if sampler is None or not sampler.is_current(self.config.sampler, self.execution):
            sampler = self._sampler = NeuronSampler(
                self.network, self.noise_schedule, self.config.sampler, self.execution
            )
        return sampler(conditions)

    def __getstate__(self) -> dict[str, Any]:
        # What a copy samples with is its own network.
        return self.__dict__ | {"_sampler": None}

    def loss(self, conditions: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the prediction, with the variance's bound where it is learnt."""
        schedule, network = self.noise_schedule, self.network
        t = torch.randint(schedule.num_timesteps, (len(weights),), generator=generator)
        noise = torch.randn(weights.shape, generator=generator).to(weights.device)
        t = t.to(weights.device)
        noised = schedule.add_noise(weights, noise, t)
        target = {
            "x0": lambda: weights,
            "v": lambda: schedule.velocity(weights, noise, t),
            "noise": lambda: noise,
        }[network.prediction]()
        if not network.learns_variance:
            return F.mse_loss(network(noised, t, conditions).float(), target)
        prediction, variance = network.forward_with_variance(noised, t, conditions)
        prediction = prediction.float()
        x0 = schedule.to_x0(prediction.detach(), network.prediction, noised, t)
        bound = schedule.variational_bound(weights, noised, t, x0, variance.float())
        return F.mse_loss(prediction, target) + bound.mean()


class MLPGenerator(Generator):
    """Regresses the weights in one step."""

    def __init__(self, config: GeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        width = config.mlp_width
        self.network = nn.Sequential(
            nn.Linear(condition_dim, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, layout.dim),
        )

    def _generate(self, conditions: Tensor) -> Tensor:
        return self.network(conditions).float()

    def loss(self, conditions: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        return F.mse_loss(self.network(conditions).float(), weights)


class NeuronBank(Generator):
    """Keeps the collected neurons and gives each query the one of the nearest edited query."""

    conditions: Tensor
    weights: Tensor

    def __init__(self, config: GeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        self.register_buffer("conditions", torch.empty(0, condition_dim))
        self.register_buffer("weights", torch.empty(0, layout.dim))

    def resize(self, n: int) -> None:
        """Make room for n neurons, before their state_dict is loaded."""
        self.conditions = self.conditions.new_empty(n, self.condition_dim)
        self.weights = self.weights.new_empty(n, self.layout.dim)

    def store(self, conditions: Tensor, neurons: Neurons) -> None:
        """Keep `neurons`, found under conditions [N, condition_dim]."""
        self.conditions = self.scaled_conditions(conditions)
        self.weights = self.scaled_weights(neurons)

    def scaled_conditions(self, z: Tensor) -> Tensor:
        """Directions, around no mean: the gate finds the same query nearest."""
        return F.normalize(z, dim=-1)

    def _generate(self, conditions: Tensor) -> Tensor:
        if not len(conditions):
            return self.weights[:0]
        return self.weights[(conditions @ self.conditions.T).argmax(1)]


GENERATORS: dict[str, type[Generator]] = {
    "dit": DiTGenerator,
    "mlp": MLPGenerator,
    "bank": NeuronBank,
}


def build_generator(config: GeneratorConfig, layout: NeuronLayout, condition_dim: int) -> Generator:
    """An untrained generator of the config's kind, its initial weights from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GENERATORS[config.kind](config, layout, condition_dim).eval()
