"""Where commands work: what tells one from another, and what is kept for a second try."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import typer

from meg_kernels.cli import work
from meg_kernels.cli.work import check_results, resumable
from meg_kernels.routing import manifest, saving


@pytest.fixture
def digests(monkeypatch) -> dict:
    """What is edited in each folder."""
    known: dict = {}
    monkeypatch.setattr(manifest, "read_manifest", lambda folder: {"digest": known[folder]})
    return known


def identity(folder, out, source=None, **arguments) -> str:
    """Of a command that was told to work in `folder` and to write `out`."""
    params = {"folder": folder, "out": out, **arguments}
    context = SimpleNamespace(command=SimpleNamespace(name="distill"), params=params)
    return work._identity(context, out or folder, source)


def test_a_command_that_names_its_own_folder_is_the_one_that_names_none(tmp_path, digests):
    digests[tmp_path] = "a"
    assert identity(tmp_path, None, tmp_path) == identity(tmp_path, tmp_path, tmp_path)


def test_edits_that_were_replaced_meanwhile_make_another_command_of_it(tmp_path, digests):
    out, digests[tmp_path] = tmp_path / "out", "a"
    before = identity(tmp_path, out, tmp_path)
    assert identity(tmp_path, out, tmp_path) == before
    digests[tmp_path] = "b"
    assert identity(tmp_path, out, tmp_path) != before


def test_a_command_knows_itself_once_it_has_changed_its_own_folder(tmp_path, digests):
    digests[tmp_path] = "a"
    before = identity(tmp_path, None, tmp_path)
    digests[tmp_path] = "b"
    assert identity(tmp_path, None, tmp_path) == before


def test_what_a_file_holds_tells_commands_apart_and_where_it_lies_does_not(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_text("1")
    there.write_text("1")
    before = identity(tmp_path, None, files=[here])
    assert identity(tmp_path, None, files=[there]) == before
    there.write_text("2")
    assert identity(tmp_path, None, files=[there]) != before
    assert identity(tmp_path, None, files=[here, here]) != before


def test_a_command_that_had_saved_when_it_was_interrupted_does_nothing_more(
    tmp_path, monkeypatch, capsys
):
    saved = contextlib.nullcontext(SimpleNamespace(has_saved=True))
    monkeypatch.setattr(saving, "writing", lambda *_: saved)
    context = SimpleNamespace(command=SimpleNamespace(name="edit"), params={})
    kept = tmp_path / saving.WORK / "edit"
    kept.mkdir(parents=True)
    with pytest.raises(typer.Exit), work.changing(context, tmp_path):
        pytest.fail("it works again")
    assert "done already" in capsys.readouterr().out
    assert not kept.parent.exists()


def test_reading_commands_resume_one_at_a_time_until_they_are_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), resumable("evaluate", "facts", 1) as kept:
        (kept / "half").write_text("done")
        with resumable("evaluate", "facts", 1) as second:
            assert second is None
        assert "not resumable after an interruption" in capsys.readouterr().out
        with resumable("evaluate", "facts", 2) as other:
            assert other != kept
        raise KeyboardInterrupt
    with resumable("evaluate", "facts", 1) as again:
        assert again == kept and (again / "half").read_text() == "done"
    assert not kept.exists()


def test_a_result_may_replace_a_file_but_none_of_an_edited_model(tmp_path):
    check_results(None, tmp_path / "new.json", tmp_path / manifest.MANIFEST)
    for kind, ending in manifest.KINDS.items():
        path = tmp_path / f"{kind}-{'0' * 16}{ending}"
        check_results(path)
        path.write_text("")
        with pytest.raises(FileExistsError, match="is a file of an edited model"):
            check_results(path)
    (tmp_path / "report.json").write_text("{}")
    check_results(tmp_path / "report.json")
