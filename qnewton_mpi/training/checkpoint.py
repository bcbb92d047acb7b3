"""Checkpoints: all state of a run, written side by side by the ranks, complete or not there at all.

DIR/step-0000000040/
    rank-00000-of-00004.h5 …   what a rank holds: its coordinates of /held, and the layers that it keeps sums for
    ranks.h5                   instead of those, with a group a rank, where h5py is built with parallel HDF5
    checkpoint.h5              /shared, and /configuration (JSON): the options, the step, what is where, the sums of
                               the files of the ranks
    SHA256SUMS                 of all files above, as `sha256sum -c` reads it

A checkpoint is written under another name, every file and folder is fsynced, and then it is renamed. The last two that
are sound are kept.

A file is opened once, compared with its sum, and read by HDF5 through the same descriptor: checkpoint.h5 with the sum
in SHA256SUMS, the others with those in checkpoint.h5, so that one of another step or run is not taken for its own. A
rank opens those that it needs, one after the other, and puts its coordinates together from their parts. Nothing of the
run is changed before all ranks have all that they need.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.core import state
from qnewton_mpi.core.exchange import Exchange
from qnewton_mpi.core.state import Kind
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.images import HDF5_ERRORS, child, dataset, image_of, open_summed
from qnewton_mpi.files.whole import reason, regular_descriptor, replace_whole, sync_folder
from qnewton_mpi.models.description import changed
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.training.whose import differences

T = TypeVar("T")
HostArray = NDArray[Any]
SCHEMA = 3
KEPT = 2
MASTER, SUMS = "checkpoint.h5", "SHA256SUMS"
TOGETHER = "ranks.h5"  # in place of a file a rank, where h5py has parallel HDF5
MOST_SUMS = 2**26  # bytes, of a million ranks' sums
PARAMETERS, STEP = "optimizer/held", "position/step"
# The entries of an iterate's weights, by its name (`results.runfile.ITERATES`). The mean of the last quarter is none
# before that quarter begins, which a checkpoint does not say.
ITERATES = {
    "": {PARAMETERS: Kind.HELD, "network/statistics": Kind.SHARED},
    "ema_": {"averages/exponential": Kind.SHARED},
    "best_": {"best/weights": Kind.SHARED},
}
UNREADABLE = (*HDF5_ERRORS, IndexError)
SHORTAGES = {errno.EMFILE: "allow more open files (ulimit -n)", errno.ENFILE: "too many files are open on this machine"}


@dataclass
class Position:
    """How far a run is: what the loop itself carries from step to step, and which run it is (bytes)."""

    lengths: ClassVar = {"skipped": "skipped"}
    step: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    skipped: NDArray[np.int64] | None = None
    run: NDArray[np.uint8] | None = None

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
        All options of the run and the digest of its data, compared with those of a checkpoint (`differences`).
    network : str
        Its `Description`, for those who load the parameters alone.
    """

    def __init__(
        self,
        folder: Path,
        communicator: Communicator,
        exchange: Exchange,
        configuration: Mapping[str, Any],
        network: str = "",
    ) -> None:
        self.folder, self.communicator, self.exchange = folder, communicator, exchange
        self.configuration, self.network = dict(configuration), network
        self._unsound: set[int] = set()  # steps that were passed over

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, and see that it can be written and has no checkpoints of another run.

        Raises
        ------
        UserError
        """

        def make() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
                _tidy(self.folder)
                earlier = steps_in(self.folder)
                if earlier and not resume:
                    if not overwrite:
                        raise UserError(
                            f"--checkpoint {self.folder} has checkpoints of an earlier run: go on with it by --resume, "
                            "name another folder, or remove them with --overwrite"
                        )
                    for step in earlier:
                        _remove(self.folder / name_of(step))
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                raise UserError(
                    f"--checkpoint {printable(self.folder)}: cannot be written ({reason(error)})"
                ) from error

        self.communicator.from_root(make)

    def save(self, step: int, things: Mapping[str, Any]) -> None:
        """Write the state of all things, by name, after a step.

        Raises
        ------
        UserError
            On every rank, where it cannot be written or is not finite; earlier checkpoints are then as they were.
        """
        final = self.folder / name_of(step)
        partial = final.with_name(f".{final.name}.partial")
        guarded = functools.partial(self._guarded, step)
        try:
            self.communicator.from_root(lambda: guarded(lambda: _fresh(partial)))
            arrays, written = self.communicator.together(lambda: guarded(lambda: self._write_rank(partial, things)))
            with self.communicator.waiting():
                everyone = self.communicator.mpi.gather(written)
            self.communicator.from_root(lambda: guarded(lambda: self._finish(partial, step, arrays, everyone or [])))
        except UserError:
            if self.communicator.rank == 0:
                with contextlib.suppress(OSError):
                    _remove(partial)
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
            Where there are checkpoints but none is sound, or the configuration contradicts the newest sound one. No
            state has been changed.
        """

        def attempt(source: Path, step: int) -> tuple[list[state.Change] | None, str | None]:
            """Have all ranks read what they need; no rank leaves before all have: rank 0 may then remove the files."""
            changes, problem = self.communicator.together(
                lambda: _attempted(source, lambda: self._checked(source, step, things))
            )
            return changes, self._first(problem)

        steps = self.communicator.from_root(lambda: steps_in(self.folder))
        found, changes, passed_over = _newest_sound(self.folder, steps, attempt)
        self._unsound.update(step for step in steps if found is not None and step > found)
        state.assign(changes or [])
        return found, passed_over

    def _write_rank(
        self, folder: Path, things: Mapping[str, Any]
    ) -> tuple[dict[str, tuple[Kind, HostArray]], dict[str, Any]]:
        """Write what this rank has; return all its arrays by path, and what checkpoint.h5 is to say of its file."""
        communicator, exchange = self.communicator, self.exchange
        part = exchange.summed()
        arrays = {}
        for name, thing in things.items():
            for path, kind, owner, attribute in state.entries(thing, f"{name}/"):
                if (kind is Kind.SHARED and communicator.rank > 0) or (kind is Kind.OWNED and not exchange.first):
                    continue
                array = state.value(owner, attribute)
                if array is not None:
                    state.check_finite(path, array)
                    arrays[path] = kind, array[..., part] if kind is Kind.HELD else array
        own = {f"{kind.value}/{path}": array for path, (kind, array) in arrays.items() if kind is not Kind.SHARED}
        name = rank_name(communicator.rank, communicator.size)
        if h5py.get_config().mpi:
            digest = self._write_together(folder, name, own)
        else:
            digest = _write(folder / f"{name}.h5", own)
        entries = {
            path: (kind.value, array.shape[:-1] if kind is Kind.HELD else array.shape, array.dtype.str)
            for path, (kind, array) in arrays.items()
        }
        return arrays, {"digest": digest, "length": part.stop - part.start, "entries": entries}

    def _write_together(self, folder: Path, own: str, arrays: Mapping[str, HostArray]) -> str | None:
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
        if communicator.rank > 0:
            return None
        with (folder / TOGETHER).open("rb") as written:
            os.fsync(written.fileno())
            return hashlib.file_digest(written, "sha256").hexdigest()

    def _finish(
        self,
        partial: Path,
        step: int,
        arrays: Mapping[str, tuple[Kind, HostArray]],
        ranks: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the common file and the sums, give the checkpoint its name, and remove those that are not kept."""
        entries: dict[str, Entry] = {}
        for rank, written in enumerate(ranks):
            for path, about in written["entries"].items():
                entries.setdefault(path, Entry(*about)).ranks.append(rank)
        names = file_names(len(ranks), together=h5py.get_config().mpi)
        files = {name: written["digest"] for name, written in zip(names, ranks, strict=True) if written["digest"]}
        document = {
            "schema": SCHEMA,
            "step": step,
            "size": self.exchange.size,
            "replicas": self.exchange.replicas,
            "configuration": self.configuration,
            "network": self.network,
            "files": files,
            "lengths": [written["length"] for written in ranks],
            "entries": {path: asdict(entry) for path, entry in entries.items()},
        }
        shared = {f"{kind.value}/{path}": array for path, (kind, array) in arrays.items() if kind is Kind.SHARED}
        shared["configuration"] = np.array(json.dumps(document).encode())
        sums = {MASTER: _write(partial / MASTER, shared), **files}
        replace_whole(partial / SUMS, _lines(sums).encode())
        if not _is_whole(partial):
            raise OSError("files of other ranks are not there: it must be a folder that all nodes see")
        final = self.folder / name_of(step)
        old = final.with_name(f".{final.name}.old")
        _remove(old)
        if os.path.lexists(final):
            final.rename(old)
        partial.rename(final)
        sync_folder(self.folder)
        self._unsound.discard(step)
        for folder in (old, *self._superfluous(step)):
            with contextlib.suppress(OSError):  # the next save tries again
                _remove(folder)

    def _superfluous(self, step: int) -> list[Path]:
        """Return the checkpoints from before a step that was saved but the newest sound ones.

        Later ones stay: there are none but those that were passed over, which the run replaces as it gets there.
        """
        earlier = [other for other in steps_in(self.folder) if other < step]
        sound = [other for other in earlier if other not in self._unsound and _is_whole(self.folder / name_of(other))]
        return [self.folder / name_of(other) for other in earlier if other not in sound[1 - KEPT :]]

    def _checked(self, source: Path, step: int, things: Mapping[str, Any]) -> list[state.Change]:
        """Return what is to be restored on this rank, compared with its sums and with what is there. Local."""
        exchange, communicator = self.exchange, self.communicator
        wanted = {path: kind for name, thing in things.items() for path, kind, *_ in state.entries(thing, f"{name}/")}
        with contextlib.ExitStack() as stack:
            saved = _Saved(source, step, stack)
            self._compare(source, saved.about)
            arrays = saved.read(wanted, exchange.held, communicator.rank, communicator.size)
        if arrays.get(STEP, step) != step:
            raise ValueError(f"its position is step {arrays[STEP]}")
        return [
            change
            for name, thing in things.items()
            for change in state.checked(thing, lambda path, _: arrays.get(path), f"{name}/")
        ]

    def _first(self, problem: str | None) -> str | None:
        """Return the lowest rank's problem on all ranks."""
        with self.communicator.waiting():
            return next((found for found in self.communicator.mpi.allgather(problem) if found), None)

    def _compare(self, source: Path, about: Mapping[str, Any]) -> None:
        """Raise `UserError` where a checkpoint is of a run with other options, or of another model."""
        if told := differences(about["configuration"], self.configuration, going_on=True):
            raise UserError(f"--resume: {source} is of another run: {told}")
        if about["size"] != self.exchange.size:
            raise UserError(
                f"--resume: {source} is of another run: of {about['size']} parameters, not {self.exchange.size}"
            )
        theirs, ours = (json.loads(text or "{}").get("network", {}) for text in (about.get("network"), self.network))
        if other := changed(theirs, ours):
            raise UserError(
                f"--resume: {source} is of another run: {printable(other)} was another, as the module has changed since"
            )

    def _guarded(self, step: int, action: Callable[[], T]) -> T:
        """Run an action; raise `UserError` where the system or HDF5 refuses to write, or state is not to be written."""
        try:
            return action()
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            raise UserError(f"checkpoint of step {step} not written to {self.folder}: {reason(error)}") from error


@dataclass(frozen=True)
class Entry:
    """What checkpoint.h5 says of an entry of the state.

    Attributes
    ----------
    kind : str
        Of `Kind`.
    shape : sequence of int
        Of a HELD one without the last axis, which is a rank's coordinates.
    dtype : str
    ranks : list of int
        Those that wrote it.
    """

    kind: str
    shape: Sequence[int]
    dtype: str
    ranks: list[int] = field(default_factory=list)


class _Saved:
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
        sums = _sums(folder)
        self._master = stack.enter_context(open_summed(folder / MASTER, sums.get(MASTER, "")))
        text = h5py.check_string_dtype(child(self._master, "configuration").dtype)
        if text is not None and text.length is None:  # as the first schema has it
            raise UserError(f"{folder} is of an earlier version, which alone goes on from it; or begin another run")
        self.about: dict[str, Any] = json.loads(dataset(self._master, "configuration")[()])
        if self.about["schema"] != SCHEMA:
            raise UserError(f"{folder} is of schema {self.about['schema']!r}, this version reads {SCHEMA}")
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
            saved = _Saved(source, step, stack)
            parts = saved.read(ITERATES[iterate], slice(0, saved.about["size"]))
            if not parts:
                raise UserError(f"{source}: has no parameters of that name: its run held out no validation part")
            for path, part in parts.items():
                state.check_finite(path, part)
            dtype = parts[next(iter(ITERATES[iterate]))].dtype
            return np.concatenate(
                [parts[path].astype(dtype) for path in ITERATES[iterate] if path in parts]
            ), saved.about

    step, found, passed_over = _newest_sound(
        folder, steps_in(folder), lambda source, step: _attempted(source, lambda: read(source, step))
    )
    if step is None or found is None:
        raise UserError(f"{folder}: has no checkpoint")
    return (*found, passed_over)


def _newest_sound(
    folder: Path, steps: Sequence[int], attempt: Callable[[Path, int], tuple[T | None, str | None]]
) -> tuple[int | None, T | None, list[str]]:
    """Return the step of the newest sound checkpoint, what was read of it, and why newer ones are not sound.

    `attempt(source, step)` returns what it reads of a checkpoint, and why it cannot, if so.

    Raises
    ------
    UserError
        Where none of the steps' is sound.
    """
    passed_over: list[str] = []
    for step in reversed(steps):
        source = folder / name_of(step)
        found, problem = attempt(source, step)
        if problem is None:
            return step, found, passed_over
        passed_over.append(f"{source}: {problem}")
    if steps:
        raise UserError(f"no sound checkpoint in {folder}: {'; '.join(passed_over)}")
    return None, None, passed_over


def _attempted(source: Path, read: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what is read of a checkpoint, and why it cannot be read, if so. Local.

    Raises
    ------
    UserError
        Where it is not the checkpoint that is at fault: an older one is no better, and this one would be lost.
    """
    try:
        return read(), None
    except UNREADABLE as error:
        number = getattr(error, "errno", None)
        if number in SHORTAGES:
            raise UserError(f"{source}: cannot be read ({reason(error)}): {SHORTAGES[number]}") from error
        if isinstance(error, MemoryError):
            raise UserError(f"{source}: cannot be read: there is not enough memory") from error
        at = getattr(error, "filename", None)
        return None, f"cannot be restored ({f'{Path(at).name}: ' if at else ''}{reason(error)})"


def rank_name(rank: int, ranks: int) -> str:
    """Return the name of a rank's file, without its suffix, or of its group."""
    return f"rank-{rank:05d}-of-{ranks:05d}"


def file_names(ranks: int, together: bool) -> list[str]:
    """Return the name of the file of each rank."""
    return [TOGETHER if together else f"{rank_name(rank, ranks)}.h5" for rank in range(ranks)]


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:010d}"


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending; none where there is no folder.

    Whatever has the name of one counts: a link to one that was moved is no reason to start from the beginning.

    Raises
    ------
    UserError
        Where the folder cannot be read: that is not the same as having none.
    """
    try:
        with os.scandir(folder) as found:
            names = [entry.name for entry in found]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)})") from error
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-([0-9]{10}|[1-9][0-9]{10,17})", name))


def _sums(folder: Path) -> dict[str, str]:
    """Return what SHA256SUMS says, by the names of the files."""
    with os.fdopen(regular_descriptor(folder / SUMS), "rb") as file:
        text = file.read(MOST_SUMS).decode("ascii", "replace")
    sums = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)}
    if _lines(sums) != text:
        raise ValueError(f"{SUMS} is damaged")
    return sums


def _is_whole(folder: Path) -> bool:
    """Tell whether all files of a checkpoint are there, whatever is in them."""
    try:
        return all((folder / name).is_file() for name in (MASTER, *_sums(folder)))
    except UNREADABLE:
        return False


def _tidy(folder: Path) -> None:
    """Remove what saves that were cut off have left; a checkpoint that was about to be replaced gets back its name."""
    for partial in folder.glob(".step-*.partial"):
        _remove(partial)
    for old in folder.glob(".step-*.old"):
        final = folder / old.stem[1:]
        if os.path.lexists(final):
            _remove(old)
        else:
            old.rename(final)


def _fresh(folder: Path) -> None:
    """Make a folder, without what is left of an earlier one."""
    _remove(folder)
    folder.mkdir()


def _remove(path: Path) -> None:
    """Remove a folder and all in it, if there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, arrays: Mapping[str, HostArray]) -> str:
    """Write arrays by name to an HDF5 file, which is made in memory; return its SHA-256."""

    def fill(file: h5py.File) -> None:
        for name, array in arrays.items():
            file[name] = array

    image = image_of(fill)
    replace_whole(path, image)
    return hashlib.sha256(image).hexdigest()


def _lines(sums: Mapping[str, str]) -> str:
    """Return the text of SHA256SUMS."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())
