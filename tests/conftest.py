"""What every test shares: few threads, short property tests, tiny random language models.

And, for those who test kernels: every backend in turn, a faster Triton interpreter, which
multiplies bfloat16, csrc/ as compiled by g++, poisoned memory, and tensors too large for 32 bits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import os

import csrc_on_host
import kernel_checks
import pytest
import torch
import transformers

from meg_kernels.ops import native
from meg_kernels.ops.backend import backend

with torch.device("meta"):
    torch.empty(0)  # torch notes once which its constructors are: before a fixture patches them
torch.set_num_threads(int(os.environ.get("MEG_KERNELS_TEST_THREADS", "1")))
# Neither timing nor what this processor happens to multiply decides what a test runs.
os.environ["MEG_KERNELS_PACKING"] = "always"
os.environ["MEG_KERNELS_BFLOAT16"] = "never"
with contextlib.suppress(ImportError):  # a borrowed machine with a GPU may lack it
    from hypothesis import settings

    settings.register_profile("short", deadline=None, max_examples=25)
    settings.load_profile("short")

# What takes most of the suite's time: real models, compilers, Triton's interpreter, and whole edits
# of tiny models. `make test-fast` leaves these modules out.
SLOW = {
    "test_ahead_of_time",
    "test_attach",
    "test_attach_wrapped",
    "test_backend",
    "test_cli",
    "test_collect",
    "test_csrc",
    "test_distill",
    "test_dynamic_neuron_triton",
    "test_editor",
    "test_evaluate",
    "test_faults",
    "test_layers",
    "test_life",
    "test_linear_gelu",
    "test_models_tried",
    "test_modulated_norm",
    "test_quality_baselines",
    "test_quality_study",
    "test_quality_talk",
    "test_short_attention",
    "test_answers",
    "test_smollm2",
    "test_solver_step",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow modules."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


VOCABULARY = 67
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SPECIAL_TOKENS,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    **_SPECIAL_TOKENS,
}
_OPT = {
    **{name: value for name, value in _WIDE.items() if name != "intermediate_size"},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}
_TINY = {
    "gemma": ("Gemma", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", _GPT),
    "gpt_neox": ("GPTNeoX", _WIDE),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 5}),
    "opt": ("OPT", _OPT),
    "phi": ("Phi", _WIDE),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "smollm3": ("SmolLM3", {**_GROUPED, "no_rope_layer_interval": 2}),
}
_CAUSAL_LM = {"gpt2": "GPT2LMHeadModel"}


def _build(family: str, **overrides) -> transformers.PreTrainedModel:
    name, arguments = _TINY[family]
    config = getattr(transformers, f"{name}Config")(**{**arguments, **overrides})
    model = getattr(transformers, _CAUSAL_LM.get(family, f"{name}ForCausalLM"))(config).eval()
    # As initialised, weights are so small that a model of this width says the same whatever it
    # reads. Here every product keeps the scale of what it reads, and no bias or gain is idle.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / 32**0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.requires_grad_(False)


@functools.cache
def _built(family: str) -> transformers.PreTrainedModel:
    return _build(family)


@pytest.fixture
def undrawn():
    """undrawn(seed): whether torch's own random numbers are those that follow manual_seed(seed).

    Its state holds bytes that mean nothing, and that differ.
    """

    def ask(seed):
        own = torch.Generator().manual_seed(seed)
        return torch.equal(torch.randn(3), torch.randn(3, generator=own))

    return ask


@pytest.fixture
def tiny_model():
    """tiny_model(family, **config): a random model of 3 layers, width 32, float32, eval.

    The same weights at every call, and a model of its own for each, free to be changed.
    """

    def build(family: str, **overrides) -> transformers.PreTrainedModel:
        return _build(family, **overrides) if overrides else copy.deepcopy(_built(family))

    return build


@pytest.fixture(params=kernel_checks.BACKENDS)
def forced(request):
    """Every backend of an op without a CUDA kernel in turn, forced."""
    with backend(request.param):
        yield request.param


@pytest.fixture
def far(monkeypatch):
    """far(tensor, dim=0): the same elements, so far apart in `dim` that 32 bits do not count them.

    One step of `dim` still fits in 32 bits, two do not.
    """
    if torch.cuda.is_available():
        pytest.skip("a GPU would really need the memory")
    # The interpreter would copy all arguments back to where they are: 4 GiB that nobody touches.
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)

    def spread(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        strides = list(torch.empty(tensor.shape, device="meta").stride())
        strides[dim] = 2**30 + 8
        elements = (tensor.shape[dim] - 1) * strides[dim] + tensor.numel()
        memory = torch.UntypedStorage(tensor.element_size() * elements)
        view = torch.tensor([], dtype=tensor.dtype).set_(memory, 0, tensor.shape, strides)
        return view.copy_(tensor)

    return spread


@pytest.fixture(scope="session")
def host_extension(tmp_path_factory) -> csrc_on_host.HostExtension:
    """The kernels of csrc/ as compiled by g++."""
    return csrc_on_host.HostExtension.build(tmp_path_factory.mktemp("csrc"))


@pytest.fixture
def on_host(host_extension, monkeypatch) -> None:
    """meg_kernels.ops.native calls the kernels as compiled by g++, on a CPU's tensors."""
    monkeypatch.setattr(native, "_extension", lambda: host_extension)
    monkeypatch.setattr(native, "unavailable_reason", lambda device=None: None)
    monkeypatch.setattr(native, "_stream", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def csrc_device(request) -> str:
    """Where the kernels of csrc/ run: "cpu" as compiled by g++, or "cuda" on a GPU."""
    if request.param == "host":
        request.getfixturevalue("on_host")
        return "cpu"
    if (reason := native.unavailable_reason()) is not None:
        pytest.skip(f"no CUDA kernels: {reason}")
    return "cuda"


@pytest.fixture(scope="module")
def faster_interpreter():
    """Triton's interpreter, where it runs the kernels, without its needless repetitions.

    It prepares `tl` anew at every call of one kernel function by another. That takes most of its
    time, and once per module of functions is enough.
    """
    if torch.cuda.is_available():
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    prepared = set()

    def call(function, *args, **kwargs):
        module = function.fn.__module__
        if module not in prepared:
            interpreter._patch_lang(function.fn)
            prepared.add(module)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(scope="module")
def poisoned_memory():
    """Uninitialised memory holds NaN, or -99: a kernel that forgets an element shows."""

    def poisoned(allocate):
        def fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -99)

        return fill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        yield


