"""Files that are either whole or absent, and notice when their content changes.

A file is written beside its place under a temporary name, flushed to the disk and renamed over
the old one, so that an interruption, a full disk or a loss of power leaves the old file as it was.
Tensors, and JSON that is read again, carry a digest of themselves: a flipped bit is an error, not
another result.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

from meg_kernels.checks import as_path
from meg_kernels.locking import open_alone

if TYPE_CHECKING:  # readers of facts and the command line's help do without torch
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

TEMPORARY = ".meg-tmp"
_DIGEST = "digest"
# What a file system answers that cannot flush folders: it keeps its own order.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR}


def os_error(number: int | None, message: str) -> OSError:
    """The error of the system that has this number, with our message alone as its text.

    `OSError(number, message)` would put "[Errno 28]" before it.
    """
    kind = type(OSError(number, message))  # such as PermissionError
    error = kind(message)
    error.errno = number
    return error


class CorruptFileError(ValueError):
    """A file is truncated, damaged or of another kind than it should be."""


def cache_folder() -> Path:
    """Where things made once are kept: $MEG_KERNELS_CACHE, else the user's cache folder."""
    if named := os.environ.get("MEG_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meg_kernels"


def make_folder(path: Path) -> list[Path]:
    """Make a folder, and those above it that are missing; the ones made, the innermost last."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(folder)
            sync_folder(folder.parent)
    except BaseException:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that `make_folder` made, as far as they hold nothing."""
    with contextlib.suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def sync_folder(path: Path) -> None:
    """Flush to the disk which names a folder holds: a rename is lost with the power until then."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sync_files(folder: Path) -> None:
    """Flush to the disk what a folder and those below it hold."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def check_writable(*paths: Path | None) -> None:
    """Refuse, before the work, files that could not be written after it; None is no file.

    Raises:
        OSError: one is a folder, or none can be made where it shall be.
    """
    for path in paths:
        if path is None:
            continue
        above = path.absolute().parent
        while not os.path.lexists(above):
            above = above.parent
        if path.is_dir():
            reason = errno.EISDIR
        elif not above.is_dir():
            reason = errno.ENOTDIR
        elif not os.access(above, os.W_OK | os.X_OK):
            reason = errno.EACCES
        else:
            continue
        raise os_error(
            reason, f"could not write {path} ({os.strerror(reason)}); choose another file"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    # One name for all who write this file, one after the other: what a kill leaves is written over.
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        make_folder(path.parent)
        handle = open_alone(temporary, wait=True)
        try:
            yield temporary
            os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(handle)
    except OSError as error:
        reason = error.strerror or str(error)
        raise os_error(
            error.errno, f"could not write {path} ({reason}); what was there is unchanged"
        ) from error
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise os_error(
            error.errno,
            f"{path} is written, but may be lost if the power fails: its folder could not be "
            f"flushed to the disk ({error.strerror or error}); check the disk, and write it again",
        ) from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The JSON in `path`; CorruptFileError says what is wrong with it and what to do."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits
        raise CorruptFileError(
            f"{path} is not valid JSON ({error}); restore or rewrite it"
        ) from error


def write_kept_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON with its digest, atomically, for `read_kept_json`."""
    write_json(path, {_DIGEST: fingerprint(content), "content": content})


def read_kept_json(path: str | Path) -> Any:
    """What `write_kept_json` wrote; CorruptFileError if it is anything else by now."""
    kept = read_json(path)
    if not isinstance(kept, dict) or kept.keys() != {_DIGEST, "content"}:
        raise CorruptFileError(f"{path} holds no kept work; delete it")
    if fingerprint(kept["content"]) != kept[_DIGEST]:
        raise CorruptFileError(f"{path} does not hold what was written; delete it")
    return kept["content"]


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors with their digest, atomically.

    Args:
        path: where to.
        tensors: by their names.
        metadata: texts by their names, but for `digest`.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    noted = dict(metadata or {})
    noted[_DIGEST] = _digest(plain, noted)
    content = save(plain, noted)  # its save_file would not keep to the umask
    with _replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def as_os_error(error: SafetensorError) -> OSError:
    """The error of the system, such as a full disk, that safetensors reports in its own way."""
    number = re.search(r"os error (\d+)", str(error))
    return os_error(int(number[1]) if number else errno.EIO, str(error))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that `write_tensors` wrote; CorruptFileError if damaged."""
    tensors, noted = checked_tensors(path)
    if noted.pop(_DIGEST, None) != _digest(tensors, noted):
        raise CorruptFileError(
            f"{path} does not hold what was written; restore it or make it again"
        )
    return tensors, noted


def checked_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file whose content was checked by the caller.

    Raises:
        CorruptFileError: it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} is truncated or no safetensors file ({error}); restore it or make it again"
        ) from error


def _digest(tensors: Mapping[str, Tensor], noted: Mapping[str, str]) -> str:
    names = sorted(tensors)
    return fingerprint(dict(noted), names, *(tensors[name] for name in names))


def content_digest(path: Path) -> str:
    """16 hex digits of what a file holds, or a folder: all its files that are not hidden."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()  # "." for the file itself
        if name != "." and any(part.startswith(".") for part in name.split("/")):
            continue
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class WorkFolder:
    """A folder where long work keeps what is finished, so that it resumes after an interruption.

    Args:
        path: the folder, made when something is kept; None: nothing is kept.
    """

    path: Path | None = None

    @classmethod
    def of(cls, folder: str | Path | None) -> WorkFolder:
        """The work folder at a path, or one that keeps nothing.

        Raises:
            TypeError, ValueError: it is no path.
            OSError: it is a file, or nothing can be written there.
        """
        if folder is None:
            return cls()
        path = as_path("work_folder", folder)
        check_writable(path / "work")
        return cls(path)

    def __truediv__(self, name: str) -> WorkFolder:
        """The folder of this name inside this one."""
        return self if self.path is None else WorkFolder(self.path / name)

    def file(self, name: str) -> Path | None:
        """Where a file of this name is kept; None if nothing is."""
        return None if self.path is None else self.path / name

    def once(
        self,
        name: str,
        make: Callable[[], T],
        write: Callable[[Path, T], None],
        read: Callable[[Path], T],
    ) -> tuple[T, bool]:
        """What `make` returns, made once and kept in the file of this name.

        A damaged file is made again.

        Returns:
            What was made, and whether that was earlier: then it was read from the file.
        """
        path = self.file(name)
        if path is None:
            return make(), False
        if path.exists():
            try:
                return read(path), True
            except CorruptFileError as error:
                log.warning("%s; it is made again", error)
        made = make()
        write(path, made)
        return made, False


def fingerprint(*parts: Any) -> str:
    """16 hex digits that identify JSON-able values and tensors: equal inputs, equal digits."""
    import torch

    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            plain = part.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        else:
            text = json.dumps(part, sort_keys=True, ensure_ascii=False)
            digest.update(text.encode("utf-8", "surrogatepass"))  # paths that are no UTF-8, too
        digest.update(b"\0")  # else 1, 23 would be 12, 3
    return digest.hexdigest()[:16]
