"""What fuzzing found once, and what it starts from, is read or refused as it should be."""

from __future__ import annotations

import pytest

from benchmarks.trust.fuzz import READERS, RECORDS, SEEDS, changed, place_of, unexpected

INPUTS = [
    (target, path)
    for target in READERS
    for path in sorted((SEEDS / target).iterdir())
    if path.is_file()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the readers' files are made, once."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize(("target", "path"), INPUTS, ids=[f"{t}-{p.name}" for t, p in INPUTS])
def test_an_input_is_read_or_refused_with_a_message(target, path, folder):
    error = unexpected(target, path.read_bytes(), folder)
    if error is not None:
        raise AssertionError(place_of(error)) from error


def test_every_target_has_seeds():
    assert {target for target, _ in INPUTS} == set(READERS)


def test_an_unexpected_error_is_found(monkeypatch, tmp_path):
    monkeypatch.setitem(READERS, "facts", lambda data, folder: {}["query"])
    error = unexpected("facts", b"", tmp_path)
    assert isinstance(error, KeyError) and "KeyError" in place_of(error)


def test_changes_are_the_same_for_the_same_bytes_and_leave_the_record_as_it_was():
    before = repr(RECORDS)
    data = bytes(range(60))
    assert changed(RECORDS, data) == changed(RECORDS, data) != changed(RECORDS, data[:30])
    assert repr(RECORDS) == before
