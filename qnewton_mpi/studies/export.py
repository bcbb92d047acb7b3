"""Runs as one table that other programs read: a line an evaluation or a step, a column a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import OLD, kind_of, open_image
from qnewton_mpi.results.rows import distinct, rows
from qnewton_mpi.results.run import Run
from qnewton_mpi.studies.store import runs_in

EPOCHS, STEPS = "epochs", "steps"
# Whose a line is: the file (of a study, and the run in it), what the row is called in tables and legends, and what
# tables are most often grouped by; `stage` is a study's, "tuning" or "final".
LABELS = ("run", "row", "stage", "method", "replicas", "lr", "seed")
PLACE = ("step", "epoch")
EXACT = 2**53  # up to which a float64 holds all integers


@dataclass(frozen=True)
class Labelled:
    """A run, and what each of its lines begins with."""

    name: str
    row: str
    run: Run

    def cells(self) -> list[str]:
        """Return the cells of `LABELS`; empty where there is nothing to say."""
        told: dict[str, Any] = {**self.run.attributes, "run": self.name, "row": self.row}
        return [cell(told.get(label)) for label in LABELS]

    def columns(self, what: str) -> dict[str, NDArray[np.float64]]:
        """Return the columns of the evaluations or steps, (rows,) each, `PLACE` among them."""
        found = self.run.epochs if what == EPOCHS else self.run.steps
        if what == STEPS and not found:
            raise UserError(f"{printable(self.name)}: a study keeps no steps of its runs: use --what {EPOCHS}")
        return {**found, "epoch": found["epoch"] if what == EPOCHS else epochs_of(self.run, found["step"])}


def labelled(paths: Iterable[Path]) -> list[Labelled]:
    """Return the runs of files, of runs and of studies, each run once. Local.

    Raises
    ------
    UserError
        For a file that is missing, of neither, or damaged.
    """
    alone: list[Run] = []
    of_studies: list[Labelled] = []
    for path in dict.fromkeys(paths):
        if is_study(path):
            of_studies += [
                Labelled(f"{path}/{name}", run.attributes["row"], run) for name, run in runs_in(path).items()
            ]
        else:
            alone.append(Run(path))
    named = [Labelled(str(run.path), row, run) for row, group in rows(distinct(alone)).items() for run in group]
    return named + of_studies


def is_study(path: Path) -> bool:
    """Tell whether a file is a study's; what is neither that nor a run's counts as a run's. Local."""
    kind = kind_of(path)
    if kind != OLD:
        return kind == "study"
    with open_image(path, "run") as file:
        return "status" not in file


def epochs_of(run: Run, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many passes over the training set lay behind a run after some steps, (rows,); NaN if unknown."""
    evaluated = run.epochs["step"] > 0
    if evaluated.any():
        return steps * float(run.epochs["epoch"][evaluated][-1] / run.epochs["step"][evaluated][-1])
    per_epoch = run.attributes.get("train_samples", 0) // run.attributes["batch"]
    return steps / per_epoch if per_epoch else np.full(len(steps), np.nan)


def text_of(runs: Iterable[Labelled], what: str) -> str:
    """Return a table in CSV. Local.

    A figure that only some of the runs have is empty in the lines of the others, as is what is not a number.

    Parameters
    ----------
    runs : iterable of Labelled
    what : {"epochs", "steps"}
        Whether a line is an evaluation or a step.

    Raises
    ------
    UserError
        For the steps of a study's runs, which are not kept.
    """
    tables = [(each.cells(), each.columns(what)) for each in runs]
    figures = list(dict.fromkeys(name for _, columns in tables for name in columns if name not in PLACE))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*LABELS, *PLACE, *figures])
    for labels, columns in tables:
        lacking = np.full(len(columns["step"]), math.nan)
        cells = [columns.get(name, lacking).tolist() for name in (*PLACE, *figures)]
        lines.writerows([*labels, *map(cell, row)] for row in zip(*cells, strict=True))
    return text.getvalue()


def cell(value: Any) -> str:
    """Return a value so that it is read back as it is: whole numbers without a point, nothing for NaN and None.

    Examples
    --------
    >>> [cell(value) for value in (12.0, 0.1, 1e300, float("inf"), float("nan"), None, "auto")]
    ['12', '0.1', '1e+300', 'inf', '', '', 'auto']
    """
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < EXACT else repr(value)
