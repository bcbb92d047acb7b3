"""A checkpoint that is there, read: all that a rank needs of it, or the parameters alone. Local."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from qnewton_mpi.core import state
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError
from qnewton_mpi.files.images import child, dataset, open_summed
from qnewton_mpi.parallel.communicator import HostArray
from qnewton_mpi.training.checkpoint.folder import attempted, newest_sound, steps_in
from qnewton_mpi.training.checkpoint.layout import MASTER, SCHEMA, SUMS, TOGETHER, Entry, file_names, rank_name, sums_in

PARAMETERS = "optimizer/held"
# The entries of an iterate's weights, by its name (`results.layout.ITERATES`). The mean of the last quarter is none
# before that quarter begins, which a checkpoint does not say.
ITERATES = {
    "": {PARAMETERS: Kind.HELD, "network/statistics": Kind.SHARED},
    "ema_": {"averages/exponential": Kind.SHARED},
    "best_": {"best/weights": Kind.SHARED},
}


class Saved:
    """A checkpoint on the disk. All methods are local, and raise `UNREADABLE` for one that is not sound.

    Parameters
    ----------
    folder : Path
    step : int
        Of which it must be.
    stack : ExitStack
        While it lasts, checkpoint.h5 is open.

    Attributes
    ----------
    about : dict
        The JSON in checkpoint.h5.
    lengths : list of int
        How many coordinates each of the ranks that wrote it has, in the order of the coordinates.
    """

    def __init__(self, folder: Path, step: int, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        if folder.is_symlink():
            raise ValueError("is a link: put the folder itself there")
        sums = sums_in(folder)
        self._master = stack.enter_context(open_summed(folder / MASTER, sums.get(MASTER, "")))
        text = h5py.check_string_dtype(child(self._master, "configuration").dtype)
        if text is not None and text.length is None:  # as the first schema has it
            raise UserError(f"{folder} is of an earlier version, which alone goes on from it; or begin another run")
        self.about: dict[str, Any] = json.loads(dataset(self._master, "configuration")[()])
        if self.about["schema"] != SCHEMA:
            raise UserError(
                f"{folder} is of schema {self.about['schema']!r}, this version reads {SCHEMA}: begin anew "
                "with --overwrite, or from the parameters of its run with --init-from RUN.h5"
            )
        if self.about["step"] != step:
            raise ValueError(f"is of step {self.about['step']}")
        self.lengths: list[int] = self.about["lengths"]
        self._bounds = [0, *itertools.accumulate(self.lengths)]
        self._files: dict[str, str] = self.about["files"]
        self._together = TOGETHER in self._files
        if self._bounds[-1] != self.about["size"]:
            raise ValueError(f"has {self._bounds[-1]} of {self.about['size']} coordinates")
        if sums != {MASTER: sums[MASTER], **self._files}:
            raise ValueError(f"{SUMS} is not of the files that {MASTER} was written with")

    def read(
        self,
        wanted: Mapping[str, Kind],
        held: slice,
        rank: int = 0,
        ranks: int = 1,
    ) -> dict[str, HostArray]:
        """Return those of the wanted entries that there are, for one of several ranks.

        Of the files that nobody needs, each is compared by one rank, too.

        Parameters
        ----------
        wanted : mapping
            Paths and their kinds.
        held : slice
            The coordinates that the rank holds.
        rank, ranks : int
        """
        entries = {path: Entry(**self.about["entries"][path]) for path in wanted if path in self.about["entries"]}
        arrays: dict[str, HostArray] = {}
        sources: dict[int, list[str]] = defaultdict(list)  # paths, by the rank that wrote them
        for path, entry in entries.items():
            kind = wanted[path]
            if entry.kind != kind.value:
                raise ValueError(f"{path} is {entry.kind}")
            if kind is Kind.SHARED:
                arrays[path] = self._dataset(self._master, "", path, entry)[()]
                continue
            if kind is Kind.HELD:
                arrays[path] = np.empty((*entry.shape, held.stop - held.start), entry.dtype)
                takes: Iterable[int] = [
                    writer
                    for writer, (start, stop) in enumerate(itertools.pairwise(self._bounds))
                    if max(start, held.start) < min(stop, held.stop)
                ]
            else:
                takes = entry.ranks[:1]
            for writer in takes:
                sources[writer].append(path)
        names = file_names(len(self.lengths), self._together)
        for number, (name, writers) in enumerate(itertools.groupby(range(len(names)), names.__getitem__)):
            pieces = [(writer, path) for writer in writers for path in sources[writer]]
            if not pieces and number % ranks != rank:
                continue
            with open_summed(self._folder / name, self._files[name]) as file:
                for writer, path in pieces:
                    self._take(file, writer, path, entries[path], held, arrays)
        return arrays

    def _take(
        self, file: h5py.File, writer: int, path: str, entry: Entry, held: slice, arrays: dict[str, HostArray]
    ) -> None:
        """Put what a rank wrote of an entry into the arrays."""
        group = f"{rank_name(writer, len(self.lengths))}/" if self._together else ""
        if entry.kind == Kind.HELD.value:
            start, stop = self._bounds[writer : writer + 2]
            found = self._dataset(file, group, path, entry, stop - start)
            low, high = max(start, held.start), min(stop, held.stop)
            arrays[path][..., low - held.start : high - held.start] = found[..., low - start : high - start]
        else:
            arrays[path] = self._dataset(file, group, path, entry)[()]

    def _dataset(self, file: h5py.File, group: str, path: str, entry: Entry, *length: int) -> h5py.Dataset:
        """Return the data set of an entry, which has the shape and dtype that checkpoint.h5 says."""
        found = dataset(file, f"{group}{entry.kind}/{path}")
        if (found.shape, found.dtype.str) != ((*entry.shape, *length), entry.dtype):
            raise ValueError(f"{path} has shape {found.shape} and dtype {found.dtype}")
        return found


def parameters_of(folder: Path, iterate: str = "") -> tuple[HostArray, dict[str, Any], list[str]]:
    """Read the weights of an iterate in the newest sound checkpoint of a folder. Local.

    Returns
    -------
    weights : (N + K,) float32 or float64
        Parameters, and the network's statistics, if it has any.
    about : dict
        What checkpoint.h5 says: the `configuration` of the run, its `network`.
    passed_over : list of str
        Why newer ones are not sound, a line each.

    Raises
    ------
    UserError
        Where there is none, or none is sound, or the iterate is not in checkpoints.
    """
    if iterate not in ITERATES:
        raise UserError(f"{folder}: the mean of the last quarter is in the run's file, at its end, not in checkpoints")

    def read(source: Path, step: int) -> tuple[HostArray, dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            saved = Saved(source, step, stack)
            parts = saved.read(ITERATES[iterate], slice(0, saved.about["size"]))
            if not parts:
                raise UserError(f"{source}: has no parameters of that name: its run held out no validation part")
            for path, part in parts.items():
                state.check_finite(path, part)
            dtype = parts[next(iter(ITERATES[iterate]))].dtype
            return np.concatenate(
                [parts[path].astype(dtype) for path in ITERATES[iterate] if path in parts]
            ), saved.about

    step, found, passed_over = newest_sound(
        folder, steps_in(folder), lambda source, step: attempted(source, lambda: read(source, step))
    )
    if step is None or found is None:
        raise UserError(f"{folder}: has no checkpoint")
    return (*found, passed_over)
