"""Products of the Hessian with directions, the samples shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qnewton_mpi.arrays import Matrix
from qnewton_mpi.data.datasets import Dataset
from qnewton_mpi.models.network import Network
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator

CHUNK = 1024  # samples of a gradient: a chunk in double precision stays small beside the data set

Vector = NDArray[np.float64]


class HessianProduct:
    """H Q, H the Hessian of the loss of all samples: the ranks share them, and an Allreduce adds up. Collective.

    Parameters
    ----------
    times : callable
        This rank's part of H q (N,), for q (N,): the parts of all ranks add up to it. Local.
    size : int
        N.
    communicator : Communicator
    tell : callable, optional
        Called after each direction, as for a progress bar.

    Examples
    --------
    >>> import numpy as np
    >>> product = HessianProduct(lambda q: np.array([3.0, 12.0]) * q, 2, Communicator())
    >>> product(np.array([[1.0, 1.0]])).tolist()
    [[3.0, 12.0]]
    """

    def __init__(
        self,
        times: Callable[[Vector], Vector],
        size: int,
        communicator: Communicator,
        tell: Callable[[], object] = lambda: None,
    ) -> None:
        self.times, self.size, self.communicator, self.tell = times, size, communicator, tell

    def __call__(self, directions: Matrix) -> Matrix:
        """Return H Q for the rows of Q (k, N), the same on all ranks bit for bit."""
        part = np.empty_like(directions)
        for k, q in enumerate(directions):
            part[k] = self.communicator.together(lambda q=q: self.times(q))  # type: ignore[misc]
            self.tell()
        total = self.communicator.allreduce(part)
        self.communicator.broadcast(total)  # an Allreduce need not round alike everywhere
        return total

    def block(self, span: slice) -> Callable[[Matrix], Matrix]:
        """Return the product with the diagonal block of some coordinates, (k, length of the span)."""

        def product(directions: Matrix) -> Matrix:
            whole = np.zeros((len(directions), self.size))
            whole[:, span] = directions
            return self(whole)[:, span]

        return product


def of_loss(
    network: Network, weights: Vector, dataset: Dataset, samples: int | None, communicator: Communicator
) -> Callable[[Vector], Vector]:
    """Return this rank's part of H q (N,), H the Hessian of the mean training NLL, as `HessianProduct` takes it. Local.

    Parameters
    ----------
    network : Network
    weights : (N + K,)
    dataset : Dataset
    samples : int, optional
        The first so many training samples instead of all.
    communicator : Communicator
    """
    total = min(samples or len(dataset.train), len(dataset.train))
    mine = partition.share(total, communicator.size, communicator.rank)

    def times(direction: Vector) -> Vector:
        found = np.zeros(network.size)
        for start in range(mine.start, mine.stop, CHUNK):
            chunk = slice(start, min(start + CHUNK, mine.stop))
            part = network.hessian_times(weights, direction, *dataset.train.batch(chunk))
            found += (chunk.stop - chunk.start) / total * part
        return found

    return times
