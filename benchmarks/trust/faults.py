"""Every file-system step of every command that writes, gone wrong.

    python -m benchmarks.trust.faults [--every N] [--commands add gate]

The real command line runs on tiny models, each time in a process of its own that is forked. At one
step after the other it is killed before that step, killed in the middle of it, or the disk is full
from that step on. After each: the folder loads, in its old or its new state and nothing between;
what the user has beside the edits is untouched; and the same command, run again, ends as if nothing
had happened: with the same facts, neurons, gate, generator and encoder, bit for bit, and no other
file. Then two writers at once, a folder that may not be written, and one that is deleted meanwhile.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import tiny
import torch
import transformers.modeling_utils
from safetensors import SafetensorError

import meg_kernels
from benchmarks.trust import record
from meg_kernels import EditorConfig, EncoderTuningConfig, cli, write_facts
from meg_kernels.facts import Fact
from meg_kernels.locking import WriterLock
from meg_kernels.routing.manifest import MANIFEST, read_manifest
from meg_kernels.routing.saving import LOCK, load_edited

KILLED = 137
# What a user may keep beside the edits, under names that look like ours.
MINE = {
    "facts-mine.jsonl": "mine",
    "gate-notes.txt": "mine too",
    "edits-0123456789abcdef.safetensors": "a copy of something",
    "encoder-old/notes.txt": "not to be lost",
}
TAKE_SPACE = ("open", "mkdir", "fsync", "write", "save")
HAVE_MIDDLES = ("write", "save")
BRIEF = {"max_steps": 2, "check_every": 1}


def configure(**given: Any) -> EditorConfig:
    """The command's configuration, but for stages as brief as tiny models need them."""
    chosen = given["generator"]
    generator = tiny.GENERATORS[chosen.kind]
    if chosen.kind != "bank":
        generator = generator.with_training(**BRIEF, seed=chosen.training.seed)
    stages = {
        "collection": dataclasses.replace(tiny.CONFIG.collection, max_steps=2),
        "encoder_tuning": EncoderTuningConfig(epochs=1, batch_size=8, alike_batches=False),
    }
    return EditorConfig(**(given | {"generator": generator} | stages))


@dataclass(frozen=True)
class Command:
    """A command whose steps go wrong.

    Args:
        name: of the row in the table.
        arguments: of `meg`; `{out}` stands for the folder that it writes, others for what
            `World` keeps.
        start: what that folder holds before, by its name in `World`; None: it is not there.
    """

    name: str
    arguments: tuple[str, ...]
    start: str | None = "mlp"


_NEW = ("--model", "{models}/model", "--encoder", "{models}/encoder", "--tuning", "{tuning}")
_EDIT = ("edit", "{facts}", *_NEW, "--layer", "1", "--out", "{out}", "--generator")
COMMANDS = (
    Command("edit", (*_EDIT, "mlp"), None),
    Command("edit over another", (*_EDIT, "bank")),
    Command("add", ("add", "{out}", "{more}")),
    Command("add --replace", ("add", "{out}", "{changed}", "--replace")),
    Command("remove", ("remove", "{out}", tiny.FACTS[1].id)),
    Command("train", ("train", "{out}"), "waiting"),
    Command("train --generator", ("train", "{out}", "--generator", "bank")),
    Command("gate", ("gate", "{out}", "--threshold", "0.5")),
    Command("distill", ("distill", "{out}", "--steps", "1", "--teacher-steps", "4"), "dit"),
)


