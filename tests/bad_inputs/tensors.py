"""Tensors and the numbers beside them: the ops, `Neurons`, the sampler, the gates."""

from __future__ import annotations

import functools
import math

import numpy
import torch

from bad_inputs import Case
from meg_kernels import MeGLinear, NeuronLayout, Neurons, dynamic_neuron, dynamic_neuron_
from meg_kernels.diffusion import (
    DiTConfig,
    Execution,
    NeuronDiT,
    NeuronSampler,
    NoiseSchedule,
    SamplerConfig,
    plan_steps,
    sample,
)
from meg_kernels.familiarity import FamiliarityNetwork, SimilarityGate, calibrate, nearest
from meg_kernels.ops.backend import backend
from meg_kernels.ops.linear_gelu import linear_gelu
from meg_kernels.ops.modulated_norm import gated_residual_layer_norm, modulated_layer_norm
from meg_kernels.ops.short_attention import short_attention
from meg_kernels.ops.softmax_entropy import softmax_entropy
from meg_kernels.ops.solver_step import solver_step

NAN, INFINITY = math.nan, math.inf
NEURONS = Neurons(torch.ones(3, 4), torch.ones(3), torch.ones(3, 5))
TENSOR, FLOAT = r"must be a torch\.Tensor", "must be floating-point"


def _call(function, good, **changed):
    """`function` of good arguments, made anew at each call, but for those that are changed."""

    def act(_):
        return function(**{**good(), **{name: make() for name, make in changed.items()}})

    return act


def _neuron_arguments():
    index = torch.tensor([0, 2])
    return {
        "y": torch.zeros(2, 6, 5),
        "x": torch.zeros(2, 6, 4),
        "neurons": NEURONS,
        "index": index,
    }


def _overlapping():
    return torch.zeros(100).as_strided((2, 6, 5), (3, 5, 1))


def _in_place(y):
    return _call(dynamic_neuron_, _neuron_arguments, y=y)


_neuron = functools.partial(_call, dynamic_neuron, _neuron_arguments)
_norm = functools.partial(
    _call,
    modulated_layer_norm,
    lambda: {"x": torch.ones(2, 3, 8), "shift": torch.ones(2, 8), "scale": torch.ones(2, 8)},
)
_gated = functools.partial(
    _call,
    gated_residual_layer_norm,
    lambda: {
        **{name: torch.ones(2, 3, 8) for name in ("x", "update")},
        **{name: torch.ones(2, 8) for name in ("gate", "shift", "scale")},
    },
)
_gelu = functools.partial(
    _call,
    linear_gelu,
    lambda: {"x": torch.ones(2, 8), "weight": torch.ones(4, 8), "bias": torch.ones(4)},
)
_attention = functools.partial(
    _call, short_attention, lambda: {"qkv": torch.ones(2, 3, 48), "num_heads": 2}
)
_entropy = functools.partial(_call, softmax_entropy, lambda: {"logits": torch.ones(2, 3)})
_step = functools.partial(
    _call,
    solver_step,
    lambda: {
        **{name: torch.ones(2, 4) for name in ("x_t", "prediction", "previous_x0")},
        "table": torch.ones(3, 8),
        "step": 0,
    },
)
_made = functools.partial(
    _call, Neurons, lambda: {"key": torch.ones(2, 3), "bias": None, "value": torch.ones(2, 4)}
)
_layout = functools.partial(
    _call,
    NeuronLayout,
    lambda: {"d_in": 3, "d_out": 4, "has_bias": True, "activation": "gelu"},
)
_dit = functools.lru_cache(
    lambda: NeuronDiT(DiTConfig(8, 16, 1, 2), neuron_dim=12, condition_dim=6).eval()
)
_denoise = functools.partial(
    _call,
    lambda **arguments: _dit()(**arguments),
    lambda: {"x_t": torch.ones(2, 12), "t": torch.tensor([0, 1]), "condition": torch.ones(2, 6)},
)
_sample = functools.partial(
    _call,
    sample,
    lambda: {
        "denoiser": _dit(),
        "condition": torch.ones(2, 6),
        "dim": 12,
        "schedule": NoiseSchedule(10),
        "config": SamplerConfig(),
    },
)
_sampler = functools.partial(
    _call,
    NeuronSampler,
    lambda: {"network": _dit(), "schedule": NoiseSchedule(10), "config": SamplerConfig()},
)
_noised = functools.partial(
    _call,
    NoiseSchedule(10).add_noise,
    lambda: {"x0": torch.ones(2, 4), "noise": torch.ones(2, 4), "t": torch.tensor([0, 9])},
)
_calibrated = functools.partial(
    _call,
    calibrate,
    lambda: {"positive": torch.ones(2), "negative": torch.zeros(2), "num_edited": 2},
)
_network = functools.lru_cache(lambda: FamiliarityNetwork(4, depth=1))
_fit = functools.partial(
    _call, lambda **arguments: _network().fit(**arguments), lambda: {"conditions": torch.ones(3, 4)}
)


