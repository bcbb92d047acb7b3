"""The command line: parsed without MPI, checked once, on rank 0, and the outcome broadcast."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from qnewton_mpi import __version__
from qnewton_mpi.config import DEFAULT_REPLICAS, RunConfig, TrainSettings, read_toml, resolve, run_config
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import base_type, describe
from qnewton_mpi.errors import (
    ENDED_BY_CTRL_C,
    INTERRUPTED,
    USAGE_ERROR,
    InterruptedRunError,
    NoReaderError,
    UserError,
    printable,
)
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.files.whole import reason, replace_whole, writing
from qnewton_mpi.parallel import cost
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception, load_mpi
from qnewton_mpi.parallel.environment import check_descriptors, launched_tasks
from qnewton_mpi.studies.plan import read_study

LONGEST_LINE = 1000  # characters of an error, whatever was given
LONGEST_PAUSE = 86_400.0  # seconds


def run(arguments: Sequence[str]) -> int:
    """Run a command on every rank of the world, or without MPI on the first task, and return the exit code."""
    first = launched_tasks()[1] == 0  # without MPI the launcher alone knows
    communicator = None
    try:
        check_descriptors()
        command = parse(arguments, first)
        if command is None:
            return 0
        if command.command in ALONE:
            if first:
                ALONE[command.command](command)
            return 0
        communicator = Communicator()
        abort_on_exception(communicator)
        # One-rank jobs of a mismatched launcher are all rank 0: the launcher knows which of them is the first.
        first = communicator.rank == 0 and (communicator.size > 1 or first)
        checked = communicator.from_root(lambda: check(command, communicator.size))
        COMMANDS[command.command](checked, communicator)
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


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def build_parser() -> Parser:
    """Return the parser of the command line; the options of `train` are those of the settings. Local."""
    parser = Parser(prog="qnewton-mpi", description="Data-parallel quasi-Newton training over MPI.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"qnewton-mpi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    training = commands.add_parser("train", help="train the convnet; run it under mpiexec or srun", allow_abbrev=False)
    training.add_argument(
        "toml", nargs="?", metavar="CONFIG.toml", help="options as a flat table; those of the command line win"
    )
    _add_options(training.add_argument_group("run"), [("", TrainSettings)])
    _add_options(training.add_argument_group("method"), [(name, o.settings_type) for name, o in OPTIMIZERS.items()])

    plotting = commands.add_parser("plot", help="draw NLL against epochs and print a table", allow_abbrev=False)
    plotting.add_argument("runs", nargs="+", type=file_path, metavar="RUN.h5")
    plotting.add_argument(
        "--output", type=file_path, metavar="FILE.png", help="default: beside the first run, with its name and .png"
    )
    plotting.add_argument("--overwrite", action="store_true", help="replace an existing picture")

    watching = commands.add_parser("watch", help="the live curve of a run, from its file", allow_abbrev=False)
    watching.add_argument("run", type=file_path, metavar="RUN.h5")
    watching.add_argument("--every", type=pause, default=2.0, metavar="SECONDS", help="between looks (default 2)")
    watching.add_argument("--once", action="store_true", help="one look")

    comparing = commands.add_parser(
        "compare", help="run a study: many runs, tuned alike; resumable", allow_abbrev=False
    )
    comparing.add_argument("study", metavar="STUDY.toml")
    comparing.add_argument(
        "--output", type=file_path, required=True, metavar="STUDY.h5", help="finished runs are kept in STUDY.runs/"
    )
    comparing.add_argument(
        "--ranks-per-run",
        type=at_least_one("--ranks-per-run"),
        default=1,
        metavar="N",
        help="the ranks of each run (default 1)",
    )
    comparing.add_argument(
        "--again", default="", metavar="PATTERN", help="run the rows of such names once more, as 'kronecker*'"
    )

    reporting = commands.add_parser("report", help="the table (.md) and figure (.png) of a study", allow_abbrev=False)
    reporting.add_argument("study", type=file_path, metavar="STUDY.h5")
    reporting.add_argument("--overwrite", action="store_true", help="replace the report of an earlier state")

    benching = commands.add_parser(
        "bench", help="what a step costs beside the gradients, against one Allreduce", allow_abbrev=False
    )
    benching.add_argument(
        "--sizes", type=sizes, default="16384,1048576", metavar="N,N,…", help="parameters (default %(default)s)"
    )
    benching.add_argument(
        "--replicas", type=at_least_one("--replicas"), metavar="M", help="default: one a rank, at least 2"
    )
    benching.add_argument(
        "--rounds", type=at_least_one("--rounds"), default=5, metavar="K", help="of timing, in turn (default 5)"
    )
    benching.add_argument("--quick", action="store_true", help="one size, one round: to see that it works")
    benching.add_argument("--output", type=file_path, metavar="BENCH.h5", help="write the tables there too")
    benching.add_argument("--overwrite", action="store_true", help="replace an existing file")

    spectral = commands.add_parser(
        "spectrum", help="eigenvalues of the Hessian at a run's parameters", allow_abbrev=False
    )
    spectral.add_argument("run", metavar="RUN.h5|CHECKPOINTS", help="a run's file, or a folder of checkpoints")
    spectral.add_argument(
        "--top", type=at_least_one("--top"), default=8, metavar="K", help="pairs of largest |λ| (default 8)"
    )
    spectral.add_argument(
        "--samples",
        type=at_least_one("--samples"),
        metavar="N",
        help="the first N training samples (default: all)",
    )
    spectral.add_argument("--layers", action="store_true", help="of each layer's diagonal block too")
    spectral.add_argument("--density", action="store_true", help="the density of all eigenvalues too, and a picture")
    spectral.add_argument("--data-dir", metavar="DIR", help="as for train")
    spectral.add_argument(
        "--output", type=file_path, metavar="FILE.h5", help="default: beside the run, with its name and .spectrum.h5"
    )
    spectral.add_argument("--overwrite", action="store_true", help="replace an earlier spectrum")

    commands.add_parser("info", help="MPI library, ranks and nodes, threads, devices", allow_abbrev=False)
    return parser


def parse(arguments: Sequence[str], first: bool) -> argparse.Namespace | None:
    """Return the command; None when help was asked for, which the `first` task prints. Local, without MPI."""
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
            return build_parser().parse_args(arguments)
    except SystemExit:  # --help and --version have printed what was asked for
        if first:
            print(end="", flush=True)
        return None


def check(command: argparse.Namespace, ranks: int) -> argparse.Namespace:
    """Return a command with all that its files say, fit for a number of ranks: of `train` the `config`. Local."""
    if command.command == "train":
        given = {k: v for k, v in vars(command).items() if k not in ("command", "toml")}
        options = {**(read_toml(command.toml) if command.toml is not None else {}), **given}
        command.config = resolve(run_config(options), ranks)
    if command.command == "compare":
        if ranks % command.ranks_per_run:
            raise UserError(f"--ranks-per-run {command.ranks_per_run} does not divide the {ranks} rank(s)")
        command.plan = read_study(command.study, command.ranks_per_run)
        names = [row.name for row in command.plan.rows]
        if command.again and not fnmatch.filter(names, command.again):
            raise UserError(f"--again {printable(command.again)}: no row is called so; there are {', '.join(names)}")
    if command.command == "bench":
        if command.quick:
            command.sizes, command.rounds = command.sizes[:1], 1
        if command.replicas is not None and command.replicas < max(2, ranks):
            raise UserError(f"--replicas {command.replicas}: at least 2, and one a rank")
        if command.output:
            check_output(command.output, "benchmark", command.overwrite)
    return command


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


def number(text: str) -> int:
    """Return the whole number that a word is; -1 for what is none, or has more than 12 digits."""
    return int(text) if text.isdecimal() and len(text) <= 12 else -1


def at_least_one(option: str) -> Callable[[str], int]:
    """Return the type of an option that counts something.

    Raises
    ------
    UserError
        Where it is called with anything but a positive whole number.
    """

    def convert(text: str) -> int:
        if number(text) < 1:
            raise UserError(f"{option} {printable(text)}: a whole number from 1 to 999,999,999,999")
        return number(text)

    return convert


def file_path(text: str) -> Path:
    """Return the path of a file.

    Raises
    ------
    UserError
        For one that can be none's, as that of an empty variable of the shell.
    """
    if not Path(text).name:
        raise UserError(f"'{printable(text)}' is the name of no file")
    return Path(text)


def pause(text: str) -> float:
    """Return the seconds of `--every`.

    Raises
    ------
    UserError
        Where they are not a number that one can wait for.
    """
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= LONGEST_PAUSE:
            return float(text)
    raise UserError(f"--every {printable(text)}: more than 0 seconds, and at most {LONGEST_PAUSE:,.0f}")


def train_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Train, then tell what came out."""
    from qnewton_mpi.results.rows import table
    from qnewton_mpi.training.interruption import Noted
    from qnewton_mpi.training.loop import train
    from qnewton_mpi.training.runfile import Run

    config: RunConfig = command.config
    with Noted() as noted:
        path = train(config, communicator, halted=lambda: bool(noted.came))
    communicator.from_root(lambda: print(f"{table([Run(path)])}\nwritten to {path}", flush=True))


