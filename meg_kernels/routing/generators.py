"""Weight generators: from a query's condition z to its neuron, behind one interface.

    DiTGenerator    the paper's: a conditional diffusion model samples the weights
    MLPGenerator    the paper's ablation: one regression step
    NeuronBank      no network: the stored neuron of the nearest edited query
    HypernetworkGenerator
                    no network either: a linear map, in closed form, from what a fact says, its
                    query and its answer; it also makes neurons of facts that it never saw

The two with a network learn standardised weights from standardised conditions: scaling decides
whether they converge (the mean neuron and one standard deviation for each of key, bias and value
are taken out; conditions are centred and scaled to unit variance). They can be given the answers as
well.

Each kind has a configuration of its own, made by a name:

>>> GeneratorConfig.dit().network.width, GeneratorConfig.mlp(width=64, seed=3).training.seed
(512, 3)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meg_kernels.arguments import check_floating, check_instance
from meg_kernels.checks import (
    FLAG,
    SEED,
    check_fields,
    from_fields,
    instance_of,
    integer,
    number,
    shown,
)
from meg_kernels.diffusion import (
    DiTConfig,
    Execution,
    NeuronDiT,
    NeuronSampler,
    NoiseSchedule,
    SamplerConfig,
)
from meg_kernels.diffusion.dit import LARGEST_WIDTH
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.routing.ridge import ridge_regression
from meg_kernels.scoped import seeded

PAPER_WEIGHT_STD = 0.01
FEWEST_STEPS, PASSES = 3000, 100  # a training may take, if nothing else is asked for
MLP_WIDTH = 1024
RIDGE = 30.0  # in SmolLM2, from 512 facts to 6,016, more facts are answered than with 100 or 300

_Config = TypeVar("_Config", bound="NetworkGeneratorConfig")


@dataclass(frozen=True)
class TrainingConfig:
    """How a generator's network is trained: AdamW on a cosine schedule, until it answers right.

    Args:
        standardize: centre and scale weights and conditions by the data; otherwise, as in the
            paper, weights are divided by 0.01 and conditions stay unit vectors.
        batch_size: facts per step.
        learning_rate: the highest of the schedule, positive.
        warmup_steps: steps in which the learning rate rises to that.
        max_steps: steps after which training ends in any case, the learning rate having fallen to
            zero; None: 3000, or 100 passes over the facts if those are more.
        ema_decay: of the averaged weights, 0 to 1; the averaged weights are those that generate.
        reword: replace half of the conditions by those of other wordings of the query, made from
            paraphrases of facts that are not edited; None: only if the editor does not snap, since
            its generator is then asked about such conditions.
        condition_noise: standard deviation of the noise that is added to that half if it is not
            reworded, in units of the conditions' own standard deviation.
        check_every: steps from one trial of the generated neurons to the next; once more than ten
            times as many steps were taken, about a tenth of the steps taken.
        enough: the share of the edited queries, in (0, 1], that generated neurons must answer right
            before training may end. Queries that even their collected neuron does not answer right
            are not counted.
        close: the distance from the collected neurons, relative to their spread, at which training
            ends once enough queries are answered. If the neurons do not come that close, it ends
            after twice the steps that the answers took.
        seed: of the initial weights, the batches and the noise, 0 to 2**63 - 1.

    Raises:
        ValueError: a field is out of range; it is named.
    """

    standardize: bool = True
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    max_steps: int | None = None
    ema_decay: float = 0.98
    reword: bool | None = None
    condition_noise: float = 0.1
    check_every: int = 50
    enough: float = 1.0
    close: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            standardize=FLAG,
            batch_size=integer(1),
            learning_rate=number(above=0),
            warmup_steps=integer(1),
            max_steps=integer(1).or_none(),
            ema_decay=number(least=0, most=1),
            reword=FLAG.or_none(),
            condition_noise=number(least=0),
            check_every=integer(1),
            enough=number(above=0, most=1),
            close=number(least=0, most=math.inf),
            seed=SEED,
        )

    def steps_for(self, facts: int) -> int:
        """The most steps that training on this number of facts takes.

        >>> TrainingConfig().steps_for(64), TrainingConfig().steps_for(10_000)
        (3000, 7813)
        """
        passes = math.ceil(PASSES * integer(0)("facts", facts) / self.batch_size)
        return self.max_steps or max(FEWEST_STEPS, passes)

    def with_fields(self, **changes: Any) -> TrainingConfig:
        """This configuration with some of its fields changed.

        Raises:
            TypeError: there is no such field.
            ValueError: a value is out of range.
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise TypeError(
                    f"a training has no {name!r}; it has {', '.join(names)}. The shape of a DiT is "
                    "given as network=DiTConfig(...), its solver and steps as "
                    "sampler=SamplerConfig(...)"
                )
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class GeneratorConfig:
    """Which generator an editor has.

    It is made by `dit`, `dit_b`, `paper`, `mlp`, `hypernetwork` or `bank`, and its field `kind` is
    "dit", "mlp", "hypernetwork" or "bank". All that can be wrong with a configuration is
    refused when it is made, not after neurons were collected for it.

    Raises:
        TypeError: `GeneratorConfig()` was called itself, which says no kind.
    """

    kind: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if type(self) is GeneratorConfig:
            raise TypeError(
                "GeneratorConfig() says no kind; use GeneratorConfig.dit(), .dit_b(), .paper(), "
                ".mlp(), .hypernetwork() or .bank()"
            )

    @staticmethod
    def dit(
        *,
        network: DiTConfig | None = None,
        sampler: SamplerConfig | None = None,
        **training: Any,
    ) -> DiTGeneratorConfig:
        """The default: a small DiT that predicts the clean neuron and is sampled in one step.

        Args:
            network: the shape of the DiT; None: `DiTConfig()`.
            sampler: solver and steps; None: `SamplerConfig()`, one step of DDIM.
            **training: fields of `TrainingConfig` that differ from its defaults.

        Raises:
            TypeError: `TrainingConfig` has no such field.
            ValueError: a value is out of range.
        """
        return DiTGeneratorConfig()._changed(network, sampler, training)

    @staticmethod
    def dit_b(
        *,
        network: DiTConfig | None = None,
        sampler: SamplerConfig | None = None,
        **training: Any,
    ) -> DiTGeneratorConfig:
        """The published network, DiT-B, on standardised weights and sampled in few steps.

        Args:
            network: the shape of the DiT; None: `DiTConfig.paper()` without condition dropout.
            sampler: solver and steps; None: two steps of DDIM.
            **training: fields of `TrainingConfig` that differ from this preset's.

        Raises:
            TypeError: `TrainingConfig` has no such field.
            ValueError: a value is out of range.
        """
        ours = DiTGeneratorConfig(
            network=dataclasses.replace(DiTConfig.paper(), condition_dropout=0.0),
            sampler=SamplerConfig("ddim", 2),
            training=TrainingConfig(learning_rate=3e-4, check_every=25),
        )
        return ours._changed(network, sampler, training)

    @staticmethod
    def paper(
        *,
        network: DiTConfig | None = None,
        sampler: SamplerConfig | None = None,
        **training: Any,
    ) -> DiTGeneratorConfig:
        """DiT-B as published, sampled as released: 50 ancestral steps with learned variance.

        Args:
            network: the shape of the DiT; None: `DiTConfig.paper()`.
            sampler: solver and steps; None: the released 50 steps of DDPM.
            **training: fields of `TrainingConfig` that differ from the published ones.

        Raises:
            TypeError: `TrainingConfig` has no such field.
            ValueError: a value is out of range.
        """
        published = DiTGeneratorConfig(
            network=DiTConfig.paper(),
            sampler=SamplerConfig("ddpm", 50, "respaced"),
            training=TrainingConfig(
                standardize=False,
                learning_rate=1e-4,
                ema_decay=0.0,
                reword=False,
                condition_noise=0.0,
            ),
        )
        return published._changed(network, sampler, training)

    @staticmethod
    def mlp(*, width: int = MLP_WIDTH, **training: Any) -> MLPGeneratorConfig:
        """The paper's ablation: an MLP that regresses the weights in one step.

        Args:
            width: of its two hidden layers.
            **training: fields of `TrainingConfig` that differ from its defaults.

        Raises:
            TypeError: `TrainingConfig` has no such field.
            ValueError: a value is out of range.
        """
        return MLPGeneratorConfig(width=width, training=TrainingConfig().with_fields(**training))

    @staticmethod
    def hypernetwork() -> HypernetworkConfig:
        """A linear map from what a fact says to its neuron, also of facts that it never saw."""
        return HypernetworkConfig()

    @staticmethod
    def bank() -> BankConfig:
        """No network: each query gets the collected neuron of the nearest edited query."""
        return BankConfig()

    @property
    def knows_answers(self) -> bool:
        """Whether the generator is given what answers say beside the conditions of queries."""
        return False

    def rewords(self, snap: bool) -> bool:
        """Whether training wants conditions of other wordings, in an editor that snaps or not."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields and the kind, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> GeneratorConfig:
        """The configuration that `to_dict` gave; a field that is absent has its default.

        Raises:
            ValueError: the kind or a field is unknown, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"generator is {shown(values)}; it must be an object with its kind")
        kind = values.get("kind")
        if not isinstance(kind, str) or kind not in GENERATORS:
            raise ValueError(f"kind is {shown(kind)}; it must be one of {', '.join(GENERATORS)}")
        rest = {name: value for name, value in values.items() if name != "kind"}
        return from_fields(
            GENERATORS[kind][0],
            rest,
            f"a generator of kind {kind!r}",
            network=functools.partial(from_fields, DiTConfig),
            sampler=functools.partial(from_fields, SamplerConfig),
            training=functools.partial(from_fields, TrainingConfig),
        )


