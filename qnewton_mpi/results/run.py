"""The run in a file, or in a study's file, read back for tables and figures."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.data.parts import TEST, TRAIN, VALIDATION
from qnewton_mpi.errors import printable
from qnewton_mpi.files.images import attributes_of, child, column, dataset, open_image, subgroup, text_of
from qnewton_mpi.files.locks import Holder
from qnewton_mpi.results.layout import (
    EPOCH_FIGURES,
    FAILED,
    FINISHED,
    LATER,
    NOISE_SCALES,
    RUNNING,
    WRITER,
    Parameters,
)
from qnewton_mpi.results.words import duration, rate_text

SILENT_SECONDS = 30.0  # without a write, after which the process may be gone
PERHAPS_DEAD = "perhaps dead"
# What readers rely on, by the attribute: of the file of a run, and of a run in a study's file.
RUN_ATTRIBUTES = {"method": str, "data": str, "replicas": int, "batch": int, "seed": int}
STUDY_ATTRIBUTES = {"row": str, "stage": str, "baseline": bool}


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
