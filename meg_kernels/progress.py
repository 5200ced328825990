"""Progress bars that keep quiet where nobody watches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> tqdm:
    """A tqdm bar that is drawn if it is asked for and there is a terminal or a notebook to draw in.

    Args:
        iterable: what the bar counts; None for a bar that is moved by `update`.
        shown: whether a bar is asked for. Where stderr is a file or a pipe, none is drawn even so.
        options: `desc`, `total`, `unit`, `leave` and whatever else tqdm takes.

    Returns:
        The bar: it iterates over `iterable` and has tqdm's methods, drawn or not.
    """
    return tqdm(iterable, disable=None if shown else True, **options)
