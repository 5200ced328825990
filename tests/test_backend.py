"""Which backend runs, and the ops as torch.library, autograd and torch.compile see them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from meg_kernels import ops
from meg_kernels.kernels import launching
from meg_kernels.neuron import ACTIVATIONS, Neurons
from meg_kernels.nn import MeGLinear, attach
from meg_kernels.ops.backend import (
    BACKENDS,
    VARIABLE,
    backend,
    choose,
    forced_backend,
    usable_backends,
)
from meg_kernels.ops.dynamic_neuron import dynamic_neuron, dynamic_neuron_reference
from meg_kernels.ops.softmax_entropy import softmax_entropy

CPU = torch.device("cpu")
LIBRARY = torch.ops.meg_kernels


def some_neurons(count=3, d_in=6, d_out=5, *, bias=True, activation="gelu", dtype=torch.float32):
    torch.manual_seed(count)
    shapes = [(count, d_in), (count,), (count, d_out)]
    key, offset, value = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return Neurons(key, offset if bias else None, value, activation)


def arguments(tokens=4, dtype=torch.float32, bias=True, index=(1, -1, 0), **more):
    neurons = some_neurons(bias=bias, dtype=dtype, **more)
    shape = (len(index),) if tokens is None else (len(index), tokens)
    y, x = torch.randn(*shape, 5, dtype=dtype), torch.randn(*shape, 6, dtype=dtype)
    parts = (neurons.key, neurons.bias, neurons.value)
    return (y, x, *parts, torch.tensor(index, dtype=torch.int64), neurons.activation)


# ---- the choice ----------------------------------------------------------------------------------


def test_a_cpu_takes_its_own_path_unless_another_is_forced(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert forced_backend() is None and choose("op", CPU, torch.float32) == "cpu"
    with backend("reference"):
        assert choose("op", CPU, torch.float32) == "reference"
        with backend("cpu"):
            assert choose("op", CPU, torch.float32) == "cpu"
        assert choose("op", CPU, torch.float32) == "reference"
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose("op", CPU, torch.float32) == "reference"
    with backend("cpu"):  # the innermost word counts
        assert choose("op", CPU, torch.float32) == "cpu"


def test_an_op_with_only_some_backends_refuses_the_others(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    few = {"triton": None, "reference": None}
    with (
        backend("cpu"),
        pytest.raises(RuntimeError, match="this op has only triton, reference"),
    ):
        choose("op", CPU, torch.float32, supported=few)
    with backend("reference"):
        assert choose("op", CPU, torch.float32, supported=few) == "reference"


def test_a_dtype_that_the_kernels_do_not_take_is_chosen_around_or_refused(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(launching, "unavailable_reason", lambda device: None)
    gpu, supported = torch.device("cuda"), {"triton": (torch.float16,), "reference": None}
    assert choose("op", gpu, torch.float16, supported=supported) == "triton"
    assert choose("op", gpu, torch.float64, supported=supported) == "reference"
    refusal = r"op: backend 'triton' is forced, but .*float64; its kernels take torch.float16"
    with backend("triton"), pytest.raises(RuntimeError, match=refusal):
        choose("op", gpu, torch.float64, supported=supported)


def test_a_forced_backend_that_cannot_run_says_why_instead_of_falling_back():
    y, x, key, bias, value, index, activation = arguments()
    neurons = Neurons(key, bias, value, activation)
    with backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' is forced, but .* on cpu"):
        dynamic_neuron(y, x, neurons, index)
    with backend("cuda"), pytest.raises(RuntimeError, match=r"softmax_entropy.*'cuda' is forced"):
        softmax_entropy(torch.randn(2, 3))
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match=r"float32, torch.float64; its kernels need one dtype"),
    ):
        dynamic_neuron(y.double(), x, neurons, index)


def test_unknown_backends_are_refused_by_name(monkeypatch):
    refused = pytest.raises(ValueError, match="backend is 'gpu'; it must be one of cuda, triton")
    with refused, backend("gpu"):
        pass
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'fast'"):
        dynamic_neuron(*(torch.zeros(1, 6), torch.zeros(1, 6)), some_neurons(1, 6, 6))


def test_every_backend_has_a_reason_or_none():
    reasons = usable_backends("cpu")
    assert list(reasons) == list(BACKENDS)
    assert reasons["cpu"] is None and reasons["reference"] is None
    assert "CUDA" in reasons["cuda"]


# ---- the modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(ops.__path__)])
def test_importing_a_module_of_ops_gives_the_module(name):
    importlib.import_module(f"meg_kernels.ops.{name}")
    assert inspect.ismodule(getattr(ops, name))


# ---- torch.library -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, bias, tokens, name):
    call = arguments(tokens, dtype, bias)
    with backend(name):
        torch.library.opcheck(LIBRARY.dynamic_neuron.default, call)
        torch.library.opcheck(LIBRARY.dynamic_neuron_.default, call)
        for needs in ([True] * 4, [False, True, False, True]):
            backward = (torch.randn_like(call[0]), *call[1:], needs)
            torch.library.opcheck(LIBRARY.dynamic_neuron_backward.default, backward)


@pytest.mark.parametrize("tokens", [None, 0, 4])
def test_opcheck_of_empty_batches(tokens):
    call = arguments(tokens, index=())
    torch.library.opcheck(LIBRARY.dynamic_neuron.default, call)
    torch.library.opcheck(
        LIBRARY.dynamic_neuron_backward.default, (*call[:-1], call[-1], [True] * 4)
    )


def test_results_of_strided_arguments_are_contiguous_as_the_fake_says():
    y, x, *rest = arguments()
    y, x = y.transpose(0, 1).contiguous().transpose(0, 1), x.expand(2, *x.shape)[1]
    torch.library.opcheck(LIBRARY.dynamic_neuron.default, (y, x, *rest))
    assert LIBRARY.dynamic_neuron(y, x, *rest).is_contiguous()


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [None, 4])
def test_the_cpus_gradients_are_autograds_of_the_reference(tokens, bias, activation):
    *tensors, index, name = arguments(
        tokens, torch.float64, bias, (2, -1, 0, 2), activation=activation
    )
    leaves = [part if part is None else part.requires_grad_() for part in tensors]
    wanted = [part for part in leaves if part is not None]
    y, x, key, offset, value = leaves
    neurons = Neurons(key, offset, value, name)
    upstream = torch.randn_like(y)
    by_definition = dynamic_neuron_reference(y, x, neurons, index)
    expected = torch.autograd.grad(by_definition, wanted, upstream)
    found = torch.autograd.grad(dynamic_neuron(y, x, neurons, index), wanted, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_gradients_that_nobody_wants_are_not_computed(name, monkeypatch):
    y, x, key, bias, value, index, activation = arguments()
    seen = []
    real = LIBRARY.dynamic_neuron_backward
    monkeypatch.setattr(
        LIBRARY, "dynamic_neuron_backward", lambda *rest: seen.append(rest[-1]) or real(*rest)
    )
    with backend(name):
        out = dynamic_neuron(y, x, Neurons(key, bias, value.requires_grad_(), activation), index)
        out.sum().backward()
    assert seen == [[False, False, False, True]] and value.grad is not None


def test_a_second_derivative_is_refused():
    y, x, key, bias, value, index, activation = arguments()
    out = dynamic_neuron(y, x.requires_grad_(), Neurons(key, bias, value, activation), index)
    with pytest.raises(RuntimeError, match=r"no second derivative; .* without create_graph"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_the_backward_pass_runs_on_the_backend_that_was_forced_for_the_forward():
    y, x, key, bias, value, index, activation = arguments()
    with backend("reference"):
        out = dynamic_neuron(y, x.requires_grad_(), Neurons(key, bias, value, activation), index)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "dynamic_neuron_backward" in str(func):
                seen.append(forced_backend())
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(out.sum(), x)
    assert seen == ["reference"] and forced_backend() != "reference"


@pytest.mark.parametrize("in_place", [True, False])
def test_large_batches_are_worked_on_in_blocks_with_the_same_bits(monkeypatch, in_place):
    y, x, *rest = arguments(4, index=(1, -1, 0, 2, 2))
    run = LIBRARY.dynamic_neuron
    expected = run(y, x, *rest)
    module = importlib.import_module("meg_kernels.ops.dynamic_neuron")
    monkeypatch.setattr(module, "_IN_CACHE", 50)  # two samples
    if in_place:
        LIBRARY.dynamic_neuron_(y, x, *rest)
    assert torch.equal(y if in_place else run(y, x, *rest), expected)


def test_autocast_does_not_reach_into_the_op():
    y, x, key, bias, value, index, activation = arguments()
    neurons = Neurons(key.requires_grad_(), bias, value, activation)
    plain = dynamic_neuron(y, x, neurons, index)
    (gradient,) = torch.autograd.grad(plain.sum(), key)
    for name in ("cpu", "reference"):
        with backend(name), torch.autocast("cpu", torch.bfloat16):
            out = dynamic_neuron(y, x, neurons, index)
            (found,) = torch.autograd.grad(out.sum(), key)
        torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


# ---- torch.compile -------------------------------------------------------------------------------


def test_a_compiled_layer_takes_other_neurons_without_compiling_again():
    layer, counter = MeGLinear(6, 6), CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, 4, 6)
    with torch.no_grad():
        for seed in range(4):
            neurons = some_neurons(3, 6, 6)
            neurons = Neurons(neurons.key + seed, neurons.bias, neurons.value, neurons.activation)
            index = torch.tensor([seed % 3, -1, 1])
            with layer.mounted(neurons, index):
                torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_a_compiled_model_with_mounted_neurons_is_one_graph_for_all_batches(tiny_model):
    model, counter = tiny_model("llama"), CompileCounter()
    attached = attach(model, 1)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(3, 60, (3, 5), generator=generator)
            parts = torch.randn(2, 2, 32, generator=generator)
            neurons = Neurons(parts[0], None, parts[1])
            with attached.neurons(neurons, torch.tensor([1, -1, seed % 2])):
                expected = model(input_ids=ids, use_cache=False).logits
                found = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, expected)
            assert not torch.equal(expected, model(input_ids=ids, use_cache=False).logits)
    assert counter.frame_count == 1


def test_gradients_flow_through_a_compiled_op():
    y, x, key, bias, value, index, activation = arguments()

    def loss(key):
        return dynamic_neuron(y, x, Neurons(key, bias, value, activation), index).square().sum()

    key.requires_grad_()
    (expected,) = torch.autograd.grad(loss(key), key)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(key), key)
    torch.testing.assert_close(found, expected)
