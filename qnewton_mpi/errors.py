"""Errors that a user can mend: one line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

USAGE_ERROR = 2
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
LONGEST_WORD, ALIKE = 100, 0.7  # characters that are compared with known words, and the share that has to agree
ENDED_BY_CTRL_C = 130  # as shells have it: 128 + SIGINT


class UserError(Exception):
    """A mistake in options, data or set-up.

    The message is one line. It must be raised on every rank of a communicator or on none (see
    `qnewton_mpi.parallel.communicator.Communicator.together`): the program then prints it once and ends with code 2.
    """


class TooLateError(UserError):
    """The job is about to end, before the run has done a step: it would go back to the queue for ever."""


class NoReaderError(UserError):
    """Nobody reads what is printed any more, as of `| head`. The program ends without a word, with code 0."""


class DivergedError(UserError):
    """The run got worse instead of better. Raised on every rank."""


class MissingPackageError(UserError, ImportError):
    """A package of an extra is not installed."""


class NonFiniteGradientError(DivergedError):
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
        self._arguments = step, replica, loss, squared_norm

    def __reduce__(self) -> tuple[type[NonFiniteGradientError], tuple[int, int, float, float]]:
        """Be pickled, as between ranks, by what it was made of."""
        return type(self), self._arguments


class InterruptedRunError(Exception):
    """The run was told to stop and did, at the same step on all ranks. The program ends with code 75."""


def printable(text: Path | str, most: int = 200) -> str:
    """Return a path or words of others as one line of a message.

    What no terminal shows becomes escapes; beyond `most` characters the middle is left out.
    """
    text = "".join(c if c.isprintable() else _escape(c) for c in str(text))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 3) :]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about a word that is none of the known ones: the one that it resembles, if any.

    Examples
    --------
    >>> did_you_mean("--epoch", ["--epochs", "--steps"]), did_you_mean("--fish", ["--epochs", "--steps"])
    ('; did you mean --epochs?', '')
    """
    if len(word) > LONGEST_WORD:
        return ""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=ALIKE)
    return f"; did you mean {near[0]}?" if near else ""


def _escape(character: str) -> str:
    """Return the escape of a character; of a byte that is not of UTF-8, as Python has it in paths, that byte's."""
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


def raised_by_all(kind: type[BaseException] | None) -> bool:
    """Tell whether all ranks leave a context alike, and may meet there: without an exception, or with one of all."""
    return kind is None or issubclass(kind, (UserError, InterruptedRunError))
