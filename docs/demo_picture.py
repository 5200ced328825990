"""The picture of `meg demo` on the front page, from what the command printed.

    FORCE_COLOR=1 COLUMNS=90 meg demo > demo.txt
    python docs/demo_picture.py demo.txt                # writes docs/demo.svg

Run both on one machine: the picture says on which processor it was made. Only the table of answers
and that of metrics are shown, as they were printed.
"""

import io
import os
import platform
import re
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.text import Text

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
    """The first rows of a table; a row begins with the line that fills its last cell."""
    cells = [line.plain.split("│") for line in table]
    begins = [i for i, row in enumerate(cells) if len(row) > 2 and row[-2].strip()]
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
    shown = [*shortened(answers, QUESTIONS), *metrics]
    width = max(line.cell_len for line in shown)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print("[bold]$ meg demo[/]")
    for line in shown:
        console.print(line)
    console.print(
        f"on {processor()}, no GPU; torch {version('torch')}, Python {platform.python_version()}, "
        f"{date.today():%Y-%m-%d}",
        style="dim",
        highlight=False,
    )
    picture = console.export_svg(title="SmolLM2-135M-Instruct, 64 facts edited")
    picture = re.sub(r"@font-face {.*?}", "", picture, flags=re.DOTALL)  # fetched from elsewhere
    path = Path(__file__).with_name("demo.svg")
    path.write_text(picture, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