@dataclass(frozen=True, kw_only=True)
class NetworkGeneratorConfig(GeneratorConfig):
    """What generators with a network share.

    Args:
        training: how the network is trained.
        with_answers: whether it is given what answers say beside the conditions of queries.

    Raises:
        TypeError: training is no TrainingConfig.
        ValueError: with_answers is not True or False, or conditions with answers shall be reworded.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    with_answers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, training=instance_of(TrainingConfig), with_answers=FLAG)
        if self.with_answers and self.training.reword:
            raise ValueError("reword is True, but with answers only noise makes other conditions")

    @property
    def knows_answers(self) -> bool:
        """Whether the generator is given what answers say beside the conditions of queries."""
        return self.with_answers

    def rewords(self, snap: bool) -> bool:
        """Whether training wants conditions of other wordings, in an editor that snaps or not."""
        wanted = not snap if self.training.reword is None else self.training.reword
        return wanted and not self.with_answers

    def with_training(self: _Config, **changes: Any) -> _Config:
        """This configuration with some fields of its training changed.

        Raises:
            TypeError: `TrainingConfig` has no such field.
            ValueError: a value is out of range.
        """
        return dataclasses.replace(self, training=self.training.with_fields(**changes))


@dataclass(frozen=True, kw_only=True)
class DiTGeneratorConfig(NetworkGeneratorConfig):
    """The configuration of a `DiTGenerator`.

    Args:
        network: the shape of its DiT.
        sampler: solver and steps.
        training: how the DiT is trained.

    Raises:
        TypeError: an argument is of another class.
        ValueError: the noise schedule has too few timesteps for the sampler's steps.
    """

    kind: str = field(default="dit", init=False)
    network: DiTConfig = field(default_factory=DiTConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, network=instance_of(DiTConfig), sampler=instance_of(SamplerConfig))
        NoiseSchedule().timesteps(self.sampler.num_steps, self.sampler.spacing)

    def _changed(
        self, network: DiTConfig | None, sampler: SamplerConfig | None, training: dict[str, Any]
    ) -> DiTGeneratorConfig:
        """This preset with what the user gave in the place of its own."""
        return DiTGeneratorConfig(
            network=self.network if network is None else network,
            sampler=self.sampler if sampler is None else sampler,
            training=self.training.with_fields(**training),
        )


@dataclass(frozen=True, kw_only=True)
class MLPGeneratorConfig(NetworkGeneratorConfig):
    """The configuration of an `MLPGenerator`.

    Args:
        width: of its two hidden layers, 1 to 65536.
        training: how it is trained.

    Raises:
        TypeError: training is no TrainingConfig.
        ValueError: width is out of range.
    """

    kind: str = field(default="mlp", init=False)
    width: int = MLP_WIDTH

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, width=integer(1, LARGEST_WIDTH))


@dataclass(frozen=True, kw_only=True)
class HypernetworkConfig(GeneratorConfig):
    """The configuration of a `HypernetworkGenerator`, which has nothing to choose."""

    kind: str = field(default="hypernetwork", init=False)

    @property
    def knows_answers(self) -> bool:
        """Whether the generator is given what answers say beside the conditions of queries."""
        return True


@dataclass(frozen=True, kw_only=True)
class BankConfig(GeneratorConfig):
    """The configuration of a `NeuronBank`, which has nothing to choose."""

    kind: str = field(default="bank", init=False)


def _deviation(rows: Tensor) -> Tensor:
    """One standard deviation of rows around their mean; if the rows are alike, their size."""
    spread = (rows - rows.mean(0)).square().mean().sqrt()
    size = rows.square().mean().sqrt()
    # Further neurons may be added to a single one: then these are the only scales there are.
    alike = torch.where(size > 0, size, torch.ones_like(size))
    return torch.where(spread > 1e-4 * size, spread, alike)


class Generator(nn.Module):
    """What every generator is: conditions in, neurons out.

    Args:
        config: of its kind.
        layout: of the neurons.
        condition_dim: length of a condition.
    """

    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__()
        self.config, self.layout, self.condition_dim = config, layout, condition_dim

    def generate(self, z: Tensor) -> Neurons:
        """Generate the neurons of conditions; the same condition always gives the same neuron.

        Args:
            z: [B, condition_dim] float32 on the generator's device. B may be 0.

        Returns:
            B neurons of the generator's layout, float32.

        Raises:
            TypeError: z is no tensor.
            ValueError: z has another shape or no floating-point dtype, or nothing was stored.
        """
        check_floating(z=z)
        if z.dim() != 2 or z.shape[1] != self.condition_dim:
            raise ValueError(f"z is {tuple(z.shape)}; it must be [B, {self.condition_dim}]")
        with torch.no_grad():
            return self.layout.unpack(self._weights(z))

    def _check_pairs(self, conditions: Tensor, neurons: Neurons) -> None:
        """Refuse conditions that are not one for each of the neurons, all of them finite."""
        check_floating(conditions=conditions)
        check_instance("neurons", neurons, Neurons, "collect gives them")
        if conditions.shape != (wanted := (len(neurons), self.condition_dim)):
            raise ValueError(f"conditions is {tuple(conditions.shape)}; it must be {wanted}")
        if not bool(conditions.isfinite().all()) or not bool(neurons.is_finite().all()):
            raise ValueError("conditions and neurons must be finite; they hold NaN or infinity")

    def _weights(self, z: Tensor) -> Tensor:
        """Neurons laid flat, [B, layout.dim], of conditions [B, condition_dim]."""
        raise NotImplementedError


class NetworkGenerator(Generator):
    """A generator with a network, which works on standardised weights and conditions.

    Args:
        config: of its kind.
        layout: of the neurons.
        condition_dim: length of a condition.
    """

    config: NetworkGeneratorConfig
    weight_mean: Tensor
    weight_std: Tensor
    condition_mean: Tensor
    condition_std: Tensor

    def __init__(self, config: NetworkGeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        self.register_buffer("weight_mean", torch.zeros(layout.dim))
        self.register_buffer("weight_std", torch.ones(layout.dim))
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_std", torch.ones(()))

    def standardize(self, conditions: Tensor, neurons: Neurons) -> None:
        """Take the scales of the data, from conditions [N, condition_dim] and their N neurons.

        Raises:
            ValueError: the neurons are of another layout, or the conditions are not theirs.
        """
        self._check_pairs(conditions, neurons)
        if not self.config.training.standardize:
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
        """Standardise conditions z [B, condition_dim]."""
        return (z - self.condition_mean) / self.condition_std

    def scaled_weights(self, neurons: Neurons) -> Tensor:
        """Lay B neurons flat and standardise them, [B, layout.dim]."""
        return (self.layout.pack(neurons) - self.weight_mean) / self.weight_std

    def _weights(self, z: Tensor) -> Tensor:
        return self._generate(self.scaled_conditions(z)) * self.weight_std + self.weight_mean

    def _generate(self, conditions: Tensor) -> Tensor:
        """Standardised weights [B, layout.dim] from standardised conditions [B, condition_dim]."""
        raise NotImplementedError

    def loss(self, conditions: Tensor, weights: Tensor, rng: torch.Generator) -> Tensor:
        """The training loss, a scalar.

        Args:
            conditions: [B, condition_dim], standardised.
            weights: [B, layout.dim], the standardised weights of their neurons.
            rng: draws timesteps and noise, on the CPU.
        """
        raise NotImplementedError


class DiTGenerator(NetworkGenerator):
    """Samples the weights with a conditional diffusion transformer.

    Its attribute `execution` says how sampling runs on this machine (precision, attention, CUDA
    graphs, torch.compile). It may be set at any time and is not saved with the generator:
    `generator.execution = Execution(compile=True)`.

    Args:
        config: network, sampler and training.
        layout: of the neurons.
        condition_dim: length of a condition.
    """

    config: DiTGeneratorConfig

    def __init__(self, config: DiTGeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        self.network = NeuronDiT(config.network, layout.dim, condition_dim)
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
        # A sampler holds the network's weights; a copy must sample with those of its own network.
        return self.__dict__ | {"_sampler": None}

    def loss(self, conditions: Tensor, weights: Tensor, rng: torch.Generator) -> Tensor:
        """Mean squared error of the prediction, plus the variational bound of a learned variance.

        Args:
            conditions: [B, condition_dim], standardised.
            weights: [B, layout.dim], the standardised weights of their neurons.
            rng: draws timesteps and noise, on the CPU.
        """
        schedule, network = self.noise_schedule, self.network
        t = torch.randint(schedule.num_timesteps, (len(weights),), generator=rng)
        noise = torch.randn(weights.shape, generator=rng).to(weights.device)
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


class MLPGenerator(NetworkGenerator):
    """Regresses the weights in one step.

    Args:
        config: width and training.
        layout: of the neurons.
        condition_dim: length of a condition.
    """

    config: MLPGeneratorConfig

    def __init__(self, config: MLPGeneratorConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        width = config.width
        self.network = nn.Sequential(
            nn.Linear(condition_dim, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, layout.dim),
        )

    def _generate(self, conditions: Tensor) -> Tensor:
        return self.network(conditions).float()

    def loss(self, conditions: Tensor, weights: Tensor, rng: torch.Generator) -> Tensor:
        """Mean squared error of the regressed weights.

        Args:
            conditions: [B, condition_dim], standardised.
            weights: [B, layout.dim], the standardised weights of their neurons.
            rng: not needed.
        """
        return F.mse_loss(self.network(conditions).float(), weights)


class NeuronBank(Generator):
    """Keeps the collected neurons and gives each query the one of the nearest edited query.

    Args:
        config: of a bank.
        layout: of the neurons.
        condition_dim: length of a condition.
    """

    config: BankConfig
    conditions: Tensor
    weights: Tensor

    def __init__(self, config: BankConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        self.register_buffer("conditions", torch.empty(0, condition_dim))
        self.register_buffer("weights", torch.empty(0, layout.dim))

    def resize(self, n: int) -> None:
        """Make room for n neurons, 0 or more, before their state_dict is loaded."""
        n = integer(0)("n", n)
        self.conditions = self.conditions.new_empty(n, self.condition_dim)
        self.weights = self.weights.new_empty(n, self.layout.dim)

    def store(self, conditions: Tensor, neurons: Neurons) -> None:
        """Keep these neurons alone, found under conditions [N, condition_dim].

        Raises:
            ValueError: the neurons are of another layout, or the conditions are not theirs.
        """
        self._check_pairs(conditions, neurons)
        self.conditions = F.normalize(conditions, dim=-1)
        self.weights = self.layout.pack(neurons)

    def _weights(self, z: Tensor) -> Tensor:
        if not len(z):
            return self.weights[:0]
        if not len(self.weights):
            raise ValueError("the bank holds no neurons; call store(conditions, neurons) first")
        # By cosine, as the gate finds the nearest query: both must find the same one.
        return self.weights[(F.normalize(z, dim=-1) @ self.conditions.T).argmax(1)]


class HypernetworkGenerator(Generator):
    """A ridge regression, in closed form, from what facts say to their neurons.

    The neuron of a fact is a smooth function of its query and its answer: what is learnt from facts
    whose neurons are known tells those of others.

    Args:
        config: of a hypernetwork.
        layout: of the neurons.
        condition_dim: length of what a fact says (`routing.ridge.said`).
    """

    config: HypernetworkConfig
    said_mean: Tensor
    neuron_mean: Tensor
    weight: Tensor

    def __init__(self, config: HypernetworkConfig, layout: NeuronLayout, condition_dim: int):
        super().__init__(config, layout, condition_dim)
        self.register_buffer("said_mean", torch.zeros(condition_dim))
        self.register_buffer("neuron_mean", torch.zeros(layout.dim))
        self.register_buffer("weight", torch.zeros(condition_dim, layout.dim))

    def learn(self, said: Tensor, neurons: Neurons, ridge: float = RIDGE) -> None:
        """Learn from these facts alone.

        Args:
            said: [N, condition_dim] what they say.
            neurons: theirs.
            ridge: the L2 penalty of the regression, positive.

        Raises:
            ValueError: there are none, they do not pair up, or the penalty is out of range.
        """
        ridge = number(above=0)("ridge", ridge)
        self._check_pairs(said, neurons)
        if not len(said):
            raise ValueError("there are no facts to learn from")
        found = ridge_regression(said, self.layout.pack(neurons), ridge)
        self.said_mean, self.neuron_mean, self.weight = found

    def _weights(self, z: Tensor) -> Tensor:
        return (z.float() - self.said_mean) @ self.weight + self.neuron_mean


GENERATORS: dict[str, tuple[type[GeneratorConfig], type[Generator]]] = {
    "dit": (DiTGeneratorConfig, DiTGenerator),
    "mlp": (MLPGeneratorConfig, MLPGenerator),
    "hypernetwork": (HypernetworkConfig, HypernetworkGenerator),
    "bank": (BankConfig, NeuronBank),
}


def build_generator(config: GeneratorConfig, layout: NeuronLayout, condition_dim: int) -> Generator:
    """An untrained generator of the config's kind, in eval mode on the CPU.

    Args:
        config: kind, network and training; initial weights come from the training's seed.
        layout: of the neurons.
        condition_dim: length of a condition.

    Raises:
        TypeError: config or layout is none.
        ValueError: condition_dim is below 1, or the network is larger than the machine's memory.
    """
    instance_of(GeneratorConfig)("config", config)
    instance_of(NeuronLayout)("layout", layout)
    condition_dim = integer(1)("condition_dim", condition_dim)
    generator = GENERATORS[config.kind][1]
    if not isinstance(config, NetworkGeneratorConfig):
        return generator(config, layout, condition_dim).eval()
    with torch.device("meta"):  # which holds shapes alone
        planned = generator(config, layout, condition_dim)
    size = sum(t.numel() * t.element_size() for t in planned.state_dict().values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"the generator's network takes {size / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f}; choose a smaller width, depth or mlp_ratio"
        )
    with seeded(config.training.seed):
        return generator(config, layout, condition_dim).eval()
