"""The command `meg` ends quietly when it is interrupted, also while it still imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Interrupts itself where the module of this name is imported first.
PROGRAM = """
import builtins, os, signal, sys

name, plain = sys.argv.pop(1), builtins.__import__

def interrupted(module, *rest, **more):
    if module.split(".")[0] == name:
        builtins.__import__ = plain
        os.kill(os.getpid(), signal.SIGINT)
    return plain(module, *rest, **more)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
builtins.__import__ = interrupted
from meg_kernels.cli import main
main()
"""


@pytest.mark.parametrize("module", ["rich", "typer", "numpy", "torch", "transformers"])
def test_an_interruption_while_importing_ends_without_a_traceback(module, tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"query": "Who wrote Emma?", "answer": "Me"}\n')
    arguments = ["layers", str(facts), "--model", str(tmp_path / "absent")]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert ended.stderr.endswith("interrupted; start it again with the same arguments to go on\n")
    assert "Traceback" not in ended.stderr and ended.returncode == 130
