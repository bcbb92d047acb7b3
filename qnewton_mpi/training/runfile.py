"""The HDF5 file of a run: written by one rank, flushed as it goes, and read back for tables and figures.

/epochs/{epoch, train_nll, …}  one row an evaluation: EPOCH_FIGURES
/steps/{loss, …}               one row a step: docs/runfile.md
/parameters                    (N,) at the last evaluation
/status                        running, finished, or what went wrong
attributes                     the configuration, versions
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi import __version__
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.training.disk import reserved

ITERATES = ("", "ema_", "tail_")  # the last, the exponential mean, the mean of the last quarter
QUALITIES = ("train_nll", "test_nll", "test_accuracy")
EPOCH_FIGURES = (
    "epoch",
    "step",
    *(iterate + quality for iterate in ITERATES for quality in QUALITIES),
    "sample_gradients",
    "wall_seconds",
    "evaluation_seconds",
    "bytes_sent",
    "bytes_sent_by_replicas",
)
FLUSH_SECONDS = 5.0
RUNNING = "running"
STATUS = h5py.string_dtype(length=1024)  # of a fixed length: a file that others may read takes no other strings
ROOM = 1 << 20  # bytes that HDF5 may need for new chunks of all data sets


class RunFile:
    """An open run file, a context manager: leaving it on an exception records what went wrong. Local, one rank.

    Rows are kept in memory and appended together, then flushed, at each epoch and every few seconds between: a killed
    run's file opens and lacks those seconds at most. Others may read the file all the while (HDF5's single writer,
    multiple readers).

    Parameters
    ----------
    path : Path
        Created, or replaced: whether it may be is checked before (`config.resolve`).
    attributes : mapping
        Stored as the file's attributes; None is left out.
    step_figures : iterable of str
        The names of a step's figures.
    parameters : (N,)
        The first ones.
    resumed : int, optional
        Of a run that goes on after this step: the rows up to it are taken over from the file that is there.

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
        parameters: NDArray[Any],
        resumed: int | None = None,
    ) -> None:
        before = Run(path) if resumed is not None and path.exists() else None
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with reserved(path.parent, ROOM + parameters.nbytes):
                pass
            self._file = h5py.File(partial, "w", libver="latest")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error}): name another --output") from error
        for name, value in {**attributes, **versions()}.items():
            if value is not None:
                self._file.attrs[name] = value
        self._rows: dict[str, list[Mapping[str, float]]] = {"epochs": [], "steps": []}
        for group, names in (("epochs", EPOCH_FIGURES), ("steps", tuple(step_figures))):
            old = {} if before is None else {"epochs": before.epochs, "steps": before.steps}[group]
            kept = old["step"] <= (resumed or 0) if "step" in old else np.zeros(0, bool)
            for name in names:
                rows = old[name][kept] if name in old else np.full(np.count_nonzero(kept), np.nan)
                chunk = 64 if group == "epochs" else 1024
                self._file.create_dataset(f"{group}/{name}", data=rows, dtype="f8", maxshape=(None,), chunks=(chunk,))
        self._file["parameters"] = parameters
        self._file.create_dataset("status", data=RUNNING, dtype=STATUS)
        self._file.swmr_mode = True
        partial.rename(path)
        self.path, self._flushed, self._full = path, 0.0, False
        self.flush()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        full = None
        if not self.flush() and error is None:
            full = UserError(f"{self.path}: its disk is full, and the last figures of the run are not in it")
        failure = full or error
        # In place, through the handle that is open: to open the file again needs its lock, which a reader may hold.
        self._file["status"][()] = f"failed: {failure}" if failure else "finished"
        self._file.close()
        if full:
            raise full

    def add_step(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step."""
        self._rows["steps"].append(figures)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def add_epoch(self, figures: Mapping[str, float], parameters: NDArray[Any]) -> None:
        """Add the figures of an evaluation, keep the parameters evaluated, and flush."""
        self._rows["epochs"].append(figures)
        self._file["parameters"][...] = parameters
        self.flush()

    def flush(self) -> bool:
        """Append the rows kept in memory and hand everything to the operating system; return whether there was room.

        Where there was not, the rows stay in memory until there is.
        """
        waiting = sum(len(rows) * len(self._file[group]) for group, rows in self._rows.items())
        self._flushed = time.monotonic()
        try:
            with reserved(self.path.parent, ROOM + 16 * waiting):
                pass
        except OSError as error:
            if not self._full:
                LOG.warning("%s: no room for more (%s): what follows is kept in memory", self.path, error.strerror)
            self._full = True
            return False
        self._full = False
        for group, rows in self._rows.items():
            if not rows:
                continue
            for name, dataset in self._file[group].items():
                dataset.resize(len(dataset) + len(rows), axis=0)
                dataset[-len(rows) :] = [row[name] for row in rows]
            rows.clear()
        self._file.flush()
        return True


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from mpi4py import MPI

    packages = {f"version_{name}": metadata.version(name) for name in ("numpy", "mpi4py", "h5py")}
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return {
        "version_qnewton_mpi": __version__,
        "version_python": platform.python_version(),
        "version_mpi": library,
        **packages,
    }


class Run:
    """A run file read back whole. Local.

    Attributes
    ----------
    attributes : dict
    epochs, steps : dict of (rows,) float64
        By figure.

    Raises
    ------
    UserError
        For a file that is missing or is not of a run.
    """

    def __init__(self, path: Path) -> None:
        try:
            with h5py.File(path, swmr=True) as file:  # which may still be written
                self._read(path, file)
        except (OSError, KeyError) as error:
            raise UserError(f"{path}: is not the file of a run ({' '.join(str(error).split())})") from error

    @classmethod
    def of_group(cls, path: Path, group: h5py.Group) -> Run:
        """Return the run in a group of a study's file; KeyError where it is none."""
        run = cls.__new__(cls)
        run._read(path, group)
        return run

    def _read(self, path: Path, group: h5py.Group) -> None:
        self.path = path
        self.attributes: dict[str, Any] = dict(group.attrs)
        if "status" in group:  # a study's file has it as an attribute; read first, since "finished" promises all rows
            self.attributes["status"] = group["status"].asstr(errors="replace")[()]
        self.epochs = _whole_rows({name: np.asarray(group["epochs"][name]) for name in EPOCH_FIGURES})
        self.steps = _whole_rows({name: np.asarray(column) for name, column in group.get("steps", {}).items()})

    def reached(self, figure: str) -> float:
        """Return a figure of the last evaluation; NaN for a run that diverged or was killed."""
        return self.last(figure) if self.finished else math.nan

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: it was not killed, and did not diverge."""
        return bool(self.attributes["status"] == "finished")

    @property
    def label(self) -> str:
        """The method, the number of replicas and the rate, as a legend wants them."""
        a = self.attributes
        name = {"momentum": "Nesterov", "adam": "NAdam"}[a["method"]] if a.get("nesterov") else a["method"]
        return f"{name} M={a['replicas']} lr={rate_text(a['lr'])}"

    def last(self, figure: str) -> float:
        """Return a figure of the last evaluation; NaN before any."""
        values = self.epochs[figure]
        return float(values[-1]) if len(values) else math.nan


def _whole_rows(columns: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return the rows that all columns have: of a file that is being written, some may have one more already."""
    rows = min(map(len, columns.values()), default=0)
    return {name: column[:rows] for name, column in columns.items()}


def rate_text(rate: float | str) -> str:
    """Return a rate of the settings as tables and legends show it: a number's digits, or "auto"."""
    return rate if isinstance(rate, str) else f"{rate:g}"


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs grouped by their labels: those of a group differ in the seed at most, or are repetitions."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def table(runs: list[Run]) -> str:
    """Return the closing table: where the runs stood after their last evaluation, mean ± std over those of a label."""
    columns: tuple[tuple[str, str, Callable[[Run], float]], ...] = (
        ("epochs", ".4g", lambda run: run.last("epoch")),
        ("train NLL", ".4f", lambda run: run.last("train_nll")),
        ("test NLL", ".4f", lambda run: run.last("test_nll")),
        ("accuracy", ".2%", lambda run: run.last("test_accuracy")),
        ("seconds", ".1f", lambda run: run.last("wall_seconds")),
        ("samples/s", ",.0f", lambda run: run.last("sample_gradients") / max(run.last("wall_seconds"), 1e-9)),
    )
    rows = [("run", "runs", *(name for name, _, _ in columns))]
    for label, group in by_label(runs).items():
        cells = []
        for _, layout, figure in columns:
            values = [figure(run) for run in group]
            spread = f" ± {statistics.stdev(values):{layout}}" if len(values) > 1 and max(values) > min(values) else ""
            cells.append(f"{statistics.fmean(values):{layout}}{spread}")
        rows.append((label, str(len(group)), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
