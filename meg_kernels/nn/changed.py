"""Changing how the modules of a model run: for the calls of one thread or task, or for all.

Others may run the same model meanwhile, and may change it themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from meg_kernels.scoped import OwnLock, held, holding, is_traced


@contextmanager
def hooked(
    register: Callable[..., Any], hook: Callable[..., Any], **options: Any
) -> Iterator[None]:
    """Inside, `hook` is called in the forward calls of this thread or task; others do not meet it.

    Args:
        register: what puts hooks on a module, such as `module.register_forward_hook`.
        hook: what it takes.
        options: further keyword arguments of `register`.
    """

    def here(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if held(here) else None

    handle = register(here, **options)
    try:
        with holding({here: True}):
            yield
    finally:
        handle.remove()


class _Method:
    """Stands for a module's method for as long as somebody has replaced it."""

    def __init__(self, own: Callable[..., Any], is_attribute: bool):
        self.own, self.is_attribute = own, is_attribute
        self.everywhere: list[Callable[..., Any]] = []
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Compilers do not know what a thread holds; what is replaced for one runs uncompiled.
        method = None if is_traced() else held(self)
        if method is None:  # others may leave their blocks meanwhile
            method = next(reversed(self.everywhere), self.own)
        return method(*args, **kwargs)

    def __reduce__(self) -> Any:
        return itself, (self.own,)  # in a copy of the module, nobody has replaced it


def itself(method: Callable[..., Any]) -> Callable[..., Any]:
    """What a copy has in place of what stands for the method."""
    return method


_CHANGING = threading.Lock()


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward as it is for those who have not replaced it."""
    forward = module.forward
    return forward.own if isinstance(forward, _Method) else forward


@contextmanager
def replaced(
    methods: Mapping[tuple[nn.Module, str], Callable[..., Any]], everywhere: bool = False
) -> Iterator[None]:
    """Inside, modules compute with the given functions; their hooks fire as before.

    Args:
        methods: by module and name of the method, `forward` mostly.
        everywhere: in all threads and tasks; otherwise in the calls of this one alone.
    """
    standing = {place: _taken(*place) for place in methods}
    if everywhere:
        for place, method in methods.items():
            standing[place].everywhere.append(method)
    try:
        with holding({} if everywhere else {standing[place]: methods[place] for place in methods}):
            yield
    finally:
        for place, method in methods.items():
            if everywhere:
                standing[place].everywhere.remove(method)
            _given_back(*place, standing[place])


def _taken(module: nn.Module, name: str) -> _Method:
    with _CHANGING:
        standing = vars(module).get(name)
        if not isinstance(standing, _Method):
            standing = _Method(getattr(module, name), name in vars(module))
            vars(module)[name] = standing
        standing.users += 1
        return standing


def _given_back(module: nn.Module, name: str, standing: _Method) -> None:
    with _CHANGING:
        standing.users -= 1
        if standing.users or vars(module).get(name) is not standing:  # somebody else's by now
            return
        if standing.is_attribute:  # accelerate's, for instance
            vars(module)[name] = standing.own
        else:
            del vars(module)[name]


class Shared:
    """A context that is one for all threads: the first that enters it makes it, the last ends it.

    Args:
        make: the context; it is called anew each time that nobody was inside. A copy of this has
            its copy, and nobody inside.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]):
        self._make, self._lock = make, OwnLock()
        self._users, self._held = 0, ExitStack()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, it is entered; in other threads too, until the last one has left."""
        with self._lock:
            if not self._users:
                self._held.enter_context(self._make())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._held.close()

    def __reduce__(self) -> Any:
        return Shared, (self._make,)


_UNCOMPILED = Shared(lambda: torch.compiler.set_stance("force_eager"))


def uncompiled() -> AbstractContextManager[None]:
    """Inside, models run as they are written: compiled code does not see hooks added later.

    In other threads too, until the last one has left.
    """
    return _UNCOMPILED.in_use()
