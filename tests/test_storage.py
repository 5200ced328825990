"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from meg_kernels import storage
from meg_kernels.locking import LockedError, WriterLock, is_at, open_alone
from meg_kernels.storage import (
    CorruptFileError,
    WorkFolder,
    check_writable,
    content_digest,
    fingerprint,
    make_folder,
    read_json,
    read_kept_json,
    read_tensors,
    write_json,
    write_kept_json,
    write_tensors,
    write_text,
)

WRITERS = {
    "json": lambda path: write_json(path, {"numbers": list(range(3000))}),
    "text": lambda path: write_text(path, "Käse\n" * 3000),
    "tensors": lambda path: write_tensors(path, {"x": torch.ones(3000)}),
}
OLD = b"what was there before"


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    return path


def assert_untouched(path):
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


@contextmanager
def files_no_longer_than(size: int):
    """Writing more than so many bytes to a file fails, as it does on a full disk."""
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_new_file_replaces_the_old_one_and_leaves_nothing_else(old_file, write):
    write(old_file)
    assert old_file.read_bytes() != OLD
    assert list(old_file.parent.iterdir()) == [old_file]


def test_missing_folders_are_made(tmp_path, write):
    write(tmp_path / "a" / "b" / "file")
    assert (tmp_path / "a" / "b" / "file").stat().st_size > 3000


def test_a_file_that_does_not_fit_leaves_the_old_one(old_file, write):
    with (
        files_no_longer_than(1000),
        pytest.raises(OSError, match=r"could not write .*file .*; what was there is unchanged"),
    ):
        write(old_file)
    assert_untouched(old_file)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_at_any_step_leaves_the_old_file(old_file, write, step, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"^could not write .*No space left on device") as error:
        write(old_file)
    assert error.value.errno == errno.ENOSPC
    assert_untouched(old_file)


