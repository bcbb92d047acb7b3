"""`qnewton-mpi bench`: what a step costs."""

from __future__ import annotations

import argparse

from qnewton_mpi.cli.arguments import Commands, add_command, at_least_one, file_path, number
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.parallel.communicator import Communicator

EXAMPLES = (
    "mpiexec -n 4 qnewton-mpi bench",
    "mpiexec -n 2 qnewton-mpi bench --quick",
    "srun qnewton-mpi bench --sizes 1048576,16777216 --replicas 32 --output bench.h5",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "bench", "what a step costs beside the gradients, against one Allreduce", EXAMPLES)
    parser.add_argument(
        "--sizes", type=sizes, default="16384,1048576", metavar="N,N,…", help="parameters (default %(default)s)"
    )
    parser.add_argument(
        "--replicas", type=at_least_one("--replicas"), metavar="M", help="default: one a rank, at least 2"
    )
    parser.add_argument(
        "--rounds", type=at_least_one("--rounds"), default=5, metavar="ROUNDS", help="of timing, in turn (default 5)"
    )
    parser.add_argument("--quick", action="store_true", help="one size, one round: to see that it works")
    parser.add_argument("--output", type=file_path, metavar="BENCH.h5", help="write the tables there too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.set_defaults(process=process, check=check)


def sizes(text: str) -> list[int]:
    """Return the numbers of a list with commas.

    Raises
    ------
    UserError
        Where one is not a positive whole number.
    """
    numbers = [number(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise UserError(
            f"--sizes {printable(text)}: positive whole numbers of at most 12 digits, with commas between them"
        )
    return numbers


def check(command: argparse.Namespace, ranks: int) -> None:
    """See that there is a replica for each rank, and that the file can be written."""
    if command.quick:
        command.sizes, command.rounds = command.sizes[:1], 1
    if command.replicas is not None and command.replicas < max(2, ranks):
        raise UserError(f"--replicas {command.replicas}: at least 2, and one a rank")
    if command.output:
        check_output(command.output, "benchmark", command.overwrite)


def process(command: argparse.Namespace, communicator: Communicator) -> None:
    """Time steps, print the tables, write them if asked for."""
    from qnewton_mpi.bench.sections import bench
    from qnewton_mpi.bench.tables import write

    seconds = 0.02 if command.quick else 0.5
    tables = bench(command.sizes, command.replicas, command.rounds, communicator, seconds)

    def end() -> None:
        if command.output:
            write(tables, command.output)
        print("\n".join(table.text() for table in tables), flush=True)
        if command.output:
            print(f"written to {command.output}", flush=True)

    communicator.from_root(end)
