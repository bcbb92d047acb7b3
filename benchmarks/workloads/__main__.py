"""`python -m benchmarks.workloads`: run, suite, table, estimate."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import torch

from benchmarks.workloads import optimizers, problems, profiles, running, tables
from benchmarks.workloads.optimizers import CONSTANT, COSINE, DEFAULT, PEERS
from benchmarks.workloads.running import Key
from benchmarks.workloads.store import RESULTS, Store
from benchmarks.workloads.suite import suite
from qnewton_mpi.errors import ENDED_BY_CTRL_C, USAGE_ERROR, UserError
from qnewton_mpi.files.whole import replace_whole, writing

EVERYONE = [DEFAULT, *PEERS]


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    """Return the parser of the command line."""
    common = Parser(add_help=False)
    common.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    placed = Parser(add_help=False)
    placed.add_argument("--device", default="cpu", help="of PyTorch; CPU seconds are of the CPU alone")
    common.add_argument("--data-dir", help="folder of the data sets, as of qnewton-mpi train")
    several = Parser(add_help=False)
    several.add_argument("--workloads", nargs="+", default=list(problems.PROBLEMS), metavar="NAME")
    several.add_argument("--optimizers", nargs="+", default=EVERYONE, metavar="NAME")
    top = Parser(prog="python -m benchmarks.workloads", description="Workloads: the default beside tuned peers.")
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", parents=[common, placed], help="one run, unless there is its record")
    one.add_argument("workload")
    one.add_argument("optimizer", help="default, a peer, or a method with settings, as kronecker:damping=0.1")
    one.add_argument("--lr", type=float)
    one.add_argument("--schedule", choices=[CONSTANT, COSINE], default=CONSTANT)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, help="other than the workload's: a trial, which no table counts")
    every = commands.add_parser("suite", parents=[common, several, placed], help="all runs that are missing")
    every.add_argument("--seeds", type=int, default=3)
    every.add_argument("--jobs", type=int, default=1)
    every.add_argument(
        "--rerun", nargs="+", default=[], metavar="NAME", help="optimizers whose records are dropped first"
    )
    shown = commands.add_parser("table", parents=[common, several], help="tables and profiles of what there is")
    shown.add_argument("--output", type=Path, help="the page; the picture beside it has its name")
    guess = commands.add_parser("estimate", parents=[common, several], help="time some steps; CPU minutes of the suite")
    guess.add_argument("--steps", type=int, default=4)
    return top


def main(words: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    try:
        options = parser().parse_args(words)
        return COMMANDS[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted: the same command, without --rerun, goes on", file=sys.stderr)
        return ENDED_BY_CTRL_C


def run(options: argparse.Namespace) -> int:
    """Do one run and write its record."""
    problem, store = problems.load(options.workload, options.data_dir), Store(options.results)
    optimizers.check(options.optimizer)
    steps = problem.steps if options.steps is None else options.steps
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1")
    key = Key(problem.name, options.optimizer, options.lr, options.schedule, options.seed, steps)
    record = store.read(problem.name).get(key)
    if record is None:
        torch.set_num_threads(1)
        record = running.run(problem, key, options.device)
        store.add(record)
    cost = "" if record.cpu_ms is None else f", {record.cpu_ms:.3g} CPU ms a step"
    print(f"training {record.loss:.6g}, held out {record.held_out:.6g}{cost}")
    return 0


def every(options: argparse.Namespace) -> int:
    """Do what is missing."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs are to end too
    store = Store(options.results)
    chosen = [problems.load(name, options.data_dir) for name in options.workloads]
    for name, least in (("jobs", options.jobs), ("seeds", options.seeds)):
        if least < 1:
            raise UserError(f"--{name} {least}: at least 1")
    for name in [*options.optimizers, *options.rerun]:
        optimizers.check(name)
    for problem in chosen:
        if problem.data is not None:
            problem.images  # noqa: B018 — before hours of other workloads
    for name in options.rerun:
        print(f"{name}: {sum(store.drop(problem.name, name) for problem in chosen)} records dropped", flush=True)
    steps = {problem.name: problem.steps for problem in chosen}

    def tell(line: str) -> None:
        print(line, flush=True)

    failed = suite(
        store, steps, options.optimizers, options.seeds, options.jobs, options.data_dir, options.device, tell
    )
    return 1 if failed else 0


def table(options: argparse.Namespace) -> int:
    """Write the tables, and draw the profiles."""
    store = Store(options.results)
    chosen = [problems.load(name) for name in options.workloads]
    for name in options.optimizers:
        if name not in PEERS:
            optimizers.check(name)
    results = tables.Results(chosen, {name: store.read(name) for name in options.workloads}, options.optimizers)
    if not results.cells:
        raise UserError(f"{options.results}: no optimizer has all its runs on a workload: do `suite` first")
    seeds = max(len(cell.records) for cell in results.cells.values())
    picture = None if options.output is None else options.output.with_suffix(".png")
    drawn = picture is not None and profiles.draw(results, picture)
    text = tables.page(results, seeds, picture.name if picture is not None and drawn else None)
    if options.output is None:
        print(text, end="")
    else:
        with writing(options.output):
            replace_whole(options.output, text.encode())
    return 0


def estimate(options: argparse.Namespace) -> int:
    """Time some steps of each optimizer; print what the suite takes, without writing records."""
    torch.set_num_threads(1)
    print("| workload | " + " | ".join(f"{name}, ms" for name in options.optimizers) + " | CPU minutes |")
    print("|---" * (len(options.optimizers) + 2) + "|")
    total = 0.0
    for name in options.workloads:
        problem = problems.load(name, options.data_dir)
        row, minutes = [], 0.0
        for optimizer in options.optimizers:
            peer = PEERS.get(optimizer)
            lr = None if peer is None else 10 ** (peer.lowest / 2)
            record = running.run(problem, Key(name, optimizer, lr, CONSTANT, 0, options.steps))
            runs = 6 if peer is None else 5 * len(peer.schedules) + 2  # one beyond an edge each
            minutes += runs * problem.steps * record.cpu_ms / 60_000
            row.append(f"{record.cpu_ms:.3g}")
        total += minutes
        print(f"| {name} | " + " | ".join(row) + f" | {minutes:.1f} |", flush=True)
    print(f"all: {total / 60:.1f} CPU hours")
    return 0


COMMANDS = {"run": run, "suite": every, "table": table, "estimate": estimate}

if __name__ == "__main__":
    sys.exit(main())
