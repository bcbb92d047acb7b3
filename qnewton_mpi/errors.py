"""Errors that a user can mend: one line that says what is wrong and what to do."""

from __future__ import annotations

USAGE_ERROR = 2
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
ENDED_BY_CTRL_C = 130  # as shells have it: 128 + SIGINT


class UserError(Exception):
    """A mistake in options, data or set-up.

    The message is one line. It must be raised on every rank of a communicator or on none (see
    `qnewton_mpi.parallel.communicator.Communicator.together`): the program then prints it once and ends with code 2.
    """


class NonFiniteGradientError(UserError):
    """The loss or gradient of a replica is NaN or infinite. Raised on every rank, before any state has changed.

    Parameters
    ----------
    step : int
        Index of the step, from 1.
    replica : int
        Index of the first offending replica, from 0.
    loss, squared_norm : float
        The replica's loss and the squared 2-norm of its gradient.

    Attributes
    ----------
    step, replica : int
    """

    def __init__(self, step: int, replica: int, loss: float, squared_norm: float) -> None:
        super().__init__(
            f"step {step}: replica {replica} has loss {loss:g} and squared gradient norm {squared_norm:g}; "
            "use a smaller --lr, or look for bad values in the data"
        )
        self.step = step
        self.replica = replica


class InterruptedRunError(Exception):
    """The run was told to stop and did, at the same step on all ranks. The program ends with code 75."""


def raised_by_all(kind: type[BaseException] | None) -> bool:
    """Tell whether all ranks leave a context so, and may meet there: without an exception, or with one that all raise."""
    return kind is None or issubclass(kind, (UserError, InterruptedRunError))
