"""The HDF5 file of a run: an image that one rank writes anew as the run goes on, read back for tables and figures.

/epochs/{epoch, train_nll, …}  one row an evaluation: EPOCH_FIGURES
/steps/{loss, …}               one row a step: docs/runfile.md
/parameters                    (N,) at the last evaluation
/status                        running, finished, or what went wrong
attributes                     the configuration, versions, the process that writes it
"""

from __future__ import annotations

import math
import platform
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi import __version__
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import attributes_of, column, dataset, open_image, subgroup, text_of, write_image
from qnewton_mpi.files.locks import Holder
from qnewton_mpi.files.whole import reason, writing
from qnewton_mpi.parallel.log import LOG

ITERATES = ("", "ema_", "tail_")  # the last, the exponential mean, the mean of the last quarter
QUALITIES = ("train_nll", "test_nll", "test_accuracy")
NOISE_SCALES = ("noise_scale", "noise_scale_preconditioned")  # files of earlier versions have none
EPOCH_FIGURES = (
    "epoch",
    "step",
    *(iterate + quality for iterate in ITERATES for quality in QUALITIES),
    "sample_gradients",
    "wall_seconds",
    "evaluation_seconds",
    "bytes_sent",
    "bytes_sent_by_replicas",
    *NOISE_SCALES,
)
WRITE_SECONDS = 5.0  # between writes without an evaluation
WRITE_SHARE, WRITE_CREDIT = 0.01, 1.0  # of a run's time that goes into writing, and seconds besides
SILENT_SECONDS = 30.0  # without a write, after which the process may be gone
RUNNING, FINISHED, FAILED = "running", "finished", "failed: "
PERHAPS_DEAD = "perhaps dead"
STATUS_BYTES = 1000
WRITER = "writer_"  # before the names of the attributes that tell of the process
# What readers rely on, by the attribute: of the file of a run, and of a run in a study's file.
RUN_ATTRIBUTES = {"method": str, "data": str, "activation": str, "replicas": int, "batch": int, "seed": int}
STUDY_ATTRIBUTES = {"row": str, "stage": str, "baseline": bool}


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
    parameters : (N,)
        The first ones.
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
        parameters: NDArray[Any],
        resumed: int | None = None,
    ) -> None:
        before = Run(path) if resumed is not None and path.exists() else None
        writer = {WRITER + name: value for name, value in asdict(Holder.here()).items()}
        self.path, self.attributes = path, {**attributes, **versions(), **writer}
        self._parameters, self._columns = np.array(parameters), {}
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

    def add_epoch(self, figures: Mapping[str, float], parameters: NDArray[Any]) -> None:
        """Add the figures of an evaluation, keep the parameters evaluated, and write the file if that costs little."""
        self._add("epochs", figures)
        self._parameters = np.array(parameters)
        if self._affordable():
            self.flush()

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
            file["parameters"] = self._parameters
            text = status.encode("utf-8", "backslashreplace")[:STATUS_BYTES].decode("utf-8", "ignore").encode()
            file.create_dataset("status", data=text, dtype=h5py.string_dtype(length=STATUS_BYTES))

        write_image(self.path, "run", fill)


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

    Parameters
    ----------
    path : Path
    with_parameters : bool
        Whether to read them, too.

    Attributes
    ----------
    attributes : dict
        Numbers and text, as Python has them.
    epochs, steps : dict of (rows,) float64
        By figure; of a run in a study's file there are no steps.
    parameters : (N,) float64 or None
        At the last evaluation.
    silence : float
        Seconds since the file was written, when it was read.

    Raises
    ------
    UserError
        For a file that is missing, is not of a run, or not as it was written.
    """

    parameters: NDArray[np.float64] | None = None

    def __init__(self, path: Path, with_parameters: bool = False) -> None:
        with open_image(path, "run") as file:
            self.silence = max(0.0, time.time() - path.stat().st_mtime)
            self._read(path, file, text_of(dataset(file, "status")[()]), RUN_ATTRIBUTES)
            self.steps = _columns(file, "steps", ("step", *subgroup(file, "steps")))
            if with_parameters:
                self.parameters = column(file, "parameters")
                if len(self.parameters) != self.attributes.get("parameters", len(self.parameters)):
                    raise ValueError("parameters are not as many as the attribute says")

    @classmethod
    def of_group(cls, path: Path, group: h5py.Group) -> Run:
        """Return the run in a group of a study's file; KeyError or ValueError where it is none."""
        run = cls.__new__(cls)
        run.silence, run.steps = 0.0, {}
        run._read(path, group, text_of(group.attrs["status"]), STUDY_ATTRIBUTES)
        return run

    def _read(self, path: Path, group: h5py.Group, status: str, kinds: Mapping[str, type]) -> None:
        self.path = path
        self.attributes: dict[str, Any] = {**attributes_of(group), "status": " ".join(status.split())}
        if status not in (RUNNING, FINISHED) and not status.startswith(FAILED.rstrip()):
            raise ValueError(f"status {printable(status)}")
        _check(self.attributes, kinds)
        lacking = set(NOISE_SCALES).difference(subgroup(group, "epochs"))
        columns = _columns(group, "epochs", [figure for figure in EPOCH_FIGURES if figure not in lacking])
        self.epochs = columns | dict.fromkeys(lacking, np.full(len(columns["step"]), np.nan))

    @property
    def state(self) -> str:
        """What has become of the run, in words; those before a colon say it in short.

        "running", "finished", "failed: …", "killed: …" where its process is gone; where that cannot be seen from here,
        "perhaps dead: …" after some time without a write, which a long step may also be the reason of.
        """
        if self.attributes["status"] != RUNNING:
            return str(self.attributes["status"])
        writer, silent = _writer(self.attributes), self.silence >= SILENT_SECONDS
        dead = writer.dead() if writer else None
        if writer and dead:
            return f"killed: process {writer.pid} on {writer.host} is gone, last write {duration(self.silence)} ago"
        if silent:
            return f"{RUNNING if dead is False else PERHAPS_DEAD}: no write for {duration(self.silence)}"
        return RUNNING

    def reached(self, figure: str) -> float:
        """Return a figure of the last evaluation; NaN for a run that diverged or was killed."""
        return self.last(figure) if self.finished else math.nan

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: it was not killed, and did not diverge."""
        return bool(self.attributes["status"] == FINISHED)

    @property
    def label(self) -> str:
        """The method, the number of replicas and the rate, as a legend wants them."""
        a = self.attributes
        names = {"momentum": "Nesterov", "adam": "NAdam"} if a.get("nesterov") else {}
        name = names.get(a["method"], a["method"])
        return f"{name} M={a['replicas']} lr={rate_text(a['lr'])}"

    def last(self, figure: str) -> float:
        """Return a figure of the last evaluation; NaN before any."""
        values = self.epochs[figure]
        return float(values[-1]) if len(values) else math.nan

    @property
    def noise_scale(self) -> float:
        """How many samples a batch is worth at the last evaluation, preconditioned if the method is; NaN if unknown."""
        plain, preconditioned = map(self.last, NOISE_SCALES)
        return plain if math.isnan(preconditioned) else preconditioned


def _check(attributes: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise `ValueError` where an attribute is missing, or another than this package writes."""
    for name, kind in kinds.items():
        value = attributes.get(name)
        # bool is an int to Python; text goes to terminals and figures.
        if type(value) is not kind or (isinstance(value, str) and not value.isprintable()):
            raise ValueError(f"the attribute {name} is {'missing' if value is None else 'not as it should be'}")
    rate: Any = attributes.get("lr")
    if rate != "auto" and not (type(rate) in (int, float) and math.isfinite(rate)):
        raise ValueError("the attribute lr is no rate")