def plot_command(command: argparse.Namespace) -> None:
    """Draw runs and print their table."""
    from qnewton_mpi.plotting import plot_runs
    from qnewton_mpi.results.rows import distinct, table
    from qnewton_mpi.training.runfile import Run

    target = command.output or command.runs[0].with_suffix(".png")
    check_output(target, "picture", command.overwrite)
    runs = distinct(Run(path) for path in command.runs)
    plot_runs(runs, target)
    print(f"{table(runs)}\nfigure: {target}", flush=True)


def watch_command(command: argparse.Namespace) -> None:
    """Show a run while it goes on."""
    from qnewton_mpi.watching import watch

    watch(command.run, command.every, command.once)


def compare_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Run a study."""
    from qnewton_mpi.studies.compare import compare

    compare(command.plan, Path(command.output), command.ranks_per_run, communicator, command.again)
    line = f"written to {command.output}; next: qnewton-mpi report {command.output}"
    communicator.from_root(lambda: print(line, flush=True))


def report_command(command: argparse.Namespace) -> None:
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


def bench_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Time steps, print the tables, write them if asked for."""
    from qnewton_mpi.benchmark import bench, write

    seconds = 0.02 if command.quick else 0.5
    tables = bench(command.sizes, command.replicas, command.rounds, communicator, seconds)

    def end() -> None:
        if command.output:
            write(tables, command.output)
        print("\n".join(table.text() for table in tables), flush=True)
        if command.output:
            print(f"written to {command.output}", flush=True)

    communicator.from_root(end)


