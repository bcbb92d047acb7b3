"""All sections of the benchmark, one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from qnewton_mpi.bench.algebra import algebra, solves
from qnewton_mpi.bench.steps import LARGEST, METHODS, steps, training
from qnewton_mpi.bench.tables import Table
from qnewton_mpi.bench.timing import seconds_of
from qnewton_mpi.bench.with_torch import adapter, gradients
from qnewton_mpi.models.convnet import Convnet
from qnewton_mpi.parallel.communicator import Communicator

IMAGES = (1, 28, 28)


def bench(
    sizes: Sequence[int], replicas: int | None, rounds: int, communicator: Communicator, seconds: float = 0.5
) -> list[Table]:
    """Return the tables of all sections. Collective.

    Parameters
    ----------
    sizes : sequence of int
        The numbers N of parameters.
    replicas : int or None
        M; None: one a rank, but two on one rank.
    rounds : int
        How often each case is timed; medians are reported.
    communicator : Communicator
    seconds : float
        Of a case and round, about.
    """
    m = replicas or max(2, communicator.size)
    tables = [steps(sizes, m, rounds, communicator, seconds)]
    tables.append(training(Convnet(IMAGES, "tanh"), METHODS[1:], max(8, m), rounds, communicator, seconds))
    wide = Convnet(IMAGES, "tanh", filters=(32, 64), dense=(900, 80))
    if max(sizes) >= wide.size:
        tables.append(training(wide, METHODS[-1:], max(8, m), rounds, communicator, seconds))
    if communicator.rank == 0:

        def clock(action: Callable[[], object]) -> float:
            return statistics.median(seconds_of(action, 1, rounds))

        # No larger than `fisher` is timed at: its rows are these.
        tables.append(algebra(np, min(max(sizes), LARGEST["fisher"]), clock))
        tables += [solves(rounds), *gradients(rounds), *adapter(rounds)]
    return tables
