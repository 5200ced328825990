"""The same load through vLLM with neurons, vLLM without, and a loop over `MeGEditor.generate`.

    python -m benchmarks.serving --edited edited [--requests 64] [--edited-requests 32] [--turns 9]

Some of the requests ask edited queries, each another one, the others do not; they are chats, and
all arrive at once. Two servers run beside each other, the edited model's and the base model's, and
are loaded in turns: one that waits takes no time of the processor. What the first says is compared
with `MeGEditor`, before anything is timed.

Adds a row to benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.quality.kept import kept
from meg_kernels import MeGEditor
from meg_kernels.integrations.vllm.server import SERVER
from meg_kernels.pretrained import SMOLLM2, smollm2_folder
from meg_kernels.shipped import shipped_unrelated_queries
from meg_kernels.storage import write_json

RESULT = Path(__file__).parent / "results" / "serving.json"
MOST = 32  # tokens of an answer
START = 600  # seconds
OPTIONS = ["--max-model-len", "1024", "--max-num-seqs", "256", "--max-num-batched-tokens", "2048"]


class Server:
    """vLLM in a process group of its own.

    Args:
        arguments: of Python.
        log: where its output goes.
    """

    def __init__(self, arguments: Sequence[str], log: Path, options: Sequence[str] = OPTIONS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments, "--host", "127.0.0.1", "--port", str(port), *options],
                stdout=output,
                stderr=output,
                env={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ},
                start_new_session=True,
            )
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health", timeout=5).raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"vLLM did not start; see {log}:\n{log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End it, with all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 15)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, 9)

    def processes(self) -> dict[int, str]:
        """What it consists of: the title of each of its processes, by its number."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
                    if group == self.process.pid:
                        title = (folder / "cmdline").read_text().replace("\0", " ").strip()
                        found[int(folder.name)] = title
                except (OSError, ValueError):
                    continue  # it has ended
        return found

    def cpu_seconds(self, title: str = "") -> float:
        """Processor time of its processes with this in their titles."""
        ticks = 0
        for process, name in self.processes().items():
            if title in name:
                parts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                ticks += int(parts[11]) + int(parts[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """What its processes hold that nobody else does."""
        total = 0
        for process in self.processes():
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        return total / 1024


async def _one(
    client: httpx.AsyncClient, query: str, to_the_end: bool
) -> tuple[str, float, float, int]:
    """What is said to a query; seconds to the first token and to the last; tokens."""
    started, first, said, tokens = time.perf_counter(), 0.0, [], 0
    body = {
        "model": "served",
        "messages": [{"role": "user", "content": query}],
        "temperature": 0,
        "max_tokens": MOST,
        "stream": True,
        "ignore_eos": to_the_end,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line[6:])
            if usage := part.get("usage"):
                tokens = usage["completion_tokens"]
            for choice in part["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.perf_counter() - started
                    said.append(text)
    return "".join(said), first, time.perf_counter() - started, tokens


def load(server: Server, queries: Sequence[str], to_the_end: bool = True) -> dict[str, Any]:
    """All queries at once, and what that took.

    Args:
        server: that is asked.
        queries: one for each request.
        to_the_end: whether every answer has all the tokens that it may have. Edited answers are
            shorter than the base model's: else the two would not do the same work.
    """

    async def all_at_once() -> Any:
        limits = httpx.Limits(max_connections=len(queries))
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
            return await asyncio.gather(*(_one(client, query, to_the_end) for query in queries))

    worker, every = server.cpu_seconds("Worker"), server.cpu_seconds()
    started = time.perf_counter()
    found = asyncio.run(all_at_once())
    seconds = time.perf_counter() - started
    first = torch.tensor([one[1] for one in found])
    return {
        "said": [one[0] for one in found],
        "seconds": seconds,
        "tokens": sum(one[3] for one in found),
        "worker_cpu": server.cpu_seconds("Worker") - worker,
        "all_cpu": server.cpu_seconds() - every,
        "first_p50": first.quantile(0.5).item(),
        "first_p95": first.quantile(0.95).item(),
    }


def by_editor(editor: MeGEditor, queries: Sequence[str]) -> dict[str, Any]:
    """The same in one process, a batch of what came at a time: the first one alone."""
    chats = [[{"role": "user", "content": query}] for query in queries]
    started = time.perf_counter()
    with editor.serving():
        said = editor.generate(chats[:1], MOST) + editor.generate(chats[1:], MOST)
    seconds = time.perf_counter() - started
    tokens = sum(len(editor.tokenizer(text).input_ids) + 1 for text in said)
    return {"said": said, "seconds": seconds, "tokens": tokens}


def summed_up(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The medians of what was measured."""
    found = {name: median(run[name] for run in runs) for name in runs[0] if name != "said"}
    return {**found, "tokens_per_second": found["tokens"] / found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edited", type=Path, required=True, help="what meg edit wrote")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--edited-requests", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    editor = MeGEditor.from_pretrained(options.edited, device="cpu")
    draw = random.Random(0)
    asked = [fact.query for fact in editor.facts]
    draw.shuffle(asked)
    queries = [asked[i % len(asked)] for i in range(options.edited_requests)]
    others = [*shipped_unrelated_queries()]
    queries += [draw.choice(others) for _ in range(options.requests - len(queries))]
    draw.shuffle(queries)
    expected = [
        editor.generate([[{"role": "user", "content": query}]], MOST)[0] for query in queries
    ]
    base = str(smollm2_folder()) if editor.name == SMOLLM2 else editor.name
    named = ["--served-model-name", "served"]
    ways = {
        "with": ["-m", "meg_kernels.cli", "serve", str(options.edited), *named],
        "without": ["-m", SERVER, "--model", base, "--dtype", "float32", *named],
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        servers = {}
        try:
            for name, arguments in ways.items():
                log = Path(folder) / f"{name}.log"
                eager = ["--enforce-eager"] if options.eager else []
                servers[name] = Server(arguments, log, [*OPTIONS, *eager])
            for name, server in servers.items():
                said = [text.strip() for text in load(server, queries, False)["said"]]
                same = [one == other.strip() for one, other in zip(said, expected, strict=True)]
                print(f"{name}: {sum(same)} of {len(same)} answers as MeGEditor's", flush=True)
                if name == "with" and not all(same):
                    wrong = [x for x in zip(queries, said, expected, same, strict=True) if not x[3]]
                    raise SystemExit(f"not what MeGEditor says: {wrong[:3]}")
            memory = {name: server.memory_mib() for name, server in servers.items()}
            for turn in range(options.turns):
                for name in sorted(ways, reverse=turn % 2 == 1):
                    runs[name].append(load(servers[name], queries))
                    print(name, summed_up(runs[name][-1:]), flush=True)
        finally:
            for server in servers.values():
                server.stop()
    content = kept(options.out, "serving")
    row = {
        "facts": len(editor.facts),
        "requests": len(queries),
        "edited_requests": options.edited_requests,
        "turns": options.turns,
        "eager": options.eager,
        "most_tokens": MOST,
        "memory_mib": memory,
        **{name: summed_up(found) for name, found in runs.items()},
        "editor": summed_up([by_editor(editor, queries)]),
    }
    for what in ("worker_cpu", "all_cpu", "seconds"):
        row[f"ratio_{what}"] = median(
            b[what] / a[what] for a, b in zip(runs["with"], runs["without"], strict=True)
        )
    load_of = ("facts", "requests", "edited_requests")
    rows = [r for r in content["rows"] if any(r[name] != row[name] for name in load_of)]
    content["rows"] = sorted([*rows, row], key=lambda r: [r[name] for name in load_of])
    write_json(options.out, content)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
