"""When a run has to stop early: signals of the batch system, and a limit of time. Ranks agree at step boundaries."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import numpy as np
from mpi4py import MPI

from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.log import LOG

# Kept of the allocation's time for the last step and the checkpoint, seconds.
MARGIN = 60.0


class Interruption:
    """Tells all ranks at the same step that one of them was told to stop. A context manager, which takes the signals.

    A signal sets a flag; a second one ends the process at once. The ranks' flags travel by a non-blocking Allreduce
    during the next step, so that agreeing costs no waiting; a stop is a step late for it.

    Parameters
    ----------
    communicator : Communicator
    signals : str
        Their names without SIG, with commas between them.
    time_limit : float, optional
        Seconds from now; by default until a minute before SLURM ends the job, where its environment says when.
    """

    def __init__(self, communicator: Communicator, signals: str, time_limit: float | None = None) -> None:
        self._communicator = communicator
        self._signals = [signal.Signals[f"SIG{name}"] for name in signals.split(",")]
        left = time_limit if time_limit is not None else seconds_left()
        self._end = time.monotonic() + left if left is not None else float("inf")
        self._flag, self._sent, self._any = (np.zeros(1, "i4") for _ in range(3))
        self._before: dict[int, Any] = {}
        self._request = MPI.REQUEST_NULL

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._take) for number in self._signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._request.Wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Tell whether any rank was to stop when this was last called. Collective."""
        with self._communicator.waiting():
            self._request.Wait()
        stop = bool(self._any[0])
        if time.monotonic() > self._end:
            self._flag[0] = 1
        self._sent[:] = self._flag  # a signal must not change what MPI is sending
        self._request = self._communicator.mpi.Iallreduce(self._sent, self._any, MPI.MAX)
        return stop

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._flag[0]:
            os._exit(128 + number)
        self._flag[0] = 1
        LOG.info("%s: stops after this step", signal.Signals(number).name)


def seconds_left(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds until a minute before SLURM ends the job; None where the environment does not say."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    return max(0.0, float(end) - time.time() - MARGIN) if end.isdecimal() else None