@pytest.fixture(scope="module")
def within_memory():
    """What Triton's interpreter reads and writes lies in the memory of the kernel's arguments.

    It follows any address, and what is read beyond the end often changes no result.
    """
    if torch.cuda.is_available():
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, memories = executor._init_args_hst, []

    def noting(self, *arguments):
        prepared = prepare(self, *arguments)
        tensors = [part for part in prepared[0] if isinstance(part, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        memories[:] = [(part.data_ptr(), part.data_ptr() + part.nbytes()) for part in storages]
        return prepared

    def checked(access, where):
        def run(self, pointers, *rest):
            addresses = pointers.data[rest[where].data.astype(bool)]
            size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            outside = addresses.astype(bool)
            for first, end in memories:
                outside &= (addresses < first) | (addresses > end - size)
            assert not outside.any(), "a kernel reads or writes beyond its arguments"
            return access(self, pointers, *rest)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", noting)
        for name, where in (("create_masked_load", 0), ("create_masked_store", 1)):
            patch.setattr(builder, name, checked(getattr(builder, name), where))
        yield


@pytest.fixture(scope="module")
def bfloat16_products():
    """Triton's interpreter multiplies bfloat16, not their bits as integers, as it would."""
    if torch.cuda.is_available():
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def widened(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        values = (handle.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    def create_dot_of_values(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", create_dot_of_values)
        yield
