"""Standard output and error as they may be: closed, full, without a reader, of few characters. Imports no MPI.

What is told on stderr is lost where it cannot be written: a run does not end for it. What is printed on stdout is a
result: where it cannot be written, that is an error.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TextIO

from qnewton_mpi.errors import NoReaderError, UserError

# What stands for the characters that the program prints, where an encoding has none of them; "?" for any other.
PLAIN = {
    **dict(zip("▁▂▃▄▅▆▇█", "_.-~=+*#", strict=True)),
    **{"±": "+-", "·": "*", "×": "x", "…": "...", "–": "-", "≤": "<=", "√": "sqrt ", "∇": "grad ", "Δ": "d", "‖": "|"},
    **{"⁻": "^-", "¹": "1", "²": "^2", "ᵀ": "^T", "ᵗ": "^t"},
    **{
        "α": "alpha",
        "β": "beta",
        "γ": "gamma",
        "ε": "epsilon",
        "η": "eta",
        "κ": "kappa",
        "λ": "lambda",
        "ν": "nu",
        "ς": "s",
        "ρ": "rho",
        "σ": "sigma",
        "χ": "chi",
    },
}


class Raw(io.FileIO):
    """A standard stream's descriptor. What it refuses goes to /dev/null from then on, buffers of libraries as well."""

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            self.failed(error)
            return len(data)

    def failed(self, error: OSError) -> None:
        """Do without the stream."""


class Results(Raw):
    """Standard output."""

    def failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise NoReaderError("nobody reads the output")
        raise UserError(f"the output cannot be written ({error.strerror})")


def settle() -> None:
    """Make standard input, output and error usable whatever they are; once, at the start of a program."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free, which is this one. Left free, the next file would get it: that of the
            # run, into which libraries would then write their errors.
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error("plain", plain)
    sys.stdout = _text(Results(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(Raw(2, "w", closefd=False), sys.stderr)


def plain(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for the characters that a stream cannot encode, as `codecs.register_error` wants it."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def _text(raw: Raw, before: TextIO | None) -> TextIO:
    """Return the text stream of a descriptor, with the encoding that Python chose for it."""
    encoding = before.encoding if before is not None else "utf-8"
    by_lines = raw.isatty() or not isinstance(raw, Results)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "plain", line_buffering=by_lines)  # type: ignore[type-var]
