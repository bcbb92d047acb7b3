"""`python -m benchmarks.batches`: run, suite, table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import torch

from benchmarks.batches import figure, running, study, tables
from benchmarks.batches.running import Key, Record
from benchmarks.commands import Commands, call, check_suite, command_line, do_suite, write_page
from benchmarks.store import Store
from benchmarks.workloads import optimizers
from qnewton_mpi.errors import UserError

RESULTS = Path(__file__).parent / "results"
WORDS = "lr", "batch", "replicas", "seed", "target", "most"


def commands() -> Commands:
    """Return the parsers of the command line."""
    about = "Larger batches: steps to a fixed training loss, the default beside peers tuned at each batch."
    found = Commands("batches", about, RESULTS, study.WORKLOADS, study.OPTIMIZERS)
    found.run.add_argument("--batch", type=int, default=study.BATCHES[0])
    found.run.add_argument("--replicas", type=int, default=1, help="of a method of this package; in equal shares")
    found.run.add_argument("--target", type=float, help="training loss; default: the workload's, which tables count")
    found.run.add_argument("--most", type=int, default=study.MOST, help="steps")
    return found


def main(words: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    return call(commands().top, {"run": run, "suite": every, "table": table}, words)


def run(options: argparse.Namespace) -> int:
    """Do one run and write its record."""
    workload, store = study.load(options.workload, options.data_dir), Store(options.results, Record)
    optimizers.check(options.optimizer)
    for name in ("batch", "replicas", "most"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: at least 1")
    if options.batch % options.replicas:
        raise UserError(f"--batch {options.batch}: not in {options.replicas} equal shares")
    target = workload.target if options.target is None else options.target
    shared = {name: getattr(options, name) for name in WORDS if name != "target"}
    key = Key(options.workload, options.optimizer, target=target, **shared)
    record = store.read(key.workload).get(key)
    if record is None:
        torch.set_num_threads(1)
        record = running.run(workload.problem, key, options.device)
        store.add(record)
    print(record.outcome)
    return 0


def every(options: argparse.Namespace) -> int:
    """Do what is missing."""
    store = Store(options.results, Record)
    chosen = [study.load(name, options.data_dir) for name in options.workloads]
    check_suite(options, optimizers.check)
    for workload in chosen:
        if workload.problem.data is not None:
            workload.problem.images  # noqa: B018 — before hours of other workloads

    def wanted() -> Iterator[Key]:
        for workload in chosen:
            yield from study.wanted(store.read(workload.name), workload, options.optimizers, options.seeds)

    return do_suite(options, store, wanted, lambda key: command(key, options))


def command(key: Key, options: argparse.Namespace) -> list[str]:
    """Return the command line of a run."""
    return command_line("batches", key, options, {word: getattr(key, word) for word in WORDS})


def table(options: argparse.Namespace) -> int:
    """Write the tables, and draw the figure."""
    store = Store(options.results, Record)
    chosen = [study.load(name) for name in options.workloads]
    for name in options.optimizers:
        if name not in optimizers.PEERS:
            optimizers.check(name)
    results = tables.Results(chosen, {name: store.read(name) for name in options.workloads}, options.optimizers)
    if not results.cells:
        raise UserError(f"{options.results}: no optimizer has all its runs at a batch: do `suite` first")
    write_page(
        options.output,
        lambda picture: figure.draw(results, picture),
        lambda picture: tables.page(results, picture),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