def _forced(name, act):
    def forced(folder):
        with backend(name):
            return act(folder)

    return forced


def _wanting(shape):
    return lambda: torch.ones(shape, requires_grad=True)


ADD_NEURONS = [
    ("x as a list", _neuron(x=lambda: [[0.0] * 4] * 2), TypeError, ("x is a list", TENSOR)),
    ("y as numpy", _neuron(y=lambda: numpy.zeros((2, 6, 5))), TypeError, ("ndarray", "as_tensor")),
    ("x as None", _neuron(x=lambda: None), TypeError, ("x is a NoneType", TENSOR)),
    ("integer x", _neuron(x=lambda: torch.ones(2, 6, 4).long()), ValueError, ("int64", FLOAT)),
    ("integer y", _neuron(y=lambda: torch.ones(2, 6, 5).int()), ValueError, ("y is .*32", FLOAT)),
    ("boolean y", _neuron(y=lambda: torch.ones(2, 6, 5).bool()), ValueError, ("bool", FLOAT)),
    ("complex x", _neuron(x=lambda: torch.ones(2, 6, 4) * 1j), ValueError, ("complex", r"x\.real")),
    (
        "x of 8 bits",
        _neuron(x=lambda: torch.ones(2, 6, 4).to(torch.float8_e5m2)),
        ValueError,
        ("float8", "use x.float"),
    ),
    ("sparse x", _neuron(x=lambda: torch.ones(2, 4).to_sparse()), ValueError, ("sparse", "dense")),
    (
        "quantised y",
        _neuron(y=lambda: torch.quantize_per_tensor(torch.ones(2, 6, 5), 1.0, 0, torch.qint8)),
        ValueError,
        ("quantised", "dequantize"),
    ),
    ("neurons as tensors", _neuron(neurons=lambda: (1, 2)), TypeError, ("a tuple", r"Neurons\(")),
    ("neurons as None", _neuron(neurons=lambda: None), TypeError, ("NoneType", r"Neurons\(")),
    ("index as a list", _neuron(index=lambda: [0, 1]), TypeError, ("index is a list", TENSOR)),
    (
        "a mask as index",
        _neuron(index=lambda: torch.tensor([True, False])),
        ValueError,
        ("torch.bool", "int64", "where"),
    ),
    (
        "int32 index",
        _neuron(index=lambda: torch.tensor([0, 1]).int()),
        ValueError,
        ("int32", r"index\.long"),
    ),
    ("float index", _neuron(index=lambda: torch.ones(2)), ValueError, ("float32", r"\.long")),
    ("index too high", _neuron(index=lambda: torch.tensor([0, 3])), ValueError, ("to 3", "to 2")),
    ("index too low", _neuron(index=lambda: torch.tensor([0, -2])), ValueError, ("-2", "from -1")),
    ("short index", _neuron(index=lambda: torch.tensor([0])), ValueError, (r"\(1,\)", "each row")),
    ("no index for other rows", _neuron(index=lambda: None), ValueError, ("2 rows", "pass index")),
    ("x of four axes", _neuron(x=lambda: torch.ones(1, 2, 6, 4)), ValueError, ("x is", "must be")),
    ("x of other width", _neuron(x=lambda: torch.ones(2, 6, 3)), ValueError, ("6, 3", "B, T, 4")),
    ("y of other width", _neuron(y=lambda: torch.ones(2, 6, 4)), ValueError, ("y is", "6, 5")),
    ("x on meta", _neuron(x=lambda: torch.ones(2, 6, 4).to("meta")), ValueError, ("meta", "to")),
    (
        "neurons on meta",
        _neuron(neurons=lambda: NEURONS.to("meta")),
        ValueError,
        ("neurons on meta", "one device"),
    ),
    (
        "an expanded y in place",
        _in_place(lambda: torch.zeros(2, 1, 5).expand(2, 6, 5)),
        ValueError,
        ("share their memory", "clone"),
    ),
    (
        "a y whose rows overlap in place",
        _in_place(_overlapping),
        ValueError,
        ("share their memory", "clone"),
    ),
    (
        "a leaf in place",
        _in_place(lambda: torch.zeros(2, 6, 5, requires_grad=True)),
        RuntimeError,
        ("leaf that requires a gradient", "use dynamic_neuron"),
    ),
    (
        "cuda forced on the CPU",
        _forced("cuda", _neuron()),
        RuntimeError,
        ("'cuda' is forced", "on cpu"),
    ),
]

