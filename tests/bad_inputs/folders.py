"""Folders of edited models, and folders that edits shall go to."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from bad_inputs import Case
from meg_kernels import MeGEditor
from meg_kernels.locking import LockedError, WriterLock
from meg_kernels.routing.manifest import KINDS, sealed
from meg_kernels.routing.saving import LOCK, SAVING, WORK, load_edited, writing
from meg_kernels.storage import (
    CorruptFileError,
    check_writable,
    content_digest,
    read_tensors,
    write_tensors,
)


@functools.cache
def _saved() -> Path:
    """An edited model, made once."""
    folder = Path(tempfile.mkdtemp()) / "edited"
    editor = tiny.make_editor(tiny.BANK)
    tiny.edit(editor)
    editor.save_pretrained(folder)
    editor.detach()
    return folder


def _copied(folder: Path) -> Path:
    return shutil.copytree(_saved(), folder / "edited")


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meg.json").read_text(encoding="utf-8"))


def _file(folder: Path, kind: str) -> Path:
    return folder / _manifest(folder)["files"][kind]


def _content(folder: Path, kind: str) -> Path:
    """The file whose bytes are changed: of the encoder, its weights."""
    path = _file(folder, kind)
    return path / "model.safetensors" if kind == "encoder" else path


def _load(folder: Path) -> None:
    load_edited(folder, "cpu")


def _load_without_its_model(folder: Path) -> None:
    MeGEditor.from_pretrained(_saved())


def _edit(folder: Path) -> MeGEditor:
    editor = tiny.load(folder)
    editor.detach()
    return editor


def _after(change: Callable[[Path], Any], load: Callable[[Path], Any] = _load):
    """Load a copy of the saved folder to which this was done."""

    def act(folder: Path) -> None:
        edited = _copied(folder)
        change(edited)
        load(edited)

    return act


# meg.json


def _set(where: str, value: Any):
    """Put another value there, or take the entry away (`...`), with a digest that fits."""

    def change(folder: Path) -> None:
        manifest = _manifest(folder)
        *path, last = where.split(".")
        inner = manifest
        for name in path:
            inner = inner[name]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        whole = manifest if where == "digest" else sealed(manifest)
        (folder / "meg.json").write_text(json.dumps(whole), encoding="utf-8")

    return change


def _wrong(name: str, where: str, value: Any, *says: str, load=_load) -> Case:
    """A manifest with this entry; the message names it."""
    named = where.replace(".", r"\.")
    said = rf"meg\.json: {named} is missing" if value is ... else rf"meg\.json: {named} is"
    said = said if not says else says[0]
    return Case(
        f"meg.json with {name}",
        _after(_set(where, value), load),
        CorruptFileError,
        (said, *says[1:], "edit again"),
    )


def _named(kind: str, name: str) -> Case:
    return Case(
        f"meg.json that names {name} as its {kind}",
        _after(_set(f"files.{kind}", name)),
        CorruptFileError,
        (rf"files\.{kind} is .*it must be {kind}-<16 hexadecimal digits>", "beside meg.json"),
    )


DIGITS = "0123456789abcdef"
MANIFESTS = [
    _wrong("no base model", "base", ...),
    _wrong("a base model that is a text", "base", "smollm2", "base is 'smollm2'", "an object"),
    _wrong("a number as the base model's name", "base.name", 3),
    _wrong("a data type that torch does not know", "base.dtype", "float17"),
    _wrong("a data type that is no data type", "base.dtype", "nn"),
    _wrong("an identity that is a list", "base.identity", []),
    _wrong("no width", "layout.d_in", ...),
    _wrong("a width of 0", "layout.d_in", 0, r"layout\.d_in is 0", "whole number from 1"),
    _wrong("a width in words", "layout.d_out", "many"),
    _wrong("a bias that is a number", "layout.has_bias", 1, r"has_bias is 1", "true or false"),
    _wrong("an unknown activation", "layout.activation", "tanh", "'tanh'", "one of identity, gelu"),
    _wrong("a layout with one more entry", "layout.depth", 3, r"layout\.depth is no entry"),
    _wrong("a configuration that is a list", "config", []),
    _wrong(
        "an unknown gate", "config.gate", "door", r"config\.gate is 'door'", "one of similarity"
    ),
    _wrong("no gate", "config.gate", ...),
    _wrong("an unknown kind of generator", "config.generator", {"kind": "oracle"}),
    _wrong("a generator that is a number", "config.generator", 3),
    _wrong("snapping that is a text", "config.snap", "no"),
    _wrong("a subject that is required by a number", "config.require_subject", 0),
    _wrong("a threshold of NaN", "threshold", float("nan"), "threshold is nan", "finite number"),
    _wrong("an infinite threshold", "threshold", float("inf")),
    _wrong("a threshold in words", "threshold", "high"),
    _wrong("a threshold of true", "threshold", True, "threshold is True", "finite number"),
    _wrong("no threshold", "threshold", None),
    _wrong("an unknown pooling", "pooling", "max", "pooling is 'max'", "one of mean, cls"),
    _wrong("a report that is a list", "report", []),
    _wrong("unlearnt facts that are numbers", "report.unlearnt", [1]),
    _wrong("an unlearnt fact that is none", "report.unlearnt", ["who"], "names 'who'", "no edited"),
    _wrong("no calibration", "report.calibration", ...),
    _wrong("an AUROC above 1", "report.calibration.auroc", 1.5, "auroc is 1.5", "from 0 to 1"),
    _wrong("fewer than no edited facts", "report.calibration.num_edited", -1),
    _wrong("a share that is NaN", "report.training.answered", float("nan")),
    _wrong("half a step", "report.training.steps", 1.5, "steps is 1.5", "whole number"),
    _wrong("a trial of two numbers", "report.training.history", [[1, 2.0]], "is", "four numbers"),
    _wrong("trials before the start", "report.training.seconds", [-1.0]),
    _wrong("seconds in words", "report.seconds", {"collect": "long"}),
    _wrong("a truth as a number of facts", "report.num_left_out", True),
    _wrong("files that are a list", "files", [], r"files is \[\]", "an object"),
    _wrong("no gate's file", "files.gate", ...),
    _named("facts", f"../facts-{DIGITS}.jsonl"),
    _named("edits", f"/tmp/edits-{DIGITS}.safetensors"),
    _named("generator", f"gate-{DIGITS}.safetensors"),
    _named("gate", "gate.safetensors"),
    _named("encoder", f"encoder-{DIGITS}/.."),
    _wrong("a maker that is a number", "made_by", 3),
    _wrong("an entry that no release writes", "color", "red", "color is no entry"),
    _wrong("no digest", "digest", ...),
    _wrong("a digest of something else", "digest", DIGITS, "was changed since it was saved"),
    _wrong("the format of something else", "format", "other", "was not written by MeG Kernels"),
    _wrong("a version in words", "version", "one", "version is 'one'"),
    _wrong("no version", "version", ...),
    Case(
        "meg.json of a newer release",
        _after(_set("version", 9)),
        CorruptFileError,
        ("format version 9; this release reads version 1", "upgrade meg-kernels"),
    ),
    _wrong("a negative layer", "config.layer", -1, "config is unusable .*layer is -1", load=_edit),
    _wrong("a collection of nothing", "config.collection", 3, "config is unusable", load=_edit),
    _wrong("unlearnt facts served by a number", "config.serve_unlearnt", 1),
    _wrong("an unknown setting", "config.color", "red", "config is unusable .*color", load=_edit),
]


def _text(content: bytes):
    return lambda folder: (folder / "meg.json").write_bytes(content)


def _changed_by_hand(folder: Path) -> None:
    path = folder / "meg.json"
    threshold = _manifest(folder)["threshold"]
    path.write_text(path.read_text().replace(f'"threshold": {threshold}', '"threshold": 0.5'))


def _is_a_folder(folder: Path) -> None:
    (folder / "meg.json").unlink()
    (folder / "meg.json").mkdir()


MANIFESTS += [
    Case(f"meg.json that {what}", _after(_text(content)), CorruptFileError, says)
    for what, content, says in (
        ("is empty", b"", ("meg.json is not valid JSON", "restore or rewrite it")),
        ("is cut off", b'{"format": "meg-ker', ("meg.json is not valid JSON", "restore or")),
        ("is binary", bytes(range(256)), ("meg.json is not valid JSON", "restore or rewrite it")),
        ("is a list", b"[]", ("was not written by MeG Kernels", "edit again")),
        ("is a number", b"3", ("was not written by MeG Kernels", "edit again")),
    )
] + [
    Case(
        "meg.json whose threshold was changed by hand",
        _after(_changed_by_hand),
        CorruptFileError,
        ("was changed since it was saved", "`meg gate` sets another threshold"),
    ),
    Case(
        "meg.json that is a folder",
        _after(_is_a_folder),
        FileNotFoundError,
        ("meg.json does not exist", "holds no edited model"),
    ),
    Case(
        "a folder without meg.json",
        _after(lambda folder: (folder / "meg.json").unlink()),
        FileNotFoundError,
        ("meg.json does not exist", "holds no edited model"),
    ),
    Case(
        "a file in place of the folder",
        lambda folder: ((folder / "edited").write_text(""), _load(folder / "edited")),
        FileNotFoundError,
        ("meg.json does not exist", "holds no edited model"),
    ),
]


# Files


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _of_another_kind(path: Path) -> None:
    was_folder = path.is_dir()
    _gone(path)
    path.write_text("") if was_folder else path.mkdir()


def _damaged(kind: str, what: str, change: Callable[[Path], Any], whole: bool = False) -> Case:
    says = "is missing" if change is _gone else "does not hold what was saved"
    return Case(
        f"{kind} {what}",
        _after(lambda folder: change((_file if whole else _content)(folder, kind))),
        CorruptFileError,
        (f"{kind}-[0-9a-f]{{16}}.* {says}", "restore"),
    )


FILES = [
    case
    for kind in KINDS
    for case in (
        _damaged(kind, "missing", _gone, whole=True),
        _damaged(kind, "cut off", _cut),
        _damaged(kind, "emptied", lambda path: path.write_bytes(b"")),
        _damaged(kind, "with a flipped bit", _flipped),
        _damaged(kind, "of another kind", _of_another_kind, whole=True),
    )
]


def _in_encoder(what: str, change: Callable[[Path], Any]) -> Case:
    return Case(
        f"encoder {what}",
        _after(lambda folder: change(_file(folder, "encoder"))),
        CorruptFileError,
        ("encoder-[0-9a-f]{16} does not hold what was saved", "edit again"),
    )


FILES += [
    _in_encoder("whose tokenizer was changed", lambda path: _flipped(path / "tokenizer.json")),
    _in_encoder("whose configuration was changed", lambda path: _flipped(path / "config.json")),
    _in_encoder("without its tokenizer", lambda path: (path / "tokenizer.json").unlink()),
    _in_encoder("with one more file", lambda path: (path / "added_tokens.json").write_text("{}")),
]


# Content that does not fit, under a name and a manifest that do


def _renamed(folder: Path, kind: str, path: Path) -> None:
    """Give what was changed the name that its content has now, in the folder and the manifest."""
    name = f"{kind}-{content_digest(path)}{KINDS[kind]}"
    path.rename(folder / name)
    _set(f"files.{kind}", name)(folder)


def _tensors(kind: str, change: Callable[[dict[str, torch.Tensor]], Any]):
    def act(folder: Path) -> None:
        path = _file(folder, kind)
        tensors = {name: tensor.clone() for name, tensor in read_tensors(path)[0].items()}
        change(tensors)
        write_tensors(path, tensors)
        _renamed(folder, kind, path)

    return act


def _misfit(name: str, change: Callable[[Path], Any], *says: str) -> Case:
    return Case(
        f"right digests, but {name}", _after(change), CorruptFileError, (*says, "edit again")
    )


def _text_of(kind: str, text: bytes):
    def act(folder: Path) -> None:
        path = _file(folder, kind)
        path.write_bytes(text)
        _renamed(folder, kind, path)

    return act


def _fewer_facts(folder: Path) -> None:
    lines = _file(folder, "facts").read_bytes().splitlines(keepends=True)
    _text_of("facts", b"".join(lines[:-1]))(folder)


def _encoder_of_nan(folder: Path) -> None:
    path = _file(folder, "encoder")
    weights = {name: w.clone() for name, w in load_file(path / "model.safetensors").items()}
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    _renamed(folder, "encoder", path)


def _put(name: str, value: Callable[[torch.Tensor], torch.Tensor]):
    return lambda tensors: tensors.update({name: value(tensors[name])})


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = torch.nan
    return changed


def _first(change: Callable[[torch.Tensor], torch.Tensor]):
    def act(tensors: dict[str, torch.Tensor]) -> None:
        name = min(name for name, tensor in tensors.items() if tensor.is_floating_point())
        tensors[name] = change(tensors[name])

    return act


def _edits(name: str, tensor: str, value: Callable[[torch.Tensor], torch.Tensor], *says: str):
    return _misfit(name, _tensors("edits", _put(tensor, value)), *says)


MISFITS = [
    _edits("a neuron of NaN", "neurons", _nan, "neurons holds NaN or infinity"),
    _edits("an infinite condition", "conditions", lambda x: x / 0, "conditions holds NaN or inf"),
    _edits("an initial neuron of NaN", "initial", _nan, "initial holds NaN or infinity"),
    _edits("held-out NaN", "held_out.unrelated", _nan, r"held_out\.unrelated holds NaN"),
    _edits("fewer neurons", "neurons", lambda x: x[1:], "neurons is .*it must be", r"\[5, 64\]"),
    _edits("fewer conditions", "conditions", lambda x: x[1:], "conditions is .*it must be"),
    _edits("narrower neurons", "neurons", lambda x: x[:, 1:], r"neurons is .*\[5, 63\]; it must"),
    _edits("neurons in half precision", "neurons", lambda x: x.half(), "torch.float16", "it must"),
    _edits("two initial neurons", "initial", lambda x: x.repeat(2, 1), r"\[2, 64\]; it must be"),
    _edits("conditions without rows", "conditions", lambda x: x[0], "conditions is .*it must be"),
    _edits("fewer marks", "generated", lambda x: x[1:], r"generated is .*\[4\]; it must be"),
    _edits(
        "marks that are numbers", "generated", lambda x: x.float(), "generated is torch.float32"
    ),
    _edits(
        "a paraphrase without its query",
        "held_out.queries",
        lambda x: x[1:],
        r"held_out\.queries has \d+ rows, but held_out\.paraphrases \d+",
    ),
    _edits(
        "held-out vectors of another width",
        "held_out.alike",
        lambda x: x[:, 1:],
        r"held_out\.alike is .*it must be",
    ),
    _misfit(
        "a tensor is missing",
        _tensors("edits", lambda tensors: tensors.pop("generated")),
        "generated is missing",
    ),
    _misfit(
        "a tensor of nobody's",
        _tensors("edits", lambda tensors: tensors.update(more=torch.ones(1))),
        "more is no part of edits",
    ),
    _misfit("a gate of NaN", _tensors("gate", _first(_nan)), "gate-.*holds NaN or infinity"),
    _misfit("a generator of NaN", _tensors("generator", _first(_nan)), "generator-.*holds NaN or"),
    _misfit("an encoder of NaN", _encoder_of_nan, "encoder-.* is damaged .*NaN or infinite"),
    _misfit("a fact is missing", _fewer_facts, "it must be .*4, "),
    _misfit("facts that are no facts", _text_of("facts", b'{"a": 1}\n'), "it has the fields a"),
    _misfit("facts that are nothing", _text_of("facts", b""), "conditions is"),
    Case(
        "right digests, but edits that are no tensors",
        _after(_text_of("edits", b"nothing of the sort")),
        CorruptFileError,
        ("edits-.*no safetensors file", "restore it or make it again"),
    ),
    Case(
        "right digests, but a gate of another shape",
        _after(_tensors("gate", _first(lambda x: x[1:]))),
        CorruptFileError,
        ("gate-.* does not fit its configuration", "size mismatch"),
    ),
]


# Where edits shall go


def _write_to(folder: Path) -> None:
    with writing(folder):
        pass


def _with(name: str, make: Callable[[Path], Any]):
    """Write to a folder in which this was made."""

    def act(folder: Path) -> None:
        make(folder / name)
        _write_to(folder)

    return act


def _below_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    _write_to(folder / "file" / "edited")


def _locked(folder: Path) -> None:
    lock = WriterLock(folder, LOCK)
    try:
        _write_to(folder)
    finally:
        lock.release()


def _linked_to_nothing(folder: Path) -> None:
    (folder / "edited").symlink_to(folder / "absent")
    _write_to(folder / "edited")


def _saved_by_another(folder: Path) -> None:
    edited = _copied(folder)
    one, other = _edit(edited), _edit(edited)
    other.remove(tiny.EDITED[0])
    other.save_pretrained(edited)
    one.remove(tiny.EDITED[1])
    one.save_pretrained(edited)


def _saved_elsewhere_in_between(folder: Path) -> None:
    edited = _copied(folder)
    one = _edit(edited)
    one.remove(tiny.EDITED[0])
    one.save_pretrained(edited)
    other = _edit(edited)
    other.remove(tiny.EDITED[1])
    other.save_pretrained(edited)
    one.remove(tiny.EDITED[2])
    one.save_pretrained(edited)


def _report_below_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    check_writable(folder / "file" / "report.json")


OTHERS = ("holds other files", "choose an empty or new folder")
NOT_OURS = ("is not what this package makes there", "move it away")
OUT = [
    Case(f"--out that holds {what}", _with(name, make), FileExistsError, OTHERS)
    for what, name, make in (
        ("a thesis", "thesis.tex", lambda path: path.write_text("years of work")),
        ("facts of the user's", "facts-mine.jsonl", lambda path: path.write_text("")),
        ("a folder of the user's", "encoder-mine", Path.mkdir),
        ("a hidden file", ".gitignore", lambda path: path.write_text("")),
        ("a link to nothing", "gate-x", lambda path: path.symlink_to("absent")),
        ("what looks like ours", f"facts-{DIGITS}.jsonl", lambda path: path.write_text("")),
    )
]
OUT += [
    Case(f"--out with {what}", _with(name, make), FileExistsError, NOT_OURS)
    for what, name, make in (
        ("a file where saves are made", SAVING, lambda path: path.write_text("")),
        ("a link where work is kept", WORK, lambda path: path.symlink_to("/tmp")),
        ("a folder where the lock is", LOCK, Path.mkdir),
    )
]
OUT += [
    Case(
        "--out that is a file",
        lambda folder: ((folder / "x").write_text(""), _write_to(folder / "x")),
        NotADirectoryError,
        ("x is a file", "choose another folder"),
    ),
    Case("--out below a file", _below_a_file, NotADirectoryError, ("is a file", "choose another")),
    Case(
        "--out that is a link to nothing",
        _linked_to_nothing,
        NotADirectoryError,
        ("is a link to nothing", "choose another folder"),
    ),
    Case(
        "--out with too long a name",
        lambda folder: _write_to(folder / ("x" * 300)),
        OSError,
        ("cannot be written .*too long", "choose another folder"),
    ),
    Case(
        "--out that another one writes",
        _locked,
        LockedError,
        (rf"is being written by process {os.getpid()} on .*since", "start again when that has"),
    ),
    Case(
        "a folder that another one saved to since it was loaded",
        _saved_by_another,
        RuntimeError,
        ("was saved by another process since it was loaded", "load it again and repeat"),
    ),
    Case(
        "a folder that another one saved to since this one did",
        _saved_elsewhere_in_between,
        RuntimeError,
        ("was saved by another process since it was loaded", "Save to another folder"),
    ),
    Case(
        "edits of a model without a name, loaded without it",
        _load_without_its_model,
        ValueError,
        ("edited in .*edited had no name", r"pass it, .*model=\.\.\., tokenizer="),
    ),
    Case(
        "a report that is a folder",
        lambda folder: check_writable(folder),
        IsADirectoryError,
        ("could not write", "choose another file"),
    ),
    Case(
        "a report below a file",
        _report_below_a_file,
        NotADirectoryError,
        ("could not write", "choose another file"),
    ),
]

CASES = [*MANIFESTS, *FILES, *MISFITS, *OUT]
