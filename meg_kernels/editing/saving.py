"""An edited model on the disk: a folder of safetensors and JSON, whole at any moment.

    meg.json                     format version, base model, configuration, and the names of:
    facts-<digest>.jsonl         the edited facts
    edits-<digest>.safetensors   their conditions, neurons and the calibration's conditions
    gate-<digest>.safetensors    generator-<digest>.safetensors
    encoder-<digest>/            the tuned encoder, as Hugging Face saves one

Files are named after their content, so that saving never overwrites one; replacing meg.json is the
moment at which a new state takes the place of the old one. What it no longer names is then removed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.editing.facts import Fact, read_facts, write_facts
from meg_kernels.editing.generators import NeuronBank, build_generator
from meg_kernels.editing.train import Training
from meg_kernels.familiarity import Calibration, FamiliarityNetwork, SimilarityGate
from meg_kernels.pretrained import load_language_model
from meg_kernels.storage import (
    CorruptFileError,
    fingerprint,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from meg_kernels.text_encoder import TextEncoder

if TYPE_CHECKING:
    from meg_kernels.editing.editor import MeGEditor

FORMAT, VERSION = "meg-kernels", 2
# In version 1 the generator made the neurons of all facts, every change of the facts calibrated the
# gate, and a bank's conditions were centred.
READABLE = (1, 2)
MANIFEST = "meg.json"
_KINDS = ("facts", "edits", "gate", "generator", "encoder")


def check_free(folder: Path) -> None:
    """Raise FileExistsError if `folder` holds anything but an edited model."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        left = [p for p in folder.iterdir() if p.name.split("-")[0].lstrip(".") not in _KINDS]
        if left:
            raise FileExistsError(
                f"{folder} holds other files ({left[0].name}); choose an empty or new folder"
            )


def save_editor(editor: MeGEditor, folder: Path) -> None:
    """Write `editor` to `folder`; see `MeGEditor.save_pretrained`."""
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    edits = editor.edits
    tensors = {f"held_out.{k}": v for k, v in edits.held_out.tensors().items()} | {
        "queries": edits.queries,
        "neurons": editor.attached.layout.pack(edits.neurons),
        "initial": editor.attached.layout.pack(edits.initial),
        "generated": edits.generated,
    }
    facts_name = f"facts-{_digest_of_facts(edits.facts)}.jsonl"
    if not (folder / facts_name).exists():
        write_facts(folder / facts_name, edits.facts)
    files = {
        "facts": facts_name,
        "edits": _write(folder, "edits", tensors),
        "gate": _write(folder, "gate", edits.gate.state_dict()),
        "generator": _write(folder, "generator", edits.generator.state_dict()),
        "encoder": _write_encoder(folder, editor.encoder),
    }
    report = edits.report
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "model": editor.name,
            "dtype": str(editor.model.dtype).removeprefix("torch."),
            "base": _identity(editor.model, editor.layer),
            "config": editor.config.to_dict(),
            "pooling": editor.encoder.pooling,
            "threshold": edits.gate.threshold,
            "report": {
                "unlearnt": [fact.id for fact in report.unlearnt],
                "calibration": dataclasses.asdict(report.calibration),
                "training": dataclasses.asdict(report.training),
                "seconds": report.seconds,
                "known": report.known,
            },
            "files": files,
        },
    )
    for path in folder.iterdir():
        if path.name.split("-")[0] in _KINDS and path.name not in files.values():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_editor(
    cls: type[MeGEditor],
    folder: Path,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> MeGEditor:
    """Read what `save_editor` wrote; see `MeGEditor.from_pretrained`."""
    from meg_kernels.editing.editor import EditorConfig, EditReport, Edits, HeldOut

    manifest = _read_manifest(folder)
    files = {kind: folder / name for kind, name in manifest["files"].items()}
    if missing := [str(path) for path in files.values() if not path.exists()]:
        raise CorruptFileError(f"{missing[0]} is missing; restore the folder or edit again")
    config = EditorConfig.from_dict(manifest["config"])
    if model is None or tokenizer is None:
        if model is not tokenizer:
            raise ValueError("pass both model and tokenizer, or neither")
        dtype = dtype or getattr(torch, manifest["dtype"])
        model, tokenizer = load_language_model(manifest["model"], dtype, device)
    if (found := _identity(model, manifest["base"]["layer"])) != manifest["base"]:
        raise ValueError(
            f"these edits are for {manifest['base']}, but the given model is {found}; pass the "
            "base model that was edited"
        )
    encoder = _read_encoder(files["encoder"], manifest["pooling"], model.device)
    editor = cls(model, tokenizer, encoder, config, manifest["model"])
    layout = editor.attached.layout
    tensors = {name: tensor.to(model.device) for name, tensor in _read(files["edits"]).items()}
    facts = read_facts(files["facts"])
    _check_content(files["facts"], _digest_of_facts(facts))
    gate = (
        SimilarityGate(tensors["queries"])
        if config.gate == "similarity"
        else FamiliarityNetwork(encoder.dim)
    )
    gate.threshold = manifest["threshold"]
    neurons = layout.unpack(tensors["neurons"].cpu())
    generator = build_generator(config.generator, layout, encoder.dim)
    if isinstance(generator, NeuronBank):
        generator.resize(len(facts))
    generator = _load_state(generator, files["generator"]).to(model.device)
    if isinstance(generator, NeuronBank) and manifest["version"] == 1:
        generator.store(tensors["queries"], neurons.to(model.device))
    report = manifest["report"]
    training = report["training"]
    editor._edits = Edits(
        facts,
        tensors["queries"],
        neurons,
        layout.unpack(tensors["initial"].cpu()),
        HeldOut(**{f.name: tensors[f"held_out.{f.name}"] for f in dataclasses.fields(HeldOut)}),
        _load_state(gate, files["gate"]).to(model.device),
        generator,
        tensors.get("generated", torch.ones(len(facts), dtype=torch.bool)).cpu(),
        EditReport(
            [fact for fact in facts if fact.id in report["unlearnt"]],
            Calibration(**{"edited": len(facts)} | report["calibration"]),
            Training(
                **training
                | {
                    "history": tuple(map(tuple, training["history"])),
                    "seconds": tuple(training["seconds"]),
                }
            ),
            report["seconds"],
            report["known"],
        ),
    )
    return editor


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {folder} holds no edited model")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptFileError(f"{path} was not written by MeG Kernels")
    if manifest.get("version") not in READABLE:
        raise CorruptFileError(
            f"{path} has format version {manifest.get('version')}; this release reads up to "
            f"{VERSION}: upgrade meg-kernels"
        )
    return manifest


def _identity(model: PreTrainedModel, layer: int) -> dict[str, Any]:
    """What tells the edited model from others, in any dtype."""
    config = model.config
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "layer": layer,
    }


