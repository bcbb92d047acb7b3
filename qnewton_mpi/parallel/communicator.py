"""A duplicated MPI communicator: collectives on host buffers, agreement on errors."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import ENDED_BY_CTRL_C, USAGE_ERROR, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
HostArray = NDArray[Any]
COMMUNICATION = "communication"
GRACE = 5.0  # seconds that MPI_Abort is given before the process ends itself
LAST_WORDS = 0.3  # seconds from an error's text to MPI_Abort: launchers drop what they have not read by then
PHASES = ("loading", "restore", "output", "algebra", "gradient", COMMUNICATION, "evaluation", "checkpoint")


def load_mpi() -> ModuleType:
    """Return mpi4py's MPI. Importing it loads and starts the library, which what only reads files does without. Local.

    Raises
    ------
    UserError
        Where there is no library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason}: load your site's MPI module, or pip install 'qnewton_mpi[mpich]'") from error
    return MPI


class Communicator:
    """Collectives on contiguous NumPy buffers over a private duplicate of an MPI communicator.

    Upper-case (buffer) calls only, but for `together` and `from_root`, which serve set-up and errors. Every method is
    collective unless it says otherwise.

    Parameters
    ----------
    parent : MPI.Comm, optional
        Duplicated once; the world by default.

    Attributes
    ----------
    rank, size : int
    node_rank : int
        Position among the ranks that share this node's memory.
    seconds : float
        Time spent in collectives on buffers, waiting included.
    notes : (2,) float64, optional
        Where this rank notes when it began its present phase, and which, for `Watchdog`.

    Examples
    --------
    >>> import numpy as np
    >>> communicator = Communicator()
    >>> communicator.allreduce(np.full(2, 1.5)).tolist() == [1.5 * communicator.size] * 2
    True
    >>> communicator.from_root(lambda: "of rank 0")  # on every rank
    'of rank 0'
    """

    def __init__(self, parent: MPI.Comm | None = None) -> None:
        mpi = load_mpi()
        self.mpi: MPI.Comm = (mpi.COMM_WORLD if parent is None else parent).Dup()
        self.rank = self.mpi.Get_rank()
        self.size = self.mpi.Get_size()
        node = self.mpi.Split_type(mpi.COMM_TYPE_SHARED)
        self.node_rank = node.Get_rank()
        node.Free()
        self.seconds = 0.0
        self.notes: NDArray[np.float64] | None = None

    def enter(self, phase: str) -> None:
        """Note that this rank begins a phase, one of `PHASES`, where somebody watches. Local."""
        if self.notes is not None:
            self.notes[:] = time.monotonic(), PHASES.index(phase)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that this rank may wait for others while the context lasts, then its phase as it was. Local."""
        before = PHASES[int(self.notes[1])] if self.notes is not None else ""
        self.enter(COMMUNICATION)
        yield
        if before:
            self.enter(before)

    def allreduce(self, array: HostArray, total: HostArray | None = None) -> HostArray:
        """Return the sum of the ranks' arrays, same shape and dtype; in `total`, if given."""
        total = np.empty_like(array) if total is None else total
        self._time(self.mpi.Allreduce, array, total)
        return total

    def reduce_scatter(self, array: HostArray, counts: Sequence[int], share: HostArray) -> HostArray:
        """Fill `share` with this rank's part, `counts` words a rank, of the sum of the ranks' arrays; return it."""
        if counts[0] == len(array):  # all of it to rank 0
            self._time(self.mpi.Reduce, array, share if self.rank == 0 else None)
        else:
            self._time(self.mpi.Reduce_scatter, array, share, counts)
        return share

    def allgather(self, rows: HostArray, counts: Sequence[int], everyone: HostArray | None = None) -> HostArray:
        """Return the ranks' rows, stacked in rank order, `counts` of each rank; in `everyone`, if given."""
        if everyone is None:
            everyone = np.empty((sum(counts), *rows.shape[1:]), rows.dtype)
        if counts[0] == len(everyone):  # all of it from rank 0
            if self.rank == 0:
                everyone[...] = rows
            self._time(self.mpi.Bcast, everyone)
        else:
            words = math.prod(everyone.shape[1:])
            self._time(self.mpi.Allgatherv, rows, [everyone, [count * words for count in counts]])
        return everyone

    def alltoall(self, send: HostArray, sent: Sequence[int], receive: HostArray, received: Sequence[int]) -> HostArray:
        """Send each rank its part of `send`, `sent` words a rank; return `receive`, filled with `received` a rank."""
        self._time(self.mpi.Alltoallv, [send, sent], [receive, received])
        return receive

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raises `UserError` on any, raise the lowest rank's on all.

        Other exceptions are bugs: they pass through, and end the job (`abort_on_exception`).
        """
        result: T | None = None
        failure: UserError | None = None
        try:
            result = action()
        except UserError as error:
            failure = error
        with self.waiting():
            failures = [error for error in self.mpi.allgather(failure) if error is not None]
        if failures:
            raise failures[0]
        return result  # type: ignore[return-value]

    def from_root(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; return its result, or raise its `UserError`, on every rank."""
        outcome: tuple[T | None, UserError | None] | None = None
        if self.rank == 0:
            try:
                outcome = action(), None
            except UserError as error:
                outcome = None, error
        with self.waiting():
            result, failure = self.mpi.bcast(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def abort(self, text: str, code: int) -> NoReturn:
        """Print `text` to stderr and end the job, all its ranks, with exit code `code`. Local."""
        print(text, file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS)
        self.mpi.Abort(code)
        time.sleep(GRACE)
        os._exit(code)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time that the context lasts as communication, in which this rank may wait for others. Local."""
        started = time.perf_counter()
        with self.waiting():
            yield
        self.seconds += time.perf_counter() - started

    def _time(self, collective: Callable[..., None], *buffers: Any) -> None:
        with self.timed():
            collective(*buffers)


def abort_on_exception(communicator: Communicator) -> None:
    """Make an uncaught exception on any rank end the whole job: traceback on stderr, then MPI_Abort. Local.

    Without it the other ranks would wait for ever in their next collective. Of a `UserError` one line is printed, and
    the exit code is 2, of Ctrl-C too, with 130; where all ranks have it, rank 0 speaks. A program that has an
    `excepthook` of its own keeps it.
    """
    if sys.excepthook is not sys.__excepthook__:
        return

    def report_and_abort(kind: type[BaseException], error: BaseException, trace: Any) -> NoReturn:
        sys.stdout.flush()
        if issubclass(kind, (UserError, KeyboardInterrupt)):
            if communicator.rank > 0:
                time.sleep(1)  # in which rank 0 ends the job, if it has the error too
            if issubclass(kind, KeyboardInterrupt):
                communicator.abort("qnewton-mpi: interrupted", ENDED_BY_CTRL_C)
            communicator.abort(f"qnewton-mpi: {error}", USAGE_ERROR)
        lines = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        text = f"qnewton-mpi: rank {communicator.rank} of {communicator.size} failed:\n{lines}"
        communicator.abort(text, code=1)

    sys.excepthook = report_and_abort
