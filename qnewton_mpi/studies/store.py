"""Where the runs of a study are: STUDY.h5, and while it is under way a folder STUDY.runs beside it.

A run's name identifies its options, by a hash. So a study that was cut off goes on where it stopped, and one that was
changed repeats only what changed. What a file of that name says of its options and data is compared nevertheless.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py

from qnewton_mpi.errors import UserError
from qnewton_mpi.files.images import open_image, subgroup, write_image
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.files.whole import writing
from qnewton_mpi.results.layout import RUNNING, WRITER
from qnewton_mpi.results.run import Run
from qnewton_mpi.training.whose import differences

OURS = ("*.h5", "*.claim", "*.part", ".*.lock", ".*.partial")  # what the folder has of a study, left-overs included


def run_name(row: str, options: Mapping[str, Any]) -> str:
    """Return a name that tells the row and identifies the options.

    Examples
    --------
    >>> run_name("Adam, 3", {"lr": 0.1}) == run_name("Adam, 3", {"lr": 0.1})
    True
    >>> run_name("Adam, 3", {"lr": 0.1})[:7]
    'adam-3-'
    """
    digest = hashlib.sha256(json.dumps([row, sorted(options.items())]).encode()).hexdigest()[:12]
    return f"{re.sub('[^a-z0-9.]+', '-', row.lower())}-{digest}"


class Store:
    """The runs of a study. Local; each file has one writer.

    Parameters
    ----------
    output : Path
        STUDY.h5: a group for each run, with its attributes and its /epochs.
    again : str, optional
        Of rows whose names fit this pattern (as a shell's), the runs in STUDY.h5 count as not there.
    """

    def __init__(self, output: Path, again: str = "") -> None:
        self.output, self.again = output, again
        self.folder = output.with_suffix(".runs")

    def open(self) -> None:
        """Make the folder, and forget who had claimed and begun what when a launch was cut off: on one rank, first.

        Raises
        ------
        UserError
            Where the folder cannot be written, or what is at one of the two places is not a study's.
        """
        check_output(self.output, "study", overwrite=True)
        if self.folder.is_symlink() or self.folder == self.output:
            raise UserError(f"{self.folder}: must be a folder, of the runs that are done: name another --output")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob("*.claim"), *self.folder.glob("*.part")):
                left.unlink()
        if self.output.exists():
            read_runs(self.output)

    def claim(self, name: str) -> bool:
        """Tell whether a name was not claimed before; from now on it is."""
        with writing(self.folder):
            try:
                (self.folder / f"{name}.claim").touch(exist_ok=False)
            except FileExistsError:
                return False
        return True

    def has(self, name: str, configuration: Mapping[str, Any]) -> bool:
        """Tell whether a run is stored whole.

        Parameters
        ----------
        name : str
        configuration : mapping
            Its options and the digest of its data.

        Raises
        ------
        UserError
            Where what is stored under the name is none, or of other options or data.
        """
        path = self._path(name)
        if os.path.lexists(path):
            remedy = "remove it, and the run is done again"
            try:
                run: Run | None = Run(path)
            except UserError as error:
                raise UserError(f"{error}: {remedy}") from error
        else:
            path, run = self.output, self._merged(name)
            remedy = "name another --output, or have its row done again with --again"
        if run is None:
            return False
        other = differences(run.attributes, configuration)
        if other or run.attributes["status"] == RUNNING:
            raise UserError(f"{path}: has another run for {name}: {other or 'it is not finished'}: {remedy}")
        return True

    def count(self, rows: Collection[str]) -> int:
        """Return how many runs of some rows are stored."""
        merged = {name for name, run in self._before.items() if run.attributes["row"] in rows and self._merged(name)}
        return len(merged | {path.stem for path in self.folder.glob("*.h5")})

    def run(self, name: str) -> Run:
        """Return a stored run."""
        return Run(self._path(name)) if self._path(name).exists() else self._merged(name)  # type: ignore[return-value]

    def unfinished(self, name: str) -> Path:
        """Return where a run is to be written."""
        return self._path(name).with_suffix(".part")

    def keep(self, name: str) -> None:
        """Declare a run written whole."""
        with writing(self.folder):
            self.unfinished(name).rename(self._path(name))

    def merge(self, labels: Mapping[str, Mapping[str, Any]]) -> None:
        """Write runs into the output; then they go from the folder, and it with them if nothing else is in it.

        Parameters
        ----------
        labels : mapping
            What the study, as it is now, says of each run, by their names: row, stage, baseline.

        Raises
        ------
        UserError
            Where it cannot be written; the folder stays.
        """

        def fill(study: h5py.File) -> None:
            for name, said in sorted(labels.items()):
                run, group = self.run(name), study.create_group(name)
                # Not where and by whom the run was written: that file goes with the folder.
                passing = {key for key in run.attributes if key == "output" or key.startswith(WRITER)}
                group.attrs.update(
                    {key: value for key, value in run.attributes.items() if key not in passing} | dict(said)
                )
                for figure, column in run.epochs.items():
                    group[f"epochs/{figure}"] = column

        with writing(self.output):
            write_image(self.output, "study", fill)
        with writing(self.folder):
            for left in (path for pattern in OURS for path in self.folder.glob(pattern)):
                left.unlink()
        with contextlib.suppress(OSError):  # it has something else in it
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.h5"

    def _merged(self, name: str) -> Run | None:
        run = self._before.get(name)
        return None if run is None or fnmatchcase(run.attributes["row"], self.again) else run

    @cached_property
    def _before(self) -> dict[str, Run]:
        """The runs of the output as it was at first, by name."""
        return runs_in(self.output) if self.output.exists() else {}


def read_runs(path: Path) -> list[Run]:
    """Return the runs of a study's file.

    Raises
    ------
    UserError
        For a file that is missing, is no study's, or not as it was written.
    """
    return list(runs_in(path).values())


def runs_in(path: Path) -> dict[str, Run]:
    """Return the runs of a study's file by their names; errors as of `read_runs`."""
    with open_image(path, "study") as file:
        return {name: Run.of_group(path, subgroup(file, name)) for name in file}
