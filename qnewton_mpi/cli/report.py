"""`qnewton-mpi report`: the table and the figure of a study."""

from __future__ import annotations

import argparse

from qnewton_mpi.cli.arguments import Commands, add_command, file_path
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.files.whole import replace_whole, writing

EXAMPLES = (
    "qnewton-mpi report study.h5",
    "qnewton-mpi report studies/peers-mnist-256.h5 --overwrite",
    "qnewton-mpi report study.h5 --overwrite > report.txt",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "report", "the table (.md) and figure (.png) of a study", EXAMPLES)
    parser.add_argument("study", type=file_path, metavar="STUDY.h5", help="the file of a study")
    parser.add_argument("--overwrite", action="store_true", help="replace the report of an earlier state")
    parser.set_defaults(process=process, alone=True)


def process(command: argparse.Namespace) -> None:
    """Write and print the report on a study."""
    from qnewton_mpi.studies.report import draw, markdown, read_results

    path = command.study
    table, picture = path.with_suffix(".md"), path.with_suffix(".png")
    results = read_results(path)
    check_output(table, "table", command.overwrite)
    check_output(picture, "picture", command.overwrite)
    text = markdown(results)
    with writing(table):
        replace_whole(table, text.encode())
    draw(results, picture)
    print(f"{text}\ntable: {table}\nfigure: {picture}", flush=True)
