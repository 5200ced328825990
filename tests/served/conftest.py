"""Edited tiny models that vLLM serves, and what each prompt must be answered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # whose tiny.py this shares

import tiny
from oracle import SHAPE, Oracle

from meg_kernels import MeGEditor

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The folder of a tiny language model."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tiny.make_language_model(tokenizer, **SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def editor(base, tmp_path_factory) -> MeGEditor:
    encoder = tmp_path_factory.mktemp("encoder")
    tiny.make_encoder().save_pretrained(encoder)
    editor = MeGEditor.for_model(str(base), tiny.BANK, encoder=str(encoder), device="cpu")
    tiny.edit(editor)
    return editor


@pytest.fixture(scope="session")
def edited(editor, tmp_path_factory) -> Path:
    """The folder of the tiny model's edits."""
    folder = tmp_path_factory.mktemp("edited") / "edited"
    editor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(editor) -> Oracle:
    return Oracle(editor)
