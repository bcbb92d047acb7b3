"""Names the rank that holds the others up, and ends the job, instead of a job that waits for ever."""

from __future__ import annotations

import threading
import time

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.errors import raised_by_all
from qnewton_mpi.parallel.communicator import COMMUNICATION, PHASES, Communicator


class Watchdog:
    """A thread on each rank that watches the ranks of its node. A context manager. Collective.

    Each rank notes in memory that its node shares when it began its present phase (`Communicator.enter`), and its
    watchdog when it was last alive. A rank that has been in a phase for longer than the limit is stalled if it does not
    wait for others, or if its watchdog is as still as itself: the process is stopped, in a collective perhaps. Ranks
    that all wait, do so for a rank of another node, whose own watchdog names it.

    The ranks leave the context together, watched until the last has come, and free what they share; on an exception
    that is not raised by all of them each leaves by itself.

    Parameters
    ----------
    communicator : Communicator
    limit : float
        Seconds.
    """

    def __init__(self, communicator: Communicator, limit: float) -> None:
        self._communicator, self._limit = communicator, limit
        self._node = communicator.mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self._ranks = self._node.allgather(communicator.rank)
        width = 3 * 8
        self._window = MPI.Win.Allocate_shared(width * (self._node.rank == 0) * self._node.size, 8, comm=self._node)  # type: ignore[arg-type]
        memory, _ = self._window.Shared_query(0)
        # When the phase began, its index in PHASES, and when the watchdog was last alive, of each rank of the node.
        self._notes: NDArray[np.float64] = np.asarray(memory).view(np.float64).reshape(self._node.size, 3)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._communicator.notes = self._notes[self._node.rank, :2]
        self._communicator.enter("loading")
        self._notes[self._node.rank, 2] = time.monotonic()
        self._node.Barrier()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        together = raised_by_all(kind)
        if together:
            with self._communicator.waiting():
                self._node.Barrier()
        self._stop.set()
        self._thread.join()
        self._communicator.notes = None
        self._notes[self._node.rank, [0, 2]] = np.inf  # done: never stalled for those who still watch
        if together:
            self._window.Free()
            self._node.Free()

    def _watch(self) -> None:
        pause = min(1.0, self._limit / 10)
        awake = last = time.monotonic()
        while not self._stop.wait(pause):
            now = time.monotonic()
            if now - last > pause + self._limit / 2:
                awake = now  # this process was stopped, with the whole job perhaps: what it missed counts for nobody
            self._notes[self._node.rank, 2] = last = now
            ages, silences = (now - np.maximum(self._notes[:, column], awake) for column in (0, 2))
            alive = (silences < self._limit) & np.isfinite(silences)
            stalled = (ages > self._limit) & ~((self._notes[:, 1] == PHASES.index(COMMUNICATION)) & alive)
            # All waiting: for another node, which is given time to say it better.
            lost = bool((ages > 2 * self._limit).all())
            if not stalled.any() and not lost:
                continue
            # One speaks: the first that is not stalled, of those alive.
            if self._node.rank == np.lexsort((stalled, ~alive))[0]:
                self._communicator.abort(self._verdict(ages, stalled), code=1)

    def _verdict(self, ages: NDArray[np.float64], stalled: NDArray[np.bool_]) -> str:
        who = [
            f"rank {self._ranks[k]} has been in phase {PHASES[int(self._notes[k, 1])]!r} for {ages[k]:.0f} s"
            for k in np.flatnonzero(stalled)
        ]
        text = "; ".join(who) or f"all ranks of {MPI.Get_processor_name()} wait for a rank of another node"
        return f"qnewton-mpi: stalled: {text}; the job is ended (--stall-timeout)"