NORMS = [
    ("x as a list", _norm(x=lambda: [1.0]), TypeError, ("x is a list", TENSOR)),
    ("shift as a number", _norm(shift=lambda: 1.0), TypeError, ("shift is a float", TENSOR)),
    ("integer x", _norm(x=lambda: torch.ones(2, 3, 8).long()), ValueError, ("int64", FLOAT)),
    ("x of two axes", _norm(x=lambda: torch.ones(3, 8)), ValueError, (r"\(3, 8\)", "B, T, D")),
    ("x without width", _norm(x=lambda: torch.ones(2, 3, 0)), ValueError, ("0 elements", "1 to")),
    ("too wide an x", _norm(x=lambda: torch.ones(2, 3, 8193)), ValueError, ("8193", "1 to 8192")),
    ("shift of a token", _norm(shift=lambda: torch.ones(2, 3, 8)), ValueError, ("shift", "2, 8")),
    ("scale in half", _norm(scale=lambda: torch.ones(2, 8).half()), ValueError, ("16", "convert")),
    (
        "scale on meta",
        _norm(scale=lambda: torch.ones(2, 8, device="meta")),
        ValueError,
        ("meta", "one device"),
    ),
    ("negative eps", _norm(eps=lambda: -1e-6), ValueError, ("eps is -1e-06", "at least 1e-30")),
    ("eps of 0", _norm(eps=lambda: 0.0), ValueError, (r"eps is 0\.0", "at least")),
    ("eps of NaN", _norm(eps=lambda: NAN), ValueError, ("eps is nan", "a finite number")),
    ("infinite eps", _norm(eps=lambda: INFINITY), ValueError, ("eps is inf", "at most 1e")),
    ("eps as text", _norm(eps=lambda: "1e-6"), ValueError, ("'1e-6'", "a finite number")),
    ("eps as a bool", _norm(eps=lambda: True), ValueError, ("eps is True", "a finite number")),
    ("eps as a tensor", _norm(eps=lambda: torch.ones(2)), ValueError, ("eps is", "finite number")),
    ("a wanted gradient", _norm(x=_wanting((2, 3, 8))), RuntimeError, ("no backward", "no_grad")),
    ("an update as numpy", _gated(update=lambda: numpy.ones(3)), TypeError, ("update", TENSOR)),
    ("short update", _gated(update=lambda: torch.ones(2, 2, 8)), ValueError, ("update", "2, 3, 8")),
    ("gate of one axis", _gated(gate=lambda: torch.ones(8)), ValueError, ("gate is", "2, 8")),
    ("a gate's gradient", _gated(gate=_wanting((2, 8))), RuntimeError, ("gate", "_reference")),
    ("eps beside a gate", _gated(eps=lambda: -1), ValueError, ("eps is -1", "at least")),
    ("cuda forced", _forced("cuda", _norm()), RuntimeError, ("forced", "only triton, cpu")),
]

