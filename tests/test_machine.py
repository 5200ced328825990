"""Measurements: what they compare, and how they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meg_kernels import machine
from meg_kernels.machine import Contest


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache folder, on an idle machine, in a process that has measured nothing."""
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch) -> None:
    """As in another process."""
    monkeypatch.setattr(machine, "_known", {})


class Clock:
    """Seconds that pass only where a way says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(machine.time, "perf_counter", lambda: self.now)

    def contest(self, plain: list[float], other: list[float]) -> Contest:
        """Turn i of a way takes its i-th duration, or its last one."""

        def way(durations):
            def run(turn):
                self.now += durations[min(turn, len(durations) - 1)]

            return run

        return Contest(way(plain), way(other))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def file_in(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize(
    "plain, other, gain, sure",
    [
        ([2.0], [1.0], 2.0, True),
        ([1.0], [4.0], 0.25, True),
        ([9.0, 2.0, 9.0, 2.0, 70.0], [50.0, 1.0, 50.0, 1.0, 50.0], 2.0, True),
        # Only turns 2, 3, 6, 7 of the other way are undisturbed, so doubt speaks for the plain way.
        ([2.0], [3.0, 3.0, 1.0, 1.0, 3.0, 3.0, 1.0, 1.0], 2 / 3, False),
    ],
)
def test_a_gain_compares_the_fastest_turns_of_each_half(clock, plain, other, gain, sure):
    assert clock.contest(plain, other).gain() == (pytest.approx(gain), sure)


@pytest.mark.parametrize(
    "duration, turns",
    [(1.0, machine.LEAST_TURNS), (machine.SECONDS / 39, 20), (1e-6, machine.MOST_TURNS)],
)
def test_a_sure_contest_ends_after_its_time_but_has_its_least_turns(clock, duration, turns):
    contest, called = clock.contest([duration], [duration]), []
    Contest(lambda turn: (called.append(turn), contest.plain(turn)), contest.other).gain()
    assert called == list(range(turns))


def test_an_unsure_contest_goes_on_until_an_undisturbed_turn_or_its_longest_time(clock):
    def disturbed_until(turn: int) -> list[float]:
        """One half is slow in the first turns."""
        return [(2e-3 if i % 4 < 2 else 1e-3) if i < turn else 1e-3 for i in range(400)]

    gain, sure = clock.contest([1e-3], disturbed_until(60)).gain()
    assert (gain, sure) == (pytest.approx(1), True) and 60 * 2e-3 < clock.now < 70 * 3e-3
    clock.now = 0.0
    gain, sure = clock.contest([1e-3], disturbed_until(400)).gain()
    assert (gain, sure) == (pytest.approx(0.5), False)
    assert machine.MOST_SECONDS < clock.now < machine.MOST_SECONDS + 4e-3


def test_an_unsure_gain_serves_one_process(cache, clock, monkeypatch):
    unsure = clock.contest([2.0], [3.0, 3.0, 1.0, 1.0, 3.0, 3.0, 1.0, 1.0])
    first = machine.gain("a", lambda: unsure)
    assert machine.gain("a", lambda: pytest.fail("measured twice")) == first
    assert not cache.exists()
    forget(monkeypatch)
    assert machine.gain("a", lambda: clock.contest([2.0], [1.0])) == 2


def test_what_was_measured_is_known_to_the_next_process(cache, clock, monkeypatch):
    assert machine.gain("a", lambda: clock.contest([3.0], [1.0])) == 3
    assert machine.gain("a", lambda: pytest.fail("measured twice")) == 3
    forget(monkeypatch)
    assert machine.gain("a", lambda: pytest.fail("measured twice")) == 3
    assert machine.gains() == {"a": 3.0}


@pytest.mark.parametrize("above, kept", [(1, True), (1.1, False)])
def test_what_a_busy_machine_measures_is_not_kept(cache, clock, monkeypatch, above, kept):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (4 + above, 0.0, 0.0), raising=False)
    assert machine.gain("a", lambda: clock.contest([3.0], [1.0])) == 3
    assert cache.exists() == kept


def test_another_number_of_threads_is_measured_by_itself(cache, clock, monkeypatch):
    machine.gain("a", lambda: clock.contest([3.0], [1.0]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert machine.gains() == {}
    assert machine.gain("a", lambda: clock.contest([5.0], [1.0])) == 5
    assert len(list(cache.iterdir())) == 2


def test_another_processs_measurements_stay_in_the_file(cache, clock, monkeypatch):
    machine.gain("a", lambda: clock.contest([3.0], [1.0]))
    content = json.loads(file_in(cache).read_text())
    content["gains"] = {"a": 4.0, "theirs": 2.0}
    file_in(cache).write_text(json.dumps(content))
    machine.gain("b", lambda: clock.contest([5.0], [1.0]))
    assert json.loads(file_in(cache).read_text())["gains"] == {"a": 4.0, "b": 5.0, "theirs": 2.0}
    assert machine.gain("a", lambda: pytest.fail("measured twice")) == 3  # to the process's end


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"{", b"\xff\xfe", b"[]", b"3", b"{}", b'{"gains": 3}'),
        *(b'{"gains": {"a": "fast"}}', b'{"gains": {"a": null}}'),
        *(b'{"gains": {"a": -1}}', b'{"gains": {"a": NaN}}'),
    ],
)
def test_a_damaged_file_is_measured_and_written_again(cache, clock, monkeypatch, damage):
    machine.gain("a", lambda: clock.contest([3.0], [1.0]))
    file_in(cache).write_bytes(damage)
    forget(monkeypatch)
    assert machine.gain("a", lambda: clock.contest([2.0], [1.0])) == 2
    assert json.loads(file_in(cache).read_text())["gains"] == {"a": 2.0}


def test_a_cache_that_cannot_be_read_or_written_costs_a_measurement(
    cache, clock, monkeypatch, tmp_path
):
    machine.gain("a", lambda: clock.contest([3.0], [1.0]))
    kept = file_in(cache)
    kept.unlink()
    kept.mkdir()  # neither read nor replaced
    forget(monkeypatch)
    assert machine.gain("a", lambda: clock.contest([2.0], [1.0])) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    forget(monkeypatch)
    assert machine.gain("a", lambda: clock.contest([4.0], [1.0])) == 4
    assert machine.gain("a", lambda: pytest.fail("measured twice")) == 4


def test_a_user_without_a_home_measures_too(cache, clock, monkeypatch):
    def homeless(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    for name in ("MEG_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert machine.gain("a", lambda: clock.contest([4.0], [1.0])) == 4


def test_a_measurement_that_fails_is_not_kept(cache, clock):
    def contest():
        raise NotImplementedError("no such product")

    with pytest.raises(NotImplementedError):
        machine.gain("a", contest)
    assert machine.gain("a", lambda: clock.contest([2.0], [1.0])) == 2


def test_measured_is_without_gradients_and_autocast_which_are_as_before_afterwards(cache, clock):
    def contest():
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return clock.contest([2.0], [1.0])

    with torch.autocast("cpu", torch.bfloat16):
        machine.gain("a", contest)
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")


def test_the_file_says_which_machine_it_is_of(cache, clock):
    machine.gain("a", lambda: clock.contest([2.0], [1.0]))
    content = json.loads(file_in(cache).read_text())
    assert content["torch"] == torch.__version__
    assert content["threads"] == torch.get_num_threads()
    assert content["processor"]["architecture"] and "capabilities" in content["processor"]


@pytest.mark.parametrize("said, expected", [(None, "auto"), ("", "auto"), ("never", "never")])
def test_a_policy_is_what_the_variable_says(monkeypatch, said, expected):
    monkeypatch.delenv("MEG_KERNELS_PACKING", raising=False)
    if said is not None:
        monkeypatch.setenv("MEG_KERNELS_PACKING", said)
    assert machine.policy("MEG_KERNELS_PACKING") == expected
