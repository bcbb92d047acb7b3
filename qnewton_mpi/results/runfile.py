"""The HDF5 file of a run: an image that one rank writes anew as the run goes on, read back for tables and figures.

/epochs/{epoch, train_nll, …}  one row an evaluation: EPOCH_FIGURES
/steps/{loss, …}               one row a step: docs/reference/runfile.md
/parameters/{conv1.weight, …}  by name and in shape, at the last evaluation; at the end /ema_parameters and
                               /tail_parameters, the averages, too
/status                        running, finished, or what went wrong
attributes                     the configuration, the network, versions, the process that writes it
"""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data.parts import TEST, TRAIN, VALIDATION
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import attributes_of, child, column, dataset, open_image, subgroup, text_of, write_image
from qnewton_mpi.files.locks import Holder
from qnewton_mpi.files.whole import reason, writing
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.training.provenance import provenance, versions

Parameters = dict[str, NDArray[Any]]

ITERATES = ("", "ema_", "tail_")  # the last, the exponential mean, the mean of the last quarter
QUALITIES = ("train_nll", "validation_nll", "validation_accuracy", "test_nll", "test_accuracy")  # NaN without the part
NOISE_SCALES = ("noise_scale", "noise_scale_preconditioned")
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
LATER = {*NOISE_SCALES, *(name for name in EPOCH_FIGURES if VALIDATION in name)}  # which earlier files have not
WRITE_SECONDS = 5.0  # between writes without an evaluation
WRITE_SHARE, WRITE_CREDIT = 0.01, 1.0  # of a run's time that goes into writing, and seconds besides
SILENT_SECONDS = 30.0  # without a write, after which the process may be gone
RUNNING, FINISHED, FAILED = "running", "finished", "failed: "
PERHAPS_DEAD = "perhaps dead"
STATUS_BYTES = 1000
NETWORK = "network"  # attribute: its `models.description.Description`
WRITER = "writer_"  # before the names of the attributes that tell of the process
# What readers rely on, by the attribute: of the file of a run, and of a run in a study's file.
RUN_ATTRIBUTES = {"method": str, "data": str, "replicas": int, "batch": int, "seed": int}
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


class Run:
    """A run file read back whole. Local.

    Parameters
    ----------
    path : Path
    iterate : str, optional
        Of `ITERATES`: whose parameters to read, too.

    Attributes
    ----------
    attributes : dict
        Numbers and text, as Python has them.
    epochs, steps : dict of (rows,) float64
        By figure; of a run in a study's file there are no steps.
    parameters : dict of arrays
        At the last evaluation, by name, in the network's order; empty where not asked for, or not there.
        Of a file of earlier versions there is one, (N,), without a name.
    silence : float
        Seconds since the file was written, when it was read.

    Raises
    ------
    UserError
        For a file that is missing, is not of a run, or not as it was written.
    """

    def __init__(self, path: Path, iterate: str | None = None) -> None:
        with open_image(path, "run") as file:
            self.silence = max(0.0, time.time() - path.stat().st_mtime)
            self._read(path, file, text_of(dataset(file, "status")[()]), RUN_ATTRIBUTES)
            self.steps = _columns(file, "steps", ("step", *subgroup(file, "steps")))
            if iterate is not None:
                self.parameters = _parameters(file, iterate)
                count = sum(array.size for array in self.parameters.values()) - self.attributes.get("statistics", 0)
                if self.parameters and count != self.attributes.get("parameters", count):
                    raise ValueError("parameters are not as many as the attribute says")

    @classmethod
    def of_group(cls, path: Path, group: h5py.Group) -> Run:
        """Return the run in a group of a study's file; KeyError or ValueError where it is none."""
        run = cls.__new__(cls)
        run.silence, run.steps = 0.0, {}
        run._read(path, group, text_of(group.attrs["status"]), STUDY_ATTRIBUTES)
        return run

    def _read(self, path: Path, group: h5py.Group, status: str, kinds: Mapping[str, type]) -> None:
        self.path, self.parameters = path, {}
        self.attributes: dict[str, Any] = {**attributes_of(group), "status": " ".join(status.split())}
        if status not in (RUNNING, FINISHED) and not status.startswith(FAILED.rstrip()):
            raise ValueError(f"status {printable(status)}")
        _check(self.attributes, kinds)
        there = subgroup(group, "epochs")
        figures = [name for name in EPOCH_FIGURES if name not in LATER or name in there]
        self.epochs = _columns(group, "epochs", figures)

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

    @property
    def held_out(self) -> tuple[str, ...]:
        """The parts of the data that the run was evaluated on beside the one that it was trained on."""
        if f"{TRAIN}_samples" not in self.attributes:  # earlier, all data sets had a test part and nothing else
            return (TEST,)
        return tuple(part for part in (VALIDATION, TEST) if f"{part}_samples" in self.attributes)

    def last(self, figure: str) -> float:
        """Return a figure of the last evaluation; NaN before any."""
        values = self.epochs.get(figure, np.zeros(0))
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


def _parameters(file: h5py.File, iterate: str) -> Parameters:
    """Return the parameters of an iterate, nothing where an average is not there; KeyError or ValueError for others."""
    name = f"{iterate}parameters"
    if iterate and name not in file:
        return {}
    if isinstance(child(file, name), h5py.Dataset):  # of earlier versions
        return {"": column(file, name)}
    found = {part: dataset(file, f"{name}/{part}")[()] for part in subgroup(file, name)}
    if wrong := [part for part, array in found.items() if array.dtype.kind != "f"]:
        raise ValueError(f"{name}/{wrong[0]} is no array of real numbers")
    return found


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


def qualities_text(figure: Callable[[str], float], held_out: Iterable[str]) -> str:
    """Return the figures of an evaluation, by their names, as a line.

    Examples
    --------
    >>> qualities_text({"train_nll": 0.5, "test_nll": 1.0, "test_accuracy": 0.75}.__getitem__, ["test"])
    'train NLL 0.5000, test NLL 1.0000, accuracy 75.00%'
    """
    told = [f"{part} NLL {figure(f'{part}_nll'):.4f}, accuracy {figure(f'{part}_accuracy'):.2%}" for part in held_out]
    return ", ".join([f"train NLL {figure('train_nll'):.4f}", *told])


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
