"""The examples in docstrings, of all modules."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import benchmarks
import meg_kernels

PACKAGES = (Path(package.__path__[0]) for package in (meg_kernels, benchmarks))
NAMES = [
    ".".join(path.relative_to(folder.parent).with_suffix("").parts)
    for folder in PACKAGES
    for path in sorted(folder.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_there_are_examples():
    assert len(NAMES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    if name == "meg_kernels.integrations.lm_eval":
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
