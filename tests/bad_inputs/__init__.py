"""What a harsh user gives the library, and what it must say: one module for each kind of input.

`Case` is a row of the table; `tests/test_bad_inputs.py` runs them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: what is wrong with it, unique in its module; the test is called so.
        act: gives the input to the library; gets an empty folder of its own.
        raises: the error that it must end in, of exactly this class.
        says: regular expressions that the message must match, whatever the case: first what is
            wrong, then what to do about it.
    """

    name: str
    act: Callable[[Path], Any]
    raises: type[BaseException]
    says: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.says) >= 2, f"{self.name}: a message says what is wrong and what to do"


def all_cases() -> list[tuple[str, Case]]:
    """Every module's `CASES`, each with its kind: the module's name."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        cases = importlib.import_module(f"{__name__}.{module.name}").CASES
        found += [(module.name, case) for case in cases]
    return found
