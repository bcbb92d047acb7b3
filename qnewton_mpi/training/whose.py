"""Whose a run's output and checkpoints are: one program writes them at a time, and nothing of another run is replaced.

A run draws an identifier when it begins. It stands in the run's file and in its checkpoints, so that rows and state of
different runs never come together, though their options be the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from qnewton_mpi.config import RunConfig
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.files.locks import lock_of, locked
from qnewton_mpi.files.outputs import check_output
from qnewton_mpi.files.whole import check_replaceable
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.results.runfile import Run

# In a run's file, beside the options: the data, and the step and folder of the newest checkpoint.
DIGEST, SAVED, SAVED_IN = "data_digest", "saved_step", "saved_in"
NONE_SAVED = -1
# Options that may differ between a run and its continuation; `exchange` then changes rounding.
FREE = {
    "output",
    "overwrite",
    "progress",
    "data_dir",
    "exchange",
    "transport",
    "checkpoint",
    "checkpoint_every",
    "resume",
    "time_limit",
    "stop_signals",
    "stall_timeout",
    "check_replicas",
    "on_nonfinite",
    "log_dir",
    "log",
}
LENGTH = {"steps", "epochs"}  # which may differ, too, where the rates of a run do not depend on its length
STOPS = {"patience"}
OTHERWISE = "name another --output, or replace it with --overwrite"


class Rows(Enum):
    """What becomes of the output of a run that begins or goes on."""

    NEW = "a file without rows takes the place of what is there, if anything"
    KEPT = "its rows up to the checkpoint are taken over"
    DONE = "it is finished, and stays as it is"


@contextlib.contextmanager
def held(config: RunConfig, communicator: Communicator) -> Iterator[None]:
    """Hold the locks of a run's output and folder of checkpoints while the context lasts. Collective.

    Raises
    ------
    UserError
        On every rank: where another program holds one, or the output exists and is neither to be replaced nor to be
        gone on with.
    """
    with contextlib.ExitStack() as stack:
        communicator.from_root(lambda: _hold(config, stack))
        yield


def _hold(config: RunConfig, stack: contextlib.ExitStack) -> None:
    output, training = config.output, config.training
    check_replaceable(output)  # a folder may have no name for a lock: "."
    stack.enter_context(locked(lock_of(output), f"--output {printable(output)}"))
    check_output(output, "run", training.overwrite or training.resume)
    if training.checkpoint is not None:
        folder = Path(training.checkpoint)
        if not folder.exists():  # one that stays empty was a mistake in its name
            stack.callback(_remove_empty, folder)
        stack.enter_context(locked(folder / ".lock", f"--checkpoint {printable(folder)}"))


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def rows_of(
    config: RunConfig, configuration: Mapping[str, Any], run: str, step: int | None, steps: int, over: bool
) -> Rows:
    """Decide what becomes of the output that is there, and tell it. Local, on one rank.

    Parameters
    ----------
    config : RunConfig
    configuration : mapping
        See `differences`.
    run : str
        The identifier of this run, that of the checkpoint that it goes on from.
    step, steps : int or None, int
        Of that checkpoint, if there is one; the last one.
    over : bool
        Whether nothing is left to do after that checkpoint.

    Raises
    ------
    UserError
        Where the output is not of this run, or rows would be lost.
    """
    output, training = config.output, config.training
    if not training.resume:
        return Rows.NEW
    if step is None:
        return _rows_without_checkpoint(config, configuration)
    if not output.exists():
        LOG.warning("%s is not there: it starts after step %d", output, step)
        return Rows.NEW
    try:
        before = Run(output)
        other = differences(before.attributes, configuration, going_on=True)
        if not other and before.attributes.get("run", run) != run:
            other = "the options are the same, but it began at another time"
        if other:
            raise UserError(f"--resume: {output} is of another run than {training.checkpoint}: {other}")
    except UserError as error:
        if not training.overwrite:
            raise UserError(f"{error}: {OTHERWISE}") from error
        LOG.warning("%s: it is replaced, and starts after step %d", error, step)
        return Rows.NEW
    last = int(before.steps["step"].max(initial=0))
    if before.finished and (over or (last >= steps and not training.overwrite)):
        again = "" if over else f": what follows step {step} is done again for its checkpoints alone"
        LOG.info("%s is finished and stays as it is%s", output, again)
        return Rows.DONE
    if last > step:
        LOG.info("%s: its rows after step %d are done again", output, step)
    if last < step:
        LOG.warning("%s has no rows of steps %d to %d", output, last + 1, step)
    return Rows.KEPT


def _rows_without_checkpoint(config: RunConfig, configuration: Mapping[str, Any]) -> Rows:
    """Decide where there is nothing to go on from: only what a run left that never saved is replaced."""
    output, folder = config.output, config.training.checkpoint
    if not output.exists():
        LOG.info("no checkpoint in %s yet: starts from the beginning", folder)
        return Rows.NEW
    if config.training.overwrite:
        LOG.warning("no checkpoint in %s: starts from the beginning, and replaces %s", folder, output)
        return Rows.NEW
    try:
        before = Run(output)
    except UserError as error:
        raise UserError(f"{error}: {OTHERWISE}") from error
    saved = before.attributes.get(SAVED)
    if other := differences(before.attributes, configuration, going_on=True):
        problem = f"is of another run: {other}"
    elif before.finished:
        problem = "is finished"
    elif saved is None:
        problem = "has rows that would be lost"
    elif saved != NONE_SAVED:
        problem = f"is of a run that has one of step {saved}, in {before.attributes.get(SAVED_IN)}"
    else:
        LOG.warning("no checkpoint in %s, and none was made before: starts from the beginning, in %s", folder, output)
        return Rows.NEW
    raise UserError(
        f"--resume: no checkpoint in {folder}, but {output} {problem}: is --checkpoint right? Else {OTHERWISE}"
    )


def differences(before: Mapping[str, Any], configuration: Mapping[str, Any], going_on: bool = False) -> str:
    """Return what tells two runs apart, in words; empty where one may be the continuation of the other.

    Parameters
    ----------
    before : mapping
        Options of a run and the digest of its data, as a file or a checkpoint has them: None may be left out, and the
        digest is missing in those of earlier versions.
    configuration : mapping
        All options of this run and the digest of its data.
    going_on : bool
        Whether this run goes on with that one, and so may be longer.
    """
    told = []
    constant = configuration.get("schedule") == "constant"
    free = FREE | (STOPS | (LENGTH if constant else set()) if going_on else set())
    for name, is_now in sorted(configuration.items()):
        was = before.get(name)
        was = was.item() if isinstance(was, np.generic) else was
        same_data = name == "data" and before.get(DIGEST, "") == configuration.get(DIGEST)  # files that were moved
        if name in free or was == is_now or same_data:
            continue
        if name != DIGEST:
            told.append(f"{name} was {was} and is {is_now}")
        elif was is not None:
            told.append("the data set differs")
    if not constant and any(before.get(name) != configuration.get(name) for name in LENGTH):
        told.append(
            f"the rates of a {configuration.get('schedule')} schedule depend on the length of a run, so begin another "
            "for another length, with an --output and a --checkpoint of its own"
        )
    return ", ".join(told)
