"""The command line: parsed and checked once, on rank 0, and the outcome broadcast."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from mpi4py import MPI

from qnewton_mpi import __version__
from qnewton_mpi.config import DEFAULT_REPLICAS, RunConfig, TrainSettings, read_toml, resolve, run_config
from qnewton_mpi.core.optimizers import OPTIMIZERS
from qnewton_mpi.core.settings import base_type, describe
from qnewton_mpi.errors import ENDED_BY_CTRL_C, INTERRUPTED, USAGE_ERROR, InterruptedRunError, UserError
from qnewton_mpi.parallel import cost
from qnewton_mpi.parallel.communicator import Communicator, abort_on_exception
from qnewton_mpi.parallel.environment import check_launcher, launched_tasks
from qnewton_mpi.studies.plan import read_study


def run(arguments: Sequence[str]) -> int:
    """Run a command on every rank of the world and return the exit code. Collective."""
    communicator = Communicator()
    abort_on_exception(communicator)
    try:
        check_launcher(communicator.size)
        command = communicator.from_root(lambda: parse(arguments, communicator.size))
        if command is not None:
            COMMANDS[command.command](command, communicator)
    except UserError as error:
        # One-rank jobs of a mismatched launcher are all rank 0: only the launcher knows which of them is the first.
        if communicator.rank == 0 and (communicator.size > 1 or launched_tasks()[1] == 0):
            print(f"qnewton-mpi: error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    except InterruptedRunError as stopped:
        if communicator.rank == 0:
            print(f"qnewton-mpi: {stopped}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except KeyboardInterrupt:
        if communicator.size > 1:  # the others may not have been told, and wait
            raise
        print("qnewton-mpi: interrupted", file=sys.stderr, flush=True)
        return ENDED_BY_CTRL_C
    except BrokenPipeError:  # `qnewton-mpi plot … | head`
        if communicator.size > 1:
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    return 0


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
    plotting.add_argument("runs", nargs="+", metavar="RUN.h5")
    plotting.add_argument("--output", metavar="FILE.png", help="default: beside the first run, with its name and .png")
    plotting.add_argument("--overwrite", action="store_true", help="replace an existing picture")

    watching = commands.add_parser("watch", help="the live curve of a run, from its file", allow_abbrev=False)
    watching.add_argument("run", metavar="RUN.h5")
    watching.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between looks (default 2)")
    watching.add_argument("--once", action="store_true", help="one look")

    comparing = commands.add_parser(
        "compare", help="run a study: many runs, tuned alike; resumable", allow_abbrev=False
    )
    comparing.add_argument("study", metavar="STUDY.toml")
    comparing.add_argument("--output", required=True, metavar="STUDY.h5", help="finished runs are kept in STUDY.runs/")
    comparing.add_argument(
        "--ranks-per-run", type=int, default=1, metavar="N", help="the ranks of each run (default 1)"
    )
    comparing.add_argument(
        "--again", default="", metavar="PATTERN", help="run the rows of such names once more, as 'kronecker*'"
    )

    reporting = commands.add_parser("report", help="the table (.md) and figure (.png) of a study", allow_abbrev=False)
    reporting.add_argument("study", metavar="STUDY.h5")
    reporting.add_argument("--overwrite", action="store_true", help="replace the report of an earlier state")

    benching = commands.add_parser(
        "bench", help="what a step costs beside the gradients, against one Allreduce", allow_abbrev=False
    )
    benching.add_argument("--sizes", default="16384,1048576", metavar="N,N,…", help="parameters (default %(default)s)")
    benching.add_argument("--replicas", type=int, metavar="M", help="default: one a rank, at least 2")
    benching.add_argument("--rounds", type=int, default=5, metavar="K", help="of timing, in turn (default 5)")
    benching.add_argument("--quick", action="store_true", help="one size, one round: to see that it works")
    benching.add_argument("--output", metavar="BENCH.h5", help="write the tables there too")
    benching.add_argument("--overwrite", action="store_true", help="replace an existing file")

    spectral = commands.add_parser(
        "spectrum", help="eigenvalues of the Hessian at a run's parameters", allow_abbrev=False
    )
    spectral.add_argument("run", metavar="RUN.h5|CHECKPOINTS", help="a run's file, or a folder of checkpoints")
    spectral.add_argument("--top", type=int, default=8, metavar="K", help="pairs of largest |λ| (default 8)")
    spectral.add_argument("--samples", type=int, metavar="N", help="the first N training samples (default: all)")
    spectral.add_argument("--layers", action="store_true", help="of each layer's diagonal block too")
    spectral.add_argument("--density", action="store_true", help="the density of all eigenvalues too, and a picture")
    spectral.add_argument("--data-dir", metavar="DIR", help="as for train")
    spectral.add_argument("--output", metavar="FILE.h5", help="default: beside the run, with its name and .spectrum.h5")
    spectral.add_argument("--overwrite", action="store_true", help="replace an earlier spectrum")

    commands.add_parser("info", help="MPI library, ranks and nodes, threads, devices", allow_abbrev=False)
    return parser


def parse(arguments: Sequence[str], ranks: int) -> argparse.Namespace | None:
    """Return the command, for `train` with its resolved `config`; None when help was asked for. Local."""
    try:
        command = build_parser().parse_args(arguments)
    except SystemExit:  # --help and --version have printed what was asked for
        return None
    if command.command == "train":
        given = {k: v for k, v in vars(command).items() if k not in ("command", "toml")}
        options = {**(read_toml(command.toml) if command.toml else {}), **given}
        command.config = resolve(run_config(options), ranks)
    if command.command == "compare":
        command.plan = read_study(command.study)
        if command.ranks_per_run < 1 or ranks % command.ranks_per_run:
            raise UserError(f"--ranks-per-run {command.ranks_per_run} does not divide the {ranks} rank(s)")
    if command.command == "watch" and not command.every > 0:
        raise UserError(f"--every {command.every}: more than 0 seconds")
    if command.command == "spectrum":
        for name, value in (("--top", command.top), ("--samples", command.samples)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: at least 1")
    if command.command == "bench":
        command.sizes = parse_sizes(command.sizes)
        if command.quick:
            command.sizes, command.rounds = command.sizes[:1], 1
        if command.replicas is not None and command.replicas < max(2, ranks):
            raise UserError(f"--replicas {command.replicas}: at least 2, and one a rank")
        if command.rounds < 1:
            raise UserError(f"--rounds {command.rounds}: at least 1")
        if command.output and Path(command.output).exists() and not command.overwrite:
            raise UserError(f"{command.output} exists: name another --output, or replace it with --overwrite")
    return command


def parse_sizes(text: str) -> list[int]:
    """Return the numbers of a list with commas.

    Raises
    ------
    UserError
        Where one is not a positive whole number.
    """
    sizes = [int(word) if word.isdecimal() else 0 for word in text.split(",")]
    if min(sizes) < 1:
        raise UserError(f"--sizes {text}: positive whole numbers, with commas between them")
    return sizes


def train_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Train, then tell what came out."""
    from qnewton_mpi.training.loop import train
    from qnewton_mpi.training.runfile import Run, table

    config: RunConfig = command.config
    path = train(config, communicator)
    if communicator.rank == 0:
        print(f"{table([Run(path)])}\nwritten to {path}", flush=True)


