"""A run from Python: `qnewton_mpi.train`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from qnewton_mpi.config import RunConfig, configured
from qnewton_mpi.models import choice
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.ending import abort_on_exception
from qnewton_mpi.parallel.environment import THREAD_VARIABLES
from qnewton_mpi.trained import Model, load
from qnewton_mpi.training import loop
from qnewton_mpi.training.listeners import Callback, Listener

if TYPE_CHECKING:
    from mpi4py import MPI

Config = str | os.PathLike[str] | Mapping[str, Any]


def train(
    config: Config | None = None,
    *,
    communicator: Communicator | MPI.Intracomm | None = None,
    callback: Callback | None = None,
    callback_steps: bool = False,
    **options: Any,
) -> Model:
    """Do a run as `qnewton-mpi train` does, and return the model. Collective.

    model = train("run.toml", seed=1)
    model = train(method="sgd", lr=0.5, epochs=2, output="run.h5")

    The run's file is at `model.path`, its evaluations are in `model.history`. An exception that no one catches ends all
    ranks, unless the program has an `excepthook` of its own. Where no number of threads is set in the environment, the
    run takes one a rank.

    Parameters
    ----------
    config : path or mapping, optional
        A TOML file of options as one flat table, or such a table.
    communicator : Communicator or MPI.Intracomm, optional
        All ranks of the job without it.
    callback : callable, optional
        Called on rank 0 with a `Record` at each evaluation. It must do nothing collective: the other ranks wait. An
        exception in it ends the run.
    callback_steps : bool
        Call it at each step, too.
    **options
        Those of `qnewton-mpi train`, with underscores. They win over those of `config`.

    Raises
    ------
    UserError
        On every rank: for options, data or files that will not do, and where the run or the callback fails.
    InterruptedRunError
        On every rank, where it was told to stop by a signal or its limit of time.
    """
    ranks = Communicator.of(communicator)
    abort_on_exception(ranks)
    listener = Listener(callback, bool(callback_steps))

    def settle() -> tuple[RunConfig, Listener | None]:
        listener.check()
        told = None if callback is None else Listener(steps=listener.steps)
        return configured(config, options, ranks.size), told

    settled, told = ranks.from_root(settle)  # whether there is a callback, as rank 0 has it
    if told is not None:
        told = replace(told, call=callback)
    if choice.kind_of(settled.training.model) in choice.WITH_TORCH:
        with contextlib.suppress(ImportError):  # which is told later
            import torch  # noqa: F401  so that it is limited, too
    with threadpool_limits(None if any(name in os.environ for name in THREAD_VARIABLES) else 1):
        path = loop.train(settled, ranks, listener=told)
    return ranks.from_root(lambda: load(path))
