"""Where commands work: the folder that one writes, and what it keeps for another try."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from meg_kernels.cli.tables import console
from meg_kernels.locking import LockedError, WriterLock
from meg_kernels.storage import (
    cache_folder,
    check_writable,
    content_digest,
    fingerprint,
    make_folder,
    remove_empty,
)

if TYPE_CHECKING:
    from meg_kernels import MeGEditor
    from meg_kernels.routing.saving import Writer


@dataclass(frozen=True)
class Change:
    """What a command works on that puts other edits into a folder.

    Args:
        writer: of that folder; there is no other until the command has ended.
        work: where finished work is kept, in that folder.
    """

    writer: Writer
    work: Path

    def save(self, editor: MeGEditor) -> None:
        """Put the editor's edits into the folder."""
        self.writer.save(editor.edits, editor.encoder, editor.base, editor.config.to_dict())


def check_results(*paths: Path | None) -> None:
    """Refuse, before the work, files for results that could not be written or belong to edits.

    Raises:
        OSError: one is a folder, none can be made there, or it is a file of an edited model.
    """
    from meg_kernels.routing.manifest import KINDS, MANIFEST, is_name

    check_writable(*paths)
    for path in paths:
        if path is None or not path.exists():
            continue
        if path.name == MANIFEST or any(is_name(kind, path.name) for kind in KINDS):
            raise FileExistsError(f"{path} is a file of an edited model; choose another file")


@contextmanager
def changing(context: typer.Context, out: Path, source: Path | None = None) -> Iterator[Change]:
    """Let one command write `out`, from before it loads the edits that it changes.

    An interrupted command resumes when it is run again; one that was interrupted when it had saved
    already does nothing more.

    Args:
        context: of the command.
        out: where it writes its result.
        source: where the edits are that it changes; None: it makes new ones.
    """
    from meg_kernels.routing.saving import WORK, writing

    command = str(context.command.name)
    work = out / WORK / command
    with writing(out, _identity(context, out, source)) as writer:
        done = writer.has_saved
        if not done:
            yield Change(writer, work)
        shutil.rmtree(work, ignore_errors=True)
        remove_empty([work.parent])
    if done:
        console.print(
            f"done already: before it was interrupted, meg {command} had saved to {out}",
            markup=False,
        )
        raise typer.Exit


def _identity(context: typer.Context, out: Path, source: Path | None) -> str:
    """What tells this command, its arguments and what it changes from others."""
    from meg_kernels import __version__
    from meg_kernels.routing.manifest import read_manifest

    # Says so if nothing is edited there.
    before = None if source is None else read_manifest(source)["digest"]
    given = {name: _said(value) for name, value in context.params.items() if name != "out"}
    if source is not None and out.resolve() == source.resolve():
        before = None  # which nobody knows any more once it has been changed in place
    return f"{context.command.name} {fingerprint(__version__, given, before)}"


def _said(value: Any) -> Any:
    """An argument as JSON can hold it; of a file, its content."""
    if isinstance(value, list | tuple):
        return [_said(one) for one in value]
    if isinstance(value, Path):
        return content_digest(value) if value.is_file() else str(value.resolve())
    return value


@contextmanager
def resumable(command: str, *about: object) -> Iterator[Path | None]:
    """A folder in the user's cache, where a command that only reads resumes; gone when it is done.

    Args:
        command: its name.
        about: what is read, which tells one run from others.

    Yields:
        The folder; None where none can be written, or another process is at the same work.
    """
    identity = fingerprint(*map(str, about))
    work = cache_folder() / "work" / f"{command}-{identity}"
    with ExitStack() as last:
        try:
            make_folder(work)
            lock = WriterLock(work, "lock")
            last.callback(lock.release)
        except (OSError, LockedError) as error:
            console.print(f"not resumable after an interruption: {error}", markup=False)
            yield None
            return
        yield work
        shutil.rmtree(work, ignore_errors=True)