def spectrum_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Find the leading eigenpairs, tell them, and write them."""
    from tqdm import tqdm

    from qnewton_mpi.spectrum import draw, iterate_of, spectrum_of, text, write

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
    hidden = True if communicator.rank else None  # None: unless stderr is no terminal
    with tqdm(unit=" products", disable=hidden, leave=False) as bar:
        spectrum = spectrum_of(
            iterate,
            communicator,
            command.top,
            command.samples,
            command.layers,
            command.density,
            command.data_dir,
            lambda: bar.update(1),
        )

    def end() -> None:
        write(spectrum, output)
        if command.density:
            draw(spectrum, picture)
        print(f"{text(spectrum)}\nwritten to {output}", flush=True)
        if command.density:
            print(f"figure: {picture}", flush=True)

    communicator.from_root(end)


def info_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Tell what the ranks run on."""
    from threadpoolctl import threadpool_info

    from qnewton_mpi.parallel.device import open_device

    try:
        device = open_device("cuda", communicator.node_rank).name
    except UserError:
        device = "no GPU"
    MPI = load_mpi()
    threads = max((pool["num_threads"] for pool in threadpool_info()), default=1)
    mine = (MPI.Get_processor_name(), communicator.rank, threads, len(os.sched_getaffinity(0)), device)
    everyone = communicator.mpi.allgather(mine)

    def end() -> None:
        print(f"qnewton-mpi  {__version__}")
        print(f"MPI          {MPI.Get_library_version().splitlines()[0]}".rstrip("\0 "))
        print(f"ranks        {communicator.size} on {len({row[0] for row in everyone})} node(s)")
        print("transport    host buffers (GPU arrays are staged through host memory)")
        print(f"exchange     {exchange_of(communicator.size)}")
        for node, rank, threads, cores, device in everyone:
            print(f"rank {rank:<7} {node}, {threads} BLAS thread(s), {cores} core(s) allowed, {device}")
        print(end="", flush=True)

    communicator.from_root(end)


def exchange_of(ranks: int) -> str:
    """Say which exchange "auto" chooses for the default method on these ranks, and why."""
    if ranks == 1:
        return "auto is allgather: on one rank nothing crosses the network"
    kind, replicas = OPTIMIZERS[TrainSettings().method], max(DEFAULT_REPLICAS, ranks)
    traffic = kind.traffic(kind.settings_type())
    sizes = [1000, 100_000, 10_000_000, 1_000_000_000]
    names = [cost.choose(traffic, ranks, replicas, size) for size in sizes]
    text = ", ".join(f"{name} at N = {size:,}" for size, name in zip(sizes, names, strict=True))
    text = f"{names[0]} at any N" if len(set(names)) == 1 else text
    return f"auto, by predicted seconds, for {TrainSettings().method} with M = {replicas}: {text} (docs/scaling.md)"


# What only reads files needs no MPI: on a login node there may be none.
ALONE: dict[str, Callable[[argparse.Namespace], None]] = {
    "plot": plot_command,
    "watch": watch_command,
    "report": report_command,
}
COMMANDS: dict[str, Callable[[argparse.Namespace, Communicator], None]] = {
    "train": train_command,
    "compare": compare_command,
    "bench": bench_command,
    "spectrum": spectrum_command,
    "info": info_command,
}


def _add_options(group: Any, owners: list[tuple[str, type]]) -> None:
    """Add an option for each field of the owners' dataclasses; those that share a name share an option."""
    texts: dict[str, dict[str, list[str]]] = {}
    kinds: dict[str, type] = {}
    for owner, kind in owners:
        for item in fields(kind):
            texts.setdefault(item.name, {}).setdefault(describe(item), []).append(owner)
            kinds[item.name] = base_type(get_type_hints(kind)[item.name])
    for name, parts in texts.items():
        flag = f"--{name.replace('_', '-')}"
        text = "; ".join(f"{', '.join(of)}: {said}" if any(of) else said for said, of in parts.items())
        text = text.replace("%", "%%")
        # Values stay strings here: `config` converts and checks them as it does those of a TOML file.
        if kinds[name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, metavar=name.rpartition("_")[2].upper())
