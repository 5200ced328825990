"""Where Triton kernels run and why not, and which tensors they read as they lie."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from meg_kernels.kernels import launching
from meg_kernels.kernels.launching import aligned, has_adjacent_rows, rows_adjacent

pytest.importorskip("triton")

import triton


@pytest.fixture
def reason(monkeypatch):
    """reason(device): asked anew, outside the interpreter."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    launching.unavailable_reason.cache_clear()
    yield lambda device: launching.unavailable_reason(torch.device(device))
    launching.unavailable_reason.cache_clear()


def test_without_triton_the_reason_says_how_to_install_it(reason, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in reason("cuda")


def test_tensors_on_the_cpu_need_the_interpreter(reason, monkeypatch):
    assert "TRITON_INTERPRET=1" in reason("cpu")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    launching.unavailable_reason.cache_clear()
    assert reason("cpu") is None


def test_a_torch_without_cuda_is_named(reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in reason("cuda")


def test_a_missing_or_an_old_gpu_is_named(reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in reason("cuda")
    launching.unavailable_reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 is sm_75" in reason("cuda")


def test_a_triton_that_cannot_start_says_why(reason, monkeypatch):
    def no_compiler(_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(no_compiler))
    assert "Failed to find C compiler" in reason("cuda")
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(lambda _: "a driver"))
    launching.unavailable_reason.cache_clear()
    assert reason("cuda") is None


def test_rows_are_copied_only_if_their_elements_lie_apart():
    matrix = torch.zeros(4, 6)
    for read_as_it_is in (matrix, matrix[:, 1:3], matrix[::2], matrix.T[:, :1], matrix[:0]):
        assert has_adjacent_rows(read_as_it_is)
        assert rows_adjacent(read_as_it_is) is read_as_it_is
    for copied in (matrix.T, matrix[:, ::2], matrix[0, 0].expand(4, 6)):
        assert not has_adjacent_rows(copied)
        assert rows_adjacent(copied).is_contiguous() and torch.equal(rows_adjacent(copied), copied)


def test_a_row_counts_the_stride_of_the_batch_that_it_was_cut_from():
    memory = torch.zeros(64)
    wide, odd = memory[:60].view(5, 12), memory[:55].view(5, 11)
    assert aligned(wide) and aligned(wide[:1]) and aligned(wide, wide[1:])
    assert not aligned(odd) and not aligned(odd[:1, :8]) and not aligned(wide, odd)
    assert not aligned(wide[:, 1:]) and not aligned(wide[:, :11])
    assert aligned(wide[:, :6], elements=2) and not aligned(wide[:, :7], elements=2)
