"""Generating neurons: the sampler end to end, a step of it, each saving by itself, and its ops.

"As released" is what the paper's code is described to run: DiT-B in float32, 50 steps of ancestral
DDPM with the learned variance, adaLN computed anew at every step, no graph. It is `sample` over the
plain `NeuronDiT`, which diffusers' schedulers are the oracle of in the tests. "Compiled" is the
same loop over the network under torch.compile.

All networks have random weights, every one of which matters: what answers the neurons of a trained
network give in so few steps is measured in benchmarks/quality.

The gate: in float32 our sampler gives what the plain one gives, up to rounding; in the dtype that
is timed it is off by no more than the network's roundings add up to.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Case, Passed, Race, Way, cold_caches
from meg_kernels.diffusion import (
    DiTConfig,
    Execution,
    NeuronDiT,
    NeuronSampler,
    NoiseSchedule,
    SamplerConfig,
    coefficient_table,
    plan_steps,
    sample,
)
from meg_kernels.editing.fit import descend
from meg_kernels.neuron import NeuronLayout
from meg_kernels.nn.packing import PackedWeight
from meg_kernels.ops import backend as backends
from meg_kernels.ops.linear_gelu import linear_gelu
from meg_kernels.ops.modulated_norm import gated_residual_layer_norm
from meg_kernels.ops.short_attention import short_attention
from meg_kernels.ops.solver_step import solver_step
from meg_kernels.precision import fast_dtype
from meg_kernels.routing.generators import GeneratorConfig, build_generator

GPU = torch.cuda.is_available()
SCHEDULE = NoiseSchedule()
RELEASED = SamplerConfig("ddpm", 50, "respaced")
STEPS = {"DiT-B": 2, "default": 1}  # which answer as well: benchmarks/quality/steps.py
WIDTHS = (1153, 5121, 8193)  # SmolLM2-135M with a bias; Phi-2; GPT-J
BATCHES = (1, 8, 64, 512) if GPU else (1, 8, 64)
NETWORKS = {
    "DiT-B": lambda width: NeuronDiT(DiTConfig.paper(), width, condition_dim=768),
    "default": lambda width: NeuronDiT(DiTConfig(), width, condition_dim=384),
}
PLAIN, OURS = "plain float32", "ours"
WITHOUT, HOISTED, FUSED = "no variance", "hoisted and folded as well", "packed and fused as well"
# A step rounds each of a block's some ten results once.
ROUNDINGS_A_BLOCK = 10
RELEASED_ROUNDINGS = 50 * 12 * ROUNDINGS_A_BLOCK


def scramble(network: nn.Module) -> None:
    """Random weights, the same each time, none of which leaves the result as it is."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)


@dataclass(frozen=True)
class Task:
    """A network and conditions for it, on the device."""

    name: str
    dit: NeuronDiT
    condition: Tensor

    @classmethod
    def of(cls, name: str, width: int, batch: int, device: torch.device) -> Task:
        dit = NETWORKS[name](width)
        scramble(dit)
        condition = torch.randn(batch, dit.condition_dim)
        return cls(name, dit.eval().to(device), condition.to(device))

    def plainly(self, config: SamplerConfig) -> Callable[[], Tensor]:
        return lambda: sample(self.dit, self.condition, self.dit.neuron_dim, SCHEDULE, config)

    def compiled(self, config: SamplerConfig) -> Callable[[], Tensor]:
        """The same with the network, and its loop's every step, under torch.compile."""
        compiled = Task(self.name, copy.copy(self.dit), self.condition)
        for name in ("forward", "forward_with_variance"):
            setattr(compiled.dit, name, torch.compile(getattr(self.dit, name)))
        return compiled.plainly(config)

    def fast(self, config: SamplerConfig, precision: str = "auto") -> Callable[[], Tensor]:
        sampler = NeuronSampler(self.dit, SCHEDULE, config, Execution(precision=precision))
        return lambda: sampler(self.condition)

    def unfused(self, config: SamplerConfig) -> Callable[[], Tensor]:
        """Ours in float32: hoisted and folded, but plain ops over weights that are not packed."""
        with mock.patch.object(PackedWeight, "of", return_value=None):
            plain = Execution("float32", attention="sdpa")
            sampler = NeuronSampler(self.dit, SCHEDULE, config, plain)

        def run() -> Tensor:
            with backends.backend("reference"):
                return sampler(self.condition)

        return run

    def check(self, config: SamplerConfig, result: Tensor) -> Passed:
        """`result`, which our sampler gave for `config`, is right; and so it is in float32."""
        few = Task(self.name, self.dit, self.condition[:8])
        expected = few.plainly(config)()
        exact = {"float32": few.fast(config, "float32")()}
        blocks = ROUNDINGS_A_BLOCK * self.dit.config.depth
        Passed.close(exact, expected, "the plain sampler", ops=blocks)
        # What was rounded is a step's prediction, in the dtype of the products.
        rounded = {OURS: result[:8].to(self.dtype)}
        return Passed.close(rounded, expected, "the plain sampler", ops=blocks)

    @property
    def dtype(self) -> torch.dtype:
        return fast_dtype(self.condition.device, torch.float32)

    @property
    def flops(self) -> int:
        """Of a step, the conditioning of which costs a product of its own."""
        shape, batch = self.dit.config, len(self.condition)
        blocks = self.dit.blocks.parameters()
        products = sum(p.numel() for p in blocks if p.ndim == 2)
        adaln = sum(block.adaLN_modulation[1].weight.numel() for block in self.dit.blocks)
        attention = 2 * shape.depth * self.dit.num_tokens * shape.width
        return 2 * batch * (self.dit.num_tokens * (products - adaln + attention) + adaln)

    @property
    def bytes(self) -> int:
        """The weights, once: what a step on few samples waits for."""
        return sum(p.numel() for p in self.dit.parameters()) * self.dtype.itemsize

    def case(self, what: str, steps: int, items: int = 1) -> Case:
        """So many steps on the batch; of each of `items` that it is divided into."""
        shape = {
            "network": self.name,
            "neuron": self.dit.neuron_dim,
            "batch": len(self.condition),
            "steps": steps,
        }
        moved, flops = steps * self.bytes // items, steps * self.flops // items
        return Case(what, shape, self.dtype, moved, flops)


