"""Commands that are killed, or find the disk full, at some steps; the benchmark tries them all."""

from __future__ import annotations

import pytest

from benchmarks.trust import faults

COMMANDS = {command.name: command for command in faults.COMMANDS}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with faults.brief_settings():
        yield faults.World(tmp_path_factory.mktemp("world").resolve())


@pytest.fixture(scope="module")
def normal(world):
    """How each command ends undisturbed, found out once."""
    found = {}

    def of(command):
        if command.name not in found:
            found[command.name] = faults.undisturbed(world, command)
        return found[command.name]

    return of


def replaced(steps: list[str]) -> int:
    """The step after which the new state is there: meg.json is the last file that is replaced."""
    return len(steps) - 1 - steps[::-1].index("replace")


@pytest.mark.parametrize("name", ["edit", "add", "distill"])
def test_a_killed_command_run_again_ends_as_if_nothing_had_happened(world, normal, name):
    command = COMMANDS[name]
    steps = normal(command).steps
    last = replaced(steps)
    middle = steps.index("write", last // 2)
    for step, fault in ((middle, "torn"), (last, "before")):
        assert faults.disturbed(world, command, normal(command), step, fault)


def test_a_command_killed_at_its_last_step_is_not_run_twice(world, normal):
    command = COMMANDS["add"]
    last = len(normal(command).steps) - 1
    for step in (replaced(normal(command).steps) + 1, last):
        assert faults.disturbed(world, command, normal(command), step, "before")


def test_a_full_disk_is_told_and_nothing_is_lost(world, normal):
    command = COMMANDS["add"]
    steps = normal(command).steps
    for step in (steps.index("save"), replaced(steps) - 1):
        assert faults.disturbed(world, command, normal(command), step, "full")


@pytest.mark.parametrize("what", [faults.two_writers, faults.read_only, faults.deleted])
def test_another_writer_a_folder_for_readers_only_and_one_that_is_deleted(world, normal, what):
    what(world, COMMANDS["gate"], normal(COMMANDS["gate"]))


def test_commands_have_steps_of_every_kind_that_can_go_wrong(world, normal):
    assert {"mkdir", "write", "fsync", "save", "replace", "rename", "unlink"} <= {
        *normal(COMMANDS["add"]).steps
    }
