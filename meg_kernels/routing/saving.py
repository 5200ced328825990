"""An edited model on the disk: a folder of safetensors and JSON, whole at any moment.

    meg.json                     format version, base model, configuration, and the names of:
    facts-<digest>.jsonl         the edited facts
    edits-<digest>.safetensors   their conditions, neurons and the calibration's conditions
    gate-<digest>.safetensors    generator-<digest>.safetensors
    encoder-<digest>/            the tuned encoder, as Hugging Face saves one

Files are named after their content, so that saving never changes one; replacing meg.json is the
moment at which a new state takes the place of the old one. What belongs to a save in progress is in
.meg-saving, with a list of the names that are ours; whatever interrupts it, the next writer tidies
up by that list. A file is ours, and may be removed, only if a manifest named it and it still holds
what its name says; anything else in the folder is the user's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from meg_kernels.checks import as_path
from meg_kernels.facts import Fact, FactsError, write_facts, written_facts
from meg_kernels.familiarity import Calibration, FamiliarityNetwork, Gate, SimilarityGate
from meg_kernels.locking import WriterLock
from meg_kernels.neuron import NeuronLayout
from meg_kernels.pretrained import usable_device
from meg_kernels.routing.edits import EditReport, Edits, HeldOut, Training
from meg_kernels.routing.generators import (
    GeneratorConfig,
    HypernetworkConfig,
    HypernetworkGenerator,
    NeuronBank,
    build_generator,
)
from meg_kernels.routing.manifest import (
    FORMAT,
    KINDS,
    MANIFEST,
    MENDING,
    VERSION,
    is_name,
    read_manifest,
    sealed,
)
from meg_kernels.routing.ridge import said
from meg_kernels.storage import (
    TEMPORARY,
    CorruptFileError,
    as_os_error,
    checked_tensors,
    content_digest,
    make_folder,
    os_error,
    read_json,
    remove_empty,
    sync_files,
    sync_folder,
    write_json,
    write_tensors,
)
from meg_kernels.text_encoder import TextEncoder

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCK, SAVING, WORK = ".meg-lock", ".meg-saving", ".meg-work"
_NAMES = "names.json"  # in SAVING: the names that are ours, before the save and after it


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
        folder: where it is.
        state: what tells this state of the folder from others.
    """

    edits: Edits
    base: BaseModel
    config: dict[str, Any]
    folder: Path
    state: str

    def parsed(self, parse: Callable[[dict[str, Any]], T]) -> T:
        """The configuration as `parse` reads it; CorruptFileError if that cannot be."""
        try:
            return parse(self.config)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            what = f"without {error}" if isinstance(error, KeyError) else str(error)
            raise CorruptFileError(
                f"{self.folder / MANIFEST}: config is unusable ({what}); {MENDING}"
            ) from error


def check_free(folder: Path) -> None:
    """Refuse a folder that cannot take an edited model.

    Raises:
        FileExistsError: it holds other files.
        NotADirectoryError: it, or what it shall be in, is a file.
    """
    above = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not above.is_dir():
        what = "a link to nothing" if above.is_symlink() and not above.exists() else "a file"
        raise NotADirectoryError(f"{above} is {what}; choose another folder for the edited model")
    if above != folder:
        return
    for name, is_ours in ((LOCK, Path.is_file), (SAVING, Path.is_dir), (WORK, Path.is_dir)):
        path = folder / name
        if os.path.lexists(path) and (path.is_symlink() or not is_ours(path)):
            raise FileExistsError(f"{path} is not what this package makes there; move it away")
    if (folder / MANIFEST).exists():
        return
    ours = {LOCK, SAVING, WORK, f".{MANIFEST}{TEMPORARY}", *_noted_names(folder / SAVING / _NAMES)}
    if left := sorted(path.name for path in folder.iterdir() if path.name not in ours):
        raise FileExistsError(
            f"{folder} holds other files ({left[0]}); choose an empty or new folder"
        )