def test_a_failure_to_write_a_new_file_leaves_none(tmp_path, write, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError, match="could not write"):
        write(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interruption_leaves_the_old_file(old_file, write, step, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(old_file)
    assert_untouched(old_file)


def test_the_new_file_is_on_the_disk_before_it_takes_its_place(old_file, write, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("replace"), replace(*names))[1])
    write(old_file)
    assert steps == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_content_that_json_does_not_know_leaves_the_old_file(old_file):
    with pytest.raises(TypeError):
        write_json(old_file, {"a": object()})
    assert_untouched(old_file)


def test_text_that_utf8_does_not_know_leaves_the_old_file(old_file):
    with pytest.raises(UnicodeEncodeError):
        write_text(old_file, "\ud800")
    assert_untouched(old_file)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_is_open_to_those_whom_the_umask_lets_in(tmp_path, write, mask, mode):
    umask = os.umask(mask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_what_a_kill_left_is_written_over(tmp_path, write):
    (tmp_path / ".file.meg-tmp").write_text("half of what was to be")
    write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_writers_of_one_file_take_turns_and_the_last_one_stays(tmp_path):
    path, texts = tmp_path / "file", [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        for written in [pool.submit(write_text, path, text) for text in texts]:
            written.result()
    assert path.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_new_folders_are_noted_on_the_disk_in_those_above(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(storage, "sync_folder", synced.append)
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a", tmp_path / "a" / "b"]
    assert synced == [tmp_path, tmp_path / "a"]
    assert make_folder(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_folders_that_cannot_be_made_to_the_end_are_gone_again(tmp_path, monkeypatch, error):
    def fail(folder):
        if folder.name == "a":
            raise error

    monkeypatch.setattr(storage, "sync_folder", fail)
    with pytest.raises(type(error)):
        make_folder(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, is_told", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_flushed_is_told_only_of_disks(
    tmp_path, write, number, is_told, monkeypatch
):
    fsync = os.fsync

    def fail(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    said = r"^/.*file is written, but may be lost if the power fails: .*; check the disk"
    with pytest.raises(OSError, match=said) if is_told else nullcontext():
        write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size > 3000


def test_a_link_in_the_place_of_what_is_written_is_not_followed(tmp_path, write):
    precious = tmp_path / "precious"
    precious.write_bytes(OLD)
    (tmp_path / ".file.meg-tmp").symlink_to(precious)
    with pytest.raises(OSError, match="could not write"):
        write(tmp_path / "file")
    assert precious.read_bytes() == OLD


@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch, lacking):
    (tmp_path / "file").write_text("")
    check_writable(None, tmp_path / "file", tmp_path / "new" / "newer" / "file")
    assert not (tmp_path / "new").exists()
    with pytest.raises(IsADirectoryError, match=r"could not write .*; choose another file"):
        check_writable(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"could not write .*; choose another file"):
        check_writable(tmp_path / "file" / "report.json")
    root_may_all = os.access

    def access(path, mode):
        return root_may_all(path, mode) and not (path == tmp_path and mode & lacking)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(PermissionError, match=r"could not write .*; choose another file"):
        check_writable(tmp_path / "new" / "report.json")


# JSON

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(json_values)
def test_json_is_read_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert json.loads(path.read_bytes()) == value


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"{'a': 1}", b'{"a": "\xff"}'])
def test_damaged_json_is_reported_with_its_path(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(
        CorruptFileError, match=r"manifest\.json is not valid JSON .*; restore or rewrite it"
    ):
        read_json(path)


def test_an_absent_file_is_not_called_corrupt(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")


# Tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_tensors_and_metadata_are_read_as_they_were_written(
    tmp_path_factory, dtype, shape, metadata
):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {"a": (10 * torch.randn(shape)).to(dtype), "größe": torch.arange(3)}
    write_tensors(path, tensors, metadata)
    read, read_metadata = read_tensors(path)
    assert read_metadata == metadata
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


def test_views_that_share_memory_are_written_as_separate_tensors(tmp_path):
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    write_tensors(tmp_path / "x", {"whole": whole, "turned": whole.T, "row": whole[1]})
    read, _ = read_tensors(tmp_path / "x")
    assert torch.equal(read["turned"], whole.T)
    assert torch.equal(read["row"], whole[1])


def test_a_tensor_file_cut_off_anywhere_is_reported(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.arange(4.0)}, {"a": "b"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CorruptFileError, match=r"x\.safetensors is truncated or no safetensors file .*restore"
        ):
            read_tensors(path)


def test_a_file_of_another_kind_is_no_tensor_file(tmp_path):
    write_json(tmp_path / "x", {"a": "b" * 100})
    with pytest.raises(CorruptFileError, match="no safetensors file"):
        read_tensors(tmp_path / "x")


def test_every_bit_of_a_tensor_file_counts(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, {"x": torch.arange(4.0)}, {"step": "3"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CorruptFileError):
            read_tensors(path)


def test_tensors_that_others_wrote_are_not_taken_for_ours(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(CorruptFileError, match=r"does not hold what was written; restore it or"):
        read_tensors(tmp_path / "x")


@given(json_values)
def test_kept_json_is_read_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_kept_json(path, value)
    assert read_kept_json(path) == value


def test_kept_json_that_says_something_else_by_now_is_reported(tmp_path):
    path = tmp_path / "x"
    write_kept_json(path, [1, 2.5])
    path.write_text(path.read_text().replace("2.5", "2.25"))
    with pytest.raises(CorruptFileError, match=r"does not hold what was written; delete it"):
        read_kept_json(path)
    write_json(path, [1, 2.5])
    with pytest.raises(CorruptFileError, match=r"holds no kept work; delete it"):
        read_kept_json(path)
    write_kept_json(path, 1)
    write_json(path, read_json(path) | {"more": 2})
    with pytest.raises(CorruptFileError, match=r"holds no kept work; delete it"):
        read_kept_json(path)


def test_the_digest_of_a_folder_covers_names_and_content_of_its_files_but_not_hidden_ones(tmp_path):
    def digest(**files) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return content_digest(folder)

    kept = digest(a="1", b="2")
    assert kept == digest(b="2", a="1") == digest(**{".DS_Store": "x", ".git/x": "y"}, a="1", b="2")
    others = [digest(a="1"), digest(a="12"), digest(a="1", c="2"), digest(a="2", b="1")]
    others += [digest(**{"a": "1", "b/b": "2"}), digest(), digest(a="1", b="2", c="")]
    others += [digest(a="1b\0002")]  # what would be read one after the other
    assert len({kept, *others}) == 9


def test_in_which_order_a_file_system_lists_files_does_not_count(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text(name)
    digest, listed = content_digest(tmp_path), sorted(tmp_path.iterdir())
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda *_, order=order: iter(order))
        assert content_digest(tmp_path) == digest


# Locks


def test_a_lock_names_its_holder_and_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from meg_kernels.locking import WriterLock\n"
        "sys.argv = ['meg', 'train', 'my edits']\n"
        "lock = WriterLock(Path(sys.stdin.readline().strip()), 'lock'); print('held', flush=True)\n"
        "sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdin.write(f"{tmp_path}\n")
        other.stdin.flush()
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            LockedError,
            match=rf"is being written by process {other.pid} on .* \(meg train 'my edits'\), since "
            r"2\d{3}-.*; start again when that has ended, or write to another folder",
        ):
            WriterLock(tmp_path, "lock")
        other.kill()
    assert (tmp_path / "lock").exists()  # and locks nobody out
    lock = WriterLock(tmp_path, "lock")
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_holds_between_threads_of_one_process(tmp_path):
    lock = WriterLock(tmp_path, "lock")
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        WriterLock(tmp_path, "lock")
    lock.release()
    WriterLock(tmp_path, "lock").release()


def open_files() -> list[str]:
    """What this process holds open."""
    numbers = os.listdir("/proc/self/fd")
    return sorted(os.path.realpath(f"/proc/self/fd/{number}") for number in numbers)


def test_a_file_that_was_removed_while_one_waited_for_it_is_made_anew(tmp_path):
    path = tmp_path / "file"
    handle = open_alone(path, wait=False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(open_alone, path, wait=True)
        while open_files().count(str(path)) < 2:
            pass
        path.unlink()
        os.close(handle)
        got = waiting.result()
    assert is_at(got, path)
    os.rename(path, tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    assert not is_at(got, path)
    os.close(got)


def test_what_cannot_be_opened_alone_is_closed(tmp_path):
    handle = open_alone(tmp_path / "file", wait=False)
    before = open_files()
    with pytest.raises(BlockingIOError):
        open_alone(tmp_path / "file", wait=False)
    assert open_files() == before
    os.close(handle)


def test_a_lock_is_held_until_its_file_is_gone(tmp_path, monkeypatch):
    lock, unlink = WriterLock(tmp_path, "lock"), os.unlink

    def held_meanwhile(path):
        with pytest.raises(BlockingIOError):
            open_alone(lock.path, wait=False)
        unlink(path)

    monkeypatch.setattr(os, "unlink", held_meanwhile)
    lock.release()
    assert not lock.path.exists()


def test_what_was_noted_is_for_the_same_work_alone(tmp_path):
    killed = WriterLock(tmp_path, "lock", "a long name for some work")
    killed.note(["before"])
    killed.abandon()
    same = WriterLock(tmp_path, "lock", "a long name for some work")
    assert same.before == ["before"]
    same.abandon()
    other = WriterLock(tmp_path, "lock", "work")
    assert other.before is None
    assert json.loads(other.path.read_text())["work"] == "work"  # and no rest of a longer line
    other.release()
    nameless = WriterLock(tmp_path, "lock")
    nameless.note(["before"])
    nameless.abandon()
    another = WriterLock(tmp_path, "lock")
    assert another.before is None
    another.release()


def test_what_could_not_be_noted_is_no_note(tmp_path, monkeypatch):
    lock = WriterLock(tmp_path, "lock", "work")

    def full(handle, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        lock.note(["before"])
    assert lock.before is None  # or the writer would keep its lock, as if it had saved
    lock.release()


def test_a_lock_that_cannot_be_written_is_not_held(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="No space left"):
            WriterLock(tmp_path, "lock")
    assert open_files() == before and not list(tmp_path.iterdir())
    WriterLock(tmp_path, "lock").release()


def test_a_lock_whose_folder_was_made_anew_is_taken_again(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    lock = WriterLock(folder, "lock")
    shutil.rmtree(folder)
    folder.mkdir()
    held = len(open_files())
    lock.renew()
    assert len(open_files()) == held
    with pytest.raises(LockedError):
        WriterLock(folder, "lock")
    lock.release()
    other = WriterLock(folder, "lock")
    shutil.rmtree(folder)
    other.release()  # harmless where there is nothing left
    folder.mkdir()
    old = WriterLock(folder, "lock")
    (folder / "lock").unlink()
    new = WriterLock(folder, "lock")
    old.release()  # nor where there is another's
    assert is_at(new.handle, folder / "lock")
    new.release()


# Fingerprints


def test_fingerprints_are_the_same_in_every_session():
    expected = hashlib.sha256('{"a": "ö", "b": [1, null]}\0"x"\0'.encode()).hexdigest()[:16]
    assert fingerprint({"b": [1, None], "a": "ö"}, "x") == expected
    tensor = hashlib.sha256(b"torch.float32(2,)" + bytes([0, 0, 128, 63, 0, 0, 0, 64]) + b"\0")
    assert fingerprint(torch.tensor([1.0, 2.0])) == tensor.hexdigest()[:16]


@given(json_values, json_values)
def test_different_values_have_different_fingerprints(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (fingerprint(a) == fingerprint(b)) == same


@given(st.lists(json_values, max_size=3), st.lists(json_values, max_size=3))
def test_where_one_part_ends_and_the_next_begins_counts(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (fingerprint(*a) == fingerprint(*b)) == same


def test_adjacent_numbers_are_not_one_number():
    assert fingerprint(1, 23) != fingerprint(12, 3)


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3))
def test_how_a_tensor_lies_in_memory_does_not_count(dtype, shape):
    tensor = (10 * torch.randn(shape)).to(dtype)
    backwards = tuple(reversed(range(len(shape))))
    turned = tensor.permute(backwards).contiguous().permute(backwards)
    assert fingerprint(turned) == fingerprint(tensor) == fingerprint(tensor.clone())


def test_every_bit_dtype_and_shape_of_a_tensor_count():
    tensor = torch.arange(6.0)
    changed = tensor.clone()
    changed.view(torch.int32)[3] ^= 1  # the last bit of one number
    others = [changed, tensor.view(2, 3), tensor.view(3, 2), tensor.view(torch.int32), tensor[:5]]
    zeros = [torch.zeros(0), torch.zeros(0, 2), torch.zeros(()), torch.zeros(1)]
    assert len({fingerprint(x) for x in [tensor, *others, *zeros]}) == 1 + len(others) + len(zeros)
    assert fingerprint(tensor, changed) != fingerprint(changed, tensor)


def test_what_was_made_once_is_read_and_made_again_only_if_damaged(tmp_path, caplog):
    work, made = WorkFolder.of(tmp_path) / "inner", []
    path = tmp_path / "inner" / "kept.json"

    def make() -> dict:
        made.append(1)
        return {"number": len(made)}

    nowhere = WorkFolder.of(None) / "inner"
    assert nowhere.file("kept.json") is None
    assert nowhere.once("kept.json", make, write_json, read_json) == ({"number": 1}, False)
    assert work.once("kept.json", make, write_json, read_json) == ({"number": 2}, False)
    assert work.once("kept.json", make, write_json, read_json) == ({"number": 2}, True)
    path.write_text('{"number"')
    assert work.once("kept.json", make, write_json, read_json) == ({"number": 3}, False)
    assert str(path) in caplog.text and "it is made again" in caplog.text
    assert read_json(path) == {"number": 3}


def test_paths_that_are_no_utf8_have_fingerprints_too():
    assert len({fingerprint(path) for path in ("a", "a\udcff", "a\udcfe", "aÿ")}) == 4
