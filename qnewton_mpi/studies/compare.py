"""Running a study: groups of ranks take its rows in turn, each tuned on one seed and then run on fresh ones."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from qnewton_mpi.config import resolve, run_config
from qnewton_mpi.errors import NonFiniteGradientError
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.studies.plan import Row, Study, best_rate, next_rate
from qnewton_mpi.studies.store import Store, run_name
from qnewton_mpi.training.loop import load_data, train
from qnewton_mpi.training.runfile import rate_text


def compare(study: Study, output: Path, ranks_per_run: int, world: Communicator, again: str = "") -> None:
    """Run what is missing of a study and write its file. Collective.

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
        On every rank, for data that cannot be had and files that cannot be written.
    """
    store = Store(output, again)
    world.from_root(store.open)
    for data in {(row.options.get("data"), row.options.get("data_dir")) for row in study.rows}:
        options = dict(zip(("data", "data_dir"), data, strict=True))
        load_data(run_config({k: v for k, v in options.items() if v is not None}), world)
    group = Communicator(world.mpi.Split(world.rank // ranks_per_run))

    def work() -> list[str]:
        names: list[str] = []
        for row in study.rows:
            if group.from_root(lambda row=row: store.claim(run_name(row.name, row.options))):  # type: ignore[misc]
                names += run_row(study, row, store, group)
        return names

    names = world.mpi.allgather(world.together(work))
    world.from_root(lambda: store.merge(sorted({name for some in names for name in some})))


def run_row(study: Study, row: Row, store: Store, group: Communicator) -> list[str]:
    """Tune a row, run it on the seeds, and return the names of all its runs. Collective over the group."""
    names = []
    rates: list[float | None] = [*row.rates] if row.rates else [None]
    if len(rates) > 1:
        scores: dict[float, float] = {}
        waiting, extensions = [*row.rates], study.extensions
        while waiting:
            for rate in waiting:
                names.append(run_once(row, rate, study.tuning_seed, "tuning", store, group))
                scores[rate] = group.from_root(lambda: store.run(names[-1]).reached(study.tune_by))
            beyond = next_rate(scores) if extensions > 0 else None
            waiting, extensions = [] if beyond is None else [beyond], extensions - 1
        rates = [best_rate(scores)]
    return names + [run_once(row, rates[0], seed, "final", store, group) for seed in study.seeds]


def run_once(row: Row, rate: float | None, seed: int, stage: str, store: Store, group: Communicator) -> str:
    """Do a run unless it is stored, and return its name. One that diverges is a result too. Collective."""
    options: dict[str, Any] = {**row.options, "seed": seed, "progress": "off", **({} if rate is None else {"lr": rate})}
    name = run_name(row.name, options)
    if group.from_root(lambda: store.has(name)):
        return name
    config = run_config(options)
    output = str(store.unfinished(name))
    config = replace(config, training=replace(config.training, output=output, overwrite=True))
    config = group.from_root(lambda: resolve(config, group.size))
    with contextlib.suppress(NonFiniteGradientError):  # its file says so
        train(config, group, {"row": row.name, "stage": stage, "baseline": row.baseline})
    if group.rank == 0:
        store.keep(name)
        reached = store.run(name).reached("train_nll")
        what = "diverged" if math.isnan(reached) else f"train NLL {reached:.4f}"
        print(
            f"{row.name}, lr {rate_text(config.optimizer.lr)}, seed {seed}, {stage}: {what}",
            file=sys.stderr,
            flush=True,
        )
    return name
