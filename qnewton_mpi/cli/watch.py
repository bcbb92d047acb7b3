"""`qnewton-mpi watch`: the live curve of a run."""

from __future__ import annotations

import argparse
import contextlib

from qnewton_mpi.cli.arguments import Commands, add_command, file_path
from qnewton_mpi.errors import UserError, printable

LONGEST_PAUSE = 86_400.0  # seconds

EXAMPLES = (
    "qnewton-mpi watch run.h5",
    "qnewton-mpi watch run.h5 --every 10",
    "qnewton-mpi watch run.h5 --once",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "watch", "the live curve of a run, from its file", EXAMPLES)
    parser.add_argument("run", type=file_path, metavar="RUN.h5", help="the file of a run, which may go on")
    parser.add_argument("--every", type=pause, default=2.0, metavar="SECONDS", help="between looks (default 2)")
    parser.add_argument("--once", action="store_true", help="one look")
    parser.set_defaults(process=process, alone=True)


def pause(text: str) -> float:
    """Return the seconds of `--every`.

    Raises
    ------
    UserError
        Where they are not a number that one can wait for.
    """
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= LONGEST_PAUSE:
            return float(text)
    raise UserError(f"--every {printable(text)}: more than 0 seconds, and at most {LONGEST_PAUSE:,.0f}")


def process(command: argparse.Namespace) -> None:
    """Show a run while it goes on."""
    from qnewton_mpi.results.watching import watch

    watch(command.run, command.every, command.once)
