"""The CUDA kernels of csrc/: their arithmetic on the host, their machine code, and on a GPU.

csrc/host/cuda_shim.h lets g++ compile the kernel and its launcher unchanged, so the arithmetic is
tested on any machine. nvcc needs no GPU either: registers, spills and load widths are read from
what it compiled. Only the last tests need a device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meg_kernels.ops import native

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ACTIVATIONS = {
    "identity": lambda a: a,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda a: torch.nn.functional.gelu(a, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}
POISON = -77.0


@dataclass
class Case:
    """Arguments of one call. x [M, d_in], y [M, d_out], index [ceil(M / tokens_per_index)]."""

    y: Tensor
    x: Tensor
    key: Tensor
    bias: Tensor | None
    value: Tensor
    index: Tensor
    activation: str = "gelu_tanh"
    tokens_per_index: int = 1

    def neuron_of_row(self) -> Tensor:
        return self.index.repeat_interleave(self.tokens_per_index)[: len(self.x)]

    def reference(self) -> Tensor:
        """The definition in float64, rounded once to the dtype of y."""
        i = self.neuron_of_row()
        used = i.clamp(min=0)
        before = (self.x.double() * self.key.double()[used]).sum(-1)
        if self.bias is not None:
            before = before + self.bias.double()[used]
        gate = ACTIVATIONS[self.activation](before)
        edited = self.y.double() + gate[:, None] * self.value.double()[used]
        return torch.where(i[:, None] >= 0, edited, self.y.double())


def rows(values: Tensor, padding: int, offset: int) -> Tensor:
    """`values` as rows with `padding` poisoned elements between them, `offset` into a buffer."""
    count, width = values.shape
    buffer = values.new_full((offset + count * (width + padding),), POISON)
    view = buffer[offset:].view(count, width + padding)[:, :width]
    return view.copy_(values)


def make_case(
    dtype: torch.dtype,
    d_in: int = 40,
    d_out: int = 24,
    index: tuple[int, ...] = (0, -1, 2, 1, 0),
    padding: int = 0,
    offset: int = 0,
    with_bias: bool = True,
    activation: str = "gelu_tanh",
    tokens_per_index: int = 1,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(d_in * 1000 + d_out)

    def random(count: int, width: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(count, width, generator=generator) * scale
        return rows(values.to(device, dtype), padding, offset)

    neurons = max(max(index, default=0), 0) + 1
    tokens = len(index) * tokens_per_index
    return Case(
        y=random(tokens, d_out),
        x=random(tokens, d_in),
        key=random(neurons, d_in, scale=1 / math.sqrt(d_in)),
        bias=random(neurons, 1).reshape(-1).contiguous() if with_bias else None,
        value=random(neurons, d_out),
        index=torch.tensor(index, dtype=torch.int64, device=device),
        activation=activation,
        tokens_per_index=tokens_per_index,
    )


def assert_close(actual: Tensor, case: Case, before: Case) -> None:
    """Within a rounding of the output's dtype, plus float32 rounding of a sum of d_in terms."""
    expected = before.reference()
    epsilon = torch.finfo(actual.dtype).eps
    sum_error = 2 * math.sqrt(case.x.shape[-1]) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        actual.double(), expected, rtol=0.51 * epsilon + sum_error, atol=8 * sum_error
    )
    untouched = before.neuron_of_row() < 0
    assert torch.equal(actual[untouched], before.y[untouched])


# ---- on the host -------------------------------------------------------------------------------


class Arguments(ctypes.Structure):
    """DynamicNeuronArgs of csrc/dynamic_neuron.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "x", "key", "bias", "value", "index")),
        *((name, ctypes.c_int64) for name in ("M", "d_in", "d_out")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("y", "x", "key", "value")),
        *((name, ctypes.c_int64) for name in ("tokens_per_index", "dtype", "activation", "device")),
        ("stream", ctypes.c_void_p),
    ]


def arguments(case: Case) -> Arguments:
    return Arguments(
        y=case.y.data_ptr(),
        x=case.x.data_ptr(),
        key=case.key.data_ptr(),
        bias=None if case.bias is None else case.bias.data_ptr(),
        value=case.value.data_ptr(),
        index=case.index.data_ptr(),
        M=len(case.x),
        d_in=case.x.shape[1],
        d_out=case.y.shape[1],
        y_stride=case.y.stride(0),
        x_stride=case.x.stride(0),
        key_stride=case.key.stride(0),
        value_stride=case.value.stride(0),
        tokens_per_index=case.tokens_per_index,
        dtype=native.DTYPES.index(case.y.dtype),
        activation=native.ACTIVATIONS.index(case.activation),
    )


@pytest.fixture(scope="session")
def host_kernel(tmp_path_factory):
    """`run(case)`: the launcher and kernel compiled by g++, with the result code checked."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("csrc") / "dynamic_neuron_host.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC"]
    source = CSRC / "dynamic_neuron.cu"
    subprocess.run([compiler, *flags, "-x", "c++", str(source), "-o", str(library)], check=True)
    forward = ctypes.CDLL(str(library)).dynamic_neuron_forward

    def run(case: Case) -> Tensor:
        code = forward(ctypes.byref(arguments(case)))
        assert code == 0, f"the launcher returned {code}"
        return case.y

    run.forward = forward
    return run


