"""The machine code of the Triton kernels, for the chips they are meant for, read without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from ahead_of_time import ARCHITECTURES, Compiled, configurations, name_of

ROOT = Path(__file__).resolve().parents[1]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may use
REGISTERS = 65_536  # of a multiprocessor
# How loads are ordered, and whether two registers are kept on the stack, is the compiler's.
IS_PROMISED = not triton.__version__.startswith(("3.6.", "3.7."))


@pytest.fixture(scope="session")
def report(pytestconfig) -> dict:
    """What tests/ahead_of_time.py prints; kept by pytest until a kernel or Triton changes."""
    script = ROOT / "tests" / "ahead_of_time.py"
    sources = sorted((ROOT / "meg_kernels" / "kernels").glob("*.py"))
    contents = b"".join(source.read_bytes() for source in [script, *sources])
    key = f"meg_kernels/{triton.__version__}-{hashlib.sha256(contents).hexdigest()}"
    report = pytestconfig.cache.get(key, None)
    if report is None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        result = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        pytestconfig.cache.set(key, report)
    return report


@pytest.fixture(scope="session")
def everything(report) -> dict[tuple[int, str], Compiled]:
    compiled = [Compiled(**one) for one in report["compiled"]]
    return {(one.architecture, one.name): one for one in compiled}


def narrower(widths: dict[str, int]) -> int:
    """How many loads or stores move less than 16 bytes."""
    return sum(widths.values()) - widths.get("128", 0)


NAMES = [name_of(configuration) for configuration in configurations()]


@pytest.fixture
def compiled(everything, architecture, name) -> Compiled:
    return everything[architecture, name]


def each(*kernels: str, only: str = "", architectures: tuple[int, ...] = ARCHITECTURES):
    """Parametrize a test by all compiled configurations of these kernels whose name has `only`."""
    names = [name for name in NAMES if name.split("-")[0] in kernels and only in name]
    assert names

    def parametrize(test):
        test = pytest.mark.parametrize("name", names)(test)
        return pytest.mark.parametrize("architecture", architectures, ids="sm_{}".format)(test)

    return parametrize


def test_no_launcher_has_anything_compiled_that_is_not_listed(report):
    assert report["launches"] == []


@each("forward", "backward_rows", "sum_rows", "softmax_entropy", "solver_step")
def test_code_fits_the_chip_and_does_not_spill(compiled):
    assert compiled.spills == compiled.stack == compiled.local == 0
    assert compiled.registers <= 255
    assert compiled.shared <= SHARED_MEMORY[compiled.architecture]
    # At least two programs at a time, so that one computes while another waits for memory.
    assert 2 * compiled.threads * compiled.registers <= REGISTERS


@each("forward", only="ROWS_ALIGNED=True-NEURONS_ALIGNED=True")
def test_forward_moves_16_bytes_at_a_time(compiled):
    assert narrower(compiled.loads) == 2  # the row's number in index, and the bias
    assert narrower(compiled.stores) == 0 < compiled.stores["128"]


@each("backward_rows", only="ROWS_ALIGNED=True-NEURONS_ALIGNED=True")
def test_backward_moves_16_bytes_at_a_time(compiled):
    assert narrower(compiled.loads) == 2  # the row's number in index, and the bias
    assert narrower(compiled.stores) == 2  # the activation and its gradient
    assert compiled.stores["128"] > 0


@each("forward", "backward_rows", only="ROWS_ALIGNED=True-NEURONS_ALIGNED=False")
def test_misaligned_neurons_leave_the_rows_their_16_bytes(compiled):
    assert compiled.loads["128"] >= 4  # two for the first block of either row
    assert compiled.stores["128"] >= 2


@each("sum_rows", only="-ALIGNED=True")
def test_sums_over_rows_load_16_bytes_at_a_time(compiled):
    assert compiled.loads["128"] >= 2


# For sm_80 ptxas moves some of these loads behind the dot product.
@each("forward", "backward_rows", only="=True-NEURONS_ALIGNED=True", architectures=(90, 100))
def test_the_first_block_of_all_four_rows_is_asked_for_at_once(compiled):
    assert compiled.in_flight == 8  # 32 bytes of each row


@each("solver_step", only="-ALIGNED=True")
def test_a_solver_step_moves_16_bytes_of_its_state_at_a_time(compiled):
    # x_t, x0 of before and noise, two vectors each; prediction and variance match them in elements.
    wide = {"128": 10} if "-fp32-" in compiled.name else {"128": 6, "64": 4}
    assert compiled.loads == {"32": 8, **wide}  # and the eight coefficients
    assert compiled.stores == {"128": 4}
    assert compiled.shared == 0  # nothing changes threads


@each("modulated_norm")
def test_a_norm_fits_the_chip_and_does_not_spill(compiled):
    assert compiled.spills == compiled.stack == compiled.local == 0
    # Of the widest rows one program is enough: 8192 elements from five tensors are on their way.
    programs = 2 if "-ALIGNED=True" in compiled.name else 1
    assert programs * compiled.threads * compiled.registers <= REGISTERS
    assert compiled.shared <= SHARED_MEMORY[compiled.architecture]


@each("modulated_norm", only="-ALIGNED=True")
def test_a_norm_keeps_each_row_in_one_warp_and_moves_16_bytes_at_a_time(compiled):
    assert compiled.shared == 0  # warps exchange nothing
    assert narrower(compiled.loads) == narrower(compiled.stores) == 0
    # Of x, update, gate, shift and scale; at least the first three before anything waits.
    assert compiled.in_flight >= 3 / 5 * compiled.loads["128"] > 0 or not IS_PROMISED
    assert compiled.stores["128"] == 2 / 5 * compiled.loads["128"]


@each("short_attention")
def test_attention_fits_the_chip_and_does_not_spill(compiled):
    assert max(compiled.spills, compiled.stack) <= (0 if IS_PROMISED else 8)
    assert compiled.local == 0
    # On sm_90 two at a time, so that one multiplies while the other waits for memory.
    programs = 2 if compiled.architecture == 90 else 1
    assert programs * compiled.threads * compiled.registers <= REGISTERS
    assert programs * compiled.shared <= SHARED_MEMORY[compiled.architecture]


@each("short_attention", only="-CHUNKED=False-")
def test_a_whole_head_is_asked_for_at_once_16_bytes_at_a_time(compiled):
    assert compiled.loads == {"128": 12}  # a thread's four of q, of k and of v
    assert compiled.in_flight == 12
    assert compiled.stores == {"128": 4}


@each("short_attention")
def test_attention_of_16_bit_numbers_uses_matrix_instructions(compiled):
    # HGMMA and UTCHMMA multiply at least 64 rows: fewer queries than that are served by HMMA.
    if "-fp32-" in compiled.name:
        expected = []
    elif "-QUERIES=64-" in compiled.name or "-QUERIES=128-" in compiled.name:
        expected = [{80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[compiled.architecture]]
    else:
        expected = ["HMMA"]
    assert list(compiled.matrix) == expected


@each("linear_gelu")
def test_a_tile_fits_the_chip_and_does_not_spill(compiled):
    assert compiled.spills == compiled.stack == compiled.local == 0
    # On sm_90 two at a time, so that one multiplies while the other stores.
    programs = 2 if compiled.architecture == 90 else 1
    assert programs * compiled.threads * compiled.registers <= REGISTERS
    assert programs * compiled.shared <= SHARED_MEMORY[compiled.architecture]


@each("linear_gelu", only="-DEPTH=64-")
def test_tiles_of_16_bit_numbers_are_multiplied_by_matrix_instructions(compiled):
    assert list(compiled.matrix) == [
        {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[compiled.architecture]
    ]


@each("linear_gelu", only="-fp32-")
def test_tiles_of_float32_are_multiplied_in_float32(compiled):
    assert not compiled.matrix


@each("linear_gelu", only="-ALIGNED=True")
def test_a_tile_moves_16_bytes_at_a_time(compiled):
    assert narrower(compiled.stores) == 0 < compiled.stores["128"]
    # Of the bias some chips load each thread's own columns, in pairs; a quarter of all columns.
    columns = 128 if "-COLUMNS=128-" in compiled.name else 64
    assert narrower(compiled.loads) == compiled.loads.get("32", 0) <= columns / 4 / 2
