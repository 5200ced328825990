"""Progress bars: drawn if they are asked for and there is a terminal."""

from __future__ import annotations

import io

import pytest

from meg_kernels.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


CASES = {
    "asked for": (Terminal, True, True),
    "not asked for": (Terminal, False, False),
    "no terminal": (io.StringIO, True, False),
    "neither": (io.StringIO, False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bar_is_drawn_only_if_it_is_asked_for_and_seen(case, monkeypatch):
    stream, shown, drawn = CASES[case]
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    assert list(progress_bar("abc", shown=shown, desc="spelling")) == ["a", "b", "c"]
    with progress_bar(shown=shown, total=2, desc="counting") as bar:
        bar.set_postfix(loss="0.5")
        bar.update()
    assert [word in stderr.getvalue() for word in ("spelling", "counting")] == [drawn] * 2
    assert drawn or not stderr.getvalue()
