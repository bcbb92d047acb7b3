"""Checkpoints: all state of a run, written side by side by the ranks, complete or not there at all.

DIR/step-0000000040/
    rank-00000-of-00004.h5 …   what a rank holds: its coordinates of /held, and the layers that it keeps sums for
    ranks.h5                   instead of those, with a group a rank, where h5py is built with parallel HDF5
    checkpoint.h5              /shared, /configuration (JSON), and /held of all coordinates as virtual data sets
    SHA256SUMS                 of all files above, as `sha256sum -c` reads it

A checkpoint is written under another name, every file and folder is fsynced, and then it is renamed. The last two are
kept. Files are compared with their sums before HDF5 opens them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.core import state
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training.disk import reserved

SCHEMA = 1
KEPT = 2
DATASET_BYTES = 4096  # at most, that HDF5 needs for a data set besides its data
MASTER, SUMS = "checkpoint.h5", "SHA256SUMS"
TOGETHER = "ranks.h5"  # in place of a file a rank, where h5py has parallel HDF5
UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError)
# Options that may differ between a run and its continuation; `exchange` then changes rounding.
FREE = {
    "output",
    "overwrite",
    "progress",
    "data_dir",
    "exchange",
    "transport",
    "checkpoint",
    "checkpoint_every",
    "resume",
    "time_limit",
    "stop_signals",
    "stall_timeout",
    "check_replicas",
    "on_nonfinite",
    "log_dir",
}


@dataclass
class Position:
    """How far a run is: what the loop itself carries from step to step."""

    step: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    skipped: NDArray[np.int64] | None = None

    @property
    def state(self) -> dict[str, Kind]:
        return dict.fromkeys(vars(self), Kind.SHARED)


class Checkpoints:
    """The checkpoints of a run in a folder. All methods are collective.

    Parameters
    ----------
    folder : Path
    communicator : Communicator
    exchange : Exchange
        Which tells what each rank holds.
    configuration : mapping
        All options of the run, compared with those of a checkpoint.
    """

    def __init__(
        self, folder: Path, communicator: Communicator, exchange: Exchange, configuration: Mapping[str, Any]
    ) -> None:
        self.folder, self.communicator, self.exchange = folder, communicator, exchange
        self.configuration = dict(configuration)

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, and see that it can be written and has no checkpoints of another run.

        Raises
        ------
        UserError
        """

        def make() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe = self.folder / ".writable"
                probe.touch()
                probe.unlink()
                for leftover in self.folder.glob(".step-*"):  # of a save that was cut off
                    shutil.rmtree(leftover)
            except OSError as error:
                raise UserError(f"--checkpoint {self.folder}: cannot be written ({error.strerror})") from error
            earlier = steps_in(self.folder)
            if earlier and not resume:
                if not overwrite:
                    raise UserError(
                        f"--checkpoint {self.folder} has checkpoints of an earlier run: go on with it by --resume, "
                        "name another folder, or remove them with --overwrite"
                    )
                for step in earlier:
                    shutil.rmtree(self.folder / name_of(step))

        self.communicator.from_root(make)

    def save(self, step: int, things: Mapping[str, Any]) -> None:
        """Write the state of all things, by name, after a step.

        Raises
        ------
        UserError
            On every rank, where it cannot be written; earlier checkpoints are then as they were.
        """
        final = self.folder / name_of(step)
        partial = final.with_name(f".{final.name}.partial")
        entries = [entry for name, thing in things.items() for entry in state.entries(thing, f"{name}/")]
        try:
            self.communicator.from_root(lambda: self._guard(step, lambda: _fresh(partial)))
            with contextlib.ExitStack() as stack:  # all ranks' room at the same time
                self.communicator.together(lambda: self._guard(step, lambda: self._reserve(partial, entries, stack)))
            sums = self.communicator.together(lambda: self._guard(step, lambda: self._write_rank(partial, entries)))
            with self.communicator.waiting():
                everyone = self.communicator.mpi.gather(sums)
            self.communicator.from_root(
                lambda: self._guard(step, lambda: self._finish(partial, final, entries, everyone or []))
            )
        except UserError:
            with self.communicator.waiting():
                self.communicator.mpi.Barrier()  # until no rank has a file in there
            if self.communicator.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def load(self, things: Mapping[str, Any]) -> tuple[int | None, list[str]]:
        """Restore the state of all things from the newest sound checkpoint.

        Returns
        -------
        step : int or None
            Of the checkpoint; None where there is none in the folder.
        passed_over : list of str
            Why newer ones are not sound, a line each.

        Raises
        ------
        UserError
            Where there are checkpoints but none is sound, or the configuration contradicts the newest sound one.
        """
        passed_over: list[str] = []
        steps = self.communicator.from_root(lambda: steps_in(self.folder))
        for step in reversed(steps):
            source = self.folder / name_of(step)
            problem = self._problem(source) or self._restored(source, things)
            if problem is None:
                return step, passed_over
            passed_over.append(f"{source}: {problem}")
        if steps:
            raise UserError(f"no sound checkpoint in {self.folder}: {'; '.join(passed_over)}")
        return None, passed_over

    def _reserve(self, folder: Path, entries: list[tuple[str, Kind, Any, str]], stack: contextlib.ExitStack) -> None:
        """Hold room for what this rank is to write."""
        root = self.communicator.rank == 0  # which writes what is shared, too
        arrays = [
            state.value(owner, attribute) for _, kind, owner, attribute in entries if root or kind is not Kind.SHARED
        ]
        size = sum(array.nbytes for array in arrays if array is not None) + DATASET_BYTES * (len(arrays) + 16)
        stack.enter_context(reserved(folder, size))

    def _write_rank(self, folder: Path, entries: list[tuple[str, Kind, Any, str]]) -> dict[str, Any]:
        """Write what this rank has; return the name and sum of the file, the group, and the ranges of /held."""
        communicator, exchange = self.communicator, self.exchange
        part = exchange.summed()
        first = exchange.held.start + part.start
        held, arrays = {}, {}
        for path, kind, owner, attribute in entries:
            array = state.value(owner, attribute) if kind is not Kind.SHARED else None
            if array is None or (kind is Kind.OWNED and not exchange.first):
                continue
            if kind is Kind.HELD:
                array = array[..., part]
                held[path] = (first, array.shape, array.dtype.str)
            arrays[f"{kind.value}/{path}"] = array
        own = f"rank-{communicator.rank:05d}-of-{communicator.size:05d}"
        if h5py.get_config().mpi:
            return {"name": TOGETHER, "group": own, "sum": self._write_together(folder, own, arrays), "held": held}
        name = f"{own}.h5"
        with h5py.File(folder / name, "w") as file:
            for path, array in arrays.items():
                file[path] = array
        return {"name": name, "group": "", "sum": _synced(folder / name), "held": held}

    def _write_together(self, folder: Path, own: str, arrays: Mapping[str, NDArray[Any]]) -> str | None:
        """Write the arrays of all ranks to one file, each rank to a group of its own; return its sum on rank 0.

        Collective. What belongs to the layout of the file is done by all ranks alike, as parallel HDF5 wants it; each
        then writes its data. A rank that cannot ends the job, for the others wait in HDF5: earlier checkpoints are
        sound.
        """
        communicator = self.communicator
        with communicator.waiting():
            layout = communicator.mpi.allgather((own, [(path, a.shape, a.dtype.str) for path, a in arrays.items()]))
        with h5py.File(folder / TOGETHER, "w", driver="mpio", comm=communicator.mpi) as file:
            try:
                for group, datasets in layout:
                    for path, shape, dtype in datasets:
                        file.create_dataset(f"{group}/{path}", shape, dtype)
                for path, array in arrays.items():
                    if array.size:
                        file[f"{own}/{path}"][...] = array
            except (OSError, RuntimeError):
                sys.excepthook(*sys.exc_info())
                raise
        return _synced(folder / TOGETHER) if communicator.rank == 0 else None

    def _finish(
        self, partial: Path, final: Path, entries: list[tuple[str, Kind, Any, str]], ranks: list[dict[str, Any]]
    ) -> None:
        """Write the common file and the sums, give the checkpoint its name, and remove those that are not kept."""
        about = {
            "schema": SCHEMA,
            "ranks": self.communicator.size,
            "replicas": self.exchange.replicas,
            "size": self.exchange.size,
            "layout": type(self.exchange).__name__,
            "configuration": self.configuration,
        }
        with h5py.File(partial / MASTER, "w", libver="latest") as file:
            file["configuration"] = json.dumps(about)
            for path, kind, owner, attribute in entries:
                array = state.value(owner, attribute) if kind is Kind.SHARED else None
                if array is not None:
                    file[f"shared/{path}"] = array
            for path, (_, shape, dtype) in ranks[0]["held"].items() if ranks else ():
                layout = h5py.VirtualLayout((*shape[:-1], self.exchange.size), dtype)
                for rank in ranks:
                    first, own, _ = rank["held"][path]
                    if own[-1]:
                        source = h5py.VirtualSource(rank["name"], f"{rank['group']}/held/{path}", own)
                        layout[..., first : first + own[-1]] = source
                file.create_virtual_dataset(f"held/{path}", layout)
        sums = {MASTER: _synced(partial / MASTER), **{rank["name"]: rank["sum"] for rank in ranks if rank["sum"]}}
        (partial / SUMS).write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
        _sync(partial / SUMS)
        _sync(partial)
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        _sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        for step in steps_in(self.folder)[:-KEPT]:
            shutil.rmtree(self.folder / name_of(step))

    def _problem(self, source: Path) -> str | None:
        """Return why a checkpoint is not sound, the same on all ranks, which share its files; None if it is."""
        rank, size = self.communicator.rank, self.communicator.size
        found: str | None = None
        try:
            sums: dict[str, str] = {}
            for line in (source / SUMS).read_text().splitlines():
                value, name = line.split("  ", 1)
                sums[name] = value
            if sums.keys() != {path.name for path in source.glob("*.h5")}:
                found = f"{SUMS} does not name the files that are there"
            for name in sorted(sums)[rank::size]:
                if _sum(source / name) != sums[name]:
                    found = f"{name} does not match its checksum"
                    break
        except UNREADABLE as error:
            found = f"cannot be read ({' '.join(str(error).split())})"
        return self._first(found)

    def _restored(self, source: Path, things: Mapping[str, Any]) -> str | None:
        """Restore the state of all things; return why it could not be, or raise `UserError`, the same on all ranks.

        No rank leaves before all have read: rank 0 might go on to remove the files.
        """

        def restore() -> str | None:
            with contextlib.ExitStack() as stack:
                try:
                    reader = _Reader(source, self.exchange, stack)
                    self._compare(source, reader.about)
                    for name, thing in things.items():
                        state.restore(thing, reader.read, f"{name}/")
                except UNREADABLE as error:
                    return f"cannot be restored ({' '.join(str(error).split())})"
            return None

        return self._first(self.communicator.together(restore))

    def _first(self, problem: str | None) -> str | None:
        """Return the lowest rank's problem on all ranks."""
        with self.communicator.waiting():
            return next((found for found in self.communicator.mpi.allgather(problem) if found), None)

    def _compare(self, source: Path, about: Mapping[str, Any]) -> None:
        """Raise `UserError` where a checkpoint is of another version, or of a run with other options."""
        if about["schema"] != SCHEMA:
            raise UserError(f"{source} is of schema {about['schema']}, this version reads {SCHEMA}")
        before, now = about["configuration"], json.loads(json.dumps(self.configuration))
        differing = sorted(k for k in before.keys() | now.keys() if k not in FREE and before.get(k) != now.get(k))
        if differing:
            told = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in differing)
            raise UserError(f"--resume: {source} is of another run: {told}")

    def _guard(self, step: int, action: Any) -> Any:
        """Run an action; raise `UserError` where the system or HDF5 refuses to write."""
        try:
            return action()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"checkpoint of step {step} not written to {self.folder}: {reason}") from error


