"""csrc/ as a whole: its machine code, the extension module, how it is built, compute-sanitizer.

nvcc needs no GPU: registers, spills and load widths are read from what it compiled. What the
kernels compute is in test_dynamic_neuron_cuda.py and test_softmax_entropy.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from csrc_on_host import CSRC, ROOT, SOURCES

from meg_kernels import neuron
from meg_kernels.kernels.limits import ACTIVATIONS, DTYPES
from meg_kernels.neuron import Neurons
from meg_kernels.ops import native

# ---- the machine code --------------------------------------------------------------------------


@dataclass
class Compiled:
    """One source for one architecture: what ptxas printed, and the path of the machine code."""

    source: str
    messages: str
    cubin: Path


@pytest.fixture(scope="session")
def build_script():
    spec = importlib.util.spec_from_file_location("meg_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=["sm_80", "sm_90a", "sm_100"])
def compiled(request, build_script, tmp_path_factory) -> dict[str, Compiled]:
    try:
        nvcc = build_script.find_nvcc()
    except build_script.BuildError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("cubin")
    results = {}
    for source in SOURCES:
        cubin = directory / f"{source}.{request.param}.cubin"
        flags = [*build_script.compile_flags([request.param]), "-Xptxas", "-v", "-cubin"]
        result = subprocess.run(
            [nvcc, *flags, str(CSRC / f"{source}.cu"), "-o", str(cubin)],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        results[source] = Compiled(source, result.stderr, cubin)
    return results


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


# Kernels, by dtype and load width, and the registers that leave as many threads resident on an SM
# as the kernel counts on: 512 of the token kernels, 1024 of the others.
KERNELS = {
    "dynamic_neuron": {
        "21dynamic_neuron_kernel": (6, 128),
        "35dynamic_neuron_backward_rows_kernel": (6, 128),
        "38dynamic_neuron_backward_neurons_kernel": (6, 64),
    },
    "softmax_entropy": {"22softmax_entropy_kernel": (3, 64)},
}


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_do_not_spill_and_leave_room_for_enough_threads(compiled, source):
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        compiled[source].messages,
        re.S,
    )
    for kernel, (count, limit) in KERNELS[source].items():
        versions = [entry for entry in report if entry[0].startswith(f"_Z{kernel}I")]
        assert len(versions) == count
        for name, *spills, registers in versions:
            assert spills == ["0", "0", "0"], name
            assert int(registers) <= limit, name
    assert len(report) == sum(count for count, _ in KERNELS[source].values())


def test_vector_kernels_move_16_bytes_and_wait_once_for_all_loads(compiled):
    listing = subprocess.run(
        [disassembler(), "-c", str(compiled["dynamic_neuron"].cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions = {
        text.split(",")[0]: re.findall(
            r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M
        )
        for text in re.split(r"\.section\s+\.text\.", listing)[1:]
    }
    for name, opcodes in functions.items():
        loads = [at for at, op in enumerate(opcodes) if re.match(r"LDG\.E.*\.128", op)]
        stores = [at for at, op in enumerate(opcodes) if re.match(r"STG\.E.*\.128", op)]
        if "Lb0E" in name:
            assert not loads and not stores, name
            continue
        assert stores, name
        # Before the first product: four chunks of each of four rows, of which the compiler may let
        # two slip, or one chunk of each of four tokens.
        product = next(at for at in range(loads[0], len(opcodes)) if opcodes[at] == "FFMA")
        in_flight = sum(at < product for at in loads)
        assert in_flight >= (4 if "backward_neurons" in name else 14), name
    assert sum("Lb1E" in name for name in functions) == 9


# ---- the extension module ----------------------------------------------------------------------


@pytest.fixture
def extension():
    return pytest.importorskip("meg_kernels._C", reason="the CUDA extension is not built")


def test_extension_agrees_with_the_python_side_on_codes(extension):
    assert tuple(f"torch.{name}" for name in extension.DTYPES) == tuple(map(str, DTYPES))
    assert extension.ACTIVATIONS == ACTIVATIONS == tuple(neuron.ACTIVATIONS)


def test_extension_needs_no_cuda_library_to_import(extension):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run([readelf, "-d", extension.__file__], capture_output=True, text=True)
    assert "libcuda" not in needed.stdout


INVALID = 1  # cudaErrorInvalidValue


@pytest.mark.parametrize(
    ("changed", "activation"),
    [
        ({"dtype": 3}, 0),
        ({"samples": 2**31}, 0),
        ({"tokens": 2**30}, 0),
        ({"d_in": 2**31}, 0),
        ({"d_out": 2**31}, 0),
        ({}, 5),
        ({}, -1),
    ],
)
@pytest.mark.parametrize("compiler", ["g++", "nvcc"])
def test_arguments_out_of_range_are_refused(request, compiler, changed, activation):
    built = request.getfixturevalue("host_extension" if compiler == "g++" else "extension")
    if compiler == "nvcc" and "dtype" in changed and not torch.cuda.is_available():
        pytest.skip("the device is looked at before the dtype")
    sizes = {"samples": 3, "tokens": 4, "neurons": 1, "d_in": 8, "d_out": 8, "dtype": 0}
    shape = tuple({**sizes, **changed}.values())
    nowhere, neurons = (0, 0, 0), ((0, 0), 0, (0, 0), activation)
    call = (neurons, 0, shape, (0, 0))
    assert built.dynamic_neuron_forward(nowhere, nowhere, nowhere, *call) == INVALID
    gradients = (nowhere, 0, 0, 0)
    assert (
        built.dynamic_neuron_backward(nowhere, nowhere, *call, gradients, (0, 0, 0, 0)) == INVALID
    )


def test_extension_reports_cuda_errors_as_codes(extension):
    nowhere, neurons, empty = (0, 0, 0), ((0, 0), 0, (0, 0), 0), (0, 1, 1, 8, 8, 0)
    assert (
        extension.dynamic_neuron_forward(nowhere, nowhere, nowhere, neurons, 0, empty, (0, 0)) == 0
    )
    assert extension.softmax_entropy((0, 0), (0, 10, 0), 0, (0, 0)) == 0
    assert extension.softmax_entropy((0, 0), (-1, 1, 0), 0, (0, 0)) == INVALID
    assert extension.error_string(INVALID) == "invalid argument"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_reason_is_said(extension):
    assert "CUDA" in native.unavailable_reason()
    rows, index = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    neurons = Neurons(rows, None, rows)
    with pytest.raises(RuntimeError, match="dynamic_neuron forward: PyTorch"):
        native.dynamic_neuron_forward(rows, rows, rows, neurons, index)
    with pytest.raises(RuntimeError, match="dynamic_neuron backward: PyTorch"):
        native.dynamic_neuron_backward(rows, rows, neurons, index, (True,) * 4)
    with pytest.raises(RuntimeError, match="softmax_entropy: PyTorch"):
        native.softmax_entropy(rows)


@pytest.mark.parametrize("device, asked", [(None, 3), ("cuda", 3), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_without_a_number_is_the_current_one(device, asked, monkeypatch):
    monkeypatch.setattr(native, "_reason_anywhere", lambda: None)
    monkeypatch.setattr(native, "_reason_on", lambda number: f"chip {number}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    device = None if device is None else torch.device(device)
    assert native.unavailable_reason(device) == f"chip {asked}"


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


# ---- building ----------------------------------------------------------------------------------


def test_every_file_of_csrc_is_named_in_the_build(build_script):
    named = {*build_script.SOURCES, *build_script.HEADERS}
    assert named == {f"csrc/{path.name}" for path in CSRC.iterdir() if path.is_file()}


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


# ---- only on a GPU -----------------------------------------------------------------------------


SANITIZED = """
import torch
import test_dynamic_neuron_cuda as t
from meg_kernels.ops import native
for d_in, d_out, padding, offset in [(576, 136, 0, 0), (37, 41, 3, 1), (2056, 4104, 0, 0)]:
    for dtype in (torch.float32, torch.bfloat16):
        case = t.make_case(
            dtype, d_in, d_out, tokens=3, padding=padding, offset=offset, device="cuda"
        )
        t.check_backward(case)
        t.check_forward(case)
logits = torch.randn(41, 10, generator=torch.Generator().manual_seed(0))
expected = torch.distributions.Categorical(logits=logits.double()).entropy()
entropy = native.softmax_entropy(logits.cuda())
torch.testing.assert_close(entropy.double().cpu(), expected, rtol=1e-5, atol=1e-6)
print("through")
"""


@pytest.mark.gpu
@pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=f"no CUDA kernels: {native.unavailable_reason()}",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    result = subprocess.run(
        [
            *(sanitizer, "--tool", tool, "--error-exitcode", "9"),
            *("--report-api-errors", "no"),  # PyTorch asks for what may be missing
            *(argument for name in SOURCES for argument in ("--kernel-name", f"kns={name}")),
            *(sys.executable, "-c", SANITIZED),
        ],
        cwd=ROOT / "tests",
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            # Each tensor in its own allocation: in PyTorch's pool a slip lands in a neighbour.
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        },
        capture_output=True,
        text=True,
    )
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer cannot work on this machine: Device not supported")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "through" in result.stdout
