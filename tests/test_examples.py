"""The examples: those in docstrings, of all modules, and the scripts in examples/."""

from __future__ import annotations

import doctest
import importlib
import runpy
import sys
from pathlib import Path

import pytest
import tiny

import benchmarks
import meg_kernels
from meg_kernels.pretrained import save_tokenizer

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


SCRIPTS = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script of examples/ and returns what it prints."""

    def run(name: str, *arguments: object) -> str:
        path = SCRIPTS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_models_folder_is_edited_and_asked(run, tmp_path):
    tokenizer = tiny.make_tokenizer()
    tiny.make_language_model(tokenizer).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    tiny.make_encoder().save_pretrained(tmp_path / "encoder")
    facts, tuning, edited = (tmp_path / name for name in ("facts.jsonl", "tuning.jsonl", "edited"))
    meg_kernels.write_facts(facts, tiny.FACTS[:4])
    meg_kernels.write_facts(tuning, tiny.OTHER_FACTS)
    said = run(
        "edit_my_model",
        *(tmp_path / "model", facts, "--tuning", tuning),
        *("--encoder", tmp_path / "encoder", "--out", edited),
        *("--layer", tiny.LAYER, "--learning-rate", 0.1),
    )
    assert "4 facts edited" in said and "not learnt" not in said
    for fact in tiny.FACTS[:4]:
        assert f"{fact.query}\n" in said and f"now:    {fact.answer}\n" in said

    said = run("serve_batch", edited, "--batch-size", 3)
    for fact in tiny.FACTS[:4]:
        assert f"edited  {fact.query}  ->  {fact.answer}" in said
    assert "4 queries in" in said


def test_a_fitted_neuron_changes_only_the_rows_that_carry_it(run):
    said = run("attach_neurons")
    assert "with it:    [42, " in said and ", 42]" in said
    assert "bit for bit as before: True" in said


def test_a_block_with_meg_linear_computes_the_formula(run):
    said = run("meg_linear")
    assert said.count(": True\n") == 3


def test_every_script_is_run_by_a_test():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.stem}"' in tested for path in SCRIPTS.glob("*.py"))