OTHER_OPS = [
    ("logits as a list", _entropy(logits=lambda: [[1.0]]), TypeError, ("logits", TENSOR)),
    ("one row of logits", _entropy(logits=lambda: torch.ones(3)), ValueError, (r"\(3,\)", "B, C")),
    ("integer logits", _entropy(logits=lambda: torch.ones(2, 3).int()), ValueError, ("32", FLOAT)),
    ("one class", _entropy(logits=lambda: torch.ones(2, 1)), ValueError, ("1 classes", "2 to")),
    (
        "too many classes",
        _entropy(logits=lambda: torch.ones(1, 4097)),
        ValueError,
        ("4097", "4096"),
    ),
    (
        "sparse logits",
        _entropy(logits=lambda: torch.eye(3).to_sparse()),
        ValueError,
        ("sparse", "to_dense"),
    ),
    (
        "a gradient of logits",
        _entropy(logits=_wanting((2, 3))),
        RuntimeError,
        ("no backward", "no_grad"),
    ),
    ("weight as a list", _gelu(weight=lambda: [[1.0]]), TypeError, ("weight is a list", TENSOR)),
    ("bias left out", _gelu(bias=lambda: None), TypeError, ("bias is a NoneType", TENSOR)),
    ("x of one axis", _gelu(x=lambda: torch.ones(8)), ValueError, (r"x is .*\(8,\)", "M, K")),
    (
        "weight the other way",
        _gelu(weight=lambda: torch.ones(8, 4)),
        ValueError,
        ("8, 4", "Linear"),
    ),
    ("bias of other length", _gelu(bias=lambda: torch.ones(3)), ValueError, ("bias is", r"\(4,\)")),
    (
        "weight of doubles",
        _gelu(weight=lambda: torch.ones(4, 8).double()),
        ValueError,
        ("64", "one"),
    ),
    ("complex x in gelu", _gelu(x=lambda: torch.ones(2, 8) * 1j), ValueError, ("complex", "real")),
    ("a gradient of weight", _gelu(weight=_wanting((4, 8))), RuntimeError, ("weight", "no_grad")),
    ("qkv as numpy", _attention(qkv=lambda: numpy.ones(3)), TypeError, ("ndarray", "as_tensor")),
    ("qkv of two axes", _attention(qkv=lambda: torch.ones(3, 48)), ValueError, ("qkv is", "B, T")),
    ("integer qkv", _attention(qkv=lambda: torch.ones(2, 3, 48).int()), ValueError, ("32", FLOAT)),
    ("no heads", _attention(num_heads=lambda: 0), ValueError, ("num_heads is 0", "at least 1")),
    ("heads as a float", _attention(num_heads=lambda: 2.0), ValueError, (r"2\.0", "an integer")),
    ("heads as a bool", _attention(num_heads=lambda: True), ValueError, ("True", "an integer")),
    (
        "rows in no heads",
        _attention(num_heads=lambda: 5),
        ValueError,
        ("num_heads is 5", "must be"),
    ),
    (
        "too many tokens",
        _attention(qkv=lambda: torch.ones(1, 129, 48)),
        ValueError,
        ("129", "for more use"),
    ),
    ("no tokens", _attention(qkv=lambda: torch.ones(1, 0, 48)), ValueError, ("0 tokens", "1 to")),
    ("tiny heads", _attention(num_heads=lambda: 8), ValueError, ("heads of 2", "8 to 128")),
    ("x_t as a list", _step(x_t=lambda: [1.0]), TypeError, ("x_t is a list", TENSOR)),
    ("x_t of one axis", _step(x_t=lambda: torch.ones(4)), ValueError, (r"\(4,\)", "B, dim")),
    ("x_t in half", _step(x_t=lambda: torch.ones(2, 4).half()), ValueError, ("16", "float32")),
    (
        "prediction of doubles",
        _step(prediction=lambda: torch.ones(2, 4).double()),
        ValueError,
        ("64", "prediction.float"),
    ),
    (
        "a table of other columns",
        _step(table=lambda: torch.ones(3, 7)),
        ValueError,
        ("3, 7", "3, 8"),
    ),
    ("no such step", _step(step=lambda: 3), ValueError, ("step is 3", "from 0 to 2")),
    ("a step as a float", _step(step=lambda: 1.0), ValueError, (r"step is 1\.0", "an integer")),
    ("a step as a bool", _step(step=lambda: True), ValueError, ("step is True", "an integer")),
    (
        "noise of each row",
        _step(noise=lambda: torch.ones(2, 4)),
        ValueError,
        ("noise is", r"\(4,\)"),
    ),
    ("variance as a number", _step(variance=lambda: 1.0), TypeError, ("variance is a f", TENSOR)),
    (
        "x_t in columns",
        _step(x_t=lambda: torch.ones(4, 2).T),
        ValueError,
        ("stride 2", "contiguous"),
    ),
    ("a gradient of x_t", _step(x_t=_wanting((2, 4))), RuntimeError, ("x_t requires", "no_grad")),
]

