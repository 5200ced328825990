"""Facts, and files of facts."""

from __future__ import annotations

from bad_inputs import Case
from meg_kernels import Fact, read_facts
from meg_kernels.facts import FactsError


def _file(content: str | bytes):
    def act(folder):
        path = folder / "facts.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_facts(path)

    return act


CASES = [
    Case("an empty file", _file(""), FactsError, ("is empty", "at least one fact")),
    Case("a blank query", lambda _: Fact(" ", "Me"), FactsError, ("query is ' '", "not blank")),
]
