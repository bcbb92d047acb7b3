"""The exchange in which every rank holds everything."""

from __future__ import annotations

from collections.abc import Sequence

from qnewton_mpi.arrays import Array, Columns, Held, Matrix, Rows, Vectors, Whole
from qnewton_mpi.core.exchange.base import Exchange
from qnewton_mpi.core.exchange.cost import Network
from qnewton_mpi.parallel import partition


class AllgatherExchange(Exchange):
    """Every rank holds everything: means by Allreduce, columns by Allgather. No server, no state that differs."""

    name = "allgather"

    def divide(self, pieces: Sequence[int]) -> None:
        self.held = slice(0, self.size)

    def mean(self, rows: Rows) -> Held:
        self._count(lambda n: 2 * (n - 1) * self._row_bytes(rows))
        mean = self._buffer("mean", (self.size,), rows)
        return self._divided(self.transport.allreduce(self._sum(rows), mean))

    def combined(self, rows: Rows, coefficients: Matrix) -> tuple[Held, Vectors]:
        found = super().combined(rows, coefficients)
        self._buffers.pop("columns", None)  # as large as all gradients together, and needed at few steps
        return found

    @classmethod
    def fewer_as_columns(cls, ranks: int, replicas: int, combinations: int) -> bool:
        return ranks > 1 and replicas <= 2 * (combinations + 1)

    @staticmethod
    def columns_seconds(network: Network, ranks: int, size: float) -> float:
        return network.allgather(ranks, size)

    @staticmethod
    def sum_seconds(network: Network, ranks: int, size: float) -> float:
        return network.allreduce(ranks, size)

    @staticmethod
    def back_seconds(network: Network, ranks: int, size: float, rows: float) -> float:
        return 0.0

    def added_up(self, vectors: Array) -> Array:
        self._count(lambda n: (n - 1) * min(2 * vectors.shape[0], self.replicas) * self._row_bytes(vectors))
        return self.transport.allreduce(vectors, self._buffer("sums", vectors.shape, vectors))

    def columns(self, rows: Rows) -> Columns:
        self._count(lambda n: (n - 1) * self.replicas * self._row_bytes(rows))
        everyone = self._buffer("columns", (self.replicas, self.size), rows)
        return self.transport.allgather(rows, self.counts, everyone)

    def rows(self, columns: Columns) -> Rows:
        return columns[self.local.start : self.local.stop, :]

    def collect(self, vector: Held, buffer: str = "whole") -> Whole:
        return vector

    @property
    def first(self) -> bool:
        return self.communicator.rank == 0

    def summed(self) -> slice:
        return partition.share(self.size, self.communicator.size, self.communicator.rank)