NEURONS_MADE = [
    ("key as a list", _made(key=lambda: [[1.0]]), TypeError, ("key is a list", TENSOR)),
    (
        "value as numpy",
        _made(value=lambda: numpy.ones((2, 4))),
        TypeError,
        ("ndarray", "as_tensor"),
    ),
    ("bias as a number", _made(bias=lambda: 0.0), TypeError, ("bias is a float", TENSOR)),
    ("key of one axis", _made(key=lambda: torch.ones(3)), ValueError, ("key is", "N, d_in")),
    ("fewer values", _made(value=lambda: torch.ones(1, 4)), ValueError, ("value is", "2, d_out")),
    ("bias in a column", _made(bias=lambda: torch.ones(2, 1)), ValueError, ("bias is", "or None")),
    ("integer keys", _made(key=lambda: torch.ones(2, 3).int()), ValueError, ("key", "key.float")),
    ("keys of no width", _made(key=lambda: torch.ones(2, 0)), ValueError, ("2, 0", "at least one")),
    (
        "sparse keys",
        _made(key=lambda: torch.ones(2, 3).to_sparse()),
        ValueError,
        ("sparse", "to_dense"),
    ),
    (
        "half a value",
        _made(value=lambda: torch.ones(2, 4).half()),
        ValueError,
        ("float16", r"\.to"),
    ),
    (
        "value on meta",
        _made(value=lambda: torch.ones(2, 4, device="meta")),
        ValueError,
        ("meta", "them together"),
    ),
    ("unknown activation", _made(activation=lambda: "tanh"), ValueError, ("'tanh'", "identity, g")),
    ("a function", _made(activation=lambda: torch.tanh), ValueError, ("activation is", "one of")),
    ("one neuron by its number", lambda _: NEURONS[0], TypeError, ("rows is 0", "a list")),
    ("a list of bools", lambda _: NEURONS[[True, False, True]], TypeError, ("True", "a tensor")),
    ("no such neuron", lambda _: NEURONS[[0, 3]], IndexError, ("no neuron 3", "there are 3")),
    ("rows as floats", lambda _: NEURONS[torch.ones(2)], TypeError, ("float32", r"rows\.long")),
    ("a pair of slices", lambda _: NEURONS[:, :2], TypeError, ("slice", "one axis")),
    ("nothing to join", lambda _: Neurons.cat([]), ValueError, ("no neurons", "at least one")),
    ("one to join", lambda _: Neurons.cat(NEURONS), TypeError, ("parts is a", r"\[parts\]")),
    ("tensors to join", lambda _: Neurons.cat([NEURONS.key]), TypeError, ("part 0", r"Neurons\(")),
    ("a width of 0", _layout(d_in=lambda: 0), ValueError, ("d_in is 0", "integer in 1 to")),
    ("a width as a float", _layout(d_out=lambda: 4.0), ValueError, (r"4\.0", "an integer")),
    ("a bias as None", _layout(has_bias=lambda: None), ValueError, ("has_bias", "True or False")),
    ("flat as a list", lambda _: NEURONS.layout.unpack([1.0]), TypeError, ("flat is a", TENSOR)),
    (
        "short flat",
        lambda _: NEURONS.layout.unpack(torch.ones(1, 9)),
        ValueError,
        ("1, 9", "N, 10"),
    ),
    (
        "integer flat",
        lambda _: NEURONS.layout.unpack(torch.ones(1, 10).int()),
        ValueError,
        ("32", FLOAT),
    ),
    (
        "a flat to pack",
        lambda _: NEURONS.layout.pack(torch.ones(1, 10)),
        TypeError,
        ("Tensor", "Neurons"),
    ),
    (
        "neurons mounted as None",
        lambda _: MeGLinear(4, 5).mount(None),
        TypeError,
        ("neurons", "makes one"),
    ),
    (
        "neurons of other output",
        lambda _: MeGLinear(4, 6).mount(NEURONS),
        ValueError,
        ("5", "d_out"),
    ),
]

