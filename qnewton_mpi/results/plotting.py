"""Figures of runs; needs matplotlib (extra `plot`)."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qnewton_mpi.data.parts import TEST, TRAIN, VALIDATION
from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.files.whole import reason, replace_whole, writing
from qnewton_mpi.origin import pip_install
from qnewton_mpi.results.rows import rows, title
from qnewton_mpi.results.run import Run

MANY = 8  # lines in one picture
LONGEST = 60  # characters of a label
# Okabe and Ito's, which the colour-blind tell apart, but for the yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C7A00", "#999999")
LABEL_GAP = 0.055  # between the labels of lines, of the height of the axes
T = TypeVar("T")


def pyplot(user: str) -> Any:
    """Return matplotlib's pyplot, for files only. Local.

    Raises
    ------
    UserError
        Without matplotlib, naming the user, and where its settings (matplotlibrc) cannot be read.
    """
    os.environ["MPLBACKEND"] = "agg"  # whatever stood there: matplotlib is not imported with a name it does not know
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingPackageError(f"{user} needs matplotlib: {pip_install('plot')}") from error
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{user}: matplotlib cannot be loaded ({reason(error)}): look for a matplotlibrc") from error
    plt.switch_backend("agg")  # where the program had imported it before
    return plt


def label_decades(axes: Any) -> None:
    """Label 1, 2 and 5 of each decade of a logarithmic axis of y, as plain numbers. Local."""

    def label(value: float, _: int) -> str:
        return f"{value:g}" if f"{value:e}"[0] in "125" else ""

    axes.yaxis.set_major_formatter(label)
    axes.yaxis.set_minor_formatter(label)


def plain(text: str) -> str:
    """Return text such that matplotlib draws it as it is, takes nothing in it for mathematics, and has room. Local."""
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]}…").replace("$", r"\$")


def save(plt: Any, figure: Any, target: Path, dpi: int) -> None:
    """Draw a figure in memory, put the picture in the place of what is there, and let go of the figure. Local.

    Raises
    ------
    UserError
        Where it cannot be drawn or written.
    """
    picture = io.BytesIO()
    try:
        with writing(target):
            figure.savefig(picture, format=target.suffix[1:].lower(), dpi=dpi)
            replace_whole(target, picture.getbuffer())
    except RuntimeError as error:  # TeX that is asked for and not there, and the like
        raise UserError(f"{target}: cannot be drawn ({reason(error)}): look for a matplotlibrc") from error
    finally:
        plt.close(figure)


def in_panels(lines: Sequence[T], most: int = MANY) -> list[Sequence[T]]:
    """Return the lines of each panel, as even as it goes, none with more than `most`. Local.

    Examples
    --------
    >>> [len(panel) for panel in in_panels(range(17))]
    [6, 6, 5]
    """
    panels = math.ceil(len(lines) / most)
    size = math.ceil(len(lines) / max(1, panels))
    return [lines[start : start + size] for start in range(0, len(lines), size or 1)]


def apart(heights: Iterable[float], least: float = LABEL_GAP) -> list[float]:
    """Return ascending heights between 0 and 1, moved such that labels at them do not meet. Local.

    Examples
    --------
    >>> apart([0.2, 0.2, 1.0], least=0.1)
    [0.2, 0.30000000000000004, 1.0]
    """
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    over = max(0.0, placed[-1] - 1.0) if placed else 0.0
    for k in reversed(range(len(placed))):
        limit = placed[k + 1] - least if k + 1 < len(placed) else placed[k] - over
        placed[k] = min(placed[k], limit)
    return placed


def label_ends(axes: Any, ends: Iterable[tuple[float, str, str]]) -> None:
    """Write texts beside the right edge of axes, at or near heights (of the data), each in its colour. Local."""
    low, high = axes.get_ylim()
    scale = np.log if axes.get_yscale() == "log" else np.asarray

    def place(height: float) -> float:
        with np.errstate(all="ignore"):
            at = float((scale(height) - scale(low)) / (scale(high) - scale(low)))
        return min(max(at, 0.0), 1.0) if math.isfinite(at) else 1.0

    found = sorted((place(height), text, colour) for height, text, colour in ends)
    for height, (_, text, colour) in zip(apart(at for at, _, _ in found), found, strict=True):
        axes.text(1.01, height, plain(text), color=colour, transform=axes.transAxes, va="center", fontsize="small")


def plot_runs(runs: list[Run], target: Path) -> None:
    """Draw the NLL of each part of the data against epochs: a row's mean, and the band that its runs fill. Local.

    Where the runs of a row were not evaluated at the same steps, each is a line.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    plt = pyplot("plot")
    panels = in_panels(list(rows(runs).items()))
    parts = [TRAIN, *(part for part in (VALIDATION, TEST) if any(part in run.held_out for run in runs))]
    size = 1.5 + 4.5 * len(parts), 4.2 * len(panels)
    figure, grid = plt.subplots(len(panels), len(parts), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for places, panel in zip(grid, panels, strict=True):
        lines = [(name, group, colour) for (name, group), colour in zip(panel, COLOURS, strict=False)]
        for axes, part in zip(places, parts, strict=True):
            of_part = [line for line in lines if part == TRAIN or any(part in run.held_out for run in line[1])]
            for _, group, colour in of_part:
                draw_row(axes, [(run.epochs["epoch"], run.epochs[f"{part}_nll"]) for run in group], colour)
            axes.set(xlabel="epochs", yscale="log", title=part)
            axes.grid(True, which="both", alpha=0.3)
        label_decades(places[0])
        places[0].set_ylabel("negative log-likelihood (nats)")
        label_ends(places[-1], ((group[0].last(f"{part}_nll"), name, colour) for name, group, colour in of_part))
    figure.suptitle(plain(title(runs)))
    save(plt, figure, target, dpi=150)


def draw_row(axes: Any, curves: Sequence[tuple[Any, Any]], colour: str, style: str = "-") -> None:
    """Draw the mean of curves (x, y) and the band that they fill; each for itself, where their x differ. Local."""
    x = curves[0][0]
    if not all(np.array_equal(x, other) for other, _ in curves):
        for other, y in curves:
            axes.plot(other, y, style, color=colour, linewidth=1)
        return
    values = np.array([y for _, y in curves])
    axes.plot(x, values.mean(axis=0), style, color=colour)
    if len(curves) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
