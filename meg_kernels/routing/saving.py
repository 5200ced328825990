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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from meg_kernels.facts import Fact, write_facts, written_facts
from meg_kernels.familiarity import Calibration, FamiliarityNetwork, Gate, SimilarityGate
from meg_kernels.neuron import NeuronLayout
from meg_kernels.pretrained import usable_device
from meg_kernels.routing.edits import EditReport, Edits, HeldOut, Training
from meg_kernels.routing.generators import GeneratorConfig, NeuronBank, build_generator
from meg_kernels.storage import (
    CorruptFileError,
    fingerprint,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from meg_kernels.text_encoder import TextEncoder

FORMAT, VERSION = "meg-kernels", 1
MANIFEST = "meg.json"
KINDS = ("facts", "edits", "gate", "generator", "encoder")


@dataclass(frozen=True)
class BaseModel:
    """The language model that was edited.

    Args:
        name: under which it is loaded again.
        dtype: of its weights, e.g. `float32`.
        identity: JSON-able values that tell it from models of other shapes.
    """

    name: str
    dtype: str
    identity: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Args:
        edits: everything but the encoder, which takes longest to load.
        base: the language model that was edited.
        config: the editor's configuration, JSON-able.
        encoder_folder: where the encoder is.
        pooling: of the encoder.
    """

    edits: Edits
    base: BaseModel
    config: dict[str, Any]
    encoder_folder: Path
    pooling: Any

    def load_encoder(self) -> TextEncoder:
        """The tuned encoder, on the device of the edits; CorruptFileError if it is damaged."""
        folder = self.encoder_folder
        try:
            encoder = TextEncoder.from_pretrained(
                folder, self.pooling, self.edits.conditions.device
            )
        except (OSError, SafetensorError) as error:
            raise CorruptFileError(
                f"{folder} is damaged ({error}); restore it or edit again"
            ) from error
        _check_content(folder, _digest_of_encoder(encoder))
        return encoder


def check_free(folder: Path) -> None:
    """Raise FileExistsError if `folder` holds anything but an edited model."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        left = [p for p in folder.iterdir() if p.name.split("-")[0].lstrip(".") not in KINDS]
        if left:
            raise FileExistsError(
                f"{folder} holds other files ({left[0].name}); choose an empty or new folder"
            )


def save_edits(
    folder: str | Path,
    edits: Edits,
    encoder: TextEncoder,
    base: BaseModel,
    config: Mapping[str, Any],
) -> None:
    """Write an edited model; an interruption at any point leaves what was saved there before.

    Args:
        folder: a new or empty folder, or one that holds an edited model.
        edits: what was edited.
        encoder: the tuned encoder.
        base: the language model.
        config: the editor's configuration, JSON-able; `gate`, `generator`, `snap` and
            `require_subject` in it say how to answer.

    Raises:
        FileExistsError: the folder holds something else.
    """
    folder = Path(folder)
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout, report = edits.layout, edits.report
    tensors = {f"held_out.{k}": v for k, v in edits.held_out.tensors().items()} | {
        "conditions": edits.conditions,
        "neurons": layout.pack(edits.neurons),
        "initial": layout.pack(edits.initial),
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
        "encoder": _write_encoder(folder, encoder),
    }
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "base": dataclasses.asdict(base),
            "layout": dataclasses.asdict(layout),
            "config": dict(config),
            "threshold": edits.gate.threshold,
            "pooling": encoder.pooling,
            "report": {
                "unlearnt": [fact.id for fact in report.unlearnt],
                "calibration": dataclasses.asdict(edits.calibration),
                "training": dataclasses.asdict(edits.training),
                "seconds": report.seconds,
                "num_left_out": report.num_left_out,
            },
            "files": files,
        },
    )
    for path in folder.iterdir():
        if path.name.split("-")[0] in KINDS and path.name not in files.values():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_edits(folder: str | Path, device: str | torch.device | None = None) -> Saved:
    """Read what `save_edits` wrote; no language model and no encoder is loaded.

    Args:
        folder: where it was written.
        device: where the conditions, the gate and the generator shall be; default: an accelerator
            if there is one.

    Raises:
        FileNotFoundError: there are no edits.
        CorruptFileError: a file is damaged, or of a newer version of the format.
        RuntimeError: the device is not there.
    """
    folder, device = Path(folder), usable_device(device)
    manifest = _read_manifest(folder)
    files = {kind: folder / name for kind, name in manifest["files"].items()}
    if missing := [str(path) for path in files.values() if not path.exists()]:
        raise CorruptFileError(f"{missing[0]} is missing; restore the folder or edit again")
    facts = tuple(written_facts(files["facts"]))
    _check_content(files["facts"], _digest_of_facts(facts))
    tensors, layout = _read(files["edits"]), NeuronLayout(**manifest["layout"])
    config = manifest["config"]
    conditions = tensors["conditions"].to(device)
    dim = conditions.shape[1]
    gate: Gate = (
        SimilarityGate(conditions, manifest["threshold"])
        if config["gate"] == SimilarityGate.kind
        else FamiliarityNetwork(dim, threshold=manifest["threshold"])
    )
    generator = build_generator(GeneratorConfig.from_dict(config["generator"]), layout, dim)
    if isinstance(generator, NeuronBank):
        generator.resize(len(facts))
    report = manifest["report"]
    edits = Edits(
        facts,
        conditions,
        layout.unpack(tensors["neurons"]),
        layout.unpack(tensors["initial"]),
        HeldOut(
            **{
                f.name: tensors[f"held_out.{f.name}"].to(device)
                for f in dataclasses.fields(HeldOut)
            }
        ),
        _load_state(gate, files["gate"]).to(device),
        _load_state(generator, files["generator"]).to(device),
        tensors["generated"],
        EditReport(
            tuple(fact for fact in facts if fact.id in report["unlearnt"]),
            Calibration(**report["calibration"]),
            Training.from_dict(report["training"]),
            report["seconds"],
            report["num_left_out"],
        ),
    )
    base = BaseModel(**manifest["base"])
    return Saved(edits, base, config, files["encoder"], manifest["pooling"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {folder} holds no edited model")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorruptFileError(f"{path} was not written by MeG Kernels")
    if manifest.get("version") != VERSION:
        raise CorruptFileError(
            f"{path} has format version {manifest.get('version')}; this release reads version "
            f"{VERSION}: upgrade meg-kernels"
        )
    return manifest


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


def _digest_of_facts(facts: Sequence[Fact]) -> str:
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


def _load_state(module: nn.Module, path: Path) -> Any:
    try:
        module.load_state_dict(_read(path))
    except RuntimeError as error:
        raise CorruptFileError(f"{path} does not fit its configuration: {error}") from error
    return module.eval()