DIFFUSION = [
    ("x_t as a list", _denoise(x_t=lambda: [1.0]), TypeError, ("x_t is a list", TENSOR)),
    ("t as a number", _denoise(t=lambda: 3), TypeError, ("t is a int", TENSOR)),
    ("t as floats", _denoise(t=lambda: torch.ones(2)), TypeError, ("t is torch.float32", "t.long")),
    ("t of one row", _denoise(t=lambda: torch.tensor([1])), ValueError, (r"\(1,\)", "one per row")),
    (
        "integer condition",
        _denoise(condition=lambda: torch.ones(2, 6).int()),
        TypeError,
        ("32", "float"),
    ),
    ("wide condition", _denoise(condition=lambda: torch.ones(2, 7)), ValueError, ("2, 7", "2, 6")),
    (
        "x_t on meta",
        _denoise(x_t=lambda: torch.ones(2, 12, device="meta")),
        ValueError,
        ("meta", "to"),
    ),
    (
        "a DiT of a dict",
        lambda _: NeuronDiT({}, 12, 6),
        TypeError,
        ("config is a dict", "DiTConfig"),
    ),
    (
        "a DiT of no neuron",
        lambda _: NeuronDiT(DiTConfig(), 0, 6),
        ValueError,
        ("dim is 0", "integer"),
    ),
    (
        "an odd width",
        lambda _: DiTConfig(width=33, num_heads=3),
        ValueError,
        ("33", "must be even"),
    ),
    (
        "a ratio of NaN",
        lambda _: DiTConfig(mlp_ratio=NAN),
        ValueError,
        ("nan", "a number, above 0"),
    ),
    (
        "a DiT as denoiser",
        _sample(denoiser=lambda: torch.ones(2)),
        TypeError,
        ("denoiser", "network"),
    ),
    (
        "a denoiser in training",
        _sample(denoiser=lambda: NeuronDiT(DiTConfig(8, 16, 1, 2), 12, 6)),
        ValueError,
        ("training", "eval"),
    ),
    (
        "a condition as a list",
        _sample(condition=lambda: [1.0]),
        TypeError,
        ("condition is", TENSOR),
    ),
    (
        "one condition",
        _sample(condition=lambda: torch.ones(6)),
        ValueError,
        (r"\(6,\)", r"\[B, c\]"),
    ),
    ("dim as a float", _sample(dim=lambda: 12.0), ValueError, (r"dim is 12\.0", "an integer")),
    (
        "a schedule's length",
        _sample(schedule=lambda: 10),
        TypeError,
        ("schedule is a int", "NoiseS"),
    ),
    (
        "a config's dict",
        _sample(config=lambda: {}),
        TypeError,
        ("config is a dict", "SamplerConfig"),
    ),
    (
        "too many steps",
        _sample(config=lambda: SamplerConfig(num_steps=11)),
        ValueError,
        ("11", "1 to 10"),
    ),
    (
        "a sampler of a Linear",
        _sampler(network=lambda: torch.nn.Linear(2, 2)),
        TypeError,
        ("Linear", "sample"),
    ),
    (
        "a sampler of no schedule",
        _sampler(schedule=lambda: None),
        TypeError,
        ("schedule", "NoiseS"),
    ),
    (
        "a sampler run by text",
        _sampler(execution=lambda: "fast"),
        TypeError,
        ("str", r"Execution\("),
    ),
    ("graphs as text", lambda _: Execution(graphs="no"), ValueError, ("graphs is 'no'", "True or")),
    (
        "a precision of its own",
        lambda _: Execution(precision="int8"),
        ValueError,
        ("int8", "one of"),
    ),
    (
        "a solver in a list",
        lambda _: SamplerConfig(solver=["ddim"]),
        ValueError,
        ("ddim", "one of"),
    ),
    (
        "a negative seed",
        lambda _: SamplerConfig(seed=-1),
        ValueError,
        ("seed is -1", "integer in 0"),
    ),
    ("timesteps as a float", lambda _: NoiseSchedule(10.0), ValueError, (r"10\.0", "an integer")),
    (
        "a beta of NaN",
        lambda _: NoiseSchedule(beta_start=NAN),
        ValueError,
        ("nan", "number, above 0"),
    ),
    ("a beta as text", lambda _: NoiseSchedule(beta_end="0.02"), ValueError, ("'0.02'", "number")),
    (
        "betas that fall",
        lambda _: NoiseSchedule(10, 0.1, 0.01),
        ValueError,
        (r"0\.1", "must satisfy"),
    ),
    (
        "half a step",
        lambda _: NoiseSchedule(10).timesteps(2.5),
        ValueError,
        (r"2\.5", "an integer"),
    ),
    (
        "timesteps that rise",
        lambda _: plan_steps("ddim", NoiseSchedule(10), [1, 5], "v"),
        ValueError,
        (r"\[1, 5\]", "must fall"),
    ),
    (
        "timesteps beyond",
        lambda _: plan_steps("ddim", NoiseSchedule(10), [10, 5], "v"),
        ValueError,
        ("10, 5", "at most 9"),
    ),
    ("x0 as a list", _noised(x0=lambda: [1.0]), TypeError, ("x0 is a list", TENSOR)),
    ("x0 in half", _noised(x0=lambda: torch.ones(2, 4).half()), TypeError, ("float16", "x0.float")),
    (
        "a t beyond",
        _noised(t=lambda: torch.tensor([0, 10])),
        ValueError,
        ("0 to 10", "lie in 0 to 9"),
    ),
]