@pytest.fixture
def task(request: pytest.FixtureRequest, device: torch.device) -> Task:
    return Task.of(*request.param, device)


def each(*tasks: tuple[str, int, int]):
    """Parametrize a test by tasks of (network, width, batch)."""
    return pytest.mark.parametrize(
        "task", tasks, indirect=True, ids=lambda one: "-".join(map(str, one))
    )


def shares(run: Callable[[], Tensor]) -> dict[str, float]:
    """Where the time of one run goes: each op's share, and that of everything else."""
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities) as profiled:
        run()
    names = {
        "mkldnn::_linear_pointwise": "products",
        "aten::linear": "products",
        "meg_kernels::linear_gelu": "products",
        "meg_kernels::gated_residual_layer_norm": "residual and norm",
        "meg_kernels::modulated_layer_norm": "residual and norm",
        "meg_kernels::short_attention": "attention",
        "meg_kernels::solver_step": "solver",
    }
    events = profiled.key_averages()
    times = {
        event.key: event.device_time_total if GPU else event.cpu_time_total for event in events
    }
    whole = sum(
        event.self_device_time_total if GPU else event.self_cpu_time_total for event in events
    )
    parts: dict[str, float] = {}
    for key, name in names.items():
        parts[name] = parts.get(name, 0.0) + times.get(key, 0.0) / whole
    return parts | {"rest": 1 - sum(parts.values())}


# ---- end to end ----------------------------------------------------------------------------------


@each(("DiT-B", 1153, 64), ("default", 1153, 64))
@torch.no_grad()
def test_neurons(race: Race, task: Task, device: torch.device):
    """Neurons per second, ours in few steps, against the released way: always DiT-B, 50 steps."""
    config = SamplerConfig("ddim", STEPS[task.name])
    batch = len(task.condition)
    ours = task.fast(config)
    released, compiled = as_released(task.dit.neuron_dim, batch, device)

    def gate(results: dict[str, Tensor]) -> Passed:
        same = {"compiled": results["as released, compiled"][:8]}
        Passed.close(same, results["as released"][:8], "the plain sampler", ops=RELEASED_ROUNDINGS)
        return task.check(config, results[OURS])

    race(
        task.case("generate neurons", config.num_steps, items=batch),
        Way(OURS, ours, items=batch),
        Way("as released", released, items=batch),
        Way("as released, compiled", compiled, items=batch),
        gate=gate,
        rounds=1,
    )
    graphs = Execution(graphs=False)
    eager = NeuronSampler(task.dit, SCHEDULE, config, graphs)
    race.benchmark.extra_info["shares"] = shares(lambda: eager(task.condition))
    race.benchmark.extra_info["neighbours"] = neighbours(task, config)


@functools.cache
def as_released(width: int, batch: int, device: torch.device) -> tuple[Callable[[], Tensor], ...]:
    """The released way plain and compiled, which takes a minute: all networks race against it."""
    paper = Task.of("DiT-B", width, batch, device)
    return paper.plainly(RELEASED), paper.compiled(RELEASED)


