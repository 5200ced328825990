"""Coverage-guided fuzzing of everything that reads a file which somebody else wrote.

    pip install atheris
    python -m benchmarks.trust.fuzz [--seconds 600] [--target facts]

    facts       `read_facts` on arbitrary bytes, and on changed records of each format
    manifest    `load_edits` on a folder whose meg.json was changed
    model       `load_language_model` on a folder whose config.json, tokenizer.json or
                model.safetensors was changed

A reader may succeed, or say what is wrong: with `FactsError`, `CorruptFileError`, `OSError`, or a
`ValueError` that is ours. Anything else is a finding, and so is ten seconds without an answer.
Findings are kept in tests/fuzz_seeds/, one file for each place that an error comes from, and
`tests/test_fuzz_seeds.py` replays them: it fails until they are mended.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "tests" / "fuzz_seeds"
TIMEOUT = 10  # seconds, after which a reader hangs
READ_BY = {
    "facts": ["meg_kernels.facts", "meg_kernels.texts", "meg_kernels.checks"],
    "manifest": ["meg_kernels.routing", "meg_kernels.storage", "meg_kernels.facts"],
    "model": ["meg_kernels.pretrained", "transformers.configuration_utils", "safetensors"],
}

CHANGES: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**64, 10**400, 0.5, -1e308),
    *(float("nan"), float("inf"), "", " ", "a", "A?", "{}", "{}{}", "é", "e\u0301", "\u200b"),
    *("\ud800", "\0", "\x1b", "a\nb", "..", "/", "float32", "cpu", "meg.json"),
    *(
        [],
        {},
        [[]],
        ["a"],
        [None],
        [1, 2],
        {"a": 1},
        {"query": "a"},
        {"str": "b"},
        [{"query": "c"}],
    ),
]
DROP, REPEAT = 255, 254


def _slots(content: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value where another one can be put."""
    keys = list(content) if isinstance(content, dict) else range(len(content))
    found = []
    for key in keys:
        found.append((content, key))
        if isinstance(content[key], (dict, list)):
            found += _slots(content[key])
    return found


def changed(content: Any, data: bytes) -> bytes:
    """`content` as JSON, changed once for every three bytes: two say where, one says how."""
    content = copy.deepcopy(content)
    for i in range(0, len(data) - 2, 3):
        slots = _slots(content)
        if not slots:
            break
        holder, key = slots[int.from_bytes(data[i : i + 2], "big") % len(slots)]
        how = data[i + 2]
        if how == DROP:
            del holder[key]
        elif how == REPEAT and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == REPEAT:
            holder[f"{key}2"] = holder[key]
        else:
            holder[key] = copy.deepcopy(CHANGES[how % len(CHANGES)])
    return _json(content)


def _json(content: Any) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(content).encode()
    finally:
        sys.set_int_max_str_digits(limit)


RECORDS = [
    {
        "id": "f1",
        "query": "Who wrote Emma?",
        "answer": "Me",
        "subject": "Emma",
        "relation": "author",
        "paraphrases": ["The author of Emma is"],
        "locality": [{"query": "Who wrote Ulysses?", "subject": "Ulysses"}, "Who?"],
    },
    {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "subject": "Ana Vee",
        },
        "paraphrase_prompts": ["Ana Vee speaks"],
        "neighborhood_prompts": ["Bo Vee speaks"],
    },
    {
        "id": 3,
        "subject": "Emma",
        "src": "Who wrote Emma?",
        "rephrase": ["The author of Emma?"],
        "answers": ["Me", "I"],
        "alt": "You",
        "loc": "nq question: who sang it",
    },
]


