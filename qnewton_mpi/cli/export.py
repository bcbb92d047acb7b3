"""`qnewton-mpi export`: runs as a table for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from qnewton_mpi.cli.arguments import Commands, add_command, file_path
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.files.whole import replace_whole, writing

TERMINAL = Path("-")

EXAMPLES = (
    "qnewton-mpi export runs/*.h5 --output runs.csv",
    "qnewton-mpi export run.h5 --what steps --output steps.csv --overwrite",
    "qnewton-mpi export study.h5 --output - | head",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "export", "runs as one table in CSV, a line an evaluation or a step", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=file_path, metavar="RUN.h5|STUDY.h5", help="files of runs, of studies")
    parser.add_argument(
        "--what", choices=("epochs", "steps"), default="epochs", help="a line an evaluation, or a step (default epochs)"
    )
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FILE.csv", help="the table; - is standard output"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier table")
    parser.set_defaults(process=process, alone=True)


def process(command: argparse.Namespace) -> None:
    """Write the table."""
    from qnewton_mpi.studies.export import labelled, text_of

    if command.output != TERMINAL:
        check_output(command.output, "table of runs", command.overwrite)
    text = text_of(labelled(command.runs), command.what)
    if command.output == TERMINAL:
        print(text, end="", flush=True)
        return
    with writing(command.output):
        replace_whole(command.output, text.encode())
    print(f"{text.count(chr(10)) - 1:,} lines written to {command.output}", flush=True)