@contextmanager
def writing(folder: str | Path, work: str | None = None) -> Iterator[Writer]:
    """The one writer of a folder: from before its edits are loaded until new ones are saved.

    What an interrupted writer left is tidied up. A folder that is made for this, and nothing is
    written to, is gone in the end. Readers see the old state until the new one is whole.

    Args:
        folder: a new or empty folder, or one that holds an edited model.
        work: what tells a command that can be interrupted from others.

    Raises:
        LockedError: another process writes there; the message says which.
        FileExistsError: it holds other files.
        OSError: it cannot be written.
    """
    folder = as_path("folder", folder)
    check_free(folder)
    made: list[Path] = []
    lock = writer = None
    try:
        try:
            made = make_folder(folder)
            lock = WriterLock(folder, LOCK, work)
            writer = Writer(folder, lock, work)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise os_error(
                error.errno, f"{folder} cannot be written ({reason}); choose another folder"
            ) from error
        yield writer
    except BaseException:
        if lock is not None and work is not None:
            has_saved = lock.before is not None if writer is None else writer.has_saved
            if has_saved:
                lock.abandon()  # so that the work is not done twice
                lock = None
        raise
    finally:
        if lock is not None:
            lock.release()
        remove_empty(made)


class Writer:
    """Writes the edits of one folder, which nobody else writes meanwhile; see `writing`.

    Args:
        folder: which is there.
        lock: of it.
        work: what tells the command that writes from others; what it saves is marked so.

    Attributes:
        state: what tells the folder's state from others; None: it holds no edits that are whole.
        has_saved: whether this writer has saved, or one that was at the same work and killed then.
    """

    def __init__(self, folder: Path, lock: WriterLock, work: str | None = None):
        self.folder, self._lock, self._work = folder, lock, work
        self._tidy()
        for path in (folder / WORK).rglob(f".*{TEMPORARY}"):  # nobody else is at work there
            path.unlink()
        self.state = _state(folder)
        made_by = None if self.state is None else read_manifest(folder)["made_by"]
        began_with = [self.state] if lock.before is None else lock.before
        self.has_saved = work is not None and made_by == work and began_with != [self.state]
        if self.has_saved:
            sync_folder(folder)  # which may be what failed
        if work is not None:
            lock.note(began_with)

    def save(
        self,
        edits: Edits,
        encoder: TextEncoder,
        base: BaseModel,
        config: Mapping[str, Any],
        *,
        loaded: str | None = None,
    ) -> None:
        """Write an edited model; an interruption at any point leaves what was saved before.

        Args:
            edits: what was edited.
            encoder: the tuned encoder.
            base: the language model.
            config: the editor's configuration, JSON-able; `gate`, `generator`, `snap` and
                `require_subject` in it say how to answer.
            loaded: the folder's state that these edits were made from; None: from no edits that
                were there.

        Raises:
            RuntimeError: the folder holds another state by now.
            OSError: it cannot be written; what was saved before is unchanged.
        """
        make_folder(self.folder)
        self._lock.renew()
        now = _state(self.folder)
        if now is not None and now != (loaded or self.state):
            raise RuntimeError(
                f"{self.folder} was saved by another process since it was loaded; saving would "
                "undo that. Save to another folder, or load it again and repeat the change"
            )
        try:
            manifest = self._written(edits, encoder, base, config)
        except OSError as error:
            if _state(self.folder) != now:  # it is saved, but not flushed to the disk
                raise
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise os_error(
                error.errno,
                f"could not save to {self.folder} ({reason}); what was saved there is unchanged",
            ) from error
        finally:
            if (state := _state(self.folder)) != now:  # also where it was not flushed
                self.state, self.has_saved = state, True
            self._tidy()
        self.state, self.has_saved = manifest["digest"], True

    def _written(
        self,
        edits: Edits,
        encoder: TextEncoder,
        base: BaseModel,
        config: Mapping[str, Any],
    ) -> dict[str, Any]:
        folder, new = self.folder, self.folder / SAVING
        layout, report = edits.layout, edits.report
        tensors = {f"held_out.{k}": v for k, v in edits.held_out.tensors().items()} | {
            "conditions": edits.conditions,
            "neurons": layout.pack(edits.neurons)[~edits.is_made_again],
            "initial": layout.pack(edits.initial),
            "generated": edits.generated,
        }
        if edits.answers is not None:  # which many facts share
            tensors["answers"] = edits.answers[[*_first_rows(edits.facts).values()]]
        make_folder(new)
        write_facts(new / "facts", edits.facts)
        write_tensors(new / "edits", tensors)
        write_tensors(new / "gate", edits.gate.state_dict())
        write_tensors(new / "generator", edits.generator.state_dict())
        try:
            encoder.save_pretrained(new / "encoder")
        except SafetensorError as error:
            raise as_os_error(error) from error
        for path in (new / "encoder").iterdir():  # not as safetensors has it, but as the umask has
            path.chmod((new / "encoder").stat().st_mode & 0o666)
        sync_files(new / "encoder")
        names = {kind: f"{kind}-{content_digest(new / kind)}{end}" for kind, end in KINDS.items()}
        manifest = sealed(
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
                "files": names,
                "made_by": self._work,
            }
        )
        before = _named(folder / MANIFEST)
        write_json(new / _NAMES, sorted({*before, *names.values()}))
        for kind, name in names.items():
            self._put(new / kind, folder / name)
        write_json(folder / MANIFEST, manifest)
        return manifest

    def _put(self, written: Path, place: Path) -> None:
        if _holds_what_it_says(place):
            return
        if os.path.lexists(place):  # damaged; a folder cannot be written over
            os.rename(place, place.parent / SAVING / f"damaged-{place.name}")
        os.rename(written, place)
        sync_folder(place.parent)

    def _tidy(self) -> None:
        """Remove what is ours and no longer named, and what a save left that did not end."""
        saving = self.folder / SAVING
        if not os.path.lexists(saving):
            return
        for name in _noted_names(saving / _NAMES) - _named(self.folder / MANIFEST):
            path = self.folder / name
            if _holds_what_it_says(path):  # as a whole: half a folder would no longer hold it
                os.rename(path, saving / f"removed-{name}")
            elif os.path.lexists(path):
                log.warning("%s does not hold what was saved; it is left where it is", path)
        # The list goes last, so that a kill in between leaves it to the next writer.
        for path in saving.iterdir():
            if path.name != _NAMES:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(saving)


