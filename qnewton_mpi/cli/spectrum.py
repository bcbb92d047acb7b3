"""`qnewton-mpi spectrum`: eigenvalues of the Hessian."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from qnewton_mpi.cli.arguments import Commands, add_command, at_least_one, file_path
from qnewton_mpi.errors import UserError
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.words import duration
from qnewton_mpi.training.progress import LINE_SECONDS

EXAMPLES = (
    "mpiexec -n 4 qnewton-mpi spectrum run.h5",
    "mpiexec -n 4 qnewton-mpi spectrum run.h5 --density --layers",
    "mpiexec -n 4 qnewton-mpi spectrum saved --top 20 --samples 10000 --output saved.spectrum.h5",
)


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "spectrum", "eigenvalues of the Hessian at a run's parameters", EXAMPLES)
    parser.add_argument("run", metavar="RUN.h5|FOLDER", help="a run's file, or a folder of checkpoints")
    parser.add_argument(
        "--top", type=at_least_one("--top"), default=8, metavar="PAIRS", help="pairs of largest |λ| (default 8)"
    )
    parser.add_argument(
        "--samples",
        type=at_least_one("--samples"),
        metavar="SAMPLES",
        help="the first N training samples (default: all)",
    )
    parser.add_argument("--layers", action="store_true", help="of each layer's diagonal block too")
    parser.add_argument("--density", action="store_true", help="the density of all eigenvalues too, and a picture")
    parser.add_argument("--data-dir", metavar="FOLDER", help="as for train")
    parser.add_argument(
        "--output", type=file_path, metavar="FILE.h5", help="default: beside the run, with its name and .spectrum.h5"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier spectrum")
    parser.set_defaults(process=process)


def process(command: argparse.Namespace, communicator: Communicator) -> None:
    """Find the leading eigenpairs, tell them, and write them."""
    from qnewton_mpi.hessian.iterate import iterate_of
    from qnewton_mpi.hessian.shown import draw, text, write
    from qnewton_mpi.hessian.spectrum import spectrum_of

    path = Path(command.run)
    output = command.output or path.parent / f"{path.absolute().stem}.spectrum.h5"
    picture = output.with_suffix(".png")

    def start() -> Any:
        check_output(output, "spectrum", command.overwrite)
        if command.density:
            check_output(picture, "picture", command.overwrite)
            if picture == output:
                raise UserError(f"{output}: is the picture's name: name another --output")
        return iterate_of(path)

    iterate = communicator.from_root(start)
    with Products(communicator.rank == 0) as products:
        spectrum = spectrum_of(
            iterate,
            communicator,
            command.top,
            command.samples,
            command.layers,
            command.density,
            command.data_dir,
            products.count,
        )

    def end() -> None:
        write(spectrum, output)
        if command.density:
            draw(spectrum, picture)
        print(f"{text(spectrum)}\nwritten to {output}", flush=True)
        if command.density:
            print(f"figure: {picture}", flush=True)

    communicator.from_root(end)


class Products:
    """How many products with the Hessian are done: a bar on a terminal, a line now and then elsewhere. Local.

    A context manager.
    """

    def __init__(self, shown: bool) -> None:
        from tqdm import tqdm

        bar = shown and sys.stderr.isatty()
        self.lines, self.done = shown and not bar, 0
        self.started = self.told = time.monotonic()
        layout = "{n_fmt} of {total_fmt} products at most |{bar}| {elapsed}, {remaining} left at most"
        self.bar = tqdm(disable=not bar, leave=False, bar_format=layout)

    def __enter__(self) -> Products:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def count(self, most: int) -> None:
        """Count one, of so many at most."""
        self.done += 1
        self.bar.total = most
        self.bar.update(1)
        now = time.monotonic()
        if self.lines and now - self.told > LINE_SECONDS:
            self.told, left = now, (now - self.started) / self.done * (most - self.done)
            print(f"{self.done} of {most} products at most, {duration(left)} left at most", file=sys.stderr, flush=True)
