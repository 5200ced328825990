"""The command `meg`: edit facts into a language model, ask it, evaluate it.

commands.py    the commands and their options
work.py        the folders that they write, and work in
tables.py      what they print
plots.py       what they draw
"""

from __future__ import annotations

import logging
import sys
import warnings

from rich.markup import escape

from meg_kernels.cli.commands import app
from meg_kernels.cli.tables import errors

__all__ = ["app", "main"]


def main() -> None:
    """Run `meg`; an error that the user can mend is told in one line, without a traceback."""
    # Loading bars and notes of other libraries tell a user nothing.
    for library in ("transformers", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *rest, **more: errors.print(
        f"[yellow]{escape(str(message))}[/]"
    )
    try:
        app()
    except (OSError, ValueError, KeyError, RuntimeError, FloatingPointError, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        errors.print(f"[bold red]error:[/] {escape(str(text))}", highlight=False)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as ended:
        # Typer makes an interruption the exit status that shells know it by.
        if isinstance(ended, SystemExit) and ended.code != 130:
            raise
        errors.print("interrupted; start it again with the same arguments to go on")
        sys.exit(130)