GATES = [
    ("scores as a list", _calibrated(positive=lambda: [1.0]), TypeError, ("positive is", TENSOR)),
    (
        "integer scores",
        _calibrated(negative=lambda: torch.tensor([1])),
        ValueError,
        ("int64", FLOAT),
    ),
    (
        "no scores",
        _calibrated(negative=lambda: torch.ones(0)),
        ValueError,
        ("negative", "at least one"),
    ),
    (
        "scores of NaN",
        _calibrated(positive=lambda: torch.tensor([NAN])),
        ValueError,
        ("must be finite", "1 of them"),
    ),
    (
        "a weight of NaN",
        _calibrated(rejection_weight=lambda: NAN),
        ValueError,
        ("nan", "at least 0"),
    ),
    (
        "a negative weight",
        _calibrated(rejection_weight=lambda: -1.0),
        ValueError,
        (r"-1\.0", "at least 0"),
    ),
    ("edited as a float", _calibrated(num_edited=lambda: 2.0), ValueError, (r"2\.0", "an integer")),
    (
        "conditions as a list",
        lambda _: SimilarityGate([[1.0]]),
        TypeError,
        ("conditions is", TENSOR),
    ),
    (
        "one condition",
        lambda _: SimilarityGate(torch.ones(4)),
        ValueError,
        (r"\(4,\)", "one row a query"),
    ),
    (
        "a threshold of NaN",
        lambda _: SimilarityGate(torch.ones(2, 4), NAN),
        ValueError,
        ("nan", "number"),
    ),
    (
        "a threshold as text",
        lambda _: SimilarityGate(torch.ones(2, 4), "0.7"),
        ValueError,
        ("'0.7'", "number"),
    ),
    (
        "z of other width",
        lambda _: SimilarityGate(torch.ones(2, 4)).score(torch.ones(1, 3)),
        ValueError,
        ("1, 3", "N, 4"),
    ),
    (
        "z in half",
        lambda _: nearest(torch.ones(1, 4).half(), torch.ones(2, 4)),
        ValueError,
        ("float16", "convert"),
    ),
    (
        "one class of familiarity",
        lambda _: FamiliarityNetwork(4, classes=1),
        ValueError,
        ("classes is 1", "integer in 2 to"),
    ),
    (
        "a network of no width",
        lambda _: FamiliarityNetwork(0),
        ValueError,
        ("dim is 0", "at least 1"),
    ),
    (
        "dropout beyond 1",
        lambda _: FamiliarityNetwork(4, dropout=1.5),
        ValueError,
        (r"1\.5", "at most 1"),
    ),
    ("a z of other width", lambda _: _network()(torch.ones(2, 3)), ValueError, ("2, 3", "N, 4")),
    (
        "nothing to be familiar with",
        _fit(conditions=lambda: torch.ones(0, 4)),
        ValueError,
        ("no queries", "familiar with"),
    ),
    (
        "a condition of NaN",
        _fit(conditions=lambda: torch.full((2, 4), NAN)),
        ValueError,
        ("NaN", "leave"),
    ),
    (
        "outliers of other width",
        _fit(outliers=lambda: torch.ones(2, 3)),
        ValueError,
        ("outliers", "N, 4"),
    ),
    ("no steps", _fit(steps=lambda: 0), ValueError, ("steps is 0", "at least 1")),
    ("no batch", _fit(batch_size=lambda: 0), ValueError, ("batch_size is 0", "at least 1")),
    ("a negative rate", _fit(learning_rate=lambda: -1e-3), ValueError, (r"-0\.001", "positive")),
]

ROOMS = {
    "dynamic_neuron": ADD_NEURONS,
    "norm": NORMS,
    "op": OTHER_OPS,
    "neurons": NEURONS_MADE,
    "diffusion": DIFFUSION,
    "gate": GATES,
}
CASES = [Case(f"{room}: {name}", *rest) for room, rows in ROOMS.items() for name, *rest in rows]
