"""What is faster on this machine: short measurements, made when first needed and then kept.

Whether a packed product beats the plain one, or bfloat16 beats float32, follows from no flag of the
processor: it depends on the shape, on the libraries in PyTorch and on the number of threads. So the
two ways are timed against each other, in turns, and their fastest turns are compared, which other
work on the machine disturbs least. Results are kept in the cache folder, in one file for each
machine, PyTorch and number of threads, so that the next process chooses alike at once. What a busy
machine left unsure serves one process only. A file that is damaged or cannot be written costs
another measurement, never an error; to measure again, delete `measured-*.json` there.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meg_kernels.storage import cache_folder, fingerprint, read_json, write_json

log = logging.getLogger(__name__)

WORTHWHILE = 1.1  # the other way is taken from this gain on; less may be noise
AGREEMENT = 1.1  # a gain is sure if two halves of the turns say the same up to this factor
LEAST_TURNS, MOST_TURNS = 8, 400
SECONDS = 0.03  # after these, a contest ends as soon as it is sure
MOST_SECONDS = 0.25  # after these, in any case
POLICIES = ("auto", "always", "never")

_lock = threading.Lock()
_known: dict[str, dict[str, float]] = {}  # by the name of their file, then their own


@dataclass(frozen=True)
class Contest:
    """Two ways to the same result; each is called with the number of the turn.

    Attributes:
        plain: what runs unless the other is worth it.
        other: what may be faster.
    """

    plain: Callable[[int], object]
    other: Callable[[int], object]

    def gain(self) -> tuple[float, bool]:
        """How many times as fast as the plain way the other one is, and whether that is sure.

        Returns:
            The fastest turn of `plain` over the fastest turn of `other`, in that half of the turns
            which speaks less for `other`; and whether both halves say nearly the same.
        """
        ways = [self.plain, self.other]
        halves = [dict.fromkeys(ways, float("inf")) for _ in range(2)]
        started = time.perf_counter()
        for turn in range(MOST_TURNS):
            for way in ways:
                before = time.perf_counter()
                way(turn)
                fastest = halves[turn // 2 % 2]  # each half has both orders of the two ways
                fastest[way] = min(fastest[way], time.perf_counter() - before)
            ways.reverse()  # neither profits from always coming second
            if turn + 1 < LEAST_TURNS:
                continue
            gains = [half[self.plain] / half[self.other] for half in halves]
            sure = max(gains) <= AGREEMENT * min(gains)
            passed = time.perf_counter() - started
            if passed > MOST_SECONDS or (sure and passed > SECONDS):
                break
        return min(gains), sure


@dataclass(frozen=True)
class Choice:
    """One automatic choice, for people to read.

    Attributes:
        what: was to be chosen.
        chosen: instead of what.
        why: the measured gain, or what decided without one.
    """

    what: str
    chosen: str
    why: str


def gain(name: str, contest: Callable[[], Contest]) -> float:
    """How many times as fast as the plain way the other one is on this machine.

    Args:
        name: of what is measured; results are kept by it.
        contest: prepares the measurement; called only where none is kept.

    Returns:
        The gain: 2 where the other way takes half the time of the plain one.
    """
    with _lock:
        known = _gains_here()
        if name not in known:
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                known[name], sure = contest().gain()
            log.debug("measured %s: %.2f times as fast", name, known[name])
            if sure and not _is_busy():
                _keep(name, known[name])
        return known[name]


def gains() -> dict[str, float]:
    """Every gain that is known on this machine with this number of threads, by name."""
    with _lock:
        return dict(_gains_here())


def policy(variable: str) -> str:
    """The `auto`, `always` or `never` that an environment variable says; default `auto`.

    Raises:
        ValueError: the variable says something else.
    """
    said = os.environ.get(variable) or "auto"
    if said not in POLICIES:
        raise ValueError(f"{variable} is {said!r}; it must be one of {', '.join(POLICIES)}")
    return said


def _is_busy() -> bool:
    """Whether, in the last minute, more wanted to run than one above the number of processors."""
    # Threads that wait for each other then lose whole time slices, in every turn alike.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return load > (os.cpu_count() or 1) + 1


def _gains_here() -> dict[str, float]:
    name = _file_name(torch.get_num_threads())
    if name not in _known:
        _known[name] = _kept()
    return _known[name]


@functools.cache
def _file_name(threads: int) -> str:
    return f"measured-{fingerprint(_machine(threads))}.json"


def _machine(threads: int) -> dict[str, Any]:
    """What measurements depend on."""
    return {"processor": _processor(), "torch": torch.__version__, "threads": threads}


def processor_name() -> str:
    """What this machine's processor calls itself."""
    said = _processor()
    return str(said.get("model name") or said["name"] or said["architecture"])


def _processor() -> dict[str, Any]:
    """The model of this machine's processor, and what PyTorch says that it can do."""
    fields = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    said = {"architecture": platform.machine(), "name": platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in reversed(lines):  # so that the first processor's count
        field, _, value = line.partition(":")
        if field.strip() in fields:
            said[field.strip()] = value.strip()
    capable = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {**said, "capabilities": {name: str(value) for name, value in capable.items()}}


def _file() -> Path:
    return cache_folder() / _file_name(torch.get_num_threads())


def _kept() -> dict[str, float]:
    try:
        said = read_json(_file())["gains"]
        return {name: float(gain) for name, gain in said.items() if float(gain) > 0}
    except FileNotFoundError:
        return {}
    # No home, no right to read, no JSON, or JSON of another form.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.debug("measurements are made again: %s", error)
        return {}


def _keep(name: str, gain: float) -> None:
    try:
        # Another process may have kept its own since; where both measured, the first one counts.
        gains = dict(sorted({name: gain, **_kept()}.items()))
        write_json(_file(), {**_machine(torch.get_num_threads()), "gains": gains})
    except (OSError, RuntimeError) as error:
        log.debug("measurements are not kept: %s", error)
