"""Names the rank that holds the others up, and ends the job, instead of a job that waits for ever."""

from __future__ import annotations

import os
import sys
import threading
import time

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.parallel.communicator import COMMUNICATION, PHASES, Communicator

GRACE = 5.0  # seconds that MPI_Abort is given before the process ends itself


class Watchdog:
    """A thread on each rank that watches the ranks of its node. A context manager. Collective.

    Each rank notes in memory that its node shares when it began its present phase (`Communicator.enter`). A rank that
    has been in a phase for longer than the limit is stalled if it does not wait for others; ranks that all wait, do so
    for a rank of another node, whose own watchdog names it.

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
        width = 2 * 8
        self._window = MPI.Win.Allocate_shared(width * (self._node.rank == 0) * self._node.size, 8, comm=self._node)  # type: ignore[arg-type]
        memory, _ = self._window.Shared_query(0)
        # When the phase began, and its index in PHASES, of each rank of the node.
        self._notes: NDArray[np.float64] = np.asarray(memory).view(np.float64).reshape(self._node.size, 2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._communicator.notes = self._notes[self._node.rank]
        self._communicator.enter("algebra")
        self._node.Barrier()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._communicator.notes = None

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit / 10)):
            now = time.monotonic()
            ages, waits = now - self._notes[:, 0], self._notes[:, 1] == PHASES.index(COMMUNICATION)
            stalled = (ages > self._limit) & ~waits
            # All waiting: for another node, which is given time to say it better.
            lost = bool((ages > 2 * self._limit).all())
            if not stalled.any() and not lost:
                continue
            speakers = np.flatnonzero(~stalled) if not stalled.all() else np.arange(len(ages))
            if self._node.rank == speakers[0]:
                self._tell(ages, stalled)
                self._communicator.mpi.Abort(1)
                time.sleep(GRACE)
                os._exit(1)
            return

    def _tell(self, ages: NDArray[np.float64], stalled: NDArray[np.bool_]) -> None:
        who = [
            f"rank {self._ranks[k]} has been in phase {PHASES[int(self._notes[k, 1])]!r} for {ages[k]:.0f} s"
            for k in np.flatnonzero(stalled)
        ]
        text = "; ".join(who) or f"all ranks of {MPI.Get_processor_name()} wait for a rank of another node"
        print(f"qnewton-mpi: stalled: {text}; the job is ended (--stall-timeout)", file=sys.stderr, flush=True)
