"""The exchange in which each rank holds a slice of the coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from array_api_compat import array_namespace

from qnewton_mpi.arrays import Array, Columns, Held, Rows, Whole
from qnewton_mpi.core.exchange.base import Exchange
from qnewton_mpi.core.exchange.cost import Network
from qnewton_mpi.parallel import partition


class SlicedExchange(Exchange):
    """Each rank holds a slice of the coordinates: of all columns, and of all state.

    Columns come by Alltoall, means by Reduce_scatter, the new parameters go out by Allgather. So a step receives what
    one Allreduce does, and the state of the optimizers is N/n numbers where it is N elsewhere.
    """

    name = "sliced"

    def divide(self, pieces: Sequence[int]) -> None:
        self.bounds = self._bounds(pieces)
        self.words = [last - first for first, last in itertools.pairwise(self.bounds)]
        rank = self.communicator.rank
        self.held = slice(self.bounds[rank], self.bounds[rank + 1])

    def _bounds(self, pieces: Sequence[int]) -> list[int]:
        """Return where the ranks' slices begin and end: at the bounds of pieces, if there are any."""
        ranks = self.communicator.size
        return partition.bounds_of_pieces(pieces, ranks) if pieces else partition.bounds(self.size, ranks)

    def mean(self, rows: Rows) -> Held:
        self._count(lambda n: (n - 1) * self._row_bytes(rows))
        mean = self._buffer("mean", (self.words[self.communicator.rank],), rows)
        return self._divided(self.transport.reduce_scatter(self._sum(rows), self.words, mean))

    @classmethod
    def fewer_as_columns(cls, ranks: int, replicas: int, combinations: int) -> bool:
        return replicas <= ranks * (combinations + 1)

    @staticmethod
    def columns_seconds(network: Network, ranks: int, size: float) -> float:
        return network.alltoall(ranks, size / ranks)

    @staticmethod
    def sum_seconds(network: Network, ranks: int, size: float) -> float:
        return network.reduce_scatter(ranks, size)

    @staticmethod
    def back_seconds(network: Network, ranks: int, size: float, rows: float) -> float:
        return network.allgather(ranks, size) + rows

    def added_up(self, vectors: Array) -> Array:
        number = vectors.shape[0]
        self._count(lambda n: (n - 1) * min(number, self.replicas / n) * self._row_bytes(vectors))
        sums = self._buffer("sums", (number, self.words[self.communicator.rank]), vectors)
        counts = [number * words for words in self.words]
        return self.transport.reduce_scatter(self._pack(vectors), counts, sums)

    def columns(self, rows: Rows) -> Columns:
        own, mine = len(self.local), self.words[self.communicator.rank]
        send = self._pack(rows)
        columns = self._buffer("columns", (self.replicas, mine), rows)
        self._count(lambda n: (n - 1) / n * self.replicas * self._row_bytes(rows))
        self.transport.alltoall(
            send, [own * words for words in self.words], columns, [mine * count for count in self.counts]
        )
        return columns

    def rows(self, columns: Columns) -> Rows:
        own, mine = len(self.local), self.words[self.communicator.rank]
        slices = self._buffer("slices", (own * self.size,), columns)
        self._count(lambda n: (n - 1) / n * self.replicas * self._row_bytes(columns))
        self.transport.alltoall(
            columns, [mine * count for count in self.counts], slices, [own * words for words in self.words]
        )
        return self._unpack(slices)

    def collect(self, vector: Held, buffer: str = "whole") -> Whole:
        self._count(lambda n: (n - 1) * self._row_bytes(vector))
        whole = self._buffer(buffer, (self.size,), vector)
        return self.transport.allgather(vector, self.words, whole)

    def summed(self) -> slice:
        return slice(0, self.words[self.communicator.rank])

    def _pack(self, rows: Array) -> Array:
        """Return rows (k, N) as the slices of each rank one after the other, (k · N,); a single row is that already."""
        own, reshape = rows.shape[0], array_namespace(rows).reshape
        if own == 1:
            return rows[0, :]
        slices = self._buffer("slices", (own * self.size,), rows)
        for first, last in itertools.pairwise(self.bounds):
            slices[own * first : own * last] = reshape(rows[:, first:last], (-1,))
        return slices

    def _unpack(self, slices: Array) -> Array:
        """Return the rows (R, N) of what `_pack` returns."""
        own, reshape = len(self.local), array_namespace(slices).reshape
        if own == 1:
            return slices[None, :]
        rows = self._buffer("rows", (own, self.size), slices)
        for first, last in itertools.pairwise(self.bounds):
            rows[:, first:last] = reshape(slices[own * first : own * last], (own, last - first))
        return rows
