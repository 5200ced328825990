"""csrc/ compiled by g++: the very kernels and launchers, on a machine without a GPU.

csrc/host/cuda_shim.h stands in for CUDA. The structs below mirror those of csrc's headers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = ("dynamic_neuron", "softmax_entropy")


class Struct(ctypes.Structure):
    """A struct of csrc/types.h, dynamic_neuron.h or softmax_entropy.h; every field has 8 bytes."""


def pointers(*names: str) -> list:
    return [(name, ctypes.c_void_p) for name in names]


def integers(*names: str) -> list:
    return [(name, ctypes.c_int64) for name in names]


class Rows(Struct):
    _fields_ = pointers("data") + integers("sample_stride", "token_stride")


class Matrix(Struct):
    _fields_ = pointers("data") + integers("row_stride")


class Neurons(Struct):
    _fields_ = [("key", Matrix), *pointers("bias"), ("value", Matrix), *integers("activation")]


class Shape(Struct):
    _fields_ = integers("samples", "tokens", "neurons", "d_in", "d_out", "dtype")


class Stream(Struct):
    _fields_ = integers("device") + pointers("handle")


class Forward(Struct):
    _fields_ = [
        *(("out", Rows), ("y", Rows), ("x", Rows), ("neurons", Neurons)),
        *pointers("index"),
        *(("shape", Shape), ("stream", Stream)),
    ]


class Backward(Struct):
    _fields_ = [
        *(("grad", Rows), ("x", Rows), ("neurons", Neurons)),
        *pointers("index"),
        *(("shape", Shape), ("stream", Stream), ("dx", Rows)),
        *pointers("dkey", "dbias", "dvalue", "hidden", "dpre", "order", "starts"),
    ]


class Entropy(Struct):
    _fields_ = [
        ("logits", Matrix),
        *integers("samples", "classes", "dtype"),
        *pointers("entropy"),
        ("stream", Stream),
    ]


@dataclass(frozen=True)
class HostExtension:
    """Stands in for meg_kernels._C: the kernels and launchers of csrc/ as compiled by g++."""

    library: ctypes.CDLL

    @classmethod
    def build(cls, folder: Path) -> HostExtension:
        """Compile csrc/ into `folder`; skips the test where g++ is missing."""
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("g++ is not installed")
        library = folder / "host.so"
        flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-x", "c++"]
        sources = [str(CSRC / f"{source}.cu") for source in SOURCES]
        subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True)
        return cls(ctypes.CDLL(str(library)))

    def dynamic_neuron_forward(self, *arguments) -> int:
        return self.library.dynamic_neuron_forward(ctypes.byref(Forward(*arguments)))

    def dynamic_neuron_backward(self, *arguments) -> int:
        *arguments, gradients, scratch = arguments
        packed = Backward(*arguments, *gradients, *scratch)
        return self.library.dynamic_neuron_backward(ctypes.byref(packed))

    def softmax_entropy(self, logits, shape, entropy, stream) -> int:
        packed = Entropy(logits, *shape, entropy, stream)
        return self.library.softmax_entropy(ctypes.byref(packed))

    def error_string(self, code: int) -> str:
        return f"code {code}"
