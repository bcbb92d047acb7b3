"""`qnewton-mpi plot`: a picture and a table of runs."""

from __future__ import annotations

import argparse

from qnewton_mpi.cli.arguments import Commands, add_command, file_path
from qnewton_mpi.files.outputs import check_output

EXAMPLES = (
    "qnewton-mpi plot run.h5",
    "qnewton-mpi plot runs/*.h5 --output nll.png",
    "qnewton-mpi plot a.h5 b.h5 --output nll.pdf --overwrite",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "plot", "draw NLL against epochs and print a table", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=file_path, metavar="RUN.h5", help="files of runs")
    parser.add_argument(
        "--output", type=file_path, metavar="FILE.png", help="default: beside the first run, with its name and .png"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    parser.set_defaults(process=process, alone=True)


def process(command: argparse.Namespace) -> None:
    """Draw runs and print their table."""
    from qnewton_mpi.results.plotting import plot_runs
    from qnewton_mpi.results.rows import distinct, table
    from qnewton_mpi.results.run import Run

    target = command.output or command.runs[0].with_suffix(".png")
    check_output(target, "picture", command.overwrite)
    runs = distinct(Run(path) for path in command.runs)
    plot_runs(runs, target)
    print(f"{table(runs)}\nfigure: {target}", flush=True)