class World:
    """Models, facts and edited folders that the commands start from; made once."""

    def __init__(self, root: Path):
        self.root = root
        self.files = {
            name: root / name for name in ("models", "facts", "more", "changed", "tuning")
        }
        tokenizer = tiny.make_tokenizer()
        tiny.make_language_model(tokenizer).save_pretrained(root / "models" / "model")
        tokenizer.save_pretrained(root / "models" / "model")
        tiny.make_encoder().save_pretrained(root / "models" / "encoder")
        changed = Fact(tiny.FACTS[0].query, tiny.FACTS[1].answer, tiny.FACTS[0].id)
        for name, facts in (
            ("facts", tiny.FACTS[:3]),
            ("more", tiny.FACTS[4:5]),
            ("changed", [changed]),
            ("tuning", tiny.OTHER_FACTS),
        ):
            write_facts(self.files[name], facts)
        for kind in ("mlp", "dit"):
            self._made(kind, (*_EDIT, kind))
        shutil.copytree(root / "mlp", root / "waiting")
        self._made("waiting", ("add", "{out}", "{more}"))

    def _made(self, name: str, arguments: tuple[str, ...]) -> None:
        ended = run(self.filled(arguments, self.root / name))
        assert ended.status == 0, ended.said

    def filled(self, arguments: tuple[str, ...], out: Path) -> list[str]:
        """A command's arguments, with the paths in them."""
        return [argument.format(out=out, **self.files) for argument in arguments]

    def folder(self, command: Command) -> Path:
        """A new folder as the command finds it, with what is the user's in it."""
        out = Path(tempfile.mkdtemp(dir=self.root)) / "edited"
        if command.start is not None:
            shutil.copytree(self.root / command.start, out)
            for name, text in MINE.items():
                (out / name).parent.mkdir(exist_ok=True)
                (out / name).write_text(text)
        return out


# Steps


