"""The command line: parsed without MPI, checked once, on rank 0, and the outcome broadcast.

Each command is a module with `add(commands)`, which makes its parser and tells by its defaults what is to be done:

process   called with the command and the communicator; of one that is `alone`, with the command
check     called with the command and the number of ranks: to read what its files say, and whether it fits. Local
alone     what only reads files needs no MPI (on a login node there may be none): the first task does it
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Sequence

from qnewton_mpi import __version__
from qnewton_mpi.cli import (
    bench,
    compare,
    data,
    evaluate,
    export,
    info,
    plot,
    predict,
    report,
    slurm,
    spectrum,
    train,
    watch,
)
from qnewton_mpi.cli.arguments import Parser
from qnewton_mpi.errors import (
    ENDED_BY_CTRL_C,
    INTERRUPTED,
    USAGE_ERROR,
    InterruptedRunError,
    NoReaderError,
    UserError,
    printable,
)
from qnewton_mpi.files.whole import reason
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.ending import abort_on_exception
from qnewton_mpi.parallel.environment import check_descriptors, launched_tasks

COMMANDS = (train, plot, watch, export, predict, evaluate, data, compare, report, bench, spectrum, info, slurm)
FIRST_STEPS = """\
examples:
  mpiexec -n 4 qnewton-mpi train --output run.h5
  qnewton-mpi plot run.h5
  qnewton-mpi train --help"""
LONGEST_LINE = 1000  # characters of an error, whatever was given


def run(arguments: Sequence[str]) -> int:
    """Run a command on every rank of the world, or without MPI on the first task, and return the exit code."""
    first = launched_tasks()[1] == 0  # without MPI the launcher alone knows
    communicator = None
    try:
        check_descriptors()
        command = parse(arguments, first)
        if command is None:
            return 0
        if command.alone:
            if first:
                command.process(command)
            return 0
        communicator = Communicator()
        abort_on_exception(communicator)
        # One-rank jobs of a mismatched launcher are all rank 0: the launcher knows which of them is the first.
        first = communicator.rank == 0 and (communicator.size > 1 or first)
        checked = communicator.from_root(lambda: check(command, communicator.size))
        checked.process(checked, communicator)
    except NoReaderError:  # `qnewton-mpi plot … | head`
        return 0
    except UserError as error:
        if first:
            tell(f"error: {error}")
        return USAGE_ERROR
    except MemoryError as error:
        text = f"error: not enough memory ({reason(error)}): a smaller problem may fit, or more ranks"
        if communicator is not None and communicator.size > 1:  # others may wait for this rank: `abort_on_exception`
            raise UserError(text) from error
        tell(text)
        return USAGE_ERROR
    except InterruptedRunError as stopped:
        if first:
            tell(str(stopped))
        return INTERRUPTED
    except KeyboardInterrupt:
        if communicator is not None and communicator.size > 1:  # the others may not have been told, and wait
            raise
        if first:
            tell("interrupted")
        return ENDED_BY_CTRL_C
    return 0


def tell(text: str) -> None:
    """Print a line to stderr, one line whatever names and values are in it."""
    print(f"qnewton-mpi: {printable(text, LONGEST_LINE)}", file=sys.stderr, flush=True)


def build_parser() -> Parser:
    """Return the parser of the command line. Local."""
    says = "Data-parallel quasi-Newton training over MPI."
    parser = Parser(prog="qnewton-mpi", description=says, epilog=FIRST_STEPS)
    parser.add_argument("--version", action="version", version=f"qnewton-mpi {__version__}")
    parser.set_defaults(check=None, alone=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def parse(arguments: Sequence[str], first: bool) -> argparse.Namespace | None:
    """Return the command; None when help was asked for, which the `first` task prints. Local, without MPI."""
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
            command = build_parser().parse_args(arguments)
            command.line = shlex.join(["qnewton-mpi", *arguments])
            return command
    except SystemExit:  # --help and --version have printed what was asked for
        if first:
            print(end="", flush=True)
        return None


def check(command: argparse.Namespace, ranks: int) -> argparse.Namespace:
    """Return a command with all that its files say, fit for a number of ranks. Local."""
    if command.check is not None:
        command.check(command, ranks)
    return command
