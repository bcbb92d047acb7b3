"""`qnewton-mpi compare`: a study."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

from qnewton_mpi.cli.arguments import Commands, add_command, at_least_one, file_path
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.studies.plan import read_study

EXAMPLES = (
    "mpiexec -n 2 qnewton-mpi compare study.toml --output study.h5",
    "mpiexec -n 8 qnewton-mpi compare study.toml --output study.h5 --ranks-per-run 4",
    "mpiexec -n 2 qnewton-mpi compare study.toml --output study.h5 --again 'kronecker*'",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "compare", "run a study: many runs, tuned alike; resumable", EXAMPLES)
    parser.add_argument("study", metavar="STUDY.toml", help="rows, rates and seeds (docs/reference/study-keys.md)")
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="STUDY.h5", help="finished runs are kept in STUDY.runs/"
    )
    parser.add_argument(
        "--ranks-per-run",
        type=at_least_one("--ranks-per-run"),
        default=1,
        metavar="RANKS",
        help="the ranks of each run (default 1)",
    )
    parser.add_argument(
        "--again", default="", metavar="PATTERN", help="run the rows of such names once more, as 'kronecker*'"
    )
    parser.set_defaults(process=process, check=check)


def check(command: argparse.Namespace, ranks: int) -> None:
    """Read the study, as `plan`."""
    if ranks % command.ranks_per_run:
        raise UserError(f"--ranks-per-run {command.ranks_per_run} does not divide the {ranks} rank(s)")
    command.plan = read_study(command.study, command.ranks_per_run)
    names = [row.name for row in command.plan.rows]
    if command.again and not fnmatch.filter(names, command.again):
        raise UserError(f"--again {printable(command.again)}: no row is called so; there are {', '.join(names)}")


def process(command: argparse.Namespace, communicator: Communicator) -> None:
    """Run a study."""
    from qnewton_mpi.studies.compare import compare

    compare(command.plan, Path(command.output), command.ranks_per_run, communicator, command.again)
    line = f"written to {command.output}; next: qnewton-mpi report {command.output}"
    communicator.from_root(lambda: print(line, flush=True))
