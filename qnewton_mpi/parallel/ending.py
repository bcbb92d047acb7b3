"""How one rank ends the job, all its ranks: on purpose, or by an exception that no one catches."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any, NoReturn, Protocol

from qnewton_mpi.errors import ENDED_BY_CTRL_C, USAGE_ERROR, UserError
from qnewton_mpi.parallel.library import load_mpi

GRACE = 5.0  # seconds that MPI_Abort is given before the process ends itself
LAST_WORDS = 0.3  # seconds from an error's text to MPI_Abort: launchers drop what they have not read by then


class Ranks(Protocol):
    """What knows which of how many ranks this one is: a `Communicator`, or one of MPI's."""

    @property
    def rank(self) -> int:
        """The number of this one."""

    @property
    def size(self) -> int:
        """How many there are."""


def abort(text: str, code: int) -> NoReturn:
    """Print `text` to stderr and end the job, all its ranks, with exit code `code`. Local."""
    print(text, file=sys.stderr, flush=True)
    time.sleep(LAST_WORDS)
    load_mpi().COMM_WORLD.Abort(code)
    time.sleep(GRACE)
    os._exit(code)


def abort_on_exception(communicator: Ranks) -> None:
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
                abort("qnewton-mpi: interrupted", ENDED_BY_CTRL_C)
            whose = f"rank {communicator.rank}: " if communicator.rank > 0 else ""
            abort(f"qnewton-mpi: {whose}{error}", USAGE_ERROR)
        lines = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        abort(f"qnewton-mpi: rank {communicator.rank} of {communicator.size} failed:\n{lines}", code=1)

    sys.excepthook = report_and_abort
