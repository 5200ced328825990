"""Files that are either whole or absent: atomic writes of safetensors and JSON.

A file is written beside its place under a temporary name, flushed to the disk and renamed over
the old one, so that an interruption or a full disk leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # readers of facts and the command line's help do without torch
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")


class CorruptFileError(ValueError):
    """A file is truncated, damaged or of another kind than it should be."""


def cache_folder() -> Path:
    """Where things made once are kept: $MEG_KERNELS_CACHE, else the user's cache folder."""
    if named := os.environ.get("MEG_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meg_kernels"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {path} ({error.strerror}); what was there is unchanged"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{path} is not valid JSON ({error}); restore or rewrite it"
        ) from error


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with _replacing(Path(path)) as temporary:
        try:
            save_file(plain, temporary, dict(metadata or {}))
        except SafetensorError as error:  # safetensors reports a full disk so
            raise OSError(None, str(error)) from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; CorruptFileError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} is truncated or no safetensors file ({error}); restore it or make it again"
        ) from error


@dataclass(frozen=True)
class WorkFolder:
    """A folder where long work keeps what is finished, so that it resumes after an interruption.

    Args:
        path: the folder, made when something is kept; None: nothing is kept.
    """

    path: Path | None = None

    @classmethod
    def of(cls, folder: str | Path | None) -> WorkFolder:
        """The work folder at a path, or one that keeps nothing."""
        return cls(None if folder is None else Path(folder))

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
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\0")  # else 1, 23 would be 12, 3
    return digest.hexdigest()[:16]