def plot_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Draw runs and print their table, on rank 0."""
    from qnewton_mpi.plotting import plot_runs
    from qnewton_mpi.training.runfile import Run, table

    def draw() -> None:
        runs = [Run(Path(name)) for name in command.runs]
        target = Path(command.output) if command.output else Path(command.runs[0]).with_suffix(".png")
        if target.exists() and not command.overwrite:
            raise UserError(f"{target} exists: name another --output, or replace it with --overwrite")
        plot_runs(runs, target)
        print(f"{table(runs)}\nfigure: {target}", flush=True)

    communicator.from_root(draw)


def watch_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Show a run while it goes on, on rank 0."""
    from qnewton_mpi.watching import watch

    communicator.from_root(lambda: watch(Path(command.run), command.every, command.once))


def compare_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Run a study."""
    from qnewton_mpi.studies.compare import compare

    compare(command.plan, Path(command.output), command.ranks_per_run, communicator, command.again)
    if communicator.rank == 0:
        print(f"written to {command.output}; next: qnewton-mpi report {command.output}", flush=True)


def report_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Write and print the report on a study, on rank 0."""
    from qnewton_mpi.studies.report import draw, markdown, read_results

    def report() -> None:
        path = Path(command.study)
        table, picture = path.with_suffix(".md"), path.with_suffix(".png")
        results = read_results(path)
        for target in (table, picture):
            if target.exists() and not command.overwrite:
                raise UserError(f"{target} exists: replace it with --overwrite")
        text = markdown(results)
        table.write_text(text)
        draw(results, picture)
        print(f"{text}\ntable: {table}\nfigure: {picture}", flush=True)

    communicator.from_root(report)


def bench_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Time steps, print the tables, write them if asked for."""
    from qnewton_mpi.benchmark import bench, write

    seconds = 0.02 if command.quick else 0.5
    tables = bench(command.sizes, command.replicas, command.rounds, communicator, seconds)
    if communicator.rank == 0:
        print("\n".join(table.text() for table in tables), flush=True)
        if command.output:
            write(tables, Path(command.output))
            print(f"written to {command.output}", flush=True)


def spectrum_command(command: argparse.Namespace, communicator: Communicator) -> None:
    """Find the leading eigenpairs, tell them, and write them."""
    from tqdm import tqdm

    from qnewton_mpi.spectrum import draw, iterate_of, spectrum_of, text, write

    path = Path(command.run)
    output = Path(command.output) if command.output else path.parent / f"{path.resolve().stem}.spectrum.h5"
    picture = output.with_suffix(".png")

    def start() -> Any:
        for target in (output, *([picture] if command.density else [])):
            if target.exists() and not command.overwrite:
                raise UserError(f"{target} exists: name another --output, or replace it with --overwrite")
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
        print(text(spectrum), flush=True)
        write(spectrum, output)
        print(f"written to {output}", flush=True)
        if command.density:
            draw(spectrum, picture)
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
    threads = max((pool["num_threads"] for pool in threadpool_info()), default=1)
    mine = (MPI.Get_processor_name(), communicator.rank, threads, len(os.sched_getaffinity(0)), device)
    everyone = communicator.mpi.gather(mine)
    if everyone is None:
        return
    print(f"qnewton-mpi  {__version__}")
    print(f"MPI          {MPI.Get_library_version().splitlines()[0]}".rstrip("\0 "))
    print(f"ranks        {communicator.size} on {len({row[0] for row in everyone})} node(s)")
    print("transport    host buffers (GPU arrays are staged through host memory)")
    print(f"exchange     {exchange_of(communicator.size)}")
    for node, rank, threads, cores, device in everyone:
        print(f"rank {rank:<7} {node}, {threads} BLAS thread(s), {cores} core(s) allowed, {device}")
    sys.stdout.flush()


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


COMMANDS: dict[str, Callable[[argparse.Namespace, Communicator], None]] = {
    "train": train_command,
    "plot": plot_command,
    "watch": watch_command,
    "compare": compare_command,
    "report": report_command,
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
