"""An edited model on the disk: what is ours there, what is the user's, and who writes and reads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import tiny

from meg_kernels import storage
from meg_kernels.locking import LockedError, WriterLock
from meg_kernels.routing import saving
from meg_kernels.routing.manifest import KINDS, MANIFEST, read_manifest
from meg_kernels.routing.saving import LOCK, SAVING, WORK, Writer, load_edited, load_edits, writing
from meg_kernels.storage import CorruptFileError, content_digest

LIKE_OURS = {
    "facts-mine.jsonl": "mine",
    "gate-notes.txt": "mine",
    "generator-0123456789abcdef.safetensors": "a copy",
    "encoder-old/notes.txt": "mine",
    "notes/facts-0123456789abcdef.jsonl": "mine",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "edited"
    editor = tiny.make_editor(tiny.BANK)
    tiny.edit(editor)
    editor.save_pretrained(folder)
    editor.detach()
    editor = tiny.load(folder)
    editor.save_pretrained(folder)  # as a tokenizer notes that it was loaded from a folder
    editor.detach()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "edited")


@pytest.fixture
def editor(folder):
    editor = tiny.load(folder)
    yield editor
    editor.detach()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def ours(folder) -> set[str]:
    return {MANIFEST, *read_manifest(folder)["files"].values()}


def facts_in(folder) -> list:
    return [*load_edits(folder, "cpu").edits.facts]


# What is ours


def test_files_of_the_user_that_are_called_like_ours_survive_every_save(editor, folder):
    for name, text in LIKE_OURS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "gate-link").symlink_to("absent")
    (folder / "encoder-link").symlink_to(folder / "encoder-old")
    for change in (
        lambda: editor.add(tiny.FURTHER),
        lambda: editor.remove(tiny.FURTHER[0]),
        lambda: editor.set_gate(threshold=0.5),
    ):
        change()
        editor.save_pretrained(folder)
        assert {name: (folder / name).read_text() for name in LIKE_OURS} == LIKE_OURS
        users = {name.split("/")[0] for name in LIKE_OURS} | {"gate-link", "encoder-link"}
        assert names(folder) == ours(folder) | users
        assert facts_in(folder) == editor.facts


def test_a_file_of_ours_that_the_user_has_changed_is_left_and_told(editor, folder, caplog):
    facts = folder / read_manifest(folder)["files"]["facts"]
    facts.write_text("what I make of it")
    encoder = folder / read_manifest(folder)["files"]["encoder"]
    (encoder / "notes.txt").write_text("mine")
    editor.remove(tiny.EDITED[0])
    editor.save_pretrained(folder)
    assert facts.read_text() == "what I make of it"
    assert f"{facts} does not hold what was saved; it is left where it is" in caplog.text
    assert facts_in(folder) == editor.facts


def test_a_damaged_file_is_written_anew_by_the_next_save(editor, folder):
    for kind in ("encoder", "gate"):
        path = folder / read_manifest(folder)["files"][kind]
        path = path / "model.safetensors" if kind == "encoder" else path
        content = path.read_bytes()
        path.unlink()  # the editor's weights may lie in the file itself
        path.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(CorruptFileError):
        load_edited(folder, "cpu")
    editor.save_pretrained(folder)
    load_edited(folder, "cpu")
    assert names(folder) == ours(folder)


def test_a_list_of_names_is_not_trusted_beyond_our_own(editor, folder, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / SAVING).mkdir()
    listed = ["../precious", str(tmp_path / "precious"), "notes.txt", MANIFEST, 3, "", "."]
    (folder / SAVING / "names.json").write_text(json.dumps(listed))
    editor.save_pretrained(folder)
    assert (tmp_path / "precious").exists() and names(folder) == ours(folder) | {"notes.txt"}


def test_the_same_edits_have_the_same_names(editor, folder, tmp_path):
    editor.save_pretrained(tmp_path / "again")
    assert ours(tmp_path / "again") == ours(folder)
    assert (folder / MANIFEST).read_bytes() == (tmp_path / "again" / MANIFEST).read_bytes()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_saved_is_open_to_those_whom_the_umask_lets_in(editor, tmp_path, mask):
    umask = os.umask(mask)
    try:
        editor.save_pretrained(tmp_path / "new" / "edited")
    finally:
        os.umask(umask)
    for path in (tmp_path / "new").rglob("*"):
        mode = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~mask, path


@pytest.fixture
def events(monkeypatch):
    """What happens on the disk: pairs of an act and a file's name."""
    events = []
    for name in ("fsync", "replace", "rename", "unlink"):
        act = getattr(os, name)

        def noted(*given, name=name, act=act, **more):
            where = given[-1]
            if isinstance(where, int):
                where = os.readlink(f"/proc/self/fd/{where}")
            events.append((name, Path(where).name))
            return act(*given, **more)

        monkeypatch.setattr(os, name, noted)
    return events


