"""`python -m benchmarks.workloads`: run, suite, table, estimate."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import torch

from benchmarks.commands import Commands, call, check_suite, command_line, do_suite, write_page
from benchmarks.store import Store
from benchmarks.workloads import optimizers, problems, profiles, running, tables, tuning
from benchmarks.workloads.optimizers import CONSTANT, COSINE, DEFAULT, PEERS
from benchmarks.workloads.running import Key, Record
from qnewton_mpi.errors import UserError

EVERYONE = [DEFAULT, *PEERS]
RESULTS = Path(__file__).parent / "results"


def commands() -> Commands:
    """Return the parsers of the command line."""
    found = Commands("workloads", "Workloads: the default beside tuned peers.", RESULTS, problems.PROBLEMS, EVERYONE)
    found.run.add_argument("--schedule", choices=[CONSTANT, COSINE], default=CONSTANT)
    found.run.add_argument("--steps", type=int, help="other than the workload's: a trial, which no table counts")
    guess = found.commands.add_parser(
        "estimate", parents=found.several, help="time some steps; CPU minutes of the suite"
    )
    guess.add_argument("--steps", type=int, default=4)
    return found


def main(words: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    return call(commands().top, COMMANDS, words)


def run(options: argparse.Namespace) -> int:
    """Do one run and write its record."""
    problem, store = problems.load(options.workload, options.data_dir), Store(options.results, Record)
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
    store = Store(options.results, Record)
    chosen = [problems.load(name, options.data_dir) for name in options.workloads]
    check_suite(options, optimizers.check)
    for problem in chosen:
        if problem.data is not None:
            problem.images  # noqa: B018 — before hours of other workloads

    def wanted() -> Iterator[Key]:
        for problem in chosen:
            records = store.read(problem.name)
            for name in options.optimizers:
                yield from tuning.missing(records, problem.name, name, problem.steps, options.seeds, options.device)

    def command(key: Key) -> list[str]:
        words = {"lr": key.lr, "schedule": key.schedule, "seed": key.seed, "steps": key.steps}
        return command_line("workloads", key, options, words)

    return do_suite(options, store, wanted, command)


def table(options: argparse.Namespace) -> int:
    """Write the tables, and draw the profiles."""
    store = Store(options.results, Record)
    chosen = [problems.load(name) for name in options.workloads]
    for name in options.optimizers:
        if name not in PEERS:
            optimizers.check(name)
    results = tables.Results(chosen, {name: store.read(name) for name in options.workloads}, options.optimizers)
    if not results.cells:
        raise UserError(f"{options.results}: no optimizer has all its runs on a workload: do `suite` first")
    seeds = max(len(cell.records) for cell in results.cells.values())
    write_page(
        options.output,
        lambda picture: profiles.draw(results, picture),
        lambda picture: tables.page(results, seeds, picture),
    )
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
