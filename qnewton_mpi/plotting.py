"""Figures of runs; needs matplotlib (extra `plot`)."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from qnewton_mpi.data.datasets import short_name
from qnewton_mpi.errors import MissingPackageError, UserError
from qnewton_mpi.files.whole import reason, replace_whole, writing
from qnewton_mpi.origin import pip_install
from qnewton_mpi.training.runfile import Run, by_label

MANY = 8  # labels, beyond which the legend stands beside the axes
LONGEST = 60  # characters of one
HELD_OUT = {"test": ("--", "dashed"), "validation": (":", "dotted")}  # the lines of parts not trained on


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


def plot_runs(runs: list[Run], target: Path) -> None:
    """Draw training (solid), test (dashed) and validation (dotted) NLL against epochs, a colour a label. Local.

    Raises
    ------
    UserError
        Without matplotlib, or where the picture cannot be written.
    """
    plt = pyplot("plot")
    groups = by_label(runs)
    figure, axes = plt.subplots(figsize=(7 if len(groups) <= MANY else 10, 4.5), layout="constrained")
    for label, group in groups.items():
        color = None
        for run in group:
            text = None if color else plain(label)
            (line,) = axes.plot(run.epochs["epoch"], run.epochs["train_nll"], color=color, label=text)
            color = line.get_color()
            for part in run.held_out:
                axes.plot(run.epochs["epoch"], run.epochs[f"{part}_nll"], HELD_OUT[part][0], color=color, linewidth=1)
    names = sorted({short_name(str(run.attributes["data"])) for run in runs})
    others = ", ".join(f"{how}: {part}" for part, (_, how) in HELD_OUT.items() if any(part in r.held_out for r in runs))
    title = f"training ({others})" if others else "training"
    axes.set(xlabel="epochs", ylabel="negative log-likelihood (nats)", yscale="log", title=plain(", ".join(names)))
    label_decades(axes)
    axes.grid(True, which="both", alpha=0.3)
    if len(groups) <= MANY:
        axes.legend(title=title)
    else:
        figure.legend(title=title, loc="outside right upper", fontsize="x-small", ncols=2)
    save(plt, figure, target, dpi=150)
