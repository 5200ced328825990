"""What the commands draw; needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from meg_kernels.editing.by_context import ContextReport
    from meg_kernels.editing.layers import LayerComparison


def plot_layers(comparison: LayerComparison, path: str | Path) -> None:
    """Draw Reliability, Generality and SGD steps over the layers.

    Args:
        comparison: the layers that were compared.
        path: file to write, in the format that its suffix names: PNG, PDF or SVG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the suffix.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows, best = comparison.layers, comparison.best
    layers = [quality.layer for quality in rows]
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axvline(best.layer, color="0.85", linewidth=6, zorder=0, label=f"best: {best.layer}")
    axes.plot(layers, [quality.reliability for quality in rows], "o-", label="Reliability")
    # Either every layer has a Generality or none has.
    if generality := [q.generality for q in rows if q.generality is not None]:
        axes.plot(layers, generality, "s-", label="Generality")
    axes.set(xlabel="edited layer", ylabel="share answered (AG)", ylim=(-0.02, 1.02), xticks=layers)
    axes.legend(loc="lower left")
    steps = axes.twinx()
    steps.plot(layers, [quality.steps for quality in rows], "^:", color="0.5")
    steps.set(ylabel="SGD steps per fact (dotted)", ylim=(0, None))
    axes.set_title(f"{comparison.n} facts, each with its own collected neuron")
    _save(figure, path)


def plot_contexts(report: ContextReport, path: str | Path) -> None:
    """Draw Reliability, Generality and Locality in each context.

    Args:
        report: of an evaluation by context.
        path: file to write, in the format that its suffix names: PNG, PDF or SVG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the suffix.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    names = [*report.contexts][::-1]
    figure = Figure((7, 0.55 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for kind, marker in (("reliability", "o"), ("generality", "s"), ("locality", "^")):
        shares = [getattr(report.contexts[name], kind) for name in names]
        measured = [(share, row) for row, share in enumerate(shares) if share is not None]
        if measured:
            axes.plot(*zip(*measured, strict=True), marker, label=kind.capitalize())
    axes.set(xlabel="share (exact)", xlim=(-0.02, 1.02), yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.grid(axis="x", color="0.9")
    axes.legend(loc="lower left")
    axes.set_title(f"{report.n} facts, asked where people ask")
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def check_plot(path: str | Path) -> None:
    """Refuse, before the work, a plot that could not be drawn after it.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
        ValueError: the file's suffix names no format that it writes.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib; run: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if (suffix := Path(path).suffix.removeprefix(".").lower()) and suffix not in formats:
        raise ValueError(
            f"{path} ends in .{suffix}, which is no format of a plot; it must be one of "
            f"{', '.join(sorted(formats))}"
        )