def save_edits(
    folder: str | Path,
    edits: Edits,
    encoder: TextEncoder,
    base: BaseModel,
    config: Mapping[str, Any],
    states: dict[Path, str | None],
) -> None:
    """Write an edited model to a folder, as its one writer for the time: see `Writer.save`.

    Args:
        folder: where to.
        edits, encoder, base, config: as `Writer.save` takes them.
        states: of the folders that these edits were loaded from or saved to; this folder's is put
            there as soon as they are in it, even if the disk fails then.
    """
    path = as_path("folder", folder).resolve()
    with writing(folder) as writer:
        try:
            writer.save(edits, encoder, base, config, loaded=states.get(path))
        finally:
            if writer.has_saved:
                states[path] = writer.state


def _state(folder: Path) -> str | None:
    """What tells the state of a folder from others; None if it holds no edits that are whole."""
    try:
        return read_manifest(folder)["digest"]
    except (OSError, CorruptFileError):
        return None


def _holds_what_it_says(path: Path) -> bool:
    kind, _, rest = path.name.partition("-")
    return path.exists() and is_name(kind, path.name) and content_digest(path) == rest[:16]


def _named(manifest: Path) -> set[str]:
    """The names in a manifest, even a damaged one, that can be those of our files."""
    try:
        files = read_json(manifest)["files"]
        return {name for kind, name in files.items() if kind in KINDS and is_name(kind, name)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def _noted_names(path: Path) -> set[str]:
    """The names in the list of a save that can be those of our files."""
    try:
        names = {name for name in read_json(path) if isinstance(name, str)}
    except (OSError, ValueError, TypeError):
        return set()
    return {name for name in names if any(is_name(kind, name) for kind in KINDS)}


def load_edits(folder: str | Path, device: str | torch.device | None = None) -> Saved:
    """Read what was saved; no language model and no encoder is loaded.

    Args:
        folder: where it was written.
        device: where the conditions, the gate and the generator shall be; default: an accelerator
            if there is one.

    Raises:
        FileNotFoundError: there are no edits.
        CorruptFileError: a file is damaged, or of a newer version of the format.
        RuntimeError: the device is not there.
    """
    device, path = usable_device(device), as_path("folder", folder)
    return _in_one_state(path, lambda manifest: _read_edits(path, manifest, device))


def load_edited(
    folder: str | Path, device: str | torch.device | None = None
) -> tuple[Saved, TextEncoder]:
    """What `load_edits` reads, and the tuned encoder, on the same device."""
    device, path = usable_device(device), as_path("folder", folder)

    def read(manifest: dict[str, Any]) -> tuple[Saved, TextEncoder]:
        saved = _read_edits(path, manifest, device)
        return saved, _read_encoder(path, manifest, saved.edits)

    return _in_one_state(path, read)


def _in_one_state(folder: Path, read: Callable[[dict[str, Any]], T]) -> T:
    """What `read` makes of the manifest and its files, all of one state of the folder."""
    while True:
        manifest = read_manifest(folder)
        try:
            return read(manifest)
        except (CorruptFileError, FileNotFoundError):
            # A writer may have put a new state in place, and removed what the old one named.
            if _state(folder) in (None, manifest["digest"]):
                raise


def _read_edits(folder: Path, manifest: dict[str, Any], device: torch.device) -> Saved:
    files = {kind: folder / name for kind, name in manifest["files"].items()}
    for kind, path in files.items():
        if not path.exists():
            raise CorruptFileError(f"{path} is missing; restore the folder or edit again")
        if kind != "encoder":  # which is checked when it is loaded
            _check_content(path)
    try:
        facts = tuple(written_facts(files["facts"]))
    except FactsError as error:
        raise CorruptFileError(f"{error}; {MENDING}") from error
    tensors, layout = _finite(files["edits"]), NeuronLayout(**manifest["layout"])
    config, report = manifest["config"], manifest["report"]
    made_by = GeneratorConfig.from_dict(config["generator"])
    _check_shapes(files["edits"], tensors, facts, layout, made_by)
    conditions = tensors["conditions"].to(device)
    dim, answers = conditions.shape[1], None
    if made_by.knows_answers:
        first = _first_rows(facts)
        places = {text: place for place, text in enumerate(first)}
        answers = tensors["answers"][[places[fact.answer] for fact in facts]]
    gate: Gate = (
        SimilarityGate(conditions, manifest["threshold"])
        if config["gate"] == SimilarityGate.kind
        else FamiliarityNetwork(dim, threshold=manifest["threshold"])
    )
    generator = build_generator(made_by, layout, dim + (0 if answers is None else answers.shape[1]))
    if isinstance(generator, NeuronBank):
        generator.resize(len(facts))
    if unknown := {*report["unlearnt"]} - {fact.id for fact in facts}:
        raise CorruptFileError(
            f"{folder / MANIFEST}: report.unlearnt names {min(unknown)!r}, which is no edited "
            f"fact; {MENDING}"
        )
    generator = _load_state(generator, files["generator"]).to(device)
    neurons, generated = tensors["neurons"], tensors["generated"]
    if isinstance(generator, HypernetworkGenerator):  # which makes the others again
        assert answers is not None
        stored, neurons = neurons, torch.empty(len(facts), layout.dim)
        neurons[~generated] = stored
        rows = generated.to(device)
        told = said(conditions[rows], answers[generated])
        neurons[generated] = layout.pack(generator.generate(told)).cpu()
    edits = Edits(
        facts,
        conditions,
        layout.unpack(neurons),
        layout.unpack(tensors["initial"]),
        HeldOut(
            **{
                f.name: tensors[f"held_out.{f.name}"].to(device)
                for f in dataclasses.fields(HeldOut)
            }
        ),
        _load_state(gate, files["gate"]).to(device),
        generator,
        generated,
        EditReport(
            tuple(fact for fact in facts if fact.id in report["unlearnt"]),
            Calibration(**report["calibration"]),
            Training.from_dict(report["training"]),
            report["seconds"],
            report["num_left_out"],
        ),
        answers,
    )
    return Saved(edits, BaseModel(**manifest["base"]), config, folder, manifest["digest"])


def _read_encoder(folder: Path, manifest: dict[str, Any], edits: Edits) -> TextEncoder:
    path = folder / manifest["files"]["encoder"]
    _check_content(path)
    try:
        encoder = TextEncoder.from_pretrained(path, manifest["pooling"], edits.conditions.device)
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); {MENDING}") from error
    if encoder.dim != edits.conditions.shape[1]:
        raise CorruptFileError(
            f"{path} makes vectors of length {encoder.dim}, but the edits' have "
            f"{edits.conditions.shape[1]}; {MENDING}"
        )
    return encoder