def test_an_encoder_is_on_the_disk_before_it_is_put_in_its_place(editor, tmp_path, events):
    folder = tmp_path / "new"
    editor.save_pretrained(folder)
    encoder = read_manifest(folder)["files"]["encoder"]
    put = events.index(("rename", encoder))
    for name in (*names(folder / encoder), "encoder"):
        assert ("fsync", name) in events[:put], name


def test_a_state_is_on_the_disk_before_the_one_before_it_is_removed(
    editor, folder, events, monkeypatch
):
    in_any_order = Path.iterdir
    monkeypatch.setattr(  # the list of names first
        Path, "iterdir", lambda path: iter(sorted(in_any_order(path), reverse=True))
    )
    before = read_manifest(folder)["files"]
    editor.remove(tiny.EDITED[0])
    editor.save_pretrained(folder)
    after = read_manifest(folder)["files"]
    there = events.index(("replace", MANIFEST))
    assert events[there - 1 : there + 2] == [
        ("fsync", f".{MANIFEST}.meg-tmp"),
        ("replace", MANIFEST),
        ("fsync", folder.name),
    ]
    for kind in KINDS:
        if after[kind] != before[kind]:
            assert kind != "encoder"
            put = events.index(("rename", after[kind]))
            assert ("fsync", folder.name) in events[put:there]
            assert events.index(("rename", f"removed-{before[kind]}")) > there + 1
            # The names are noted from before the first of them is there until all is tidy.
            assert events.index(("replace", "names.json")) < put
    assert [event for event in events if event[0] == "unlink"][-2:] == [
        ("unlink", "names.json"),
        ("unlink", str(LOCK)),
    ]


# Who writes, and who reads


def test_a_reader_who_is_overtaken_by_a_writer_reads_the_new_state(editor, folder, monkeypatch):
    editor.remove(tiny.EDITED[0])
    read, overtaken = saving.written_facts, []

    def slow(path):
        if not overtaken:
            overtaken.append(editor.save_pretrained(folder))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "written_facts", slow)
        found, _ = load_edited(folder, "cpu")
    assert overtaken and [*found.edits.facts] == editor.facts


def test_readers_are_never_blocked(editor, folder):
    with writing(folder):
        assert facts_in(folder) == editor.facts
    assert names(folder) == ours(folder)


def test_an_editor_saves_again_and_again_and_where_the_folder_is_gone(editor, folder):
    for fact in tiny.EDITED[:2]:
        editor.remove(fact)
        editor.save_pretrained(folder)
    shutil.rmtree(folder)
    editor.save_pretrained(folder)
    assert facts_in(folder) == editor.facts


def test_what_another_saved_is_not_undone(editor, folder):
    other = tiny.load(folder)
    other.remove(tiny.EDITED[0])
    other.save_pretrained(folder)
    editor.remove(tiny.EDITED[1])
    with pytest.raises(RuntimeError, match="was saved by another process since it was loaded"):
        editor.save_pretrained(folder)
    assert facts_in(folder) == other.facts and names(folder) == ours(folder)


def saved_by(writer, editor) -> None:
    writer.save(editor.edits, editor.encoder, editor.base, editor.config.to_dict())


def test_a_writer_whose_folder_was_made_anew_is_its_one_writer_still(editor, folder):
    with writing(folder) as writer:
        shutil.rmtree(folder)
        saved_by(writer, editor)
        with pytest.raises(LockedError), writing(folder):
            pass
    assert names(folder) == ours(folder)


def test_work_that_was_interrupted_once_it_had_saved_is_done(editor, folder):
    with pytest.raises(KeyboardInterrupt), writing(folder, "work") as writer:
        assert not writer.has_saved
        editor.remove(tiny.EDITED[0])
        saved_by(writer, editor)
        raise KeyboardInterrupt
    with writing(folder, "work") as writer:
        assert writer.has_saved
    with writing(folder, "work") as writer:  # once more is another time
        assert not writer.has_saved