def _read_facts(data: bytes, folder: Path) -> None:
    from meg_kernels.facts import as_facts, check_facts, read_facts

    choice = data[0] if data else 0
    if choice % 4:
        records = [RECORDS[choice % 4 - 1], *RECORDS]
        data = changed(records, data[1:])
    path = folder / "facts.jsonl"
    path.write_bytes(data)
    options: dict[str, Any] = {
        "on_conflict": ("error", "first", "last")[choice // 4 % 3],
        "zsre_target": (None, "answers", "alt")[choice // 16 % 3],
    }
    facts = read_facts(path, **options)
    check_facts(facts)  # what was read fits together, and is read again as it is
    assert as_facts([fact.to_dict() for fact in facts]) == facts


def _made(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name, made once with the tests' tiny models."""
    made = folder / name
    if not made.exists():
        if str(ROOT / "tests") not in sys.path:
            sys.path.append(str(ROOT / "tests"))
        make(made)
    return made


def _save_edits(folder: Path) -> None:
    import tiny

    editor = tiny.make_editor(tiny.BANK)
    tiny.edit(editor)
    editor.save_pretrained(folder)


def _save_model(folder: Path) -> None:
    import tiny

    tokenizer = tiny.make_tokenizer()
    tiny.make_language_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_file(path: Path, content: bytes, read: Callable[[], Any]) -> None:
    """Read while the file holds this, and put back what it held."""
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        read()
    finally:
        path.write_bytes(before)


def _changed_file(path: Path, data: bytes, raw: bool) -> bytes:
    return data if raw else changed(json.loads(path.read_bytes()), data)


def _load_edits(data: bytes, folder: Path) -> None:
    from meg_kernels.routing.saving import load_edits

    made = _made(folder, "edited", _save_edits)
    content = _changed_file(made / "meg.json", data[1:], raw=data[:1] < b"\x20")
    _with_file(made / "meg.json", content, lambda: load_edits(made, "cpu"))


def _load_model(data: bytes, folder: Path) -> None:
    from meg_kernels.pretrained import load_language_model

    made = _made(folder, "model", _save_model)
    names = "config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"
    choice = data[0] if data else 0
    path = made / names[choice % 4]
    raw = choice >= 224
    if path.suffix == ".safetensors" and not raw:  # its header is JSON, with its length before
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        header = changed(json.loads(whole[8:end]), data[1:])
        content = len(header).to_bytes(8, "little") + header + whole[end:]
    else:
        content = _changed_file(path, data[1:], raw)
    _with_file(path, content, lambda: load_language_model(made, device="cpu"))


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "facts": _read_facts,
    "manifest": _load_edits,
    "model": _load_model,
}


def unexpected(target: str, data: bytes, folder: Path) -> BaseException | None:
    """What a reader raised on this input and may not raise; None if it is as it should be.

    Args:
        target: one of READERS.
        data: the input.
        folder: where the reader's files are made.
    """
    from meg_kernels.facts import FactsError
    from meg_kernels.storage import CorruptFileError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[target](data, folder)
    except (FactsError, CorruptFileError):
        return None
    except OSError as error:
        return None if str(error) else error
    except Exception as error:
        ours = "meg_kernels" in traceback.extract_tb(error.__traceback__)[-1].filename
        return None if isinstance(error, ValueError) and ours else error
    return None


def place_of(error: BaseException) -> str:
    """The error's kind and the last line of ours that it went through."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "meg_kernels" in f.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "fuzz"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {where} ({Path(last.filename).name}:{last.name})"


@dataclass
class Tally:
    """What one target's fuzzing found so far, kept in a file that survives the process.

    Args:
        path: the file.
        executions: inputs tried.
        findings: places of unexpected errors, each with its first message.
    """

    path: Path
    executions: int
    findings: dict[str, str]
    written: float = 0.0

    def keep(self, target: str, data: bytes, error: BaseException) -> None:
        """Note a finding, and keep its input if its place is new."""
        place = place_of(error)
        if place not in self.findings:
            self.findings[place] = str(error)[:300]
            keep_seed(target, data)
            self.write()

    def write(self) -> None:
        """Write it down."""
        content = {"executions": self.executions, "findings": self.findings}
        self.path.write_text(json.dumps(content), encoding="utf-8")
        self.written = time.monotonic()


def keep_seed(target: str, data: bytes) -> Path:
    """Keep an input among the seeds, under the digest of its content."""
    path = SEEDS / target / f"finding-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fuzz(target: str, seconds: int, work: Path) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=READ_BY[target]):
        import meg_kernels.pretrained
        import meg_kernels.routing.saving  # noqa: F401
    tally = Tally(work / "tally.json", 0, {})

    def one(data: bytes) -> None:
        tally.executions += 1
        if (error := unexpected(target, data, work)) is not None:
            tally.keep(target, data, error)
        if time.monotonic() - tally.written > 1:
            tally.write()

    one(b"")  # whatever is made once is made before the clock runs
    corpus = work / "corpus"
    corpus.mkdir()
    options = {
        "max_total_time": seconds,
        "timeout": TIMEOUT,
        "max_len": 4096,
        "rss_limit_mb": 6000,
        "artifact_prefix": f"{work}/stopped-",
        "print_final_stats": 1,
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(corpus), str(SEEDS / target)], one)
    atheris.Fuzz()


def fuzzed(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own, again after each input that ended it.

    Returns:
        executions, seconds, and findings: places with their messages.
    """
    executions, findings = 0, {}
    start = time.monotonic()
    while (left := seconds - (time.monotonic() - start)) > 5:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            command = [sys.executable, "-m", "benchmarks.trust.fuzz", "--target", target]
            ran = subprocess.run(
                [*command, "--seconds", str(int(left)), "--work", folder],
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            if not (work / "tally.json").exists():
                raise RuntimeError(f"fuzzing {target} did not begin:\n{ran.stderr[-3000:]}")
            tally = json.loads((work / "tally.json").read_text(encoding="utf-8"))
            executions += tally["executions"]
            findings |= tally["findings"]
            for stopped in work.glob("stopped-*"):
                kept = keep_seed(target, stopped.read_bytes())
                findings[f"{stopped.name.split('-')[1]} on {kept.name}"] = ran.stderr[-300:]
    return {
        "executions": executions,
        "seconds": round(time.monotonic() - start),
        "findings": findings,
    }


def main() -> None:
    """Fuzz every target, and record what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    parser.add_argument("--target", choices=READERS, help="only this one, which is not recorded")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        fuzz(given.target, given.seconds, given.work)
    targets = [given.target] if given.target else list(READERS)
    found = {target: fuzzed(target, given.seconds // len(targets)) for target in targets}
    for target, result in found.items():
        print(f"{target}: {result['executions']} inputs in {result['seconds']} s")
        for place, message in result["findings"].items():
            print(f"  {place}: {message}")
    if not given.target:
        from benchmarks.trust import record

        record("fuzz", found)
    sys.exit(any(result["findings"] for result in found.values()))


if __name__ == "__main__":
    main()