class _Reader:
    """Reads a sound checkpoint for this rank."""

    def __init__(self, source: Path, exchange: Exchange, stack: contextlib.ExitStack) -> None:
        self._master = stack.enter_context(h5py.File(source / MASTER))
        self.about = json.loads(self._master["configuration"][()])
        names = sorted(path.name for path in source.glob("rank*.h5"))
        files = [stack.enter_context(h5py.File(source / name)) for name in names]
        self._ranks = [files[0][group] for group in sorted(files[0])] if names == [TOGETHER] else files
        self._exchange = exchange
        self._same = (self.about["ranks"], self.about["layout"]) == (
            exchange.communicator.size,
            type(exchange).__name__,
        )

    def read(self, path: str, kind: Kind) -> NDArray[Any] | None:
        """Return an entry for this rank; None where the checkpoint has none."""
        name = f"{kind.value}/{path}"
        if kind is Kind.SHARED or kind is Kind.HELD:
            if name not in self._master:
                return None
            dataset = self._master[name]
            whole = dataset[..., self._exchange.held] if kind is Kind.HELD else dataset[()]
            return np.asarray(whole)
        have = [file[name] for file in self._ranks if name in file]
        if not have:
            return None
        if kind is Kind.OWNED:
            return np.asarray(have[0][()])
        if self._same:
            return np.asarray(self._ranks[self._exchange.communicator.rank][name][()])
        # Of other ranks: the whole sum to the first rank that holds the layer.
        total = np.sum([part[()] for part in have], axis=0)
        return np.asarray(total if self._exchange.first else np.zeros_like(total))


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:010d}"


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def _fresh(folder: Path) -> None:
    """Make a folder, without what is left of an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the system write a file or folder to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _synced(path: Path) -> str:
    """Sync a file; return its SHA-256."""
    _sync(path)
    return _sum(path)