def _write(folder: Path, kind: str, tensors: dict[str, Tensor]) -> str:
    name = f"{kind}-{_digest(tensors)}.safetensors"
    if not (folder / name).exists():
        write_tensors(folder / name, tensors)
    return name


def _read(path: Path) -> dict[str, Tensor]:
    tensors, _ = read_tensors(path)
    _check_content(path, _digest(tensors))
    return tensors


def _check_content(path: Path, digest: str) -> None:
    if path.stem.split("-")[1] != digest:
        raise CorruptFileError(f"{path} does not hold what was saved; restore it or edit again")


def _digest_of_facts(facts: list[Fact]) -> str:
    return fingerprint([fact.to_dict() for fact in facts])


def _digest_of_encoder(encoder: TextEncoder) -> str:
    # In float32, as it will be loaded.
    return _digest({name: value.float() for name, value in encoder.model.state_dict().items()})


def _digest(tensors: dict[str, Tensor]) -> str:
    names = sorted(tensors)
    return fingerprint(names, *(tensors[name] for name in names))


def _write_encoder(folder: Path, encoder: TextEncoder) -> str:
    name = f"encoder-{_digest_of_encoder(encoder)}"
    if not (folder / name).exists():
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".encoder-"))
        try:
            encoder.save_pretrained(temporary)
            temporary.chmod(0o755)
            os.rename(temporary, folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return name


def _read_encoder(
    folder: Path, pooling: Literal["mean", "cls"], device: torch.device
) -> TextEncoder:
    try:
        encoder = TextEncoder.from_pretrained(folder, pooling, device)
    except (OSError, SafetensorError) as error:
        raise CorruptFileError(
            f"{folder} is damaged ({error}); restore it or edit again"
        ) from error
    _check_content(folder, _digest_of_encoder(encoder))
    return encoder


def _load_state(module: nn.Module, path: Path) -> Any:
    try:
        module.load_state_dict(_read(path))
    except RuntimeError as error:
        raise CorruptFileError(f"{path} does not fit its configuration: {error}") from error
    return module.eval()
