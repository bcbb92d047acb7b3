"""`qnewton-mpi predict`: what a run's model says of each image."""

from __future__ import annotations

import argparse

from qnewton_mpi.cli.arguments import Commands, Parser, add_command, file_path
from qnewton_mpi.files.outputs import check_output

EXAMPLES = (
    "qnewton-mpi predict run.h5 --output predictions.csv",
    "qnewton-mpi predict run.h5 --data photos --output predictions.h5",
    "qnewton-mpi predict saved --which ema --part train --output predictions.csv",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "predict", "the classes that a run's model gives to images", EXAMPLES)
    add_sources(parser)
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FILE.csv|FILE.h5", help="log-probabilities of all classes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier predictions")
    parser.set_defaults(process=process, alone=True)


def add_sources(parser: Parser) -> None:
    """Add the arguments that say whose model is given which images."""
    parser.add_argument("run", type=file_path, metavar="RUN.h5|FOLDER", help="a run's file, or its checkpoints")
    parser.add_argument("--data", metavar="NAME|PATH", help="as for train (default: the run's own)")
    parser.add_argument("--data-dir", metavar="FOLDER", help="as for train")
    parser.add_argument("--part", metavar="NAME", help="of the data: train, test, … (default: the one held out)")
    parser.add_argument(
        "--which",
        default="last",
        choices=("last", "ema", "tail", "best"),
        help="the last iterate, their exponential mean, the mean of the last quarter, or that of the lowest validation "
        "NLL (default %(default)s)",
    )


def process(command: argparse.Namespace) -> None:
    """Write the predictions."""
    from qnewton_mpi.predictions import is_table, predict, text, write
    from qnewton_mpi.trained import load

    kind = "table of predictions" if is_table(command.output) else "predictions"
    check_output(command.output, kind, command.overwrite)
    predictions = predict(load(command.run, command.which), command.data, command.data_dir, command.part)
    write(predictions, command.output)
    print(f"{text(predictions)}\nwritten to {command.output}", flush=True)