def _check_content(path: Path) -> None:
    if not _holds_what_it_says(path):
        raise CorruptFileError(f"{path} does not hold what was saved; {MENDING}")


def _finite(path: Path) -> dict[str, Tensor]:
    tensors, _ = checked_tensors(path)  # by its name
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CorruptFileError(f"{path}: {name} holds NaN or infinity; {MENDING}")
    return tensors


def _first_rows(facts: Sequence[Fact]) -> dict[str, int]:
    """Each answer, and the row of the first fact that has it."""
    rows: dict[str, int] = {}
    for row, fact in enumerate(facts):
        rows.setdefault(fact.answer, row)
    return rows


def _check_shapes(
    path: Path,
    tensors: Mapping[str, Tensor],
    facts: Sequence[Fact],
    layout: NeuronLayout,
    generator: GeneratorConfig,
) -> None:
    """Refuse tensors that do not fit the facts, the layout, the generator and each other."""
    floats, held = torch.float32, {f"held_out.{f.name}" for f in dataclasses.fields(HeldOut)}
    wanted = {"conditions", "neurons", "initial", "generated", *held}
    if generator.knows_answers:
        wanted.add("answers")
    if different := tensors.keys() ^ wanted:
        name = min(different)
        what = "is missing" if name in wanted else "is no part of edits"
        raise CorruptFileError(f"{path}: {name} {what}; {MENDING}")
    dim = tensors["conditions"].shape[-1] if tensors["conditions"].dim() else 0
    stored = len(facts)
    if isinstance(generator, HypernetworkConfig):
        stored -= int(tensors["generated"].bool().sum())
    flags = {
        f"held_out.{flag}": len(tensors[f"held_out.{of}"])
        for flag, of in (("named", "paraphrases"), ("alike_named", "alike"))
    }
    shapes: dict[str, tuple[torch.dtype, int | None, int | None]] = {
        "conditions": (floats, len(facts), dim),
        "neurons": (floats, stored, layout.dim),
        "initial": (floats, 1, layout.dim),
        **dict.fromkeys(sorted(held - flags.keys()), (floats, None, dim)),
    }
    if generator.knows_answers:
        width = tensors["answers"].shape[-1] if tensors["answers"].dim() else 0
        shapes["answers"] = (floats, len(_first_rows(facts)), width)
    for name, (dtype, rows, columns) in shapes.items():
        shape = tuple(tensors[name].shape)
        fits = len(shape) == 2 and rows in (None, shape[0]) and columns == shape[1] > 0
        if tensors[name].dtype != dtype or not fits:
            raise CorruptFileError(
                f"{path}: {name} is {tensors[name].dtype} {list(shape)}; it must be {dtype} "
                f"[{'any' if rows is None else rows}, {columns}]: {MENDING}"
            )
    flags["generated"] = len(facts)
    for name, rows in flags.items():
        flag = tensors[name]
        if flag.dtype != torch.bool or flag.dim() != 1 or len(flag) != rows:
            raise CorruptFileError(
                f"{path}: {name} is {flag.dtype} {list(flag.shape)}; it must be {torch.bool} "
                f"[{rows}]: {MENDING}"
            )
    for one, other in (("queries", "paraphrases"), ("alike_queries", "alike")):
        lengths = [len(tensors[f"held_out.{name}"]) for name in (one, other)]
        if lengths[0] != lengths[1]:
            raise CorruptFileError(
                f"{path}: held_out.{one} has {lengths[0]} rows, but held_out.{other} "
                f"{lengths[1]}; {MENDING}"
            )


def _load_state(module: nn.Module, path: Path) -> Any:
    try:
        module.load_state_dict(_finite(path))
    except RuntimeError as error:
        raise CorruptFileError(f"{path} does not fit its configuration: {error}") from error
    return module.eval()
