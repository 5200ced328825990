"""Values that the running thread or asyncio task holds, and that no other one sees.

    with holding({module: value}):
        held(module)            # value, in here; in any other thread or task nothing is held

They follow the call as `contextvars` do: a task that is started inside sees them, and so does
`asyncio.to_thread`; a `threading.Thread` that is started inside does not, unless it runs in a copy
of the context (`contextvars.copy_context().run`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_HELD: ContextVar[tuple[dict[Any, Any], ...]] = ContextVar("meg_kernels_held", default=())


def held(owner: Any) -> Any:
    """What is held here for `owner`, by the block that was entered last; None if nothing is."""
    for block in reversed(_HELD.get()):
        if owner in block:
            return block[owner]
    return None


@contextmanager
def holding(values: Mapping[Any, Any]) -> Iterator[None]:
    """Inside, these values are held for their owners, by this thread or task alone.

    Blocks may be left in any order. Once one is left, nothing holds its values any more, whatever
    was started inside and is still running.

    Args:
        values: by their owners, any objects that are told apart by what they hash to.
    """
    block = dict(values)
    _HELD.set((*_HELD.get(), block))
    try:
        yield
    finally:
        _HELD.set(tuple(other for other in _HELD.get() if other is not block))
        block.clear()  # tasks that were started inside have it too


def is_traced() -> bool:
    """Whether a compiler or an exporter reads this code, in this thread.

    `torch.compiler.is_compiling()` alone says so to every thread while one of them compiles.
    """
    return torch.compiler.is_compiling() and (
        torch.compiler.is_dynamo_compiling() or _get_current_dispatch_mode() is not None
    )


_DRAWING = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, what draws from PyTorch's own generators, such as dropout, draws from this seed.

    Those generators are one for all threads: who enters waits until others have left. Afterwards
    they are as they were.

    Args:
        seed: 0 to 2**63 - 1.
        device: whose generator is seeded, beside the CPU's.
    """
    on_gpu = device is not None and device.type == "cuda"
    with _DRAWING, torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class OwnLock:
    """A lock that its thread may take again; a copy of what has one gets a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return OwnLock, ()
