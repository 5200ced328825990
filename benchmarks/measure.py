"""How everything here is measured, kernels of microseconds and answers of seconds alike.

A benchmark is a `Race` of our way against named baselines. Every way runs once; the correctness
gate looks at what each of them returned; only then they are timed, in turns: baseline, ours,
baseline, ours. A speed-up is the median over these pairs, so that a machine that slows down for a
while slows both sides. Times on a GPU are those of its own clock (CUDA events).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from meg_kernels.precision import multiplies_bfloat16

MOST_ROUNDS = 1000
COPY = "copy bandwidth"
# Below this a CPU's caches hold the operands, and a share of the memory's bandwidth says nothing.
CPU_CACHES = 64 * 2**20


class GpuMoment:
    """A point in the GPU's queue of work; the difference of two is the seconds it worked between.

    As pytest-benchmark's timer it keeps the host's waiting out of a kernel's few microseconds.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: GpuMoment) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def clock(device: torch.device) -> Callable[[], Any]:
    """The timer of `device`: a later reading minus an earlier one is seconds."""
    return GpuMoment if device.type == "cuda" else time.perf_counter


@functools.cache
def cold_caches(device: torch.device) -> Callable[[], None]:
    """What to do before an op that is timed alone, so that a GPU reads its operands from memory.

    On a CPU nothing: there a model's activations are in the caches when the op meets them.
    """
    if device.type != "cuda":
        return _nothing
    properties = torch.cuda.get_device_properties(device)
    flushed = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device=device)

    def flush() -> None:
        flushed.zero_()
        # While the GPU waits the host gets ahead: no gap between launches is timed as work.
        torch.cuda._sleep(2_000_000)

    return flush


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Args:
        name: as the tables call it.
        run: does the work and returns its result, for the gate.
        prepare: runs before each run, untimed.
        items: how many of the case's items (queries, facts) one run does; times are per item.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None] = _nothing
    items: int = 1


@dataclass(frozen=True)
class Case:
    """What is done, on what: the part that all ways share.

    Args:
        what: as the tables call it: "dynamic_neuron forward", "decode step".
        shape: the sizes that matter, by name.
        dtype: of the operands.
        bytes: the fewest that must move through memory; None where nobody counts them.
        flops: floating-point operations; likewise.
    """

    what: str
    shape: Mapping[str, int | str]
    dtype: torch.dtype
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Passed:
    """A correctness gate that held: what was compared with, and how close it was."""

    oracle: str
    error: float
    tolerance: float

    @classmethod
    def close(
        cls, results: Mapping[str, Tensor], expected: Tensor, oracle: str, ops: int = 1
    ) -> Passed:
        """Each way's result is `expected` up to rounding; AssertionError names the one that is not.

        The error is |result - expected| / |expected| in float64. Each of `ops` roundings on the
        way to the result may add as much as one op is allowed.
        """
        worst, tolerance = 0.0, 0.0
        expected = expected.double()
        for name, result in results.items():
            allowed = ops * TOLERANCES[result.dtype]
            error = float((result.double() - expected).norm() / expected.norm())
            assert error <= allowed, f"{name}: off by {error:.1e} from {oracle}; allowed {allowed}"
            worst, tolerance = max(worst, error), max(tolerance, allowed)
        return cls(oracle, worst, tolerance)

    @classmethod
    def identical(cls, results: Mapping[str, Any], expected: Any, oracle: str) -> Passed:
        """Each way's result is `expected`, exactly."""
        for name, result in results.items():
            assert result == expected, f"{name} differs from {oracle}: {result} for {expected}"
        return cls(oracle, 0.0, 0.0)