def neighbours(task: Task, config: SamplerConfig) -> float:
    """How far a neuron is from itself generated alone or among others: the most, of 1 to 64.

    In a batch of one size its bits are the same whatever the others are; in another size a product
    may add in another order.
    """
    sampler = NeuronSampler(task.dit, SCHEDULE, config)
    alone = sampler(task.condition[:1])
    sizes = (2, 3, 8, 17, 64)
    among = [sampler(task.condition[:size])[:1] for size in sizes]
    return max(float((other - alone).norm() / alone.norm()) for other in among)


@each(("DiT-B", 1153, 64))
@torch.no_grad()
def test_each_saving(race: Race, task: Task):
    """What each saving is worth on the same network: the time of 10 steps, one after the other.

    Fewer steps than 10 are worth what they save: every step costs the same.
    """
    released = SamplerConfig("ddpm", 10, "respaced")
    config = SamplerConfig("ddim", 10)

    def gate(results: dict[str, Tensor]) -> Passed:
        hoisted = {"float32": results[HOISTED]}
        roundings = ROUNDINGS_A_BLOCK * task.dit.config.depth
        Passed.close(hoisted, results[WITHOUT], "the plain sampler", ops=roundings)
        return task.check(config, results["bfloat16 as well" if half else FUSED])

    half = task.dtype == torch.bfloat16
    ways = [
        Way("as released", task.plainly(released)),
        Way(WITHOUT, task.plainly(config)),
        Way(HOISTED, task.unfused(config)),
        Way(FUSED, task.fast(config, "float32")),
    ]
    if half:
        ways.append(Way("bfloat16 as well", task.fast(config, "bfloat16")))
    race(task.case("each saving", 10), ways[-1], *ways[:-1], gate=gate, rounds=2)


# ---- training ---------------------------------------------------------------------------------


@each(("DiT-B", 1153, 64), ("default", 1153, 128))
def test_training(race: Race, task: Task):
    """A step of training as `fit` takes it, against the same in float32 by AdamW's default."""
    config = GeneratorConfig.dit_b() if task.name == "DiT-B" else GeneratorConfig.dit()
    layout = NeuronLayout(576, 576, True, "identity")
    weights = normal(race.device, len(task.condition), layout.dim, dtype=torch.float32)

    def way(name: str, plain: bool) -> Way:
        generator = build_generator(config, layout, task.condition.shape[1]).to(race.device)
        scramble(generator.train())
        parameters = generator.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=None if plain else True)
        deepest = generator.network.blocks[0].attn.qkv.weight

        def loss() -> Tensor:
            return generator.loss(task.condition, weights, torch.Generator().manual_seed(0))

        def run() -> Tensor:
            if plain:
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            else:
                descend(optimizer, loss, race.device)
            return deepest.grad

        return Way(name, run)

    def gate(results: dict[str, Tensor]) -> Passed:
        gradient = {OURS: results[OURS].to(task.dtype)}
        roundings = 2 * ROUNDINGS_A_BLOCK * config.network.depth
        return Passed.close(gradient, results[PLAIN], PLAIN, ops=roundings)

    case = task.case("training step", 1)
    race(replace(case, flops=3 * case.flops), way(OURS, False), way(PLAIN, True), gate=gate)


# ---- a step -------------------------------------------------------------------------------------


@each(*((name, width, batch) for name in NETWORKS for width in WIDTHS for batch in BATCHES))
@torch.no_grad()
def test_step(race: Race, task: Task):
    """A step of ours, of four that share their conditioning, against one of the plain network."""
    config = SamplerConfig("ddim", 4)
    once = SamplerConfig("ddim", 1)

    race(
        task.case("denoising step", 1),
        Way(OURS, task.fast(config), items=config.num_steps),
        Way(PLAIN, task.plainly(once)),
        gate=lambda results: task.check(config, results[OURS]),
    )


# ---- the ops -------------------------------------------------------------------------------------

OP_BACKENDS = ("triton", "reference") if GPU else ("cpu",)
OP_BATCHES = (8, 64, 512) if GPU else (8, 64)