def copied(case: Case) -> Case:
    return Case(**{**vars(case), "y": case.y.clone()})


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_host_kernel_matches_float64(host_kernel, dtype, activation):
    case = make_case(dtype, activation=activation)
    before = copied(case)
    assert_close(host_kernel(case), case, before)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d_in", "d_out", "padding", "offset"),
    [
        (1, 1, 0, 0),
        (7, 13, 0, 0),  # misaligned rows, shorter than a vector
        (37, 41, 3, 0),  # rows apart by a multiple of 16 bytes in float32 only
        (33, 65, 7, 8),  # 16-byte rows with a ragged end
        (64, 32, 0, 1),  # a misaligned first row
        (4100, 5200, 0, 0),  # more than one batch of loads per thread
        (4099, 5203, 0, 0),
    ],
)
def test_host_kernel_takes_any_width_stride_and_alignment(
    host_kernel, dtype, d_in, d_out, padding, offset
):
    case = make_case(dtype, d_in, d_out, padding=padding, offset=offset)
    before = copied(case)
    assert_close(host_kernel(case), case, before)


@pytest.mark.parametrize("misaligned", ["y", "x", "key", "value"])
def test_one_misaligned_argument_is_enough_for_scalar_loads(host_kernel, misaligned):
    for offset, padding in ((1, 0), (0, 1)):  # the first row, and the distance between rows
        case = make_case(torch.bfloat16, 64, 64)
        setattr(case, misaligned, rows(getattr(case, misaligned), padding, offset))
        before = copied(case)
        assert_close(host_kernel(case), case, before)


def test_host_kernel_writes_nothing_beside_its_rows(host_kernel):
    case = make_case(torch.float16, 40, 21, padding=3, offset=5)
    buffer = case.y._base
    assert (buffer == POISON).sum() == 5 + 3 * len(case.y)
    host_kernel(case)
    assert (buffer == POISON).sum() == 5 + 3 * len(case.y)


def test_rows_without_a_neuron_keep_their_bits_even_nan(host_kernel):
    case = make_case(torch.bfloat16, index=(-1, 0, -1))
    case.y[0] = float("nan")
    case.x[2] = float("inf")
    before = case.y.clone()
    host_kernel(case)
    assert torch.equal(case.y[[0, 2]].view(torch.int16), before[[0, 2]].view(torch.int16))
    assert not torch.equal(case.y[1], before[1])


def test_nan_and_infinity_reach_the_output(host_kernel):
    for activation in native.ACTIVATIONS:
        case = make_case(torch.float32, index=(0, 0), activation=activation)
        case.x[0, 3] = float("nan")
        host_kernel(case)
        assert case.y[0].isnan().all()
        assert case.y[1].isfinite().all()


def test_one_index_serves_all_tokens_of_a_sample(host_kernel):
    case = make_case(torch.float32, index=(1, -1, 0), tokens_per_index=4)
    before = copied(case)
    assert_close(host_kernel(case), case, before)


def test_the_last_sample_may_be_cut_short(host_kernel):
    case = make_case(torch.float32, index=(1, 0), tokens_per_index=3)
    case.x, case.y = case.x[:4], case.y[:4]
    before = copied(case)
    assert_close(host_kernel(case), case, before)


def test_without_bias(host_kernel):
    case = make_case(torch.bfloat16, with_bias=False)
    before = copied(case)
    assert_close(host_kernel(case), case, before)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_nor_on_alignment(host_kernel, dtype):
    index = (2, -1, 0, 1, 2)
    batch = make_case(dtype, 1037, 1029, index)
    alone = [make_case(dtype, 1037, 1029, index) for _ in index]
    # Rows of a multiple of 16 bytes take the vector path; those of the batch above do not.
    aligned = make_case(dtype, 1037, 1029, index, padding=(-1037) % 8 + 16)
    aligned.y = rows(aligned.y.clone(), (-1029) % 8, 0)
    together = host_kernel(batch)
    for m, case in enumerate(alone):
        case.x, case.y, case.index = case.x[m : m + 1], case.y[m : m + 1], case.index[m : m + 1]
        assert torch.equal(host_kernel(case), together[m : m + 1])
    assert torch.equal(host_kernel(aligned), together)


def test_an_empty_batch_is_a_success(host_kernel):
    host_kernel(make_case(torch.float32, index=()))