def _columns(group: h5py.Group, name: str, figures: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """Return the columns of a group, whose rows are complete: KeyError or ValueError where they are not."""
    columns = {figure: column(group, f"{name}/{figure}") for figure in figures}
    if len({len(values) for values in columns.values()}) > 1:
        raise ValueError(f"the columns of {name} differ in length")
    for counter in {"step", "epoch"} & columns.keys():
        if not (np.isfinite(columns[counter]) & (columns[counter] >= 0)).all():
            raise ValueError(f"{name}/{counter} does not count")
    return columns


def _writer(attributes: Mapping[str, Any]) -> Holder | None:
    """Return the process that writes a run's file; None for one of earlier versions."""
    kinds = get_type_hints(Holder)
    values: dict[str, Any] = {name: attributes.get(WRITER + name) for name in kinds}
    if any(type(value) is not kinds[name] for name, value in values.items()):
        return None
    writer = Holder(**values)
    return writer if 0 < writer.pid < 1 << 31 and str(writer).isprintable() else None


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which it has two, or seconds.

    Examples
    --------
    >>> [duration(seconds) for seconds in (40.2, 119, 3 * 3600, 1e6)]
    ['40 s', '119 s', '3 h', '12 days']
    """
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


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
    """Return the closing table: where the runs stood after their last evaluation, mean ± std over those of a label.

    A last column says what became of them, unless all are finished.
    """
    columns: tuple[tuple[str, Callable[[float], str], Callable[[Run], float]], ...] = (
        ("epochs", "{:.4g}".format, lambda run: run.last("epoch")),
        ("train NLL", "{:.4f}".format, lambda run: run.last("train_nll")),
        ("test NLL", "{:.4f}".format, lambda run: run.last("test_nll")),
        ("accuracy", "{:.2%}".format, lambda run: run.last("test_accuracy")),
        ("noise scale", two_digits, lambda run: run.noise_scale),
        ("seconds", "{:.1f}".format, lambda run: run.last("wall_seconds")),
        (
            "samples/s",
            "{:,.0f}".format,
            lambda run: run.last("sample_gradients") / max(run.last("wall_seconds"), 1e-9),
        ),
    )
    states = {run: run.state.partition(":")[0] for run in runs}
    with_states = set(states.values()) != {FINISHED}
    rows = [("run", "runs", *(name for name, _, _ in columns), *(["status"] if with_states else []))]
    for label, group in by_label(runs).items():
        cells = [mean_and_spread([figure(run) for run in group], text) for _, text, figure in columns]
        if with_states:
            counts = Counter(states[run] for run in group)
            cells.append(", ".join(f"{n} {state}" if len(group) > 1 else state for state, n in counts.items()))
        rows.append((label, str(len(group)), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def mean_and_spread(values: list[float], text: Callable[[float], str]) -> str:
    """Return the mean as text, and ± the standard deviation where the values differ.

    Examples
    --------
    >>> [mean_and_spread(values, "{:.2f}".format) for values in ([1.0, 2.0], [1.0, 1.0], [math.nan])]
    ['1.50 ± 0.71', '1.00', 'nan']
    """
    with np.errstate(all="ignore"):
        spread = np.std(values, ddof=1) if len(set(values)) > 1 else math.nan
        return text(float(np.mean(values))) + (f" ± {text(float(spread))}" if math.isfinite(spread) else "")


def two_digits(value: float) -> str:
    """Return a number of samples of which no more than two digits are known; a dash where nothing is.

    Examples
    --------
    >>> [two_digits(value) for value in (4321.0, 1.06e6, 7.36, math.inf, math.nan)]
    ['4,300', '1,100,000', '7.4', '∞', '–']
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    return f"{float(f'{value:.1e}'):,.15g}"
