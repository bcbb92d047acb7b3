"""When a run has to stop early: signals of terminals and batch systems, limits of time. Ranks agree between steps."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from qnewton_mpi.errors import INTERRUPTED, USAGE_ERROR, InterruptedRunError, TooLateError, UserError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.ending import GRACE
from qnewton_mpi.parallel.environment import HELD
from qnewton_mpi.parallel.log import LOG

MARGIN = 60.0  # kept of the allocation's time for the last step and the checkpoint, seconds
NOTICE = 600.0  # a batch system that tells a job of its end does so within these last seconds of it
# Seconds after the first signal in which more of them are the same word: launchers and batch systems tell each task and
# the script, which passes it on, and a terminal tells the launcher and its ranks.
ECHO = 1.0
END_TIME = "SLURM_JOB_END_TIME"  # seconds since 1970
LATEST = 1e11  # of them: what is more is in other units
TIME_LIMIT, SLURM_LIMIT, HALTED = 1000, 1001, 1002  # causes of a stop beside the numbers of signals


class Interruption:
    """Tells all ranks at the same step that one of them was told to stop. A context manager, which takes the signals.

    The first signal is noted, and so is a limit of time that is over; a signal that comes more than a second after the
    first ends the process at once. A thread takes them, so that they count while the main thread waits in MPI. The
    ranks' notes travel with the losses of the next step (`Piggyback`), so that agreeing costs no collective; a stop is
    a step late for it.

    Before the first step there is nothing to save: `begin` ends the run, or the thread does where the ranks do not get
    there within seconds.

    Parameters
    ----------
    communicator : Communicator
        Making one is collective.
    signals : str
        Their names without SIG, with commas between them.
    time_limit : float, optional
        Seconds from now; by default until a minute before SLURM ends the job, where rank 0's environment says when.
    halted : callable, optional
        Asked on each rank whether there is another reason to stop, also from step to step. Local.
    """

    def __init__(
        self,
        communicator: Communicator,
        signals: str,
        time_limit: float | None = None,
        halted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._communicator, self._halted = communicator, halted
        self._signals = [signal.Signals[f"SIG{name}"] for name in signals.split(",")]
        now = time.monotonic()
        self._slurm = now + communicator.from_root(seconds_left)
        self._limit, self._end = SLURM_LIMIT, self._slurm - MARGIN
        if time_limit is not None:
            self._limit, self._end = TIME_LIMIT, now + time_limit
        self._told = 0
        self._begun = False
        self._noted = self._any = 0  # why this rank was to stop after the last step; why one was, as heard since

    def __enter__(self) -> Interruption:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # The number is written there at once; Python's own handlers wait for the main thread to come out of MPI.
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # A shell has what it starts in the background ignore Ctrl-C, which is meant for another program.
        ignored = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else set()
        self._signals = [number for number in self._signals if number not in ignored]
        self._before: dict[int, Any] = {number: signal.signal(number, _nothing) for number in self._signals}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)  # what came while the program was loaded counts from here on
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # which ends the thread
        self._thread.join()
        os.close(self._reader)

    def check(self) -> None:
        """End a run that was told to stop before its first step. Collective.

        Raises
        ------
        InterruptedRunError
            On every rank, where one had a signal.
        TooLateError
            On every rank, where the SLURM job is about to end: with a limit so short that it comes to no step, it would
            go back to the queue for ever.
        """
        with self._communicator.waiting():
            outcome = _before_any_step(self._communicator.mpi.allreduce(self._cause(), MPI.MAX), self._left())
        if outcome is not None:
            raise outcome

    def begin(self) -> None:
        """`check` for the last time: from here on, what is told stops the run after a step. Collective."""
        self.check()
        self._begun = True

    def sent(self) -> NDArray[np.int64]:
        """Return why this rank was to stop after the last step. Local."""
        return np.array([self._noted])

    def received(self, words: NDArray[np.int64]) -> None:
        """Take in why the others were. Local."""
        self._any = int(words.max())

    def agreed(self) -> str:
        """Return why any rank was to stop after the step before this one; nothing where none was. Local.

        All ranks have the same. After a step without losses, which is passed over, there is nothing new.
        """
        self._noted = self._cause()
        return _name(self._any, self._left()) if self._any else ""

    def _cause(self) -> int:
        return self._told or self._limit * (time.monotonic() > self._end) or HALTED * self._halted()

    def _left(self) -> float:
        return self._slurm - time.monotonic()

    def _listen(self) -> None:
        """Take signals until the pipe is closed; runs in a thread."""
        first = math.inf
        while True:
            leaving = self._told and not self._begun
            if not select.select([self._reader], [], [], GRACE if leaving else None)[0]:
                if not self._begun:
                    self._leave()
                continue
            word = os.read(self._reader, 1)
            if not word:
                return
            number = word[0]
            if number not in self._signals:
                continue
            if not self._told:
                first, self._told = time.monotonic(), number
                when = "after this step" if self._begun else "before the first step"
                LOG.info("%s: stops %s", _name(number), when)
            elif time.monotonic() - first > ECHO:
                os._exit(128 + number)

    def _leave(self) -> None:
        """End the job, which does not come to where its ranks agree."""
        outcome = _before_any_step(self._told, self._left())
        if self._communicator.rank > 0:
            time.sleep(1)  # in which rank 0 ends the job, if it was told too
        self._communicator.abort(
            f"qnewton-mpi: {outcome}", USAGE_ERROR if isinstance(outcome, UserError) else INTERRUPTED
        )


class Noted:
    """Notes signals that come where no run takes them: between runs, and from the end of the last one on.

    A context manager, within which `Interruption` may come and go. Where it is left because a run was stopped, the
    signals stay noted and without effect: the program is about to end, and they are the same word, said to it again. A
    second one that comes more than a second after the first ends the process at once, as in a run.

    Attributes
    ----------
    came : int
        The number of the first; 0 before.
    """

    def __init__(self) -> None:
        self.came = 0
        self._first = math.inf

    def __enter__(self) -> Noted:
        numbers = [number for number in (*HELD, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, InterruptedRunError):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if not self.came:
            self.came, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > ECHO:
            os._exit(128 + number)


def seconds_left(environ: Mapping[str, str] = os.environ) -> float:
    """Return the seconds until SLURM ends the job, below 0 where they are over; infinite where nothing says so."""
    text = environ.get(END_TIME)
    if text is None:
        return math.inf
    try:
        end = float(text)
    except ValueError:
        end = math.nan
    if not 0 <= end < LATEST:
        LOG.warning("%s=%s is no time in seconds: no limit is taken from it", END_TIME, ascii(text)[:80])
        return math.inf
    return end - time.time()


def _name(cause: int, left: float = math.inf) -> str:
    """Say what stops a run."""
    names = {TIME_LIMIT: "--time-limit", SLURM_LIMIT: f"{END_TIME} leaves {left:.0f} s", HALTED: "others were stopped"}
    return names[cause] if cause in names else signal.Signals(cause).name


def _before_any_step(cause: int, left: float) -> TooLateError | InterruptedRunError | None:
    """Return how a run ends that has a cause to stop and no step done, `left` seconds before SLURM ends the job."""
    if cause in (0, TIME_LIMIT):  # which lets one step be done: so a run that is resumed gets on
        return None
    if cause == SLURM_LIMIT or (cause not in (signal.SIGINT, HALTED) and left < NOTICE):
        told = "" if cause == SLURM_LIMIT else f"{_name(cause)}, and "
        return TooLateError(
            f"{told}{END_TIME} leaves {left:.0f} s before a step was done, {MARGIN:.0f} s being kept for a checkpoint: "
            "give the job more time, or say --time-limit SECONDS"
        )
    return InterruptedRunError(f"stopped before the first step, nothing is lost: start it again ({_name(cause)})")


def _nothing(*_: object) -> None:
    """Stand for the handler of a signal that `Interruption` reads from its pipe."""
