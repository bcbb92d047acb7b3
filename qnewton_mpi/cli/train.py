"""`qnewton-mpi train`: a run; its options are the settings' fields."""

from __future__ import annotations

import argparse

from qnewton_mpi.cli.arguments import Commands, add_command
from qnewton_mpi.cli.options import OPTIONS, add_options
from qnewton_mpi.config import RunConfig, configured
from qnewton_mpi.parallel.communicator import Communicator

EXAMPLES = (
    "mpiexec -n 4 qnewton-mpi train --data fashion-mnist --epochs 20 --output run.h5",
    "mpiexec -n 4 qnewton-mpi train --method sgd --lr auto --batch 512 --steps 1000",
    "srun qnewton-mpi train run.toml --checkpoint saved --resume --time-limit 3500",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    usage = "qnewton-mpi train [CONFIG.toml] [OPTIONS]"
    says = "train a network on images; run it under mpiexec or srun"
    parser = add_command(commands, "train", says, EXAMPLES, usage)
    parser.add_argument(
        "toml", nargs="?", metavar="CONFIG.toml", help="options as a flat table; those of the command line win"
    )
    add_options(parser)
    parser.set_defaults(process=process, check=check)


def check(command: argparse.Namespace, ranks: int) -> None:
    """Settle the options of the file and of the command line, as `config`."""
    given = {name: value for name, value in vars(command).items() if name in OPTIONS}
    command.config = configured(command.toml, given, ranks)


def process(command: argparse.Namespace, communicator: Communicator) -> None:
    """Train, then tell what came out."""
    from qnewton_mpi.results.rows import table
    from qnewton_mpi.results.run import Run
    from qnewton_mpi.training.interruption import Noted
    from qnewton_mpi.training.loop import train

    config: RunConfig = command.config
    with Noted() as noted:
        path = train(config, communicator, {"command_line": command.line}, halted=lambda: bool(noted.came))
    communicator.from_root(lambda: print(f"{table([Run(path)])}\nwritten to {path}", flush=True))
