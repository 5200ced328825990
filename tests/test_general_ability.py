"""Perplexity of base and edited models, against transformers' own loss, a passage at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from tiny import (
    BANK,
    EDITED,
    LAYER,
    UNRELATED,
    edit,
    make_editor,
    make_language_model,
    own_neuron,
    run,
    widened,
)

from meg_kernels import MeGEditor, cli
from meg_kernels.editing.general_ability import first_sentence
from meg_kernels.shipped import shipped_passages

# A mean of float32 losses against a mean of float32 losses.
CLOSE = 1e-5
ABOUT_AN_EDIT = [f"{fact.query}\nSing a song to it, blue and gold." for fact in EDITED]
ON_OTHER_THINGS = [f"{text}. {text}? {EDITED[0].query} red." for text in UNRELATED]


@pytest.fixture(scope="module")
def editor():
    editor = make_editor(BANK)
    edit(editor)
    return editor


def by_transformers(models, tokenizer, texts) -> float:
    """exp of the mean loss of a token, each text by the model that stands beside it."""
    losses, predicted = 0.0, 0
    for model, text in zip(models, texts, strict=True):
        tokens = torch.tensor([tokenizer(text).input_ids[: model.config.max_position_embeddings]])
        losses += (tokens.shape[1] - 1) * model(tokens, labels=tokens).loss.item()
        predicted += tokens.shape[1] - 1
    return math.exp(losses / predicted)


def test_perplexities_are_those_of_the_base_model_and_of_physically_wider_ones(editor):
    texts = [text for pair in zip(ABOUT_AN_EDIT, ON_OTHER_THINGS, strict=False) for text in pair]
    base, tokenizer = make_language_model(editor.tokenizer), editor.tokenizer
    accepted = [editor.route([re.split(r"[.\n]", text)[0]]).accepted.item() for text in texts]
    assert accepted == [True, False] * len(ON_OTHER_THINGS)
    models = [
        widened(base, LAYER, own_neuron(editor, first_sentence(text))) if taken else base
        for text, taken in zip(texts, accepted, strict=True)
    ]
    read = editor.perplexity(texts)
    expected = by_transformers([base] * len(texts), tokenizer, texts)
    assert read.base == pytest.approx(expected, rel=CLOSE)
    assert read.edited == pytest.approx(by_transformers(models, tokenizer, texts), rel=CLOSE)
    assert abs(read.edited - read.base) > 100 * CLOSE * read.base  # the edits tell
    assert (read.passages, read.accepted) == (len(texts), len(ON_OTHER_THINGS))
    assert read.tokens == sum(len(tokenizer(text).input_ids) - 1 for text in texts)


def test_where_nothing_is_taken_for_an_edit_the_perplexities_are_equal_to_the_bit(editor):
    read = editor.perplexity(ON_OTHER_THINGS)
    assert read.accepted == 0 and read.edited == read.base


def test_only_the_first_sentence_meets_the_gate(editor):
    for text, accepted in (
        (f"{EDITED[0].query}\n{UNRELATED[0]}.", 1),
        (f"{EDITED[1].query} {UNRELATED[0]}.", 1),
        (f"{UNRELATED[0]}. {EDITED[0].query}.", 0),
    ):
        assert editor.perplexity([text]).accepted == accepted


def test_text_beyond_the_context_length_is_not_read(editor):
    longest = editor.model.config.max_position_embeddings
    text = f"{UNRELATED[0]}\n" + "red blue " * longest
    read = editor.perplexity([text])
    assert read.tokens == longest - 1
    base = make_language_model(editor.tokenizer)
    assert read.base == pytest.approx(by_transformers([base], editor.tokenizer, [text]), rel=CLOSE)


def test_an_editor_without_edits_reads_as_its_model():
    read = make_editor().perplexity(ABOUT_AN_EDIT)
    assert read.accepted == 0 and read.edited == read.base


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("One. Two.", "One."),
        ("  Is it so? Yes.", "Is it so?"),
        ("Stop! Now.", "Stop!"),
        ("Version 3.14 is out. Get it.", "Version 3.14 is out."),
        ('"Is it so?" she asked. Yes.', '"Is it so?"'),
        ("A title\nand a text. More.", "A title"),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_a_sentence_ends_at_its_first_mark_or_line_break(text, sentence):
    assert first_sentence(text) == sentence


def test_texts_that_cannot_be_read_are_refused(editor):
    with pytest.raises(ValueError, match=r"^there are no texts to read$"):
        editor.perplexity([])
    with pytest.raises(ValueError, match=r"^the text 'red' has 1 tokens; two are needed at least$"):
        editor.perplexity(["red blue", "red"])
    with pytest.raises(TypeError, match=r"^texts is the text 'red blue'; it must be"):
        editor.perplexity("red blue")


def test_the_shipped_passages_are_prose_on_many_topics():
    passages = shipped_passages()
    words = [len(passage.split()) for passage in passages]
    assert (len(passages), sum(words)) == (24, 2715)
    assert min(words) >= 80
    assert len({passage.split()[0] for passage in passages}) > 15
    assert all(passage.isascii() and passage == passage.strip() for passage in passages)


def test_evaluate_shows_and_writes_the_perplexity(editor, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.commands, "_load", lambda *given: editor)
    monkeypatch.setattr(cli.tables.console, "width", 300, raising=False)
    texts = [*ABOUT_AN_EDIT[:2], *ON_OTHER_THINGS]
    monkeypatch.setattr("meg_kernels.editing.edited_model.shipped_passages", lambda: texts)
    shown = run("evaluate", tmp_path, "--limit", 1, "--json", tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["perplexity"]
    assert content == dataclasses.asdict(editor.perplexity(texts))
    (line,) = [line for line in shown.splitlines() if line.startswith("perplexity")]
    assert f"base {content['base']:.3f}, edited {content['edited']:.3f}" in line
    assert "of 6 passages" in line and line.endswith("; 2 taken for edited queries")
    assert content["base"] != content["edited"]


def test_a_report_without_perplexity_says_so(editor):
    assert isinstance(editor, MeGEditor)
    assert editor.evaluate(EDITED[:1]).to_dict()["perplexity"] is None