def test_work_that_had_saved_stays_done_where_nobody_can_write_meanwhile(
    editor, folder, monkeypatch
):
    with pytest.raises(KeyboardInterrupt), writing(folder, "work") as writer:
        editor.remove(tiny.EDITED[0])
        saved_by(writer, editor)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_tidy", lambda _: (folder / "absent").unlink())
        with pytest.raises(OSError, match="cannot be written"), writing(folder, "work"):
            pass
    with writing(folder, "work") as writer:
        assert writer.has_saved


def test_a_save_that_fails_at_its_end_leaves_nothing(editor, folder, monkeypatch):
    before, replace = names(folder), os.replace

    def fail(written, place):
        if place == folder / MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(written, place)

    monkeypatch.setattr(os, "replace", fail)
    editor.remove(tiny.EDITED[0])
    with pytest.raises(OSError, match=r"could not save .*; what was saved there is unchanged"):
        editor.save_pretrained(folder)
    assert names(folder) == before and len(facts_in(folder)) == len(tiny.EDITED)


def fail_to_flush_the_manifest(folder, monkeypatch):
    """From the moment that it is in its place, the disk fails."""
    fsync, replaced = os.fsync, []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *given: (replaced.append(given[1]), replace(*given)))

    def fail(handle):
        if folder / MANIFEST in replaced:
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)


def test_a_state_that_is_there_is_not_said_to_be_unchanged(editor, folder, monkeypatch):
    fail_to_flush_the_manifest(folder, monkeypatch)
    editor.remove(tiny.EDITED[0])
    with pytest.raises(OSError, match=r"meg.json is written, but may be lost if the power fails"):
        editor.save_pretrained(folder)
    assert facts_in(folder) == editor.facts and names(folder) == ours(folder)
    monkeypatch.undo()
    editor.remove(tiny.EDITED[1])
    editor.save_pretrained(folder)  # nobody else has saved there
    assert facts_in(folder) == editor.facts


def test_a_command_whose_state_may_be_lost_flushes_it_when_it_is_started_again(
    editor, folder, monkeypatch
):
    editor.remove(tiny.EDITED[0])
    config = editor.config.to_dict()
    fail_to_flush_the_manifest(folder, monkeypatch)
    with pytest.raises(OSError, match="but may be lost"), writing(folder, "work") as writer:
        writer.save(editor.edits, editor.encoder, editor.base, config)
    flushed = []
    monkeypatch.undo()
    monkeypatch.setattr(saving, "sync_folder", flushed.append)
    with writing(folder, "work") as writer:
        assert writer.has_saved and flushed == [folder]


def test_no_file_is_hashed_twice_when_a_folder_is_loaded(folder, monkeypatch):
    hashed = []

    def noted(path):
        hashed.append(path.name)
        return content_digest(path)

    monkeypatch.setattr(saving, "content_digest", noted)
    monkeypatch.setattr(storage, "fingerprint", lambda *_: pytest.fail("hashed again"))
    load_edited(folder, "cpu")
    assert sorted(hashed) == sorted(read_manifest(folder)["files"].values())


def test_work_that_another_state_has_taken_the_place_of_is_not_done(editor, folder, tmp_path):
    editor.remove(tiny.EDITED[0])
    editor.save_pretrained(tmp_path / "backup")
    lock = WriterLock(folder, LOCK, "work")
    Writer(folder, lock, "work")
    lock.abandon()  # a kill
    shutil.copytree(tmp_path / "backup", folder, dirs_exist_ok=True)
    with writing(folder, "work") as writer:
        assert not writer.has_saved


def test_halves_of_files_of_a_killed_command_are_gone_and_its_work_is_kept(folder):
    work = folder / WORK / "train" / "deep"
    work.mkdir(parents=True)
    for name in ("kept.json", ".kept.json.meg-tmp"):
        (work / name).write_text("{}")
    with writing(folder):
        assert names(work) == {"kept.json"}


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_folder_may_be_a_link_to_one(editor, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    editor.remove(tiny.EDITED[0])
    editor.save_pretrained(tmp_path / "link")
    assert facts_in(folder) == editor.facts and names(folder) == ours(folder)
