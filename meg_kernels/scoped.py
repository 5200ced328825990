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
from types import MappingProxyType
from typing import Any

_HELD: ContextVar[Mapping[Any, Any]] = ContextVar("meg_kernels_held", default=MappingProxyType({}))


def held(owner: Any) -> Any:
    """What is held here for `owner`; None if nothing is."""
    return _HELD.get().get(owner)


@contextmanager
def holding(values: Mapping[Any, Any]) -> Iterator[None]:
    """Inside, these values are held for their owners, by this thread or task alone.

    Blocks may be left in any order.

    Args:
        values: by their owners, any objects that are told apart by what they hash to.
    """
    before = _HELD.get()
    _HELD.set({**before, **values})
    try:
        yield
    finally:
        after = {owner: value for owner, value in _HELD.get().items() if owner not in values}
        _HELD.set(after | {owner: before[owner] for owner in values if owner in before})


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
