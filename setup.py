"""Builds the optional CUDA extension meg_kernels._C; everything else is in pyproject.toml.

The extension needs nvcc and a host compiler, but neither a GPU nor torch: it takes raw pointers and
carries its own CUDA runtime (`-cudart static`), so it imports on any machine. Without nvcc the
package installs all the same, and uses its Triton kernels and PyTorch.

    CUDA_HOME                where to find nvcc; otherwise PATH is searched
    MEG_KERNELS_CUDA_ARCHS   default "sm_80 sm_90a sm_100"; "compute_80" adds PTX for later chips
    MEG_KERNELS_BUILD_CUDA   1: fail the install if it cannot be built; 0: do not build it
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
SOURCES = ["csrc/dynamic_neuron.cu", "csrc/softmax_entropy.cu", "csrc/bindings.cpp"]
HEADERS = sorted(f"csrc/{path.name}" for pattern in ("*.h", "*.cuh") for path in CSRC.glob(pattern))
DEFAULT_ARCHITECTURES = "sm_80 sm_90a sm_100"


class BuildError(RuntimeError):
    """The CUDA extension cannot be built here; the message says why."""


def architectures() -> list[str]:
    """The `sm_*` and `compute_*` names to build for."""
    names = os.environ.get("MEG_KERNELS_CUDA_ARCHS", DEFAULT_ARCHITECTURES)
    return names.replace(",", " ").replace(";", " ").split()


def find_nvcc() -> str:
    """The nvcc of CUDA_HOME, or else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if nvcc is None:
            raise BuildError(f"CUDA_HOME is {home}, but it has no bin/nvcc")
        return nvcc
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("nvcc was found neither through CUDA_HOME nor on PATH")
    return nvcc


def compile_flags(archs: list[str]) -> list[str]:
    """What nvcc needs to compile a file of csrc for `archs`."""
    targets = []
    for arch in archs:
        virtual = "compute_" + arch.split("_")[-1]
        targets += ["-gencode", f"arch={virtual},code={arch}"]
    # -O1 is for the host's side alone: device code is always optimised in full.
    return ["-std=c++17", "-O1", "--threads", "0", *targets]


def run(command: list[str]) -> None:
    """Run `command`, or raise BuildError with its last words."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(result.stdout)
    if result.returncode != 0:
        output = result.stdout.strip().splitlines() or ["no output"]
        errors = [line for line in output if "error" in line.lower() or "fatal" in line.lower()]
        raise BuildError(f"nvcc failed: {(errors or output)[0].strip()}")


def report_unbuilt(reason: object) -> None:
    """The one line that tells a user what is off and how to turn it on."""
    # As a warning, since recent versions of pip show those even when they hide all other output.
    warnings.warn(
        f"meg-kernels: CUDA extension is OFF ({reason}). To turn it on, install CUDA 12.8 or later "
        "with a C++17 compiler and reinstall with MEG_KERNELS_BUILD_CUDA=1.",
        stacklevel=1,
    )


class BuildCuda(build_ext):
    """Compiles with nvcc; a failure only switches the extension off, unless it was asked for."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext`, or say in one line why it is left out."""
        try:
            self.build_with_nvcc(ext)
        except BuildError as error:
            if os.environ.get("MEG_KERNELS_BUILD_CUDA") == "1":
                raise SystemExit(f"meg-kernels: {error}") from error
            report_unbuilt(error)

    def build_with_nvcc(self, ext: Extension) -> None:
        """Compile the sources of `ext` at once, and link them; BuildError if that fails."""
        try:
            import pybind11
        except ImportError as error:  # only without build isolation
            raise BuildError("pybind11 is not installed") from error
        nvcc = find_nvcc()
        archs = architectures()
        temporary = Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_path("include"), str(CSRC)]
        flags = [
            *compile_flags(archs),
            *(flag for path in includes for flag in ("-I", path)),
            f'-DMEG_KERNELS_CUDA_ARCHS="{" ".join(archs)}"',
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden,-Wall",
        ]
        objects = {source: str(temporary / f"{Path(source).name}.o") for source in ext.sources}
        commands = [[nvcc, *flags, "-c", source, "-o", out] for source, out in objects.items()]
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, commands))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([nvcc, "-shared", "-cudart", "static", *objects.values(), "-o", str(target)])


def extensions() -> list[Extension]:
    """The extension, or nothing where it is unwanted or nvcc is missing: the wheel is pure then."""
    wanted = os.environ.get("MEG_KERNELS_BUILD_CUDA", "")
    if wanted == "0":
        return []
    try:
        find_nvcc()
    except BuildError as error:
        if wanted == "1":
            raise SystemExit(f"meg-kernels: {error}") from error
        # The metadata commands run this file as well: speak only when something is being built.
        if {"bdist_wheel", "editable_wheel", "build", "build_ext", "install"} & set(sys.argv):
            report_unbuilt(error)
        return []
    # optional: an editable install copies the built file, and must not insist that there is one.
    return [Extension("meg_kernels._C", sources=SOURCES, depends=HEADERS, optional=True)]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCuda})
