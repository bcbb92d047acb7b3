"""How the replicas' columns reach the ranks that combine them. MPI, no mathematics.

Every rank evaluates R gradients, the rows of an array (R, N). The optimizers' algebra runs on what a rank *holds*: a
range of the N coordinates, of every replica's column and of every vector. An exchange decides which range that is, and
moves data between the two layouts; the algebra is the same for all of them.

============  ===========================  ==============================================================
exchange      held by a rank               traffic of one step, words received per rank
============  ===========================  ==============================================================
`allgather`   everything                   means 2N(n−1)/n, columns (M−R)N
`server`      everything on rank 0,        rank 0: columns and means; the others: N, the new parameters
              nothing elsewhere
============  ===========================  ==============================================================
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from array_api_compat import array_namespace

from qnewton_mpi.core.secants import Matrix
from qnewton_mpi.parallel import partition
from qnewton_mpi.parallel.communicator import Communicator
from qnewton_mpi.parallel.device import Array, to_device, to_host

# Coordinates are converted to float64 in pieces of this many entries, so that a piece stays in a core's cache.
PIECE = 1 << 16


class Exchange(ABC):
    """Moves rows (this rank's replicas, all coordinates) to columns (all replicas, held coordinates) and back.

    All methods are collective.

    Parameters
    ----------
    communicator : Communicator
    replicas : int
        M, over all ranks; rank r holds share r of `partition.bounds(M, ranks)`, so that M need not be a multiple.
    size : int
        N, the number of parameters.

    Attributes
    ----------
    local : range
        The global indices of this rank's replicas.
    bytes_sent : int
        By all ranks together, so far: what each collective must move at least, 2B(n−1) for an Allreduce of B bytes over
        n ranks (bandwidth-optimal algorithm), otherwise what is not yet where it has to be.
    bytes_sent_by_replicas : int
        The same if every replica were on a rank of its own, n = M.
    """

    def __init__(self, communicator: Communicator, replicas: int, size: int) -> None:
        self.communicator = communicator
        self.replicas = replicas
        self.size = size
        limits = partition.bounds(replicas, communicator.size)
        self.counts = [last - first for first, last in itertools.pairwise(limits)]
        self.local = range(limits[communicator.rank], limits[communicator.rank + 1])
        self.bytes_sent = 0
        self.bytes_sent_by_replicas = 0

    @abstractmethod
    def mean(self, rows: Array) -> Array:
        """Return the mean of all M rows, (held,)."""

    @abstractmethod
    def columns(self, rows: Array) -> Array:
        """Return all replicas' rows, (M, held), in the order of the replicas."""

    @abstractmethod
    def rows(self, columns: Array) -> Array:
        """Return this rank's replicas of columns (M, held) with all coordinates, (R, N)."""

    @abstractmethod
    def hold(self, vector: Array) -> Array:
        """Return a copy of the held part of a vector (N,) that every rank has."""

    @abstractmethod
    def collect(self, vector: Array) -> Array:
        """Return the whole (N,) of a held vector, bitwise the same on every rank where the held parts are."""

    @abstractmethod
    def summed(self) -> slice:
        """Return the held coordinates whose products this rank adds: over the ranks, each of the N once."""

    @abstractmethod
    def total(self, array: Array) -> Array:
        """Return the sum of the ranks' arrays of one shape, on every rank."""

    def centred(self, rows: Array) -> tuple[Array, Array]:
        """Return the mean z̄ (held,) and the centred columns [z_i − z̄], (M, held)."""
        mean = self.mean(rows)
        return mean, self.columns(rows) - mean

    def gram(self, a: Array, b: Array) -> Matrix:
        """Return A Bᵀ for held columns a (p, held) and b (q, held): (p, q), host float64, bitwise equal on all ranks.

        Each rank multiplies its coordinates in float64; the partial products are all-gathered and added in rank order,
        which an Allreduce does not promise.
        """
        xp = array_namespace(a)
        part = self.summed()
        piece = max(1, PIECE // (a.shape[0] + b.shape[0]))
        partial = np.zeros((1, a.shape[0], b.shape[0]))
        for start in range(part.start, part.stop, piece):
            block = slice(start, min(start + piece, part.stop))
            left = xp.astype(a[:, block], xp.float64)
            right = left if a is b else xp.astype(b[:, block], xp.float64)
            partial[0] += to_host(left @ right.T)
        return self._added(partial)

    def dots(self, *pairs: tuple[Array, Array]) -> list[float]:
        """Return Σ x·y over all coordinates (and columns) of each pair of held arrays, the same on all ranks."""
        part = self.summed()
        partial = np.empty((1, len(pairs)))
        for k, (x, y) in enumerate(pairs):
            xp = array_namespace(x)
            partial[0, k] = float(xp.sum(x[..., part] * y[..., part], dtype=xp.float64))
        return [float(value) for value in self._added(partial)]

    def share(self, figures: Matrix) -> Matrix:
        """Return every replica's row of figures, (M, p), from this rank's (R, p)."""
        self._count(lambda n: (n - 1) * self.replicas * figures[0].nbytes)
        return self.communicator.allgather(figures, self.counts)

    def _row_bytes(self, like: Array) -> int:
        return int(self.size * array_namespace(like).finfo(like.dtype).bits // 8)

    def _count(self, sent: Callable[[int], float]) -> None:
        """Count a collective that makes n ranks together send sent(n) bytes."""
        self.bytes_sent += round(sent(self.communicator.size))
        self.bytes_sent_by_replicas += round(sent(self.replicas))

    def _added(self, partial: Matrix) -> Matrix:
        """Return the sum of the ranks' arrays (1, …) in rank order, without the first axis."""
        self._count(lambda n: n * (n - 1) * partial.nbytes)
        everyone: Matrix = self.communicator.allgather(partial, [1] * self.communicator.size)
        return everyone.sum(axis=0)  # type: ignore[no-any-return]


class AllgatherExchange(Exchange):
    """Every rank holds everything: means by Allreduce, columns by Allgather. No server, no state that differs."""

    def mean(self, rows: Array) -> Array:
        xp = array_namespace(rows)
        self._count(lambda n: 2 * (n - 1) * self._row_bytes(rows))
        total = self.communicator.allreduce(to_host(xp.sum(rows, axis=0)))
        return to_device(total, rows) / self.replicas

    def total(self, array: Array) -> Array:
        host = to_host(array)
        self._count(lambda n: 2 * (n - 1) * host.nbytes)
        return to_device(self.communicator.allreduce(host), array)

    def columns(self, rows: Array) -> Array:
        self._count(lambda n: (n - 1) * self.replicas * self._row_bytes(rows))
        return to_device(self.communicator.allgather(to_host(rows), self.counts), rows)

    def rows(self, columns: Array) -> Array:
        return columns[self.local.start : self.local.stop, :]

    def hold(self, vector: Array) -> Array:
        return array_namespace(vector).asarray(vector, copy=True)

    def collect(self, vector: Array) -> Array:
        return vector

    def summed(self) -> slice:
        return partition.share(self.size, self.communicator.size, self.communicator.rank)


class ServerExchange(Exchange):
    """Rank 0 holds everything and sends back the result: the parameter-server layout, as a baseline only."""

    def mean(self, rows: Array) -> Array:
        xp = array_namespace(rows)
        self._count(lambda n: (n - 1) * self._row_bytes(rows))
        total = self.communicator.reduce(to_host(xp.sum(rows, axis=0)))
        return to_device(total[self.summed()], rows) / self.replicas

    def total(self, array: Array) -> Array:
        host = to_host(array)
        self._count(lambda n: 2 * (n - 1) * host.nbytes)
        total = self.communicator.reduce(host)
        return to_device(self.communicator.broadcast(total.copy()), array)

    def columns(self, rows: Array) -> Array:
        self._count(lambda n: (n - 1) / n * self.replicas * self._row_bytes(rows))
        everyone = self.communicator.gather(to_host(rows), self.counts)
        return to_device(everyone.reshape(self.replicas, -1), rows)

    def rows(self, columns: Array) -> Array:
        everyone = to_host(columns)
        mine = np.empty((len(self.local), self.size), everyone.dtype)
        self._count(lambda n: (n - 1) / n * self.replicas * mine[0].nbytes)
        return to_device(self.communicator.scatter(everyone, mine, self.counts), columns)

    def hold(self, vector: Array) -> Array:
        return array_namespace(vector).asarray(vector[self.summed()], copy=True)

    def collect(self, vector: Array) -> Array:
        host = to_host(vector)
        whole = host.copy() if self.communicator.rank == 0 else np.empty(self.size, host.dtype)
        self._count(lambda n: (n - 1) * whole.nbytes)
        return to_device(self.communicator.broadcast(whole), vector)

    def summed(self) -> slice:
        return slice(0, self.size if self.communicator.rank == 0 else 0)


EXCHANGES: dict[str, type[Exchange]] = {"allgather": AllgatherExchange, "server": ServerExchange}
