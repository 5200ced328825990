"""Shows the doctests of docstrings as code; griffe, which reads the docstrings, calls this.

A docstring may have `>>> ` lines without a section "Examples:" around them, which Markdown would
take for quotations and links.
"""

import griffe

FENCE = "```"


def fenced(text: str) -> str:
    """The text with each doctest, up to the next empty line, in a fenced block."""
    lines: list[str] = []
    within = False
    for line in text.splitlines():
        if not within and line.startswith(">>> "):
            lines.append(f"{FENCE}pycon")
            within = True
        elif within and not line.strip():
            lines.append(FENCE)
            within = False
        lines.append(line)
    return "\n".join([*lines, FENCE] if within else lines)


class DoctestBlocks(griffe.Extension):
    """Puts the doctests of every object into fenced blocks."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite one object's docstring, before its sections are parsed."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
