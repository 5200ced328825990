"""Sampling a `NeuronDiT` as the hardware likes it: the function of `sample`, many times faster.

What is done once for all steps, or not at all:

- conditioning: silu(tEmbedder(t) + z) of all steps and samples goes through the adaLN weights of
  all blocks in one product, a third of a DiT's weights that a loop would read at every step;
- the token inputs' positions and conditions are added up before the first step;
- the head: its two linears, with nothing between them, become one; the variance's channel is
  computed for the solver that asks for it alone;
- the solver: coefficients of all steps are a table on the device, nothing in the loop waits.

What remains of a block are four products and the ops between them: gated residual + LayerNorm +
modulation, attention from the packed qkv, GELU. The state is float32, the network runs in bfloat16
where the device multiplies it. On a CPU the weights are packed for oneDNN once; on a GPU the loop
becomes a CUDA graph for each batch size among powers of two.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meg_kernels.arguments import check_instance
from meg_kernels.checks import FLAG, check_fields, one_of
from meg_kernels.nn.packing import PackedWeight
from meg_kernels.ops.linear_gelu import linear_gelu
from meg_kernels.ops.modulated_norm import gated_residual_layer_norm, modulated_layer_norm
from meg_kernels.ops.short_attention import MAX_TOKENS, short_attention
from meg_kernels.ops.solver_step import solver_step
from meg_kernels.precision import fast_dtype

from .dit import LAYER_NORM_EPS, DiTBlock, NeuronDiT, timestep_sinusoids
from .sampler import SamplerConfig, check_condition, check_sampling, draw_noise
from .schedule import NoiseSchedule
from .solvers import coefficient_table, plan_steps

AttentionBackend = Literal["auto", "ours", "sdpa", "flash-attn"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
MODULATION_BYTES = 256 * 2**20  # of the conditioning that is computed ahead of its steps
CHUNK = 512  # samples that go through the network at once
GRAPHS = 8


@dataclass(frozen=True)
class Execution:
    """How a sampler runs: this changes the time that it takes, and its result by rounding only.

    Args:
        precision: dtype of the network's matrix products; "auto" is bfloat16 on a device that
            multiplies it natively, otherwise the dtype of the network's parameters.
        attention: "ours" (`short_attention`, up to 128 tokens), "sdpa" (PyTorch's), "flash-attn"
            (that package, on a GPU in bfloat16 or float16); "auto" is "ours" for up to 128 tokens
            and "sdpa" for more.
        graphs: on a GPU, record the loop as a CUDA graph for each power of two of samples.
        compile: run the loop under `torch.compile`, which takes minutes at the first call.

    Raises:
        ValueError: a field is none of these; it is named.
    """

    precision: Precision = "auto"
    attention: AttentionBackend = "auto"
    graphs: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            precision=one_of(Precision),
            attention=one_of(AttentionBackend),
            graphs=FLAG,
            compile=FLAG,
        )


class NeuronSampler:
    """`sample(network, condition, ...)` for a `NeuronDiT`, prepared once for many calls.

    The network's weights are taken when the sampler is made; `is_current` tells whether that is
    still what was asked for.

    Args:
        network: a NeuronDiT in eval mode.
        schedule: the schedule that the network was trained with.
        config: solver, steps and seed.
        execution: how to run; default: `Execution()`.

    Raises:
        TypeError: an argument is not what it is called.
        ValueError: the network is in training mode, has more tokens than `attention="ours"` takes,
            or the schedule has fewer timesteps than `config.num_steps`.
        RuntimeError: flash-attn was asked for, and is not installed or cannot run on this device.

    >>> from meg_kernels.diffusion import DiTConfig, NoiseSchedule
    >>> dit = NeuronDiT(DiTConfig(width=64, depth=1), neuron_dim=200, condition_dim=32).eval()
    >>> sampler = NeuronSampler(dit, NoiseSchedule(), SamplerConfig(num_steps=2))
    >>> sampler(torch.randn(3, 32)).shape
    torch.Size([3, 200])
    """

    def __init__(
        self,
        network: NeuronDiT,
        schedule: NoiseSchedule,
        config: SamplerConfig,
        execution: Execution | None = None,
    ):
        check_instance("network", network, NeuronDiT, "others are sampled by `sample`")
        check_sampling(schedule, config)
        if execution is not None:
            check_instance("execution", execution, Execution, "Execution() has the defaults")
        if network.training:
            raise ValueError("the network is in training mode: call network.eval()")
        self.execution = execution or Execution()
        self.config = config
        self.neuron_dim, self.condition_dim = network.neuron_dim, network.condition_dim
        self._width, self._patch_size = network.config.width, network.config.patch_size
        self._num_tokens = network.num_tokens
        self._network, self._seen = network, _versions(network)
        own = network.inLinear.weight
        self.device, self.dtype = own.device, _precision(self.execution, own)
        self._attend = _attention(self.execution.attention, network, self.dtype, self.device)

        timesteps = schedule.timesteps(config.num_steps, config.spacing)
        steps = plan_steps(config.solver, schedule, timesteps, network.prediction)
        ancestral = config.solver == "ddpm"
        self._adds_noise = [step.update.noise is not None for step in steps]
        self._with_variance = ancestral and network.learns_variance
        self._table = coefficient_table(steps).to(self.device)  # [S, 8]
        draws = len(steps) if ancestral else 1
        self._noise = draw_noise(draws, self.neuron_dim, config.seed).to(self.device)
        with torch.no_grad():
            self._prepare(network, torch.tensor(timesteps, device=self.device))
        self._graphs = _Graphs(self._run) if self._uses_graphs() else None
        self._whole = torch.compile(self._run) if self.execution.compile else self._run

    def is_current(self, config: SamplerConfig, execution: Execution) -> bool:
        """Whether a sampler made now with these would do the same, its weights being unchanged."""
        seen = self.config, self.execution, self._seen
        return seen == (config, execution, _versions(self._network))

    @torch.no_grad()
    def __call__(self, condition: Tensor) -> Tensor:
        """Generate one vector of weights for each condition.

        Args:
            condition: [B, condition_dim], any floating dtype, on the network's device. B may be 0.

        Returns:
            [B, neuron_dim] float32, in the space that the network was trained in.

        Raises:
            ValueError: condition has another shape or is on another device.
            TypeError: condition is not floating point.
        """
        check_condition(condition)
        if condition.shape[1] != self.condition_dim or condition.device != self.device:
            raise ValueError(
                f"condition is {tuple(condition.shape)} on {condition.device}; it must be "
                f"[B, {self.condition_dim}] on {self.device}"
            )
        if not len(condition):
            return condition.new_empty(0, self.neuron_dim, dtype=torch.float32)
        run = self._whole if self._graphs is None else self._graphs
        with torch.autocast(self.device.type, enabled=False):
            chunks = [run(chunk) for chunk in condition.to(self.dtype).split(CHUNK)]
        return torch.cat(chunks) if len(chunks) > 1 else chunks[0]

    def _uses_graphs(self) -> bool:
        return self.execution.graphs and not self.execution.compile and self.device.type == "cuda"

    def _prepare(self, network: NeuronDiT, timesteps: Tensor) -> None:
        """Take the network's weights, and compute what no condition has a part in."""
        dtype = self.dtype
        # A compiler packs constants itself, and refuses what is packed.
        product = functools.partial(_Product, dtype=dtype, packs=not self.execution.compile)
        layers: list[Any] = [*network.blocks, network.final_layer]
        embedded = network.tEmbedder(timestep_sinusoids(timesteps).to(network.pos_embed.dtype))
        self._time = embedded.float()[:, None]  # [S, 1, width]
        self._positions = network.pos_embed.to(dtype)
        self._patches = product([network.inLinear])
        self._projection = self._token_condition = None
        if network.condition_dim != self._width:
            self._projection = product([network.condition_projection])
        if network.config.token_condition:
            self._token_condition = product([network.token_condition])
        self._modulation = product([layer.adaLN_modulation[1] for layer in layers])
        self._blocks = [_Block.of(block, product) for block in layers[:-1]]
        # Linear after linear is one linear: W (V x + a) + b = (W V) x + (W a + b).
        outer, inner = network.outLinear, network.final_layer.linear
        channels = range(2 if self._with_variance else 1)
        self._heads = [
            product([_folded(outer, inner, slice(c * self._width, (c + 1) * self._width))])
            for c in channels
        ]

    def _run(self, condition: Tensor) -> Tensor:
        """[B, condition_dim] in the compute dtype to [B, neuron_dim] float32."""
        batch, steps = len(condition), len(self._table)
        x_t = self._noise[0].repeat(batch, 1)  # [B, dim]
        previous_x0 = x_t  # read by no first step
        patches = condition.new_zeros(batch, self._num_tokens * self._patch_size)
        inputs = self._positions.expand(batch, -1, -1)  # [B, T, width]
        if self._token_condition is not None:
            inputs = inputs + self._token_condition(condition).view(inputs.shape)
        c = condition if self._projection is None else self._projection(condition)
        ahead = MODULATION_BYTES // (batch * self._modulation.out_features * self.dtype.itemsize)
        for start in range(0, steps, max(ahead, 1)):
            time = self._time[start : start + max(ahead, 1)]
            modulation = self._modulation(F.silu(time + c.float()).to(self.dtype))  # [s, B, M]
            for step, at in enumerate(modulation, start):
                patches[:, : self.neuron_dim] = x_t
                outputs = self._denoise(patches.view(batch, self._num_tokens, -1), at, inputs)
                prediction, *variance = [
                    output.view(batch, -1)[:, : self.neuron_dim] for output in outputs
                ]
                x_t, previous_x0 = solver_step(
                    x_t,
                    prediction,
                    previous_x0,
                    self._table,
                    step,
                    self._noise[step + 1] if self._adds_noise[step] else None,
                    *(variance if self._adds_noise[step] else ()),
                )
        return x_t

    def _denoise(self, patches: Tensor, modulation: Tensor, inputs: Tensor) -> list[Tensor]:
        """The prediction's patches [B, T, patch_size], and the variance's where it is wanted.

        Args:
            patches: [B, T, patch_size] of the noised weights.
            modulation: [B, M]: shift, scale, gate of every block's two halves, and those of the
                final layer.
            inputs: [B, T, width] what is added to the tokens.
        """
        parts = [*modulation.view(len(modulation), -1, self._width).unbind(1)]  # [B, width]
        stream = self._patches(patches) + inputs
        shift, scale, *parts = parts
        normed = modulated_layer_norm(stream, shift, scale, LAYER_NORM_EPS)
        for block in self._blocks:
            gate, shift, scale, next_gate, next_shift, next_scale, *parts = parts
            update = block.proj(self._attend(block.qkv(normed)))
            stream, normed = gated_residual_layer_norm(
                stream, update, gate, shift, scale, LAYER_NORM_EPS
            )
            update = block.fc2(block.fc1.gelu(normed))
            stream, normed = gated_residual_layer_norm(
                stream, update, next_gate, next_shift, next_scale, LAYER_NORM_EPS
            )
        return [head(normed) for head in self._heads]


def _folded(outer: nn.Linear, inner: nn.Linear, rows: slice) -> nn.Linear:
    """`outer` after these rows of `inner`."""
    folded = nn.Linear(inner.in_features, outer.out_features, device="meta")
    folded.weight = nn.Parameter(outer.weight @ inner.weight[rows])
    folded.bias = nn.Parameter(outer.weight @ inner.bias[rows] + outer.bias)
    return folded


class _Product:
    """The product of frozen linears, their outputs end to end, over weights that a CPU has packed.

    Args:
        linears: of the same input.
        dtype: of the product.
        packs: rearrange the weights, where that is faster.
    """

    def __init__(self, linears: list[nn.Linear], dtype: torch.dtype, packs: bool):
        self.weight = torch.cat([linear.weight.detach() for linear in linears]).to(dtype)
        self.bias = torch.cat([linear.bias.detach() for linear in linears]).to(dtype)
        self.out_features = len(self.weight)
        self._packed = PackedWeight.of(self.weight) if packs else None
        if self._packed is not None:
            del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed(x, self.bias)
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """The product of x [..., in_features], then a tanh-GELU."""
        if self._packed is not None:
            return self._packed(x, self.bias, gelu_tanh=True)
        return linear_gelu(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Block:
    """The products of a DiT block; its modulation is computed ahead."""

    qkv: _Product
    proj: _Product
    fc1: _Product
    fc2: _Product

    @classmethod
    def of(cls, block: DiTBlock, product: Callable[[list[nn.Linear]], _Product]) -> _Block:
        """Prepare a block's four linears."""
        linears = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        return cls(*(product([linear]) for linear in linears))


class _Graphs:
    """`run` as CUDA graphs, one for each power of two of rows; the oldest makes room.

    All share one private memory pool: they are replayed one after the other, and a result is copied
    out before the next replay.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]):
        self._run = run
        self._graphs: OrderedDict[int, tuple[Any, Tensor, Tensor]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, condition: Tensor) -> Tensor:
        rows = len(condition)
        bucket = 1 << (rows - 1).bit_length()
        if bucket not in self._graphs:
            self._graphs[bucket] = self._record(condition.new_zeros(bucket, condition.shape[1]))
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(bucket)
        graph, given, result = self._graphs[bucket]
        given[:rows] = condition
        graph.replay()
        return result[:rows].clone()

    def _record(self, given: Tensor) -> tuple[Any, Tensor, Tensor]:
        with torch.cuda.device(given.device):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # compiles kernels, and lets cuBLAS allocate
                self._run(given)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = self._run(given)
        return graph, given, result


def _versions(network: nn.Module) -> list[tuple[int, int]]:
    """Changes with every change of a parameter, in place or not."""
    return [(part.data_ptr(), part._version) for part in network.parameters()]


def _precision(execution: Execution, own: Tensor) -> torch.dtype:
    if execution.precision == "auto":
        return fast_dtype(own.device, own.dtype)
    return getattr(torch, execution.precision)


def _attention(
    wanted: AttentionBackend, network: NeuronDiT, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """What turns a block's qkv [B, T, 3 * width] into its attended values [B, T, width]."""
    heads, tokens = network.config.num_heads, network.num_tokens
    if wanted == "auto":
        wanted = "ours" if tokens <= MAX_TOKENS else "sdpa"
    if wanted == "ours":
        if tokens > MAX_TOKENS:
            raise ValueError(
                f"the network has {tokens} tokens; attention='ours' takes up to {MAX_TOKENS}: use "
                "'sdpa' or 'auto'"
            )
        return lambda qkv: short_attention(qkv, heads)
    if wanted == "sdpa":
        first: Any = network.blocks[0]
        return first.attn.attend
    if importlib.util.find_spec("flash_attn") is None:
        raise RuntimeError("attention='flash-attn' needs that package: pip install flash-attn")
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"flash-attn runs on a GPU in bfloat16 or float16, not on {device} in {dtype}; use "
            "attention='sdpa'"
        )
    from flash_attn import flash_attn_qkvpacked_func

    def flash(qkv: Tensor) -> Tensor:
        return flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, heads, -1))).flatten(2)

    return flash
