"""Everything that a machine with a GPU is good for, in one command and in under ten minutes.

    python -m benchmarks.on_gpu FOLDER

Builds csrc in place, runs the GPU tests, runs csrc's under compute-sanitizer, and runs all
benchmarks. The machine needs neither a network nor an install of this package. FOLDER gets all
output as log.txt and one JSON, NAME-OF-THE-GPU.json: pytest-benchmark's, with the outcome of every
stage as "checks". Put it into benchmarks/results/ and run `python -m benchmarks.report`.

A stage that fails or takes too long does not keep the later ones from running. Where the tree is a
copy without its history, MEG_KERNELS_REVISION says which revision it is.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MINUTES = 9.5
# The seconds that each may take; the most telling first, in case the time is up before the last.
BENCHMARKS = {
    "dynamic_neuron": 120,
    "denoiser": 200,
    "decode": 80,
    "answers": 200,
    "ffn": 60,
    "softmax_entropy": 40,
    "collect": 60,
}
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")


@dataclass
class Stage:
    """A command of the run.

    Args:
        name: as the log calls it.
        command: run from the repository's root.
        seconds: after which it is interrupted.
        environment: what to add to it.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, folder: Path) -> tuple[dict[str, Any], str]:
        """Run it; how that went, and its output, which FOLDER/log.txt gets too."""
        start = time.monotonic()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(self.environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A job in a shell's background ignores interrupts, and so would all its children.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
            timed_out = False
            try:
                process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
                _stop(process)
            output.seek(0)
            text = output.read()
        seconds = round(time.monotonic() - start, 1)
        outcome = {"exit": process.returncode, "seconds": seconds, "timed_out": timed_out}
        with (folder / "log.txt").open("a") as log:
            log.write(f"==== {self.name}: {outcome}\n{text}\n")
        print(f"{self.name}: {outcome}", flush=True)
        return outcome, text


def _stop(process: subprocess.Popen) -> None:
    """Interrupt, so that pytest still writes what it has; kill what does not listen."""
    for number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, None)):
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def junit_outcome(path: Path) -> dict[str, Any]:
    """What a JUnit XML says: how many passed and were skipped, and which failed. Removes it."""
    if not path.is_file():
        return {"passed": 0, "skipped": 0, "failed": ["nothing ran"]}
    cases = list(ElementTree.parse(path).iter("testcase"))
    path.unlink()
    failed = [case for case in cases if case.find("failure") is not None]
    failed += [case for case in cases if case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def sanitizer_outcome(log: str) -> dict[str, Any]:
    """How many errors compute-sanitizer counted, or None if it did not get that far.

    >>> sanitizer_outcome("========= ERROR SUMMARY: 0 errors")
    {'errors': 0}
    >>> sanitizer_outcome("== RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)")
    {'errors': 2}
    >>> sanitizer_outcome("Device not supported")
    {'errors': None}
    """
    counts = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", log)
    return {"errors": sum(map(int, counts)) if counts else None}


def sanitizer(tool: str) -> list[str]:
    """The command that runs csrc's kernels under compute-sanitizer; empty where there is none."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        return []
    kernels = [source.stem for source in sorted((ROOT / "csrc").glob("*.cu"))]
    ours_only = [part for kernel in kernels for part in ("--kernel-name", f"kns={kernel}")]
    # Captured graphs need torch's caching allocator, which is off here.
    files = ("tests/test_dynamic_neuron_cuda.py", "tests/test_softmax_entropy.py")
    tests = [*PYTEST, *files, "-m", "gpu", "-k", "(neuron_cuda or csrc) and not graph"]
    return [program, "--tool", tool, *ours_only, *tests]


def main(arguments: Sequence[str]) -> int:
    """Run every stage, and write what came of them into the folder that `arguments` names."""
    if len(arguments) != 1:
        print("usage: python -m benchmarks.on_gpu FOLDER", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here; run: meg info", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    folder = Path(arguments[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * MINUTES
    checks = run_checks(folder)
    content: dict[str, Any] = {"benchmarks": []}
    for bench, limit in BENCHMARKS.items():
        limit = min(limit, end - time.monotonic())
        if limit > 0:
            checks[bench], measured = run_benchmark(bench, limit, folder)
            content = {**measured, **content}
            content["benchmarks"] += measured.get("benchmarks", [])
    (folder / f"{name}.json").write_text(json.dumps({**content, "checks": checks}, indent=1))
    print(json.dumps(checks, indent=1))
    good = all(check["exit"] == 0 for check in checks.values()) and checks["tests"]["passed"] > 0
    return 0 if good else 1


def run_checks(folder: Path) -> dict[str, Any]:
    """Build, GPU tests, compute-sanitizer: how each went."""
    checks: dict[str, Any] = {}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    checks["build"], _ = Stage("build", build, 120, {"MEG_KERNELS_BUILD_CUDA": "1"}).run(folder)
    results = folder / "tests.xml"
    tests = [*PYTEST, "tests", "-m", "gpu", "--continue-on-collection-errors"]
    outcome, _ = Stage("tests", [*tests, f"--junitxml={results}"], 150).run(folder)
    checks["tests"] = outcome | junit_outcome(results)
    for tool in ("memcheck", "racecheck"):
        if command := sanitizer(tool):
            # Each tensor its own allocation: else what is next to it in torch's pool hides a slip.
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            outcome, output = Stage(tool, command, 75, uncached).run(folder)
            checks[tool] = outcome | sanitizer_outcome(output)
    return checks


def run_benchmark(bench: str, seconds: float, folder: Path) -> tuple[dict, dict]:
    """How benchmarks/bench_BENCH.py went, and the JSON it wrote.

    In a process of its own: after an illegal memory access one can do nothing more on its GPU.
    """
    results, measured = folder / f"{bench}.xml", folder / f"{bench}.json"
    command = [
        *PYTEST,
        f"benchmarks/bench_{bench}.py",
        "--benchmark-only",
        "--benchmark-max-time=0.25",
        f"--benchmark-json={measured}",
        f"--junitxml={results}",
    ]
    outcome, output = Stage(bench, command, seconds).run(folder)
    print(races(output), flush=True)
    content = json.loads(measured.read_text()) if measured.is_file() else {}
    measured.unlink(missing_ok=True)
    return outcome | junit_outcome(results), content


def races(log: str) -> str:
    r"""The part of a benchmark's output that says what was measured.

    >>> races("dots\n--- races ---\na\n\nb")
    'a'
    """
    return log.partition(" races -")[2].partition("\n")[2].partition("\n\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
