"""The command `meg`: edit facts into a language model, ask it, evaluate it.

commands.py    the commands and their options
work.py        the folders that they write, and work in
tables.py      what they print
plots.py       what they draw

Nothing is imported here before `main` can answer for it: even that takes a while.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meg_kernels.cli.commands import app
    from meg_kernels.cli.tables import errors

__all__ = ["app", "errors", "main"]


_ENDED = "interrupted; start it again with the same arguments to go on"
_SHOW_CURSOR = "\x1b[?25h"  # which a status line hides
_HOME = {"app": "commands", "errors": "tables"}


def __getattr__(name: str) -> Any:
    if name in ("commands", "tables", "plots"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def main() -> None:
    """Run `meg`; an error that the user can mend is told in one line, without a traceback."""
    with _interruptible():
        _run()


def _run() -> None:
    from rich.markup import escape

    from meg_kernels.cli.commands import app
    from meg_kernels.cli.tables import errors, print_error

    # Loading bars and notes of other libraries tell a user nothing.
    for library in ("transformers", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *rest, **more: errors.print(
        f"[yellow]{escape(str(message))}[/]"
    )
    try:
        app()
    except (OSError, ValueError, KeyError, RuntimeError, FloatingPointError, ImportError) as error:
        print_error(error)
        sys.exit(1)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or around it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, an interruption ends the program with the exit status that shells know it by."""
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if _is_importing(frame):
            # Native modules swallow what is raised there, and go on without what they imported.
            print(f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}{_ENDED}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(130)
        interrupted = True
        raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except BaseException as ended:
        # Typer makes an interruption an exit, and native code any error.
        meant = isinstance(ended, SystemExit) and ended.code == 130
        if not (interrupted or meant or isinstance(ended, KeyboardInterrupt)):
            raise
        print(_ENDED, file=sys.stderr)
        sys.exit(130)
    finally:
        if ours:
            # What is left to be done is short, and would show the next interruption's traceback.
            after = signal.SIG_IGN if interrupted else signal.default_int_handler
            signal.signal(signal.SIGINT, after)
