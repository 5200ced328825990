"""meg.json: what a saved edit says of itself, each entry of it checked when it is read.

Its last entry is a digest of all others: a value that was changed since is not taken for another
setting.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meg_kernels.familiarity import Calibration, FamiliarityNetwork, SimilarityGate
from meg_kernels.neuron import ACTIVATIONS
from meg_kernels.routing.generators import GeneratorConfig
from meg_kernels.storage import CorruptFileError, fingerprint, read_json

FORMAT, VERSION = "meg-kernels", 1
MANIFEST = "meg.json"
# What a folder of edits holds, each under its kind, the digest of its content and this ending.
KINDS = {
    "facts": ".jsonl",
    "edits": ".safetensors",
    "gate": ".safetensors",
    "generator": ".safetensors",
    "encoder": "",
}
MENDING = "restore it, or edit again"


@dataclass(frozen=True)
class _Value:
    """What an entry must be, in words and as a check."""

    wanted: str
    fits: Callable[[Any], bool]


def is_name(kind: str, name: Any) -> bool:
    """Whether this is the name of a file of this kind: nothing else, and in no other folder."""
    pattern = f"{kind}-[0-9a-f]{{16}}{re.escape(KINDS[kind])}"
    return isinstance(name, str) and re.fullmatch(pattern, name) is not None


def _is_number(value: Any) -> bool:
    # Compared, as an integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _one_of(*values: str) -> _Value:
    return _Value(f"one of {', '.join(values)}", lambda value: value in values)


def _each(value: Any, kind: type[list] | type[dict], fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, kind) and all(
        fits(one) for one in (value.values() if isinstance(value, dict) else value)
    )


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_generator(value: Any) -> bool:
    try:
        GeneratorConfig.from_dict(value)
    except (TypeError, ValueError, KeyError, AttributeError):
        return False
    return True


_TEXT = _Value("text", lambda value: isinstance(value, str) and value != "")
_COUNT = _Value("a whole number from 0", _is_count)
_WIDTH = _Value("a whole number from 1", lambda value: _is_count(value) and value > 0)
_NUMBER = _Value("a finite number", _is_number)
_SHARE = _Value("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_SECONDS = _Value("a number from 0", _is_seconds)
_TRUTH = _Value("true or false", lambda value: isinstance(value, bool))
_TEXTS = _Value("a list of texts", lambda value: _each(value, list, _TEXT.fits))
_CALIBRATION = dict.fromkeys((f.name for f in dataclasses.fields(Calibration)), _COUNT) | {
    "threshold": _NUMBER,
    "auroc": _SHARE,
    "acceptance": _SHARE,
    "rejection": _SHARE,
}
_TRAINING = {
    "steps": _COUNT,
    "answered": _SHARE,
    "history": _Value(
        "a list of four numbers for each trial",
        lambda value: _each(
            value, list, lambda entry: _each(entry, list, _is_number) and len(entry) == 4
        ),
    ),
    "seconds": _Value("a list of numbers from 0", lambda value: _each(value, list, _is_seconds)),
    "seconds_before": _SECONDS,
}
_SCHEMA: dict[str, Any] = {
    "format": _one_of(FORMAT),
    "version": _Value(str(VERSION), lambda value: value == VERSION),
    "base": {
        "name": _Value("text", lambda value: isinstance(value, str)),
        "dtype": _Value("a data type of torch", _is_dtype),
        "identity": _Value("an object", lambda value: isinstance(value, dict)),
    },
    "layout": {
        "d_in": _WIDTH,
        "d_out": _WIDTH,
        "has_bias": _TRUTH,
        "activation": _one_of(*ACTIVATIONS),
    },
    "config": _Value("an object", lambda value: isinstance(value, dict)),
    "threshold": _NUMBER,
    "pooling": _one_of("mean", "cls"),
    "report": {
        "unlearnt": _TEXTS,
        "calibration": _CALIBRATION,
        "training": _TRAINING,
        "seconds": _Value(
            "an object of numbers from 0", lambda value: _each(value, dict, _is_seconds)
        ),
        "num_left_out": _COUNT,
    },
    "files": {
        kind: _Value(
            f"{kind}-<16 hexadecimal digits>{ending}, beside {MANIFEST}",
            functools.partial(is_name, kind),
        )
        for kind, ending in KINDS.items()
    },
    "made_by": _Value("text, or null", lambda value: value is None or _TEXT.fits(value)),
    "digest": _TEXT,
}
# The part of the editor's configuration that answering needs; the editor checks the rest.
_CONFIG = {
    "gate": _one_of(SimilarityGate.kind, FamiliarityNetwork.kind),
    "generator": _Value("the configuration of a generator", _is_generator),
    "snap": _TRUTH,
    "require_subject": _TRUTH,
    "serve_unlearnt": _TRUTH,
}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's content with the digest of it as the last entry."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return rest | {"digest": fingerprint(rest)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an edited model, every entry as it must be.

    Raises:
        FileNotFoundError: there is none.
        CorruptFileError: it is no manifest, of a newer version, an entry is missing or cannot be,
            or it was changed since it was written; the message says which and what to do.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {folder} holds no edited model")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptFileError(f"{path} was not written by MeG Kernels; {MENDING}")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CorruptFileError(
            f"{path} has format version {version}; this release reads version {VERSION}: upgrade "
            "meg-kernels"
        )
    _check(path, manifest, _SCHEMA, "")
    _check(path, {k: v for k, v in manifest["config"].items() if k in _CONFIG}, _CONFIG, "config.")
    if sealed(manifest)["digest"] != manifest["digest"]:
        raise CorruptFileError(
            f"{path} was changed since it was saved; {MENDING} (`meg gate` sets another threshold)"
        )
    return manifest


def _check(path: Path, content: Any, schema: dict[str, Any], where: str) -> None:
    if not isinstance(content, dict):
        raise _wrong(path, where.removesuffix("."), content, "an object")
    for name, wanted in schema.items():
        if name not in content:
            raise CorruptFileError(f"{path}: {where}{name} is missing; {MENDING}")
        if isinstance(wanted, dict):
            _check(path, content[name], wanted, f"{where}{name}.")
        elif not wanted.fits(content[name]):
            raise _wrong(path, where + name, content[name], wanted.wanted)
    if unknown := content.keys() - schema.keys():
        raise CorruptFileError(f"{path}: {where}{min(unknown)} is no entry of it; {MENDING}")


def _wrong(path: Path, where: str, value: Any, wanted: str) -> CorruptFileError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return CorruptFileError(f"{path}: {where} is {shown}; it must be {wanted}: {MENDING}")
