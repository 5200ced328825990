"""What every benchmark shares: device, ceilings, race; and what goes on record with the times."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import asdict

import pytest
import torch

from benchmarks.measure import Ceilings, Race, clock, measure_ceilings, summary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")
CEILINGS = pytest.StashKey[Ceilings]()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=clock(DEVICE)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; CUDA_VISIBLE_DEVICES="" hides it."""
    return DEVICE


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> Ceilings:
    measured = measure_ceilings(DEVICE)
    pytestconfig.stash[CEILINGS] = measured
    return measured


@pytest.fixture
def race(benchmark, ceilings: Ceilings, pytestconfig: pytest.Config) -> Race:
    """The race; `--benchmark-max-time` and `--benchmark-min-rounds` say how long it lasts."""
    return Race(
        benchmark,
        DEVICE,
        ceilings,
        seconds=float(pytestconfig.getoption("benchmark_max_time")),
        rounds=int(pytestconfig.getoption("benchmark_min_rounds")),
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["versions"] = {name: version_of(name) for name in PACKAGES}
    machine_info["versions"]["cuda"] = torch.version.cuda
    machine_info["cores"] = os.cpu_count()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = DEVICE.type
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        machine_info["gpu"] = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
        }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    # A machine that got a copy of the tree without its history is told the revision.
    if revision := os.environ.get("MEG_KERNELS_REVISION"):
        commit_info["id"] = revision


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    if CEILINGS in config.stash:
        output_json["ceilings"] = asdict(config.stash[CEILINGS])
    # Thousands of single times and the processor's flags: the quartiles and its name are enough.
    output_json["machine_info"]["cpu"].pop("flags", None)
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    races = [bench.extra_info for bench in config._benchmarksession.benchmarks]
    if CEILINGS in config.stash:
        terminalreporter.write_sep("-", "races")
        terminalreporter.write_line(str(config.stash[CEILINGS]))
    for record in races:
        if "against" in record:
            terminalreporter.write_line(summary(record))


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