@pytest.fixture(params=OP_BACKENDS)
def op_backend(request: pytest.FixtureRequest, device: torch.device):
    reason = backends.usable_backends(device)[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with backends.backend(request.param):
        yield request.param


def normal(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


@pytest.mark.parametrize("batch", OP_BATCHES)
@torch.no_grad()
def test_gated_residual_layer_norm(race: Race, op_backend: str, batch: int, tokens=52, width=768):
    dtype, device = fast_dtype(race.device, torch.float32), race.device
    x, update = normal(device, 2, batch, tokens, width, dtype=dtype)
    gate, shift, scale = normal(device, batch, 3, width, dtype=dtype).unbind(1)

    def eager(x=x, update=update, gate=gate, shift=shift, scale=scale) -> tuple[Tensor, Tensor]:
        stream = x + gate[:, None] * update
        normed = F.layer_norm(stream, (width,), eps=1e-6)
        return stream, normed * (1 + scale[:, None]) + shift[:, None]

    def check(results: dict) -> Passed:
        expected = eager(*(part.double() for part in (x, update, gate, shift, scale)))
        Passed.close({name: got[0] for name, got in results.items()}, expected[0], "float64")
        normed = {name: got[1] for name, got in results.items()}
        return Passed.close(normed, expected[1], "float64", ops=4)

    prepare = cold_caches(device)
    moved = 4 * x.nbytes + 3 * gate.numel() * gate.element_size()
    shape = {"batch": batch, "tokens": tokens, "width": width}
    race(
        Case("gated residual and LayerNorm", shape, dtype, moved, 10 * x.numel()),
        Way(
            op_backend,
            lambda: gated_residual_layer_norm(x, update, gate, shift, scale),
            prepare,
        ),
        Way("eager", eager, prepare),
        gate=check,
    )


@pytest.mark.parametrize("batch", OP_BATCHES)
@torch.no_grad()
def test_short_attention(race: Race, op_backend: str, batch: int, tokens=52, heads=12, dim=64):
    dtype, device = fast_dtype(race.device, torch.float32), race.device
    qkv = normal(device, batch, tokens, 3 * heads * dim, dtype=dtype)

    def sdpa(qkv=qkv) -> Tensor:
        query, key, value = qkv.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4).contiguous()
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    prepare = cold_caches(device)
    moved, flops = 4 * qkv.nbytes // 3, 4 * batch * heads * tokens**2 * dim
    shape = {"batch": batch, "tokens": tokens, "heads": heads, "head width": dim}
    race(
        Case("short attention", shape, dtype, moved, flops),
        Way(op_backend, lambda: short_attention(qkv, heads), prepare),
        Way("copies and SDPA", sdpa, prepare),
        gate=lambda results: Passed.close(results, sdpa(qkv.double()), "float64", ops=2),
    )


@pytest.mark.parametrize("batch", OP_BATCHES)
@torch.no_grad()
def test_linear_gelu(race: Race, op_backend: str, batch: int, tokens=52, width=768, hidden=3072):
    dtype, device = fast_dtype(race.device, torch.float32), race.device
    x = normal(device, batch, tokens, width, dtype=dtype)
    weight = normal(device, hidden, width, dtype=dtype) * width**-0.5
    bias = normal(device, hidden, dtype=dtype)

    def eager(x=x, weight=weight, bias=bias) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    moved = x.nbytes + weight.nbytes + x.numel() // width * hidden * x.element_size()
    shape = {"batch": batch, "tokens": tokens, "width": width, "hidden": hidden}
    expected = eager(x.double(), weight.double(), bias.double())
    prepare = cold_caches(device)
    race(
        Case("linear and GELU", shape, dtype, moved, 2 * batch * tokens * width * hidden),
        Way(op_backend, lambda: linear_gelu(x, weight, bias), prepare),
        Way("eager", eager, prepare),
        gate=lambda results: Passed.close(results, expected, "float64", ops=2),
    )


@pytest.mark.parametrize("batch", OP_BATCHES)
@torch.no_grad()
def test_solver_step(race: Race, op_backend: str, batch: int, dim=5121):
    """A step of DPM-Solver++(2M) in the middle of its way, from a slice of padded patches."""
    dtype, device = fast_dtype(race.device, torch.float32), race.device
    steps = plan_steps("dpmsolver++", SCHEDULE, SCHEDULE.timesteps(10, "trailing"), "v")
    table = coefficient_table(steps).to(device)
    x_t, previous = normal(device, 2, batch, dim, dtype=torch.float32)
    prediction = normal(device, batch, dim + 79, dtype=dtype)[:, :dim]
    one = steps[5]

    def eager(x_t=x_t, prediction=prediction, previous=previous) -> tuple[Tensor, Tensor]:
        x0 = one.x0_from_sample * x_t + one.x0_from_prediction * prediction.to(x_t.dtype)
        update = one.update
        x_next = update.sample * x_t + update.x0 * x0 + update.previous_x0 * previous
        return x_next, x0

    def check(results: dict) -> Passed:
        expected = eager(*(part.double() for part in (x_t, prediction, previous)))
        Passed.close({name: got[1] for name, got in results.items()}, expected[1], "float64")
        return Passed.close({name: got[0] for name, got in results.items()}, expected[0], "float64")

    prepare = cold_caches(device)
    moved = 4 * x_t.nbytes + batch * dim * dtype.itemsize
    race(
        Case("solver step", {"batch": batch, "neuron": dim}, dtype, moved, 8 * x_t.numel()),
        Way(op_backend, lambda: solver_step(x_t, prediction, previous, table, 5), prepare),
        Way("eager", eager, prepare),
        gate=check,
    )
