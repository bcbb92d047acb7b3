"""`qnewton-mpi evaluate`: how right a run's model is."""

from __future__ import annotations

import argparse

from qnewton_mpi.cli.arguments import Commands, add_command, file_path
from qnewton_mpi.cli.predict import add_sources
from qnewton_mpi.files.outputs import check_output

EXAMPLES = (
    "qnewton-mpi evaluate run.h5",
    "qnewton-mpi evaluate run.h5 --which tail --output confusion.png",
    "qnewton-mpi evaluate run.h5 --data photos --part train",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "evaluate", "NLL and accuracy of a run's model, and what it confuses", EXAMPLES)
    add_sources(parser)
    parser.add_argument("--output", type=file_path, metavar="FILE.png", help="draw the confusion matrix there")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    parser.set_defaults(process=process, alone=True)


def process(command: argparse.Namespace) -> None:
    """Print the figures, and draw the confusion matrix if asked for."""
    from qnewton_mpi.predictions import draw, predict, text
    from qnewton_mpi.trained import load

    if command.output:
        check_output(command.output, "picture", command.overwrite)
    predictions = predict(load(command.run, command.which), command.data, command.data_dir, command.part)
    if command.output:
        draw(predictions, command.output)
    print(text(predictions), *([f"figure: {command.output}"] if command.output else []), sep="\n", flush=True)