@dataclass
class Disk:
    """The file system below a folder, where one step goes wrong.

    Args:
        root: the folder.
        step: the one that goes wrong, from 0; None: none, they are only noted.
        fault: `before` and `torn` kill the process before the step and in the middle of it; `full`
            lets it and all later ones that need space fail, `read-only` it and all later ones.
    """

    root: Path
    step: int | None = None
    fault: str = "before"
    steps: list[str] = field(default_factory=list)

    def _ours(self, path: Any, directory: int | None) -> bool:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}").startswith(str(self.root))
        return directory is not None or os.path.abspath(path).startswith(str(self.root))

    def _step(self, name: str, takes_space: bool, torn: Callable[[], Any]) -> None:
        number = len(self.steps)
        self.steps.append(name)
        if self.step is None or number < self.step:
            return
        if self.fault == "read-only":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if self.fault == "full":
            if takes_space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif number == self.step:
            if self.fault == "torn":
                torn()
            os._exit(KILLED)

    def _watched(self, name: str, function: Callable[..., Any], takes_space: bool) -> Any:
        def step(path: Any, *rest: Any, **more: Any) -> Any:
            writes = name != "open" or rest[0] & (os.O_WRONLY | os.O_RDWR)
            if writes and self._ours(path, more.get("dir_fd")):
                self._step(name, takes_space, lambda: function(path, *rest, **more))
            return function(path, *rest, **more)

        return step

    def _open(self, function: Callable[..., Any]) -> Any:
        def step(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if set(mode) & set("wax+") and self._ours(file, None):

                def half() -> None:
                    with function(file, mode, *rest, **more) as opened:
                        opened.write(b"\0half" if "b" in mode else '{"half')

                self._step("write", True, half)
            return function(file, mode, *rest, **more)

        return step

    def _save(self, function: Callable[..., Any]) -> Any:
        def step(tensors: Any, path: Any, *rest: Any, **more: Any) -> Any:
            def half() -> None:
                function(tensors, path, *rest, **more)
                os.truncate(path, os.path.getsize(path) // 2)

            try:
                self._step("save", True, half)
            except OSError as error:  # as safetensors has it
                raise SafetensorError(f"I/O error: {error.strerror} (os error 28)") from None
            return function(tensors, path, *rest, **more)

        return step

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Every step goes through here."""
        with contextlib.ExitStack() as patches:
            for name in ("open", "mkdir", "fsync", "write", "ftruncate", "replace", "rename"):
                step = self._watched(name, getattr(os, name), name in TAKE_SPACE)
                patches.enter_context(mock.patch.object(os, name, step))
            for name in ("unlink", "rmdir"):
                step = self._watched(name, getattr(os, name), False)
                patches.enter_context(mock.patch.object(os, name, step))
            for module in (builtins, io):
                patches.enter_context(mock.patch.object(module, "open", self._open(open)))
            hugging = transformers.modeling_utils
            step = self._save(hugging.safe_save_file)
            patches.enter_context(mock.patch.object(hugging, "safe_save_file", step))
            yield


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, what it printed, and the steps that it took."""

    status: int
    said: str
    steps: list[str]


def forked(act: Callable[[], int], disk: Disk | None = None) -> Ended:
    """Run `act` in a process of its own; its result is the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        said, steps = Path(folder) / "said", Path(folder) / "steps"
        child = os.fork()
        if not child:
            _run_and_exit(act, disk, said, steps)
        _, status = os.waitpid(child, 0)
        taken = json.loads(steps.read_text()) if steps.exists() else []
        return Ended(os.waitstatus_to_exitcode(status), said.read_text(), taken)


def _run_and_exit(act: Callable[[], int], disk: Disk | None, said: Path, steps: Path) -> None:
    status = 99
    try:
        with open(said, "w", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
            cli.tables.console.file = cli.tables.errors.file = sys.stdout
            with contextlib.nullcontext() if disk is None else disk.watched():
                status = act()
            if disk is not None:
                steps.write_text(json.dumps(disk.steps))
    except BaseException as error:  # which would go on in the parent's place
        with open(said, "a") as file:
            file.write(f"\nraw error: {error!r}")
    finally:
        os._exit(status)


def meg(arguments: list[str]) -> int:
    """The exit status of `meg`."""
    sys.argv = ["meg", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def run(arguments: list[str], disk: Disk | None = None) -> Ended:
    """`meg` in a process of its own."""
    return forked(lambda: meg(arguments), disk)


# What must be true afterwards


def state(out: Path) -> dict[str, Any] | None:
    """What a folder's edits are, but for the seconds that they took; None if it holds none."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    return {name: manifest[name] for name in ("files", "threshold", "config", "base")}


def check_whole(out: Path, allowed: list[Any], mine: bool) -> None:
    """The folder loads, in one of these states, and what is the user's is there."""
    assert state(out) in allowed, f"{out} is neither in its old nor in its new state"
    if state(out) is not None:
        load_edited(out, "cpu")
    for name, text in MINE.items() if mine else ():
        assert (out / name).read_text() == text, f"{name} is not as it was"


def check_tidy(out: Path, mine: bool) -> None:
    """No file is there but the edits and what is the user's."""
    names = {path.name for path in out.iterdir()}
    wanted = {MANIFEST, *read_manifest(out)["files"].values()}
    wanted |= {name.split("/")[0] for name in MINE} if mine else set()
    assert names == wanted, f"{names ^ wanted} in {out}"


@dataclass(frozen=True)
class Undisturbed:
    """How a command ends when nothing goes wrong."""

    before: dict[str, Any] | None
    after: dict[str, Any] | None
    steps: list[str]


def undisturbed(world: World, command: Command) -> Undisturbed:
    """Run the command and note its steps."""
    out = world.folder(command)
    before = state(out)
    ended = run(world.filled(command.arguments, out), Disk(out.parent))
    assert ended.status == 0, ended.said
    check_tidy(out, command.start is not None)
    return Undisturbed(before, state(out), ended.steps)


def disturbed(world: World, command: Command, normal: Undisturbed, step: int, fault: str) -> bool:
    """Let one step of the command go wrong, and run it again; whether it went wrong at all.

    Raises:
        AssertionError: something is lost, or not as it would have been.
    """
    out, mine = world.folder(command), command.start is not None
    arguments = world.filled(command.arguments, out)
    ended = run(arguments, Disk(out.parent, step, fault))
    if fault != "full":
        assert ended.status == KILLED, ended.said
    elif ended.status:
        text = " ".join(ended.said.split())
        clear = ended.status == 1 and "Traceback" not in text and "No space left" in text
        assert clear, ended.said
        # Of what is saved and could not be flushed, the lock says that it is done.
        done = normal.before != normal.after and state(out) == normal.after
        ours = (".meg-tmp",) if done else (".meg-tmp", LOCK)
        hidden = [path for path in out.rglob("*") if path.name.endswith(ours)]
        assert not hidden and not (out / ".meg-saving").exists(), f"{hidden} left"

    def again() -> int:
        check_whole(out, [normal.before, normal.after], mine)
        return meg(arguments)

    ended_again = forked(again)
    assert ended_again.status == 0, ended_again.said
    assert state(out) == normal.after, "the command run again ends otherwise"
    check_whole(out, [normal.after], mine)
    check_tidy(out, mine)
    shutil.rmtree(out.parent)
    return ended.status != 0


# Other disturbances


def two_writers(world: World, command: Command, normal: Undisturbed) -> None:
    """While one process writes, the other is refused with its name, and readers are not."""
    out = world.folder(command)
    if command.start is None:
        out.mkdir()
    lock = WriterLock(out, LOCK)
    ended = run(world.filled(command.arguments, out))
    assert ended.status == 1 and f"process {os.getpid()} on" in " ".join(ended.said.split()), ended
    check_whole(out, [normal.before], command.start is not None)
    lock.release()
    assert run(world.filled(command.arguments, out)).status == 0
    assert state(out) == normal.after


def read_only(world: World, command: Command, normal: Undisturbed) -> None:
    """A folder that may not be written is refused before the work, and keeps what it has."""
    out = world.folder(command)
    ended = run(world.filled(command.arguments, out), Disk(out.parent, 0, "read-only"))
    said = " ".join(ended.said.split())
    assert ended.status == 1 and "cannot be written (Permission denied)" in said, ended.said
    assert "collecting" not in said
    check_whole(out, [normal.before], command.start is not None)


def deleted(world: World, command: Command, normal: Undisturbed) -> None:
    """A folder that is deleted while a command works for it is written anew, whole."""
    out = world.folder(command)
    arguments = world.filled(command.arguments, out)

    def act() -> int:
        from meg_kernels.routing.saving import Writer

        save = Writer.save

        def late(*given: Any, **more: Any) -> str:
            shutil.rmtree(out)
            return save(*given, **more)

        with mock.patch.object(Writer, "save", late):
            return meg(arguments)

    ended = forked(act)
    assert ended.status == 0, ended.said
    check_whole(out, [normal.after], False)
    check_tidy(out, False)


@contextlib.contextmanager
def brief_settings() -> Iterator[None]:
    """Tiny stages, one thread, and no output that is cut."""
    torch.set_num_threads(1)
    with (
        mock.patch.object(meg_kernels, "EditorConfig", configure),
        mock.patch("meg_kernels.precision.multiplies_bfloat16", lambda device: False),
        mock.patch.dict(os.environ, {"MEG_KERNELS_PACKING": "always", "COLUMNS": "400"}),
    ):
        yield


def main() -> None:
    """Run all of it and record what was found."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every so manyth step")
    parser.add_argument("--commands", nargs="*", help="names of the table's rows; default: all")
    arguments = parser.parse_args()
    chosen = [c for c in COMMANDS if not arguments.commands or c.name in arguments.commands]
    found: dict[str, Any] = {"steps": 0, "kills": 0, "full_disks": 0, "others": 0, "failures": []}
    started = time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, brief_settings():
        world = World(Path(folder).resolve())
        print(f"{'command':20} {'steps':>6} {'kills':>6} {'full':>6} {'others':>6} {'failed':>6}")
        for command in chosen:
            row = _tried(world, command, arguments.every)
            for name, number in row.items():
                found[name] += number
            numbers = [row["steps"], row["kills"], row["full_disks"], row["others"]]
            shown = " ".join(f"{number:6}" for number in (*numbers, len(row["failures"])))
            print(f"{command.name:20} {shown}", flush=True)
            for failure in row["failures"]:
                print(f"  {failure}", flush=True)
    found["seconds"] = round(time.perf_counter() - started)
    found["every"] = arguments.every
    if not arguments.commands:
        record("faults", found)
    if found["failures"]:
        raise SystemExit(1)


def _tried(world: World, command: Command, every: int) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"kills": 0, "full_disks": 0, "others": 0, "failures": []}
    normal = undisturbed(world, command)
    row["steps"] = len(normal.steps)
    for step in range(0, len(normal.steps), every):
        # Elsewhere, they are as at the next step.
        torn = ["torn"] if normal.steps[step] in HAVE_MIDDLES else []
        full = ["full"] if normal.steps[step] in TAKE_SPACE else []
        for fault in ("before", *torn, *full):
            try:
                went_wrong = disturbed(world, command, normal, step, fault)
            except AssertionError as error:
                what = f"{command.name}, {fault} at step {step}, {normal.steps[step]}"
                row["failures"].append(f"{what}: {error}")
                went_wrong = True
            row["full_disks" if fault == "full" else "kills"] += went_wrong
    for other in (two_writers, read_only, deleted):
        row["others"] += 1
        try:
            other(world, command, normal)
        except AssertionError as error:
            row["failures"].append(f"{command.name}, {other.__name__}: {error}")
    return row


if __name__ == "__main__":
    main()
