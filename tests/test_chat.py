"""`meg chat`: a conversation in the terminal, why it was answered so, and edits on the fly."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import tiny
from test_conversation import chatty
from tiny import EDITED, FURTHER, OTHER_FACTS, UNRELATED, run
from typer.testing import CliRunner

from meg_kernels import MeGEditor, cli
from meg_kernels.cli import tables
from meg_kernels.cli.chat import COMMANDS, Chat
from meg_kernels.editing.contexts import MEASURED, Context

FACT = EDITED[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with edits, whose base model lies in a folder beside it."""
    root = tmp_path_factory.mktemp("chat")
    tokenizer = chatty("inst")
    model = tiny.make_language_model(tokenizer)
    model.config.max_position_embeddings = 256
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    contexts = (Context("plain"), Context("chat", "chat"))
    collection = dataclasses.replace(tiny.BANK.collection, contexts=contexts, max_steps=200)
    config = dataclasses.replace(tiny.BANK, collection=collection)
    editor = MeGEditor(model, chatty("inst"), tiny.make_encoder(), config, name=str(root / "model"))
    editor.edit(EDITED, tuning_facts=OTHER_FACTS, unrelated_queries=UNRELATED)
    editor.save_pretrained(root / "edited")
    return root / "edited"


@pytest.fixture
def chat(saved):
    return Chat(MeGEditor.from_pretrained(saved), saved, max_new_tokens=6)


def told(chat, capsys, *lines):
    """What the terminal shows for these lines."""
    lines = iter(lines)

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat.run(read)
    shown = capsys.readouterr()
    return shown.out + shown.err


def test_a_conversation_is_answered_word_by_word(chat, capsys):
    shown = told(chat, capsys, FACT.query, "", UNRELATED[0])
    assert "5 facts are edited" in shown
    assert f"model:  {FACT.answer}.\n" in shown
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == f"{FACT.answer}."


def test_several_edited_questions_are_answered_line_by_line(chat, capsys):
    other = EDITED[3]
    shown = told(chat, capsys, f"{FACT.query} And so on. {other.query}", "/why")
    assert f"model:  {FACT.answer}.\n {other.answer}.\n" in shown
    assert chat.messages[1]["content"] == f"{FACT.answer}.\n{other.answer}."
    for fact in (FACT, other):
        assert f"{fact.query!r} was taken for {fact.query!r} -> {fact.answer!r}" in shown


def test_why_says_which_fact_and_which_words(chat, capsys):
    shown = told(chat, capsys, "/why", f"Good day to you. {FACT.query}", "/why", "/base")
    assert "error: nothing was asked yet" in shown
    assert f"{FACT.query!r} was taken for {FACT.query!r} -> {FACT.answer!r}" in shown
    base = chat.editor.generate_base([chat.messages[:1]], 6)[0]
    assert base in shown
    assert "not taken for" in told(chat, capsys, UNRELATED[2], "/why")


def test_a_fact_is_edited_undone_and_saved(chat, capsys, saved):
    new = FURTHER[0]  # and /why tells what was, not what is
    line = f'/edit "{new.query}" "{new.answer}"'
    shown = told(chat, capsys, line, new.query, "/quit", "/quit")
    assert "edited in " in shown and f"model:  {new.answer}." in shown
    assert "edits are not saved" in shown  # said once, before they are dropped
    assert len(MeGEditor.from_pretrained(saved).facts) == len(EDITED)
    shown = " ".join(told(chat, capsys, "/undo").split())
    assert f"taken back: {new.query!r}; 5 facts are edited." in shown and "/new" in shown
    assert "no /edit to take back" in told(chat, capsys, "/undo")
    told(chat, capsys, line, "/save")
    again = MeGEditor.from_pretrained(saved)
    assert [fact.query for fact in again.facts] == [*(f.query for f in EDITED), new.query]
    again.remove(new.query)
    again.save_pretrained(saved)


@pytest.mark.parametrize(
    "line, text",
    [
        ("/edit who wrote it", 'type /edit "question" "answer"'),
        ('/edit "unclosed', 'type /edit "question" "answer"'),
        ('/edit "" "red"', "query"),
        ("/nothing", "there is no /nothing"),
        ("/help", "/undo"),
        ("word " * 300, "shorten it"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(chat, capsys, line, text):
    shown = told(chat, capsys, line, "/help")
    assert text in shown
    assert all(command in shown for command in COMMANDS)
    assert chat.messages == []


def test_an_interruption_ends_what_runs_and_not_the_conversation(chat, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(chat.editor), "chat", tiny.interrupt)
        assert "(interrupted)" in told(chat, capsys, FACT.query)
    assert chat.messages == []
    assert f"model:  {FACT.answer}." in told(chat, capsys, FACT.query)


def test_a_model_without_a_chat_template_is_refused(saved):
    editor = MeGEditor.from_pretrained(saved)
    editor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*meg ask"):
        Chat(editor, saved)


def test_an_edited_model_is_measured_in_conversations(saved, tmp_path):
    report, plot = tmp_path / "contexts.json", tmp_path / "contexts.png"
    shown = run(*("evaluate", saved, "--contexts", "--limit", 2, "--json", report, "--plot", plot))
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["n"] == 2 and found["protocol"]["edited_facts"] == len(EDITED)
    assert [*found["contexts"]] == [context.name for context in MEASURED]
    assert found["contexts"]["chat"]["reliability"] == 1.0
    assert "chat, another" in shown
    assert "…" not in shown[shown.index("asked where people ask") :]  # no figure is cut
    assert plot.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--plot", plot], ["--contexts", "--tasks", "arc_easy"]):
        result = CliRunner().invoke(cli.app, ["evaluate", str(saved), *map(str, wrong)])
        assert result.exit_code == 2


def test_a_conversation_is_printed_with_what_the_gate_took(chat, capsys):
    tables.print_conversation(chat.editor, [FACT.query, UNRELATED[0]], 6)
    shown = capsys.readouterr().out
    assert f"model: {FACT.answer}.  ({FACT.query})" in shown
    assert shown.rstrip().endswith("(nothing edited)")


def test_meg_chat_runs_in_a_terminal(saved):
    main, side = pty.openpty()
    command = [sys.executable, "-m", "meg_kernels.cli", "chat", str(saved), "--max-new-tokens", "6"]
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"}
    )
    os.close(side)
    shown = b""

    def until(text):
        nonlocal shown
        end = time.monotonic() + 120
        while text.encode() not in shown:
            assert time.monotonic() < end, shown.decode(errors="replace")
            if select.select([main], [], [], 1)[0]:
                shown += os.read(main, 4096)
        shown = shown.partition(text.encode())[2]

    try:
        until("you: ")
        os.write(main, f"{FACT.query}\n".encode())
        until(f" {FACT.answer}.")
        until("you: ")
        os.write(main, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(main)