# One rounding of the result is a quarter to half of this; sums over 10^4 terms fit in float32's.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, method="inclusive")
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at most, measured in this run.

    Args:
        copy: bytes a second of a large copy, read and written ones counted.
        matmul: floating-point operations a second of a large matrix product, by dtype.
    """

    copy: float
    matmul: dict[str, float] = field(default_factory=dict)

    def share(self, case: Case, seconds: float) -> tuple[str, float]:
        """Which ceiling binds `case`, and how much of it is reached in `seconds`."""
        floors = {COPY: (case.bytes or 0) / self.copy}
        if rate := self.matmul.get(name_of(case.dtype)):
            floors["matrix product"] = (case.flops or 0) / rate
        ceiling = max(floors, key=lambda name: floors[name])
        return ceiling, floors[ceiling] / seconds

    def __str__(self) -> str:
        rates = [f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in self.matmul.items()]
        return f"this machine: copies {self.copy / 1e9:.3g} GB/s, multiplies {', '.join(rates)}"


def measure_ceilings(device: torch.device) -> Ceilings:
    """The fastest of several large copies and matrix products, of random numbers."""
    gpu = device.type == "cuda"
    now = clock(device)

    def fastest(run: Callable[[], Any]) -> float:
        run()
        seconds = []
        for _ in range(30 if gpu else 5):
            start = now()
            run()
            seconds.append(now() - start)
        return min(seconds)

    source = torch.randn(2**28 if gpu else 2**26, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / fastest(functools.partial(target.copy_, source))
    matmul = {}
    side = 8192 if gpu else 2048
    for dtype in (torch.float32, torch.bfloat16):
        if dtype is torch.float32 or multiplies_bfloat16(device):
            left, right = torch.randn(2, side, side, device=device, dtype=dtype)
            out = torch.empty_like(left)
            seconds = fastest(functools.partial(torch.mm, left, right, out=out))
            matmul[name_of(dtype)] = 2 * side**3 / seconds
    return Ceilings(copy, matmul)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Race:
    """Runs ways beside each other; see the top of this file.

    Args:
        benchmark: pytest-benchmark's fixture: it times our way and keeps the record.
        device: where the work is done.
        ceilings: of this run.
        seconds: how long a race may take, about.
        rounds: how many rounds it takes at least, if that is longer.
    """

    benchmark: Any
    device: torch.device
    ceilings: Ceilings
    seconds: float
    rounds: int

    def __call__(
        self,
        case: Case,
        ours: Way,
        *baselines: Way,
        gate: Callable[[dict[str, Any]], Passed],
        longer: float = 1.0,
        rounds: int | None = None,
    ) -> None:
        """Time `ours` against `baselines` and record it.

        Args:
            case: what is done.
            ours, baselines: the ways; their names must differ.
            gate: gets what each way returned in its first run, by name; raises AssertionError
                where a result is wrong: then nothing is timed.
            longer: how many times the usual seconds this race may take.
            rounds: at least so many; default the usual number.
        """
        ways = [*baselines, ours]
        start = time.perf_counter()
        first = {way.name: self._run(way)[0] for way in ways}
        round_seconds = time.perf_counter() - start
        passed = gate(first)
        first.clear()
        if round_seconds < 1:  # much of a short first round may have been compiling
            start = time.perf_counter()
            for way in ways:
                self._run(way)
            round_seconds = time.perf_counter() - start
        count = int(self.seconds * longer / round_seconds)
        count = min(max(count, rounds or self.rounds), MOST_ROUNDS)
        times: dict[str, list[float]] = {way.name: [] for way in ways}

        def before_ours() -> None:
            for way in baselines:
                times[way.name].append(self._run(way)[1] / way.items)
            ours.prepare()

        self.benchmark.pedantic(ours.run, setup=before_ours, rounds=count)
        if self.benchmark.stats is None:  # --benchmark-disable: each ran once and was right
            return
        times[ours.name] = [seconds / ours.items for seconds in self.benchmark.stats.stats.data]
        self._record(case, ours, baselines, times, passed)

    def _run(self, way: Way) -> tuple[Any, float]:
        now = clock(self.device)
        way.prepare()
        start = now()
        result = way.run()
        return result, now() - start

    def _record(
        self,
        case: Case,
        ours: Way,
        baselines: Sequence[Way],
        times: dict[str, list[float]],
        passed: Passed,
    ) -> None:
        seconds = Spread.of(times[ours.name])
        record: dict[str, Any] = {
            "what": case.what,
            "way": ours.name,
            "device": self.device.type,
            "shape": dict(case.shape),
            "dtype": name_of(case.dtype),
            "rounds": len(times[ours.name]),
            "items": ours.items,
            "seconds": asdict(seconds),
            "against": {
                way.name: {
                    "seconds": asdict(Spread.of(times[way.name])),
                    "speed_up": asdict(
                        Spread.of(
                            [a / b for a, b in zip(times[way.name], times[ours.name], strict=True)]
                        )
                    ),
                }
                for way in baselines
            },
            "gate": asdict(passed),
        }
        if case.bytes is not None and case.flops is not None:
            record |= {"bytes": case.bytes, "flops": case.flops}
            ceiling, share = self.ceilings.share(case, seconds.median)
            in_caches = self.device.type == "cpu" and case.bytes < CPU_CACHES
            if ceiling != COPY or not in_caches:
                record |= {"ceiling": ceiling, "of_ceiling": share}
        self.benchmark.extra_info |= record


def summary(record: Mapping[str, Any]) -> str:
    """One line about a recorded race."""
    shape = ", ".join(f"{name} {size}" for name, size in record["shape"].items())
    line = f"{record['what']} ({shape}, {record['dtype']}): {record['way']} "
    line += in_units(record["seconds"]["median"])
    for name, against in record["against"].items():
        line += f"; {against['speed_up']['median']:.3g} x {name}"
    if "of_ceiling" in record:
        line += f"; {record['of_ceiling']:.0%} of the {record['ceiling']}"
    return line


def in_units(seconds: float) -> str:
    """
    >>> in_units(0.0000123), in_units(0.0456), in_units(7.89)
    ('12.3 µs', '45.6 ms', '7.89 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError("unreachable")
