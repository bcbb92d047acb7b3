"""A duplicated MPI communicator: collectives on host buffers, agreement on errors and settings."""

from __future__ import annotations

import contextlib
import math
import numbers
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.errors import UserError
from qnewton_mpi.parallel.ending import abort, abort_on_exception
from qnewton_mpi.parallel.environment import check_launcher
from qnewton_mpi.parallel.library import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator", "abort", "abort_on_exception", "check_timeout", "load_mpi"]

T = TypeVar("T")
HostArray = NDArray[Any]
COMMUNICATION = "communication"
PHASES = (
    "loading",
    "restore",
    "output",
    "algebra",
    "gradient",
    "trial",
    COMMUNICATION,
    "evaluation",
    "checkpoint",
    "callback",
)


def check_timeout(seconds: float | None) -> None:
    """Raise `UserError` for what is no number of seconds, nor None. Local."""
    number = isinstance(seconds, numbers.Real) and not isinstance(seconds, bool)
    if seconds is not None and not (number and seconds > 0):
        raise UserError(f"stall_timeout={seconds!r:.60}: must be more than 0 seconds, or None")


class Communicator:
    """Collectives on contiguous NumPy buffers over a private duplicate of an MPI communicator.

    Upper-case (buffer) calls only, but for `together`, `agree` and `from_root`, which serve set-up and errors. Every
    method is collective unless it says otherwise. In `together`, `agree`, `from_root` and `meet` a rank may wait for
    another's program: the job is ended where that has left (`farewell`), or does not come in time.

    Parameters
    ----------
    parent : MPI.Comm, optional
        The world by default. All that is built on it shares one duplicate, freed with the last of them and with it.
    stall_timeout : float, optional
        Seconds that a rank may wait for another's program; for ever by default.

    Raises
    ------
    UserError
        On every rank, where a launcher that is not the MPI library's has started several worlds of one rank each.

    Attributes
    ----------
    rank, size : int
    node_rank : int
        Position among the ranks that share this node's memory.
    collectives : Counter
        How many of each kind this rank has done on buffers.
    seconds : float
        Time spent in them, waiting included.
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

    def __init__(self, parent: MPI.Comm | None = None, stall_timeout: float | None = None) -> None:
        mpi = load_mpi()
        if parent != mpi.COMM_SELF:  # which is alone on purpose
            check_launcher(mpi.COMM_WORLD.Get_size())
        check_timeout(stall_timeout)
        from qnewton_mpi.parallel.farewell import Gates

        self._gates = Gates(mpi.COMM_WORLD if parent is None else parent, stall_timeout)
        duplicate = self._gates.duplicate
        self.mpi, self.node_rank = duplicate.mpi, duplicate.node_rank
        self.rank, self.size = duplicate.rank, duplicate.size
        self.collectives: Counter[str] = Counter()
        self.seconds = 0.0
        self.notes: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, given: Communicator | MPI.Comm | None, stall_timeout: float | None = None) -> Communicator:
        """Return what a program means by a communicator: one of these, MPI's, or None for the world."""
        if isinstance(given, Communicator):
            check_timeout(stall_timeout)
            if stall_timeout is not None:
                given._gates.stall_timeout = stall_timeout
            return given
        mpi = load_mpi()
        if given is not None and (not isinstance(given, mpi.Intracomm) or given == mpi.COMM_NULL):
            raise UserError(f"communicator={given!r}: must be a Communicator, an MPI.Intracomm, or None for all ranks")
        return cls(given, stall_timeout)

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
        self._do("Allreduce", array, total)
        return total

    def reduce_scatter(self, array: HostArray, counts: Sequence[int], share: HostArray) -> HostArray:
        """Fill `share` with this rank's part, `counts` words a rank, of the sum of the ranks' arrays; return it."""
        if counts[0] == len(array):  # all of it to rank 0
            self._do("Reduce", array, share if self.rank == 0 else None)
        else:
            self._do("Reduce_scatter", array, share, counts)
        return share

    def allgather(self, rows: HostArray, counts: Sequence[int], everyone: HostArray | None = None) -> HostArray:
        """Return the ranks' rows, stacked in rank order, `counts` of each rank; in `everyone`, if given."""
        if everyone is None:
            everyone = np.empty((sum(counts), *rows.shape[1:]), rows.dtype)
        if counts[0] == len(everyone):  # all of it from rank 0
            if self.rank == 0:
                everyone[...] = rows
            self._do("Bcast", everyone)
        else:
            words = math.prod(everyone.shape[1:])
            self._do("Allgatherv", rows, [everyone, [count * words for count in counts]])
        return everyone

    def alltoall(self, send: HostArray, sent: Sequence[int], receive: HostArray, received: Sequence[int]) -> HostArray:
        """Send each rank its part of `send`, `sent` words a rank; return `receive`, filled with `received` a rank."""
        self._do("Alltoallv", [send, sent], [receive, received])
        return receive

    def broadcast(self, array: HostArray) -> None:
        """Fill the array with that of rank 0."""
        self._do("Bcast", array)

    def meet(self, numbers: HostArray, counts: Sequence[int], purpose: str) -> HostArray:
        """Return the numbers of all ranks one after the other, `counts` of each, from where a program may be late.

        Parameters
        ----------
        numbers : (counts[rank],)
        counts : sequence of int
        purpose : str
            For those that wait in vain, as "step 3".
        """
        if self.size == 1:
            return numbers
        everyone = np.empty(sum(counts), numbers.dtype)
        with self.timed("Allgatherv"):
            self._gates.enter(lambda: self.mpi.Iallgatherv(numbers, [everyone, counts]), purpose)
        return everyone

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
        failures = [(rank, error) for rank, error in enumerate(self._of_all(failure)) if error is not None]
        if failures:
            rank, first = failures[0]
            raise first if rank == 0 or type(first) is not UserError else UserError(f"rank {rank}: {first}")
        return result  # type: ignore[return-value]

    def agree(self, things: Mapping[str, Any], advice: str) -> None:
        """Raise `UserError` on every rank, with the first of the things that is not the same on all, and advice.

        Of bytes, as digests, only the ranks are told.
        """
        everyone = self._of_all(dict(things))
        for name, first in everyone[0].items():
            others = [rank for rank, theirs in enumerate(everyone) if theirs.get(name) != first]
            if others and isinstance(first, bytes):
                ranks = ", ".join(map(str, others))
                raise UserError(f"the {name} of rank(s) {ranks} differ from those of rank 0: {advice}")
            if others:
                other = others[0]
                raise UserError(
                    f"rank {other} has {name}={everyone[other].get(name)}, rank 0 has {name}={first}: {advice}"
                )

    def from_root(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; return its result, or raise its `UserError`, on every rank.

        Arrays in the result cross as buffers, of any size.
        """
        from mpi4py.util import pkl5

        outcome: tuple[T | None, UserError | None] | None = None
        if self.rank == 0:
            try:
                outcome = action(), None
            except UserError as error:
                outcome = None, error
        with self.waiting():
            self._gates.agree()
            result, failure = pkl5.Intracomm(self.mpi).bcast(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def halfway(self, whether: bool) -> None:
        """Note whether the others cannot go on without this rank, from the last gate on. Local."""
        self._gates.place.halfway = whether and self.size > 1

    def abort(self, text: str, code: int) -> NoReturn:
        """Print `text` to stderr and end the job, all its ranks, with exit code `code`. Local."""
        abort(text, code)

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count a collective of a kind, and the time that the context lasts, in which this rank may wait. Local."""
        self.collectives[kind] += 1
        started = time.perf_counter()
        with self.waiting():
            yield
        self.seconds += time.perf_counter() - started

    def _do(self, kind: str, *buffers: Any) -> None:
        with self.timed(kind):
            getattr(self.mpi, kind)(*buffers)

    def _of_all(self, mine: T) -> list[T]:
        """Return what each rank has, pickled."""
        with self.waiting():
            self._gates.agree()
            return self.mpi.allgather(mine)
