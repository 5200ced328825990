"""What the studies of the gate and of conversations share: their files, and a chat to ask in."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.conftest import version_of
from meg_kernels.editing.contexts import MEASURED
from meg_kernels.machine import processor_name

(CHAT,) = (context for context in MEASURED if context.name == "chat")


def kept(path: Path, study: str, rows: str = "rows") -> dict[str, Any]:
    """What a study has found so far, and where it goes on.

    Args:
        path: of its JSON, which need not exist.
        study: its name.
        rows: what it calls the list of what it found.
    """
    content: dict[str, Any] = {"study": study, rows: []}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    return content | {
        "machine": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: version_of(name) for name in ("torch", "transformers")},
    }


def work_option(about: str | None) -> Path | None:
    """The folder that `--work` names, of a study with no other option.

    Args:
        about: the study's docstring, for `--help`.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="keeps what was edited")
    return parser.parse_args().work
