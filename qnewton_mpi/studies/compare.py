"""Running a study: groups of ranks take its rows in turn, each tuned on one seed and then run on fresh ones."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpi4py import MPI

from qnewton_mpi.config import resolve, run_config
from qnewton_mpi.data import datasets
from qnewton_mpi.data.parts import TEST, VALIDATION
from qnewton_mpi.errors import DivergedError, InterruptedRunError, TooLateError, UserError
from qnewton_mpi.files.locks import lock_of, locked
from qnewton_mpi.options import Free, free
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.results.layout import DIGEST
from qnewton_mpi.results.words import duration, rate_text
from qnewton_mpi.studies.halt import Halt
from qnewton_mpi.studies.plan import Row, Study, best_rate, next_rate
from qnewton_mpi.studies.store import Store, run_name
from qnewton_mpi.training.interruption import Noted
from qnewton_mpi.training.loop import train
from qnewton_mpi.training.parts import data_options

Labels = dict[str, dict[str, Any]]
"""What a study says of its runs, by their names: row, stage, baseline."""
Data = tuple[Any, ...]
"""The options of a row that say which data it has, `datasets.OPTIONS`; None where it does not say."""


def compare(study: Study, output: Path, ranks_per_run: int, world: Communicator, again: str = "") -> None:
    """Run what is missing of a study and write its file. Collective.

    Where a run fails or is stopped, no group begins another, and what is done is kept for the next start.

    Parameters
    ----------
    study : Study
    output : Path
        STUDY.h5: see `Store`.
    ranks_per_run : int
        The world is cut into groups of so many ranks, each doing a run at a time.
    world : Communicator
    again : str, optional
        Rows whose names fit this pattern are run once more, as after a change of their method.

    Raises
    ------
    UserError
        On every rank, for another program that does this study, data that cannot be had, files that cannot be written.
    InterruptedRunError
        On every rank, where a run was told to stop.
    """
    store = Store(output, again)
    with contextlib.ExitStack() as stack:

        def open_store() -> None:
            for path in (output, store.folder):  # studies whose files differ in the suffix share a folder
                stack.enter_context(locked(lock_of(path), f"--output {output}"))
            store.open()

        world.from_root(open_store)
        digests = {}
        for data in dict.fromkeys(data_of(row) for row in study.rows):
            options = {k: v for k, v in zip(datasets.OPTIONS, data, strict=True) if v is not None}
            dataset = datasets.load_on_all(world, **data_options(run_config(options).training))
            judged = [part for part in (VALIDATION, TEST) if f"{part}_" in study.tune_by]
            if not dataset.splits.keys() >= set(judged):
                raise UserError(f"tune_by = {study.tune_by}: {dataset.name} has no {judged[0]} part")
            digests[data] = dataset.digest
        group = Communicator(world.mpi.Split(world.rank // ranks_per_run))
        halt = Halt(world, range(0, world.size, ranks_per_run))
        noted = stack.enter_context(Noted())
        labels, failure = Work(study, store, group, halt, noted, digests, world.size // ranks_per_run).do()
        halt.end(lambda: noted.came)
        outcomes = world.mpi.allgather((labels, failure))
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            raise min(failures, key=lambda failure: isinstance(failure, InterruptedRunError))  # an error says more
        world.from_root(lambda: store.merge({name: said for labels, _ in outcomes for name, said in labels.items()}))


def data_of(row: Row) -> Data:
    """Return what a row says of its data."""
    return tuple(row.options.get(name) for name in datasets.OPTIONS)


@dataclass
class Work:
    """What one group of ranks does of a study. All methods are collective over the group.

    Attributes
    ----------
    digests : dict
        Of the data sets of the rows, by `data_of`.
    groups : int
        How many there are.
    worked : int
        Runs that it has done.
    seconds : float
        That these took.
    """

    study: Study
    store: Store
    group: Communicator
    halt: Halt
    noted: Noted
    digests: Mapping[Data, str]
    groups: int
    worked: int = 0
    seconds: float = 0.0

    def do(self) -> tuple[Labels, UserError | InterruptedRunError | None]:
        """Do the rows that no other group does; return the labels of their runs, and what ended the work early."""
        labels: Labels = {}
        for row in self.study.rows:
            try:
                if self.group.from_root(lambda row=row: self.store.claim(run_name(row.name, row.options))):  # type: ignore[misc]
                    labels |= self.run_row(row)
            except (UserError, InterruptedRunError) as error:
                late = isinstance(error, TooLateError) and self.worked  # for the next run, but the study has got on
                if not late and isinstance(error, UserError):
                    self.halt.send(at_once=False)
                    return labels, UserError(f"row {row.name!r}: {error}")
                self.halt.send(at_once="time_limit" not in row.options)  # then it is the job that was told to stop
                how = "the same command goes on from the runs that are done"
                return labels, InterruptedRunError(f"stopped in row {row.name!r}; {how}")
        return labels, None

    def run_row(self, row: Row) -> Labels:
        """Tune a row, run it on the seeds, and return the labels of all its runs."""
        labels: Labels = {}

        def run(rate: float | None, seed: int, stage: str) -> str:
            said = {"row": row.name, "stage": stage, "baseline": row.baseline}
            name = self.run_once(row, rate, seed, said)
            labels[name] = said
            return name

        rates: list[float | None] = [*row.rates] if row.rates else [None]
        if len(rates) > 1:
            scores: dict[float, float] = {}
            waiting, extensions = [*row.rates], self.study.extensions
            while waiting:
                for rate in waiting:
                    name = run(rate, self.study.tuning_seed, "tuning")
                    scores[rate] = self.group.from_root(
                        lambda name=name: self.store.run(name).reached(self.study.tune_by)  # type: ignore[misc]
                    )
                beyond = next_rate(scores) if extensions > 0 else None
                waiting, extensions = [] if beyond is None else [beyond], extensions - 1
            rates = [best_rate(scores)]
        for seed in self.study.seeds:
            run(rates[0], seed, "final")
        return labels

    def halted(self) -> bool:
        """Tell whether the run under way is to stop after its present step: another group was told to, or this rank."""
        return self.halt.came_at_once() or bool(self.noted.came)

    def run_once(self, row: Row, rate: float | None, seed: int, labels: Mapping[str, Any]) -> str:
        """Do a run unless it is stored, and return its name. One that diverges is a result too."""
        store, group = self.store, self.group
        options: dict[str, Any] = {**row.options, "seed": seed, "progress": "off"}
        options |= {} if rate is None else {"lr": rate}
        name = run_name(row.name, options)
        config = run_config(options)
        config = replace(config, training=replace(config.training, output=str(store.unfinished(name))))
        config = group.from_root(lambda: resolve(config, group.size))
        # What the row leaves open may have other defaults in another version, which is no reason to repeat a study.
        said = {key: value for key, value in config.flat().items() if key in options.keys() | free(Free.WHERE_CONSTANT)}
        if group.from_root(lambda: store.has(name, {**said, DIGEST: self.digests[data_of(row)]})):
            return name
        if group.mpi.allreduce(self.halt.came() or bool(self.noted.came), MPI.LOR):
            raise InterruptedRunError
        with contextlib.suppress(DivergedError):  # its file says so
            began = time.monotonic()
            try:
                train(config, group, labels, self.halted)
            finally:
                self.seconds += time.monotonic() - began
        self.worked += 1

        def keep() -> None:
            store.keep(name)
            reached = store.run(name).reached("train_nll")
            what = "diverged" if math.isnan(reached) else f"train NLL {reached:.4f}"
            which = f"{row.name}, lr {rate_text(config.optimizer.lr)}, seed {seed}, {labels['stage']}"
            print(f"{which}: {what} ({self.progress()})", file=sys.stderr, flush=True)

        group.from_root(keep)
        return name

    def progress(self) -> str:
        """Say how many runs are done, tuning may add more, and how long the others should take. Local."""
        tuned = sum(len(row.rates) for row in self.study.rows if len(row.rates) > 1)
        planned = tuned + len(self.study.rows) * len(self.study.seeds)
        done = self.store.count({row.name for row in self.study.rows})
        left = self.seconds / self.worked * max(0, planned - done) / self.groups
        return f"{done} of {planned} runs or more, {duration(left)} left"