def test_more_rows_than_a_small_grid_dimension_holds(host_kernel):
    many = 65_537
    case = make_case(torch.float32, 4, 4, index=(0,))
    case.x, case.y = case.x.repeat(many, 1), case.y.repeat(many, 1)
    case.index = torch.full((many,), -1)
    case.index[-1] = 0
    before = copied(case)
    assert_close(host_kernel(case), case, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", 3), ("activation", 5), ("activation", -1), ("tokens_per_index", 0), ("M", 2**31)],
)
def test_arguments_out_of_range_are_refused(host_kernel, field, value):
    bad = arguments(make_case(torch.float32))
    setattr(bad, field, value)
    assert host_kernel.forward(ctypes.byref(bad)) == 1  # cudaErrorInvalidValue


# ---- the machine code --------------------------------------------------------------------------

# Blocks per SM times threads, as the kernel asks for, leave this many of the 65,536 registers.
REGISTERS = 65_536 // (8 * 128)


@dataclass
class Compiled:
    """One architecture: what ptxas printed, and the path of the machine code."""

    messages: str
    cubin: Path


@pytest.fixture(scope="session")
def build_script():
    spec = importlib.util.spec_from_file_location("meg_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=["sm_80", "sm_90a", "sm_100"])
def compiled(request, build_script, tmp_path_factory) -> Compiled:
    try:
        nvcc = build_script.find_nvcc()
    except build_script.BuildError as error:
        pytest.skip(str(error))
    cubin = tmp_path_factory.mktemp("cubin") / f"{request.param}.cubin"
    result = subprocess.run(
        [
            nvcc,
            *build_script.compile_flags([request.param]),
            *("-Xptxas", "-v", "-cubin", str(CSRC / "dynamic_neuron.cu"), "-o", str(cubin)),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return Compiled(result.stderr, cubin)


def disassembler() -> str:
    """nvdisasm of the CUDA toolkit, or else the one inside the triton wheel."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(bundled) if bundled.exists() else None
    if found is None:
        pytest.skip("nvdisasm is neither on PATH nor in the triton wheel")
    return found


def test_kernels_do_not_spill_and_leave_room_for_eight_blocks(compiled):
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", compiled.messages)
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", compiled.messages)]
    assert stacks == [("0", "0")] * 6  # three dtypes, with and without vector loads
    assert len(registers) == 6
    assert max(registers) <= REGISTERS


def test_vector_kernels_load_16_bytes_and_wait_once_per_batch(compiled):
    listing = subprocess.run(
        [disassembler(), "-c", str(compiled.cubin)], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"\.section\s+\.text\.", listing)[1:]
    vector = [text for text in functions if "Lb1E" in text.split(",")[0]]
    scalar = [text for text in functions if "Lb0E" in text.split(",")[0]]
    assert len(vector) == len(scalar) == 3
    for text in scalar:
        assert "G.E.128" not in text
    for text in vector:
        opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
        loads = [op for op in opcodes if re.match(r"LDG\.E\.128", op)]
        stores = [op for op in opcodes if re.match(r"STG\.E\.128", op)]
        assert len(loads) == 16  # four each of x, key, value and y
        assert len(stores) == 4
        # All eight loads of a step of the dot product come before its first multiplication.
        first = opcodes.index(loads[0])
        in_flight = opcodes[first : opcodes.index("FFMA", first)]
        assert sum(op.startswith("LDG.E.128") for op in in_flight) == 8


# ---- the extension module ----------------------------------------------------------------------


@pytest.fixture
def extension():
    return pytest.importorskip("meg_kernels._C", reason="the CUDA extension is not built")


def test_extension_agrees_with_the_python_side_on_codes(extension):
    assert tuple(f"torch.{name}" for name in extension.DTYPES) == tuple(map(str, native.DTYPES))
    assert extension.ACTIVATIONS == native.ACTIVATIONS == tuple(ACTIVATIONS)


def test_extension_needs_no_cuda_library_to_import(extension):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run([readelf, "-d", extension.__file__], capture_output=True, text=True)
    assert "libcuda" not in needed.stdout


def test_extension_reports_cuda_errors_as_codes(extension):
    sizes = {name: 1 for name, kind in Arguments._fields_ if kind is ctypes.c_int64}
    pointers = {name: 0 for name, kind in Arguments._fields_ if kind is ctypes.c_void_p}
    launch = {**sizes, **pointers}
    assert extension.dynamic_neuron_forward(**{**launch, "M": 0}) == 0
    assert extension.dynamic_neuron_forward(**{**launch, "activation": 9}) == 1
    assert extension.error_string(1) == "invalid argument"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_reason_is_said(extension):
    assert not native.available()
    with pytest.raises(RuntimeError, match="CUDA"):
        native.load()
    case = make_case(torch.float32)
    with pytest.raises(RuntimeError, match="dynamic_neuron_: PyTorch"):
        native.dynamic_neuron_(
            case.y, case.x, case.key, case.bias, case.value, case.index, case.activation
        )


@pytest.mark.parametrize(
    ("architecture", "capability", "serves"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100", (10, 3), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("compute_80", (12, 0), True),
        ("compute_90", (8, 9), False),
    ],
)
def test_which_chips_a_build_serves(architecture, capability, serves):
    assert native._serves(architecture, *capability) is serves


def test_layouts_the_kernel_cannot_take_are_named():
    good = make_case(torch.float32, 8, 8, padding=8)
    parts = {name: getattr(good, name) for name in ("y", "x", "key", "bias", "value", "index")}
    assert native.layout_problem(**parts) is None
    for name in ("y", "x", "key", "value"):
        transposed = parts[name].T.contiguous().T
        assert native.layout_problem(**{**parts, name: transposed}).startswith(name)
    batched = torch.zeros(4, 3, 8)
    assert native.layout_problem(**{**parts, "y": batched, "x": batched[:, :1]}) is None
    assert native.layout_problem(**{**parts, "x": batched[:, :2]}).startswith("x (4, 2, 8)")
    assert native.layout_problem(**{**parts, "x": batched.transpose(0, 1)}).startswith("x")
    strided = torch.arange(10)[::2]
    assert native.layout_problem(**{**parts, "index": strided}).startswith("index")
    with pytest.raises(ValueError, match=r"dynamic_neuron_: index .* \.contiguous\(\)"):
        native.dynamic_neuron_(**{**parts, "index": strided}, activation="silu")


# ---- building ----------------------------------------------------------------------------------


def test_architectures_come_from_the_environment(build_script, monkeypatch):
    monkeypatch.setenv("MEG_KERNELS_CUDA_ARCHS", "sm_90a;compute_100, sm_80")
    assert build_script.architectures() == ["sm_90a", "compute_100", "sm_80"]
    assert "arch=compute_90a,code=sm_90a" in build_script.compile_flags(["sm_90a"])
    assert "arch=compute_100,code=compute_100" in build_script.compile_flags(["compute_100"])


def test_a_wrong_cuda_home_is_named(build_script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build_script.BuildError, match="has no bin/nvcc"):
        build_script.find_nvcc()


def test_without_nvcc_nothing_is_built_unless_demanded(build_script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("MEG_KERNELS_BUILD_CUDA", raising=False)
    monkeypatch.setattr("sys.argv", ["setup.py", "bdist_wheel"])
    with pytest.warns(UserWarning, match="OFF .* has no bin/nvcc.* MEG_KERNELS_BUILD_CUDA=1"):
        assert build_script.extensions() == []
    monkeypatch.setenv("MEG_KERNELS_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="has no bin/nvcc"):
        build_script.extensions()


# ---- on a GPU ----------------------------------------------------------------------------------


def run_on_gpu(case: Case) -> Tensor:
    return native.dynamic_neuron_(
        case.y, case.x, case.key, case.bias, case.value, case.index, case.activation
    )


needs_kernels = pytest.mark.skipif(
    not native.available(), reason=f"no CUDA kernels: {native.unavailable_reason()}"
)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d_in", "d_out", "padding", "offset"),
    [(576, 576, 0, 0), (2560, 2560, 0, 0), (1037, 1029, 0, 0), (64, 32, 0, 1), (33, 65, 7, 8)],
)
def test_gpu_kernel_matches_float64(dtype, activation, d_in, d_out, padding, offset):
    case = make_case(
        dtype, d_in, d_out, (0, -1, 2, 1, 0), padding, offset, True, activation, device="cuda"
    )
    before = copied(case)
    assert_close(run_on_gpu(case), case, before)


@pytest.mark.gpu
@needs_kernels
def test_gpu_kernel_takes_batches_of_sequences_and_many_rows():
    samples, tokens, width = 700, 100, 64
    case = make_case(torch.bfloat16, width, width, tuple(range(-1, samples - 1)), device="cuda")
    case.x = torch.randn(samples * tokens, width, device="cuda", dtype=torch.bfloat16)
    case.y = torch.randn_like(case.x)
    case.tokens_per_index = tokens
    before = copied(case)
    y = native.dynamic_neuron_(
        case.y.view(samples, tokens, width),
        case.x.view(samples, tokens, width),
        case.key,
        case.bias,
        case.value,
        case.index,
        case.activation,
    )
    assert_close(y.view(-1, width), case, before)


@pytest.mark.gpu
@needs_kernels
def test_gpu_kernel_runs_on_the_current_stream_and_in_a_graph():
    case = make_case(torch.float32, 576, 576, device="cuda")
    run_on_gpu(case)  # loads the kernel before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_on_gpu(case)
    case.x.normal_()
    before = copied(case)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(case.y, case, before)
