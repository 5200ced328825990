"""One writer at a time: locks that end with the process that holds them.

They are `flock`'s: the system releases them when their process ends, however it ends, so that a
kill locks nobody out. They hold between processes of one machine, and on NFS between machines
where its server keeps locks. Where there are none (Windows, some network file systems), writers
are not kept apart, and only what they check before they replace anything protects them.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


class LockedError(RuntimeError):
    """Another process writes there."""


def open_alone(path: Path, *, wait: bool) -> int:
    """Open a file, made if it is not there, as the only one who holds it open so.

    Args:
        path: the file; its mode is as the user's umask has it.
        wait: until others have closed it, instead of raising BlockingIOError.

    Returns:
        Its descriptor; closing that, or the end of the process, lets others in.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(path, flags, 0o666)
        try:
            _lock(handle, wait)
            if is_at(handle, path):  # not what another one has removed or renamed meanwhile
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _lock(handle: int, wait: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _TAKEN:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from None
        log.debug("this file system keeps no locks (%s)", error)


class WriterLock:
    """Who holds it is the one writer of a folder.

    Its file says who holds it, and for what. It goes when the lock is released: one that is found
    is of a writer that was killed, and says what that one was at.

    Args:
        folder: which is there.
        name: of the lock's file in it.
        work: what tells the work that it is held for from any other; None: none that is gone on
            with.

    Attributes:
        before: what a killed writer had noted, by `note`, when it began the same work; None: there
            was none.

    Raises:
        LockedError: another process, or thread, holds it; the message says which, and since when.
        OSError: no file can be written there.
    """

    def __init__(self, folder: Path, name: str, work: str | None = None):
        self.folder, self.path = folder, folder / name
        self._about: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "since": datetime.datetime.now().isoformat(" ", "seconds"),
            "work": work,
        }
        self.handle = self._open()

    @property
    def before(self) -> Any:
        """What was noted when this work began."""
        return self._about.get("before")

    def note(self, before: Any) -> None:
        """Note, for who goes on with the same work after a kill, what it began with."""
        self._write(self.handle, noted := self._about | {"before": before})
        self._about = noted  # not before it is written: a note that failed is none

    def _open(self) -> int:
        try:
            handle = open_alone(self.path, wait=False)
        except BlockingIOError:
            raise LockedError(
                f"{self.folder} is being written by {self._holder()}; start again when that has "
                "ended, or write to another folder"
            ) from None
        try:
            left = self._read()
            work = self._about["work"]
            if "before" in left and work is not None and left.get("work") == work:
                self._about["before"] = left["before"]
            self._write(handle, self._about)
        except BaseException:
            self._close(handle)
            raise
        return handle

    def _write(self, handle: int, about: Mapping[str, Any]) -> None:
        # In one line, over the old one: a kill leaves one of the two.
        line = json.dumps(about).encode() + b"\n"
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, line)
        os.ftruncate(handle, len(line))

    def _read(self) -> dict[str, Any]:
        try:
            left = json.loads(self.path.read_text(encoding="utf-8").partition("\n")[0])
        except (OSError, ValueError):
            return {}
        return left if isinstance(left, dict) else {}

    def _holder(self) -> str:
        about = self._read()
        if not {"pid", "host", "command", "since"} <= about.keys():  # it is starting, or ending
            return "another process"
        return "process {pid} on {host} ({command}), since {since}".format(**about)

    def renew(self) -> None:
        """Take it again if its file is gone, as when the folder was deleted and made anew."""
        if not is_at(self.handle, self.path):
            gone, self.handle = self.handle, self._open()
            os.close(gone)

    def release(self) -> None:
        """Let others write: the work has ended."""
        self._close(self.handle)

    def abandon(self) -> None:
        """Let others write, as a kill does: the work has not ended."""
        os.close(self.handle)

    def _close(self, handle: int) -> None:
        with contextlib.suppress(OSError):
            if is_at(handle, self.path):
                os.unlink(self.path)
        os.close(handle)
