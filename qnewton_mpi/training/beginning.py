"""Where a run begins: at the network's initial parameters, or at those of another run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Array, to_device
from qnewton_mpi.errors import UserError, printable
from qnewton_mpi.models.choice import build
from qnewton_mpi.models.description import Description
from qnewton_mpi.models.network import Network
from qnewton_mpi.options import TrainSettings
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.log import LOG
from qnewton_mpi.training.checkpoint import steps_in
from qnewton_mpi.training.saved import read, weights_for


def beginning(network: Network, classes: Sequence[str], training: TrainSettings, communicator: Communicator) -> Array:
    """Return the first parameters of a run (N,), and give the network the statistics that go with them. Collective.

    A run that is gone on with has no need of the run that it began with.

    Raises
    ------
    UserError
        On every rank, as `initial_for`.
    """
    initial = network.initial_parameters(training.seed)

    def of_another() -> NDArray[Any] | None:
        goes_on = training.resume and training.checkpoint is not None and steps_in(Path(training.checkpoint))
        if training.init_from is None or goes_on:
            return None
        return initial_for(network, classes, Path(training.init_from), training.init_which)

    weights = communicator.from_root(of_another)
    if weights is None:
        return initial
    network.statistics = weights[network.size :].astype(np.float64)
    return to_device(weights[: network.size], initial)


def initial_for(network: Network, classes: Sequence[str], path: Path, which: str) -> NDArray[Any]:
    """Return the weights in a run's file or checkpoints that another run begins with, (N + K,). Local.

    Where the names of its classes are not those of this run, in turn, that is told.

    Raises
    ------
    UserError
        As `read`, and where they are of another network.
    """
    saved = read(path, which)
    if saved.network:
        before = Description.read(saved.network)
        theirs, ours = before.network, json.loads(json.dumps(network.description))
        for name in {**theirs, **ours}:
            if name not in ("seed", "shapes", "constants") and theirs.get(name) != ours.get(name):
                raise UserError(
                    f"--init-from {printable(path)}: is of another network: {name} was {theirs.get(name)} and is "
                    f"{ours.get(name)}"
                )
        if "constants" in theirs:  # which may follow from the seed; shapes are compared, too
            build({**theirs, "seed": ours["seed"]})
        if before.classes != tuple(classes):
            k, was, is_now = next(
                (k, *pair) for k, pair in enumerate(zip(before.classes, classes, strict=True)) if len(set(pair)) > 1
            )
            LOG.warning(
                "--init-from %s: class %d was %s and is %s: outputs go by the place of a class, not by its name",
                printable(path),
                k,
                printable(was),
                printable(is_now),
            )
    return weights_for(network, saved)
