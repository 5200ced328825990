"""The picture of `meg demo` on the front page, from what the command printed.

    FORCE_COLOR=1 COLUMNS=104 meg demo > demo.txt
    python docs/demo_picture.py demo.txt                # writes docs/demo.svg

Run both on one machine: the picture says on which processor it was made. Only the table of answers
and that of metrics are shown, as they were printed.
"""

import io
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 104
TABLES = ("Answers", "64 facts")  # how the tables' titles begin
QUESTIONS = 4  # of the table of answers, to keep the picture small


def tables(printed: str) -> list[list[Text]]:
    """The lines of each table that is shown, from its title to its last border."""
    lines = Text.from_ansi(printed).split()
    found = []
    for i, line in enumerate(lines):
        if line.plain.startswith(TABLES):
            end = next(j for j in range(i, len(lines)) if lines[j].plain.startswith("└"))
            found.append(lines[i : end + 1])
    if len(found) != len(TABLES):
        raise ValueError(f"{len(found)} tables were found; {len(TABLES)} are shown")
    return found


def shortened(table: list[Text], rows: int) -> list[Text]:
    """The first rows of a table; a row whose first cell is empty continues the one before."""
    first = [line.plain[2:3] if line.plain.startswith("│ ") else "" for line in table]
    begins = [i for i, letter in enumerate(first) if letter.strip()]
    return table if len(begins) <= rows else [*table[: begins[rows]], table[-1]]


def processor() -> str:
    """The processor's name, and the number of its cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    return f"{cores} cores of an {names[0] if names else platform.machine()}"


def main() -> None:
    """Write docs/demo.svg."""
    answers, metrics = tables(Path(sys.argv[1]).read_text(encoding="utf-8"))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print("[bold]$ meg demo[/]")
    for table in (shortened(answers, QUESTIONS), metrics):
        for line in table:
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print(
        f"on {processor()}, no GPU; torch {version('torch')}, Python {platform.python_version()}, "
        f"{date.today():%Y-%m-%d}",
        style="dim",
        highlight=False,
    )
    path = Path(__file__).with_name("demo.svg")
    console.save_svg(str(path), title="SmolLM2-135M-Instruct, 64 facts edited")
    print(path)


if __name__ == "__main__":
    main()
