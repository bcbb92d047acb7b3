"""The HDF5 file of a run that goes on: an image that one rank writes anew; `layout` says what is in it."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import write_image
from qnewton_mpi.files.locks import Holder
from qnewton_mpi.files.whole import reason, writing
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.results.layout import EPOCH_FIGURES, FAILED, FINISHED, RUNNING, STATUS_BYTES, WRITER, Parameters
from qnewton_mpi.results.provenance import provenance, versions
from qnewton_mpi.results.run import Run

WRITE_SECONDS = 5.0  # between writes without an evaluation
WRITE_SHARE, WRITE_CREDIT = 0.01, 1.0  # of a run's time that goes into writing, and seconds besides


class RunFile:
    """The file of a run that goes on, a context manager: leaving it on an exception records what went wrong. Local.

    Rows are kept in memory, and the file is written whole and put in the place of the one before: at each evaluation
    and every few seconds between, so that a killed run's file lacks those seconds at most. Where a file is so large or
    its disk so slow that this would take more than a hundredth of the run's time, it is written less often. Where it
    cannot be written, the one before stays, and it is tried again.

    Parameters
    ----------
    path : Path
        Created, or replaced: whether it may be is checked before (`training.whose`).
    attributes : mapping
        Stored as the file's attributes; None is left out.
    step_figures : iterable of str
        The names of a step's figures.
    iterates : mapping
        As `add_epoch` has them: the first ones.
    resumed : int, optional
        Of a run that goes on after this step: the rows up to it are taken over from the file that is there.

    Attributes
    ----------
    attributes : dict
        What is changed here stands in the file when it is written next.

    Raises
    ------
    UserError
        Where the file cannot be created, or is not of a run.
    """

    def __init__(
        self,
        path: Path,
        attributes: Mapping[str, Any],
        step_figures: Iterable[str],
        iterates: Mapping[str, Parameters],
        resumed: int | None = None,
    ) -> None:
        before = Run(path) if resumed is not None and path.exists() else None
        writer = {WRITER + name: value for name, value in asdict(Holder.here()).items()}
        self.path, self.attributes = path, {**attributes, **provenance(), **versions(), **writer}
        self._iterates, self._columns = copied(iterates), {}
        for group, names in (("epochs", EPOCH_FIGURES), ("steps", tuple(step_figures))):
            old = {} if before is None else {"epochs": before.epochs, "steps": before.steps}[group]
            kept = old["step"] <= (resumed or 0) if "step" in old else np.zeros(0, bool)
            lacking = np.full(len(kept), np.nan)
            self._columns[group] = {name: array("d", old.get(name, lacking)[kept].tobytes()) for name in names}
        self._began = self._written = time.monotonic()
        self._spent = self._took = 0.0  # seconds in writing: in all, and the last time
        self._refused = ""  # why it could not be written the last time
        self._unwritten = Counter[str]()
        with writing(path):
            self._write(RUNNING)

    def __enter__(self) -> RunFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = FINISHED if error is None else FAILED + (" ".join(str(error).split()) or type(error).__name__)
        if not self.flush(told) and error is None:
            lost = " and ".join(f"{count} {name}" for name, count in self._unwritten.items()) or "that it finished"
            raise UserError(
                f"{printable(self.path)}: cannot be written ({self._refused}): it lacks the last of the run ({lost})"
            )

    def add_step(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step, and write the file if that is due."""
        self._add("steps", figures)
        if time.monotonic() - self._written > WRITE_SECONDS and self._affordable():
            self.flush()

    def add_epoch(self, figures: Mapping[str, float], iterates: Mapping[str, Parameters]) -> None:
        """Add the figures of an evaluation, and write the file if that costs little.

        Parameters
        ----------
        figures : mapping
        iterates : mapping
            The parameters evaluated, a mapping of arrays, by the name of the iterate, of `ITERATES`.
        """
        self._add("epochs", figures)
        self._iterates = copied(iterates)
        if self._affordable():
            self.flush()

    def evaluations(self, figure: str) -> NDArray[np.float64]:
        """Return a figure of all evaluations, (rows,)."""
        return np.array(self._columns["epochs"][figure])

    def flush(self, status: str = RUNNING) -> bool:
        """Write the file and return whether that was possible; where it was not, all stays in memory until it is."""
        started = time.monotonic()
        try:
            self._write(status)
        except (OSError, UserError, MemoryError) as error:
            if not self._refused:
                LOG.warning("%s: not written (%s): kept in memory, and tried again", self.path, reason(error))
            self._refused = reason(error)
        else:
            self._refused = ""
            self._unwritten.clear()
        self._written = time.monotonic()
        self._took = self._written - started
        self._spent += self._took
        return not self._refused

    def _add(self, group: str, figures: Mapping[str, float]) -> None:
        for name, values in self._columns[group].items():
            values.append(figures[name])
        self._unwritten[group] += 1

    def _affordable(self) -> bool:
        """Tell whether another write is within the share of the run's time that goes into writing."""
        return self._spent + self._took < WRITE_CREDIT + WRITE_SHARE * (time.monotonic() - self._began)

    def _write(self, status: str) -> None:
        def fill(file: h5py.File) -> None:
            for name, value in self.attributes.items():
                if value is not None:
                    file.attrs[name] = value
            for group, columns in self._columns.items():
                for name, values in columns.items():
                    file[f"{group}/{name}"] = np.asarray(values)
            for iterate, parameters in self._iterates.items():
                group = file.create_group(f"{iterate}parameters", track_order=True)
                for name, part in parameters.items():
                    group[name] = part
            text = status.encode("utf-8", "backslashreplace")[:STATUS_BYTES].decode("utf-8", "ignore").encode()
            file.create_dataset("status", data=text, dtype=h5py.string_dtype(length=STATUS_BYTES))

        write_image(self.path, "run", fill)


def copied(iterates: Mapping[str, Parameters]) -> dict[str, Parameters]:
    """Return copies of parameters that a run goes on to change. Local."""
    return {
        iterate: {name: np.array(values) for name, values in parameters.items()}
        for iterate, parameters in iterates.items()
    }
